"""Fine-tuning of the weights themselves."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from apthory import sites
from apthory.methods.base import Body


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


class _Copies(nn.Module):
    """One network for each configuration."""

    def __init__(self, copies: nn.ModuleList) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([model(part) for model, part in zip(self.copies, x.chunk(len(self.copies)), strict=True)])
