"""Claims about methods and heads: what each edit computes, what it can reach, and that a stack keeps apart."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn
from torch.func import functional_call

from apthory import backbones, methods, sites
from apthory.heads import LinearHeads
from apthory.methods import METHODS, ActivationPrompting, FineTuning, FixedPrompt, LinearProbe, NormTuning

SITE = {"vit": "blocks.1:input", "resnet": "layer2.0:input", "swin": "layers.1.blocks.0:input"}


def start(method: methods.Method, family: str, num: int = 2) -> methods.PreparedBackbone:
    return method.build(tiny.backbone(family), num)


def features(body: methods.PreparedBackbone, x: torch.Tensor, num: int) -> torch.Tensor:
    """The same images for every configuration."""
    with torch.no_grad():
        stacked = body.suffix(*(torch.cat([z] * num) for z in body.prefix(x)))
    return stacked.unflatten(0, (num, -1))


def only(body: methods.PreparedBackbone) -> methods.Stack:
    (stack,) = body.stacks.values()
    return stack


def trained(body: methods.PreparedBackbone) -> list[nn.Parameter]:
    return [one.parameter for stack in body.stacks.values() for one in stack.trained()]


@torch.no_grad()
def disturb(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", SITE)
@pytest.mark.parametrize("name", ["ap", "channel", "norm", "linear", "full"])
def test_every_method_starts_at_the_backbone_itself(name: str, family: str):
    method = {
        "ap": ActivationPrompting(site=SITE[family]),
        "channel": ActivationPrompting(site=SITE[family], shape="channel"),
        "norm": NormTuning(site=SITE[family]),
        "linear": LinearProbe(),
        "full": FineTuning(),
    }[name]
    x = tiny.images(family, 3)
    got = features(start(method, family), x, 2)
    with torch.no_grad():
        expected = tiny.backbone(family)(x)
    for one in got:
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["full", "channel"])
@pytest.mark.parametrize("family", SITE)
def test_a_bundle_of_prompts_adds_to_each_configuration_its_own(family: str, shape: methods.Shape):
    backbone, x = tiny.backbone(family), tiny.images(family, 3)
    body = start(ActivationPrompting(site=SITE[family], shape=shape), family)
    shift = only(body).stacked
    disturb(shift)
    shift.unit[0], shift.unit[1] = 0.5, 2.0
    for one, values, unit in zip(features(body, x, 2), shift.values, (0.5, 2.0), strict=True):
        prompt = methods.ActivationPrompt(SITE[family], unit * values.detach(), shape)
        with torch.no_grad():
            expected = methods.AdaptedBackbone(backbone, prompt)(x)
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relative", [True, False])
def test_a_relative_prompt_is_measured_in_the_activations_it_sees(relative: bool):
    x = tiny.images("vit", 4)
    body = start(ActivationPrompting(site="blocks.1:input", in_rms_units=relative), "vit")
    with body.calibrating():
        features(body, x, 2)
    with torch.no_grad():
        z = sites.capture(tiny.backbone("vit"), ["blocks.1:input"], x)["blocks.1:input"]
    shift = only(body).stacked
    unit = z.square().mean().sqrt() if relative else torch.tensor(1.0)
    torch.testing.assert_close(shift.unit.flatten(), unit.expand(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shift.activation_norm, z.flatten(1).norm(dim=1).mean().expand(2), rtol=1e-5, atol=1e-6)
    before = shift.unit.clone()
    features(body, 3 * x, 2)  # calibration has ended
    assert torch.equal(shift.unit, before)


def test_calibration_ends_also_after_an_error():
    body = start(ActivationPrompting(site="blocks.1:input"), "vit")
    with pytest.raises(ZeroDivisionError), body.calibrating():
        _ = 1 / 0
    assert not only(body).is_calibrating


@pytest.mark.parametrize("parameters", ["gamma", "beta", "both"])
@pytest.mark.parametrize(("site", "layers"), [("next", "block"), (":input", "all")])
@pytest.mark.parametrize("family", [*SITE, "groupnorm"])
def test_norm_tuning_is_other_gammas_and_betas(family: str, site: str, layers: str, parameters: str):
    backbone, x = tiny.backbone(family), tiny.images(family, 3)
    site = SITE.get(family, SITE["resnet"]) if site == "next" else site
    body = start(NormTuning(site=site, layers=layers, parameters=parameters), family)
    for stack in body.stacks.values():
        disturb(stack)
    got = features(body, x, 2)
    own = dict(backbone.named_parameters())
    tuned = sites.norms_between(backbone, site, "next" if layers == "block" else "last")
    norms = [name for name, module in backbone.named_modules() if isinstance(module, sites.NORMS)]
    assert sorted(tuned) == sorted(norms) if layers == "all" else len(tuned) < len(norms)
    assert len(body.stacks) == len(tuned) > 0
    for k in range(2):
        weights = {}
        for layer, stack in zip(tuned, body.stacks.values(), strict=True):
            edit = stack.stacked
            gamma, beta = own[f"{layer}.weight"], own[f"{layer}.bias"]
            scale = 0 if edit.scale is None else edit.scale[k].flatten()
            shift = 0 if edit.shift is None else edit.shift[k].flatten()
            assert (edit.scale is None, edit.shift is None) == (parameters == "beta", parameters == "gamma")
            weights[f"{layer}.weight"] = gamma * (1 + scale)
            weights[f"{layer}.bias"] = (
                beta if parameters == "gamma" else beta * (1 + scale) + stack.template.unit * shift
            )
        with torch.no_grad():
            expected = functional_call(backbone, weights, (x,))
        torch.testing.assert_close(got[k], expected, rtol=1e-3, atol=1e-4)


def test_norm_tuning_also_acts_before_a_fused_activation():
    """MobileNetV2's norms end in ReLU6; gamma and beta act before it, not after."""
    backbone, x, site = tiny.backbone("mobilenetv2"), tiny.images("mobilenetv2", 2), "blocks.6.0:input"
    body = start(NormTuning(site=site), "mobilenetv2", 1)
    for stack in body.stacks.values():
        disturb(stack)
    own, weights = dict(backbone.named_parameters()), {}
    for layer, stack in zip(sites.norms_between(backbone, site), body.stacks.values(), strict=True):
        edit = stack.stacked
        weights[f"{layer}.weight"] = own[f"{layer}.weight"] * (1 + edit.scale[0].flatten())
        shift = stack.template.unit * edit.shift[0].flatten()
        weights[f"{layer}.bias"] = own[f"{layer}.bias"] * (1 + edit.scale[0].flatten()) + shift
    with torch.no_grad():
        expected = functional_call(backbone, weights, (x,))
    torch.testing.assert_close(features(body, x, 1)[0], expected, rtol=1e-3, atol=1e-4)


def test_norm_tuning_without_a_norm_layer_is_an_error():
    with pytest.raises(ValueError, match="no normalization layer between ':input' and the next block"):
        start(NormTuning(site=":input"), "vit")
    with pytest.raises(ValueError, match=r"between 'layer4\.0:output' and the output"):
        start(NormTuning(site="layer4.0:output", layers="all"), "resnet")


@pytest.mark.parametrize("fields", [{"parameters": "gammas"}, {"layers": "one"}])
def test_norm_tuning_of_something_else_is_an_error(fields: dict[str, str]):
    given = SimpleNamespace(**{"parameters": "both", "layers": "block", **fields})  # past the type checks of tests
    with pytest.raises(ValueError, match="expected gamma, beta or both, and block or all"):
        NormTuning.__post_init__(given)


def test_a_norm_without_gamma_and_beta_cannot_be_tuned():
    with pytest.raises(ValueError, match="has no gamma and beta to tune"):
        methods.Affine(nn.LayerNorm(4, elementwise_affine=False), (4,), "both")


@pytest.mark.parametrize(("family", "axes"), [("vit", (1,)), ("resnet", (2, 3)), ("swin", (1, 2))])
def test_a_site_probe_reads_the_activation_averaged_over_positions(family: str, axes: tuple[int, ...]):
    x = tiny.images(family, 3)
    body = start(LinearProbe(site=SITE[family]), family)
    with torch.no_grad():
        z = sites.capture(tiny.backbone(family), [SITE[family]], x)[SITE[family]]
    torch.testing.assert_close(features(body, x, 1)[0], z.mean(axes), rtol=1e-5, atol=1e-5)
    assert not trained(body)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_site_probe_can_be_had_at_every_block_site(family: str):
    backbone = tiny.backbone(family)
    for site in sites.list_sites(backbone):
        width = features(start(LinearProbe(site=site), family, 1), tiny.images(family, 2), 1).shape[-1]
        assert width == sites.site_shape(backbone, site)[sites.channel_axis(backbone, site)]


@pytest.mark.parametrize("name", ["resnet_micro", pytest.param("vit_micro", marks=pytest.mark.slow)])
def test_every_method_can_be_had_at_every_block_site_of_a_shipped_backbone(name: str):
    backbone = backbones.load(name, device="cpu")
    for site in sites.list_sites(backbone):
        candidates = [
            ActivationPrompting(site=site),
            ActivationPrompting(site=site, shape="channel"),
            LinearProbe(site=site),
        ]
        candidates += [NormTuning(site=site)] if sites.norms_between(backbone, site) else []
        for method in candidates:
            body = method.build(backbone, 1)
            with torch.no_grad():
                assert body.suffix(*body.prefix(torch.zeros(1, 3, 64, 64))).ndim == 2


@pytest.mark.parametrize("shape", ["full", "channel"])
@pytest.mark.parametrize("family", SITE)
def test_a_fixed_prompt_has_the_norm_asked_for_and_a_direction_of_its_seed(family: str, shape: methods.Shape):
    backbone, x = tiny.backbone(family), tiny.images(family, 2)
    seen = {}
    for seed in (0, 1):
        body = start(FixedPrompt(site=SITE[family], norm=7.0, seed=seed, shape=shape), family)
        (prompt,) = (m for m in body.prefix.modules() if isinstance(m, methods.ActivationPrompt))
        spread = prompt.delta.expand(sites.site_shape(backbone, SITE[family]))
        assert float(spread.norm()) == pytest.approx(7.0, rel=1e-5)
        assert not any(p.requires_grad for p in body.prefix.parameters())
        assert not trained(body)
        with torch.no_grad():
            expected = methods.AdaptedBackbone(backbone, prompt)(x)
        assert torch.equal(features(body, x, 1)[0], expected)
        seen[seed] = prompt.delta
    cosine = torch.cosine_similarity(seen[0].flatten(), seen[1].flatten(), dim=0)
    assert abs(cosine) < 5 / seen[0].numel() ** 0.5
    again = start(FixedPrompt(site=SITE[family], norm=7.0, seed=1, shape=shape), family)
    (prompt,) = (m for m in again.prefix.modules() if isinstance(m, methods.ActivationPrompt))
    assert torch.equal(prompt.delta, seen[1])


def test_full_fine_tuning_has_a_copy_of_the_backbone_for_each_configuration():
    backbone = tiny.backbone("resnet")
    body = start(FineTuning(), "resnet", 3)
    own = {p.data_ptr() for p in backbone.parameters()}
    copies = [{p.data_ptr() for p in copy.parameters()} for copy in only(body).networks]
    assert len(copies) == 3
    assert len(own.union(*copies)) == 4 * len(own)
    assert all(p.requires_grad for p in trained(body))
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(m.training for m in only(body).modules() if isinstance(m, nn.BatchNorm2d))


def test_names_of_methods_are_unique():
    assert list(METHODS) == ["ap", "norm", "linear_probe", "random_prompt", "fine_tuning", "vp", "evp", "adavipro"]
    assert all(METHODS[name].name == name for name in METHODS)


# ---------------------------------------------------------------------------------------------- heads


def heads(num: int = 3, width: int = 5, num_classes: int = 4, seed: int = 0) -> LinearHeads:
    generators = [torch.Generator().manual_seed(seed + k) for k in range(num)]
    return LinearHeads(num, width, num_classes, generators)


def test_each_head_sees_its_own_features_in_units_of_their_root_mean_square():
    stack = heads()
    disturb(stack)
    stack.unit.copy_(torch.tensor([0.5, 1.0, 3.0]).view(3, 1, 1))
    z = torch.randn(3, 7, 5)
    logits = stack(z.flatten(0, 1))
    for k in range(3):
        expected = z[k] / stack.unit[k] @ stack.weight[k] + stack.bias[k]
        torch.testing.assert_close(logits[k], expected, rtol=1e-5, atol=1e-5)


def test_an_exported_head_is_a_linear_layer_on_the_features_themselves():
    stack = heads()
    disturb(stack)
    stack.unit.copy_(torch.tensor([0.5, 1.0, 3.0]).view(3, 1, 1))
    z = torch.randn(3, 7, 5)
    for k in range(3):
        head = stack.export(k)
        assert (head.in_features, head.out_features) == (5, 4)
        assert not any(p.requires_grad for p in head.parameters())
        torch.testing.assert_close(head(z[k]), stack(z.flatten(0, 1))[k], rtol=1e-5, atol=1e-5)


def test_initial_heads_depend_on_their_own_generator_alone():
    three, one = heads(3, seed=4), heads(1, seed=6)
    assert torch.equal(three.weight[2], one.weight[0])
    assert not torch.equal(three.weight[0], three.weight[1])
    assert three.weight.abs().max() < 0.1
    assert (three.bias == 0).all()


def test_half_precision_features_are_widened():
    assert heads()(torch.randn(6, 5, dtype=torch.bfloat16)).dtype == torch.float32
