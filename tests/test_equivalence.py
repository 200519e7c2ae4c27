"""Claims of E1 to E8: where a channel prompt is a bias shift to the last digit, and where it must not be."""

import copy
import inspect
import os
from functools import partial
from pathlib import Path

import pytest
import timm.layers
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jvp

from apthory import backbones, equivalence, methods, sites
from apthory.equivalence import (
    bias_shift,
    border_outputs,
    diagnose,
    difference,
    distance_to_tuning,
    fold,
    fold_prompt,
    unfold_prompt,
)
from apthory.studies import equivalence as equivalence_study

EXACT = 1e-12
seeds = st.integers(0, 2**31 - 1)
widths = st.integers(1, 9)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomized(layer: nn.Module, seed: int) -> nn.Module:
    """The layer in float64 and eval mode, with random parameters and statistics."""
    layer = layer.double().eval().requires_grad_(False)
    for index, value in enumerate([*layer.parameters(), *layer.buffers()]):
        if value.is_floating_point():
            value.copy_(drawn(*value.shape, seed=seed + index))
    if getattr(layer, "running_var", None) is not None:
        layer.running_var.copy_(layer.running_var.square() + 1e-3)
    return layer


def on_channels(delta: Tensor, rank: int, axis: int) -> Tensor:
    shape = [1] * rank
    shape[axis] = -1
    return delta.view(shape)


NORMS = {  # a layer of some width, the axis of its channels and the rank of its input
    "BatchNorm1d": (nn.BatchNorm1d, 1, 2),
    "BatchNorm2d": (nn.BatchNorm2d, 1, 4),
    "BatchNorm3d": (nn.BatchNorm3d, 1, 5),
    "BatchNormAct2d without activation": (partial(timm.layers.BatchNormAct2d, apply_act=False), 1, 4),
    "LayerNorm": (nn.LayerNorm, -1, 3),
    "LayerNorm2d": (timm.layers.LayerNorm2d, 1, 4),
    "GroupNorm": (partial(nn.GroupNorm, 1), 1, 4),
    "GroupNorm1": (timm.layers.GroupNorm1, 1, 4),
}
LINEAR = {
    "Linear": (nn.Linear, -1, 3),
    "Conv1d": (partial(nn.Conv1d, kernel_size=3), 1, 3),
    "Conv2d": (partial(nn.Conv2d, kernel_size=(3, 2), stride=2, dilation=(1, 2)), 1, 4),
    "Conv2d circular": (partial(nn.Conv2d, kernel_size=3, padding=1, padding_mode="circular"), 1, 4),
    "Conv2d reflect": (partial(nn.Conv2d, kernel_size=3, padding=1, padding_mode="reflect"), 1, 4),
    "Conv2d replicate": (partial(nn.Conv2d, kernel_size=5, padding=2, padding_mode="replicate"), 1, 4),
    "patch embedding": (partial(nn.Conv2d, kernel_size=4, stride=4), 1, 4),
}


def activation(width: int, axis: int, rank: int, seed: int, size: int = 8) -> Tensor:
    shape = [3] + [size] * (rank - 1)
    shape[axis] = width
    return drawn(*shape, seed=seed)


# ------------------------------------------------------------------------------------------- one layer


@given(name=st.sampled_from(sorted(NORMS)), width=widths, seed=seeds)
def test_after_a_norm_a_channel_prompt_is_a_shift_of_beta(name: str, width: int, seed: int):
    make, axis, rank = NORMS[name]
    layer = randomized(make(width), seed)
    x, delta = activation(width, axis, rank, seed + 9), drawn(width, seed=seed + 10)
    folded = fold_prompt(layer, delta)
    assert difference(folded(x), layer(x) + on_channels(delta, rank, axis)) <= EXACT
    torch.testing.assert_close(unfold_prompt(layer, folded), delta, rtol=1e-12, atol=1e-14)


@given(width=widths, seed=seeds)
def test_before_a_batch_norm_with_running_statistics_it_is_a_shift_by_the_scale(width: int, seed: int):
    layer = randomized(nn.BatchNorm2d(width), seed)
    x, delta = drawn(3, width, 2, 2, seed=seed + 9), drawn(width, 1, 1, seed=seed + 10)
    folded = fold_prompt(layer, delta, edge="input")
    assert difference(folded(x), layer(x + delta)) <= EXACT
    by_hand = layer.weight * delta.flatten() / (layer.running_var + layer.eps).sqrt()
    torch.testing.assert_close(bias_shift(layer, delta, edge="input"), by_hand, rtol=1e-12, atol=0)
    torch.testing.assert_close(unfold_prompt(layer, folded, edge="input"), delta.flatten(), rtol=1e-9, atol=1e-11)


@given(name=st.sampled_from(sorted(LINEAR)), width=widths, num_out=widths, seed=seeds)
def test_before_a_linear_map_a_channel_prompt_is_a_shift_of_its_bias(name: str, width: int, num_out: int, seed: int):
    make, axis, rank = LINEAR[name]
    layer = randomized(make(width, num_out), seed)
    x, delta = activation(width, axis, rank, seed + 9), drawn(width, seed=seed + 10)
    wanted = layer(x + on_channels(delta, rank, axis))
    folded = fold_prompt(layer, delta, edge="input")
    assert difference(folded(x), wanted, scale=wanted.abs().max() + 1) <= EXACT
    prompt = unfold_prompt(layer, folded, edge="input")  # not the only one, but one that does the same
    again = layer(x + on_channels(prompt, rank, axis))
    assert difference(again, wanted, scale=wanted.abs().max() + 1) <= 1e-9
    after = fold_prompt(layer, delta := drawn(num_out, seed=seed + 11))
    assert difference(after(x), layer(x) + on_channels(delta, rank, axis), scale=wanted.abs().max() + 1) <= EXACT


@given(groups=st.integers(1, 4), each=st.integers(1, 3), seed=seeds)
def test_groups_of_a_convolution_sum_over_their_own_channels(groups: int, each: int, seed: int):
    layer = randomized(nn.Conv2d(groups * each, 2 * groups, 3, groups=groups), seed)
    x, delta = drawn(2, groups * each, 5, 5, seed=seed + 5), drawn(groups * each, 1, 1, seed=seed + 6)
    assert difference(fold_prompt(layer, delta, edge="input")(x), layer(x + delta)) <= EXACT


def test_a_layer_norm_over_several_axes_takes_a_prompt_of_that_shape():
    layer = randomized(nn.LayerNorm((3, 4)), 0)
    x, delta = drawn(2, 5, 3, 4, seed=1), drawn(3, 4, seed=2)
    assert difference(fold_prompt(layer, delta)(x), layer(x) + delta) <= EXACT


@pytest.mark.parametrize("rms_norm", [nn.RMSNorm, timm.layers.RmsNorm])
def test_an_rms_norm_has_no_bias_so_the_next_linear_layer_takes_the_prompt(rms_norm: type[nn.Module]):
    norm, linear = randomized(rms_norm(6), 0), randomized(nn.Linear(6, 4), 1)
    x, delta = drawn(2, 5, 6, seed=2), drawn(6, seed=3)
    with pytest.raises(ValueError, match=r"has no bias to hold the prompt.*next layer"):
        fold_prompt(norm, delta)
    assert torch.equal(bias_shift(norm, delta), delta)
    assert difference(fold_prompt(linear, delta, edge="input")(norm(x)), linear(norm(x) + delta)) <= EXACT


def test_a_fused_activation_comes_after_the_prompt():
    layer = randomized(timm.layers.BatchNormAct2d(4), 0)
    x, delta = drawn(3, 4, 2, 2, seed=1), drawn(4, 1, 1, seed=2)
    folded = fold_prompt(layer, delta)
    with sites.edited(layer, {"drop:input": lambda z: z + delta}):
        assert difference(folded(x), layer(x)) <= EXACT
    assert difference(folded(x), layer(x) + delta) > 0.05  # after the activation it is another place


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), nn.Conv2d(3, 5, 2)], ids=["norm", "convolution"])
def test_a_folded_prompt_has_the_derivatives_of_the_prompt(layer: nn.Module):
    layer = randomized(layer, 0)
    x = drawn(2, 3, 2, 2, seed=1)

    def prompted(delta: Tensor) -> Tensor:
        return layer(x + delta.view(3, 1, 1))

    def folded(delta: Tensor) -> Tensor:
        return functional_call(layer, {"bias": layer.bias + bias_shift(layer, delta, edge="input")}, (x,))

    delta = drawn(3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(folded, delta)
    by_prompt, by_bias = (torch.autograd.functional.jacobian(f, delta) for f in (prompted, folded))
    assert by_prompt.abs().max() > 0.1
    torch.testing.assert_close(by_prompt, by_bias, rtol=1e-12, atol=1e-14)


@given(groups=st.integers(1, 4), each=st.integers(2, 4), seed=seeds)
def test_a_group_norm_of_several_groups_takes_a_prompt_after_but_not_before_it(groups: int, each: int, seed: int):
    layer = randomized(nn.GroupNorm(groups, groups * each), seed)
    x, delta = drawn(2, groups * each, 3, 3, seed=seed + 3), drawn(groups * each, 1, 1, seed=seed + 4)
    assert difference(fold_prompt(layer, delta)(x), layer(x) + delta) <= EXACT
    by_group = delta.view(groups, -1)
    alike = by_group.mean(1, keepdim=True).expand_as(by_group).reshape(delta.shape)  # one value a group is lost
    assert difference(layer(x + alike), layer(x)) <= 1e-9
    assert difference(layer(x + delta), layer(x)) > 1e-6
    with pytest.raises(ValueError, match="another one for each image"):
        bias_shift(layer, delta, edge="input")


@given(num_out=st.sampled_from([3, 8, 512]), seed=seeds)
def test_in_single_precision_a_prompt_before_a_linear_map_unfolds_as_it_was_folded(num_out: int, seed: int):
    layer = randomized(nn.Linear(128, num_out), seed).float()
    delta = drawn(128, seed=seed + 2).float()
    prompt = unfold_prompt(layer, fold_prompt(layer, delta, edge="input"), edge="input")
    shift = bias_shift(layer, delta, edge="input")
    assert difference(bias_shift(layer, prompt, edge="input"), shift) < 1e-5
    if num_out > 128:
        torch.testing.assert_close(prompt, delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "edge", "shape"),
    [
        (nn.BatchNorm2d(8), "output", (1, 1, 8)),
        (nn.BatchNorm2d(8), "input", (1, 8, 1)),
        (nn.Conv2d(8, 8, 1), "input", (1, 1, 8)),
        (timm.layers.LayerNorm2d(8), "output", (1, 1, 8)),
        (nn.LayerNorm(8), "output", (8, 1)),
        (nn.Linear(8, 8), "input", (8, 1, 1)),
    ],
)
def test_a_prompt_on_another_axis_than_the_channels_is_refused(layer, edge, shape: tuple[int, ...]):
    layer = randomized(layer, 0)
    with pytest.raises(ValueError, match=r"8 channels on its (first|last) axis") as refused:
        fold_prompt(layer, torch.ones(shape), edge=edge)
    own = (8, 1, 1) if "first" in str(refused.value) else (1, 1, 8)
    assert torch.equal(bias_shift(layer, torch.ones(own), edge=edge), bias_shift(layer, torch.ones(8), edge=edge))


def test_a_reparametrized_convolution_folds_by_the_weight_that_it_applies():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False))
    layer.parametrizations.weight.original0.mul_(torch.arange(1.0, 5.0).view(4, 1, 1, 1))
    x, delta = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, -2.0, 3.0])
    with pytest.raises(ValueError, match="8 of 9 outputs"):
        bias_shift(layer, delta, edge="input")
    folded = fold_prompt(layer, delta, edge="input", border="ignore")
    wanted = layer(x + delta.view(3, 1, 1))
    assert difference(folded(x)[..., 1:-1, 1:-1], wanted[..., 1:-1, 1:-1]) < 1e-5
    assert border_outputs(layer, 5, 5) == (16, 25)


def test_nothing_is_modified_in_place():
    layer = randomized(nn.BatchNorm2d(3), 0)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    folded = fold_prompt(layer, drawn(3, seed=1), edge="input")
    unfold_prompt(layer, folded)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert folded.bias.data_ptr() != layer.bias.data_ptr()


@pytest.mark.parametrize(
    ("layer", "arguments", "message"),
    [
        (nn.GELU(), {}, "GELU is no normalization over channels, linear layer or convolution"),
        (nn.InstanceNorm2d(3), {}, "InstanceNorm2d"),
        (nn.ConvTranspose2d(3, 3, 2), {}, "ConvTranspose2d is no normalization"),
        (nn.LayerNorm(3, elementwise_affine=False), {}, "no affine parameters; make it with them"),
        (nn.BatchNorm2d(3, affine=False), {}, "no affine parameters"),
        (nn.LayerNorm(3, bias=False), {}, "no bias to hold the prompt"),
        (nn.Conv2d(3, 3, 1, bias=False), {"edge": "input"}, "no bias to hold the prompt"),
        (nn.BatchNorm2d(3), {"edge": "input"}, r"batch statistics, which remove.*eval\(\)"),
        (nn.BatchNorm2d(3, track_running_stats=False).eval(), {"edge": "input"}, "batch statistics"),
        (nn.LayerNorm(3), {"edge": "input"}, "only to first order, and another one for each position.*E4.*gap"),
        (nn.GroupNorm(1, 3), {"edge": "input"}, "another one for each image"),
        (nn.RMSNorm(3), {"edge": "input"}, "only to first order"),
        (nn.Conv2d(3, 3, 3, padding=1), {"edge": "input"}, "8 of 9 outputs of a 3x3 map.*border='ignore'"),
        (nn.Conv2d(3, 3, 7, padding="same"), {"edge": "input"}, "48 of 49 outputs of a 7x7 map"),
        (timm.layers.Conv2dSame(3, 3, 3, stride=2), {"edge": "input"}, "pads with zeros"),
        (timm.layers.StdConv2d(3, 3, 3, bias=True), {"edge": "input"}, r"StdConv2d does not apply its weight.*fold\("),
        (
            timm.layers.StdConv2d(3, 3, 3, padding=1, bias=True),
            {"edge": "input", "border": "ignore"},
            "does not apply its weight",
        ),
        (nn.LayerNorm(4), {}, "shape .3,. is no channel prompt for the output of this LayerNorm, which has 4"),
    ],
)
def test_what_does_not_fold_is_refused_with_the_way_out(layer: nn.Module, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        fold_prompt(layer, torch.ones(3), **arguments)


def test_a_prompt_that_differs_between_positions_is_refused():
    with pytest.raises(ValueError, match="differs between positions is no bias shift"):
        fold_prompt(nn.BatchNorm2d(3), torch.ones(3, 4, 4))


@given(kernel=st.sampled_from([1, 3, 5, 7]), size=st.integers(7, 9), stride=st.integers(1, 2), seed=seeds)
def test_zero_padding_changes_exactly_the_outputs_whose_kernel_touches_it(kernel, size, stride, seed):
    layer = randomized(nn.Conv2d(2, 3, kernel, stride=stride, padding=kernel // 2), seed)
    x, delta = drawn(1, 2, size, size, seed=seed + 3), drawn(2, 1, 1, seed=seed + 4)
    folded = fold_prompt(layer, delta, edge="input", border="ignore")
    wrong = ((folded(x) - layer(x + delta)).abs() > 1e-10).any(1)
    assert (int(wrong.sum()), wrong.numel()) == border_outputs(layer, size, size)


@pytest.mark.parametrize("edge", ["output", "input"])
def test_unfolding_refuses_more_than_a_bias(edge: equivalence.layers.Edge):
    layer = randomized(nn.BatchNorm2d(3), 0)
    tuned = copy.deepcopy(layer)
    tuned.weight *= 1.5
    with pytest.raises(ValueError, match="differ in weight; a prompt changes the bias alone"):
        unfold_prompt(layer, tuned, edge=edge)
    with pytest.raises(ValueError, match="a BatchNorm2d and a Identity differ in more"):
        unfold_prompt(layer, nn.Identity(), edge=edge)


def test_unfolding_refuses_a_shift_out_of_reach():
    layer = randomized(nn.BatchNorm2d(3), 0)
    layer.weight[1] = 0
    with pytest.raises(ValueError, match="1 channels are out of its reach"):
        unfold_prompt(layer, fold_prompt(layer, torch.ones(3)), edge="input")
    wide = randomized(nn.Linear(2, 5), 0)
    with pytest.raises(ValueError, match="out of its reach"):
        unfold_prompt(wide, fold_prompt(wide, drawn(5, seed=1)), edge="input")


# -------------------------------------------------------------------------------- layer norm and batch statistics


@given(width=st.integers(2, 9), seed=seeds)
def test_before_a_layer_norm_the_derivative_is_the_projected_one_and_the_constant_is_lost(width: int, seed: int):
    layer = randomized(nn.LayerNorm(width), seed)
    x, delta = drawn(5, width, seed=seed + 3), drawn(width, seed=seed + 4)
    assert difference(layer(x + 3.0), layer(x)) <= 1e-9  # a width of two may have a tiny variance
    centred = x - x.mean(-1, keepdim=True)
    s = (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    N, moved = centred / s, delta - delta.mean()
    formula = layer.weight / s * (moved - N * (N @ moved)[:, None] / width)
    _, derivative = jvp(layer, (x,), (delta.expand_as(x),))
    torch.testing.assert_close(derivative, formula, rtol=1e-9, atol=1e-9)


def test_before_a_layer_norm_a_prompt_is_no_shift_but_under_the_sufficient_condition_to_first_order():
    """Equal scales and a prompt orthogonal to every token: then, and only to first order, one shift for all tokens."""
    layer = randomized(nn.LayerNorm(8), 0)
    tokens = drawn(6, 8, seed=1)
    tokens[:, 6:] = 0
    tokens[:, :6] -= tokens[:, :6].mean(1, keepdim=True)
    tokens /= tokens.norm(dim=1, keepdim=True)
    delta = torch.zeros(8, dtype=torch.float64)
    delta[6], delta[7] = 1.0, -1.0

    def spread(size: float, x: Tensor) -> float:
        shift = layer(x + size * delta) - layer(x)
        return float((shift - shift.mean(0)).norm() / size)

    assert spread(1e-3, drawn(6, 8, seed=1)) > 0.1  # tokens of different scale: a different shift for each
    assert spread(1e-3, tokens) < 1e-2
    assert spread(1e-3, tokens) / spread(1e-4, tokens) == pytest.approx(10, rel=0.1)


def test_batch_statistics_remove_a_prompt_and_keep_it_in_the_running_mean():
    layer = randomized(nn.BatchNorm2d(4), 0).train()
    x, delta = drawn(5, 4, 3, 3, seed=1), drawn(4, 1, 1, seed=2).requires_grad_()
    plain, prompted = copy.deepcopy(layer), copy.deepcopy(layer)
    assert difference(prompted(x + delta.detach()), plain(x)) <= EXACT
    moved = prompted.running_mean - plain.running_mean
    torch.testing.assert_close(moved, layer.momentum * delta.detach().flatten(), rtol=1e-12, atol=1e-14)
    (gradient,) = torch.autograd.grad((layer(x + delta) * drawn(5, 4, 3, 3, seed=3)).sum(), delta)
    assert gradient.abs().max() < 1e-12
    at_output = fold_prompt(plain, delta)  # at the output the mode does not matter
    assert difference(at_output(x), copy.deepcopy(plain)(x) + delta.detach()) <= EXACT


# ---------------------------------------------------------------------------------------------- a backbone


def networks() -> list:
    folder = Path(os.environ.get("APTHORY_WEIGHTS", "."))
    file = folder / "mobilenetv2_100.imagenet1k_dequant_fp16.safetensors"
    absent = pytest.mark.skipif(not file.is_file(), reason="APTHORY_WEIGHTS does not hold the MobileNetV2")
    supplied = {"name": "mobilenetv2_100", "weights": file, "pad_type": "same", "input_size": 64}
    return [
        *(pytest.param(partial(tiny.backbone, family, torch.float64), id=family) for family in tiny.FAMILIES),
        *(pytest.param(partial(backbones.load, name), id=name) for name in backbones.SHIPPED),
        pytest.param(partial(backbones.load, **supplied), id="mobilenetv2 supplied", marks=absent),
    ]


@torch.no_grad()
@pytest.mark.parametrize("load", networks())
def test_every_norm_layer_of_real_backbones_folds_a_prompt_at_its_output(load):
    """And those of BatchNorm at its input; through all the rest of the backbone, in float64."""
    model = copy.deepcopy(load()).double()
    side = backbones.input_size(model)
    x = drawn(1, 3, side, side, seed=0)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, sites.NORMS)}
    used = set(sites.list_sites(model, "norm"))
    places = {(name, "output"): sites.affine_output(model, name) for name in layers}
    is_batch_norm = {name for name, layer in layers.items() if isinstance(layer, nn.modules.batchnorm._BatchNorm)}
    places |= {(name, "input"): f"{name}:input" for name in is_batch_norm}
    seen = sites.capture(model, list(places.values()), x)
    plain, num_seen = model(x), 0
    for name, layer in layers.items():
        axis = 1 if isinstance(layer, sites.CHANNELS_FIRST) else -1
        for edge in ("output", "input") if name in is_batch_norm else ("output",):
            spot = places[name, edge]
            z = seen[spot]
            delta = z.square().mean().sqrt() * drawn(z.shape[axis], seed=1)
            placed = on_channels(delta, z.ndim, axis)
            with sites.edited(model, {spot: lambda z, placed=placed: z + placed}):
                prompted = model(x)
            folded = fold_prompt(layer, delta, edge=edge)
            tuned = functional_call(model, {f"{name}.bias": folded.bias}, (x,))
            assert difference(tuned, prompted) <= EXACT, (name, edge)
            assert difference(plain, prompted) > 1e-6, (name, edge)
            num_seen += 1
    assert num_seen >= len(used) > 0


@pytest.mark.parametrize(
    ("family", "site", "statement", "target"),
    [
        ("vit", "blocks.1.norm1", "E3", "blocks.1.norm1.bias"),
        ("vit", "blocks.1:input", "E5", "blocks.0.mlp.fc2.bias"),
        ("vit", ":input", "E5", "patch_embed.proj.bias"),
        ("deit", "blocks.1.attn.proj", "E5", "blocks.1.attn.proj.bias"),
        ("swin", "layers.0.blocks.1:input", "E5", "layers.0.blocks.0.mlp.fc2.bias"),
        ("convnext", "stages.1.blocks.1:input", "E5", "stages.1.blocks.0.mlp.fc2.bias"),
        ("convnext", "stages.1.downsample.1:input", "E3", "stages.1.downsample.0.bias"),
        ("resnet", "layer2.0.bn2", "E1", "layer2.0.bn2.bias"),
        ("resnet", "layer2.0.bn2:input", "E2", "layer2.0.bn2.bias"),
        ("mobilenetv2", "blocks.1.0.bn1:input", "E2", "blocks.1.0.bn1.bias"),
        ("mobilenetv2", "blocks.1.0:output", "E1", "blocks.1.0.bn3.bias"),
    ],
)
def test_a_prompt_folds_into_a_backbone_and_its_diagnosis_says_where(family, site, statement, target):
    model = tiny.backbone(family, torch.float64)
    before = backbones.digest(model)
    x = tiny.images(family, 3, dtype=torch.float64)
    prompt = methods.ActivationPrompt.zeros(model, site, "channel").double()
    prompt.delta.data.normal_(generator=torch.Generator().manual_seed(0))
    folded = fold(model, prompt)
    assert type(folded) is type(model)
    assert backbones.digest(model) == before
    changed = [n for n, p in folded.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert changed == [target]
    assert difference(folded(x), methods.AdaptedBackbone(model, prompt)(x)) <= EXACT
    found = diagnose(model, site)
    assert (found.statement, found.kind, found.target) == (statement, "exact", target)
    assert found.relative_difference <= EXACT
    assert found.num_positions == 1 or found.is_larger


@pytest.mark.parametrize("name", backbones.SHIPPED)
def test_folding_in_single_precision_keeps_the_logits(name: str):
    model = backbones.load(name, device="cpu")
    prompt = methods.ActivationPrompt.zeros(model, sites.list_sites(model, "norm")[3], "channel")
    prompt.delta.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert difference(fold(model, prompt)(x), methods.AdaptedBackbone(model, prompt)(x)) < 1e-5


@pytest.mark.parametrize(
    ("family", "site", "shape"),
    [("vit", "blocks.1.norm1:input", "channel"), ("resnet", "layer2.0:input", "channel"), ("vit", "norm", "full")],
)
def test_a_prompt_that_is_no_bias_shift_is_not_folded(family, site, shape):
    model = tiny.backbone(family)
    prompt = methods.ActivationPrompt.zeros(model, site, shape)
    prompt.delta.data.normal_(generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"no bias near .* equals this prompt.*diagnose"):
        fold(model, prompt)


@pytest.mark.parametrize(
    ("family", "site", "kind", "statement", "dimension", "names"),
    [
        ("vit", "blocks.1.attn.qkv", "exact", "E5", 33, ("attention keys", "1 more that later linear maps remove")),
        ("vit", "blocks.1:input", "exact", "E5", 1, ("the same value in every channel",)),
        ("vit", "blocks.0:input", "not found", "", 1, ("the same value in every channel",)),
        ("vit", "blocks.1.norm1:input", "varying", "E4", 1, ("the same value in every channel",)),
        ("vit", "blocks.1.mlp.act", "exact", "E5", 97, ("97 more that later linear maps remove",)),
        ("swin", "layers.0.blocks.1.norm1", "exact", "E3", 0, ()),
        ("resnet", ":input", "border", "E5", 0, ()),
        ("resnet", "layer1.0.act1", "border", "E5", 0, ()),
        ("resnet", "layer2.0:input", "not found", "", 0, ()),
        ("resnet", "layer4.0:output", "absorbed", "E8", 0, ()),
        ("mobilenetv2", "conv_stem:input", "border", "E5", 0, ()),
    ],
)
def test_a_diagnosis_names_what_a_prompt_cannot_do(family, site, kind, statement, dimension, names):
    found = diagnose(tiny.backbone(family), site)
    assert (found.kind, found.statement) == (kind, statement)
    assert (found.null_dimension, found.null_directions) == (dimension, names)
    assert (found.relative_difference <= EXACT) == (kind == "exact")


def test_null_directions_end_where_the_theory_says():
    vit = tiny.backbone("vit")
    normalized = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=2, num_classes=0, qk_norm=True
    )
    for parameter in normalized.parameters():
        parameter.data.normal_(0.1, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    normalized.pretrained_cfg = vit.pretrained_cfg
    found = diagnose(backbones.freeze(normalized), "blocks.1.attn.qkv")
    assert "attention keys" not in found.null_directions  # keys are normalized: the shift does not cancel
    assert found.null_dimension < 32
    swin = diagnose(tiny.backbone("swin"), "layers.0.blocks.1:output")
    assert swin.null_directions == ("the same value in every channel",)  # patch merging normalizes four tokens as one


def test_after_the_last_attention_only_the_class_token_counts():
    vit = tiny.backbone("vit")
    assert diagnose(vit, "blocks.2.norm2:input").null_positions == 16
    assert diagnose(vit, "norm").null_positions == 16
    assert diagnose(vit, "blocks.2.norm1").null_positions == 0


def test_a_shift_of_the_features_is_absorbed_by_a_head_with_bias_whatever_folds():
    found = diagnose(tiny.backbone("vit"), "norm")
    assert found.kind == "exact"
    assert found.is_absorbed
    assert not diagnose(tiny.backbone("vit"), "blocks.1.norm1").is_absorbed
    pooled = diagnose(tiny.backbone("resnet"), "global_pool")
    assert pooled.is_absorbed
    assert not pooled.is_larger


def test_behind_a_linear_mean_pool_full_and_channel_prompts_are_one():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = backbones.freeze(nn.Sequential(layers, nn.Linear(5, 4)))
    found = diagnose(model, "0.1", images=torch.randn(4, 3, 8, 8))
    assert found.num_positions == 36
    assert not found.is_larger
    assert found.null_dimension == 1  # of five channels, the four classes see four
    with_relu = nn.Sequential(*layers[:2], nn.ReLU(), *layers[2:], model[1])
    assert diagnose(backbones.freeze(with_relu), "1", images=torch.randn(4, 3, 8, 8)).is_larger


def test_in_train_mode_batch_statistics_make_every_prompt_null():
    model = copy.deepcopy(tiny.backbone("resnet")).train()
    found = diagnose(model, "layer2.0.bn2:input")
    assert (found.statement, found.kind, found.null_dimension) == ("E2", "null", found.num_channels)
    at_output = diagnose(model, "layer2.0.bn2")
    assert (at_output.statement, at_output.kind, at_output.null_dimension) == ("E1", "exact", 0)
    assert not model.layer2[0].bn2.num_batches_tracked  # the reader's own model has seen nothing


@pytest.mark.parametrize("which", ["all", "one"])
def test_batch_statistics_of_any_layer_count_not_the_mode_of_the_backbone(which: str):
    model = copy.deepcopy(tiny.backbone("resnet"))
    (model if which == "all" else model.layer2[0].bn2).train()
    found = diagnose(model, "layer2.0.bn2:input")
    assert (found.statement, found.kind, found.null_dimension) == ("E2", "null", found.num_channels)
    prompt = methods.ActivationPrompt.zeros(tiny.backbone("resnet"), "layer2.0.bn2:input", "channel")
    prompt.delta.data.normal_(generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"uses batch statistics.*eval\(\)"):
        fold(model, prompt)
    full = methods.ActivationPrompt.zeros(tiny.backbone("resnet"), "layer2.0.bn2:input")
    full.delta.data.normal_(generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="with batch statistics only channel prompts are measured"):
        distance_to_tuning(model, full, "layer2.0.bn2", [1.0])
    vit = copy.deepcopy(tiny.backbone("vit")).train()  # no BatchNorm and no dropout: the mode changes nothing
    prompt = methods.ActivationPrompt.zeros(vit, "blocks.1.norm1", "channel")
    prompt.delta.data.normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.equal(fold(vit, prompt).blocks[1].norm1.bias, vit.blocks[1].norm1.bias)
    (measured,) = distance_to_tuning(vit, prompt, "blocks.1.norm1", [0.1], images=tiny.images("vit", 8))
    assert measured.tuning <= EXACT < measured.effect


@pytest.mark.parametrize("norm", [nn.RMSNorm, timm.layers.RmsNorm])
def test_a_backbone_with_rms_norms_is_diagnosed_and_folded(norm: type[nn.Module]):
    vit = tiny.backbone("vit")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.models.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=2, num_classes=0, norm_layer=norm
        )
    model.pretrained_cfg = vit.pretrained_cfg
    model = backbones.freeze(model)
    found = diagnose(model, "blocks.1.norm1")
    assert (found.statement, found.kind, found.target) == ("E5", "exact", "blocks.1.attn.qkv.bias")
    before = diagnose(model, "blocks.1.norm1:input")
    assert (before.statement, before.kind, before.null_dimension) == ("E4", "varying", 0)  # nothing is centred
    prompt = methods.ActivationPrompt.zeros(model, "blocks.1.norm2", "channel")
    prompt.delta.data.normal_(generator=torch.Generator().manual_seed(0))
    x = tiny.images("vit", 3)
    assert difference(fold(model, prompt)(x), methods.AdaptedBackbone(model, prompt)(x)) < 1e-5
    with pytest.raises(ValueError, match="without gamma and beta"):
        distance_to_tuning(model, prompt, "blocks.1.norm2", [0.1])


def test_a_batch_norm_without_affine_parameters_shifts_exactly_but_has_no_bias():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, affine=False), nn.ReLU(), nn.Conv2d(5, 4, 3)]
    model = backbones.freeze(nn.Sequential(*layers, nn.Flatten()))
    found = diagnose(model, "1:input", images=torch.randn(4, 3, 8, 8))
    assert (found.statement, found.kind, found.target) == ("E2", "no bias", "")
    assert found.sentence == "A channel prompt is a shift after 1, which has no bias to hold it."


@pytest.mark.parametrize("shape", [(1, 4, 4), (16, 4, 4), (1, 1, 1), (16, 1, 1)])
def test_only_a_prompt_that_is_the_same_at_every_position_folds(shape: tuple[int, int, int]):
    """The position-wise one has as many values as the site has channels."""
    model = tiny.backbone("resnet", torch.float64)
    assert sites.site_shape(model, "layer2.0.bn2") == (16, 4, 4)
    prompt = methods.ActivationPrompt("layer2.0.bn2:output", drawn(*shape, seed=0))
    if shape[1] == 1:
        x = tiny.images("resnet", 3, dtype=torch.float64)
        assert difference(fold(model, prompt)(x), methods.AdaptedBackbone(model, prompt)(x)) <= EXACT
    else:
        with pytest.raises(ValueError, match=r"no bias near .* equals this prompt"):
            fold(model, prompt)


def test_a_prompt_that_does_not_fit_its_site_is_refused():
    prompt = methods.ActivationPrompt("layer2.0.bn2:output", torch.ones(5, 1, 1))
    with pytest.raises(ValueError, match=r"shape \(5, 1, 1\) does not fit the activation \(16, 4, 4\)"):
        fold(tiny.backbone("resnet"), prompt)


def test_what_holds_for_a_small_prompt_is_tried_again_for_the_one_that_folds():
    torch.manual_seed(0)
    model = backbones.freeze(nn.Sequential(nn.Flatten(), nn.Hardtanh(-100.0, 100.0), nn.Linear(12, 4)))
    x = torch.randn(4, 3, 2, 2)
    prompt = methods.ActivationPrompt("0:output", torch.ones(12), "channel")
    assert difference(fold(model, prompt, images=x)(x), methods.AdaptedBackbone(model, prompt)(x)) < 1e-6
    prompt.delta.data *= 1e3  # cut off by the clamp
    with pytest.raises(ValueError, match=r"2\.bias leaves a relative difference"):
        fold(model, prompt, images=x)


def test_null_directions_are_those_that_linear_algebra_gives():
    model = tiny.backbone("vit", torch.float64)
    block, one = model.blocks[1], torch.ones(32, 1, dtype=torch.float64)

    def check(site: str, directions: Tensor) -> None:
        basis, _ = equivalence.networks.PromptedNetwork(model, site).null_space()
        wanted = torch.linalg.qr(directions).Q
        assert basis.shape == (wanted.shape[1], wanted.shape[0])
        torch.testing.assert_close(basis.T @ basis, wanted @ wanted.T, rtol=0, atol=1e-8)

    check("blocks.1:input", one)
    check("blocks.1.norm1:input", one)
    keys = torch.eye(96, dtype=torch.float64)[:, 32:64]
    values = torch.zeros(96, 1, dtype=torch.float64)
    values[64:] = torch.linalg.solve(block.attn.proj.weight, one)  # becomes the same value in every channel
    check("blocks.1.attn.qkv", torch.cat([keys, values], 1))
    into = torch.linalg.svd(block.mlp.fc2.weight - block.mlp.fc2.weight.mean(0)).Vh[31:].T
    check("blocks.1.mlp.act", into)


def test_a_random_backbone_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.Flatten())
    with pytest.raises(ValueError, match=r"the backbone is random.*eval\(\)"):
        diagnose(model, "2:input", images=torch.randn(4, 3, 8, 8))


# ------------------------------------------------------------------------------------------------- distances


def test_beyond_the_first_order_the_distance_falls_with_the_square():
    model = tiny.backbone("vit")
    prompt = methods.ActivationPrompt.zeros(model, "blocks.1.norm1:input", "channel")
    prompt.delta.data.normal_(generator=torch.Generator().manual_seed(0))
    far, near = distance_to_tuning(model, prompt, "blocks.1.norm1", [1e-2, 1e-3], images=tiny.images("vit", 8))
    assert far.first_order / near.first_order == pytest.approx(100, rel=0.1)
    assert far.tuning / near.tuning == pytest.approx(10, rel=0.1)  # no tuning, but nearer than none
    assert 1e-3 * far.effect < far.tuning < 0.9 * far.effect
    beta = distance_to_tuning(model, prompt, "blocks.1.norm1", [1e-2], images=tiny.images("vit", 8), parameters="beta")
    assert far.tuning < beta[0].tuning < far.effect


def test_a_channel_prompt_at_the_output_has_no_distance_and_a_full_one_has():
    model, x = tiny.backbone("resnet"), tiny.images("resnet", 8)
    for shape, is_exact in (("channel", True), ("full", False)):
        prompt = methods.ActivationPrompt.zeros(model, "layer2.0.bn1", shape)
        prompt.delta.data.normal_(generator=torch.Generator().manual_seed(0))
        (found,) = distance_to_tuning(model, prompt, "layer2.0.bn1", [0.1], images=x)
        assert found.effect > 1e-4
        assert found.first_order < 1e-13  # the layer's own result moves by the prompt itself
        assert (found.tuning < 1e-3 * found.effect) == is_exact


def test_the_nearest_tuning_is_no_further_than_one_found_by_descent():
    model, x = tiny.backbone("vit", torch.float64), tiny.images("vit", 8, dtype=torch.float64)
    prompt = methods.ActivationPrompt.zeros(model, "blocks.1.norm1:input", "channel").double()
    prompt.delta.data.normal_(generator=torch.Generator().manual_seed(0))
    (found,) = distance_to_tuning(model, prompt, "blocks.1.norm1", [0.1], images=x, parameters="beta")
    z = sites.capture(model, [prompt.site], x)[prompt.site]
    scaled = methods.ActivationPrompt(prompt.site, prompt.delta.data * 0.1 / prompt.relative_norm(z), "channel")
    wanted, bias = methods.AdaptedBackbone(model, scaled)(x).detach(), model.blocks[1].norm1.bias

    def loss(beta: Tensor, step: int) -> Tensor:
        return (functional_call(model, {"blocks.1.norm1.bias": bias + beta}, (x,)) - wanted).square().sum()

    losses, _ = equivalence.descend(loss, torch.zeros_like(bias), partial(torch.optim.Adam, lr=3e-3), 60)
    assert found.tuning <= float(losses.min().sqrt() / model(x).norm()) * 1.001


def test_the_nearest_tuning_keeps_its_share_of_a_small_prompt():
    """Where the derivative holds the distance is a fixed share of the effect, the one that least squares gives."""
    model, x = tiny.backbone("resnet"), tiny.images("resnet", 8)
    prompt = methods.ActivationPrompt.zeros(model, "layer2.0.bn1")
    prompt.delta.data.normal_(generator=torch.Generator().manual_seed(0))
    found = distance_to_tuning(model, prompt, "layer2.0.bn1", [1e-6, 1e-5, 1e-4], images=x)
    for each in found:
        assert each.is_converged
        assert each.tuning == pytest.approx(each.linear, rel=0.02)
        assert each.tuning / each.effect == pytest.approx(found[0].tuning / found[0].effect, rel=0.02)
    (stopped,) = distance_to_tuning(model, prompt, "layer2.0.bn1", [1.0], images=x, num_rounds=1)
    assert not stopped.is_converged
    assert stopped.tuning < stopped.effect


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norms": []}, "norms must be one or more positive numbers"),
        ({"norms": [0.1, 0.0]}, "norms must be one or more positive numbers"),
        ({"parameters": "gamma"}, "'gamma' is not 'beta' or 'both'"),
        ({"layer": "blocks.0.norm1"}, "'blocks.0.norm1' comes before the prompt at 'blocks.1.norm1:input'"),
        ({"size": 0.0}, "a prompt of zeros has no direction"),
    ],
)
def test_a_gap_without_a_question_is_refused(change: dict, message: str):
    model = tiny.backbone("vit")
    arguments = {"layer": "blocks.1.norm1", "norms": [0.1], "parameters": "both", "size": 1.0, **change}
    prompt = methods.ActivationPrompt.zeros(model, "blocks.1.norm1:input", "channel")
    prompt.delta.data[:] = arguments.pop("size")
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(distance_to_tuning)(model, prompt, **arguments)  # as without type checks


def test_a_gap_needs_enough_images_eval_mode_and_a_layer_to_tune():
    model = tiny.backbone("vit")
    prompt = methods.ActivationPrompt.zeros(model, "blocks.1.norm1:input", "channel")
    prompt.delta.data.normal_(generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="32 features of 1 images do not determine 64 values; pass at least 2"):
        distance_to_tuning(model, prompt, "blocks.1.norm1", [0.1], images=tiny.images("vit", 1))
    with pytest.raises(ValueError, match="is a GELU without gamma and beta"):
        distance_to_tuning(model, prompt, "blocks.1.mlp.act", [0.1])
    trained = copy.deepcopy(tiny.backbone("resnet")).train()
    prompt = methods.ActivationPrompt.zeros(trained, "layer2.0.bn1:input", "channel")
    prompt.delta.data.normal_(generator=torch.Generator().manual_seed(0))
    (found,) = distance_to_tuning(trained, prompt, "layer2.0.bn1", [1.0])
    assert max(found.effect, found.tuning, found.first_order) <= EXACT  # batch statistics: nothing to tune for
    prompt = methods.ActivationPrompt.zeros(trained, "layer2.0.bn1:input")
    prompt.delta.data.normal_(generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="with batch statistics only channel prompts are measured"):
        distance_to_tuning(trained, prompt, "layer2.0.bn1", [1.0])


# -------------------------------------------------------------------------------------------------- training

SGD = partial(torch.optim.SGD, lr=0.05)
MOMENTUM = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)


class Race:
    """The same loss as a function of a prompt, and of the bias of the norm layer beside it."""

    def __init__(self, model: nn.Module, site: str, layer: str, x: Tensor, num_classes: int = 5) -> None:
        self.model, self.site, self.layer, self.x = model, site, layer, x
        self.head = drawn(model(x).shape[1], num_classes, seed=1) / 5
        self.labels = torch.arange(len(x)) % num_classes
        self.unit = sites.site_shape(model, site, x)
        self.channel = methods.prompt_shape(model, site, "channel")

    def _loss(self, features: Tensor) -> Tensor:
        return nn.functional.cross_entropy(features @ self.head, self.labels)

    def prompted(self, delta: Tensor, step: int = 0) -> Tensor:
        with sites.edited(self.model, {self.site: lambda z: z + delta.view(-1, *delta.shape).expand_as(z)}):
            return self._loss(self.model(self.x))

    def tuned(self, beta: Tensor, step: int = 0) -> Tensor:
        name = f"{self.layer}.bias"
        bias = self.model.get_parameter(name)
        return self._loss(functional_call(self.model, {name: bias + beta.view_as(bias)}, (self.x,)))


def races() -> dict[str, Race]:
    vit, resnet = (copy.deepcopy(backbones.load(name, device="cpu")).double() for name in backbones.SHIPPED)
    x = drawn(6, 3, 64, 64, seed=0)
    return {
        "vit_micro": Race(vit, "blocks.6.norm2", "blocks.6.norm2", x),
        "resnet_micro": Race(resnet, "layer3.1.bn1", "layer3.1.bn1", x),
    }


def test_channels_that_no_image_switches_on_have_no_way(monkeypatch):
    model = copy.deepcopy(tiny.backbone("resnet"))
    norm = model.get_submodule("layer2.0.bn1")
    with torch.no_grad():
        norm.weight[0], norm.bias[0] = 0.0, -1.0  # the ReLU behind gives nothing, whatever the image
    monkeypatch.setattr(backbones, "load", lambda **_: model)
    found = equivalence_study.measure_trajectories({"name": "tiny"}, "textures", "layer2.0.bn1", 2, 2)["optimizers"]
    assert float(found["SGD"]["mean_way_ratio"]) == pytest.approx(1)
    assert float(found["SGD"]["mean_way_spread"]) < 1e-6


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=["sgd", "momentum", "adam"])
@pytest.mark.parametrize("name", backbones.SHIPPED)
def test_a_tied_prompt_and_beta_train_along_one_trajectory(name: str, optimizer):
    race = races()[name]
    start = torch.zeros(race.channel, dtype=torch.float64)
    by_prompt, prompt_path = equivalence.descend(race.prompted, start, optimizer, 8)
    by_bias, bias_path = equivalence.descend(race.tuned, start, optimizer, 8)
    assert by_prompt[-1] < 0.998 * by_prompt[0]
    assert difference(by_prompt, by_bias) <= EXACT
    assert difference(prompt_path, bias_path) <= 1e-11  # Adam divides by small gradients


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM], ids=["sgd", "momentum"])
def test_at_the_input_of_batch_norm_the_rate_is_its_scale_squared(optimizer):
    race = races()["resnet_micro"]
    race.site = "layer3.1.bn1:input"
    layer = race.model.get_submodule(race.layer)
    rate = equivalence.matched_rate(layer, 1.0, edge="input")
    torch.testing.assert_close(rate, layer.weight.square() / (layer.running_var + layer.eps), rtol=1e-12, atol=0)
    start = torch.zeros(race.channel, dtype=torch.float64)
    by_prompt, path = equivalence.descend(race.prompted, start, optimizer, 8)
    by_bias, bias_path = equivalence.descend(race.tuned, start, optimizer, 8, scale=rate.view(race.channel))
    assert difference(by_prompt, by_bias) <= EXACT
    shifts = torch.stack([bias_shift(layer, delta, edge="input") for delta in path])
    assert difference(bias_path.flatten(1), shifts) <= EXACT
    unmatched, _ = equivalence.descend(race.tuned, start, optimizer, 8)
    assert difference(by_prompt, unmatched) > 1e-4


@pytest.mark.parametrize("name", backbones.SHIPPED)
def test_the_mean_step_of_a_full_prompt_is_one_over_p_of_the_bias_step_under_sgd_never_under_adam(name: str):
    race = races()[name]
    layer = race.model.get_submodule(race.layer)
    axis = next(i - len(race.unit) for i, size in enumerate(race.channel) if size > 1)
    others = [i for i in range(-len(race.unit), 0) if i != axis]
    num_positions = torch.Size(race.unit).numel() // max(race.channel)
    start = torch.zeros(race.unit, dtype=torch.float64)
    zero = torch.zeros(race.channel, dtype=torch.float64)

    path = drawn(6, *race.channel, seed=3)  # where the gradients are taken, the same for both

    def along(loss, start: Tensor, optimizer) -> Tensor:
        return equivalence.descend(lambda p, k: loss(path[k] + (p - p.detach())), start, optimizer, len(path))[1]

    def mean(full: Tensor) -> Tensor:
        return full.mean(others, keepdim=True)

    for optimizer in (SGD, MOMENTUM):
        full, bias = along(race.prompted, start, optimizer), along(race.tuned, zero, optimizer)
        assert difference(mean(full) * num_positions, bias) <= EXACT
    assert difference(along(race.tuned, zero, partial(torch.optim.SGD, lr=0.02)), bias) > 0.1  # momentum is not SGD
    rate = equivalence.matched_rate(layer, 0.05, num_positions=num_positions)
    assert difference(rate, torch.full_like(rate, 0.05 / num_positions)) == 0
    full, bias = along(race.prompted, start, ADAM), along(race.tuned, zero, ADAM)
    assert difference(mean(full) * num_positions, bias) > 1
    assert difference(mean(full), bias) > 0.05


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.3), (0.9, 0.3)])
def test_behind_a_mean_pool_a_full_prompt_trains_as_a_bias_at_a_share_of_the_rate(momentum: float, decay: float):
    """Rate divided by P and weight decay times P; a linear suffix sees the mean of the prompt alone."""
    x, weight, num = drawn(4, 7, 3, seed=0), drawn(3, 2, seed=1), 7

    def loss(delta: Tensor, step: int) -> Tensor:
        return nn.functional.cross_entropy((x + delta).mean(1) @ weight, torch.tensor([0, 1, 0, 1]))

    def train(start: Tensor, rate: float, decay: float) -> tuple[Tensor, Tensor]:
        optimizer = partial(torch.optim.SGD, lr=rate, momentum=momentum, weight_decay=decay)
        return equivalence.descend(loss, start.double(), optimizer, 20)

    full, path = train(torch.zeros(num, 3), 0.7, decay)
    tied, tied_path = train(torch.zeros(3), 0.7 / num, decay * num)
    assert difference(full, tied) <= EXACT
    assert difference(path.mean(1), tied_path) <= EXACT
    if decay:
        assert difference(full, train(torch.zeros(3), 0.7 / num, decay)[0]) > 1e4 * EXACT


# ------------------------------------------------------------------------------------------------ inclusions


@given(num_positions=st.integers(2, 6), width=widths, seed=seeds)
def test_gamma_tuning_is_no_prompt_and_a_prompt_is_no_gamma_tuning(num_positions: int, width: int, seed: int):
    """Two inputs are the witness: gamma moves them differently, a prompt, full or not, moves both alike."""
    layer = randomized(nn.LayerNorm(width + 1), seed)
    tuned = copy.deepcopy(layer)
    tuned.weight *= 2
    first, second = drawn(2, num_positions, width + 1, seed=seed + 5)
    wanted = tuned(first) - layer(first)  # the only full prompt that does it for the first input
    assert difference(tuned(second) - layer(second), wanted) > 1e-6
    shifted = fold_prompt(layer, torch.ones(width + 1))
    ratio = (shifted(first) - layer.bias) / (layer(first) - layer.bias)  # gamma would have to grow by this
    assert float((ratio - ratio[:1]).abs().max()) > 1e-6


def test_a_full_prompt_is_no_bias_tuning_unless_there_is_one_position():
    layer, delta = randomized(nn.LayerNorm(4), 0), drawn(3, 4, seed=1)
    x = drawn(2, 3, 4, seed=2)
    moved = layer(x) + delta - layer(x)
    assert difference(moved, moved.mean(1, keepdim=True)) > 0.1  # no single shift
    one = x[:, :1]
    assert difference(fold_prompt(layer, delta[:1])(one), layer(one) + delta[:1]) <= EXACT


def test_a_site_whose_activation_is_zero_is_diagnosed_all_the_same():
    backbone = copy.deepcopy(tiny.backbone("resnet"))
    backbone.layer2[0].bn2.weight.zero_()
    backbone.layer2[0].bn2.bias.zero_()
    found = diagnose(backbone, "layer2.0.bn2:output")
    assert (found.statement, found.is_larger, found.is_absorbed) == ("E1", True, False)


def test_a_prompt_that_many_layers_read_is_no_shift_but_for_a_border():
    """Every layer of a dense block reads the block's input, so the bias of one of them is not all that it shifts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.models.DenseNet(growth_rate=4, block_config=(2, 2), num_classes=0)
    model.pretrained_cfg = {
        "architecture": "tiny_densenet",
        "input_size": (3, 32, 32),
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
    }
    found = diagnose(backbones.freeze(model), "features.denseblock2:input")
    assert found.relative_difference > 1e-3
    assert found.kind == "not found"
    assert "0 of" not in found.sentence
