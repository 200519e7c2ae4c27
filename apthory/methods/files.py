"""Prompts with their heads in one file, without the backbone."""

import json
from dataclasses import asdict
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from apthory import backbones, sites
from apthory._tools.files import write_atomically
from apthory.heads import CosineHead
from apthory.methods.activation import ActivationPrompt, prompt_shape
from apthory.methods.pixels.overlay import PixelPrompt

_FORMAT = "apthory.prompt/1"
_PIXELS_FORMAT = "apthory.pixels/1"


class PromptedBackbone(nn.Module):
    """A frozen backbone with a prompt, and a head when there is one; maps normalized images to logits."""

    def __init__(
        self, backbone: nn.Module, prompt: ActivationPrompt | PixelPrompt, head: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.prompt, self.head = backbone, prompt, head

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch class"]:
        with sites.edited(self.backbone, {self.prompt.site: self.prompt}):
            features = self.backbone(x)
        return features if self.head is None else self.head(features)


def save(
    path: str | Path,
    prompt: ActivationPrompt | PixelPrompt,
    backbone: nn.Module,
    head: nn.Module | None = None,
) -> Path:
    """Write a prompt, and its head, as safetensors with the configuration in the metadata; never the backbone.

    Args:
        head: A linear or a cosine head, as `training.Fit` has them.
    """
    if not isinstance(head, nn.Linear | CosineHead | None):
        raise ValueError(f"a head of the kind {type(head).__name__} cannot be saved; take nn.Linear or CosineHead")
    path = Path(path)
    config: dict[str, object]
    if isinstance(prompt, PixelPrompt):
        tensors = {f"prompt.{name}": value for name, value in prompt.overlay.state_dict().items()}
        config = {"format": _PIXELS_FORMAT, "layout": asdict(prompt.layout)}
    else:
        tensors = {"prompt": prompt.delta.detach()}
        config = {"format": _FORMAT, "site": prompt.site, "shape": prompt.shape}
    if head is not None:
        tensors |= {f"head.{name}": value.detach() for name, value in head.named_parameters()}
    config |= {"backbone": backbones.architecture(backbone), "digest": backbones.digest(backbone)}
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, serialize(tensors, {"apthory": json.dumps(config)}))
    return path


def load(path: str | Path, backbone: nn.Module) -> PromptedBackbone:
    """Read a prompt back onto the backbone for which it was trained.

    Raises:
        ValueError: If the file is not a prompt, or belongs to another backbone, site or shape.
    """
    with _opened(path) as file:
        config = json.loads((file.metadata() or {}).get("apthory", "{}"))
        if config.get("format") not in (_FORMAT, _PIXELS_FORMAT):
            raise ValueError(f"{path} is not a prompt saved by apthory (format {config.get('format')!r})")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    own = backbones.architecture(backbone)
    if config["backbone"] != own:
        raise ValueError(f"{path} was trained for the backbone {config['backbone']!r}, not {own!r}; load that one")
    if config["digest"] != backbones.digest(backbone):
        raise ValueError(f"{path} was trained for other weights of {own!r}; load the backbone with those weights")
    prompt: ActivationPrompt | PixelPrompt
    if config["format"] == _PIXELS_FORMAT:
        prompt = PixelPrompt.restore(config["layout"], _part(tensors, "prompt."))
    else:
        site = sites.resolve(backbone, config["site"])
        expected = prompt_shape(backbone, site, config["shape"])
        if tuple(tensors["prompt"].shape) != expected:
            found = tuple(tensors["prompt"].shape)
            raise ValueError(f"{path} holds a prompt of shape {found}; {site!r} of this backbone takes {expected}")
        prompt = ActivationPrompt(site, tensors["prompt"], config["shape"])
    head: nn.Linear | CosineHead | None = None
    if "head.weight" in tensors:
        num_classes, width = tensors["head.weight"].shape
        is_linear = "head.scale" not in tensors
        head = nn.Linear(width, num_classes) if is_linear else CosineHead(tensors["head.weight"], 1.0)
        head.load_state_dict(_part(tensors, "head."))
    device = next(backbone.parameters()).device
    return PromptedBackbone(backbone, prompt, head).to(device).requires_grad_(False).eval()


def _part(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def _opened(path: str | Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a prompt saved by apthory ({error}); Fit.save writes them") from error
