"""Activation prompts: one learnable perturbation, the same for all inputs, added at one site of a frozen backbone."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apthory import sites
from apthory._tools.moved import accepts_old_fields
from apthory.methods.base import Method, PreparedBackbone
from apthory.methods.edits import Edit, Shift, ShiftStack

Shape = Literal["full", "channel"]


class ActivationPrompt(nn.Module):
    """``z + delta`` at a site; at ``:input`` this is visual prompting.

    A *full* prompt has one value for every unit of the activation, a *channel* prompt one for every channel (after
    a normalization layer that is exactly a shift of its bias). A zero prompt is the identity, bit for bit.

    Args:
        site: Canonical name of the place.
        delta: The perturbation, in the units of the activation; it broadcasts over the batch.
        shape: What the prompt's values stand for.
    """

    def __init__(self, site: str, delta: Float[Tensor, "*unit"], shape: Shape = "full") -> None:
        super().__init__()
        self.site = site
        self.shape = shape
        self.delta = nn.Parameter(delta)

    @classmethod
    def zeros(cls, backbone: nn.Module, site: str, shape: Shape = "full") -> "ActivationPrompt":
        """The identity prompt for a site of this backbone."""
        site = sites.resolve(backbone, site)
        return cls(site, torch.zeros(prompt_shape(backbone, site, shape)), shape)

    def forward(self, z: Float[Tensor, "batch *unit"]) -> Float[Tensor, "batch *unit"]:
        unit, own = z.shape[1:], self.delta.shape
        if len(own) > len(unit) or any(a not in (1, b) for a, b in zip(own[::-1], unit[::-1], strict=False)):
            raise ValueError(
                f"a prompt of shape {tuple(own)} does not fit the activation {tuple(unit)} "
                f"at {self.site!r}; ActivationPrompt.zeros(backbone, {self.site!r}) has the right one"
            )
        return z + self.delta.to(z.dtype)

    def relative_norm(self, z: Float[Tensor, "batch *unit"]) -> float:
        """Norm of the prompt, spread over all units, divided by the mean norm of the activations."""
        delta = self.delta.detach().expand(z.shape[1:]).float().norm()
        return float(delta / z.float().flatten(1).norm(dim=1).mean())

    def extra_repr(self) -> str:
        return f"site={self.site!r}, shape={self.shape!r}, delta={tuple(self.delta.shape)}"


def prompt_shape(backbone: nn.Module, site: str, shape: Shape = "full") -> tuple[int, ...]:
    """Shape of a prompt's values: the activation's, or its channels with ones elsewhere."""
    if shape not in get_args(Shape):
        raise ValueError(f"prompt shape {shape!r} is not one of {', '.join(get_args(Shape))}")
    unit = sites.site_shape(backbone, site)
    if shape == "full":
        return unit
    axis = sites.channel_axis(backbone, site)
    return tuple(size if index - len(unit) == axis else 1 for index, size in enumerate(unit))


@accepts_old_fields
@dataclass(frozen=True, kw_only=True)
class ActivationPrompting(Method):
    """A prompt at one site, trained with a head; at ``:input`` one on the whole normalized image."""

    name: ClassVar[str] = "ap"
    label: ClassVar[str] = "activation prompt"
    color: ClassVar[str] = "#D55E00"
    site: str  # where the prompt is added
    shape: Shape = "full"  # one value a unit, or one a channel
    in_rms_units: bool = True  # learn in units of the activation's root mean square
    lr_scale: float = 10.0  # learning rate of the prompt, relative to that of the head

    def edits(self, backbone: nn.Module) -> dict[str, Edit]:
        site = self.site if ":" in self.site else f"{self.site}:output"
        unit = sites.site_shape(backbone, site)
        own = unit if self.shape == "full" else prompt_shape(backbone, site, self.shape)
        return {site: ShiftOfPrompt(site, self.shape, own, unit, self.in_rms_units, self.lr_scale)}


class ShiftOfPrompt(Shift):
    """A `Shift` that is exported as an `ActivationPrompt`."""

    stack = ShiftStack

    def __init__(self, site: str, kind: Shape, *args: Any) -> None:
        super().__init__(*args)
        self.site, self.kind = site, kind

    def export(self) -> ActivationPrompt:
        return ActivationPrompt(self.site, (self.unit * self.values).detach(), self.kind).requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class FixedPrompt(Method):
    """A head over a backbone with a frozen prompt: the control for what a random prompt of some size does."""

    name: ClassVar[str] = "random_prompt"
    label: ClassVar[str] = "frozen random prompt"
    color: ClassVar[str] = "#CC79A7"
    site: str
    norm: float  # Euclidean norm of the prompt over all units, in the activation's units
    seed: int = 0  # direction of the prompt, uniform on the sphere
    shape: Shape = "full"

    def build(self, backbone: nn.Module, num: int) -> PreparedBackbone:
        generator = torch.Generator().manual_seed(self.seed)
        delta = torch.randn(prompt_shape(backbone, self.site, self.shape), generator=generator)
        spread = delta.expand(sites.site_shape(backbone, self.site)).norm()
        delta = (delta * (self.norm / spread)).to(next(backbone.parameters()).device)
        prompt = ActivationPrompt(self.site, delta, self.shape).requires_grad_(False)
        prefix, suffix = sites.split(backbone, self.site, {self.site: prompt})
        return PreparedBackbone(Whole(prefix, suffix, repr(self)), nn.Identity(), held={self.site: prompt})


class Whole(nn.Module):
    """Both halves of a backbone as a prefix, which so ends at the features."""

    def __init__(self, prefix: nn.Module, suffix: nn.Module, code: str) -> None:
        super().__init__()
        self.prefix, self.suffix = prefix, suffix
        self.code = code  # tells one cached prefix from another

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.suffix(*self.prefix(x)),)
