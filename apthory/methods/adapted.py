"""An adapted backbone: what any method leaves, as one module from normalized images to logits."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from apthory import sites
from apthory.methods.activation import ActivationPrompt, ActivationPrompting
from apthory.methods.base import Method, placed
from apthory.methods.pixels.methods import method_of_layout
from apthory.methods.pixels.overlay import PixelPrompt

Prompt = ActivationPrompt | PixelPrompt


@dataclass(frozen=True)
class Adaptation:
    """What a saved file needs to say: the method, and what it trained."""

    method: Method
    state: Mapping[str, Tensor]  # as `PreparedBackbone.state` names it


class AdaptedBackbone(nn.Module):
    """A frozen backbone with what a method trained, and a head when there is one.

    Args:
        backbone: Never changed.
        edits: Modules by the place where they act, or one prompt, which knows its place.
        head: From features to logits; without one the model gives features.
        weights: Parameters that take the place of the backbone's own, by name.
        reader: What gives the features instead of the whole backbone, as a tuple (a probe at a site).
        classes: Names of the logits.
        transform: How the images became pixels that it was trained on.
        source: What `save` writes; a single prompt needs none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        edits: Mapping[str, nn.Module] | Prompt | None = None,
        head: nn.Module | None = None,
        *,
        weights: Mapping[str, Tensor] | None = None,
        reader: nn.Module | None = None,
        classes: Sequence[str] = (),
        transform: str = "",
        source: Adaptation | None = None,
    ) -> None:
        super().__init__()
        if isinstance(edits, Prompt):
            edits = {edits.site: edits}
        self.backbone, self.head, self.reader = backbone, head, reader
        self.places = tuple(edits or ())
        self.edits = nn.ModuleList((edits or {}).values())
        self.tuned = tuple(weights or ())  # names of parameters that other values take the place of
        for index, value in enumerate((weights or {}).values()):
            self.register_buffer(f"weight_{index}", value.detach())
        self.classes, self.transform, self._source = tuple(classes), transform, source

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch *class"]:
        features = self.features(x)
        if self.head is None:
            return features
        return self.head(features.to(next(self.head.parameters()).dtype))

    def features(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch *width"]:
        """What the head sees."""
        if self.reader is not None:
            return self.reader(x)[0]
        with sites.edited(self.backbone, **placed(self.backbone, dict(zip(self.places, self.edits, strict=True)))):
            return functional_call(self.backbone, self.weights, (x,)) if self.tuned else self.backbone(x)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameters that take the place of the backbone's own, by name."""
        return {name: getattr(self, f"weight_{index}") for index, name in enumerate(self.tuned)}

    @property
    def prompt(self) -> Prompt:
        """The prompt.

        Raises:
            ValueError: If the method is none that has a prompt.
        """
        if len(self.edits) != 1 or not isinstance(self.edits[0], Prompt):
            name = "" if self._source is None else f" {self._source.method.name!r}"
            raise ValueError(f"the method{name} has no prompt; its edits are .edits, its tuned weights .weights")
        return self.edits[0]

    @property
    def source(self) -> Adaptation:
        """The method and what it trained; of a prompt that was made by hand, the method that would train it.

        Raises:
            ValueError: If neither is known.
        """
        if self._source is not None:
            return self._source
        prompt = self.prompt
        if self.tuned or self.reader is not None:
            raise ValueError("a prompt with tuned weights or a reader beside it is no method's; it cannot be saved")
        if isinstance(prompt, PixelPrompt):
            overlay = prompt.overlay
            return Adaptation(method_of_layout(overlay.layout), _at(":input", overlay.state(0)))
        site = prompt.site if ":" in prompt.site else f"{prompt.site}:output"
        method = ActivationPrompting(site=site, shape=prompt.shape, in_rms_units=False)
        unit = torch.ones([1] * prompt.delta.ndim)
        state = {"values": prompt.delta.detach().cpu(), "unit": unit, "activation_norm": torch.ones(())}
        return Adaptation(method, _at(site, state))

    def merged(self) -> nn.Module:
        """One ordinary module that shares nothing with the backbone, for `torch.export`, ONNX and servers.

        Tuned weights are written into a copy of the backbone; edits become a part of its graph. It takes what
        `apthory.normalize` gives. For batches of any size, with ``x`` two such images or more (ONNX wants the packages
        onnx and onnxscript)::

            merged, sizes = model.merged(), ({0: torch.export.Dim("batch")},)
            torch.export.save(torch.export.export(merged, (x,), dynamic_shapes=sizes), "model.pt2")
            torch.onnx.export(merged, (x,), "model.onnx", dynamo=True, dynamic_shapes=sizes)
        """
        if self.reader is not None:
            body: nn.Module = _First(copy.deepcopy(self.reader))
        else:
            body = copy.deepcopy(self.backbone)
            with torch.no_grad():
                for name, value in self.weights.items():
                    body.get_parameter(name).copy_(value)
            if self.places:
                edits = dict(zip(self.places, copy.deepcopy(self.edits), strict=True))
                prefix, suffix = sites.split(body, ":input", **placed(body, edits))
                body = _Joined(prefix, suffix)
        head = nn.Identity() if self.head is None else copy.deepcopy(self.head)
        return nn.Sequential(body, head).requires_grad_(False).eval()


def adapt(
    backbone: nn.Module,
    method: Method,
    state: Mapping[str, Tensor],
    head: nn.Module | None = None,
    *,
    classes: Sequence[str] = (),
    transform: str = "",
) -> AdaptedBackbone:
    """A backbone with what a method trained.

    Args:
        method: As it was trained.
        state: As `PreparedBackbone.state` gives it.
        head: As in `AdaptedBackbone`, like the arguments that follow.
    """
    device = next(backbone.parameters()).device
    prepared = method.build(backbone, 1)
    prepared.load([state])
    prepared.suffix.to(device)
    edits: dict[str, nn.Module] = dict(prepared.held)
    weights: dict[str, Tensor] = {}
    for place, stack in prepared.stacks.items():
        if own := stack.weights(0):
            weights.update(own)
        else:
            edits[place] = stack.export(0)
    model = AdaptedBackbone(
        backbone,
        edits,
        head,
        weights=weights,
        reader=prepared.prefix if prepared.reads_prefix else None,
        classes=classes,
        transform=transform,
        source=Adaptation(method, dict(state)),
    )
    return ready(model)


def ready(model: AdaptedBackbone) -> AdaptedBackbone:
    """Put what was trained on the backbone's device, to be used and not trained; the backbone itself stays as it is."""
    device = next(model.backbone.parameters()).device
    for part in (model.edits, model.head):
        if part is not None:
            part.to(device).requires_grad_(False).eval()
    for name, value in model.named_buffers(recurse=False):
        setattr(model, name, value.to(device))
    model.training = False
    return model


class _First(nn.Module):
    """The first of what a module gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[0]


class _Joined(nn.Module):
    """Both halves of a backbone, one after the other."""

    def __init__(self, prefix: nn.Module, suffix: nn.Module) -> None:
        super().__init__()
        self.prefix, self.suffix = prefix, suffix

    def forward(self, x: Tensor) -> Tensor:
        return self.suffix(*self.prefix(x))


def _at(place: str, state: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{place}.{name}": value for name, value in state.items()}
