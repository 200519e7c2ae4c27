"""Prompts on pixels: frames and patches on the image, around it, or in regions that a small network picks."""

from apthory.methods.pixels.augmentation import Diversity
from apthory.methods.pixels.overlay import (
    Layout,
    Normalization,
    Overlay,
    PixelPrompt,
    Place,
    Shrink,
    scaled,
    scaled_region,
    shrunk,
)

__all__ = [
    "Layout", "Place", "Overlay", "PixelPrompt", "Normalization", "Diversity",
    "Shrink", "shrunk", "scaled", "scaled_region",
]  # fmt: skip
