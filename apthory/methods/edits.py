"""Edits of activations for a whole bundle: shifts, and the scale and shift of normalization layers."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


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


def rms(x: Float[Tensor, "num *rest"]) -> Float[Tensor, " num"]:
    """Root mean square of each entry of a stack; never zero."""
    return x.float().square().flatten(1).mean(1).sqrt().clamp_min(1e-12)
