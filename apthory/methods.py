"""Ways to adapt a frozen backbone, each as a cut and the edits after it.

A method says where the frozen prefix ends (its result can be cached) and which trainable edits the suffix carries.
Edits hold their parameters for a whole bundle: the first axis counts configurations, and the batch that they are
given stacks the configurations' examples one after the other.
"""

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apthory import backbones, pixels, prompts, sites


@dataclass
class Body:
    """A backbone prepared for a bundle: ``suffix(*prefix(images))`` gives features, with the bundle's edits inside."""

    prefix: nn.Module  # frozen; images -> tensors that cross the cut
    suffix: nn.Module  # tensors for the stacked configurations -> features
    edits: nn.ModuleDict  # the trainable parts, by name; their parameters are stacked by configuration
    generators: list[torch.Generator] = field(default_factory=list)  # what is random is drawn from, one each

    @property
    def overlays(self) -> list[pixels.Overlay]:
        """Edits that draw at random in training, have a schedule of their own, or both."""
        return [edit for edit in self.edits.values() if isinstance(edit, pixels.Overlay)]

    def start(self, seeds: Sequence[int]) -> None:
        """Draw what edits begin with, each configuration by its own seed, and keep its generator for later draws."""
        self.generators = [torch.Generator().manual_seed(7_000_003 * (seed + 1)) for seed in seeds]
        for overlay in self.overlays:
            overlay.start(self.generators)

    def begin_epoch(self, epoch: int, num_epochs: int) -> None:
        """Move schedules by epoch on; epochs count from 0."""
        for overlay in self.overlays:
            overlay.begin_epoch(epoch, num_epochs)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While this lasts (a training step), edits that draw at random do; otherwise nothing is random."""
        for overlay in self.overlays:
            overlay.generators = self.generators
        try:
            yield
        finally:
            for overlay in self.overlays:
                overlay.generators = ()

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """While this lasts, prompts note how large the activations are that they see."""
        shifts = [edit for edit in self.edits.values() if isinstance(edit, Shift | pixels.Overlay)]
        for shift in shifts:
            shift.is_calibrating = True
        try:
            yield
        finally:
            for shift in shifts:
                shift.is_calibrating = False


class Shift(nn.Module):
    """Adds ``unit * values``: activation prompts for a bundle of configurations.

    Args:
        num: Configurations in the bundle.
        shape: Shape of one prompt.
        relative: Measure the prompt in units of the activation's root mean square, so that one learning rate
            means the same at every site; otherwise the unit is one.
    """

    def __init__(self, num: int, shape: tuple[int, ...], relative: bool = True) -> None:
        super().__init__()
        self.relative = relative
        self.is_calibrating = False
        self.unit_shape: tuple[int, ...] = shape  # of the activation, once it was seen
        self.unit: Tensor
        self.activation_norm: Tensor
        self.values = nn.Parameter(torch.zeros(num, *shape))
        self.register_buffer("unit", torch.ones(num, *(1 for _ in shape)))
        self.register_buffer("activation_norm", torch.ones(num))  # mean Euclidean norm of the activations

    def forward(self, z: Float[Tensor, "stack *unit"]) -> Float[Tensor, "stack *unit"]:
        by_configuration = z.unflatten(0, (len(self.values), -1))
        if self.is_calibrating:
            self._calibrate(by_configuration)
        delta = (self.unit * self.values).to(z.dtype).unsqueeze(1)
        return (by_configuration + delta).flatten(0, 1)

    @torch.no_grad()
    def _calibrate(self, z: Float[Tensor, "num batch *unit"]) -> None:
        self.unit_shape = tuple(z.shape[2:])
        self.activation_norm.copy_(z.float().flatten(2).norm(dim=2).mean(1))
        if self.relative:
            self.unit.copy_(rms(z).view(self.unit.shape))


class Affine(nn.Module):
    """``(1 + scale) * y + unit * shift`` after a normalization layer: tuning of its gamma and beta.

    With gamma' = gamma (1 + scale) and beta' = beta (1 + scale) + unit * shift this reaches every gamma' and beta'
    as long as gamma has no zeros. Gamma alone scales y - beta, which leaves beta as it is. The unit is the root mean
    square that gamma and beta give to a normalized input.
    """

    def __init__(self, num: int, norm: nn.Module, shape: tuple[int, ...], parameters: str) -> None:
        super().__init__()
        weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
        if weight is None:
            raise ValueError(f"{norm} has no gamma and beta to tune; choose a site next to an affine norm layer")
        square = weight.square() + (0 if bias is None else bias.square())
        self.num, self.unit = num, float(square.mean().sqrt())
        keeps_beta = parameters == "gamma" and bias is not None
        self.register_buffer("beta", bias.detach().view(shape) if keeps_beta else None, persistent=False)
        self.scale = nn.Parameter(torch.zeros(num, *shape)) if parameters in ("gamma", "both") else None
        self.shift = nn.Parameter(torch.zeros(num, *shape)) if parameters in ("beta", "both") else None

    def forward(self, y: Float[Tensor, "stack *unit"]) -> Float[Tensor, "stack *unit"]:
        z = y.unflatten(0, (self.num, -1))
        if self.scale is not None:
            z = z * (1 + self.scale).to(y.dtype).unsqueeze(1)
        if self.beta is not None:
            z = z - (self.scale * self.beta).to(y.dtype).unsqueeze(1)
        if self.shift is not None:
            z = z + (self.unit * self.shift).to(y.dtype).unsqueeze(1)
        return z.flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class ActivationPrompting:
    """A prompt at one site, and a head; at ``:input`` one on the whole normalized image."""

    name: ClassVar[str] = "ap"
    site: str  # where the prompt is added
    shape: prompts.Shape = "full"  # one value a unit, or one a channel
    relative: bool = True  # learn in units of the activation's root mean square
    rate: float = 10.0  # learning rate of the prompt, relative to that of the head
    head: Literal["trained", "frozen"] = "trained"  # frozen: at the linear probe's weights

    def build(self, backbone: nn.Module, num: int) -> Body:
        edit = Shift(num, prompts.prompt_shape(backbone, self.site, self.shape), self.relative)
        prefix, suffix = sites.split(backbone, self.site, {self.site: edit})
        return Body(prefix, suffix, nn.ModuleDict({"prompt": edit}))


@dataclass(frozen=True, kw_only=True)
class NormTuning:
    """Gamma and beta of normalization layers of any kind; running statistics stay frozen."""

    name: ClassVar[str] = "norm"
    site: str  # block site after which the layers lie
    layers: Literal["block", "all"] = "block"  # those up to the next block site, or all that follow
    parameters: Literal["gamma", "beta", "both"] = "both"
    rate: float = 10.0  # learning rate of gamma and beta, relative to that of the head
    head: Literal["trained", "frozen"] = "trained"

    def __post_init__(self) -> None:
        if self.parameters not in ("gamma", "beta", "both") or self.layers not in ("block", "all"):
            raise ValueError(
                f"parameters is {self.parameters!r} and layers {self.layers!r}; "
                "expected gamma, beta or both, and block or all"
            )

    def build(self, backbone: nn.Module, num: int) -> Body:
        layers = sites.norms_between(backbone, self.site, "next" if self.layers == "block" else "last")
        if not layers:
            end = "the next block" if self.layers == "block" else "the output"
            raise ValueError(f"there is no normalization layer between {self.site!r} and {end} to tune")
        edits, table = {}, nn.ModuleDict()
        for index, layer in enumerate(layers):
            place = sites.affine_output(backbone, layer)
            shape = prompts.prompt_shape(backbone, place, "channel")
            table[f"norm_{index}"] = edits[place] = Affine(num, backbone.get_submodule(layer), shape, self.parameters)
        prefix, suffix = sites.split(backbone, self.site, edits)
        return Body(prefix, suffix, table)


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A head alone: on the final features, or on a site's own activations averaged over positions."""

    name: ClassVar[str] = "linear"
    site: str = ":output"  # where the features are read
    head: ClassVar[str] = "trained"

    def build(self, backbone: nn.Module, num: int) -> Body:
        prefix, suffix = sites.split(backbone, self.site)
        if self.site != ":output":
            if not sites.is_traceable(backbone):
                raise ValueError(f"a probe at {self.site!r} needs a backbone that torch.fx can trace; probe ':output'")
            rank = len(sites.site_shape(backbone, self.site))
            prefix = _Pooled(prefix, sites.channel_axis(backbone, self.site) if rank > 1 else -1, repr(self))
            suffix = nn.Identity()
        return Body(prefix, suffix, nn.ModuleDict())


@dataclass(frozen=True, kw_only=True)
class FixedPrompt:
    """A head over a backbone with a frozen prompt: the control for what a random prompt of some size does."""

    name: ClassVar[str] = "random"
    site: str
    norm: float  # Euclidean norm of the prompt over all units, in the activation's units
    seed: int = 0  # direction of the prompt, uniform on the sphere
    shape: prompts.Shape = "full"
    head: ClassVar[str] = "trained"

    def build(self, backbone: nn.Module, num: int) -> Body:
        generator = torch.Generator().manual_seed(self.seed)
        delta = torch.randn(prompts.prompt_shape(backbone, self.site, self.shape), generator=generator)
        spread = delta.expand(sites.site_shape(backbone, self.site)).norm()
        delta = (delta * (self.norm / spread)).to(next(backbone.parameters()).device)
        prompt = prompts.ActivationPrompt(self.site, delta, self.shape).requires_grad_(False)
        prefix, suffix = sites.split(backbone, self.site, {self.site: prompt})
        return Body(_Chain(prefix, suffix, repr(self)), nn.Identity(), nn.ModuleDict())


@dataclass(frozen=True, kw_only=True)
class FullFineTuning:
    """All weights, from the pretrained ones; normalization statistics stay frozen."""

    name: ClassVar[str] = "full"
    rate: float = 0.05  # learning rate of the weights, relative to that of the head
    head: ClassVar[str] = "trained"
    site: ClassVar[str] = ":input"

    def build(self, backbone: nn.Module, num: int) -> Body:
        prefix, _ = sites.split(backbone, ":input")
        copies = nn.ModuleList(copy.deepcopy(backbone).requires_grad_(True) for _ in range(num))
        return Body(prefix, _Copies(copies), nn.ModuleDict({"weights": copies}))


@dataclass(frozen=True, kw_only=True)
class VP:
    """Visual prompting: a frame or a patch laid on the image (Bahng et al. 2022, arXiv:2203.17274).

    The recipe's optimizer trains it. The paper's own is SGD with momentum at a rate of 40, a thousand times that of a
    head: ``Recipe(optimizer="sgd")`` with ``rate=1e3`` or more.
    """

    name: ClassVar[str] = "vp"
    width: int | None = None  # pixels on each side, or side of a patch; None: 30 of 224, scaled to the input
    place: pixels.Place = "frame"  # a patch lies in the upper left corner, a random one elsewhere at each step
    normalized: bool = True  # added after normalization; otherwise to pixels in [0, 1]
    init: float = 1.0  # standard deviation of the initial prompt
    rate: float = 10.0  # learning rate of the prompt, relative to that of the head
    head: Literal["trained", "frozen"] = "trained"
    site: ClassVar[str] = ":input"

    def __post_init__(self) -> None:
        _check_numbers(self, "rate", "init")

    def build(self, backbone: nn.Module, num: int) -> Body:
        layout = pixels.Layout.of(
            backbone, width=_width(backbone, self.width), place=self.place, normalized=self.normalized
        )
        return _overlaid(backbone, pixels.Overlay(layout, num, init=self.init))


@dataclass(frozen=True, kw_only=True)
class EVP:
    """A frame around a shrunk image, trained on diverse inputs by normalized gradients (Wu et al. 2022).

    The prompt has plain SGD and a cosine by epoch of its own, without warm-up, momentum or decay, whatever the
    recipe says; the head follows the recipe. Learning rate times `rate` is a pixel's step in [0, 1] (see
    `pixels.Overlay.descend`): the paper's is 0.18. Without normalization steps are as small as gradients are, and
    `rate` must be raised by several orders of magnitude.

    References:
        arXiv:2212.10556.
    """

    name: ClassVar[str] = "evp"
    width: int | None = None  # pixels on each side; None: 30 of 224, scaled to the input
    around: bool = True  # False lays the frame on the whole image instead
    diversity: tuple[pixels.Diversity, ...] = ("flip", "crop")  # augmentation of training images; () for none
    normalization: pixels.Normalization = "l2"  # norm that the gradient is divided by
    rate: float = 1.0  # step of the prompt, relative to the learning rate of the head
    head: Literal["trained", "frozen"] = "trained"
    site: ClassVar[str] = ":input"

    def __post_init__(self) -> None:
        known, norms = get_args(pixels.Diversity), get_args(pixels.Normalization)
        if isinstance(self.diversity, str) or not set(self.diversity) <= set(known) or self.normalization not in norms:
            raise ValueError(
                f"diversity is {self.diversity!r} and normalization {self.normalization!r}; expected a tuple of "
                f"{', '.join(known)}, and one of {', '.join(norms)}"
            )
        _check_numbers(self, "rate")

    def build(self, backbone: nn.Module, num: int) -> Body:
        layout = pixels.Layout.of(backbone, width=_width(backbone, self.width), around=self.around, normalized=False)
        overlay = pixels.Overlay(layout, num, diversity=self.diversity, normalization=self.normalization)
        return _overlaid(backbone, overlay)


@dataclass(frozen=True, kw_only=True)
class AdaViPro:
    """VP's frame, in those regions of each image that a small network picks by their edges (Yang et al. 2024).

    References:
        arXiv:2403.13282.
    """

    name: ClassVar[str] = "adavipro"
    width: int | None = None  # pixels on each side; None: 30 of 224, scaled to the input
    region: int | None = None  # side of a region in pixels; None: 32 of 224, scaled to a divisor of the input
    dim: int = 64  # channels of the mask generator
    edges: bool = True  # it sees the Laplacian; otherwise the grey image
    temperature: float = 5.0  # of Gumbel-Softmax in the first epoch
    decay: float = 0.98  # of the temperature, by epoch
    floor: float = 0.1  # it falls no further; the paper's own is unknown, and 1000 epochs without one end at 8e-9
    init: float = 1.0  # standard deviation of the initial prompt
    rate: float = 1.0  # learning rate of the prompt, relative to that of the head
    generator_rate: float = 0.25  # of the mask generator; the paper's is a 40th of its prompt's
    head: Literal["trained", "frozen"] = "trained"
    site: ClassVar[str] = ":input"

    def __post_init__(self) -> None:
        _check_numbers(self, "rate", "generator_rate", "temperature", "floor", "dim", "init", "decay")

    def build(self, backbone: nn.Module, num: int) -> Body:
        region = pixels.scaled_region(32, backbones.input_size(backbone)) if self.region is None else self.region
        layout = pixels.Layout.of(
            backbone, width=_width(backbone, self.width), region=region, dim=self.dim, edges=self.edges
        )
        overlay = pixels.Overlay(
            layout, num, init=self.init, temperature=self.temperature, decay=self.decay, floor=self.floor
        )
        return _overlaid(backbone, overlay)


Method = ActivationPrompting | NormTuning | LinearProbe | FixedPrompt | FullFineTuning | VP | EVP | AdaViPro
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (ActivationPrompting, NormTuning, LinearProbe, FixedPrompt, FullFineTuning, VP, EVP, AdaViPro)
}


def relative_rate(method: Method, parameter: str) -> float:
    """Learning rate of one of the edits' parameters, relative to that of the head."""
    if isinstance(method, AdaViPro) and ".masks." in parameter:
        return method.generator_rate
    return method.rate


def _width(backbone: nn.Module, width: int | None) -> int:
    return pixels.scaled(30, backbones.input_size(backbone)) if width is None else width


def _overlaid(backbone: nn.Module, overlay: pixels.Overlay) -> Body:
    prefix, suffix = sites.split(backbone, ":input", {":input": overlay})
    if overlay.layout.around:
        prefix = pixels.Shrink(overlay.layout)
    return Body(prefix, suffix, nn.ModuleDict({"prompt": overlay}))


class _Pooled(nn.Module):
    """The site's activation, averaged over positions."""

    def __init__(self, prefix: nn.Module, axis: int, code: str) -> None:
        super().__init__()
        self.prefix, self.axis = prefix, axis
        self.code = code  # tells one cached prefix from another

    def forward(self, x: Tensor) -> tuple[Tensor]:
        z = self.prefix(x)[0].movedim(self.axis, -1)
        return (z.flatten(1, -2).mean(1) if z.ndim > 2 else z,)


class _Chain(nn.Module):
    def __init__(self, prefix: nn.Module, suffix: nn.Module, code: str) -> None:
        super().__init__()
        self.prefix, self.suffix = prefix, suffix
        self.code = code  # tells one cached prefix from another

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.suffix(*self.prefix(x)),)


class _Copies(nn.Module):
    """One network for each configuration."""

    def __init__(self, copies: nn.ModuleList) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([model(part) for model, part in zip(self.copies, x.chunk(len(self.copies)), strict=True)])


def rms(x: Float[Tensor, "num *rest"]) -> Float[Tensor, " num"]:
    """Root mean square of each entry of a stack; never zero."""
    return x.float().square().flatten(1).mean(1).sqrt().clamp_min(1e-12)


# What a number must be, its least and its largest value.
_ABOVE_ZERO, _FINITE = math.ulp(0.0), sys.float_info.max
_POSITIVE = ("a positive number", _ABOVE_ZERO, _FINITE)
_RANGES = {"init": ("zero or more", 0.0, _FINITE), "decay": ("above 0, at most 1", _ABOVE_ZERO, 1.0)}


def _check_numbers(method: Any, *names: str) -> None:
    for name in names:
        value, (expected, low, high) = getattr(method, name), _RANGES.get(name, _POSITIVE)
        if not low <= value <= high:
            default = getattr(type(method), name)
            raise ValueError(f"{name} of {method.name} is {value!r}; expected {expected}; default {default}")
