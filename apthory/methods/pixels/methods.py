"""Prompts on pixels as methods: VP, EVP and AdaViPro."""

import math
import sys
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

from torch import nn

from apthory import backbones
from apthory._tools.moved import accepts_old_fields
from apthory.methods import pixels
from apthory.methods.base import Method, PreparedBackbone, prepared
from apthory.methods.pixels.overlay import Layout, Normalization, Overlay, Place, Shrink, scaled, scaled_region


@accepts_old_fields
@dataclass(frozen=True, kw_only=True)
class VP(Method):
    """Visual prompting: a frame or a patch laid on the image (Bahng et al. 2022, arXiv:2203.17274).

    The recipe's optimizer trains it. The paper's own is SGD with momentum at a rate of 40, a thousand times that of a
    head: ``Recipe(optimizer="sgd")`` with ``lr_scale=1e3`` or more.
    """

    name: ClassVar[str] = "vp"
    label: ClassVar[str] = "VP (frame)"
    color: ClassVar[str] = "#A6761D"
    width: int | None = None  # pixels on each side, or side of a patch; None: 30 of 224, scaled to the input
    place: Place = "frame"  # a patch lies in the upper left corner, a random one elsewhere at each step
    normalized: bool = True  # added after normalization; otherwise to pixels in [0, 1]
    init: float = 1.0  # standard deviation of the initial prompt
    lr_scale: float = 10.0  # learning rate of the prompt, relative to that of the head
    site: ClassVar[str] = ":input"

    def __post_init__(self) -> None:
        _check_numbers(self, "lr_scale", "init")

    def build(self, backbone: nn.Module, num: int) -> PreparedBackbone:
        layout = Layout.of(backbone, width=_width(backbone, self.width), place=self.place, normalized=self.normalized)
        return _overlaid(backbone, Overlay(layout, num, init=self.init, lr_scale=self.lr_scale))


@accepts_old_fields
@dataclass(frozen=True, kw_only=True)
class EVP(Method):
    """A frame around a shrunk image, trained on diverse inputs by normalized gradients (Wu et al. 2022).

    The prompt has plain SGD and a cosine by epoch of its own, without warm-up, momentum or decay, whatever the
    recipe says; the head follows the recipe. Learning rate times `lr_scale` is a pixel's step in [0, 1] (see
    `Overlay.descend`): the paper's is 0.18. Without normalization steps are as small as gradients are, and
    `lr_scale` must be raised by several orders of magnitude.

    References:
        arXiv:2212.10556.
    """

    name: ClassVar[str] = "evp"
    label: ClassVar[str] = "EVP"
    color: ClassVar[str] = "#3A9BD9"
    width: int | None = None  # pixels on each side; None: 30 of 224, scaled to the input
    around: bool = True  # False lays the frame on the whole image instead
    diversity: tuple[pixels.Diversity, ...] = ("flip", "crop")  # augmentation of training images; () for none
    normalization: Normalization = "l2"  # norm that the gradient is divided by
    lr_scale: float = 1.0  # step of the prompt, relative to the learning rate of the head
    site: ClassVar[str] = ":input"

    def __post_init__(self) -> None:
        known, norms = get_args(pixels.Diversity), get_args(Normalization)
        if isinstance(self.diversity, str) or not set(self.diversity) <= set(known) or self.normalization not in norms:
            raise ValueError(
                f"diversity is {self.diversity!r} and normalization {self.normalization!r}; expected a tuple of "
                f"{', '.join(known)}, and one of {', '.join(norms)}"
            )
        _check_numbers(self, "lr_scale")

    def build(self, backbone: nn.Module, num: int) -> PreparedBackbone:
        layout = Layout.of(backbone, width=_width(backbone, self.width), around=self.around, normalized=False)
        overlay = Overlay(
            layout, num, diversity=self.diversity, normalization=self.normalization, lr_scale=self.lr_scale
        )
        return _overlaid(backbone, overlay)


@accepts_old_fields
@dataclass(frozen=True, kw_only=True)
class AdaViPro(Method):
    """VP's frame, in those regions of each image that a small network picks by their edges (Yang et al. 2024).

    References:
        arXiv:2403.13282.
    """

    name: ClassVar[str] = "adavipro"
    label: ClassVar[str] = "AdaViPro"
    color: ClassVar[str] = "#003F6B"
    width: int | None = None  # pixels on each side; None: 30 of 224, scaled to the input
    region: int | None = None  # side of a region in pixels; None: 32 of 224, scaled to a divisor of the input
    dim: int = 64  # channels of the mask generator
    edges: bool = True  # it sees the Laplacian; otherwise the grey image
    temperature: float = 5.0  # of Gumbel-Softmax in the first epoch
    decay: float = 0.98  # of the temperature, by epoch
    floor: float = 0.1  # it falls no further; the paper's own is unknown, and 1000 epochs without one end at 8e-9
    init: float = 1.0  # standard deviation of the initial prompt
    lr_scale: float = 1.0  # learning rate of the prompt, relative to that of the head
    generator_lr_scale: float = 0.25  # of the mask generator; the paper's is a 40th of its prompt's
    site: ClassVar[str] = ":input"

    def __post_init__(self) -> None:
        _check_numbers(self, "lr_scale", "generator_lr_scale", "temperature", "floor", "dim", "init", "decay")

    def build(self, backbone: nn.Module, num: int) -> PreparedBackbone:
        region = scaled_region(32, backbones.input_size(backbone)) if self.region is None else self.region
        layout = Layout.of(backbone, width=_width(backbone, self.width), region=region, dim=self.dim, edges=self.edges)
        overlay = Overlay(
            layout,
            num,
            init=self.init,
            temperature=self.temperature,
            decay=self.decay,
            floor=self.floor,
            lr_scale=self.lr_scale,
            generator_lr_scale=self.generator_lr_scale,
        )
        return _overlaid(backbone, overlay)


def method_of_layout(layout: Layout) -> Method:
    """The method that trains a prompt of this layout; what matters in training alone is at its default."""
    if layout.region is not None:
        return AdaViPro(width=layout.width, region=layout.region, dim=layout.dim, edges=layout.edges)
    if layout.around:
        return EVP(width=layout.width)
    return VP(width=layout.width, place=layout.place, normalized=layout.normalized)


def _width(backbone: nn.Module, width: int | None) -> int:
    return scaled(30, backbones.input_size(backbone)) if width is None else width


def _overlaid(backbone: nn.Module, overlay: Overlay) -> PreparedBackbone:
    whole = prepared(backbone, ":input", {":input": overlay})
    return replace(whole, prefix=Shrink(overlay.layout)) if overlay.layout.around else whole


# By field: what is expected in words, and the least and the largest value that is allowed.
_ABOVE_ZERO, _FINITE = math.ulp(0.0), sys.float_info.max
_POSITIVE = ("a positive number", _ABOVE_ZERO, _FINITE)
_RANGES = {"init": ("zero or more", 0.0, _FINITE), "decay": ("above 0, at most 1", _ABOVE_ZERO, 1.0)}


def _check_numbers(method: Any, *names: str) -> None:
    for name in names:
        value, (expected, low, high) = getattr(method, name), _RANGES.get(name, _POSITIVE)
        if not low <= value <= high:
            default = getattr(type(method), name)
            raise ValueError(f"{name} of {method.name} is {value!r}; expected {expected}; default {default}")
