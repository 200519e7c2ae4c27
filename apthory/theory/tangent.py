"""Scores of a place in a network from its tangent there: what a prompt would do, before any is trained.

The network is seen as a function of shifts of the activation at one or several places, zero shift being the network
as it is. ``g_i`` is the gradient of example i's loss with respect to its own shift; a prompt, one shift for all
examples, has the gradient ``E g``.

T1. coherence ``|E g|^2 / E|g|^2``: how much of the gradient all examples share (`Gradients.coherence`);
T2. reach and coverage: over how many positions one example's gradient spreads, and all examples' gradients
    together (`Gradients.reach`, `Gradients.coverage`, and `Gradients.windows`, their ratio);
T3. gain: to first order a prompt of norm rho lowers the loss by ``rho |E g|``, an upper bound where the loss is convex
    in the prompt (`Gradients.mean_norm`); to second order by ``1/2 g' (H + ridge)^-1 g`` (`newton`);
T4. alignment of the tangent kernel ``trace J(x) J(x')'`` with the labels (`tangent_kernels`, `alignment`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor
from torch.func import grad, jvp, vjp

Shifts = Mapping[str, Tensor]  # by place, one shift for each example: (example, *unit)


# ------------------------------------------------------------------------------------------ gradients: T1, T2, T3


def example_gradients(
    model: Callable[[Shifts], Float[Tensor, "example class"]],
    shifts: Shifts,
    loss: Callable[[Float[Tensor, "example class"]], Float[Tensor, " example"]],
) -> dict[str, Tensor]:
    """Gradients of each example's loss for its own shifts at all places, from one forward and one backward pass.

    Args:
        model: Logits for shifts at all places at once; an example sees its own shifts only.
        shifts: Where to take the gradients; zeros for the network as it is.
        loss: Of each example.
    """
    logits, pull = _linearised(model, dict(shifts))
    return pull(grad(lambda y: loss(y).sum())(logits))[0]


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Sums over examples of what T1, T2 and T3 need of the gradients at one place; add them to join examples."""

    count: int  # examples
    total: Float[Tensor, "*unit"]  # sum of g_i
    squares: float  # sum of |g_i|^2
    profile: Float[Tensor, " position"]  # sum of each example's energies, which add up to one over positions
    reaches: float  # sum of the participation ratios of these energies
    active: int  # examples whose gradient is not zero; the others have no energies

    @classmethod
    def of(cls, g: Float[Tensor, "example *unit"], channel_axis: int = -1) -> "Gradients":
        """Sums for a batch of gradients.

        Args:
            channel_axis: Which axis of the activation counts channels (from its end); the others are positions.
        """
        g = g.double()
        energy = g.square().sum(channel_axis).reshape(len(g), -1)
        whole = energy.sum(1, keepdim=True)
        is_active = whole[:, 0] > 0
        share = energy[is_active] / whole[is_active]
        return cls(
            count=len(g),
            total=g.sum(0),
            squares=float(whole.sum()),
            profile=share.sum(0),
            reaches=float((1 / share.square().sum(1)).sum()),
            active=int(is_active.sum()),
        )

    def __add__(self, other: "Gradients") -> "Gradients":
        return Gradients(
            count=self.count + other.count,
            total=self.total + other.total,
            squares=self.squares + other.squares,
            profile=self.profile + other.profile,
            reaches=self.reaches + other.reaches,
            active=self.active + other.active,
        )

    @property
    def mean_square(self) -> float:
        """|E g|^2, without bias: products of different examples only, hence negative for some pure noise."""
        if self.count < 2:
            raise ValueError(f"the shared part of {self.count} gradient cannot be told from noise; give at least two")
        return (float(self.total.square().sum()) - self.squares) / (self.count * (self.count - 1))

    @property
    def mean_norm(self) -> float:
        """|E g|, with the sign of the unbiased |E g|^2: what a prompt of norm one gains to first order."""
        return signed_root(self.mean_square)

    @property
    def individual_norm(self) -> float:
        """Root of E|g|^2: what prompts of norm one would gain if each example had its own."""
        return (self.squares / self.count) ** 0.5

    @property
    def coherence(self) -> float:
        """T1, from below zero (noise) to 1 (the same gradient for all); 0 where no gradient arrives."""
        return self.mean_square / (self.squares / self.count) if self.active else 0.0

    @property
    def reach(self) -> float:
        """Over how many positions one example's gradient spreads; 0 where none arrives."""
        return self.reaches / self.active if self.active else 0.0

    @property
    def coverage(self) -> float:
        """Over how many positions the gradients of all examples spread together."""
        return float(self.profile.sum().square() / self.profile.square().sum()) if self.active else 0.0

    @property
    def windows(self) -> float:
        """How many regions a prompt has to repair one by one: coverage over reach, at least about 1."""
        return self.coverage / self.reach if self.active else 0.0


def signed_root(square: float) -> float:
    """The root of an unbiased estimate of a square, which may be negative: then minus the root of its size."""
    return math.copysign(abs(square) ** 0.5, square)


def _linearised(model: Callable[[Any], Tensor], at: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Any]]]:
    """What the model gives, and products of its transposed Jacobian with cotangents."""
    found = vjp(model, at)
    return found[0], found[1]


# ------------------------------------------------------------------------------------------ second order: T3


class Newton(NamedTuple):
    """A regularised Gauss-Newton step and what it gains."""

    gain: float  # 1/2 g' step: how much the quadratic model, with its ridge, falls
    gradient: Tensor  # g of the mean loss, of the prompt's shape
    step: Tensor  # (H + ridge)^-1 g; the prompt that minimises the quadratic model is minus this
    num_products: int  # products with H


def gauss_newton(
    model: Callable[[Tensor], Float[Tensor, "example class"]],
    prompt: Float[Tensor, "*unit"],
    loss: Callable[[Float[Tensor, "example class"]], Float[Tensor, ""]],
) -> tuple[Float[Tensor, "*unit"], Callable[[Tensor], Tensor]]:
    """Gradient for a prompt, and products with the Gauss-Newton matrix ``J' (d^2 loss / d logits^2) J``.

    Args:
        model: Logits of all examples with one prompt.
        prompt: Where to linearise.
        loss: Mean over examples, convex in the logits.
    """
    logits, pull = _linearised(model, prompt)
    slope = grad(loss)

    def product(direction: Tensor) -> Tensor:
        pushed = jvp(model, (prompt,), (direction,))[1]
        return pull(jvp(slope, (logits,), (pushed,))[1])[0]

    return pull(slope(logits))[0], product


def newton(
    model: Callable[[Tensor], Float[Tensor, "example class"]],
    prompt: Float[Tensor, "*unit"],
    loss: Callable[[Float[Tensor, "example class"]], Float[Tensor, ""]],
    ridge: float,
    *,
    max_products: int | None = None,
    tolerance: float = 1e-10,
) -> Newton:
    """The step that minimises ``loss + ridge/2 |prompt|^2`` in the Gauss-Newton model, by conjugate gradients.

    Exact for a loss that is quadratic in logits that are linear in the prompt. Stopped early, ``gain`` is what the
    shorter step gains: conjugate gradients never overstate it.

    Args:
        model: Logits of all examples with one prompt.
        prompt: Where to linearise, usually zero.
        loss: Mean over examples, convex in the logits.
        ridge: Positive; loss for a unit of squared norm, twice.
        max_products: Stop after so many products with H; the number of the prompt's values if left out.
        tolerance: Stop when the residual is so small relative to the gradient.
    """
    if not ridge > 0:
        raise ValueError(f"ridge is {ridge}; the step needs a positive one where the network does not feel the prompt")
    gradient, product = gauss_newton(model, prompt, loss)
    num_products = 0

    def regularised(vector: np.ndarray) -> np.ndarray:
        nonlocal num_products
        num_products += 1
        direction = torch.from_numpy(vector).to(prompt).view(prompt.shape)
        return _flat(product(direction)) + ridge * vector

    size = prompt.numel()
    operator = LinearOperator((size, size), matvec=regularised, dtype=np.float64)
    right = _flat(gradient)
    solution, _ = cg(operator, right, rtol=tolerance, maxiter=max_products or size)
    step = torch.from_numpy(solution).to(prompt).view(prompt.shape)
    return Newton(float(right @ solution) / 2, gradient, step, num_products)


def _flat(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy().ravel()


# ------------------------------------------------------------------------------------------ kernels: T4


def tangent_kernels(
    model: Callable[[Shifts], Float[Tensor, "example class"]],
    shifts: Shifts,
    directions: Float[Tensor, "direction class"] | None = None,
) -> dict[str, Float[Tensor, "example example"]]:
    """K(x, x') = trace of J(x) J(x')' for a prompt at each place: how alike two examples want the prompt.

    Args:
        model: Logits for shifts at all places at once; an example sees its own shifts only.
        shifts: Where to linearise.
        directions: Rows D with ``D'D`` = identity, in the mean if drawn by `frame`; one backward pass each. Every
            class by default.
    """
    logits, pull = _linearised(model, dict(shifts))
    if directions is None:
        directions = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    kernels = {place: logits.new_zeros(len(logits), len(logits), dtype=torch.float64) for place in shifts}
    for direction in directions:
        for place, rows in pull(direction.expand_as(logits).contiguous())[0].items():
            flat = rows.flatten(1).double()
            kernels[place] += flat @ flat.T
    return kernels


def frame(num: int, num_classes: int, generator: torch.Generator) -> Float[Tensor, "direction class"]:
    """Orthogonal random directions D of equal length with ``E D'D`` = identity; all classes if there are no more."""
    if num >= num_classes:
        return torch.eye(num_classes)
    draw = torch.randn(num_classes, num, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(draw)
    return (basis * triangle.diagonal().sign() * (num_classes / num) ** 0.5).T.float()


def label_kernel(labels: Int64[Tensor, " example"]) -> Float[Tensor, "example example"]:
    """1 for two examples of the same class, 0 for others."""
    return (labels[:, None] == labels).double()


def alignment(first: Float[Tensor, "example example"], second: Float[Tensor, "example example"]) -> float:
    """Cosine of two centred kernels, from -1 to 1; 0 where one of them is constant (Cortes et al. 2012)."""
    one, two = (_centred(kernel.double()) for kernel in (first, second))
    size = float(one.norm() * two.norm())
    return float((one * two).sum()) / size if size else 0.0


def _centred(kernel: Float[Tensor, "example example"]) -> Float[Tensor, "example example"]:
    rows = kernel - kernel.mean(0)
    return rows - rows.mean(1, keepdim=True)
