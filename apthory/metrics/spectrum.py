"""How much of an activation varies slowly over the image and how much quickly: amplitude by spatial frequency.

Park and Kim (2022) read from it that attention smooths and convolutions sharpen. A frequency is the higher one of its
parts along rows and along columns, as a share of the highest that the map can carry (0: the same everywhere, 1: the
sign changes from each position to the next).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from apthory import sites
from apthory.metrics.batches import IMAGES_AT_ONCE, ImageBatches, batches
from apthory.metrics.layout import ActivationLayout, finite, layouts

_POWER_ROUNDING = 1e-28  # of the power of a map that is zero there


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Power of maps by frequency; it adds up to their mean square, over frequencies."""

    frequency: Float[Tensor, " frequency"]  # 0 to 1
    power: Float[Tensor, " frequency"]  # share of the mean square, in the units of the activation squared
    components: Int64[Tensor, " frequency"]  # of the Fourier transform that have this frequency

    @property
    def amplitude(self) -> Float[Tensor, " frequency"]:
        """Root mean square over the components of a frequency, images and channels."""
        return (self.power / self.components).sqrt()

    @property
    def relative_log_amplitude(self) -> Float[Tensor, " frequency"]:
        """Log of the amplitude over that at frequency 0.

        Park and Kim average the log over images and channels, along the diagonal, and leave out the highest frequency;
        here the log comes last, so that channels that are silent do not rule.

        Raises:
            ValueError: If maps have one position only, or are the same at all positions, or have the mean zero.
        """
        if len(self.frequency) < 2:
            raise ValueError("a map of one position has no frequencies to compare")
        is_silent = self.power <= _POWER_ROUNDING * self.power.sum()
        if is_silent.any():
            silent = float(self.frequency[int(is_silent.nonzero()[0])])
            raise ValueError(f"there is no amplitude at frequency {silent:g}, so its logarithm is infinite")
        return (self.amplitude / self.amplitude[0]).log()

    @property
    def high_frequency(self) -> float:
        """The same at the highest frequency: 0 for noise; -inf where there is none of it, NaN for a single position."""
        first, last = self.amplitude[[0, -1]].tolist()
        is_silent = bool(self.power[-1] <= _POWER_ROUNDING * self.power.sum())
        return math.nan if len(self.power) < 2 else -math.inf if is_silent else math.log(last / first)

    @property
    def shared(self) -> float:
        """Share of the mean square that is the same at all positions: 1 where maps are constant.

        Raises:
            ValueError: If maps are zero everywhere.
        """
        if not self.power.any():
            raise ValueError("the maps are zero everywhere: nothing of them is shared")
        return float(self.power[0] / self.power.sum())


def amplitude_by_frequency(maps: Float[Tensor, "batch channel height width"]) -> Spectrum:
    """The spectrum of maps, mean over images and channels.

    Raises:
        ValueError: If they are not finite, or not maps.

    References:
        Park and Kim (2022), How do vision transformers work?, arXiv:2202.06709, Figure 2a.
    """
    if maps.ndim != 4 or not maps.numel():
        raise ValueError(f"maps have the shape {tuple(maps.shape)}; expected [batch, channel, height, width]")
    if not maps.isfinite().all():
        raise ValueError("the maps are not finite; look for the first image or layer that gives NaN or infinity")
    by_component = torch.fft.fft2(maps.double(), norm="ortho").abs().square().mean((0, 1)) / maps[0, 0].numel()
    height, width = by_component.shape
    last = max(height, width) // 2  # the number of frequencies above zero
    rows, columns = (2 * torch.fft.fftfreq(size, dtype=torch.float64).abs() for size in (height, width))
    order = (torch.maximum(rows[:, None], columns) * last).round().long().flatten().to(maps.device)
    power = by_component.new_zeros(last + 1).index_add(0, order, by_component.flatten())
    frequency = torch.arange(last + 1, dtype=torch.float64, device=maps.device) / max(last, 1)
    return Spectrum(frequency=frequency, power=power, components=order.bincount(minlength=last + 1))


@torch.no_grad()
def spectra(backbone: nn.Module, images: ImageBatches, places: Sequence[str] | None = None) -> dict[str, Spectrum]:
    """The spectrum of each site's maps, from one forward pass; tokens that belong to no position are left out.

    Args:
        places: All block sites by default.

    Raises:
        ValueError: If activations are not finite, tokens make up no map, or the backbone is in training mode.
    """
    places = list(places) if places is not None else sites.list_sites(backbone)
    how: dict[str, ActivationLayout] = {}
    by_site: dict[str, Spectrum] = {}
    num = 0
    for x in batches(images, IMAGES_AT_ONCE, backbone):
        seen = sites.capture(backbone, places, x)
        how = how or layouts(backbone, seen, x)
        for site, z in seen.items():
            own = amplitude_by_frequency(how[site].maps(finite(site, z)))
            before = by_site[site].power if site in by_site else own.power
            by_site[site] = replace(own, power=(num * before + len(x) * own.power) / (num + len(x)))
        num += len(x)
    return by_site
