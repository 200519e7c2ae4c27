"""Claims about training: the fast loop is the plain loop, bundles do not mix, the test part stays unseen."""

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import reference
import tiny
import torch
from torch import nn

from apthory import backbones, heads, methods, sites, tasks, training
from apthory.methods import ActivationPrompting, FineTuning, FixedPrompt, LinearProbe, Method, NormTuning, files
from apthory.training import Configuration, Fit, FrozenHead, Recipe, fitting
from apthory.training import cache as training_cache
from apthory.training.optimizer import Optimizer

RECIPE = Recipe(num_epochs=3, batch_size=16, num_train=40, num_validation=12, num_test=20, precision="float32")
SITE = {"vit": "blocks.1:input", "resnet": "layer2.0:input"}
# Batches of another size are summed in another order; over the steps of RECIPE that grows to no more than this.
CLOSE = {"rtol": 2e-3, "atol": 2e-4}


@pytest.fixture(scope="module")
def task() -> tasks.Task:
    return tiny.task(60, 30)


def assert_same_fit(fit: Fit, other: Fit, exact: bool = False) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exact else CLOSE
    assert fit.configuration == other.configuration
    assert fit.epoch == other.epoch
    assert fit.validation_curve == other.validation_curve
    assert fit.state.keys() == other.state.keys()
    for name in ("train_curve", "validation_loss", "prompt_norm", "relative_norm"):
        torch.testing.assert_close(torch.tensor(getattr(fit, name)), torch.tensor(getattr(other, name)), **tolerance)
    torch.testing.assert_close(fit.state, other.state, **tolerance)  # names the parameter that differs
    torch.testing.assert_close(fit.head_state, other.head_state, **tolerance)


# ---------------------------------------------------------------------------------- the plain loop


PLAIN = {
    "ap full vit": ("vit", ActivationPrompting(site="blocks.1:input"), "adamw"),
    "ap full vit sgd": ("vit", ActivationPrompting(site="blocks.1:input"), "sgd"),
    "ap channel resnet": ("resnet", ActivationPrompting(site="layer2.0:input", shape="channel"), "adamw"),
    "ap inside a branch": ("vit", ActivationPrompting(site="blocks.1.norm1:output"), "sgd"),
    "ap absolute": ("vit", ActivationPrompting(site="blocks.0:input", in_rms_units=False, lr_scale=3.0), "sgd"),
    "vp": ("resnet", ActivationPrompting(site=":input"), "sgd"),
    "norm vit": ("vit", NormTuning(site="blocks.1:input"), "adamw"),
    "gamma resnet": ("resnet", NormTuning(site="layer2.0:input", parameters="gamma"), "sgd"),
    "beta vit": ("vit", NormTuning(site="blocks.2:output", parameters="beta"), "sgd"),
    "linear vit": ("vit", LinearProbe(), "adamw"),
    "linear sgd": ("resnet", LinearProbe(), "sgd"),
    "site probe vit": ("vit", LinearProbe(site="blocks.1:input"), "sgd"),
    "site probe resnet": ("resnet", LinearProbe(site="layer2.0:input"), "adamw"),
    "full vit": ("vit", FineTuning(), "sgd"),
    "full resnet": ("resnet", FineTuning(), "adamw"),
}


@pytest.mark.parametrize("case", PLAIN)
def test_the_bundled_cached_loop_is_the_plain_loop(case: str, task: tasks.Task):
    family, method, optimizer = PLAIN[case]
    backbone = tiny.backbone(family)
    recipe = replace(RECIPE, optimizer=optimizer)
    rates = (2e-2, 5e-3) if optimizer == "adamw" else (5e-2, 1e-2)
    bundle = [Configuration(learning_rate=r, weight_decay=1e-2, seed=s) for s, r in enumerate(rates)]
    fits = training.fit(backbone, task, method, bundle, recipe=recipe)
    evaluations = training.evaluate(fits, task)
    for fit, evaluation, configuration in zip(fits, evaluations, bundle, strict=True):
        plain = reference.fit(backbone, task, method, configuration, recipe)
        assert fit.train_curve == pytest.approx(plain.train_curve, rel=1e-3, abs=1e-4)
        assert fit.train_curve[-1] < fit.train_curve[0]
        assert fit.validation_curve == pytest.approx(plain.validation_curve, abs=1e-4)
        assert fit.epoch == plain.epoch
        assert fit.validation_accuracy == pytest.approx(plain.validation_accuracy, abs=1e-4)
        assert fit.validation_loss == pytest.approx(plain.validation_loss, rel=2e-3)
        assert torch.equal(evaluation.correct, plain.correct)
        assert evaluation.accuracy == pytest.approx(100 * plain.correct.float().mean().item(), abs=1e-4)
        if plain.prompt is not None:
            torch.testing.assert_close(fit.state[f"{fit.method.site}.values"], plain.prompt, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_optimizer_is_that_of_torch(optimizer: str):
    """Two configurations with their own rate and decay, against torch.optim with a cosine after warm-up."""
    recipe = Recipe(optimizer=optimizer, warmup=0.25)
    configurations = [Configuration(learning_rate=0.1, weight_decay=0.3), Configuration(learning_rate=0.02)]
    stack = methods.Shift.stack([methods.Shift((3, 5), lr_scale=4.0) for _ in range(2)])
    edit = stack.stacked
    body = methods.PreparedBackbone(nn.Identity(), nn.Identity(), {"blocks.1:input": stack})
    linear = heads.LinearHeads(2, 5, 3, [torch.Generator().manual_seed(k) for k in range(2)])
    with torch.no_grad():
        edit.values.normal_(generator=torch.Generator().manual_seed(7))
    plain = [[nn.Parameter(p[k].detach().clone()) for p in (edit.values, linear.weight, linear.bias)] for k in range(2)]
    own = Optimizer(body, linear, configurations, recipe)
    theirs, schedulers = [], []
    for c, (values, weight, bias) in zip(configurations, plain, strict=True):
        groups = [{"params": [values], "lr": 4 * c.learning_rate}, {"params": [weight, bias], "lr": c.learning_rate}]
        theirs.append(reference.make_optimizer(groups, c.weight_decay, recipe))
        lambda_ = lambda step: reference.schedule((step + 1) / 12, 0.25)  # noqa: E731
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(theirs[-1], lambda_))
    for step in range(12):
        random = torch.Generator().manual_seed(step)
        for index, parameter in enumerate((edit.values, linear.weight, linear.bias)):
            parameter.grad = torch.randn(parameter.shape, generator=random)
            for k in range(2):
                plain[k][index].grad = parameter.grad[k].clone()
        own.step((step + 1) / 12)
        for one, scheduler in zip(theirs, schedulers, strict=True):
            one.step()
            scheduler.step()
        for k in range(2):
            for parameter, expected in zip((edit.values, linear.weight, linear.bias), plain[k], strict=True):
                torch.testing.assert_close(parameter[k], expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------- bundles


BUNDLE = [
    Configuration(learning_rate=3e-2, weight_decay=1e-3, seed=0),
    Configuration(learning_rate=1e-3, seed=0),
    Configuration(learning_rate=3e-2, seed=1),
    Configuration(learning_rate=1e-2, weight_decay=0.1, seed=5),
]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_a_bundle_gives_each_configuration_the_result_it_gets_alone(family: str, optimizer: str, task: tasks.Task):
    method = ActivationPrompting(site=SITE[family])
    recipe = replace(RECIPE, optimizer=optimizer)
    together = training.fit(tiny.backbone(family), task, method, BUNDLE, recipe=recipe)
    evaluations = training.evaluate(together, task)
    for configuration, fit, evaluation in zip(BUNDLE, together, evaluations, strict=True):
        (alone,) = training.fit(tiny.backbone(family), task, method, [configuration], recipe=recipe)
        assert_same_fit(fit, alone)
        assert torch.equal(training.evaluate(alone, task).correct, evaluation.correct)


@pytest.mark.parametrize("method", [NormTuning(site="blocks.1:input"), FineTuning(), LinearProbe()])
def test_other_methods_bundle_as_well(method: Method, task: tasks.Task):
    recipe = replace(RECIPE, optimizer="sgd")
    together = training.fit(tiny.backbone("vit"), task, method, BUNDLE[::2], recipe=recipe)
    for configuration, fit in zip(BUNDLE[::2], together, strict=True):
        assert_same_fit(fit, training.fit(tiny.backbone("vit"), task, method, [configuration], recipe=recipe)[0])


def test_a_diverging_configuration_leaves_its_bundle_alone(task: tasks.Task):
    method = ActivationPrompting(site="blocks.1:input")
    recipe = replace(RECIPE, optimizer="sgd")
    wild = Configuration(learning_rate=1e38)  # ten times that is infinite
    lost, fine = training.fit(tiny.backbone("vit"), task, method, [wild, BUNDLE[0]], recipe=recipe)
    assert not all(map(math.isfinite, lost.train_curve))
    assert_same_fit(fine, training.fit(tiny.backbone("vit"), task, method, [BUNDLE[0]], recipe=recipe)[0])
    assert training.choose([lost, fine]) is fine


def test_no_finite_loss_at_all_is_an_error(task: tasks.Task):
    wild = [Configuration(learning_rate=1e38), Configuration(learning_rate=2e38)]
    recipe = replace(RECIPE, optimizer="sgd")
    with pytest.raises(ValueError, match=r"learning rates 1e\+38, 2e\+38.*finite loss; choose lower rates"):
        training.fit(tiny.backbone("vit"), task, ActivationPrompting(site="blocks.1:input"), wild, recipe=recipe)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_the_cache_changes_nothing(family: str, task: tasks.Task):
    for method in (ActivationPrompting(site=SITE[family]), FixedPrompt(site=SITE[family], norm=5.0), LinearProbe()):
        cached = training.fit(tiny.backbone(family), task, method, BUNDLE[:2], recipe=RECIPE)
        plain = training.fit(tiny.backbone(family), task, method, BUNDLE[:2], recipe=replace(RECIPE, cache=False))
        for one, other in zip(cached, plain, strict=True):
            assert one.cache_bytes > 0 == other.cache_bytes
            assert_same_fit(one, other)


def test_the_cache_holds_every_image_once_and_its_bytes_are_counted(task: tasks.Task):
    cache = training.PrefixCache()
    method = ActivationPrompting(site="blocks.1.norm1:output")
    (first,) = training.fit(tiny.backbone("vit"), task, method, BUNDLE[:1], recipe=RECIPE, cache=cache)
    used = torch.cat([first.split.train, first.split.validation])
    image = 2 * 17 * 32 * 4  # the norm's output and the skip beside it
    assert first.cache_bytes == cache.num_bytes == len(used.unique()) * image
    training.fit(tiny.backbone("vit"), task, method, BUNDLE[:1], recipe=RECIPE, cache=cache)
    assert cache.num_bytes == first.cache_bytes
    training.fit(tiny.backbone("vit"), task, method, BUNDLE[2:3], recipe=RECIPE, cache=cache)
    other = task.split(1, RECIPE.num_train, RECIPE.num_validation)
    assert cache.num_bytes == len(torch.cat([used, other.train, other.validation]).unique()) * image


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (LinearProbe(site="blocks.1:input"), LinearProbe(site="blocks.2:input")),
        (FixedPrompt(site="blocks.1:input", norm=1.0), FixedPrompt(site="blocks.1:input", norm=2.0)),
    ],
)
def test_a_cache_of_another_probe_or_fixed_prompt_is_refused(first: Method, other: Method, task: tasks.Task):
    cache, recipe = training.PrefixCache(), replace(RECIPE, num_epochs=1)
    for _ in range(2):
        training.fit(tiny.backbone("vit"), task, first, BUNDLE[:1], recipe=recipe, cache=cache)
    with pytest.raises(ValueError, match="results of another prefix"):
        training.fit(tiny.backbone("vit"), task, other, BUNDLE[:1], recipe=recipe, cache=cache)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_cache_gives_the_prefix_of_each_image_in_any_order(family: str):
    backbone, size = tiny.backbone(family), tiny.images(family, 1).shape[-1]
    images = tiny.task(30, 6, size).train
    prefix, suffix = sites.split(backbone, sites.list_sites(backbone)[2])
    cache = training.PrefixCache()
    cache.extend(backbone, prefix, images, torch.tensor([5, 1, 9, 1]), "float32")
    cache.extend(backbone, prefix, images, torch.tensor([9, 20, 0]), "float32")
    for chosen in ([20, 1, 1, 5], [0], [9, 5, 20]):
        x = reference.normalized(backbone, images, torch.tensor(chosen))
        crossing = cache.get(torch.tensor(chosen))
        with torch.no_grad():
            for z, expected in zip(crossing, prefix(x), strict=True):
                torch.testing.assert_close(z, expected, rtol=2e-5, atol=2e-5)
            torch.testing.assert_close(suffix(*crossing), backbone(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_the_same_seed_gives_the_same_bits(family: str, task: tasks.Task):
    method = ActivationPrompting(site=SITE[family])
    first, second = (training.fit(tiny.backbone(family), task, method, BUNDLE, recipe=RECIPE) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_same_fit(one, other, exact=True)


def test_the_results_do_not_depend_on_the_state_of_the_process(task: tasks.Task):
    method = ActivationPrompting(site="blocks.1:input")
    (one,) = training.fit(tiny.backbone("vit"), task, method, BUNDLE[:1], recipe=RECIPE)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        before = torch.get_rng_state()
        (other,) = training.fit(tiny.backbone("vit"), task, method, BUNDLE[:1], recipe=RECIPE)
        assert torch.equal(torch.get_rng_state(), before)
    assert_same_fit(one, other, exact=True)


def test_another_seed_gives_other_images_and_another_head(task: tasks.Task):
    method = ActivationPrompting(site="blocks.1:input")
    one, other = training.fit(tiny.backbone("vit"), task, method, BUNDLE[::2], recipe=RECIPE)
    assert not torch.equal(one.split.train, other.split.train)
    assert torch.equal(one.split.test, other.split.test)
    assert not torch.equal(one.head.weight, other.head.weight)


# ---------------------------------------------------------------------------------- what is trained


@dataclass(frozen=True, kw_only=True)
class Spied(ActivationPrompting):
    """Keeps the body that it builds, in a list so that the class stays frozen."""

    seen: tuple[list, ...] = ([],)

    def build(self, backbone: nn.Module, num: int) -> methods.PreparedBackbone:
        body = super().build(backbone, num)
        self.seen[0].append(body)
        return body


def test_only_prompt_and_head_receive_gradients(task: tasks.Task, monkeypatch: pytest.MonkeyPatch):
    backbone, method = tiny.backbone("resnet"), Spied(site="layer2.0:input", seen=([],))
    got: set[str] = set()
    step = Optimizer.step

    def spy(self: Optimizer, progress: float) -> None:
        got.update(name for name, p in backbone.named_parameters() if p.grad is not None)
        got.update(str(tuple(p.shape)) for p, _, _ in self.parameters if p.grad is not None)
        step(self, progress)

    monkeypatch.setattr(Optimizer, "step", spy)
    before = backbones.digest(backbone)
    training.fit(backbone, task, method, BUNDLE[:2], recipe=RECIPE)
    assert got == {"(2, 8, 8, 8)", "(2, 32, 3)", "(2, 1, 3)"}  # prompts, heads' weights and biases
    (body,) = method.seen[0]
    wanted = {name for name, p in body.suffix.named_parameters() if p.requires_grad}
    assert wanted == {"edit_0.stacked.values"}
    assert backbones.digest(backbone) == before
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("method", [FineTuning(), NormTuning(site="layer2.0:input"), LinearProbe()])
def test_no_method_changes_the_backbone(method: Method, task: tasks.Task):
    backbone = tiny.backbone("resnet")
    before = backbones.digest(backbone)
    fits = training.fit(backbone, task, method, BUNDLE[:2], recipe=RECIPE)
    training.evaluate(fits, task)
    assert backbones.digest(backbone) == before
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    assert not backbone.training


@dataclass(frozen=True, kw_only=True)
class Vandal(ActivationPrompting):
    def build(self, backbone: nn.Module, num: int) -> methods.PreparedBackbone:
        body = super().build(backbone, num)
        bias = next(p for name, p in backbone.named_parameters() if name == "norm.bias")

        def damage(module: nn.Module, args: tuple, output: tuple) -> None:
            bias.data.add_(1e-3)

        body.prefix.register_forward_hook(damage)
        return body


def test_a_backbone_that_changed_is_noticed(task: tasks.Task):
    backbone = tiny.backbone.__wrapped__("vit")  # its own copy, since it gets damaged
    with pytest.raises(RuntimeError, match="the frozen backbone changed during training"):
        training.fit(backbone, task, Vandal(site="blocks.1:input"), BUNDLE[:1], recipe=RECIPE)


@pytest.mark.parametrize("empty", [{"learning_rates": []}, {"seeds": []}])
def test_nothing_to_tune_is_an_error(empty: dict, task: tasks.Task):
    with pytest.raises(ValueError, match=r"\[\].*; expected one or more of each"):
        training.tune(tiny.backbone("vit"), task, LinearProbe(), **{"learning_rates": [0.1], "seeds": [0], **empty})


@pytest.mark.parametrize("head", ["iterative", torch.zeros(3), heads.LabelMapping])
def test_a_head_of_no_kind_is_an_error(head: object, task: tasks.Task):
    untyped = inspect.unwrap(training.fit)  # past the type checks of tests
    with pytest.raises(
        ValueError, match=r"head is .*; expected LinearHead\(\), LabelMapping\(classifier, ...\), FrozenHead\(fits\) or"
    ):
        untyped(tiny.backbone("resnet"), task, LinearProbe(), head=head)


def test_a_frozen_head_stays_at_the_weights_it_is_given(task: tasks.Task):
    backbone = tiny.backbone("vit")
    probes = training.fit(backbone, task, LinearProbe(), BUNDLE[:2], recipe=RECIPE)
    method = ActivationPrompting(site="blocks.1:input")
    fits = training.fit(backbone, task, method, BUNDLE[:2], recipe=RECIPE, head=FrozenHead(probes))
    for fit, probe in zip(fits, probes, strict=True):
        for name in ("weight", "bias", "unit"):
            assert torch.equal(fit.head_state[name], probe.head_state[name])
        assert fit.prompt.delta.abs().sum() > 0
        assert fit.head_spec == probe.head_spec
    trained = training.fit(backbone, task, method, BUNDLE[:2], recipe=RECIPE)
    assert not torch.equal(trained[0].head_state["weight"], probes[0].head_state["weight"])


def test_the_old_way_to_ask_for_a_frozen_head_gives_the_same(task: tasks.Task):
    backbone, recipe = tiny.backbone("vit"), replace(RECIPE, num_epochs=1)
    probes = training.fit(backbone, task, LinearProbe(), BUNDLE[:2], recipe=recipe)
    method = ActivationPrompting(site="blocks.1:input")
    new = training.fit(backbone, task, method, BUNDLE[:2], recipe=recipe, head=FrozenHead(probes))
    with pytest.warns(DeprecationWarning, match=r"heads of fit is head=FrozenHead\(fits\) now"):
        old = training.fit(backbone, task, method, BUNDLE[:2], recipe=recipe, heads=probes)
    for one, other in zip(old, new, strict=True):
        assert_same_fit(one, other, exact=True)
    with pytest.warns(DeprecationWarning, match="head of ActivationPrompting is an argument of fit"):
        assert ActivationPrompting(site="blocks.1:input", head="trained") == method
    with pytest.raises(ValueError, match=r"the head is no field of a method any more; give it to fit: head=FrozenHead"):
        ActivationPrompting(site="blocks.1:input", head="frozen")
    with (
        pytest.warns(DeprecationWarning, match="heads of fit"),
        pytest.raises(ValueError, match="have a LinearHead; head= asks for a TextHe"),
    ):
        training.fit(tiny.backbone("vit"), task, method, BUNDLE[:2], recipe=recipe, head=HEADS["text"], heads=probes)


def test_a_frozen_head_needs_a_fit_for_each_configuration(task: tasks.Task):
    backbone, method = tiny.backbone("vit"), ActivationPrompting(site="blocks.1:input")
    probes = training.fit(backbone, task, LinearProbe(), BUNDLE[:1], recipe=RECIPE)
    with pytest.raises(ValueError, match="FrozenHead has 1 fits for 2 configurations; give one for each"):
        training.fit(backbone, task, method, BUNDLE[:2], recipe=RECIPE, head=FrozenHead(probes))
    with pytest.raises(ValueError, match="FrozenHead has 1 fits for 2 seeds; give one for each"):
        training.tune(backbone, task, method, learning_rates=[0.1], seeds=[0, 1], head=FrozenHead(probes))
    with pytest.raises(ValueError, match="one kind of head; these have none"):
        FrozenHead([])


# ---------------------------------------------------------------------------------- kinds of heads


def source_classifier(num_classes: int = 7) -> nn.Linear:
    """A source classifier for the tiny ResNet's features."""
    layer = nn.Linear(32, num_classes).requires_grad_(False)
    generator = torch.Generator().manual_seed(4)
    layer.weight.copy_(torch.randn(num_classes, 32, generator=generator))
    layer.bias.copy_(torch.randn(num_classes, generator=generator))
    return layer


HEADS = {
    "mapping": heads.LabelMapping(source_classifier(), "iterative"),
    "mapping once": heads.LabelMapping(source_classifier(), "frequency"),
    "text": heads.TextHead(torch.randn(3, 32, generator=torch.Generator().manual_seed(5)), scale=20.0),
}


def test_a_linear_head_is_what_there_is_by_default(task: tasks.Task):
    method = ActivationPrompting(site=SITE["resnet"])
    (one,) = training.fit(tiny.backbone("resnet"), task, method, BUNDLE[:1], recipe=RECIPE)
    (other,) = training.fit(tiny.backbone("resnet"), task, method, BUNDLE[:1], recipe=RECIPE, head=heads.LinearHead())
    assert_same_fit(one, other, exact=True)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    "method", [ActivationPrompting(site="layer2.0:input"), methods.EVP(lr_scale=0.3), methods.AdaViPro(dim=4)]
)
def test_every_prompt_learns_under_every_head(kind: str, method: Method, task: tasks.Task, tmp_path: Path):
    """Bundled and alone are the same, and a prompt saved with its head gives the same logits when loaded.

    The untrained twin has the same start and learning rates too small to move by.
    """
    backbone, recipe = tiny.backbone("resnet"), replace(RECIPE, num_epochs=4)
    fits = training.fit(backbone, task, method, BUNDLE[1:3], recipe=recipe, head=HEADS[kind])
    still = [replace(one, learning_rate=1e-12, weight_decay=0.0) for one in BUNDLE[1:3]]
    twins = training.fit(backbone, task, method, still, recipe=recipe, head=HEADS[kind])
    if kind != "mapping":  # an iterative map moves with the prompt, and the loss is then another one
        assert fits[1].train_curve[-1] < 0.98 * twins[1].train_curve[-1]
    for fit, twin in zip(fits, twins, strict=True):
        learned = {name for name in fit.state if "norm" not in name and "unit" not in name}
        assert len(learned) == (5 if isinstance(method, methods.AdaViPro) else 1)
        for name in learned:
            assert float((fit.state[name] - twin.state[name]).norm()) > 1e-6 + 1e-3 * float(twin.state[name].norm()), (
                name
            )
    (alone,) = training.fit(backbone, task, method, BUNDLE[2:3], recipe=recipe, head=HEADS[kind])
    assert fits[1].train_curve == pytest.approx(alone.train_curve, rel=1e-3)
    torch.testing.assert_close(fits[1].state, alone.state, rtol=5e-3, atol=5e-4)
    torch.testing.assert_close(fits[1].head_state, alone.head_state, rtol=5e-3, atol=5e-4)
    for fit, evaluation in zip(fits, training.evaluate(fits, task), strict=True):
        x = reference.normalized(backbone, task.test, fit.split.test)
        loaded = files.load_prompt(fit.save(tmp_path / "prompt.safetensors"), backbone)
        with torch.no_grad():
            logits = fit.model(x)
            assert torch.equal(loaded(x), logits)
        assert torch.equal(logits.argmax(1) == task.test.labels[fit.split.test], evaluation.correct)


def test_a_mapping_starts_from_all_training_images_however_they_are_chunked(
    task: tasks.Task, monkeypatch: pytest.MonkeyPatch
):
    head = heads.LabelMapping(source_classifier(), "frequency")
    maps = []
    for chunk in (64, 7):
        monkeypatch.setattr(training_cache, "_IMAGES_AT_ONCE", chunk)
        bundle = training.Bundle(tiny.backbone("resnet"), task, LinearProbe(), BUNDLE[:3:2], RECIPE, head=head)
        maps.append(bundle.heads.map.clone())
    assert torch.equal(*maps)
    backbone = tiny.backbone("resnet")
    for k, split in enumerate(bundle.splits):
        x = reference.normalized(backbone, task.train, split.train)
        with torch.no_grad():
            predicted = head.classifier(backbone(x)).argmax(1)
        counts = torch.zeros(1, 3, 7, dtype=torch.long)
        for label, source in zip(task.train.labels[split.train].tolist(), predicted.tolist(), strict=True):
            counts[0, label, source] += 1
        assert torch.equal(maps[0][k], heads.assign(counts, "greedy")[0])


def test_tuning_and_halving_keep_the_head(task: tasks.Task):
    backbone, head = tiny.backbone("resnet"), HEADS["text"]
    method, recipe = ActivationPrompting(site="layer2.0:input"), replace(RECIPE, num_epochs=1)
    fits = training.tune(
        backbone, task, method, recipe=recipe, learning_rates=(1e-2, 3e-2), seeds=(0, 1), head=head, max_extensions=0
    )
    assert all(fit.head_spec is head for fit in fits)
    with pytest.warns(UserWarning, match="halved"):
        fits = training.fit(backbone, task, Hungry(site="layer2.0:input"), BUNDLE[:2], recipe=recipe, head=head)
    assert all(fit.head_spec is head for fit in fits)


def test_fits_under_different_heads_are_not_evaluated_together(task: tasks.Task):
    fits = [
        training.fit(
            tiny.backbone("resnet"), task, LinearProbe(), BUNDLE[:1], recipe=replace(RECIPE, num_epochs=1), head=head
        )[0]
        for head in (*HEADS.values(), None)
    ]
    for other in (fits[1], fits[2]):
        with pytest.raises(ValueError, match="differ in backbone, method, head, recipe or test part"):
            training.evaluate([fits[0], other], task)


# ---------------------------------------------------------------------------------- choice and test part


class Sealed:
    """Where images would come from; a look at them is an error. Labels can be read: a split is stratified by them."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        raise AssertionError("the test part was looked at")


def test_fitting_and_tuning_never_look_at_the_test_part(task: tasks.Task):
    sealed = tiny.task(60, 30)
    sealed = replace(sealed, test=tasks.Images(Sealed(task.test.shape), task.test.labels.flip(0)))
    with pytest.raises(AssertionError, match="looked at"):
        _ = sealed.test.pixels
    method = ActivationPrompting(site="blocks.1:input")
    (fit,) = training.fit(tiny.backbone("vit"), task, method, BUNDLE[:1], recipe=RECIPE)
    (blind,) = training.fit(tiny.backbone("vit"), sealed, method, BUNDLE[:1], recipe=RECIPE)
    assert_same_fit(fit, blind, exact=True)
    tuned = training.tune(tiny.backbone("vit"), task, method, recipe=RECIPE, learning_rates=(3e-3, 3e-2), seeds=(0, 1))
    blind_tuned = training.tune(
        tiny.backbone("vit"), sealed, method, recipe=RECIPE, learning_rates=(3e-3, 3e-2), seeds=(0, 1)
    )
    for one, other in zip(tuned, blind_tuned, strict=True):
        assert_same_fit(one, other, exact=True)
    with pytest.raises(AssertionError, match="looked at"):
        training.evaluate([blind], sealed)


def test_train_and_validation_labels_do_decide(task: tasks.Task):
    """The twin of the test above: what must be seen is seen."""
    labels = task.train.labels.clone()
    swapped = replace(task, train=tasks.Images(task.train.pixels.flip(0), labels))
    (one,) = training.fit(tiny.backbone("vit"), task, LinearProbe(), BUNDLE[:1], recipe=RECIPE)
    (other,) = training.fit(tiny.backbone("vit"), swapped, LinearProbe(), BUNDLE[:1], recipe=RECIPE)
    assert one.train_curve != other.train_curve


def test_validation_chooses_the_epoch(task: tasks.Task):
    """Highest accuracy; among equals the lowest loss. The kept state has that accuracy when asked again."""
    recipe = replace(RECIPE, num_epochs=8, optimizer="sgd")
    bundle = [Configuration(learning_rate=rate, seed=seed) for rate in (5e-2, 3e-3) for seed in (0, 1)]
    backbone = tiny.backbone("vit")
    fits = training.fit(backbone, task, ActivationPrompting(site="blocks.1:input"), bundle, recipe=recipe)
    assert len({fit.epoch for fit in fits}) > 1
    for fit in fits:
        assert fit.validation_accuracy == max(fit.validation_curve) == fit.validation_curve[fit.epoch - 1]
        x = reference.normalized(backbone, task.train, fit.split.validation)
        labels = task.train.labels[fit.split.validation]
        with torch.no_grad():
            logits = fit.model(x)
        assert 100 * float((logits.argmax(1) == labels).float().mean()) == pytest.approx(fit.validation_accuracy)
        assert float(nn.functional.cross_entropy(logits, labels)) == pytest.approx(fit.validation_loss, rel=1e-3)


def test_choose_takes_the_highest_accuracy_and_breaks_ties_by_loss(task: tasks.Task):
    (fit,) = training.fit(tiny.backbone("vit"), task, LinearProbe(), BUNDLE[:1], recipe=RECIPE)
    a = replace(fit, validation_accuracy=50.0, validation_loss=0.1)
    b = replace(fit, validation_accuracy=60.0, validation_loss=0.9)
    c = replace(fit, validation_accuracy=60.0, validation_loss=0.8)
    assert training.choose([a, b, c]) is c
    assert training.choose([c, b, a]) is c


@pytest.fixture
def tuned_rates(task: tasks.Task, monkeypatch: pytest.MonkeyPatch) -> dict:
    """`tune` with a `fit` that only says how good each rate is: best at `peak`, falling off on both sides."""
    (template,) = training.fit(tiny.backbone("vit"), task, LinearProbe(), BUNDLE[:1], recipe=RECIPE)
    calls: dict = {"bundles": [], "heads": [], "peak": 1.0}

    def fake(backbone, task, method, configurations, recipe, *, head=None, cache=None):  # type: ignore[no-untyped-def]
        calls["bundles"].append([(c.learning_rate, c.seed) for c in configurations])
        calls["heads"].append(head)
        score = [90 - 10 * abs(math.log2(c.learning_rate / calls["peak"])) for c in configurations]
        return [
            replace(template, configuration=c, validation_accuracy=s)
            for c, s in zip(configurations, score, strict=True)
        ]

    monkeypatch.setattr(fitting, "fit", fake)
    return calls


@pytest.mark.parametrize(
    ("peak", "extensions", "chosen"),
    [
        (2.0, [], 2.0),  # inside: nothing is added
        (1.0, [0.5], 1.0),  # best at the edge: one more, which is worse
        (0.5, [0.5, 0.25], 0.5),
        (2.0**-6, [0.5, 0.25], 0.25),  # out of reach: stops after two
        (8.0, [8.0, 16.0], 8.0),
        (2.0**9, [8.0, 16.0], 16.0),
    ],
)
def test_a_choice_at_the_edge_extends_the_grid_by_its_ratio(
    peak: float, extensions: list[float], chosen: float, tuned_rates: dict, task: tasks.Task
):
    tuned_rates["peak"] = peak
    fits = training.tune(
        tiny.backbone("vit"), task, LinearProbe(), recipe=RECIPE, learning_rates=(4.0, 1.0, 2.0), seeds=(3, 4, 5)
    )
    first, *more, last = tuned_rates["bundles"]
    assert first == [(1.0, 3), (2.0, 3), (4.0, 3)]
    assert more == [[(rate, 3)] for rate in extensions]
    assert last == [(chosen, 4), (chosen, 5)]
    assert [fit.configuration for fit in fits] == [Configuration(learning_rate=chosen, seed=s) for s in (3, 4, 5)]


def test_a_grid_of_one_rate_is_not_extended(tuned_rates: dict, task: tasks.Task):
    (fit,) = training.tune(tiny.backbone("vit"), task, LinearProbe(), recipe=RECIPE, learning_rates=(0.1,), seeds=(0,))
    assert tuned_rates["bundles"] == [[(0.1, 0)]]
    assert fit.configuration.learning_rate == 0.1


def test_each_seed_gets_its_own_frozen_head(tuned_rates: dict, task: tasks.Task):
    (probe,) = training.fit(tiny.backbone("vit"), task, LinearProbe(), BUNDLE[:1], recipe=RECIPE)
    probes = [replace(probe, configuration=Configuration(seed=seed)) for seed in (0, 1, 2)]
    tuned_rates["heads"].clear()
    tuned_rates["peak"] = 2.0
    method, rates = ActivationPrompting(site="blocks.1:input"), (1.0, 2.0, 4.0)
    training.tune(
        tiny.backbone("vit"),
        task,
        method,
        recipe=RECIPE,
        learning_rates=rates,
        seeds=(0, 1, 2),
        head=FrozenHead(probes),
    )
    assert [[fit.configuration.seed for fit in head.fits] for head in tuned_rates["heads"]] == [[0, 0, 0], [1, 2]]


def test_tuned_fits_are_those_of_the_chosen_rate(task: tasks.Task):
    method = ActivationPrompting(site="blocks.1:input")
    fits = training.tune(
        tiny.backbone("vit"), task, method, recipe=RECIPE, learning_rates=(3e-3, 1e-2, 3e-2), seeds=(0, 1)
    )
    assert [fit.configuration.seed for fit in fits] == [0, 1]
    assert len({fit.configuration.learning_rate for fit in fits}) == 1
    for fit in fits:
        assert_same_fit(fit, training.fit(tiny.backbone("vit"), task, method, [fit.configuration], recipe=RECIPE)[0])


# ---------------------------------------------------------------------------------- memory, determinism, precision


@dataclass(frozen=True, kw_only=True)
class Hungry(ActivationPrompting):
    most: int = 1  # configurations that fit
    error: type[Exception] = MemoryError
    message: str = "out of memory"

    def build(self, backbone: nn.Module, num: int) -> methods.PreparedBackbone:
        if num > self.most:
            raise self.error(self.message)
        return super().build(backbone, num)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError, "no memory"),
        (torch.OutOfMemoryError, "CUDA out of memory"),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_a_bundle_that_does_not_fit_memory_is_halved_and_gives_the_same(
    error: type[Exception], message: str, task: tasks.Task
):
    hungry = Hungry(site="blocks.1:input", most=1, error=error, message=message)
    with pytest.warns(UserWarning, match=r"bundle of . configurations does not fit the memory .*; halved") as caught:
        fits = training.fit(tiny.backbone("vit"), task, hungry, BUNDLE[:3], recipe=RECIPE)
    assert [str(warning.message)[12] for warning in caught] == ["3", "2"]
    assert [fit.configuration for fit in fits] == BUNDLE[:3]
    whole = training.fit(
        tiny.backbone("vit"), task, ActivationPrompting(site="blocks.1:input"), BUNDLE[:3], recipe=RECIPE
    )
    for one, other in zip(fits, whole, strict=True):
        assert_same_fit(one, other)


def test_halving_keeps_each_configuration_with_its_head(task: tasks.Task):
    probes = training.fit(tiny.backbone("vit"), task, LinearProbe(), BUNDLE[:3], recipe=RECIPE)
    hungry = Hungry(site="blocks.1:input")
    with pytest.warns(UserWarning, match="halved"):
        fits = training.fit(tiny.backbone("vit"), task, hungry, BUNDLE[:3], recipe=RECIPE, head=FrozenHead(probes))
    for fit, probe in zip(fits, probes, strict=True):
        assert torch.equal(fit.head_state["weight"], probe.head_state["weight"])


def test_a_single_configuration_that_does_not_fit_says_the_way_out(task: tasks.Task):
    with pytest.raises(MemoryError, match=r"one configuration .* use a smaller recipe.batch_size \(now 16\)"):
        training.fit(tiny.backbone("vit"), task, Hungry(site="blocks.1:input", most=0), BUNDLE[:1], recipe=RECIPE)


def test_another_error_is_not_taken_for_want_of_memory(task: tasks.Task):
    broken = Hungry(site="blocks.1:input", error=RuntimeError, message="shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        training.fit(tiny.backbone("vit"), task, broken, BUNDLE[:2], recipe=RECIPE)


@dataclass(frozen=True, kw_only=True)
class Asking(ActivationPrompting):
    answers: tuple[list, ...] = ([],)

    def build(self, backbone: nn.Module, num: int) -> methods.PreparedBackbone:
        self.answers[0].append(torch.are_deterministic_algorithms_enabled())
        if self.lr_scale < 0:
            raise ZeroDivisionError
        return super().build(backbone, num)


@pytest.mark.parametrize("wanted", [True, False])
def test_determinism_is_asked_for_and_given_back(wanted: bool, task: tasks.Task):
    recipe, method = replace(RECIPE, deterministic=wanted), Asking(site="blocks.1:input", answers=([],))
    training.fit(tiny.backbone("vit"), task, method, BUNDLE[:1], recipe=recipe)
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ZeroDivisionError):
        training.fit(tiny.backbone("vit"), task, replace(method, lr_scale=-1.0), BUNDLE[:1], recipe=recipe)
    assert not torch.are_deterministic_algorithms_enabled()
    assert method.answers[0] == [wanted, wanted]


def test_a_process_that_wants_determinism_keeps_it(task: tasks.Task):
    method = Asking(site="blocks.1:input", answers=([],))
    torch.use_deterministic_algorithms(True)
    try:
        training.fit(tiny.backbone("vit"), task, method, BUNDLE[:1], recipe=RECIPE)
        assert torch.are_deterministic_algorithms_enabled()
        assert method.answers[0] == [True]
    finally:
        torch.use_deterministic_algorithms(False)


def test_precision_is_what_the_recipe_says(task: tasks.Task):
    backbone, x = tiny.backbone("vit"), tiny.images("vit", 2)
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with torch.no_grad(), backbones.autocast(backbone, precision):
            assert sites.capture(backbone, ["blocks.1.mlp.fc1"], x)["blocks.1.mlp.fc1"].dtype == dtype
    recipe = replace(RECIPE, precision="bfloat16")
    (rough,) = training.fit(backbone, task, ActivationPrompting(site="blocks.1:input"), BUNDLE[:1], recipe=recipe)
    (fine,) = training.fit(backbone, task, ActivationPrompting(site="blocks.1:input"), BUNDLE[:1], recipe=RECIPE)
    assert rough.train_curve == pytest.approx(fine.train_curve, rel=0.05)
    assert rough.train_curve != fine.train_curve
    assert all(value.dtype == torch.float32 for value in rough.state.values())


# ---------------------------------------------------------------------------------- results


@pytest.mark.parametrize("family", ["vit", "resnet"])
@pytest.mark.parametrize("shape", ["full", "channel"])
def test_the_exported_model_predicts_what_evaluate_counts(family: str, shape: str, task: tasks.Task, tmp_path):
    backbone = tiny.backbone(family)
    method = ActivationPrompting(site=SITE[family], shape=shape)
    fits = training.fit(backbone, task, method, BUNDLE[:3], recipe=RECIPE)
    for fit, evaluation in zip(fits, training.evaluate(fits, task), strict=True):
        x = reference.normalized(backbone, task.test, fit.split.test)
        labels = task.test.labels[fit.split.test]
        loaded = files.load_prompt(fit.save(tmp_path / "prompt.safetensors"), backbone)
        with torch.no_grad():
            logits = fit.model(x)
            assert torch.equal(loaded(x), logits)
        assert torch.equal(logits.argmax(1) == labels, evaluation.correct)
        assert evaluation.accuracy == pytest.approx(100 * evaluation.correct.float().mean().item())


def test_norms_are_in_the_units_of_the_activation(task: tasks.Task):
    backbone = tiny.backbone("resnet")
    for shape in ("full", "channel"):
        method = ActivationPrompting(site="layer2.0:input", shape=shape)
        (fit,) = training.fit(backbone, task, method, BUNDLE[:1], recipe=RECIPE)
        z = reference.see(backbone, reference.normalized(backbone, task.train, fit.split.train), "layer2.0:input")
        assert fit.prompt_norm == pytest.approx(float(fit.prompt.delta.expand(z.shape[1:]).norm()), rel=1e-5)
        assert fit.relative_norm == pytest.approx(fit.prompt.relative_norm(z), rel=1e-4)
        assert fit.prompt_norm > 0
    (probe,) = training.fit(backbone, task, LinearProbe(), BUNDLE[:1], recipe=RECIPE)
    assert probe.prompt_norm == probe.relative_norm == 0


def test_a_fit_without_a_prompt_says_so(task: tasks.Task):
    (probe,) = training.fit(tiny.backbone("vit"), task, LinearProbe(), BUNDLE[:1], recipe=RECIPE)
    with pytest.raises(ValueError, match="the method 'linear_probe' has no prompt"):
        _ = probe.prompt


def test_the_last_batch_may_be_smaller_and_every_image_is_seen_once_an_epoch(task: tasks.Task):
    recipe = replace(RECIPE, num_train=37, batch_size=10, num_epochs=1)
    orders = fitting._order(torch.arange(37), 3, 0), fitting._order(torch.arange(37), 3, 1)
    assert sorted(orders[0].tolist()) == sorted(orders[1].tolist()) == list(range(37))
    assert orders[0].tolist() != orders[1].tolist()
    (fit,) = training.fit(tiny.backbone("vit"), task, LinearProbe(), BUNDLE[:1], recipe=recipe)
    plain = reference.fit(tiny.backbone("vit"), task, LinearProbe(), BUNDLE[0], recipe)
    assert len(fit.split.train) == 37
    assert fit.train_curve == pytest.approx(plain.train_curve, rel=1e-4)


def test_all_images_are_used_when_no_number_is_given(task: tasks.Task):
    recipe = replace(RECIPE, num_train=None, num_validation=6, num_test=None, num_epochs=1)
    (fit,) = training.fit(tiny.backbone("vit"), task, LinearProbe(), BUNDLE[:1], recipe=recipe)
    assert (len(fit.split.train), len(fit.split.validation), len(fit.split.test)) == (54, 6, 30)


def test_a_class_missing_from_train_is_an_error(task: tasks.Task):
    with pytest.raises(ValueError, match="raise num_train"):
        training.fit(tiny.backbone("vit"), task, LinearProbe(), BUNDLE[:1], recipe=replace(RECIPE, num_train=2))


def test_defaults_are_one_configuration_and_the_default_recipe():
    backbone, task = tiny.backbone("vit"), tiny.task(24, 6)
    fit = training.fit(backbone, task, LinearProbe(), recipe=replace(RECIPE, num_epochs=1, num_validation=6))
    assert fit.configuration == Configuration()


def test_old_calls_work_and_warn(task: tasks.Task):
    backbone, recipe = tiny.backbone("vit"), replace(RECIPE, num_epochs=1)
    fit = training.fit(backbone, task, LinearProbe(), recipe=recipe)
    with pytest.warns(DeprecationWarning, match="the list of one fit is the fit itself"):
        (alone,) = fit
    with pytest.warns(DeprecationWarning, match="the list of one fit"):
        assert fit[0] is fit[-1] is alone is fit
    assert len(fit) == 1
    new = training.evaluate(fit, task)
    for fits in (fit, [fit]):
        with pytest.warns(DeprecationWarning, match=r"evaluate\(task, fits\) is evaluate\(fits, task\) now"):
            (old,) = training.evaluate(task, fits)
        assert torch.equal(old.correct, new.correct)
    with pytest.warns(DeprecationWarning, match="rate of ActivationPrompting is lr_scale now"):
        method = ActivationPrompting(site="blocks.1:input", rate=3.0)
    with pytest.warns(DeprecationWarning, match="rate of ActivationPrompting is lr_scale now"):
        assert method.rate == method.lr_scale == 3.0
    with (
        pytest.warns(DeprecationWarning, match="rate of VP"),
        pytest.raises(ValueError, match="rate of VP is lr_scale now, and both are gi"),
    ):
        methods.VP(rate=3.0, lr_scale=4.0)


def test_balanced_accuracy_counts_each_class_alike():
    correct = torch.tensor([True, True, True, False, False, True])
    evaluation = training.Evaluation.of(correct, torch.tensor([0, 0, 0, 0, 1, 3]), 4)
    assert evaluation.accuracy == pytest.approx(100 * 4 / 6)
    assert evaluation.recall.tolist()[:2] == [75.0, 0.0]
    assert math.isnan(evaluation.recall[2])  # no image of it was there
    assert evaluation.balanced_accuracy == pytest.approx((75 + 0 + 100) / 3)


def test_arguments_of_another_kind_are_named(task: tasks.Task):
    backbone = tiny.backbone("vit")
    fit, check_ready = map(inspect.unwrap, (training.fit, training.check_ready))  # types are checked in tests alone
    with pytest.raises(ValueError, match=r"expected a backbone \(a module\), then a task.*got a Task and a Vision"):
        check_ready(task, backbone)
    with pytest.raises(ValueError, match=r"method is 'ap'; expected a method such as ActivationPrompting\(site"):
        fit(backbone, task, "ap")
    with pytest.raises(ValueError, match=r"method is <class.*LinearProbe'>; expected a method"):
        fit(backbone, task, LinearProbe)


def test_a_single_step_trains_nothing_and_says_so(task: tasks.Task):
    recipe = replace(RECIPE, num_epochs=1, batch_size=40)
    with pytest.warns(UserWarning, match="one step is all of an epoch of 40 images.*is not trained"):
        fit = training.fit(tiny.backbone("vit"), task, ActivationPrompting(site="blocks.1:input"), recipe=recipe)
    assert fit.prompt_norm == 0


def test_a_prompt_where_the_activation_is_zero_is_an_error_before_training():
    backbone = copy.deepcopy(tiny.backbone("resnet"))
    backbone.layer2[0].bn2.weight.zero_()
    backbone.layer2[0].bn2.bias.zero_()
    with pytest.raises(ValueError, match=r"activation at 'layer2.0.bn2:output' is zero, so a prompt has no scale"):
        training.fit(backbone, tiny.task(), ActivationPrompting(site="layer2.0.bn2:output"), recipe=RECIPE)


def test_a_split_that_leaves_less_to_train_on_than_to_validate_on_warns():
    recipe = replace(RECIPE, num_train=None, num_validation=30, num_epochs=1)
    with pytest.warns(UserWarning, match=r"takes 30 of 48 images and leaves 18 to train on; lower num_validation"):
        training.fit(tiny.backbone("resnet"), tiny.task(), ActivationPrompting(site="layer3.0:input"), recipe=recipe)
