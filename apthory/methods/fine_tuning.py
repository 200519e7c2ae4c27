"""Fine-tuning of the weights themselves, from some site on."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from apthory import sites
from apthory._tools.moved import accepts_old_fields
from apthory.methods.base import Method, PreparedBackbone
from apthory.methods.edits import Stack, Trained, copy_alike

PLACE = ":weights"  # under which the weights stand in a state


@accepts_old_fields
@dataclass(frozen=True, kw_only=True)
class FineTuning(Method):
    """All weights after a site, from the pretrained ones; normalization statistics stay frozen.

    At ``:input``, the default, that is full fine-tuning. At a block's input it tunes that block and all that follow
    (*partial-k*: the last k blocks).
    """

    name: ClassVar[str] = "fine_tuning"
    label: ClassVar[str] = "fine-tuning"
    color: ClassVar[str] = "#6B6B6B"
    site: str = ":input"  # where the frozen part ends
    lr_scale: float = 0.05  # learning rate of the weights, relative to that of the head

    def build(self, backbone: nn.Module, num: int) -> PreparedBackbone:
        prefix, suffix = sites.split(backbone, self.site)
        tuned = backbone if self.site == ":input" else suffix
        if self.site != ":input" and not sites.is_traceable(backbone):
            raise ValueError(
                f"weights after {self.site!r} can be told apart by torch.fx alone; tune all: site=':input'"
            )
        if next(tuned.parameters(), None) is None:
            raise ValueError(f"no weights come after {self.site!r}, so there is nothing to tune; take an earlier site")
        copies = Copies([copy.deepcopy(tuned) for _ in range(num)], self.lr_scale)
        return PreparedBackbone(prefix, copies, {PLACE: copies})


class Copies(Stack):
    """One network, or one suffix, for each configuration, run one after the other.

    Args:
        networks: With the weights to begin with, under their names in the backbone.
        lr_scale: Learning rate of the weights, relative to that of the head.
    """

    constructed_alike = True

    def __init__(self, networks: Sequence[nn.Module], lr_scale: float) -> None:
        nn.Module.__init__(self)
        self.num, self.place, self.lr_scale = len(networks), PLACE, lr_scale
        self.generators = ()
        self.is_calibrating = False
        self.networks = nn.ModuleList(network.requires_grad_(True) for network in networks)

    updates_itself = sees_input = False

    def forward(self, *crossing: Tensor) -> Tensor:
        parts = zip(*(tensor.chunk(self.num) for tensor in crossing), strict=True)
        return torch.cat([network(*part) for network, part in zip(self.networks, parts, strict=True)])

    def start(self, generators: Sequence[torch.Generator]) -> None:
        """Nothing is drawn: training begins at the pretrained weights."""

    def begin_epoch(self, epoch: int, num_epochs: int) -> None:
        """There is no schedule."""

    def trained(self) -> Iterator[Trained]:
        for k, network in enumerate(self.networks):
            for parameter in network.parameters():
                yield Trained(parameter, self.lr_scale, k)

    def state(self, configuration: int) -> dict[str, Tensor]:
        weights = self.networks[configuration].named_parameters()
        return {name: value.detach().clone().cpu() for name, value in weights}

    @torch.no_grad()
    def load(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        for network, state in zip(self.networks, states, strict=True):
            for name, parameter in network.named_parameters():
                copy_alike(name, parameter, state[name])

    def weights(self, configuration: int) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.networks[configuration].named_parameters()}

    def prompt_norm(self, configuration: int, activations: Callable[[], Sequence[Tensor]]) -> None:
        return None

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.networks[0].parameters())
