"""A head alone, on the final features or on those of a site."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from apthory import sites
from apthory.methods.base import Method, PreparedBackbone


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Method):
    """A head alone: on the final features, or on a site's own activations averaged over positions."""

    name: ClassVar[str] = "linear_probe"
    label: ClassVar[str] = "linear probe"
    color: ClassVar[str] = "#000000"
    site: str = ":output"  # where the features are read

    def build(self, backbone: nn.Module, num: int) -> PreparedBackbone:
        prefix, suffix = sites.split(backbone, self.site)
        reads_prefix = self.site != ":output"
        if reads_prefix:
            if not sites.is_traceable(backbone):
                raise ValueError(f"a probe at {self.site!r} needs a backbone that torch.fx can trace; probe ':output'")
            rank = len(sites.site_shape(backbone, self.site))
            prefix = Pooled(prefix, sites.channel_axis(backbone, self.site) if rank > 1 else -1, repr(self))
            suffix = nn.Identity()
        return PreparedBackbone(prefix, suffix, reads_prefix=reads_prefix)


class Pooled(nn.Module):
    """The site's activation, averaged over positions."""

    def __init__(self, prefix: nn.Module, axis: int, code: str) -> None:
        super().__init__()
        self.prefix, self.axis = prefix, axis
        self.code = code  # tells one cached prefix from another

    def forward(self, x: Tensor) -> tuple[Tensor]:
        z = self.prefix(x)[0].movedim(self.axis, -1)
        return (z.flatten(1, -2).mean(1) if z.ndim > 2 else z,)
