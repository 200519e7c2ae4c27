"""Heads: from the backbone's features to the classes of a task."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LinearHeads(nn.Module):
    """A bundle of linear heads, one for each configuration, that see features in units of their root mean square.

    Args:
        num: Configurations in the bundle.
        width: Features.
        num_classes: Classes.
        generators: One source of initial weights for each configuration.
    """

    def __init__(self, num: int, width: int, num_classes: int, generators: list[torch.Generator]) -> None:
        super().__init__()
        draws = [torch.randn(width, num_classes, generator=generator) for generator in generators]
        self.weight = nn.Parameter(0.01 * torch.stack(draws))
        self.bias = nn.Parameter(torch.zeros(num, 1, num_classes))
        self.register_buffer("unit", torch.ones(num, 1, 1))

    def forward(self, features: Float[Tensor, "stack width"]) -> Float[Tensor, "num batch class"]:
        by_configuration = features.float().unflatten(0, (len(self.weight), -1))
        return torch.baddbmm(self.bias, by_configuration / self.unit, self.weight)

    def export(self, index: int) -> nn.Linear:
        """One head as an ordinary layer on the backbone's own features."""
        width, num_classes = self.weight.shape[1:]
        head = nn.Linear(width, num_classes).requires_grad_(False)
        head.weight.copy_((self.weight[index] / self.unit[index]).T.detach())
        head.bias.copy_(self.bias[index, 0].detach())
        return head
