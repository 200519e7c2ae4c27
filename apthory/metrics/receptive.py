"""What a place in a network sees of the image, and how far a gradient that comes back spreads over it.

Backwards from a site lies its *effective receptive field*: the pixels that move its central unit, weighted by how much
they do (`receptive_fields`). For convolutions it lies within a field that kernels and strides give
(`theoretical_fields`). Forwards lies its *gradient spread*: the number of positions that share an image's gradient
(`gradient_spread`). All sites come from one forward pass of each batch of images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from apthory import sites
from apthory._tools import moved
from apthory.metrics.batches import IMAGES_AT_ONCE, ImageBatches, batches
from apthory.metrics.layout import ActivationLayout, find_channel_axes, finite, layouts

Readout = Callable[[Float[Tensor, "batch *feature"], Int64[Tensor, " batch"]], Float[Tensor, " batch"]]


def participation_ratio(energy: Float[Tensor, "*batch position"]) -> Float[Tensor, "*batch"]:
    """``(sum e)^2 / sum e^2``: n if the energy is the same at n positions and nothing elsewhere; 0 without energy."""
    ratio = energy.sum(-1).square() / energy.square().sum(-1)
    return torch.where((energy == 0).all(-1), 0.0, ratio)


# ------------------------------------------------------------------------------------------ effective field


@dataclass(frozen=True, kw_only=True)
class ReceptiveField:
    """What moves the unit at the middle of a site's map: ``E |d unit / d pixel|^2``, which adds up to one."""

    energy: Float[Tensor, "height width"]

    @property
    def radius(self) -> float:
        """Root mean square distance of the energy from its own centre, in pixels."""
        rows, columns = self._marginals()
        return math.sqrt(_variance(rows) + _variance(columns))

    @property
    def area(self) -> float:
        """Over how many pixels the energy is spread (`participation_ratio`)."""
        return float(participation_ratio(self.energy.flatten()))

    @property
    def support(self) -> tuple[int, int]:
        """Rows and columns from the first pixel that moves the unit to the last."""
        spans = [torch.nonzero(marginal).flatten() for marginal in self._marginals()]
        height, width = (int(span[-1] - span[0]) + 1 for span in spans)
        return height, width

    def _marginals(self) -> tuple[Float[Tensor, " height"], Float[Tensor, " width"]]:
        return self.energy.sum(1), self.energy.sum(0)


def receptive_fields(
    backbone: nn.Module,
    images: ImageBatches,
    places: Sequence[str] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> dict[str, ReceptiveField]:
    """Effective receptive field of the central unit of each site, from one forward pass and a backward pass a site.

    A unit is the vector of all channels at one position (of an even grid the one after the middle; the whole vector
    where positions were pooled). Its field is the squared Jacobian, summed over channels of unit and image, and does
    not depend on the basis of the channels. The sum over the unit's channels is estimated by one random sign for each
    image and channel, which is right in the mean over draws.

    Args:
        images: Their number times the number of channels decides how exact the estimate is.
        places: All block sites by default.
        generator: Of the signs; seeded with 0 by default.

    Raises:
        ValueError: If activations are not finite, a site does not depend on the image, or the backbone is in
            training mode.

    References:
        Luo et al. (2016), Understanding the effective receptive field in deep convolutional neural networks, who take
        the gradient of one channel.
    """
    places = list(places) if places is not None else sites.list_sites(backbone)
    generator = generator or torch.Generator().manual_seed(0)
    total: dict[str, Tensor] = {}
    how: dict[str, ActivationLayout] = {}
    for batch in batches(images, IMAGES_AT_ONCE, backbone):
        x = finite(":input", batch).clone().requires_grad_()
        with torch.enable_grad():
            seen = sites.capture(backbone, places, x)
            how = how or layouts(backbone, seen, batch)
            for site in places:
                maps = how[site].maps(finite(site, seen[site]))
                unit = maps[..., maps.shape[2] // 2, maps.shape[3] // 2]
                if not unit.requires_grad:
                    raise ValueError(f"site {site!r} does not depend on the image")
                (gradient,) = torch.autograd.grad(unit, x, _signs(unit, generator), retain_graph=True)
                total[site] = gradient.double().square().sum((0, 1)) + total.get(site, 0.0)
    for site, energy in total.items():
        if not energy.any():
            raise ValueError(f"no pixel moves the unit at the middle of site {site!r}: its features are constant")
    return {site: ReceptiveField(energy=energy / energy.sum()) for site, energy in total.items()}


def _variance(share: Float[Tensor, " position"]) -> float:
    place = torch.arange(len(share), dtype=share.dtype, device=share.device)
    mean = (share * place).sum()
    return float((share * (place - mean).square()).sum())


# ------------------------------------------------------------------------------------------ theoretical field


class UnknownOperationError(ValueError):
    """An operation of which it is not known over how many positions it reaches."""


class TheoreticalField(NamedTuple):
    """What kernels and strides let a site see: pixels that may reach one unit, were the image large enough."""

    height: float  # pixels; inf where a layer mixes all positions, as attention and pooling do
    width: float
    stride: tuple[int, int]  # pixels between neighbouring units


@torch.no_grad()
def theoretical_fields(
    backbone: nn.Module, image: Float[Tensor, "batch channel height width"], places: Sequence[str] | None = None
) -> dict[str, TheoreticalField]:
    """Receptive fields as the layers give them: a kernel of k over units of stride s widens the field by (k - 1) s.

    Fields ride on the activations of one forward pass, so any control flow will do; branches that meet take the
    larger one. Attention counts as mixing all positions, in windows as well, and so does a linear layer where reshaping
    has lost which axis counts channels.

    Args:
        image: One image batch; its values do not matter.
        places: All block sites by default.

    Raises:
        UnknownOperationError: If it is not known how far an operation reaches.
        ValueError: If a site does not depend on the image, or the backbone is in training mode.

    References:
        Araujo et al. (2019), Computing receptive fields of convolutional neural networks, Distill.
    """
    places = list(places) if places is not None else sites.list_sites(backbone)
    (first,) = batches(image[:1], 1, backbone)
    x = torch.zeros_like(first).as_subclass(_Tracked)
    x.field, x.channels = TheoreticalField(1, 1, (1, 1)), 1
    seen = sites.capture(backbone, places, x)
    if constant := [site for site, z in seen.items() if not isinstance(z, _Tracked)]:
        raise ValueError(f"site {constant[0]!r} does not depend on the image")
    return {site: cast(_Tracked, z).field for site, z in seen.items()}


_ARITHMETIC = ("add", "sub", "mul", "div", "truediv", "pow")
_LOCAL = {  # operations that leave every position to itself, or move positions without mixing them
    *_ARITHMETIC, *(f"i{name}" for name in _ARITHMETIC), *(f"r{name}" for name in _ARITHMETIC),
    "neg", "clone", "contiguous", "to", "type", "float", "double", "half", "detach", "get",
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "expand",
    "chunk", "split", "unbind", "getitem", "cat", "stack", "pad", "where", "repeat", "size",
    "relu", "relu6", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh",
    "sigmoid", "tanh", "softplus", "clamp", "sqrt", "rsqrt", "exp", "log", "abs", "square",
    "dropout", "dropout2d", "batch_norm", "normalize", "prelu",
}  # fmt: skip
_GLOBAL = {
    "mean", "sum", "var", "std", "amax", "amin", "max", "adaptive_avg_pool2d", "adaptive_max_pool2d",
    "matmul", "bmm", "baddbmm", "einsum", "softmax", "scaled_dot_product_attention", "multi_head_attention_forward",
    "group_norm", "instance_norm", "interpolate", "roll",
}  # fmt: skip


class _Tracked(Tensor):
    """An activation that carries its theoretical field through every operation."""

    field: TheoreticalField
    channels: int | None  # the axis that counts them, where reshaping has not lost it

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        known = [z for z in tree_leaves((args, kwargs)) if isinstance(z, _Tracked)]
        with torch._C.DisableTorchFunctionSubclass():  # reading a shape is an operation, too
            before = [(z.field, z.channels, z.shape) for z in known]  # func may work in place
            result = super().__torch_function__(func, types, args, kwargs or {})
            tracked = [z for z in tree_leaves(result) if isinstance(z, _Tracked)]
            if tracked and before:
                fields, axes, shapes = zip(*before, strict=True)
                name, axis, shape = func.__name__.strip("_"), axes[0], shapes[0]
                widest = TheoreticalField(*(max(parts) for parts in zip(*fields, strict=True)))
                field = _after(name, widest, axis == len(shape) - 1, args, kwargs or {})
                for z in tracked:
                    z.field, z.channels = field, _moved(name, axis, shape, z.shape, args[1:])
        return result


def _moved(name: str, axis: int | None, before: torch.Size, after: torch.Size, args: tuple) -> int | None:
    """Where an operation leaves the axis of channels."""
    rank = len(before)
    if name in ("conv2d", "max_pool2d", "avg_pool2d", "linear"):
        return len(after) - 1 if name == "linear" else 1
    if axis is None or name in ("movedim", "get"):  # the latter is z.mT, too
        return None
    if name in ("permute", "transpose"):
        dims = [dim % rank for dim in tree_leaves(args)]
        order = dims if name == "permute" else [{a: b, b: a}.get(i, i) for a, b in [dims] for i in range(rank)]
        return order.index(axis)
    if name == "flatten" and len(after) < rank and after[: axis + 1] == before[: axis + 1]:
        return axis
    return axis if len(after) == rank and after[axis] == before[axis] else None


def _after(name: str, field: TheoreticalField, is_channels_last: bool, args: tuple, kwargs: dict) -> TheoreticalField:
    """The field after one operation."""
    everything = TheoreticalField(math.inf, math.inf, field.stride)
    match name:
        case "conv2d":
            given = _given(("input", "weight", "bias", "stride", "padding", "dilation"), args, kwargs)
            kernel, stride = given["weight"].shape[2:], given.get("stride", 1)
        case "max_pool2d":
            given = _given(("input", "kernel_size", "stride", "padding", "dilation"), args, kwargs)
            kernel, stride = given["kernel_size"], given.get("stride") or given["kernel_size"]
        case "avg_pool2d":
            given = _given(("input", "kernel_size", "stride"), args, kwargs)
            kernel, stride = given["kernel_size"], given.get("stride") or given["kernel_size"]
        case "linear":  # along the last axis, which may be one of positions
            return field if is_channels_last else everything
        case "layer_norm" | "rms_norm":
            shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
            return field if is_channels_last and len(shape) == 1 else everything
        case _ if name in _LOCAL:
            return field
        case _ if name in _GLOBAL:
            return everything
        case _ if math.isinf(field.height):
            return field
        case _:
            raise UnknownOperationError(
                f"cannot tell how far the operation {name!r} reaches; give sites that come before it"
            )
    (height, width), (rows, columns), (over_rows, over_columns) = map(_pair, (kernel, stride, given.get("dilation", 1)))
    return TheoreticalField(
        height=field.height + (height - 1) * over_rows * field.stride[0],
        width=field.width + (width - 1) * over_columns * field.stride[1],
        stride=(field.stride[0] * rows, field.stride[1] * columns),
    )


def _given(names: Sequence[str], args: tuple, kwargs: dict) -> dict[str, Any]:
    return dict(zip(names, args, strict=False)) | kwargs


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values[0], values[-1]


# ----------------------------------------------------------------------------------------- gradient spread


@dataclass(frozen=True, kw_only=True)
class GradientSpread:
    """Over how many positions of a site the gradients that come back to it spread."""

    positions: int  # the number of all positions, extra tokens included
    spread: float  # the number of positions over which one image's gradient spreads, mean over images
    coverage: float  # the number of positions over which the gradients of all images together spread

    @property
    def share(self) -> float:
        """The spread as a share of all positions: 1 if a gradient is of the same size everywhere."""
        return self.spread / self.positions

    @property
    def reach(self) -> float:
        """The old name of `spread`."""
        moved.warn_of_old_name("GradientSpread.reach", "GradientSpread.spread")
        return self.spread


def gradient_spread(
    backbone: nn.Module,
    images: ImageBatches,
    places: Sequence[str] | None = None,
    *,
    readout: Readout | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, GradientSpread]:
    """How many positions share an image's gradient at each site, from one forward and one backward pass.

    The gradient is that for a shift of the activation, as a prompt would get it from this image alone.

    Args:
        places: All block sites by default.
        readout: The number for each image that is differentiated, such as a loss, from its features and its index in
            ``images``. By default a random direction of the features, another for each image.
        generator: Of these directions; seeded with 0 by default.

    Raises:
        ValueError: If activations are not finite, no gradient comes back to a site, or the backbone is in training
            mode.
    """
    places = list(places) if places is not None else sites.list_sites(backbone)
    generator = generator or torch.Generator().manual_seed(0)
    shifts: dict[str, Tensor] = {}
    axes: dict[str, int] = {}  # of channels
    energies: dict[str, list[Tensor]] = {site: [] for site in places}

    def shifted(site: str, z: Tensor) -> Tensor:
        shifts[site] = torch.zeros_like(finite(site, z)).requires_grad_()
        return z + shifts[site]

    start = 0
    for x in batches(images, IMAGES_AT_ONCE, backbone):
        finite(":input", x)
        index, start = torch.arange(start, start + len(x)), start + len(x)
        with torch.enable_grad(), sites.edited(backbone, {site: partial(shifted, site) for site in places}):
            features = finite(":output", backbone(x))
            outcome = (
                readout(features, index) if readout else (features * _signs(features, generator)).flatten(1).sum(1)
            )
            gradients = torch.autograd.grad(outcome.sum(), [shifts[site] for site in places], allow_unused=True)
        axes = axes or find_channel_axes(backbone, shifts, x)
        for site, gradient in zip(places, gradients, strict=True):
            gradient = shifts[site] if gradient is None else gradient  # of zeros, as is no gradient
            by_position = gradient.double().square().sum(axes[site])
            energies[site].append(by_position.reshape(len(x), -1))
    return {site: _spread(site, torch.cat(parts)) for site, parts in energies.items()}


def _spread(site: str, energy: Float[Tensor, "batch position"]) -> GradientSpread:
    energy = energy[energy.sum(1) > 0]
    if not len(energy):
        raise ValueError(f"no gradient comes back to site {site!r} from any image, so it has no spread")
    share = energy / energy.sum(1, keepdim=True)
    return GradientSpread(
        positions=energy.shape[1],
        spread=float(participation_ratio(share).mean()),
        coverage=float(participation_ratio(share.sum(0))),
    )


def _signs(z: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs of an activation's shape, drawn where the generator lives."""
    return (2 * torch.randint(2, z.shape, generator=generator, device=generator.device) - 1).to(z)
