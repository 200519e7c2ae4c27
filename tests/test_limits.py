"""Claims about prompts at the input: what they reach, what a frame is, what a step costs, how universal they stay."""

import itertools
import math
from functools import partial

import pytest
import timm
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import flop_counter

from apthory import backbones, costs, equivalence, methods, metrics, sites
from apthory.methods import ActivationPrompt, AdaptedBackbone
from apthory.studies import costs as cost_study
from apthory.studies import input_limits

DOUBLE = torch.float64
RECIPE = {"num_epochs": 1, "num_train": 48, "num_validation": 32, "num_test": 64}


def vit(image=(16, 16), patch=(4, 4), dim=16, depth=1, dtype=DOUBLE, **kwargs) -> nn.Module:
    """A small ViT whose position embeddings and biases are not zero."""
    shape = {"img_size": image, "patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": 2}
    model = timm.models.VisionTransformer(num_classes=0, **shape, **kwargs)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.pretrained_cfg = model.default_cfg = {"architecture": "small_vit", "input_size": (3, *image)}
    return backbones.freeze(model.to(dtype))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# ---------------------------------------------------------------------------------------------- V1: reach


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "deit", "vit_micro"])
def test_an_input_prompt_is_its_shift_at_the_first_block_through_to_the_features(family):
    model = backbones.load(family, device="cpu").double() if family == "vit_micro" else tiny.backbone(family, DOUBLE)
    found, x = equivalence.input_span(model), normal(3, *sites.site_shape(model, ":input"), seed=1)
    prompt = normal(*x.shape[1:])
    at_input = AdaptedBackbone(model, ActivationPrompt(":input", prompt))
    at_tokens = AdaptedBackbone(model, ActivationPrompt(found.site, found.shift(prompt)))
    assert found.site == "blocks.0:input"
    assert found.num_extra_tokens == (2 if family == "deit" else 1)
    assert relative(at_tokens(x), at_input(x)) <= 1e-12
    assert relative(at_tokens(x), model(x)) > 1e-3
    assert found.residual(found.shift(prompt)) <= 1e-12


@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    patch=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dim=st.sampled_from([4, 16, 64]),
    class_token=st.booleans(),
    registers=st.integers(0, 2),
)
@settings(max_examples=12)
def test_reachable_prompts_are_those_of_images(grid, patch, dim, class_token, registers):
    image = (grid[0] * patch[0], grid[1] * patch[1])
    pool = "token" if class_token else "avg"
    model = vit(image, patch, dim, class_token=class_token, reg_tokens=registers, global_pool=pool)
    found = equivalence.input_span(model)
    assert (found.grid, found.patch) == (grid, patch)
    assert found.num_extra_tokens == class_token + registers
    assert found.rank == min(dim, 3 * math.prod(patch))
    x, delta, prompt = normal(2, 3, *image, seed=1), normal(3, *image, seed=2), normal(*found.offset.shape, seed=3)
    prefix, _ = sites.split(model, found.site)
    assert relative(found.tokens(x), prefix(x)[0]) <= 1e-12
    assert relative(prefix(x + delta)[0], prefix(x)[0] + found.shift(delta)) <= 1e-12
    inside = found.project(prompt)
    torch.testing.assert_close(found.project(inside), inside, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.shift(found.as_image(prompt)), inside, rtol=1e-10, atol=1e-10)
    assert found.as_image(found.shift(delta)).norm() <= delta.norm() * (1 + 1e-10)
    share = found.residual(prompt)
    assert share**2 + float(inside.norm() / prompt.norm()) ** 2 == pytest.approx(1, abs=1e-12)
    is_everything = found.rank == dim and not found.num_extra_tokens
    assert (share < 1e-12) == is_everything


@pytest.mark.parametrize(
    ("name", "rank", "dim"),
    [("vit_base_patch16_224", 768, 768), ("vit_large_patch16_224", 768, 1024), ("deit_small_patch16_224", 384, 384)],
)
def test_rank_of_real_patch_embeddings_is_the_smaller_of_channels_and_pixels(name, rank, dim):
    found = input_limits.measure_rank({"name": name, "pretrained": False, "depth": 1, "device": "cpu"})
    assert (found["rank"], found["dim"], found["pixels"]) == (rank, dim, 768)
    assert found["smallest"] > 10 * found["tolerance"]
    assert (found["tokens"], found["extra_tokens"]) == (197, 1)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("rank", [1, 5, 15])
def test_rank_is_that_of_the_weights_and_not_of_their_rounding(rank, dtype):
    model = vit()
    low = normal(16, rank) @ normal(rank, 48, seed=1)
    model.patch_embed.proj.weight.data = low.view(16, 3, 4, 4)
    found = equivalence.input_span(model.to(dtype))
    assert found.rank == rank
    assert found.singular_values[rank:].max() <= found.tolerance
    assert found.residual(normal(1, rank) @ normal(rank, 16)) > 0.1


def test_class_token_is_out_of_reach():
    found = equivalence.input_span(tiny.backbone("vit", DOUBLE))
    prompt = torch.zeros_like(found.offset)
    prompt[0] = 1.0
    assert found.residual(prompt) == 1.0
    assert not found.project(prompt).any()
    assert found.residual(torch.ones(1, 32)) == pytest.approx(math.sqrt(1 / 17))  # a channel prompt reaches it too


def test_random_prompts_residual_follows_from_the_rank():
    found = equivalence.input_span(vit(dim=64))  # 48 of 64 dimensions, 16 of 17 tokens
    squares = torch.tensor([found.residual(normal(17, 64, seed=seed)) ** 2 for seed in range(400)])
    assert abs(squares.mean() - (1 - 48 / 64 * 16 / 17)) < 4 * squares.std() / 20


def test_a_clamped_prompt_is_no_fixed_shift():
    model = tiny.backbone("vit", DOUBLE)
    prefix, _ = sites.split(model, "blocks.0:input")
    x, y = (0.5 * normal(1, 3, 32, 32, seed=seed) for seed in (1, 2))
    prompt = normal(3, 32, 32)
    free, clamped = ([prefix(f(z + prompt))[0] - prefix(z)[0] for z in (x, y)] for f in (lambda z: z, torch.tanh))
    assert relative(*free) <= 1e-12
    assert relative(*clamped) > 0.1


class Squared(nn.Module):
    """What torch.fx sees as a function, not as a layer."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.img_size = embed.img_size

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) ** 2


def changed(**layers: nn.Module) -> nn.Module:
    model = vit()
    for name, layer in layers.items():
        model.set_submodule(name.replace("__", "."), layer.double())
    return model


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.GELU(), nn.Conv2d(8, 16, 2, 2))


ELSEWHERE = {
    r"'patch_embed.norm' follows, so the shift depends on the image": partial(tiny.backbone, "swin"),
    r"'stem.1' follows, so the shift depends on the image": partial(tiny.backbone, "convnext"),
    r"'norm_pre' follows, so the shift depends on the image": partial(vit, pre_norm=True),
    r"the patches of 'conv1' overlap or leave gaps \(kernel \(7, 7\)": partial(tiny.backbone, "resnet"),
    r"the patches of 'conv_stem' overlap or leave gaps": partial(tiny.backbone, "mobilenetv2"),
    r"overlap or leave gaps .*padding \(1, 1\)": lambda: changed(patch_embed__proj=nn.Conv2d(3, 16, 4, 4, 1)),
    r"'patch_embed.proj.1' \(GELU\) follows: .* begins a stem": lambda: changed(patch_embed__proj=stem()),
    r"not begin with a dense convolution": lambda: changed(patch_embed__proj=nn.Conv2d(3, 15, 4, 4, groups=3)),
    r"differ from an affine map of the patches by": lambda: changed(patch_embed=Squared(vit().patch_embed)),
    r"torch.fx cannot trace it": Branching,
    r"\(3, 18, 18\) is not made of whole patches \(4, 4\)": partial(vit, image=(18, 18)),
}  # fmt: skip


@pytest.mark.parametrize("reason", ELSEWHERE)
def test_where_an_input_prompt_is_no_token_prompt_the_reason_is_named(reason):
    with pytest.raises(ValueError, match=rf"is no fixed prompt on tokens: .*{reason}.* kernel = stride"):
        equivalence.input_span(ELSEWHERE[reason]())


@torch.no_grad()
@pytest.mark.parametrize("family", ["swin", "convnext", "resnet", "mobilenetv2"])
def test_there_the_shift_depends_on_the_image_indeed(family):
    model, x = tiny.backbone(family, DOUBLE), tiny.images(family, 2, dtype=DOUBLE)
    prefix, _ = sites.split(model, sites.list_sites(model)[1])
    first, second = prefix(x + normal(*x.shape[1:]))[0] - prefix(x)[0]
    assert relative(first, second) > 0.1


def test_a_prompt_of_norm_zero_has_no_residual():
    with pytest.raises(ValueError, match="norm zero has no share outside the span"):
        equivalence.input_span(tiny.backbone("vit")).residual(torch.zeros(17, 32))


# ---------------------------------------------------------------------------------------------- V2: frames


@given(patch=st.integers(1, 9), num=st.integers(1, 8), data=st.data())
def test_frame_tokens_are_counted_as_they_are_painted(patch, num, data):
    size = patch * num
    width = data.draw(st.integers(0, size // 2))
    is_frame = torch.ones(size, size)
    is_frame[width : size - width, width : size - width] = 0
    share = nn.functional.avg_pool2d(is_frame[None], patch)
    painted = (int((share == 1).sum()), int(((share > 0) & (share < 1)).sum()), int((share == 0).sum()))
    assert equivalence.frame_tokens(size, width, patch) == painted


def test_evps_default_frame_has_no_pure_prompt_token():
    assert equivalence.frame_tokens(224, 30, 32) == (0, 24, 25)
    assert equivalence.frame_tokens(224, 32, 32) == (24, 0, 25)
    assert equivalence.frame_tokens(224, 30, 16) == (52, 44, 100)


@torch.no_grad()
@given(
    patch=st.integers(1, 4),
    num=st.integers(2, 5),
    data=st.data(),
    pool=st.sampled_from(["token", "avg"]),
    registers=st.integers(0, 2),
)
@settings(max_examples=12)
def test_a_frame_of_whole_patches_is_prompt_tokens(patch, num, data, pool, registers):
    ring = data.draw(st.integers(1, num // 2))
    assume(2 * ring < num)
    size, width = patch * num, patch * ring
    model = vit((size, size), (patch, patch), depth=2, global_pool=pool, reg_tokens=registers)
    found, frame = equivalence.input_span(model), normal(3, size, size)
    x = normal(3, 3, size - 2 * width, size - 2 * width, seed=1)
    own, prompts = equivalence.as_tokens(found, x, frame)
    assert len(prompts) == equivalence.frame_tokens(size, width, patch).prompt
    _, blocks = sites.split(model, found.site)
    features = blocks(torch.cat([own, prompts.expand(3, -1, -1)], dim=1))
    assert relative(features, model(equivalence.framed(x, frame))) <= 1e-12
    # An order of tokens is not seen, a place among the positions is: these are pos_t + b + W(pixels).
    backwards = blocks(torch.cat([own, prompts.flip(0).expand(3, -1, -1)], dim=1))
    assert relative(backwards, features) <= 1e-12
    other, same = equivalence.as_tokens(found, 2 * x, frame)
    assert torch.equal(same, prompts)
    assert relative(other, own) > 1e-2


def test_prompt_tokens_lie_in_an_affine_set_of_the_embeddings_rank():
    found = equivalence.input_span(vit(dim=64))
    tokens = torch.cat(
        [equivalence.as_tokens(found, normal(1, 3, 8, 8), normal(3, 16, 16, seed=s))[1] for s in range(9)]
    )
    content = tokens.view(9, 12, 64)[1:] - tokens.view(9, 12, 64)[:-1]  # pos_t + b cancels
    assert torch.linalg.matrix_rank(content.flatten(0, 1)) == found.rank == 48
    free = normal(96, 64)  # VPT-shallow's own tokens fill all dimensions
    assert torch.linalg.matrix_rank(free) == 64


@torch.no_grad()
def test_features_differ_where_the_conditions_of_a_frame_fail():
    model = vit(depth=2, global_pool="avg")
    found, frame, x = equivalence.input_span(model), normal(3, 16, 16), normal(2, 3, 8, 8, seed=1)
    own, prompts = equivalence.as_tokens(found, x, frame)
    whole = torch.cat([own, prompts.expand(2, -1, -1)], dim=1)
    _, norm = sites.split(model, "norm:input")
    body = nn.Sequential(*model.blocks)
    assert relative(norm(body(whole)), model(equivalence.framed(x, frame))) <= 1e-12
    without = norm(body(whole)[:, : own.shape[1]])  # a pool of the image's tokens alone
    assert relative(without, model(equivalence.framed(x, frame))) > 1e-2
    measured = input_limits.measure_frame({"name": "vit_micro", "device": "cpu"}, 16, num_images=2)
    assert measured["difference"] <= 1e-12
    assert measured["elsewhere"] > 1e-2  # the image's tokens have lost the positions of the middle
    assert measured["tokens"] == {"prompt": 48, "mixed": 0, "image": 16}


@torch.no_grad()
def test_mixed_tokens_depend_on_frame_and_image():
    found, frame, x = equivalence.input_span(vit()), normal(3, 16, 16), normal(1, 3, 10, 10, seed=1)
    with pytest.raises(ValueError, match=r"frame of 3 pixels .* patches of 4: 12 tokens would mix .* width of 0 or 4"):
        equivalence.as_tokens(found, x, frame)
    assert equivalence.frame_tokens(16, 3, 4) == (0, 12, 4)
    base = found.tokens(equivalence.framed(x, frame))
    by_frame = (found.tokens(equivalence.framed(x, 2 * frame)) != base).any(-1)
    by_image = (found.tokens(equivalence.framed(2 * x, frame)) != base).any(-1)
    assert int((by_frame & by_image).sum()) == 12
    assert int((by_image & ~by_frame).sum()) == 4


def test_frames_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="image of 30 pixels with a frame of 4 and patches of 8: the size must be"):
        equivalence.frame_tokens(30, 4, 8)
    with pytest.raises(ValueError, match="frame at most half"):
        equivalence.frame_tokens(32, 17, 8)
    with pytest.raises(ValueError, match="images of 9 pixels do not lie in the middle of a frame of 16"):
        equivalence.framed(normal(1, 3, 9, 9), normal(3, 16, 16))
    with pytest.raises(ValueError, match=r"frame of 32 pixels does not fit patches of \(4, 4\) on a grid \(4, 4\)"):
        equivalence.as_tokens(equivalence.input_span(vit()), normal(1, 3, 16, 16), normal(3, 32, 32))


# ---------------------------------------------------------------------------------------------- V3: cost


def steps_at_every_site(model: nn.Module, x: Tensor):
    """For each block site the FLOPs of steps as they run, and what the formula takes."""
    labels, count = torch.zeros(1, len(x), dtype=torch.long), costs.count_flops
    prompts = {site: methods.ActivationPrompting(site=site) for site in sites.list_sites(model)}
    steps = {site: cost_study._Step(model, one, x, labels, 7, "float32") for site, one in prompts.items()}
    image = steps[":input"]
    whole = {"forward": count(image.suffix), "attention": costs.attention_flops(image.suffix)}
    visual = count(image.whole)
    for site, step in steps.items():
        found = costs.StepFlops(visual, count(step.whole), count(step.cached))
        late = {"suffix": count(step.suffix), "suffix_attention": costs.attention_flops(step.suffix)}
        yield site, found, {**whole, **late, "head": 2 * len(x) * step.heads.weight.shape[1] * 7}


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *backbones.SHIPPED])
def test_counted_flops_of_a_step_are_the_formulas_at_every_block_site(family):
    if family in backbones.SHIPPED:
        model, x = backbones.load(family, device="cpu"), torch.zeros(1, 3, 64, 64)
    else:
        model, x = tiny.backbone(family), tiny.images(family, 2)
    for site, found, parts in steps_at_every_site(model, x):
        assert found == costs.step_flops(**parts), site
        has_attention = family.startswith(("vit", "deit", "swin")) and not site.endswith(":output")
        assert (parts["suffix_attention"] > 0) == has_attention


def test_a_fused_kernel_computes_the_scores_once_more():
    if torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_counter.flop_registry:
        pytest.skip("this torch does not count the CPU's fused attention")
    model = tiny.backbone.__wrapped__("vit")
    for block in model.blocks:
        block.attn.fused_attn = True
    for _, found, parts in steps_at_every_site(model, tiny.images("vit", 2)):
        assert found == costs.step_flops(**parts, fused=True)
        assert (found.visual - costs.step_flops(**parts).visual) * 2 == parts["attention"] > 0


def test_steps_cost_less_the_later_the_prompt():
    parts = {"forward": 100, "attention": 20, "head": 1}
    late, early = (costs.step_flops(**parts, suffix=s, suffix_attention=a) for s, a in ((40, 8), (100, 20)))
    assert early == (223, 223, 223)  # 2 F + A + 3 head, and nothing to cache at the input
    assert late == (223, 151, 91)


# ---------------------------------------------------------------------------------------------- V4: universality


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_arrivals_are_derivatives_at_all_block_sites(family):
    model, x = tiny.backbone(family, DOUBLE), tiny.images(family, 3, dtype=DOUBLE)
    direction, places, step = normal(*x.shape[1:]), sites.list_sites(model), 1e-6
    moved = metrics.arrivals(model, x, direction)
    assert list(moved) == places
    ahead, behind = (sites.capture(model, places, x + sign * step * direction) for sign in (1, -1))
    for site in places:
        assert relative(moved[site], (ahead[site] - behind[site]) / (2 * step)) < 1e-6, site
    assert torch.equal(moved[":input"], direction.expand_as(x))
    assert metrics.universality(moved[":input"]) == pytest.approx(1, abs=1e-12)
    assert metrics.universality(moved[places[-1]]) < 1 - 1e-5
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_arrivals_start_at_any_site_and_stop_where_nothing_arrives():
    model, x = tiny.backbone("vit", DOUBLE), tiny.images("vit", 3, dtype=DOUBLE)
    moved = metrics.arrivals(model, x, normal(17, 32), "blocks.1:input")
    assert list(moved) == ["blocks.1:input", "blocks.2:input", "blocks.2:output"]
    inner = metrics.arrivals(model, x, normal(17, 32), "blocks.1.norm1", ["blocks.1.attn:input", "blocks.1.mlp"])
    assert torch.equal(inner["blocks.1.attn:input"][0], normal(17, 32))
    with pytest.raises(ValueError, match=r"prompt at 'blocks.1:input' arrives at 'blocks.0:input'; choose a site"):
        metrics.arrivals(model, x, normal(17, 32), "blocks.1:input", ["blocks.0:input"])


def test_to_the_first_block_of_a_vit_a_prompt_stays_universal_as_reach_says():
    model, x = tiny.backbone("vit", DOUBLE), tiny.images("vit", 3, dtype=DOUBLE)
    direction = normal(3, 32, 32)
    moved = metrics.arrivals(model, x, direction)["blocks.0:input"]
    assert relative(moved, equivalence.input_span(model).shift(direction).expand_as(moved)) <= 1e-12
    assert metrics.universality(moved) == pytest.approx(1, abs=1e-12)


def test_prompts_stay_universal_in_linear_networks():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 5)
    )
    model = backbones.freeze(model.double())
    moved = metrics.arrivals(model, normal(6, 3, 8, 8), normal(3, 8, 8, seed=1), targets=["0", "1", "2", "4"])
    assert [metrics.universality(z) for z in moved.values()] == pytest.approx([1] * 4, abs=1e-12)


def test_a_rectifier_that_lets_k_of_n_images_pass_keeps_the_share_of_pairs_that_do():
    """g_i is d or 0, so u estimates P(pass) and is (k - 1) / (n - 1) exactly."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1)).double().requires_grad_(False)
    for num in (2, 5, 9):
        for passing in range(1, num + 1):
            signs = torch.tensor([1.0] * passing + [-1.0] * (num - passing), dtype=DOUBLE).view(num, 1, 1, 1)
            moved = metrics.arrivals(
                model, signs * model[0].weight.sign(), torch.ones(1, 1, 1, dtype=DOUBLE), targets=["1"]
            )
            assert metrics.universality(moved["1"]) == pytest.approx((passing - 1) / (num - 1), abs=1e-12)


@given(seed=st.integers(0, 99), num=st.integers(2, 7), dim=st.integers(1, 5))
def test_the_numerator_is_unbiased(seed, num, dim):
    """Over all samples of a finite population its mean is the population's mean product of pairs."""
    population = normal(7, dim, seed=seed) + 0.5

    def numerator(g: Tensor) -> float:
        return metrics.universality(g) * float(g.square().sum(1).mean())

    samples = [numerator(population[list(rows)]) for rows in itertools.combinations(range(7), num)]
    products = [float(a @ b) for a, b in itertools.permutations(population, 2)]
    assert sum(samples) / len(samples) == pytest.approx(sum(products) / len(products), rel=1e-9, abs=1e-12)


def test_universality_of_extremes():
    same, apart = normal(1, 4).expand(5, 4), torch.eye(5, dtype=DOUBLE)
    assert metrics.universality(same) == pytest.approx(1, abs=1e-12)
    assert metrics.universality(apart) == pytest.approx(0, abs=1e-12)
    assert metrics.universality(torch.tensor([[1.0], [-1.0]])) == -1  # the least that two images can give
    assert metrics.universality(3 * apart + 1) == pytest.approx(metrics.universality(-6 * apart - 2))  # of no scale
    with pytest.raises(ValueError, match="give at least two"):
        metrics.universality(torch.ones(1, 4))
    with pytest.raises(ValueError, match="nothing arrives, so nothing can be universal"):
        metrics.universality(torch.zeros(3, 4))


# ---------------------------------------------------------------------------------------------- measurements


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_a_shuffled_twin_has_the_same_weights_in_no_order(family):
    model, x = tiny.backbone(family), tiny.images(family, 8)
    before = backbones.digest(model)
    twin = input_limits.shuffled(model, x)
    assert backbones.digest(model) == before
    assert not twin.training
    for (name, own), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(own.flatten().sort().values, other.flatten().sort().values), name
        assert torch.equal(own, other) == (own.ndim == 1 or own.numel() < 2), name
    assert relative(twin(x), model(x)) > 1e-2
    assert not torch.equal(twin(x), input_limits.shuffled(model, x, seed=1)(x))
    if family == "resnet":  # statistics are those of the shuffled network
        z = sites.capture(twin, ["layer1.0.bn1:input"], x)["layer1.0.bn1:input"]
        torch.testing.assert_close(twin.layer1[0].bn1.running_mean, z.mean((0, 2, 3)), rtol=1e-2, atol=1e-2)


def test_measured_residuals_are_those_of_the_prompts():
    values = input_limits.measure_residuals({"name": "vit_micro", "device": "cpu"}, "textures", RECIPE, 4e-3)
    assert set(values) == {"full", "channel"}
    assert values["channel"]["residual"] == pytest.approx(math.sqrt(1 / 65))  # W of full rank: the class token's share
    assert values["full"]["random_residual"] == pytest.approx(math.sqrt(1 / 65), rel=0.2)
    assert 0 < values["full"]["residual"] < 1
    assert values["full"]["relative_image_norm"] > 0


def test_measured_universality_has_a_value_for_every_site_network_prompt_and_group():
    config = {"backbone": {"name": "resnet_micro", "device": "cpu"}, "task": "textures", "recipe": RECIPE}
    measured = input_limits.measure_universality(**config, learning_rate=4e-3, num_images=4, num_groups=2)
    assert measured["sites"] == sites.list_sites(backbones.load("resnet_micro"))
    assert len(measured["rows"]) == 2 * 2 * 2
    for row in measured["rows"]:
        assert row["values"][0] == pytest.approx(1, abs=1e-6)
        assert all(-1 / 3 <= value <= 1 + 1e-6 for value in row["values"])
    assert len({tuple(row["values"]) for row in measured["rows"]}) == 8
