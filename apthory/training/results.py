"""What training leaves: a trained configuration, and how it did on the test part."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from apthory import methods
from apthory.heads import Heads, HeadSpec
from apthory.methods import Method, files
from apthory.methods.pixels import PixelPrompt
from apthory.tasks import Split
from apthory.training.config import Configuration, Recipe


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One trained configuration, at the epoch that was best on validation data."""

    backbone: nn.Module = field(repr=False)
    method: Method
    configuration: Configuration
    recipe: Recipe
    split: Split = field(repr=False)
    epoch: int  # counted from 1
    validation_accuracy: float  # percent, at that epoch
    validation_loss: float
    validation_curve: tuple[float, ...]  # percent, by epoch
    train_curve: tuple[float, ...]  # mean cross-entropy, by epoch
    prompt_norm: float  # Euclidean norm of the prompt, in the activation's units; 0 without a prompt
    relative_norm: float  # prompt_norm divided by the mean norm of the activations
    cache_bytes: int  # memory that the prefix's results took
    state: dict[str, Tensor] = field(repr=False)
    head_spec: HeadSpec  # the kind of head
    head_shape: tuple[int, int]  # features and classes

    @property
    def prompt(self) -> methods.ActivationPrompt | PixelPrompt:
        """The trained prompt, in the units of the activation."""
        if "edits.prompt.values" not in self.state:
            raise ValueError(f"the method {self.method.name!r} has no prompt")
        overlays = self.method.build(self.backbone, 1).overlays if self.method.site == ":input" else []
        if overlays:
            load_stacked(overlays[0], [self.state], "edits.prompt.")
            return PixelPrompt(overlays[0]).requires_grad_(False)
        delta = self.state["edits.prompt.unit"][0] * self.state["edits.prompt.values"][0]
        return methods.ActivationPrompt(self.method.site, delta, self.method.shape).requires_grad_(False)

    @property
    def head(self) -> nn.Module:
        """The head as an ordinary module on the backbone's features."""
        return restored_heads([self]).cpu().export(0)

    @property
    def model(self) -> methods.PromptedBackbone:
        """Backbone, prompt and head as one module that maps normalized images to logits."""
        device = next(self.backbone.parameters()).device
        return methods.PromptedBackbone(self.backbone, self.prompt, self.head).to(device)

    def save(self, path: str | Path) -> Path:
        """Write prompt and head, without the backbone; `apthory.load_prompt` reads them back."""
        return files.save(path, self.prompt, self.backbone, self.head)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A trained configuration on the test part."""

    accuracy: float  # percent
    correct: Bool[Tensor, " image"]  # by test image, in the order of the split


def restored_heads(fits: Sequence[Fit]) -> Heads:
    """The trained heads of these fits, stacked."""
    heads = fits[0].head_spec.build(len(fits), *fits[0].head_shape, [torch.Generator() for _ in fits])
    load_stacked(heads, [one.state for one in fits], "heads.")
    return heads


def load_stacked(module: nn.Module, states: Sequence[dict[str, Tensor]], part: str) -> None:
    """Stack the states of several configurations again."""
    together: dict[str, Tensor] = {}
    for name in (key.removeprefix(part) for key in states[0] if key.startswith(part)):
        if name.startswith("weights.0."):
            for k, state in enumerate(states):
                together[f"weights.{k}.{name.removeprefix('weights.0.')}"] = state[part + name]
        else:
            together[name] = torch.cat([state[part + name] for state in states])
    module.load_state_dict(together)
