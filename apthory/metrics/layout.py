"""Where channels and positions lie in an activation.

An activation is a map, the tokens of a map after some others (class, distillation, registers), or a pooled vector.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from apthory import sites

_EXTRA_TOKENS = range(6)  # class, distillation and register tokens, where the backbone does not say


class ActivationLayout(NamedTuple):
    """How to read an activation."""

    channel_axis: int  # from the end
    num_extra_tokens: int  # before the map's tokens: class, distillation, registers
    grid: tuple[int, int]  # height and width of the map, in positions

    def maps(self, z: Float[Tensor, "batch *unit"]) -> Float[Tensor, "batch channel height width"]:
        """The activation as maps, without the extra tokens."""
        rows = z.unsqueeze(1) if z.ndim == 2 else z.movedim(self.channel_axis, -1).flatten(1, -2)
        return rows[:, self.num_extra_tokens :].unflatten(1, self.grid).movedim(-1, 1)


def layouts(
    backbone: nn.Module, seen: Mapping[str, Tensor], images: Float[Tensor, "batch *pixel"]
) -> dict[str, ActivationLayout]:
    """How to read the activations at some sites.

    Args:
        seen: The activations by site.
        images: What the backbone was given.

    Raises:
        ValueError: If tokens do not make up a map, or nothing tells channels from columns.
    """
    axes = find_channel_axes(backbone, seen, images)
    return {site: ActivationLayout(axes[site], *_map(backbone, site, z, axes[site])) for site, z in seen.items()}


def find_channel_axes(
    backbone: nn.Module, seen: Mapping[str, Tensor], images: Float[Tensor, "batch *pixel"]
) -> dict[str, int]:
    """Which axis of each activation counts channels, from the end; where no trace can tell, the shape has to."""
    axes = {}
    for site, z in seen.items():
        if not 2 <= z.ndim <= 4:
            raise ValueError(f"site {site!r} has the shape {tuple(z.shape)}; expected maps, tokens or vectors")
        axes[site] = -3 if site == ":input" else -1
    maps = {site: z for site, z in seen.items() if z.ndim == 4 and site != ":input"}
    try:
        return axes | (sites.channel_axes(backbone, list(maps), images) if maps else {})
    except ValueError as error:  # no trace, or nothing near a site that tells
        return axes | {site: _axis_by_shape(site, z, error) for site, z in maps.items()}


def _axis_by_shape(site: str, z: Tensor, error: ValueError) -> int:
    is_first, is_last = z.shape[2] == z.shape[3], z.shape[1] == z.shape[2]
    if is_first == is_last:
        raise ValueError(
            f"site {site!r}: {error}, and the shape {tuple(z.shape)} does not tell channels from columns; give square "
            "images whose maps have another number of channels"
        ) from error
    return -3 if is_first else -1


def _map(backbone: nn.Module, site: str, z: Tensor, axis: int) -> tuple[int, tuple[int, int]]:
    """Tokens before the map's, and the map's height and width."""
    if z.ndim == 2:
        return 0, (1, 1)
    if z.ndim == 4:
        height, width = z.shape[1:3] if axis == -1 else z.shape[2:]
        return 0, (height, width)
    patches = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    prefix = getattr(backbone, "num_prefix_tokens", None)  # a site before they are added has none of them
    side = math.isqrt(z.shape[1])
    for grid in filter(None, (patches, (side, side))):
        extra = z.shape[1] - math.prod(grid)
        if extra in (_EXTRA_TOKENS if prefix is None else (0, prefix)):
            return extra, (int(grid[0]), int(grid[1]))
    raise ValueError(f"site {site!r} has {z.shape[1]} tokens, which make up no map of positions")


def finite(site: str, z: Tensor) -> Tensor:
    """The activation itself, if it holds no NaN and no infinity."""
    is_finite = z.detach().flatten(1).isfinite().all(1)
    if not is_finite.all():
        first = int(is_finite.logical_not().nonzero()[0])
        raise ValueError(
            f"site {site!r} is not finite at image {first} of its batch; look for the first site that is not"
        )
    return z
