"""How far a prompt is from the nearest normalization tuning (E4, E7), and how the two train (E6)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jvp

from apthory import sites
from apthory.equivalence.networks import Network, spread
from apthory.prompts import ActivationPrompt

_ROUNDING = 1e-13  # of features: below it there is no effect to tune for


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Distances of features, relative to the features' norm, for a prompt of some size."""

    norm: float  # of the prompt, spread over all units, relative to the mean norm of the activations
    effect: float  # from no prompt at all
    tuning: float  # from the nearest tuning of the layer
    first_order: float  # from a shift of the layer's result by its derivative: what is due at each position


def gap(
    backbone: nn.Module,
    prompt: ActivationPrompt,
    layer: str,
    norms: Sequence[float],
    *,
    images: Float[Tensor, "batch *image"] | None = None,
    parameters: Literal["beta", "both"] = "both",
    num_iterations: int = 10,
) -> list[Gap]:
    """How far a prompt is from tuning one normalization layer, as the prompt grows; in float64.

    What is left beyond the first order falls with the square of the norm (E4). The nearest tuning solves the least
    squares of features on these images, by Gauss-Newton steps with the derivative at no tuning; where the prompt is
    so large that they do not converge, their best iterate stands: an upper bound of the distance.

    Args:
        prompt: Its direction counts; its norm is replaced.
        layer: Name of the normalization layer, at or after the prompt's site.
        norms: Of the prompt, relative to the mean norm of the activations.
        images: Normalized images, with more features in all than gamma and beta have entries; random by default.
        parameters: Tune beta alone, or gamma as well.

    Raises:
        ValueError: If there are too few images, or a backbone in train mode sees more than a channel prompt.
    """
    norm_layer = backbone.get_submodule(layer)
    if not isinstance(norm_layer, sites.NORMS) or norm_layer.weight is None:
        raise ValueError(
            f"{layer!r} is a {type(norm_layer).__name__} without gamma and beta; name a layer that has them"
        )
    network = Network(backbone, prompt.site, images)
    place = network.place(layer)
    z = network.read(network.site)
    direction = prompt.delta.detach().to(z).expand(network.unit)
    direction = direction * (z.flatten(1).norm(dim=1).mean() / direction.norm())
    derivative = jvp(lambda size: network.read(place, size * direction), (z.new_zeros(()),), (z.new_ones(()),))
    result, moved = derivative[:2]
    prefix, suffix = sites.split(network.model, place, example=network.images)
    with torch.no_grad():
        skips = prefix(network.images)[1:]
        plain = network()
        targets = [network(norm * direction) for norm in norms]
    solve = None
    if max(float((target - plain).norm() / plain.norm()) for target in targets) > _ROUNDING:
        axis = network.axis_at(place)
        solve = _Tuning(lambda y: suffix(y, *skips), result, axis, parameters, backbone.training)
    found = []
    for norm, target in zip(norms, targets, strict=True):
        with torch.no_grad():
            linear = suffix(result + norm * moved, *skips)
            distances = [float((other - target).norm() / plain.norm()) for other in (plain, linear)]
            arrived = network.read(place, norm * direction)
            tuning = distances[0] if solve is None else solve.distance(target, arrived, num_iterations)
        found.append(Gap(norm=norm, effect=distances[0], tuning=tuning, first_order=distances[1]))
    return found


class _Tuning:
    """Gamma and beta of a layer whose result goes through a suffix: ``(1 + gain) * result + shift``."""

    def __init__(
        self, suffix: Callable[[Tensor], Tensor], result: Tensor, axis: int, parameters: str, is_coupled: bool
    ) -> None:
        if is_coupled:
            raise ValueError("with batch statistics gap measures channel prompts alone; call eval() on the backbone")
        self.suffix, self.result, self.axis = suffix, result, axis
        num, width = len(result), result.shape[axis]
        self.num_values = width if parameters == "beta" else 2 * width
        values = result.new_zeros(num, self.num_values, requires_grad=True)  # one tuning an image: rows of its own
        features = self(values)
        if features.numel() < self.num_values:
            raise ValueError(
                f"{features.numel()} features of {num} images do not determine {self.num_values} values; "
                f"pass at least {-(-self.num_values // features.shape[1])} images"
            )
        rows = [torch.autograd.grad(column.sum(), values, retain_graph=True)[0] for column in features.unbind(1)]
        self.inverse = torch.linalg.pinv(torch.stack(rows, 1).flatten(0, 1))
        self.plain = features.detach()

    def __call__(self, values: Tensor) -> Tensor:
        width, rank = self.result.shape[self.axis], self.result.ndim - 1
        shift, *gain = (spread(part, rank, self.axis) for part in values.split(width, dim=-1))
        return self.suffix(self.result * (1 + gain[0] if gain else 1) + shift)

    def distance(self, target: Tensor, arrived: Tensor, num_iterations: int) -> float:
        """From the nearest tuning, relative to the norm of the features.

        Args:
            arrived: The layer's result under the prompt; the search starts from its mean shift, if not from zero.
        """
        values, features = self.result.new_zeros(self.num_values), self.plain
        shift = (arrived - self.result).movedim(self.axis, -1).flatten(0, -2).mean(0)
        mean = torch.cat([shift, values[len(shift) :]])
        if (target - self(mean)).norm() < (target - features).norm():
            values, features = mean, self(mean)
        for _ in range(num_iterations):
            step = self.inverse @ (target - features).flatten()
            tried = (self(values + 0.5**k * step) for k in range(6))  # shorter, where the whole step leads away
            missed = (target - features).norm()
            closer = next(
                ((k, other) for k, other in enumerate(tried) if (target - other).norm() < 0.999 * missed), None
            )
            if closer is None:
                break
            values, features = values + 0.5 ** closer[0] * step, closer[1]
        return float((target - features).norm() / self.plain.norm())


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
