"""Claims about fields and spread: closed forms of convolution, attention and pooling, and slow ways to the same."""

import math
from functools import partial

import pytest
import tiny
import torch
from torch import Tensor, nn

from apthory import backbones, sites
from apthory.metrics import layout, receptive
from apthory.theory import tangent

SIDE = 33


def drawn(model: nn.Module) -> nn.Module:
    """The module in eval mode and float64, with weights of which none is zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.1 + torch.rand(parameter.shape, generator=generator)
    return model.double().eval().requires_grad_(False)


def noise(num: int, side: int = SIDE, channels: int = 3) -> Tensor:
    return torch.randn(num, channels, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def reached_by_nan(model: nn.Module, site: str, side: int) -> tuple[int, int]:
    """Rows and columns that can reach the unit in the middle: NaN goes wherever a number has an influence."""
    spans = []
    for axis in (-2, -1):
        x = torch.zeros(side, 3, side, side, dtype=torch.float64)
        for line in range(side):
            x[line].select(axis, line).fill_(math.nan)
        z = sites.capture(model, [site], x)[site]
        reached = z[:, :, z.shape[2] // 2, z.shape[3] // 2].isnan().any(1).nonzero().flatten()
        spans.append(int(reached[-1] - reached[0]) + 1)
    return spans[0], spans[1]


def test_participation_ratio_hides_nothing():
    energy = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [math.nan, 1.0, 1.0]])
    torch.testing.assert_close(
        receptive.participation_ratio(energy), torch.tensor([2.0, 0.0, math.nan]), equal_nan=True
    )


# ---------------------------------------------------------------------------------------------- effective field


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "extent"), [(3, 1, 1, 3), (5, 2, 1, 5), (3, 1, 4, 9), (1, 1, 1, 1)]
)
def test_field_of_one_convolution_is_its_kernel(kernel: int, stride: int, dilation: int, extent: int):
    model = drawn(nn.Conv2d(3, 1, kernel, stride, padding=extent // 2, dilation=dilation))
    field = receptive.receptive_fields(model, noise(2), [":output"])[":output"]
    assert field.support == (extent, extent)
    weight = model.weight[0].square().sum(0)
    top, left = (int(line.nonzero()[0]) for line in (field.energy.sum(1), field.energy.sum(0)))
    found = field.energy[top : top + extent : dilation, left : left + extent : dilation]
    torch.testing.assert_close(found, weight / weight.sum(), rtol=1e-12, atol=0)
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)  # nothing between the taps of a dilated kernel


def test_random_signs_give_the_squared_jacobian():
    model = drawn(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 6, 3, padding=1)))
    x = noise(1, side=7)
    jacobian = torch.autograd.functional.jacobian(lambda one: model(one)[0, :, 3, 3], x)
    exact = jacobian.square().sum((0, 1, 2))
    draws = receptive.receptive_fields(model, x.expand(4000, -1, -1, -1), [":output"])[":output"].energy
    torch.testing.assert_close(draws, exact / exact.sum(), rtol=0.1, atol=1e-12)  # 4000 draws: 2 % and less


def test_field_does_not_depend_on_batches():
    model, x = drawn(nn.Conv2d(3, 1, 5)), noise(5)
    whole, parts = (receptive.receptive_fields(model, given, [":output"])[":output"] for given in (x, x.split(2)))
    torch.testing.assert_close(whole.energy, parts.energy, rtol=1e-12, atol=0)


def test_a_token_sees_its_patch_before_and_the_whole_image_after_a_block_of_attention():
    model, x = tiny.backbone("vit", torch.float64), tiny.images("vit", 4, dtype=torch.float64)
    fields = receptive.receptive_fields(model, x)
    assert fields[":input"].support == (1, 1)
    assert fields["blocks.0:input"].support == (8, 8)
    assert [fields[f"blocks.{index}:input"].support for index in (1, 2)] == [(32, 32)] * 2


@pytest.mark.parametrize("family", ["swin", "convnext", "mobilenetv2"])
def test_fields_are_found_at_every_block_of_other_backbones(family: str):
    model, x = tiny.backbone(family), tiny.images(family, 2)
    fields = receptive.receptive_fields(model, x)
    assert list(fields) == sites.list_sites(model)
    assert all(field.energy.shape == x.shape[2:] for field in fields.values())
    assert fields[":input"].area == pytest.approx(1)


def test_radius_and_area_of_uniform_fields():
    energy = torch.zeros(20, 30, dtype=torch.float64)
    energy[4:11, 5:17] = 1 / (7 * 12)
    field = receptive.ReceptiveField(energy=energy)
    assert field.radius == pytest.approx(math.sqrt((7**2 - 1) / 12 + (12**2 - 1) / 12), rel=1e-12)
    assert field.area == pytest.approx(7 * 12, rel=1e-12)
    assert field.support == (7, 12)


def test_a_pooled_vector_sees_everything_alike():
    model = drawn(nn.Sequential(nn.Conv2d(3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    field = receptive.receptive_fields(model, noise(2), [":output"])[":output"]
    assert field.area == pytest.approx(SIDE**2, rel=1e-12)


# ---------------------------------------------------------------------------------------------- theoretical field


def test_stacked_convolutions_add_up_by_their_strides():
    layers = [nn.Conv2d(3, 4, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 3, padding=2, dilation=2)]
    model = drawn(nn.Sequential(*layers, nn.AvgPool2d(2), nn.Conv2d(4, 2, (1, 3), padding=(0, 1))))
    fields = receptive.theoretical_fields(model, noise(1), ["0", "2", "3", "4", "5"])
    assert [field.height for field in fields.values()] == [7, 11, 27, 31, 31]
    assert [field.width for field in fields.values()] == [7, 11, 27, 31, 47]
    assert [field.stride[0] for field in fields.values()] == [2, 4, 4, 8, 8]


def test_known_fields_of_vgg16_and_resnet18():
    plan = [layer for num in (2, 2, 3, 3, 3) for layer in (*(nn.Conv2d(3, 3, 3, padding=1),) * num, nn.MaxPool2d(2))]
    field = receptive.theoretical_fields(nn.Sequential(*plan).eval(), torch.zeros(1, 3, 64, 64), [":output"])[":output"]
    assert field == (212, 212, (32, 32))
    resnet18 = backbones.create("resnet_micro").eval()  # its layers, with fewer channels
    sizes = [field.height for field in receptive.theoretical_fields(resnet18, torch.zeros(1, 3, 64, 64)).values()]
    assert sizes == [1, 11, 27, 43, 67, 99, 147, 211, 307, 435]


@pytest.mark.parametrize(("family", "side"), [("resnet", 64), ("mobilenetv2", 64), ("convnext", 96)])
def test_theoretical_field_is_where_nan_comes_from(family: str, side: int):
    model = tiny.backbone(family, torch.float64)
    fields = receptive.theoretical_fields(model, torch.zeros(1, 3, side, side, dtype=torch.float64))
    within = {site: field for site, field in fields.items() if field.height < side / 2 and site != ":input"}
    assert len(within) >= 2
    for site, field in within.items():
        assert reached_by_nan(model, site, side) == (field.height, field.width), site


def test_effective_field_fills_the_theoretical_one_and_no_more():
    model = drawn(nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))))
    places = ["0", "1", "2", "3"]
    fields = receptive.receptive_fields(model, noise(2), places)
    theory = receptive.theoretical_fields(model, noise(1), places)
    assert (
        [field.support[0] for field in fields.values()] == [field.height for field in theory.values()] == [3, 5, 7, 9]
    )
    assert all(field.area < field.support[0] ** 2 for field in fields.values())


def test_attention_and_pooling_see_everything():
    fields = receptive.theoretical_fields(tiny.backbone("vit"), tiny.images("vit", 1))
    assert [math.isinf(field.height) for field in fields.values()] == [False, False, True, True, True]
    assert fields["blocks.0:input"] == (8, 8, (8, 8))
    pooled = receptive.theoretical_fields(tiny.backbone("resnet"), tiny.images("resnet", 1), [":output"])
    assert math.isinf(pooled[":output"].width)


def test_a_linear_layer_mixes_what_lies_along_the_last_axis():
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.across, self.along = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 6), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.across(self.patches(x).flatten(2).transpose(1, 2))
            return self.along(tokens.transpose(-1, -2))

    places = ["patches", "across", "along"]
    fields = receptive.theoretical_fields(Mixing().eval(), torch.zeros(1, 3, 16, 16), places)
    assert [field.height for field in fields.values()] == [4, 4, math.inf]
    nhwc = nn.Sequential(
        nn.Conv2d(3, 4, 3), Permuted(0, 2, 3, 1), nn.LayerNorm(4), nn.Linear(4, 5), Permuted(0, 3, 1, 2)
    )
    fields = receptive.theoretical_fields(
        nhwc.append(nn.Linear(14, 14)).eval(), torch.zeros(1, 3, 16, 16), ["3", "4", "5"]
    )
    assert [field.height for field in fields.values()] == [3, 3, math.inf]


@pytest.mark.parametrize("turn", [lambda z: z.mT, lambda z: z.movedim(1, 2), lambda z: z.transpose(1, 2)])
def test_channels_are_not_mistaken_for_as_many_positions(turn):
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.along = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.along(turn(self.patches(x).flatten(2).transpose(1, 2)))

    fields = receptive.theoretical_fields(Turned().eval(), torch.zeros(1, 3, 16, 16), ["along"])
    assert math.isinf(fields["along"].height)


class Permuted(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(*self.order)


def test_an_unknown_operation_is_named():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(-1)

    with pytest.raises(receptive.UnknownOperationError, match="cannot tell how far the operation 'cumsum' reaches"):
        receptive.theoretical_fields(Odd().eval(), noise(1), [":output"])


# --------------------------------------------------------------------------------------------- spread


class Readout(nn.Module):
    """A map, then what reads it."""

    def __init__(self, reading: nn.Module) -> None:
        super().__init__()
        self.first, self.reading, self.flat = nn.Conv2d(3, 1, 1), reading, nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.reading(self.first(x)))


@pytest.mark.parametrize(("reading", "spread", "coverage"), [
    (nn.AdaptiveAvgPool2d(1), 36, 36),  # every position alike
    (nn.AdaptiveMaxPool2d(1), 1, None),  # one position an image, another one in each
    (nn.AdaptiveAvgPool2d((1, 2)), 36, 36),  # two halves, in random directions of equal size
])  # fmt: skip
def test_spread_of_pooling(reading: nn.Module, spread: float, coverage: float | None):
    model, x = drawn(Readout(reading)), noise(40, side=6)
    found = receptive.gradient_spread(model, x, ["first"])["first"]
    assert found.positions == 36
    assert found.spread == pytest.approx(spread, rel=1e-12)
    assert found.share == found.spread / 36
    with pytest.warns(DeprecationWarning, match=r"^GradientSpread.reach is GradientSpread.spread now; "):
        assert found.reach == found.spread
    if coverage is None:
        places = torch.bincount(model.first(x).flatten(1).argmax(1), minlength=36).double()
        coverage = float(places.sum().square() / places.square().sum())
    assert found.coverage == pytest.approx(coverage, rel=1e-12)


@pytest.mark.parametrize("family", ["vit", "swin", "resnet"])
def test_spread_is_that_of_each_image_alone(family: str):
    """Against one backward pass for each image and site, and sums made by another module."""
    model, x = tiny.backbone(family, torch.float64), tiny.images(family, 5, dtype=torch.float64)
    target = torch.randn(5, model(x[:1]).shape[1], dtype=torch.float64)
    places = sites.list_sites(model)[1:4]

    def loss(features: Tensor, index: Tensor) -> Tensor:
        return (features - target[index]).square().sum(1)

    fast = receptive.gradient_spread(model, [x[:3], x[3:]], places, readout=loss)
    for site in places:
        rows = []
        for index in range(5):
            shift = torch.zeros((1, *sites.site_shape(model, site)), dtype=torch.float64, requires_grad=True)
            with sites.edited(model, {site: partial(torch.add, shift)}):
                value = loss(model(x[index : index + 1]), torch.tensor([index])).sum()
            rows.append(torch.autograd.grad(value, shift)[0])
        slow = tangent.Gradients.of(torch.cat(rows), sites.channel_axis(model, site))
        assert fast[site].spread == pytest.approx(slow.reach, rel=1e-9)
        assert fast[site].coverage == pytest.approx(slow.coverage, rel=1e-9)


def test_only_the_class_token_is_read_after_the_last_block():
    found = receptive.gradient_spread(
        tiny.backbone("vit"), tiny.images("vit", 3), ["blocks.2:output", "blocks.2:input"]
    )
    assert found["blocks.2:output"].spread == 1
    assert found["blocks.2:output"].positions == 17
    assert found["blocks.2:input"].spread > 1


@pytest.mark.parametrize("metric", [receptive.receptive_fields, receptive.gradient_spread])
def test_one_forward_pass_serves_all_sites_and_leaves_no_trace(metric):
    model, calls = tiny.backbone("vit"), []
    before, places = backbones.digest(model), sites.list_sites(model)
    handle = model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    metric(model, tiny.images("vit", 40).split(20), places)
    handle.remove()
    assert len(calls) == 2  # one a batch
    assert backbones.digest(model) == before
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


# ---------------------------------------------------------------------------------------------- bad input

METRICS = [receptive.receptive_fields, receptive.gradient_spread]


def test_training_mode_moves_no_statistic_of_a_theoretical_field():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    before = backbones.digest(model)
    with pytest.raises(ValueError, match="training mode"):
        receptive.theoretical_fields(model, torch.zeros(1, 3, 8, 8), ["0"])
    assert backbones.digest(model) == before


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_refused_by_site_and_image(metric, value: float):
    model, x = drawn(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 3))), noise(3, side=8)
    model[1].bias[0] = value
    with pytest.raises(ValueError, match=r"site '1' is not finite at image 0"):
        metric(model, x, ["0", "1"])
    model[1].bias[0], x[2, 0, 4, 4] = 0.0, value
    with pytest.raises(ValueError, match=r"site ':input' is not finite at image 2"):
        metric(model, x, ["0"])


@pytest.mark.parametrize("metric", METRICS)
def test_training_mode_and_no_images_are_refused(metric):
    with pytest.raises(ValueError, match=r"training mode.*call backbone.eval\(\)"):
        metric(nn.Conv2d(3, 2, 3), torch.zeros(2, 3, 8, 8), [":output"])
    with pytest.raises(ValueError, match="there are no images"):
        metric(nn.Conv2d(3, 2, 3).eval(), torch.zeros(0, 3, 8, 8), [":output"])


def test_constant_features_have_no_field_and_no_spread():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 3)).eval()
    nn.init.zeros_(model[1].weight)
    with pytest.raises(ValueError, match=r"no pixel moves .* site '1:output': its features are constant"):
        receptive.receptive_fields(model, torch.randn(2, 3, 8, 8), ["0:output", "1:output"])
    with pytest.raises(ValueError, match=r"no gradient comes back to site '0:output'"):
        receptive.gradient_spread(model, torch.randn(2, 3, 8, 8), ["0:output"])


# ---------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(("family", "site", "expected"), [
    ("vit", "blocks.1:input", (-1, 1, (4, 4))),
    ("vit", "patch_embed", (-1, 0, (4, 4))),
    ("deit", "blocks.1:input", (-1, 2, (4, 4))),
    ("swin", "layers.0.blocks.1:input", (-1, 0, (14, 14))),
    ("convnext", "stages.1.blocks.0:input", (-3, 0, (4, 4))),
    ("resnet", ":output", (-1, 0, (1, 1))),
])  # fmt: skip
def test_layouts(family: str, site: str, expected: tuple):
    model, x = tiny.backbone(family), tiny.images(family, 2)
    z = sites.capture(model, [site], x)[site]
    found = layout.layouts(model, {site: z}, x)[site]
    assert found == expected
    maps = found.maps(z)
    assert maps.shape == (2, z.shape[found.channel_axis], *found.grid)
    if z.ndim == 3:
        torch.testing.assert_close(maps[1, :, 0, 1], z[1, found.num_extra_tokens + 1], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["swin", "resnet"])
def test_channel_axes_of_many_sites_are_those_of_each(family: str):
    model = tiny.backbone(family)
    places = sites.list_sites(model)
    assert sites.channel_axes(model, places) == {site: sites.channel_axis(model, site) for site in places}


def test_layout_without_a_trace_is_read_off_a_square_map_or_refused():
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    def read(z: Tensor) -> tuple:
        return layout.layouts(Branching(), {":output": z}, x)[":output"]

    x = torch.randn(2, 3, 8, 8)
    assert read(x) == (-3, 0, (8, 8))
    assert read(x.permute(0, 2, 3, 1)) == (-1, 0, (8, 8))
    with pytest.raises(ValueError, match="does not tell channels from columns"):
        read(torch.randn(2, 8, 8, 8))
    with pytest.raises(ValueError, match="15 tokens, which make up no map"):
        read(torch.randn(2, 15, 8))
    with pytest.raises(ValueError, match="expected maps, tokens or vectors"):
        read(torch.randn(2, 3, 4, 5, 6))
