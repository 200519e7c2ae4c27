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

Many examples come in parts, one after the other, so that memory holds the graph of one part only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    """Sums over examples of what T1, T2 and T3 need of the gradients at one place.

    Independent draws are joined by adding them. A stratified sample, with a fixed number of examples of each class,
    is joined class by class: add up one class's examples, close it by `as_stratum`, and add the closed classes.
    """

    count: int  # examples
    total: Float[Tensor, "*unit"]  # sum of g_i
    squares: float  # sum of |g_i|^2
    profile: Float[Tensor, " position"]  # sum of each example's energies, which add up to one over positions
    reaches: float  # sum of the participation ratios of these energies
    active: int  # examples whose gradient is not zero; the others have no energies
    strata: tuple[tuple[int, float], ...] = ()  # of closed classes: examples, and sum of |g_i - the class's mean|^2

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

    def as_stratum(self) -> "Gradients":
        """These examples as one class of a stratified sample, closed: only other classes may be added."""
        if self.strata:
            raise ValueError(f"a stratum is one class, but these are {len(self.strata)} closed ones already")
        return replace(self, strata=((self.count, self._scatter),))

    def __add__(self, other: "Gradients") -> "Gradients":
        if bool(self.strata) != bool(other.strata):
            raise ValueError("draws that are no closed class cannot join a stratified sample; call as_stratum() first")
        return Gradients(
            count=self.count + other.count,
            total=self.total + other.total,
            squares=self.squares + other.squares,
            profile=self.profile + other.profile,
            reaches=self.reaches + other.reaches,
            active=self.active + other.active,
            strata=self.strata + other.strata,
        )

    @property
    def _scatter(self) -> float:
        """Sum of |g_i - their mean|^2."""
        return self.squares - float(self.total.square().sum()) / self.count

    @property
    def mean_square(self) -> float:
        """|E g|^2, without bias, hence negative for some pure noise.

        The variance of the examples' mean is taken off the square of that mean. It is s^2 / n for n independent
        draws, which leaves the products of different examples, and ``sum_c (n_c / n)^2 s_c^2 / n_c`` for a stratified
        sample, where the classes' own means do not vary (Cochran 1977, Sampling Techniques, chapter 5). A class
        with one example tells nothing of its variance and takes the pooled one of the other classes.

        Raises:
            ValueError: If no class has two examples.
        """
        strata = self.strata or ((self.count, self._scatter),)
        freedom = sum(num - 1 for num, _ in strata)
        if not freedom:
            raise ValueError(
                f"what {self.count} gradients share cannot be told from noise: no two are of the same class; "
                "give at least two of one"
            )
        pooled = sum(scatter for _, scatter in strata) / freedom
        noise = sum(num * (scatter / (num - 1) if num > 1 else pooled) for num, scatter in strata)
        return (float(self.total.square().sum()) - noise) / self.count**2

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


_Pull = Callable[[Tensor], tuple[Any]]


def _linearised(model: Callable[[Any], Tensor], at: Any) -> tuple[Tensor, _Pull]:
    """What the model gives, and products of its transposed Jacobian with cotangents."""
    value_and_pull = vjp(model, at)
    return value_and_pull[0], value_and_pull[1]


def _one_by_one(parts: Sequence[tuple[Callable[[Any], Tensor], Any]]) -> Callable[[int], tuple[Tensor, _Pull]]:
    """Linearisations of models, of which memory holds one: a single one is kept, of several each is made anew."""
    if len(parts) == 1:
        kept = _linearised(*parts[0])
        return lambda index: kept
    return lambda index: _linearised(*parts[index])


# ------------------------------------------------------------------------------------------ second order: T3


class ExampleSet(NamedTuple):
    """Some of the examples that see one prompt."""

    model: Callable[[Tensor], Float[Tensor, "example class"]]  # their logits with a prompt
    loss: Callable[[Float[Tensor, "example class"]], Float[Tensor, ""]]  # their share of the loss, convex in logits


class Newton(NamedTuple):
    """A regularised Gauss-Newton step and what it gains."""

    gain: float  # 1/2 g' step: how much the quadratic model, with its ridge, falls
    gradient: Tensor  # g of the loss, of the prompt's shape
    step: Tensor  # (H + ridge)^-1 g; the prompt that minimises the quadratic model is minus this
    num_products: int  # products with H


def gauss_newton(
    parts: Sequence[ExampleSet], prompt: Float[Tensor, "*unit"]
) -> tuple[Float[Tensor, "*unit"], Callable[[Tensor], Tensor]]:
    """Gradient for a prompt, and products with the Gauss-Newton matrix ``J' (d^2 loss / d logits^2) J``.

    Args:
        parts: Their losses add up.
        prompt: Where to linearise.
    """
    linearised = _one_by_one([(model, prompt) for model, _ in parts])

    def product(direction: Tensor) -> Tensor:
        total = torch.zeros_like(prompt)
        for index, (model, loss) in enumerate(parts):
            logits, pull = linearised(index)
            pushed = jvp(model, (prompt,), (direction,))[1]
            total = total + pull(jvp(grad(loss), (logits,), (pushed,))[1])[0]
        return total

    gradient = torch.zeros_like(prompt)
    for index, (_, loss) in enumerate(parts):
        logits, pull = linearised(index)
        gradient = gradient + pull(grad(loss)(logits))[0]
    return gradient, product


def newton(
    parts: Sequence[ExampleSet],
    prompt: Float[Tensor, "*unit"],
    ridge: float,
    *,
    max_products: int | None = None,
    tolerance: float = 1e-10,
) -> Newton:
    """The step that minimises ``loss + ridge/2 |prompt|^2`` in the Gauss-Newton model, by conjugate gradients.

    Exact for a loss that is quadratic in logits that are linear in the prompt. Stopped early, ``gain`` is what the
    shorter step gains: conjugate gradients never overstate it.

    Args:
        parts: Their losses add up.
        prompt: Where to linearise, usually zero.
        ridge: Positive; loss for a unit of squared norm, twice.
        max_products: Stop after so many products with H; the number of the prompt's values if left out.
        tolerance: Stop when the residual is so small relative to the gradient.
    """
    if not ridge > 0:
        raise ValueError(f"ridge is {ridge}; the step needs a positive one where the network does not feel the prompt")
    gradient, product = gauss_newton(parts, prompt)
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
    parts: Sequence[tuple[Callable[[Shifts], Float[Tensor, "example class"]], Shifts]],
    directions: Float[Tensor, "direction class"] | None = None,
) -> dict[str, Float[Tensor, "all_examples all_examples"]]:
    """K(x, x') = trace of J(x) J(x')' for a prompt at each place: how alike two examples want the prompt.

    Args:
        parts: Of the examples: logits for shifts at all places at once, where an example sees its own shifts only,
            and the shifts at which to linearise.
        directions: Rows D with ``D'D`` = identity, in the mean if drawn by `frame`; one backward pass each. Every
            class by default.
    """
    linearised = _one_by_one([(model, dict(shifts)) for model, shifts in parts])
    if directions is None:
        logits = linearised(0)[0]
        directions = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    kernels: dict[str, Tensor] = {}
    for direction in directions:
        rows: dict[str, list[Tensor]] = {}
        for index in range(len(parts)):
            logits, pull = linearised(index)
            for place, some in pull(direction.expand_as(logits).contiguous())[0].items():
                rows.setdefault(place, []).append(some.flatten(1))
        for place, gradients in rows.items():
            flat = torch.cat(gradients).double()
            kernels[place] = kernels.get(place, 0) + flat @ flat.T
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
    """Cosine of two kernels centred without bias, from -1 to 1; 0 where one of them is constant.

    Centred alignment (Cortes et al. 2012) of an example with itself tells nothing, but on few examples makes most of
    the value. So the diagonal is left out, and means are those of pairs of different examples (Székely and Rizzo 2014):
    labels that have nothing to do with a kernel align with it by zero in the mean.

    Raises:
        ValueError: If there are fewer than four examples.
    """
    if len(first) < 4:
        raise ValueError(f"alignment of kernels of {len(first)} examples; give at least four")
    first, second = _centred_kernel(first.double()), _centred_kernel(second.double())
    if first is None or second is None:
        return 0.0
    return float((first * second).sum() / (first.norm() * second.norm()))


def _centred_kernel(kernel: Float[Tensor, "example example"]) -> Float[Tensor, "example example"] | None:
    """A kernel whose rows, without the diagonal, have the mean zero; none if it was constant but for rounding."""
    num = len(kernel)
    kernel = kernel - kernel.diagonal().diag()
    rows = kernel.sum(1) / (num - 2)
    centred = kernel - rows - rows[:, None] + kernel.sum() / ((num - 1) * (num - 2))
    centred = centred - centred.diagonal().diag()
    return centred if float(centred.norm()) > 1e-6 * float(kernel.norm()) else None
