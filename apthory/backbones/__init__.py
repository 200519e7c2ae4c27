"""Frozen backbones by name: timm's models, two that ship with the package, image towers of CLIP."""

from typing import Any

from apthory._tools import moved
from apthory.backbones.clip_towers import whole
from apthory.backbones.files import shipped_folder, weight_file
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
    load_again,
    load_arguments,
    load_sized,
    start,
)

__all__ = [
    "load", "load_sized", "load_again", "load_arguments", "classifier", "create", "start", "checkpoints", "card",
    "SHIPPED", "shipped_folder", "weight_file",
    "freeze", "digest", "architecture", "default_device", "autocast", "is_channels_last", "carried_classifier", "whole",
    "input_size", "mean_std", "normalize",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    return moved.renamed(__name__, name)
