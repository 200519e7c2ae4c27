"""Claims about prompts on pixels: where they lie, how they train, that nothing is random outside of training."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from apthory import backbones, costs, equivalence, methods, sites, tasks, training
from apthory.heads import Heads
from apthory.methods import EVP, VP, AdaViPro, files, pixels
from apthory.methods.pixels import Layout, Overlay, PixelPrompt, augmentation, regions
from apthory.training import Configuration, Fit, Recipe
from apthory.training.optimizer import Optimizer

RECIPE = Recipe(num_epochs=3, batch_size=16, num_train=40, num_validation=12, num_test=20, precision="float32")
BUNDLE = [Configuration(learning_rate=2e-2, seed=0), Configuration(learning_rate=5e-3, seed=3)]
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
METHODS = {
    "vp": VP(),
    "patch": VP(place="patch", width=6),
    "random patch": VP(place="random_patch", width=6),
    "vp before normalization": VP(normalized=False, init=0.2),
    "evp": EVP(),
    "evp on top": EVP(around=False),
    "evp randaugment": EVP(diversity=("flip", "crop", "randaugment")),
    "adavipro": AdaViPro(dim=4),
}


@pytest.fixture(scope="module")
def task() -> tasks.Task:
    return tiny.task(60, 30)


def layout(size: int = 32, width: int = 4, **fields: object) -> Layout:
    return Layout(size=size, width=width, **STATISTICS, **fields)


def filled(where: Layout, num: int = 1, seed: int = 0, **fields: object) -> Overlay:
    """Prompts with values, and mask generators with weights, of a seed."""
    overlay = Overlay(where, num, init=1.0, **fields)
    overlay.start([torch.Generator().manual_seed(seed + k) for k in range(num)])
    return overlay


def images(num: int, size: int = 32, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalized images of pixels in [0, 1]."""
    levels = torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    mean, std = (torch.tensor(value, dtype=dtype).view(3, 1, 1) for value in STATISTICS.values())
    return (levels - mean) / std


# ---------------------------------------------------------------------------------- sizes and where the prompt lies


@pytest.mark.parametrize(("width", "count"), [(5, 13_140), (30, 69_840), (60, 118_080), (90, 144_720), (112, 150_528)])
def test_parameters_are_those_of_the_papers(width: int, count: int):
    for fields in ({}, {"around": width < 112, "normalized": False}):
        assert PixelPrompt(Overlay(layout(224, width, **fields))).num_parameters == count


def test_parameters_of_mask_generators_are_those_of_the_paper():
    def extra(dim: int) -> int:
        return PixelPrompt(Overlay(layout(224, 30, region=32, dim=dim))).num_parameters - 69_840

    assert extra(64) == 131_714  # "adds only 0.13 M"
    assert (69_840 + extra(8)) / 1e6 == pytest.approx(0.09, abs=0.005)


def test_lengths_of_the_papers_are_scaled_to_the_input():
    assert [pixels.scaled(p, 64) for p in (5, 30, 60, 90, 112)] == [1, 9, 17, 26, 32]
    assert [pixels.scaled(p, 224) for p in (1, 30, 112)] == [1, 30, 112]
    assert pixels.scaled(112, 33) == 17  # all of an odd image
    assert pixels.scaled(5, 8) == 1
    assert [pixels.scaled_region(r, 64) for r in (8, 16, 32, 56)] == [2, 4, 8, 16]
    assert [pixels.scaled_region(r, 224) for r in (8, 16, 32, 56)] == [8, 16, 32, 56]


@given(size=st.integers(2, 20), data=st.data())
@settings(max_examples=30)
def test_a_prompt_on_top_is_added_where_its_layout_says_and_nowhere_else(size: int, data: st.DataObject):
    place = data.draw(st.sampled_from(["frame", "patch"]))
    width = data.draw(st.integers(1, size if place == "patch" else -(-size // 2)))
    normalized = data.draw(st.booleans())
    x = images(2, size)
    prompt = PixelPrompt(filled(layout(size, width, place=place, normalized=normalized)))
    inside = np.zeros((size, size), dtype=bool)
    for row in range(size):
        for column in range(size):
            from_border = min(row, column, size - 1 - row, size - 1 - column)
            inside[row, column] = from_border < width if place == "frame" else max(row, column) < width
    added = torch.zeros(3, size, size)
    added[:, torch.from_numpy(inside)] = prompt.overlay.values[0].detach()
    if not normalized:  # (pixels + added - mean) / std
        added = added / torch.tensor(STATISTICS["std"]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(prompt(x), x + added, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prompt.delta, added)
    assert prompt.num_parameters == 3 * inside.sum()


@given(size=st.integers(8, 24), data=st.data())
@settings(max_examples=30)
def test_a_prompt_around_never_overlaps_the_shrunk_image(size: int, data: st.DataObject):
    width = data.draw(st.integers(1, (size - 1) // 2))
    where = layout(size, width, around=True, normalized=False)
    x, prompt = images(2, size), PixelPrompt(filled(where))
    middle = slice(width, size - width)
    with torch.no_grad():
        painted = prompt(x)
    assert torch.equal(painted[..., middle, middle], pixels.shrunk(x, where))
    assert not where.mask[middle, middle].any()
    levels = painted * torch.tensor(where.std).view(3, 1, 1) + torch.tensor(where.mean).view(3, 1, 1)
    expected = prompt.overlay.values[0].detach()  # on black
    for one in levels:
        torch.testing.assert_close(one[:, where.mask], expected, rtol=1e-5, atol=1e-5)


def test_images_shrink_as_image_files_do():
    where = layout(32, 4, around=True)
    coarse = torch.randint(2, (3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    levels = 255 * coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in STATISTICS.values())
    ours = pixels.shrunk(((levels / 255 - mean) / std)[None], where)[0] * std + mean
    file = Image.fromarray(levels.permute(1, 2, 0).numpy()).resize((24, 24), Image.Resampling.BICUBIC)
    theirs = torch.from_numpy(np.array(file)).permute(2, 0, 1)
    assert (255 * ours - theirs).abs().max() < 3  # of 255; Pillow rounds and cuts between rows and columns as well
    uncut = functional.interpolate(levels[None].float(), (24, 24), mode="bicubic", antialias=True)
    assert uncut.min() < -5 < 0 == theirs.min()
    assert uncut.max() > 260 > 255 == theirs.max()


@torch.no_grad()
def test_a_frame_of_whole_patches_is_prompt_tokens():
    """V2: the blocks, given the image's tokens and the prompt's, make the same features as the prompted image."""
    backbone = tiny.backbone("vit", torch.float64)
    where = layout(32, 8, around=True, normalized=False)
    x, prompt = images(3, dtype=torch.float64), PixelPrompt(filled(where))
    found = equivalence.input_span(backbone)
    painted = prompt(x)
    own, tokens = equivalence.as_tokens(found, pixels.shrunk(x, where), painted[0])
    assert len(tokens) == 12
    _, blocks = sites.split(backbone, found.site)
    features = blocks(torch.cat([own, tokens.expand(3, -1, -1)], dim=1))
    prompted = methods.AdaptedBackbone(backbone, prompt)(x)
    torch.testing.assert_close(features, prompted, rtol=1e-11, atol=1e-11)


def test_a_random_patch_moves_in_training_and_rests_in_the_middle_otherwise():
    overlay = filled(layout(32, 6, place="random_patch"), 2)
    x = torch.zeros(4, 3, 32, 32)
    corners = set()
    overlay.generators = [torch.Generator().manual_seed(k) for k in range(2)]
    for _ in range(60):
        with torch.no_grad():
            painted = overlay(x).unflatten(0, (2, 2))
        assert torch.equal(painted[:, 0], painted[:, 1])  # one place for a step's batch
        for k in range(2):
            rows, columns = painted[k, 0, 0].nonzero().T
            row, column = int(rows.min()), int(columns.min())
            assert torch.equal(
                painted[k, 0, :, row : row + 6, column : column + 6].flatten(1), overlay.values[k].detach()
            )
            corners.add((row, column))
    assert len(corners) > 100
    assert {0, 26} <= {row for row, _ in corners}
    overlay.generators = ()
    with torch.no_grad():
        rows, columns = overlay(x)[0, 0].nonzero().T
    assert (int(rows.min()), int(columns.min())) == (13, 13)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 17}, "a frame of 17 pixels does not fit an image of 32; take a whole width of 1 to 16"),
        ({"width": 0}, "a frame of 0 pixels"),
        (
            {"width": 33, "place": "patch"},
            "a patch of 33 pixels does not fit an image of 32; take a whole width of 1 to 32",
        ),
        ({"width": 16, "around": True}, "leaves nothing of 32 pixels for the image; take a frame of 1 to 15"),
        ({"width": 4, "around": True, "place": "patch"}, "a patch of 4 pixels around an image"),
        ({"region": 64}, r"a region of 64 pixels is larger than an image of 32; take one of \[1, 2, 4, 8, 16, 32\]"),
        ({"region": 9}, "a region of 9 pixels does not tile an image of 32"),
    ],
)
def test_prompts_that_do_not_fit_are_errors(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        layout(**{"width": 4, **fields})


def test_methods_refuse_what_does_not_fit_the_backbone():
    with pytest.raises(ValueError, match="a frame of 30 pixels does not fit an image of 32"):
        VP(width=30).build(tiny.backbone("vit"), 1)
    with pytest.raises(ValueError, match="a region of 56 pixels is larger than an image of 32"):
        AdaViPro(region=56).build(tiny.backbone("vit"), 1)


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        (VP, "lr_scale", -1.0),
        (VP, "init", -1.0),
        (VP, "init", math.nan),
        (EVP, "lr_scale", 0.0),
        (AdaViPro, "floor", 0.0),
        (AdaViPro, "generator_lr_scale", math.inf),
        (AdaViPro, "decay", 1.5),
        (AdaViPro, "dim", 0),
    ],
)
def test_a_number_out_of_range_is_an_error(method: type, name: str, value: float):
    with pytest.raises(ValueError, match=rf"{name} of {method.name} is {value}; expected .*; default "):
        method(**{name: value})
    method(**{"init": 0.0} if name == "init" else {"lr_scale": 1e-9})  # the ends that are allowed


def test_a_frame_of_half_a_pixel_is_an_error():
    with pytest.raises(ValueError, match=r"a frame of 2.5 pixels .* take a whole width"):
        Layout.__post_init__(SimpleNamespace(place="frame", size=32, width=2.5))  # past the type checks of tests
    with pytest.raises(ValueError, match="dim is 0; the mask generator wants one channel"):
        layout(32, 2, region=8, dim=0)


@pytest.mark.parametrize("fields", [{"diversity": ("flips",)}, {"diversity": "flip"}, {"normalization": "L2"}])
def test_evp_with_something_else_is_an_error(fields: dict[str, object]):
    given = SimpleNamespace(**{"diversity": (), "normalization": "l2", **fields})  # past the type checks of tests
    with pytest.raises(ValueError, match="expected a tuple of flip, crop, randaugment, and one of l2, l1, linf, none"):
        EVP.__post_init__(given)


def test_a_place_that_there_is_not_is_an_error():
    with pytest.raises(ValueError, match="place is 'corner'; expected one of frame, patch, random_patch"):
        Layout.__post_init__(SimpleNamespace(place="corner"))


def test_a_prompt_on_images_of_another_size_is_an_error():
    with pytest.raises(ValueError, match=r"trained for images of 32 pixels, not \(40, 40\)"):
        PixelPrompt(filled(layout()))(images(1, 40))
    with pytest.raises(ValueError, match="these are 2 prompts"):
        PixelPrompt(filled(layout(), 2))
    with pytest.raises(ValueError, match="only AdaViPro decides by region"):
        PixelPrompt(filled(layout())).regions(images(1))


# ---------------------------------------------------------------------------------- how it trains


def plain_loop(
    backbone: nn.Module, task: tasks.Task, method: VP | EVP, configuration: Configuration, recipe: Recipe, start: Tensor
) -> tuple[list[float], Tensor, Tensor]:
    """One configuration as the papers' codes have it: a prompt of full size, a mask, one image batch after the other.

    Returns:
        Training losses by epoch, the prompt at the end, and the head's weight at the end.
    """
    width = pixels.scaled(30, 32)
    mask = torch.ones(32, 32)
    mask[width:-width, width:-width] = 0
    mean, std = (torch.tensor(backbone.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    prompt = start.clone().requires_grad_(True)
    is_evp = isinstance(method, EVP)

    def features_of(batch: Tensor) -> Tensor:
        levels = task.train.pixels[batch] / 255
        if is_evp and method.around:
            small = functional.interpolate(levels, (32 - 2 * width,) * 2, mode="bicubic", antialias=True).clamp(0, 1)
            levels = functional.pad(small, (width,) * 4)
        if is_evp:  # its step is masked instead, so that the gradient is that of the whole image
            return backbone((levels + prompt - mean) / std)
        added = mask * prompt
        return backbone((levels - mean) / std + added if method.normalized else (levels + added - mean) / std)

    split = task.split(configuration.seed, recipe.num_train, recipe.num_validation, recipe.num_test)
    with torch.no_grad():
        unit = features_of(split.train[:128]).square().mean().sqrt()
    weight = 0.01 * torch.randn(32, 3, generator=torch.Generator().manual_seed(configuration.seed))
    weight, bias = nn.Parameter(weight), nn.Parameter(torch.zeros(3))
    groups = [{"params": [weight, bias], "lr": configuration.learning_rate}]
    if not is_evp:
        groups.append({"params": [prompt], "lr": method.lr_scale * configuration.learning_rate})
    optimizer = reference.make_optimizer(groups, configuration.weight_decay, recipe)
    steps = math.ceil(len(split.train) / recipe.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: reference.schedule((step + 1) / (steps * recipe.num_epochs), recipe.warmup)
    )
    curve = []
    for epoch in range(recipe.num_epochs):
        shuffle = torch.Generator().manual_seed(1_000_003 * (configuration.seed + 1) + epoch)
        order = split.train[torch.randperm(len(split.train), generator=shuffle)]
        total = 0.0
        for batch in order.split(recipe.batch_size):
            loss = functional.cross_entropy(features_of(batch) / unit @ weight + bias, task.train.labels[batch])
            optimizer.zero_grad()
            prompt.grad = None
            loss.backward()
            optimizer.step()
            scheduler.step()
            if is_evp:  # the paper's rate 70 at 224 pixels is this one for a step of 0.18
                g, cosine = prompt.grad, 0.5 * (1 + math.cos(math.pi * epoch / recipe.num_epochs))
                norm, n = {
                    "l2": (g.square().sum().sqrt(), g.numel() ** 0.5),
                    "l1": (g.abs().sum(), g.numel()),
                    "linf": (g.abs().max(), 1),
                    "none": (1 - 1e-10, 1),
                }[method.normalization]
                rate = cosine * method.lr_scale * configuration.learning_rate * n
                with torch.no_grad():
                    prompt -= rate * mask * g / (norm + 1e-10)
            total += loss.item() * len(batch)
        curve.append(total / len(order))
    return curve, prompt.detach()[:, mask.bool()], weight.detach()


@pytest.mark.parametrize(
    ("family", "method", "optimizer"),
    [
        ("resnet", EVP(diversity=()), "sgd"),
        ("vit", EVP(diversity=(), normalization="l1"), "adamw"),
        ("resnet", EVP(diversity=(), normalization="linf", around=False, lr_scale=30.0), "sgd"),
        ("vit", EVP(diversity=(), normalization="none", lr_scale=1e5), "sgd"),
        ("resnet", VP(lr_scale=1e3), "sgd"),
        ("vit", VP(normalized=False, init=0.1), "adamw"),
    ],
)
def test_the_bundled_loop_is_the_papers_own(
    family: str, method: VP | EVP, optimizer: str, task: tasks.Task, monkeypatch: pytest.MonkeyPatch
):
    backbone, recipe = tiny.backbone(family), replace(RECIPE, optimizer=optimizer)
    ends = []
    validate = training.Bundle.validate

    def spy(self: training.Bundle) -> tuple[list[float], list[float]]:
        ends[:] = [self.state(k) for k in range(2)]
        return validate(self)

    monkeypatch.setattr(training.Bundle, "validate", spy)
    fits = training.fit(backbone, task, method, BUNDLE, recipe=recipe)
    body = method.build(backbone, 2)
    body.start([c.seed for c in BUNDLE])
    for k, (fit, end, configuration) in enumerate(zip(fits, ends, BUNDLE, strict=True)):
        start = body.stacks[":input"]._canvas()[k].detach()
        assert bool(start.any()) == isinstance(method, VP)
        curve, prompt, weight = plain_loop(backbone, task, method, configuration, recipe, start)
        assert fit.train_curve == pytest.approx(curve, rel=1e-3, abs=1e-4)
        torch.testing.assert_close(end[1]["weight"], weight, rtol=2e-2, atol=2e-3)
        start = start.flatten(1)[:, body.stacks[":input"].pixels]
        moved, expected = end[0][":input.values"] - start, prompt - start
        assert float((moved - expected).norm() / expected.norm()) < 2e-2
        assert float(expected.abs().mean()) > 1e-3


def test_one_step_of_evp_by_hand():
    """Whole gradient (3, 0, 4) and mask on all but the last: norm 5 over what the mask leaves out as well."""
    overlay = Overlay(layout(4, 1, around=True), normalization="l2")
    overlay.values.grad = torch.zeros_like(overlay.values)
    overlay.values.grad[0, 0, 0] = 3.0
    overlay.whole = torch.zeros(1, 3, 4, 4)
    overlay.whole[0, 0, 0, 0], overlay.whole[0, 1, 2, 2] = 3.0, 4.0
    overlay.begin_epoch(1, 2)  # cosine 1/2
    overlay.descend(torch.tensor([0.1]))
    assert overlay.values[0, 0, 0].item() == pytest.approx(-0.5 * 0.1 * math.sqrt(48) * 3 / 5)
    assert int(overlay.values.count_nonzero()) == 1
    assert overlay.values.grad is None


def test_the_papers_rate_is_the_same_step_at_any_size():
    assert 70 / math.sqrt(3 * 224**2) == pytest.approx(0.18, abs=0.001)
    for size in (16, 64):
        overlay = Overlay(layout(size, size // 2), normalization="l2")
        overlay.whole = torch.randn(1, 3, size, size)
        overlay.values.grad = overlay.whole.flatten(2)[..., overlay.pixels]
        overlay.descend(torch.tensor([0.18]))
        assert overlay.values.square().mean().sqrt().item() == pytest.approx(0.18, rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_bundle_gives_each_configuration_the_result_it_gets_alone(name: str, task: tasks.Task):
    together = training.fit(tiny.backbone("resnet"), task, METHODS[name], BUNDLE, recipe=RECIPE)
    for configuration, fit in zip(BUNDLE, together, strict=True):
        (alone,) = training.fit(tiny.backbone("resnet"), task, METHODS[name], [configuration], recipe=RECIPE)
        assert fit.train_curve == pytest.approx(alone.train_curve, rel=1e-3)
        assert fit.epoch == alone.epoch
        torch.testing.assert_close(fit.state, alone.state, rtol=5e-3, atol=5e-4)
        assert (fit.prompt_norm, fit.relative_norm) == pytest.approx((alone.prompt_norm, alone.relative_norm), rel=1e-3)


def test_the_same_seed_gives_the_same_bits_whatever_the_state_of_the_process(task: tasks.Task):
    for method in (METHODS["evp randaugment"], METHODS["adavipro"], METHODS["random patch"]):
        (one,) = training.fit(tiny.backbone("vit"), task, method, BUNDLE[:1], recipe=RECIPE)
        with torch.random.fork_rng():
            torch.manual_seed(99)
            before = torch.get_rng_state()
            (other,) = training.fit(tiny.backbone("vit"), task, method, BUNDLE[:1], recipe=RECIPE)
            assert torch.equal(torch.get_rng_state(), before)
        assert one.train_curve == other.train_curve
        assert all(torch.equal(value, other.state[name]) for name, value in one.state.items())


def test_the_cache_holds_shrunk_images_and_changes_nothing(task: tasks.Task):
    cached, plain = (
        training.fit(tiny.backbone("vit"), task, EVP(), BUNDLE[:1], recipe=replace(RECIPE, cache=cache))[0]
        for cache in (True, False)
    )
    assert cached.cache_bytes == 52 * 3 * 24 * 24 * 4
    assert plain.cache_bytes == 0
    torch.testing.assert_close(cached.state, plain.state, rtol=1e-3, atol=1e-4)


def test_a_cache_of_another_width_is_refused(task: tasks.Task):
    cache = training.PrefixCache()
    training.fit(tiny.backbone("vit"), task, EVP(), BUNDLE[:1], recipe=replace(RECIPE, num_epochs=1), cache=cache)
    with pytest.raises(ValueError, match="results of another prefix"):
        training.fit(
            tiny.backbone("vit"), task, EVP(width=8), BUNDLE[:1], recipe=replace(RECIPE, num_epochs=1), cache=cache
        )


def test_prompt_and_mask_generator_learn_at_their_own_rates():
    method, backbone = AdaViPro(dim=4, lr_scale=4.0, generator_lr_scale=0.1), tiny.backbone("vit")
    body = method.build(backbone, 2)
    optimizer = Optimizer(body, Heads(), BUNDLE, RECIPE)
    rates = {p.shape: rate.flatten().tolist() for p, rate, _ in optimizer.parameters}
    assert len(rates) == 5
    for shape, rate in rates.items():
        factor = 4.0 if shape == body.stacks[":input"].values.shape else 0.1
        assert rate == pytest.approx([factor * c.learning_rate for c in BUNDLE])


def test_mask_generators_are_trained(task: tasks.Task):
    method = AdaViPro(dim=4)
    (fit,) = training.fit(tiny.backbone("resnet"), task, method, BUNDLE[:1], recipe=replace(RECIPE, num_epochs=2))
    body = method.build(tiny.backbone("resnet"), 1)
    body.start([BUNDLE[0].seed])
    for name, value in body.stacks[":input"].named_parameters():
        assert not torch.equal(fit.state[f":input.{name}"], value.detach()[0]), name


# ---------------------------------------------------------------------------------- AdaViPro


def test_the_laplacian_of_a_constant_image_is_zero():
    assert not regions.laplacian(torch.full((2, 5, 7), 0.3)).any()


def test_the_laplacian_is_that_of_four_neighbours():
    grey = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    expected = functional.conv2d(grey[:, None], kernel[None, None])[:, 0]
    found = regions.laplacian(grey)
    torch.testing.assert_close(found[:, 1:-1, 1:-1], expected)
    corner = grey[:, 0, 1] + grey[:, 1, 0] - 2 * grey[:, 0, 0]  # two neighbours lie outside and repeat the corner
    torch.testing.assert_close(found[:, 0, 0], corner)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=20)
def test_decisions_are_zero_or_one_and_follow_the_logits(batch: int, rows: int, seed: int):
    logits = torch.randn(batch, 2, rows, 3, generator=torch.Generator().manual_seed(seed))
    chosen = regions.decide(logits)
    for b in range(batch):
        for row in range(rows):
            for column in range(3):
                no, yes = logits[b, :, row, column].tolist()
                assert chosen[b, row, column] == (1.0 if yes > no else 0.0)
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed + 1))
    assert torch.equal(regions.decide_softly(logits, noise, 0.7), regions.decide(logits + noise))


def test_decisions_under_noise_are_drawn_from_the_softmax():
    logits = torch.tensor([0.3, 1.0]).view(2, 1, 1).expand(20_000, 2, 1, 1)
    noise = regions.gumbel(logits.shape, torch.Generator().manual_seed(0))
    share = float(regions.decide_softly(logits, noise, 5.0).mean())
    probability = 1 / (1 + math.exp(-0.7))
    assert abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / 20_000)


def test_noise_is_finite_even_where_a_generator_draws_zero(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Tensor, "exponential_", lambda draws, generator: draws.zero_())
    assert regions.gumbel((3,), torch.Generator()).isfinite().all()


@pytest.mark.parametrize("temperature", [5.0, 1.0, 0.1])
def test_gumbel_gradients_are_those_of_the_expected_relaxation(temperature: float):
    """A toy: one region, loss 3 * mask. By finite differences of the mean over the same 4,000 draws, in float64."""
    noise = regions.gumbel((4000, 2, 1, 1), torch.Generator().manual_seed(1)).double()

    def expectation(logits: Tensor) -> Tensor:
        return 3 * ((logits.view(2, 1, 1) + noise) / temperature).softmax(1)[:, 1].mean()

    logits = torch.tensor([0.2, -0.3], dtype=torch.float64, requires_grad=True)
    (3 * regions.decide_softly(logits.view(2, 1, 1).expand(4000, 2, 1, 1), noise, temperature).mean()).backward()
    step = 1e-5
    for k in range(2):
        shift = step * torch.eye(2, dtype=torch.float64)[k]
        difference = (expectation(logits.detach() + shift) - expectation(logits.detach() - shift)) / (2 * step)
        assert float(logits.grad[k]) == pytest.approx(float(difference), rel=1e-5)
    if temperature == 0.1:  # hardly biased: the derivative of 3 * probability, within four standard errors (0.028 each)
        probability = 1 / (1 + math.exp(0.5))
        assert float(logits.grad[1]) == pytest.approx(3 * probability * (1 - probability), abs=0.115)


def test_mask_generators_are_two_convolutions():
    generator = regions.MaskGenerator(2, 5, 4)
    generator.start([torch.Generator().manual_seed(k) for k in range(2)])
    seen = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(5))
    logits = generator(seen)
    assert logits.shape == (2, 3, 2, 3, 2)
    for k in range(2):
        gathered = functional.conv2d(seen[k][:, None], generator.gather_weight[k], generator.gather_bias[k], padding=1)
        decided = functional.conv2d(gathered.relu(), generator.decide_weight[k], generator.decide_bias[k], stride=4)
        torch.testing.assert_close(logits[k], decided, rtol=1e-4, atol=1e-5)
    bound = {"gather": 9**-0.5, "decide": (5 * 16) ** -0.5}
    for name, parameter in generator.named_parameters():
        most = float(parameter.detach().abs().max())
        assert most <= bound[name.split("_")[0]]
        assert name.endswith("bias") or most > 0.8 * bound[name.split("_")[0]]


@torch.no_grad()
def test_an_image_has_the_prompt_in_the_regions_that_its_mask_names():
    prompt, x = PixelPrompt(filled(layout(32, 10, region=8, dim=4))), images(6)
    chosen = prompt.regions(x)
    assert chosen.shape == (6, 4, 4)
    assert set(chosen.unique().tolist()) == {0.0, 1.0}
    painted = prompt(x)
    for image, mask, result in zip(x, chosen, painted, strict=True):
        for row in range(4):
            for column in range(4):
                here = (slice(None), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
                torch.testing.assert_close(result[here], image[here] + mask[row, column] * prompt.delta[here])
    for bias, expected in (((-9.0, 9.0), x + prompt.delta), ((9.0, -9.0), x)):
        prompt.overlay.masks.decide_weight.zero_()
        prompt.overlay.masks.decide_bias.copy_(torch.tensor([bias]))
        torch.testing.assert_close(prompt(x), expected)


@torch.no_grad()
def test_masks_come_from_edges_or_without_them_from_the_grey_image():
    edges, grey = (filled(layout(32, 10, region=8, dim=8, edges=edges)) for edges in (True, False))
    x = images(8)
    brighter = x + 5.0
    assert torch.equal(edges.regions(x), edges.regions(brighter))
    assert not torch.equal(grey.regions(x), grey.regions(brighter))
    assert sum(p.numel() for p in edges.parameters()) == sum(p.numel() for p in grey.parameters())


def seeing(threshold: float) -> PixelPrompt:
    """AdaViPro that prompts a region iff its Laplacian, where positive, adds up to more than a threshold; by hand."""
    prompt = PixelPrompt(filled(layout(32, 16, region=8, dim=1)))
    with torch.no_grad():
        for parameter in prompt.overlay.masks.parameters():
            parameter.zero_()
        prompt.overlay.masks.gather_weight[0, 0, 0, 1, 1] = 1.0  # edges as they are
        prompt.overlay.masks.decide_weight[0, 1] = 1.0
        prompt.overlay.masks.decide_bias[0, 0] = threshold
    return prompt


@torch.no_grad()
def test_masks_depend_on_the_image_and_follow_the_logits():
    """A dot has a Laplacian of -4 in its place and of 1 in its four neighbours', all of one region here."""
    x = torch.zeros(3, 3, 32, 32)
    x[0, :, 4, 4], x[1, :, 4, 20], x[2, :, 28, 12] = 1.0, 1.0, 0.5
    prompt = seeing(3.0)
    logits = prompt.overlay.logits(x)[0]
    assert torch.equal(logits[:, 0], torch.full((3, 4, 4), 3.0))
    found = {k: chosen.nonzero().tolist() for k, chosen in enumerate(prompt.regions(x))}
    assert found == {0: [[0, 0]], 1: [[0, 2]], 2: []}  # the fainter dot has 2 of 3
    assert seeing(1.0).regions(x)[2].nonzero().tolist() == [[3, 1]]
    assert torch.equal(prompt.regions(x), (logits[:, 1] > logits[:, 0]).float())
    torch.testing.assert_close(prompt.probabilities(x), (logits[:, 1] - logits[:, 0]).sigmoid())
    swapped = prompt.overlay.masks.decide_weight.flip(1), prompt.overlay.masks.decide_bias.flip(1)
    for own, other in zip(list(prompt.overlay.masks.parameters())[2:], swapped, strict=True):
        own.copy_(other)
    assert torch.equal(prompt.regions(x), (logits[:, 1] < logits[:, 0]).float())


@torch.no_grad()
def test_mask_generators_decide_the_same_however_images_are_chunked(monkeypatch: pytest.MonkeyPatch):
    overlay, x = filled(layout(32, 10, region=8, dim=4), 2), images(10)
    whole = overlay.logits(x)
    monkeypatch.setattr(regions, "_VALUES_AT_ONCE", 2 * 4 * 32 * 32 * 2)  # two images of each configuration
    torch.testing.assert_close(overlay.logits(x), whole)
    monkeypatch.setattr(regions, "_VALUES_AT_ONCE", 1)
    torch.testing.assert_close(overlay.logits(x), whole)


@torch.no_grad()
def test_the_norm_of_a_prompt_is_that_of_what_is_added():
    """Two images with the prompt in one region and one without any: the mean of its norm there, there, and zero."""
    x = torch.zeros(3, 3, 32, 32)
    x[0, :, 4, 4], x[1, :, 4, 20], x[2, :, 28, 12] = 1.0, 1.0, 0.5
    prompt = seeing(3.0)
    norms = [float(prompt.delta[:, :8, left : left + 8].norm()) for left in (0, 16)]
    assert prompt.overlay.added_norm(x).tolist() == pytest.approx([sum(norms) / 3])
    size = float(x.flatten(1).norm(dim=1).mean())
    assert prompt.relative_norm(x) == pytest.approx(sum(norms) / 3 / size)
    added = (prompt(x) - x).flatten(1).norm(dim=1).mean()
    assert prompt.overlay.added_norm(x).tolist() == pytest.approx([float(added)], rel=1e-5)


def test_the_temperature_falls_by_epoch_down_to_the_floor():
    overlay = Overlay(layout(region=8))
    seen = []
    for epoch in (0, 1, 10, 193, 194, 1000):
        overlay.begin_epoch(epoch, 1001)
        seen.append(overlay.temperature)
    assert seen == pytest.approx([5, 4.9, 5 * 0.98**10, 5 * 0.98**193, 0.1, 0.1])


# ---------------------------------------------------------------------------------- input diversity


def test_flips_and_crops_are_windows_of_the_reflected_image():
    x = images(12, 16)
    found = set()
    moved = augmentation.flipped_and_cropped(x, [torch.Generator().manual_seed(k) for k in range(2)])
    for image, result in zip(x, moved, strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
        windows = {
            (down, right, flip): padded[:, down : down + 16, right : right + 16][:, :, :: -1 if flip else 1]
            for down in range(5)
            for right in range(5)
            for flip in (False, True)
        }
        (match,) = [key for key, window in windows.items() if np.array_equal(window, result.numpy())]
        found.add(match)
    assert len({down for down, _, _ in found}) > 2 < len({right for _, right, _ in found})
    assert {flip for _, _, flip in found} == {True, False}


def test_flips_alone_and_crops_alone():
    x, generators = images(64, 16), [torch.Generator().manual_seed(0)]
    flipped = augmentation.flipped_and_cropped(x, generators, crop=False)
    is_same = [torch.equal(a, b) for a, b in zip(x, flipped, strict=True)]
    is_mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(x, flipped, strict=True)]
    assert all(a != b for a, b in zip(is_same, is_mirrored, strict=True))
    assert 16 < sum(is_mirrored) < 48
    ramp = torch.arange(16.0).expand(64, 3, 16, 16)
    assert (augmentation.flipped_and_cropped(ramp, generators, flip=False)[..., 5:8].diff() > 0).all()


def test_randaugment_gives_images_of_whole_levels_and_leaves_the_process_alone():
    x, generators = images(16, 16), [torch.Generator().manual_seed(k) for k in (0, 1)]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in STATISTICS.values())
    before = torch.get_rng_state()
    changed = augmentation.randaugmented(x, generators, mean, std)
    assert torch.equal(torch.get_rng_state(), before)
    levels = 255 * (changed * std + mean)
    assert (levels - levels.round()).abs().max() < 1e-3
    assert levels.min() > -1e-3
    assert levels.max() < 255 + 1e-3
    assert sum(bool((a - b).abs().max() > 0.1) for a, b in zip(x, changed, strict=True)) > 8
    alone = augmentation.randaugmented(x[8:], [torch.Generator().manual_seed(1)], mean, std)
    assert torch.equal(alone, changed[8:])


@pytest.mark.parametrize("name", ["evp", "evp randaugment", "adavipro", "random patch"])
def test_nothing_is_random_outside_of_training_steps(name: str):
    body = METHODS[name].build(tiny.backbone("resnet"), 2)
    body.start([0, 1])
    (crossing,) = body.prefix(tiny.images("resnet", 4))
    overlay = body.stacks[":input"]
    with torch.no_grad():
        first, second = overlay(crossing), overlay(crossing)
        assert torch.equal(first, second)
        with body.drawing():
            drawn, again = overlay(crossing), overlay(crossing)
        assert not torch.equal(drawn, again)
        assert not torch.equal(drawn, first)
        assert torch.equal(overlay(crossing), first)
    with pytest.raises(ZeroDivisionError), body.drawing():
        _ = 1 / 0
    assert not overlay.generators


# ---------------------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def fits(task: tasks.Task) -> dict[str, list[Fit]]:
    return {
        name: training.fit(tiny.backbone("resnet"), task, method, BUNDLE, recipe=RECIPE)
        for name, method in METHODS.items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_the_exported_and_the_loaded_model_predict_what_evaluate_counts(
    name: str, fits: dict[str, list[Fit]], task: tasks.Task, tmp_path: Path
):
    backbone = tiny.backbone("resnet")
    for fit, evaluation in zip(fits[name], training.evaluate(fits[name], task), strict=True):
        x = reference.normalized(backbone, task.test, fit.split.test)
        loaded = files.load_prompt(fit.save(tmp_path / "prompt.safetensors"), backbone)
        with torch.no_grad():
            logits = fit.model(x)
            assert torch.equal(loaded(x), logits)
        assert torch.equal(logits.argmax(1) == task.test.labels[fit.split.test], evaluation.correct)
        assert loaded.prompt.layout == fit.prompt.layout
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_model_changes_no_weight_of_its_backbone(fits: dict[str, list[Fit]]):
    backbone, x = tiny.backbone("resnet"), tiny.images("resnet", 2)
    before = backbones.digest(backbone)
    with torch.no_grad():
        plain = backbone(x)
        prompted = fits["evp"][0].model(x)
        assert torch.equal(backbone(x), plain)
    assert prompted.shape == (2, 3)
    assert backbones.digest(backbone) == before


def test_norms_are_in_the_units_of_normalized_images(fits: dict[str, list[Fit]], task: tasks.Task):
    backbone = tiny.backbone("resnet")
    for name in ("vp", "evp", "vp before normalization"):
        fit = fits[name][0]
        x = reference.normalized(backbone, task.train, fit.split.train)
        assert fit.prompt_norm == pytest.approx(float(fit.prompt.delta.norm()), rel=1e-5)
        assert fit.relative_norm == pytest.approx(fit.prompt.relative_norm(x), rel=1e-3)
    for fit in fits["adavipro"]:
        x = reference.normalized(backbone, task.train, fit.split.train)
        with torch.no_grad():
            added = (fit.prompt(x) - x).flatten(1).norm(dim=1)
        assert fit.prompt_norm == pytest.approx(float(added.mean()), rel=1e-3, abs=1e-5)
        assert fit.relative_norm == pytest.approx(fit.prompt.relative_norm(x), rel=1e-3)


@pytest.mark.parametrize("family", ["vit", "resnet"])
@pytest.mark.parametrize("method", [VP(), EVP()])
def test_a_step_costs_no_more_than_a_tenth_above_forward_and_backward(family: str, method: VP | EVP, task: tasks.Task):
    """In FLOPs and in tensors held at once; seconds are for a quiet machine."""
    backbone = tiny.backbone(family)
    bundle = training.Bundle(backbone, task, method, BUNDLE[:1], RECIPE)
    chunks = [bundle.splits[0].train[:16]]
    x = backbones.normalize(backbone, task.train[chunks[0]]).requires_grad_(True)

    def bare() -> None:
        backbone(x).sum().backward()

    assert costs.count_flops(lambda: bundle.step(chunks, 0.5)) <= 1.1 * costs.count_flops(bare)
    image = x.numel() * x.element_size()
    steps = costs.peak_memory(lambda: bundle.step(chunks, 0.5))
    assert steps <= costs.peak_memory(bare) + 4 * image


def test_names_of_methods_are_the_fields():
    assert [methods.METHODS[name] for name in ("vp", "evp", "adavipro")] == [VP, EVP, AdaViPro]
