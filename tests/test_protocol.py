"""Claims about the protocol: whoever writes one plain module gets bundles, seeds, cache, files and evaluation."""

import copy
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
import tiny
import torch
from torch import nn

from apthory import equivalence, methods, sites, tasks, training
from apthory.methods import Edit, Method, edits, files, registry
from apthory.training import Configuration, Fit, Recipe

RECIPE = Recipe(num_epochs=2, batch_size=16, num_train=32, num_validation=12, num_test=20, precision="float32")
BUNDLE = [Configuration(learning_rate=2e-2, seed=0), Configuration(learning_rate=5e-3, weight_decay=0.1, seed=3)]
CLOSE = {"rtol": 2e-3, "atol": 2e-4}  # sums in another order, over the steps of RECIPE


# ------------------------------------------------------------------------------------------ two methods, as users write


class Adapter(Edit):
    """A bottleneck with a skip (Houlsby et al. 2019, arXiv:1902.00751)."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, dim), nn.Linear(dim, width)
        nn.init.zeros_(self.up.weight)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + self.up(torch.relu(self.down(z)))


@dataclass(frozen=True, kw_only=True)
class AdapterTuning(Method):
    name: ClassVar[str] = "adapter"
    site: str
    dim: int = 4

    def edits(self, backbone: nn.Module) -> dict[str, Edit]:
        return {self.site: Adapter(sites.site_shape(backbone, self.site)[-1], self.dim)}


class Tokens(Edit):
    """Learned tokens behind the class token: put in at the first block, in the place of the last ones elsewhere."""

    def __init__(self, num: int, width: int, is_first: bool) -> None:
        super().__init__()
        self.tokens, self.is_first = nn.Parameter(0.1 * torch.randn(num, width)), is_first

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        rest = z[:, 1:] if self.is_first else z[:, 1 + len(self.tokens) :]
        return torch.cat([z[:, :1], self.tokens.to(z.dtype).expand(len(z), -1, -1), rest], dim=1)


@dataclass(frozen=True, kw_only=True)
class DeepPromptTuning(Method):
    """VPT-deep (Jia et al. 2022, arXiv:2203.12119)."""

    name: ClassVar[str] = "vpt_deep"
    site: ClassVar[str] = "blocks.0:input"
    num: int = 3

    def edits(self, backbone: nn.Module) -> dict[str, Edit]:
        width, blocks = backbone.embed_dim, range(len(backbone.blocks))
        return {f"blocks.{index}:input": Tokens(self.num, width, index == 0) for index in blocks}


# ------------------------------------------------------------------------------------------ more kinds of edits


class LowRank(Edit):
    """LoRA: a low-rank map of the layer's input beside the layer (Hu et al. 2021, arXiv:2106.09685)."""

    sees_input = True

    def __init__(self, layer: nn.Linear, name: str, rank: int = 2) -> None:
        super().__init__()
        self.name, self.layer = name, (layer,)
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / math.sqrt(layer.in_features))
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return z + x @ self.a.mT @ self.b.mT

    def lr_scale_of(self, parameter: str) -> float:
        return {"a": 1.0, "b": 4.0}[parameter]

    def weights(self) -> dict[str, torch.Tensor]:
        return {f"{self.name}.weight": self.layer[0].weight + (self.b @ self.a).detach()}


@dataclass(frozen=True, kw_only=True)
class LowRankTuning(Method):
    name: ClassVar[str] = "low_rank"
    site: str = "blocks.1:input"

    def edits(self, backbone: nn.Module) -> dict[str, Edit]:
        layers = ["blocks.1.attn.qkv", "blocks.2.mlp.fc1"]
        return {f"{layer}:output": LowRank(backbone.get_submodule(layer), layer) for layer in layers}


class Noisy(Edit):
    """Has everything that an edit may have: a draw, a schedule, a scale that it measures, a frozen tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width))
        self.register_buffer("bound", torch.zeros(()))
        self.register_buffer("direction", torch.randn(width))  # drawn once, and never trained
        self.register_buffer("scale", torch.ones(()))

    def start(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.gain, std=0.1, generator=generator)

    def calibrate(self, z: torch.Tensor) -> None:
        self.scale = z.abs().mean()

    def begin_epoch(self, epoch: int, num_epochs: int) -> None:
        self.bound.fill_(0.1 / (1 + epoch))

    def draw(self, z: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(z.shape[:1], generator=generator)

    def forward(self, z: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        z = z + self.scale * self.gain * self.direction
        return z if noise is None else z * (1 + self.bound * noise.view(-1, *[1] * (z.ndim - 1)))


@dataclass(frozen=True, kw_only=True)
class NoisyTuning(Method):
    name: ClassVar[str] = "noisy"
    site: str = "blocks.1:input"

    def edits(self, backbone: nn.Module) -> dict[str, Edit]:
        return {self.site: Noisy(sites.site_shape(backbone, self.site)[-1])}


OWN = {
    "adapter": AdapterTuning(site="blocks.1:input"),
    "vpt_deep": DeepPromptTuning(),
    "low_rank": LowRankTuning(),
    "noisy": NoisyTuning(),
}
# One of each that ships, on the same backbone.
SHIPPED = {
    "ap": methods.ActivationPrompting(site="blocks.1:input"),
    "ap channel": methods.ActivationPrompting(site="blocks.1.norm1:output", shape="channel"),
    "norm": methods.NormTuning(site="blocks.1:input"),
    "norm gamma": methods.NormTuning(site=":input", layers="all", parameters="gamma"),
    "linear_probe": methods.LinearProbe(),
    "site_probe": methods.LinearProbe(site="blocks.1:input"),
    "random_prompt": methods.FixedPrompt(site="blocks.1:input", norm=3.0),
    "fine_tuning": methods.FineTuning(),
    "partial": methods.FineTuning(site="blocks.2:input"),
    "vp": methods.VP(),
    "evp": methods.EVP(),
    "adavipro": methods.AdaViPro(dim=4),
}
EVERY = SHIPPED | OWN


@pytest.fixture(scope="module")
def task() -> tasks.Task:
    return tiny.task(60, 30)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "METHODS", copy.copy(registry.METHODS))
    for method in (AdapterTuning, DeepPromptTuning, LowRankTuning, NoisyTuning):
        methods.register(method)


@pytest.fixture(scope="module")
def fits_of(task: tasks.Task) -> Callable[[str], list[Fit]]:
    """Fits of a bundle by the method's name, made once for all tests."""

    @cache
    def fit(name: str) -> list[Fit]:
        return training.fit(tiny.backbone("vit"), task, EVERY[name], BUNDLE, recipe=RECIPE)

    return fit


def test_every_registered_method_is_tried_here():
    assert {type(method) for method in EVERY.values()} >= set(registry.METHODS.values())


def test_an_adapter_takes_at_most_twenty_lines():
    lines = Path(__file__).read_text().split("class Adapter(Edit)")[1].split("class Tokens")[0].splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith('"""')]
    assert len(code) <= 20


# ------------------------------------------------------------------------------------------ one by one, and together


@pytest.mark.parametrize("name", OWN)
def test_a_bundle_gives_each_configuration_what_it_gets_alone(name: str, fits_of, task: tasks.Task):
    for configuration, fit in zip(BUNDLE, fits_of(name), strict=True):
        alone = training.fit(tiny.backbone("vit"), task, OWN[name], configuration, recipe=RECIPE)
        torch.testing.assert_close(fit.train_curve, alone.train_curve, **CLOSE)
        assert fit.validation_curve == alone.validation_curve
        torch.testing.assert_close(fit.state, alone.state, **CLOSE)
        torch.testing.assert_close(fit.head_state, alone.head_state, **CLOSE)


@pytest.mark.parametrize("name", OWN)
def test_an_own_method_learns(name: str, task: tasks.Task):
    """What is trained moves away from where it starts, and the loss with it."""
    rates = [Configuration(learning_rate=rate, seed=3) for rate in (2e-2, 1e-12)]
    fit, twin = training.fit(tiny.backbone("vit"), task, OWN[name], rates, recipe=replace(RECIPE, num_epochs=20))
    assert fit.train_curve[-1] < twin.train_curve[-1] - 1e-2
    trained = {
        f"{place}.{name}"
        for place, edit in OWN[name].edits(tiny.backbone("vit")).items()
        for name, _ in edit.named_parameters()
    }
    assert trained <= fit.state.keys()
    for key in trained:
        assert not torch.equal(fit.state[key], twin.state[key]), key


@pytest.mark.parametrize("name", OWN)
def test_what_an_edit_begins_with_follows_the_seed_and_nothing_else(name: str, task: tasks.Task):
    """Also where the constructor draws, as torch's layers do, from the process's own generator."""

    def start(seeds: list[int], process_seed: int) -> list[dict]:
        with torch.random.fork_rng():
            torch.manual_seed(process_seed)
            prepared = OWN[name].build(tiny.backbone("vit"), len(seeds))
            prepared.start(seeds)
            assert torch.initial_seed() == process_seed
            assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(process_seed)))
            return [prepared.state(k) for k in range(len(seeds))]

    first, second = start([0, 1], 5), start([1], 99)
    assert all(torch.equal(value, second[0][key]) for key, value in first[1].items())
    assert not all(torch.equal(value, first[0][key]) for key, value in first[1].items())


@pytest.mark.parametrize("name", OWN)
def test_the_cache_changes_nothing(name: str, fits_of, task: tasks.Task):
    plain = training.fit(tiny.backbone("vit"), task, OWN[name], BUNDLE, recipe=replace(RECIPE, cache=False))
    for fit, other in zip(fits_of(name), plain, strict=True):
        assert fit.cache_bytes > 0 == other.cache_bytes
        torch.testing.assert_close(fit.train_curve, other.train_curve, **CLOSE)
        torch.testing.assert_close(fit.state, other.state, **CLOSE)


@pytest.mark.parametrize(
    "name", [name for name in EVERY if name not in ("linear_probe", "random_prompt", "site_probe")]
)
def test_the_number_of_parameters_is_known_before_training(name: str, fits_of):
    backbone, method = tiny.backbone("vit"), EVERY[name]
    fit = fits_of(name)[0]
    before = method.build(backbone, 1)
    before.start([0])
    start = before.state(0)
    moved = sum(value.numel() for key, value in fit.state.items() if not torch.equal(value, start[key]))
    # A key's bias has no gradient, and a mask generator none outside of the frame.
    assert moved >= 0.9 * method.num_parameters(backbone) or name == "adavipro"


def test_the_number_of_parameters_is_what_one_counts_by_hand():
    width, blocks, backbone = 32, 3, tiny.backbone("vit")
    block = 2 * 2 * width + 4 * width * width + 4 * width + 2 * 4 * width * width + 5 * width
    counts = {
        "ap": 17 * width,
        "ap channel": width,
        "norm": 2 * 2 * width,
        "norm gamma": (2 * blocks + 1) * width,
        "linear_probe": 0,
        "random_prompt": 0,
        "partial": block + 2 * width,
        "fine_tuning": blocks * block + 2 * width + width + 17 * width + 3 * 8 * 8 * width + width,
        "adapter": 2 * 4 * width + 4 + width,
        "vpt_deep": blocks * 3 * width,
        "low_rank": 2 * (width + 3 * width) + 2 * (width + 4 * width),
    }
    assert {name: EVERY[name].num_parameters(backbone) for name in counts} == counts


# ------------------------------------------------------------------------------------------ one stack for all edits


def stacked(kind: type[edits.Stack], some: list[Edit], z: torch.Tensor, generators: list | tuple = ()) -> tuple:
    """Output, gradients and state of a stack of copies of these edits."""
    stack = kind([copy.deepcopy(edit) for edit in some])
    stack.place = "here:input"
    stack.is_calibrating = True
    stack(z)
    stack.is_calibrating = False
    stack.generators = generators
    output = stack(z)
    output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in stack.stacked.named_parameters()}
    return output.detach(), gradients, [stack.state(k) for k in range(len(some))]


def random_shift(seed: int, **fields: object) -> edits.Shift:
    shift = edits.Shift((6, 5), **fields)
    nn.init.normal_(shift.values, generator=torch.Generator().manual_seed(seed))
    return shift


def random_affine(seed: int, parameters: str) -> edits.Affine:
    norm = nn.LayerNorm(5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 0.5, 2.0, -1.0, 0.3]))
        norm.bias.copy_(torch.tensor([0.1, -0.5, 0.0, 1.0, 0.3]))
    affine = edits.Affine(norm, (1, 5), parameters, "norm")
    for parameter in affine.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    return affine


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda seed: random_shift(seed),
        lambda seed: random_shift(seed, in_rms_units=False),
        *(lambda seed, kind=kind: random_affine(seed, kind) for kind in ("gamma", "beta", "both")),
    ],
)
def test_the_fast_stacks_are_the_general_one(make, autocast: bool):
    some = [make(seed) for seed in range(3)]
    z = torch.randn(12, 6, 5, generator=torch.Generator().manual_seed(9))
    z = z.bfloat16() if autocast else z
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fast, general = stacked(type(some[0]).stack, some, z), stacked(edits.Stack, some, z)
    assert type(some[0]).stack is not edits.Stack
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(fast, general, **tolerance)
    for k, edit in enumerate(some):  # and both are the edits themselves
        own = copy.deepcopy(edit)
        own.calibrate(z[4 * k : 4 * k + 4])
        torch.testing.assert_close(fast[0][4 * k : 4 * k + 4], own(z[4 * k : 4 * k + 4]).detach(), **tolerance)


def test_a_general_stack_draws_calibrates_and_moves_on_each_edit_by_itself():
    some = [Noisy(5) for _ in range(3)]
    for seed, edit in enumerate(some):
        edit.start(torch.Generator().manual_seed(seed))
    z = torch.randn(12, 6, 5, generator=torch.Generator().manual_seed(9)) * torch.arange(1, 13).view(-1, 1, 1)
    stack = edits.Stack([copy.deepcopy(edit) for edit in some])
    stack.is_calibrating = True
    stack(z)
    stack.is_calibrating = False
    stack.begin_epoch(3, 10)
    stack.generators = [torch.Generator().manual_seed(20 + k) for k in range(3)]
    output = stack(z)
    for k, edit in enumerate(some):
        part = z[4 * k : 4 * k + 4]
        edit.calibrate(part)
        edit.begin_epoch(3, 10)
        noise = edit.draw(part, torch.Generator().manual_seed(20 + k))
        torch.testing.assert_close(output[4 * k : 4 * k + 4], edit(part, noise))
        torch.testing.assert_close(stack.state(k)["scale"], part.abs().mean())
    stack.generators = ()
    torch.testing.assert_close(stack(z)[:4], some[0](z[:4]))


class Scaled(methods.Shift):
    """Another edit that is made from a shift."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z * (1 + self.values)


def test_an_edit_that_is_made_from_another_has_no_stack_that_ignores_it():
    class Drawn(methods.Shift):
        def __init__(self) -> None:
            super().__init__((6, 5))
            nn.init.normal_(self.values)

    class Same(methods.Shift):
        """Is a shift, and nothing else."""

    assert Scaled.stack is Drawn.stack is edits.Stack
    assert not Drawn.stack.constructed_alike
    assert Same.stack is methods.Shift.stack is not edits.Stack
    some = [Scaled((6, 5)) for _ in range(2)]
    for edit in some:
        nn.init.normal_(edit.values)
    z = torch.randn(4, 6, 5)
    stack = Scaled.stack([copy.deepcopy(edit) for edit in some])
    torch.testing.assert_close(stack(z)[2:], some[1](z[2:]))


def test_an_edit_is_in_train_mode_in_training_steps_alone():
    class Told(Noisy):
        def forward(self, z: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
            return torch.full_like(z, float(self.training))

    stack = edits.Stack([Told(5) for _ in range(2)])
    assert not stack(torch.zeros(2, 5)).any()
    stack.generators = [torch.Generator() for _ in range(2)]
    assert stack(torch.zeros(2, 5)).all()
    assert not stack.export(0).training


class Forgetful(Noisy):
    """Keeps what it measures where no file would find it."""

    def calibrate(self, z: torch.Tensor) -> None:
        self.size = float(z.abs().mean())


class Lucky(Noisy):
    """Draws what it keeps in a plain attribute."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.size = float(torch.rand(()))


class Plain(Noisy):
    """Holds a tensor that is neither parameter nor buffer."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.size = torch.randn(width)


class Scheduled(Noisy):
    """Its schedule is lost when it is used."""

    def begin_epoch(self, epoch: int, num_epochs: int) -> None:
        self.epoch = epoch


class Dropping(Noisy):
    """Draws from the process's own generator."""

    def forward(self, z: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        return nn.functional.dropout(super().forward(z), training=self.training)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (Forgetful, "calibrate of Forgetful sets size to .*keep it in a buffer"),
        (Lucky, "size of Lucky is .* for one configuration and .* for another"),
        (Plain, "size of Plain is a plain tensor; keep it in a buffer"),
        (Scheduled, "begin_epoch of Scheduled sets epoch to 0"),
        (Dropping, "Dropping draws at random in forward, which would ignore the seed"),
    ],
)
def test_values_that_a_stack_or_a_file_would_lose_are_an_error(kind: type[Edit], fault: str, task: tasks.Task):
    class Tuning(NoisyTuning):
        def edits(self, backbone: nn.Module) -> dict[str, Edit]:
            return {self.site: kind(32)}

    with pytest.raises(ValueError, match=fault):
        training.fit(tiny.backbone("vit"), task, Tuning(), BUNDLE, recipe=RECIPE)


def test_an_edit_may_change_the_number_of_tokens():
    stack = edits.Stack([Tokens(2, 5, is_first=True) for _ in range(2)])
    assert stack(torch.zeros(6, 4, 5)).shape == (6, 6, 5)


def test_layers_wrapped_by_an_edit_see_their_input():
    """A low-rank map beside the layer is the layer with other weights."""
    backbone, x = tiny.backbone("vit"), tiny.images("vit", 2)
    prepared = LowRankTuning().build(backbone, 2)
    with torch.no_grad():
        for stack in prepared.stacks.values():
            nn.init.normal_(stack.stacked.b, std=0.3, generator=torch.Generator().manual_seed(1))
        together = prepared.suffix(*(torch.cat([z, z]) for z in prepared.prefix(x)))
        for k in range(2):
            own = copy.deepcopy(backbone)
            for stack in prepared.stacks.values():
                for name, value in stack.weights(k).items():
                    own.get_parameter(name).copy_(value)
            torch.testing.assert_close(together[2 * k : 2 * k + 2], own(x), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(own(x), backbone(x), rtol=1e-2)


@pytest.mark.parametrize(("place", "fault"), [("blocks.1:input", "acts on an output"), ("blocks.1", "has no edge")])
def test_an_edit_at_a_place_where_it_cannot_be_is_an_error(place: str, fault: str):
    class Misplaced(LowRankTuning):
        def edits(self, backbone: nn.Module) -> dict[str, Edit]:
            return {place: LowRank(backbone.blocks[1].attn.qkv, "blocks.1.attn.qkv")}

    with pytest.raises(ValueError, match=fault):
        Misplaced().build(tiny.backbone("vit"), 1)


# ------------------------------------------------------------------------------------------ what was trained is used


@pytest.mark.parametrize("name", EVERY)
def test_every_method_is_exported_saved_loaded_and_evaluated_alike(
    name: str, fits_of, task: tasks.Task, tmp_path: Path
):
    backbone = tiny.backbone("vit")
    fits = fits_of(name)
    whole = replace(task, test=tasks.Images(task.test.pixels[fits[0].split.test], task.test.labels[fits[0].split.test]))
    x = training.run_prefix(backbone, nn.Sequential(), task.test, "float32", fits[0].split.test)
    x = torch.stack(x)
    for fit, evaluation in zip(fits, training.evaluate(fits, task), strict=True):
        loaded = files.load_prompt(fit.save(tmp_path / "saved.safetensors"), backbone)
        assert loaded.classes == task.classes
        with torch.no_grad():
            logits = fit.model(x)
            assert torch.equal(loaded(x), logits)
            torch.testing.assert_close(loaded.merged()(x), logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(logits.argmax(1) == whole.test.labels, evaluation.correct)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        again = training.evaluate(loaded, whole)
        assert abs(again.accuracy - evaluation.accuracy) <= 5  # one image of twenty, where bfloat16 is used


def test_what_needs_no_layer_of_its_own_becomes_weights(fits_of):
    """Tuned normalization, low-rank maps and tuned weights cost nothing when used: there is no edit left."""
    for name in ("norm", "norm gamma", "low_rank", "fine_tuning", "partial"):
        model = fits_of(name)[0].model
        assert model.places == ()
        assert model.weights
        backbone = model.merged()[0]
        assert type(backbone) is type(tiny.backbone("vit"))


@pytest.mark.parametrize("name", ["ap channel", "norm", "low_rank", "fine_tuning", "linear_probe"])
def test_what_folds_leaves_the_backbone_as_it_is_built(name: str, fits_of):
    backbone, model, x = tiny.backbone("vit"), fits_of(name)[0].model, tiny.images("vit", 2)
    folded = equivalence.fold(model)
    assert [type(module) for module in folded[0].modules()] == [type(module) for module in backbone.modules()]
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
        assert name == "linear_probe" or not torch.allclose(folded[0](x), backbone(x), rtol=1e-3)


def test_a_merged_and_a_folded_model_share_nothing_with_the_backbone(fits_of):
    backbone = tiny.backbone("vit")
    own = {parameter.data_ptr() for parameter in backbone.parameters()}
    for name in ("ap channel", "norm", "adapter", "vp"):
        merged = fits_of(name)[0].model.merged()
        assert not own & {parameter.data_ptr() for parameter in merged.parameters()}, name
    assert not own & {parameter.data_ptr() for parameter in equivalence.fold(fits_of("norm")[0].model).parameters()}


def test_all_that_was_tuned_is_in_the_state_of_the_model(fits_of):
    first, second = (fit.model for fit in fits_of("fine_tuning"))
    x = tiny.images("vit", 2)
    model = copy.deepcopy(first)
    model.load_state_dict(second.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x), second(x))
        assert not torch.equal(model(x), first(x))


def test_a_backbone_in_double_precision_is_adapted(task: tasks.Task):
    backbone = tiny.backbone("vit", torch.float64)
    fit = training.fit(backbone, task, SHIPPED["ap"], recipe=RECIPE)
    with torch.no_grad():
        logits = fit.model(tiny.images("vit", 2, dtype=torch.float64))
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()


def test_loading_leaves_the_backbone_as_it_was(fits_of, tmp_path: Path):
    backbone = tiny.backbone.__wrapped__("vit")
    path = fits_of("ap")[0].save(tmp_path / "saved.safetensors")
    backbone.train().requires_grad_(True)
    loaded = files.load_prompt(path, backbone)
    assert backbone.training
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(part.training for part in (loaded.edits, loaded.head))


def test_several_prompts_have_no_one_norm(task: tasks.Task):
    class Two(methods.ActivationPrompting):
        def edits(self, backbone: nn.Module) -> dict[str, Edit]:
            return {site: methods.Shift((17, 32)) for site in ("blocks.1:input", "blocks.2:input")}

    assert math.isnan(training.fit(tiny.backbone("vit"), task, Two(site="blocks.1:input"), recipe=RECIPE).prompt_norm)


def test_a_fixed_prompt_is_in_its_file_and_not_drawn_again(fits_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fit = fits_of("random_prompt")[0]
    assert list(fit.state) == ["blocks.1:input.delta"]
    path, x = fit.save(tmp_path / "saved.safetensors"), tiny.images("vit", 2)
    with torch.no_grad():
        logits = fit.model(x)
        monkeypatch.setattr(torch, "randn", lambda *shape, **options: torch.ones(*shape))  # another generator
        assert torch.equal(files.load_prompt(path, tiny.backbone("vit"))(x), logits)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("ap", "no bias near 'blocks.1:input' equals this prompt"),
        ("adapter", "the Adapter at 'blocks.1:input' is no prompt that a bias could hold"),
        ("site_probe", "does not run the whole backbone"),
    ],
)
def test_what_does_not_fold_is_an_error(name: str, fault: str, fits_of):
    with pytest.raises(ValueError, match=fault):
        equivalence.fold(fits_of(name)[0].model)


def test_partial_tuning_changes_what_comes_after_its_site_and_nothing_else(fits_of):
    model = fits_of("partial")[0].model
    assert {name.split(".")[0] for name in model.weights} == {"blocks", "norm"}
    assert {name.split(".")[1] for name in model.weights if name.startswith("blocks")} == {"2"}
    assert set(fits_of("fine_tuning")[0].model.weights) == set(dict(tiny.backbone("vit").named_parameters()))


@pytest.mark.slow
def test_saved_files_of_every_method_give_equal_logits_in_a_fresh_process(fits_of, tmp_path: Path):
    names = list(EVERY)
    backbone = tiny.backbone("vit")
    expected = {}
    x = tiny.images("vit", 3)
    for name in names:
        path = fits_of(name)[0].save(tmp_path / f"{name.replace(' ', '_')}.safetensors")
        with torch.no_grad():
            expected[path.name] = fits_of(name)[0].model(x)
    torch.save({"x": x, "expected": expected, "state": backbone.state_dict()}, tmp_path / "expected.pt")
    code = f"""
        import sys, torch
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
        import tiny, apthory, test_protocol
        from apthory import methods
        for kind in ("AdapterTuning", "DeepPromptTuning", "LowRankTuning", "NoisyTuning"):
            methods.register(getattr(test_protocol, kind))
        given = torch.load({str(tmp_path / "expected.pt")!r})
        backbone = tiny.backbone("vit")
        backbone.load_state_dict(given["state"])
        for name, logits in given["expected"].items():
            model = apthory.load_prompt({str(tmp_path)!r} + "/" + name, backbone)
            with torch.no_grad():
                assert torch.equal(model(given["x"]), logits), name
            print(name)
    """
    shown = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split() == list(expected)


# ------------------------------------------------------------------------------------------ registry and traps


def test_a_name_belongs_to_one_method():
    with pytest.raises(ValueError, match="the name 'ap' belongs to ActivationPrompting; give another one"):
        methods.register(type("Other", (Method,), {"name": "ap"}))
    assert methods.register(AdapterTuning) is AdapterTuning  # again is no harm


@pytest.mark.parametrize(
    ("old", "new"), [("linear", "linear_probe"), ("random", "random_prompt"), ("full", "fine_tuning")]
)
def test_an_old_name_of_a_method_finds_it(old: str, new: str):
    with pytest.warns(DeprecationWarning, match=f"the method '{old}' is '{new}' now"):
        assert registry.METHODS[old] is registry.METHODS[new]
    assert old not in registry.METHODS
    with pytest.raises(KeyError):
        _ = registry.METHODS["lora"]


def test_a_method_that_is_not_registered_is_not_saved(fits_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fit = fits_of("adapter")[0]
    monkeypatch.setattr(registry, "METHODS", {"ap": methods.ActivationPrompting})
    with pytest.raises(ValueError, match=r"AdapterTuning is not registered.*methods.register"):
        fit.save(tmp_path / "saved.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_method_that_is_not_known_says_what_to_import(fits_of, tmp_path: Path, monkeypatch):
    path = fits_of("adapter")[0].save(tmp_path / "saved.safetensors")
    monkeypatch.setattr(registry, "METHODS", {"ap": methods.ActivationPrompting})
    with pytest.raises(ValueError, match=r"by the method 'adapter', which is not known here .*import the module that"):
        files.load_prompt(path, tiny.backbone("vit"))


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        ([Adapter(32, 2)], "expected a dict of ap.Edit by their places"),
        ({"blocks.1:input": nn.Identity()}, "expected a dict of ap.Edit by their places"),
        ({"blocks.1:input": Tokens(1, 32, True)}, ""),
    ],
)
def test_what_edits_gives_is_checked(made: object, fault: str):
    class Made(NoisyTuning):
        def edits(self, backbone: nn.Module) -> object:
            return made

    if fault:
        with pytest.raises(ValueError, match=fault):
            Made().build(tiny.backbone("vit"), 2)
    else:
        Made().build(tiny.backbone("vit"), 2)


def test_an_edit_that_loses_the_batch_is_an_error():
    class Mean(Noisy):
        def forward(self, z: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
            return z.mean(0, keepdim=True)

    with pytest.raises(ValueError, match=r"was given \(3, 5\) and gave \(1, 5\); the first axis counts images"):
        edits.Stack([Mean(5), Mean(5)])(torch.zeros(6, 5))


@pytest.mark.parametrize("lacking", ["name", "site"])
def test_a_method_without_name_or_site_says_so(lacking: str, task: tasks.Task):
    fields = {"name": "mine", "site": ":input"}
    mine = type("Mine", (Method,), {key: value for key, value in fields.items() if key != lacking})
    with pytest.raises(ValueError, match=f"Mine has no {lacking}; a method has a name"):
        training.fit(tiny.backbone("vit"), task, mine(), recipe=RECIPE)


def test_a_fit_is_evaluated_at_its_own_size_alone(fits_of):
    for fits in (fits_of("ap channel"), fits_of("ap channel")[0], fits_of("ap channel")[0].model):
        with pytest.raises(ValueError, match="the task's images are 64 pixels wide, the backbone takes 32"):
            training.evaluate(fits, tiny.task(60, 30, 64))


class Doubled(nn.Module):
    """A prefix of one's own, without a fingerprint."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.factor * x,)


def test_a_cache_refuses_another_prefix_of_the_same_class(task: tasks.Task):
    backbone, cache, prefix = tiny.backbone("vit"), training.PrefixCache(), Doubled(2.0)
    cache.extend(backbone, prefix, task.train, torch.tensor([0, 1]), "float32")
    cache.extend(backbone, prefix, task.train, torch.tensor([2]), "float32")  # the same object
    before = cache.num_bytes
    with pytest.raises(ValueError, match="results of another prefix"):
        cache.extend(backbone, Doubled(3.0), task.train, torch.tensor([0, 3]), "float32")
    assert cache.num_bytes == before
