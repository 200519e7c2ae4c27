"""How far a prompt is from the nearest normalization tuning (E4, E7), and how the two train (E6)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jvp

from apthory import sites
from apthory.equivalence.networks import PromptedNetwork, spread
from apthory.methods import ActivationPrompt

_FEATURE_ROUNDING = 1e-13  # of features: below it there is no effect to tune for


@dataclass(frozen=True, kw_only=True)
class DistanceToTuning:
    """Distances of features, relative to the features' norm, for a prompt of some size."""

    norm: float  # norm of the prompt, spread over all units, relative to the mean norm of the activations
    effect: float  # distance from the features without a prompt
    tuning: float  # distance from the nearest tuning that the search found; a nearer one may exist
    is_converged: bool  # whether no small change of that tuning comes closer
    linear: float  # distance from the nearest tuning by derivatives alone: the limit of small prompts and tunings
    first_order: float  # distance when the layer's result is shifted, at each position, by its derivative


def distance_to_tuning(
    backbone: nn.Module,
    prompt: ActivationPrompt,
    layer: str,
    norms: Sequence[float],
    *,
    images: Float[Tensor, "batch *image"] | None = None,
    parameters: Literal["beta", "both"] = "both",
    num_rounds: int = 2,
) -> list[DistanceToTuning]:
    """Bound how far a prompt is from a tuning of one normalization layer, for growing norms of the prompt; in float64.

    What is left beyond the first order falls with the square of the norm (E4). The nearest tuning is sought by least
    squares of the features of these images (on others it may miss more). Features are no convex function of a tuning,
    so the distance is an upper bound; where `DistanceToTuning.is_converged` is false it is not even a local minimum.
    The field `linear` is exact for prompts and tunings so small that the derivatives describe them.

    Args:
        prompt: Its direction counts; its norm is replaced.
        layer: Name of the normalization layer, at or after the prompt's site.
        norms: Norms of the prompt, relative to the mean norm of the activations. The search for each norm starts from
            the tuning that was found for the norm before.
        images: Normalized images, with more features in all than gamma and beta have entries; random by default.
        parameters: Whether beta alone is tuned, or gamma too.
        num_rounds: Most rounds of ten steps for each norm; each round after the first starts with a new derivative.

    Raises:
        ValueError: If there is nothing to measure, if there are too few images, or if batch statistics see more than
            a channel prompt.
    """
    if parameters not in ("beta", "both"):
        raise ValueError(f"parameters {parameters!r} is not 'beta' or 'both'; gamma alone is never a prompt (E7)")
    if not norms or min(norms) <= 0:
        raise ValueError(f"norms must be one or more positive numbers, not {list(norms)}")
    if not prompt.delta.any():
        raise ValueError("a prompt of zeros has no direction; pass one that is trained or drawn")
    norm_layer = backbone.get_submodule(layer)
    if not isinstance(norm_layer, sites.NORMS) or None in (norm_layer.weight, getattr(norm_layer, "bias", None)):
        raise ValueError(
            f"{layer!r} is a {type(norm_layer).__name__} without gamma and beta; name a layer that has them"
        )
    network = PromptedNetwork(backbone, prompt.site, images)
    place = network.place(layer)
    if layer in network.order[: network.order.index("")] and sites.resolve(backbone, place) != network.site:
        raise ValueError(
            f"{layer!r} comes before the prompt at {network.site!r}, which never reaches it; name a later one"
        )
    z = network.read(network.site)
    direction = prompt.delta.detach().to(z).expand(network.unit)
    direction = direction * (z.flatten(1).norm(dim=1).mean() / direction.norm())
    zero, unit = z.new_zeros(()), z.new_ones(())
    result, moved = jvp(lambda size: network.read(place, size * direction), (zero,), (unit,))[:2]
    plain, drift = jvp(lambda size: network(size * direction), (zero,), (unit,))[:2]
    prefix, suffix = sites.split(network.model, place, example=network.images)
    with torch.no_grad():
        skips = prefix(network.images)[1:]
        targets = [network(norm * direction) for norm in norms]

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / plain.norm())

    axis, search = network.axis_at(place), None
    if max(distance(target, plain) for target in targets) > _FEATURE_ROUNDING:
        if network.uses_batch_statistics:
            raise ValueError("with batch statistics only channel prompts are measured; call eval() on the backbone")
        search = _Tuning(lambda y: suffix(y, *skips), result, axis, has_gain=parameters == "both")
    distances, limit, values = [], 0.0, None
    if search is not None:
        limit = distance(search.unexplained(drift), torch.zeros_like(plain))
    for index, (norm, target) in enumerate(zip(norms, targets, strict=True)):
        with torch.no_grad():
            linear = suffix(result + norm * moved, *skips)
            shift = (network.read(place, norm * direction) - result).movedim(axis, -1).flatten(0, -2).mean(0)
        tuning, is_converged = distance(target, plain), True
        if search is not None:
            starts = [search.zero, torch.cat([shift, search.zero[len(shift) :]])]
            if values is not None:
                starts.append(values * (norm / norms[index - 1]))
            values, is_converged = search.nearest(target, starts, num_rounds)
            tuning = distance(search(values), target)
        distances.append(
            DistanceToTuning(
                norm=norm,
                effect=distance(target, plain),
                tuning=tuning,
                is_converged=is_converged,
                linear=norm * limit,
                first_order=distance(linear, target),
            )
        )
    return distances


class _Tuning:
    """Gamma and beta of a layer whose result goes through a suffix: ``(1 + gain) * result + shift``."""

    def __init__(self, suffix: Callable[[Tensor], Tensor], result: Tensor, axis: int, has_gain: bool) -> None:
        self.suffix, self.result, self.axis = suffix, result, axis
        self.zero = result.new_zeros((1 + has_gain) * result.shape[axis])
        features = self(self.zero)
        if features.numel() < len(self.zero):
            raise ValueError(
                f"{features.numel()} features of {len(result)} images do not determine {len(self.zero)} values; "
                f"pass at least {-(-len(self.zero) // features.shape[1])} images"
            )
        self.rounding = _FEATURE_ROUNDING * float(features.norm())
        self.linearize(self.zero)

    def __call__(self, values: Tensor) -> Tensor:
        width, rank = self.result.shape[self.axis], self.result.ndim - 1
        shift, *gain = (spread(part, rank, self.axis) for part in values.split(width, dim=-1))
        return self.suffix(self.result * (1 + gain[0] if gain else 1) + shift)

    def linearize(self, values: Tensor) -> None:
        """Take the features' derivative at a tuning, without the directions that have no effect."""
        each = values.expand(len(self.result), -1).clone().requires_grad_()  # one tuning an image: rows of its own
        columns = self(each).unbind(1)
        rows = [torch.autograd.grad(column.sum(), each, retain_graph=True)[0] for column in columns]
        left, sizes, right = torch.linalg.svd(torch.stack(rows, 1).flatten(0, 1), full_matrices=False)
        has_effect = sizes > 1e-10 * sizes[0]
        self.left, self.steps = left[:, has_effect], right[has_effect] / sizes[has_effect, None]

    def unexplained(self, change: Tensor) -> Tensor:
        """What the derivative leaves of a change of the features."""
        return change - (self.left @ (self.left.T @ change.flatten())).view_as(change)

    def nearest(self, target: Tensor, starts: Sequence[Tensor], num_rounds: int) -> tuple[Tensor, bool]:
        """The nearest tuning that is found, from the best of some starts, and whether it is a local minimum.

        BFGS in coordinates in which the derivative is orthonormal, taken again where it no longer serves. There the
        gradient is what the derivative explains of the distance; at a minimum it explains nothing (less than a
        thousandth: the criterion of Bates and Watts).
        """
        size = (target - self(self.zero)).norm().detach()

        def missed(values: Tensor) -> Tensor:
            return (self(values) - target).norm() / size

        with torch.no_grad():
            values = min(starts, key=lambda start: float(missed(start)))
            if missed(values) * size <= self.rounding:
                return values, True
        for index in range(num_rounds):
            if index:
                self.linearize(values)
            taken = values.new_zeros(len(self.steps), requires_grad=True)

            def loss(start: Tensor = values, taken: Tensor = taken) -> Tensor:
                value = missed(start + size * (taken @ self.steps)).square() / 2
                (taken.grad,) = torch.autograd.grad(value, taken)
                return value.detach()

            bfgs = torch.optim.LBFGS(
                [taken], max_iter=10, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
            )
            bfgs.step(loss)
            left = (2 * loss()).sqrt()
            values = values + size * (taken.detach() @ self.steps)
            if taken.grad is not None and taken.grad.norm() <= 1e-3 * left:
                return values, True
        return values, False


def descend(
    loss: Callable[[Tensor, int], Float[Tensor, ""]],
    start: Tensor,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    num_steps: int,
    *,
    scale: Float[Tensor, "*shape"] | float = 1.0,
) -> tuple[Float[Tensor, " step"], Float[Tensor, "step *parameter"]]:
    """Loss before, and parameter after, each step of a plain descent (E6).

    Args:
        loss: Of the parameter, at a step.
        start: The parameter to begin with; it is not changed.
        optimizer: Makes the optimizer: ``partial(torch.optim.SGD, lr=0.1)``.
        scale: Multiplies the gradient; under SGD, a learning rate for each entry.
    """
    parameter = start.detach().clone().requires_grad_()
    steps = optimizer([parameter])
    losses, path = [], []
    for step in range(num_steps):
        value = loss(parameter, step)
        (gradient,) = torch.autograd.grad(value, parameter)
        parameter.grad = gradient * scale
        steps.step()
        losses.append(value.detach())
        path.append(parameter.detach().clone())
    return torch.stack(losses), torch.stack(path)
