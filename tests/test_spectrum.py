"""Claims about the spectrum: Parseval, waves, noise, and what it does not depend on."""

import math

import pytest
import tiny
import torch
from torch import Tensor, nn

from apthory import sites
from apthory.metrics import spectrum


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def wave(side: int, rows: int, columns: int, phase: float = 0.3) -> Tensor:
    place = 2 * math.pi * torch.arange(side, dtype=torch.float64) / side
    return torch.cos(rows * place[:, None] + columns * place + phase)[None, None]


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (6, 10), (9, 4), (1, 1), (2, 2), (1, 5)])
def test_power_adds_up_to_the_mean_square(size: tuple[int, int]):
    maps = noise(3, 4, *size)
    found = spectrum.amplitude_by_frequency(maps)
    assert float(found.power.sum()) == pytest.approx(float(maps.square().mean()), rel=1e-12)
    assert int(found.components.sum()) == math.prod(size)
    assert float(found.frequency[0]) == 0
    assert float(found.frequency[-1]) == (1 if max(size) > 1 else 0)
    assert float(found.power[0]) == pytest.approx(float(maps.mean((2, 3)).square().mean()), rel=1e-12)


@pytest.mark.parametrize(
    ("rows", "columns", "frequency"), [(0, 0, 0), (1, 0, 0.25), (0, 2, 0.5), (3, 1, 0.75), (4, 4, 1)]
)
def test_a_wave_has_all_its_power_at_its_frequency(rows: int, columns: int, frequency: float):
    found = spectrum.amplitude_by_frequency(wave(8, rows, columns))
    share = found.power / found.power.sum()
    assert float(share[found.frequency == frequency]) == pytest.approx(1, abs=1e-12)


def test_noise_is_flat_and_smoothing_takes_the_quick_part():
    maps = noise(200, 16, 8, 8)
    flat = spectrum.amplitude_by_frequency(maps).relative_log_amplitude
    torch.testing.assert_close(flat, torch.zeros_like(flat), rtol=0, atol=0.03)
    smooth = maps + sum(maps.roll(shift, axis) for shift in (1, -1) for axis in (2, 3)) / 5
    relative = spectrum.amplitude_by_frequency(smooth).relative_log_amplitude
    assert (relative.diff() < 0).all()


def test_spectrum_ignores_scale_of_units_cyclic_shifts_and_mirrors():
    maps = noise(3, 4, 6, 6)
    expected = spectrum.amplitude_by_frequency(maps)
    for other in (maps.roll((2, 1), (2, 3)), maps.flip(2), maps.mT, -maps):
        torch.testing.assert_close(spectrum.amplitude_by_frequency(other).power, expected.power, rtol=1e-12, atol=0)
    scaled = spectrum.amplitude_by_frequency(100 * maps)
    torch.testing.assert_close(scaled.relative_log_amplitude, expected.relative_log_amplitude, rtol=1e-10, atol=1e-12)
    assert scaled.high_frequency == pytest.approx(float(expected.relative_log_amplitude[-1]), rel=1e-12)
    assert scaled.shared == pytest.approx(expected.shared, rel=1e-12)
    assert spectrum.amplitude_by_frequency(maps + 1).shared > expected.shared  # a mean is frequency zero


def test_float32_maps_with_a_large_mean_keep_their_digits():
    maps = noise(4, 8, 8, 8)
    exact = spectrum.amplitude_by_frequency(maps + 10).power
    single = spectrum.amplitude_by_frequency((maps + 10).float()).power
    torch.testing.assert_close(single, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
def test_sites_add_up_over_batches(family: str):
    model, x = tiny.backbone(family, torch.float64), tiny.images(family, 5, dtype=torch.float64)
    places = sites.list_sites(model)[:3]
    whole, parts = spectrum.spectra(model, x, places), spectrum.spectra(model, [x[:1], x[1:]], places)
    for site, z in sites.capture(model, places, x).items():
        torch.testing.assert_close(parts[site].power, whole[site].power, rtol=1e-12, atol=1e-300)
        if family != "vit":
            assert float(whole[site].power.sum()) == pytest.approx(float(z.square().mean()), rel=1e-12)


def test_tokens_of_no_position_are_left_out():
    model, x = tiny.backbone("vit", torch.float64), tiny.images("vit", 3, dtype=torch.float64)
    found = spectrum.spectra(model, x, ["blocks.1:input"])["blocks.1:input"]
    z = sites.capture(model, ["blocks.1:input"], x)["blocks.1:input"]
    assert float(found.power.sum()) == pytest.approx(float(z[:, 1:].square().mean()), rel=1e-12)


def test_maps_without_an_answer_are_refused():
    constant = spectrum.amplitude_by_frequency(torch.full((2, 3, 6, 6), 0.1))
    assert constant.shared == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match=r"no amplitude at frequency 0\.\d+, so its logarithm is infinite"):
        _ = constant.relative_log_amplitude
    assert constant.high_frequency == -math.inf
    single = spectrum.amplitude_by_frequency(noise(2, 3, 1, 1))
    assert math.isnan(single.high_frequency)
    with pytest.raises(ValueError, match="one position has no frequencies"):
        _ = single.relative_log_amplitude
    with pytest.raises(ValueError, match="zero everywhere"):
        _ = spectrum.amplitude_by_frequency(torch.zeros(2, 3, 4, 4)).shared
    with pytest.raises(ValueError, match=r"shape \(0, 3, 4, 4\); expected \[batch, channel, height, width\]"):
        spectrum.amplitude_by_frequency(torch.zeros(0, 3, 4, 4))
    for value in (math.nan, math.inf):
        maps = noise(2, 3, 4, 4)
        maps[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match="the maps are not finite"):
            spectrum.amplitude_by_frequency(maps)


def test_bad_activations_name_their_site():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 3)).eval()
    model[1].weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"site '1:output' is not finite at image 0"):
        spectrum.spectra(model, torch.randn(2, 3, 8, 8), ["0:output", "1:output"])
    with pytest.raises(ValueError, match="training mode"):
        spectrum.spectra(model.train(), torch.randn(2, 3, 8, 8), ["0:output"])
