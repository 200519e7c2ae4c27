"""What training leaves: a trained configuration, the head of one held still, and how it did on the test part."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from apthory import methods
from apthory._tools import moved
from apthory.heads import Heads, HeadSpec
from apthory.methods import AdaptedBackbone, Method, adapted, files
from apthory.tasks import Split
from apthory.training.config import Configuration, Recipe


@dataclass(frozen=True, kw_only=True, repr=False)
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
    prompt_norm: float  # Euclidean norm, in the activation's units; 0 without a prompt, nan with more than one
    relative_norm: float  # prompt_norm divided by the mean norm of the activations
    cache_bytes: int  # memory that the prefix's results took
    state: dict[str, Tensor] = field(repr=False)  # of the edits, as `methods.PreparedBackbone.state` names it
    head_state: dict[str, Tensor] = field(repr=False)
    head_spec: HeadSpec  # the kind of head
    head_shape: tuple[int, int]  # features and classes
    classes: tuple[str, ...] = field(repr=False)
    transform: str = field(repr=False)  # how the task's images became pixels

    @property
    def prompt(self) -> methods.ActivationPrompt | methods.PixelPrompt:
        """The trained prompt, in the units of the activation.

        Raises:
            ValueError: If the method has no prompt.
        """
        return self.model.prompt

    @property
    def head(self) -> nn.Module:
        """The head as an ordinary module on the backbone's features."""
        return restored_heads([self]).cpu().export(0)

    @cached_property
    def model(self) -> AdaptedBackbone:
        """Backbone, what was trained, and head as one module that maps normalized images to logits."""
        trained = self.backbone, self.method, self.state, self.head
        return adapted.adapt(*trained, classes=self.classes, transform=self.transform)

    def save(self, path: str | Path) -> Path:
        """Write what was trained and the head, without the backbone; `apthory.load_prompt` reads them back."""
        return files.save_model(path, self.model)

    def __repr__(self) -> str:
        how = f"{self.method}, {self.configuration}"
        return f"Fit({how}; {self.validation_accuracy:.1f} % of validation images at epoch {self.epoch})"

    def __getitem__(self, index: int | slice) -> Any:
        # Up to version 0.1 one fit came as a list of one.
        alone = [self][index]
        moved.warn_of_old_name("the list of one fit", "the fit itself (fit() gives a list for a list)")
        return alone

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True, eq=False)
class FrozenHead:
    """The trained heads of earlier fits, held still: what is trained beside them is the method's edits alone.

    Args:
        fits: A list with one for each configuration.
    """

    fits: Sequence[Fit]

    def __post_init__(self) -> None:
        if isinstance(self.fits, Fit):
            raise ValueError("FrozenHead takes a list, with one fit for each configuration: FrozenHead([fit])")
        object.__setattr__(self, "fits", tuple(self.fits))
        if kinds := {type(fit).__name__ for fit in self.fits} - {"Fit"}:
            raise ValueError(f"FrozenHead takes fits, one for each configuration; got a {', '.join(sorted(kinds))}")
        names = sorted({type(fit.head_spec).__name__ for fit in self.fits})
        if len(names) != 1:
            raise ValueError(f"FrozenHead takes fits with one kind of head; these have {' and '.join(names) or 'none'}")

    @property
    def spec(self) -> HeadSpec:
        """The kind of these heads."""
        return self.fits[0].head_spec

    def __getitem__(self, part: slice) -> "FrozenHead":
        return FrozenHead(self.fits[part])


Head = HeadSpec | FrozenHead


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation:
    """A trained configuration on the test part."""

    accuracy: float  # percent
    correct: Bool[Tensor, " image"]  # by test image, in the order of the split
    recall: Float[Tensor, " class"]  # percent of each class's images that are right; nan for a class without images

    def __repr__(self) -> str:
        counted = f"{self.balanced_accuracy:.1f} % where each class counts alike"
        return f"Evaluation({self.accuracy:.1f} % of {len(self.correct)} test images, {counted})"

    @property
    def balanced_accuracy(self) -> float:
        """Percent: the mean of the classes' recalls, so that a class counts the same however many images it has."""
        return float(self.recall.nanmean())

    @classmethod
    def of(cls, correct: Bool[Tensor, " image"], labels: Int64[Tensor, " image"], num_classes: int) -> "Evaluation":
        """From which images are right, and of which class they are."""
        hits = torch.bincount(labels[correct], minlength=num_classes).double()
        recall = 100 * hits / torch.bincount(labels, minlength=num_classes)  # 0 / 0 is nan
        return cls(accuracy=100 * int(correct.sum()) / len(correct), correct=correct, recall=recall)


def restored_heads(fits: Sequence[Fit]) -> Heads:
    """The trained heads of these fits, stacked."""
    heads = fits[0].head_spec.build(len(fits), *fits[0].head_shape, [torch.Generator() for _ in fits])
    load_heads(heads, fits)
    return heads


def load_heads(heads: Heads, fits: Sequence[Fit]) -> None:
    """Take over the trained values of as many heads as there are."""
    heads.load_state_dict({name: torch.stack([fit.head_state[name] for fit in fits]) for name in heads.state_dict()})
