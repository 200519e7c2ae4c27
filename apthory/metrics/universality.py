"""How much of what arrives of a prompt at a later site is the same for all images (V4)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from apthory import sites


def arrivals(
    backbone: nn.Module,
    x: Float[Tensor, "batch channel height width"],
    direction: Float[Tensor, "*unit"],
    start: str = ":input",
    targets: Sequence[str] | None = None,
) -> dict[str, Float[Tensor, "batch *_"]]:
    """J_l(x) d: how each image's activation at later sites moves, for a small prompt along ``direction``.

    One pass of forward-mode differentiation, at the prompt zero, gives all sites.

    Args:
        start: Where the prompt is added.
        targets: Where to look; every block site that the prompt reaches by default.

    Raises:
        ValueError: If nothing of the prompt arrives at one of the targets.
    """
    places = sites.list_sites(backbone) if targets is None else list(targets)

    def activations(delta: Tensor) -> dict[str, Tensor]:
        with sites.edited(backbone, {start: lambda z: z + delta}):
            return sites.capture(backbone, places, x)

    zero = torch.zeros_like(direction)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused kernels have no forward mode
        moved = torch.func.jvp(activations, (zero,), (direction,))[1]
    if targets is None:
        return {site: shift for site, shift in moved.items() if shift.any()}
    for site, shift in moved.items():
        if not shift.any():
            raise ValueError(f"nothing of a prompt at {start!r} arrives at {site!r}; choose a site after the prompt")
    return moved


def universality(arrived: Float[Tensor, "batch *unit"]) -> float:
    """The share u = |E g|^2 / E|g|^2 of what arrives that all images share: 1 for a constant, 0 for pure noise.

    The numerator is estimated without bias by the products of different images,
    ``(n^2 |mean|^2 - sum |g_i|^2) / (n (n - 1))``; it can be negative, down to ``u = -1 / (n - 1)``.
    """
    g = arrived.flatten(1).double()
    if len(g) < 2:
        raise ValueError("universality compares images with each other; give at least two")
    squares = float(g.square().sum())
    if squares == 0:
        raise ValueError("nothing arrives, so nothing can be universal; choose a site after the prompt")
    return (float(g.sum(0).square().sum()) - squares) / ((len(g) - 1) * squares)
