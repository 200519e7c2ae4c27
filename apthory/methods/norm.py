"""Normalization tuning: gamma and beta of normalization layers."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from apthory import sites
from apthory._tools.moved import accepts_old_fields
from apthory.methods.activation import prompt_shape
from apthory.methods.base import Method
from apthory.methods.edits import Affine, Edit


@accepts_old_fields
@dataclass(frozen=True, kw_only=True)
class NormTuning(Method):
    """Gamma and beta of normalization layers of any kind; running statistics stay frozen."""

    name: ClassVar[str] = "norm"
    label: ClassVar[str] = "normalization tuning"
    color: ClassVar[str] = "#009E73"
    site: str  # block site after which the layers lie
    layers: Literal["block", "all"] = "block"  # those up to the next block site, or all that follow
    parameters: Literal["gamma", "beta", "both"] = "both"
    lr_scale: float = 10.0  # learning rate of gamma and beta, relative to that of the head

    def __post_init__(self) -> None:
        if self.parameters not in ("gamma", "beta", "both") or self.layers not in ("block", "all"):
            raise ValueError(
                f"parameters is {self.parameters!r} and layers {self.layers!r}; "
                "expected gamma, beta or both, and block or all"
            )

    def edits(self, backbone: nn.Module) -> dict[str, Edit]:
        if not sites.is_traceable(backbone):
            raise ValueError(
                "normalization layers after a site are found by torch.fx alone, which cannot trace this backbone"
            )
        layers = sites.norms_between(backbone, self.site, "next" if self.layers == "block" else "last")
        if not layers:
            end = "the next block" if self.layers == "block" else "the output"
            raise ValueError(f"there is no normalization layer between {self.site!r} and {end} to tune")
        affine: dict[str, Edit] = {}
        for name in layers:
            place, norm = sites.affine_output(backbone, name), backbone.get_submodule(name)
            shape = prompt_shape(backbone, place, "channel")
            affine[place] = Affine(norm, shape, self.parameters, name, self.lr_scale)
        return affine
