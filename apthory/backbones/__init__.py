"""Frozen backbones by name: timm's models, two that ship with the package, image towers of CLIP."""

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
    tensors_digest,
)
from apthory.backbones.loading import (
    SHIPPED,
    card,
    checkpoints,
    classifier,
    create,
    load_again,
    load_arguments,
    load_backbone,
    load_sized,
    start,
)

load = load_backbone

__all__ = [
    "load", "load_backbone", "load_sized", "load_again", "load_arguments", "classifier", "create", "start",
    "checkpoints", "card", "SHIPPED", "shipped_folder", "weight_file", "freeze", "digest", "tensors_digest",
    "architecture", "default_device", "autocast", "is_channels_last", "carried_classifier", "whole",
    "input_size", "mean_std", "normalize",
]  # fmt: skip
