"""Normalization tuning: gamma and beta of normalization layers."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from apthory import sites
from apthory.methods.activation import prompt_shape
from apthory.methods.base import Body
from apthory.methods.edits import Affine


@dataclass(frozen=True, kw_only=True)
class NormTuning:
    """Gamma and beta of normalization layers of any kind; running statistics stay frozen."""

    name: ClassVar[str] = "norm"
    site: str  # block site after which the layers lie
    layers: Literal["block", "all"] = "block"  # those up to the next block site, or all that follow
    parameters: Literal["gamma", "beta", "both"] = "both"
    rate: float = 10.0  # learning rate of gamma and beta, relative to that of the head
    head: Literal["trained", "frozen"] = "trained"

    def __post_init__(self) -> None:
        if self.parameters not in ("gamma", "beta", "both") or self.layers not in ("block", "all"):
            raise ValueError(
                f"parameters is {self.parameters!r} and layers {self.layers!r}; "
                "expected gamma, beta or both, and block or all"
            )

    def build(self, backbone: nn.Module, num: int) -> Body:
        layers = sites.norms_between(backbone, self.site, "next" if self.layers == "block" else "last")
        if not layers:
            end = "the next block" if self.layers == "block" else "the output"
            raise ValueError(f"there is no normalization layer between {self.site!r} and {end} to tune")
        edits, table = {}, nn.ModuleDict()
        for index, layer in enumerate(layers):
            place = sites.affine_output(backbone, layer)
            shape = prompt_shape(backbone, place, "channel")
            table[f"norm_{index}"] = edits[place] = Affine(num, backbone.get_submodule(layer), shape, self.parameters)
        prefix, suffix = sites.split(backbone, self.site, edits)
        return Body(prefix, suffix, table)
