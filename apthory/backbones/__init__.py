"""Frozen backbones: timm models by name, two micro networks that ship with the package, local weight files."""

from typing import Any

from apthory._tools import moved
from apthory.backbones.frozen import (
    architecture,
    autocast,
    carried_classifier,
    default_device,
    digest,
    freeze,
    input_size,
    is_channels_last,
    mean_std,
    normalize,
)
from apthory.backbones.loading import (
    SHIPPED,
    card,
    checkpoints,
    classifier,
    create,
    load,
    shipped_folder,
    start,
    weight_file,
)

__all__ = [
    "load", "classifier", "create", "start", "checkpoints", "card", "SHIPPED", "shipped_folder", "weight_file",
    "freeze", "digest", "architecture", "default_device", "autocast", "is_channels_last",
    "carried_classifier", "input_size", "mean_std", "normalize",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    return moved.renamed(__name__, name)
