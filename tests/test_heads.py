"""Claims about heads: what each computes, which map a label mapping takes, and that training loops keep to it."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import apthory
from apthory import backbones, heads
from apthory.heads import LabelMapping, LinearHead, LinearHeads, TextHead, assign

WIDTH = 6


def generators(num: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(num)]


def draw(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def source(num_classes: int = 9, width: int = WIDTH, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(width, num_classes, bias=bias)
    layer.weight.data = draw(num_classes, width, seed=7)
    if bias:
        layer.bias.data = draw(num_classes, seed=8)
    return layer.requires_grad_(False)


def counted(classifier: nn.Linear, features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """How often each class is predicted as each class of the classifier, one image at a time."""
    counts = torch.zeros(len(labels), num_classes, classifier.out_features, dtype=torch.long)
    for k, row in enumerate(labels):
        for image, label in enumerate(row):
            counts[k, label, classifier(features[k * len(row) + image]).argmax()] += 1
    return counts


# ------------------------------------------------------------------------------------------ linear heads


def test_linear_heads_see_features_in_units_of_their_root_mean_square():
    bundle = LinearHead().build(2, WIDTH, 3, generators())
    features = torch.cat([draw(4, WIDTH), 100 * draw(4, WIDTH, seed=6)])
    bundle.start(features, torch.zeros(2, 4, dtype=torch.long))
    rms = [float(part.square().mean().sqrt()) for part in features.chunk(2)]
    assert bundle.unit.flatten().tolist() == pytest.approx(rms)
    bundle.bias.data = draw(2, 1, 3)
    for k, (out, part) in enumerate(zip(bundle(features), features.chunk(2), strict=True)):
        torch.testing.assert_close(out, part / rms[k] @ bundle.weight[k] + bundle.bias[k])
        torch.testing.assert_close(bundle.export(k)(part), out)


def test_linear_heads_start_at_draws_of_their_own_generators():
    first, other = LinearHeads(2, WIDTH, 3, generators()), LinearHeads(1, WIDTH, 3, generators()[1:])
    assert torch.equal(first.weight[1], other.weight[0])
    assert not torch.equal(first.weight[0], first.weight[1])
    assert not first.bias.any()


# ------------------------------------------------------------------------------------------ which map is taken


def greedy(counts: list[list[int]]) -> list[int]:
    pairs = [(-count, label, place) for label, row in enumerate(counts) for place, count in enumerate(row)]
    chosen: dict[int, int] = {}
    for _, label, place in sorted(pairs):
        if label not in chosen and place not in chosen.values():
            chosen[label] = place
    return [chosen[label] for label in range(len(counts))]


def ordered(counts: list[list[int]]) -> list[int]:
    chosen: list[int] = []
    for row in counts:
        free = [place for place in range(len(row)) if place not in chosen]
        chosen.append(max(free, key=lambda place: (row[place], -place)))
    return chosen


def mode(counts: list[list[int]]) -> list[int]:
    return [row.index(max(row)) for row in counts]


tables = st.integers(1, 4).flatmap(
    lambda num: st.integers(1, 4).flatmap(
        lambda classes: st.integers(classes, 6).flatmap(
            lambda sources: st.lists(
                st.lists(
                    st.lists(st.integers(0, 4), min_size=sources, max_size=sources), min_size=classes, max_size=classes
                ),
                min_size=num,
                max_size=num,
            )
        )
    )
)


@pytest.mark.parametrize("rule", [greedy, ordered, mode])
@given(table=tables)
def test_maps_are_those_of_brute_force(rule, table):
    counts = torch.tensor(table)
    before = counts.clone()
    found = assign(counts, rule.__name__)
    assert found.tolist() == [rule(counts) for counts in table]
    assert torch.equal(counts, before)
    if rule is not mode:
        assert all(len(set(row)) == len(row) for row in found.tolist())


def test_the_rules_differ_where_they_should():
    counts = torch.tensor([[[5, 4, 0], [9, 3, 0]]])
    assert {rule: assign(counts, rule).tolist() for rule in ("greedy", "ordered", "mode")} == {
        "greedy": [[1, 0]],  # the second class has the largest count of all
        "ordered": [[0, 1]],  # the first class chooses first
        "mode": [[0, 0]],
    }


@pytest.mark.parametrize("assignment", ["greedy", "ordered", "mode"])
def test_a_frequency_map_is_that_of_the_predictions_at_the_start(assignment, monkeypatch):
    monkeypatch.setattr(heads, "_PREDICTIONS_AT_ONCE", 7)  # fewer than there are images
    classifier, features, labels = source(), draw(40, WIDTH), torch.arange(20).repeat(2, 1) % 3
    bundle = LabelMapping(classifier, "frequency", assignment).build(2, WIDTH, 3, generators())
    assert bundle.num_start is None
    bundle.start(features, labels)
    rule = {"greedy": greedy, "ordered": ordered, "mode": mode}[assignment]
    expected = [rule(counts) for counts in counted(classifier, features, labels, 3).tolist()]
    assert bundle.map.tolist() == expected
    bundle.observe(-features, labels)
    bundle.end_epoch()
    assert bundle.map.tolist() == expected  # taken once


def test_an_iterative_map_is_that_of_the_last_epoch():
    classifier, labels = source(), torch.arange(20).repeat(2, 1) % 3
    bundle = LabelMapping(classifier, "iterative").build(2, WIDTH, 3, generators())
    epochs = [draw(40, WIDTH, seed=seed) for seed in range(3)]
    maps = [[greedy(counts) for counts in counted(classifier, x, labels, 3).tolist()] for x in epochs]
    assert maps[0] != maps[1] != maps[2]
    bundle.start(epochs[0], labels)
    assert bundle.map.tolist() == maps[0]
    for features, expected in zip(epochs[1:], maps[1:], strict=True):
        before = bundle.map.tolist()
        for part in (slice(0, 8), slice(8, 20)):  # an epoch of two steps
            stacked = features.unflatten(0, (2, 20))[:, part].flatten(0, 1)
            bundle.observe(stacked, labels[:, part])
            assert bundle.map.tolist() == before
        bundle.end_epoch()
        assert bundle.map.tolist() == expected


def test_a_random_map_is_one_to_one_drawn_by_seed_and_kept():
    spec = LabelMapping(source(), "random", "mode")
    bundle = spec.build(3, WIDTH, 9, generators(3))
    assert [sorted(row) for row in bundle.map.tolist()] == [list(range(9))] * 3
    assert len({tuple(row) for row in bundle.map.tolist()}) == 3
    assert torch.equal(bundle.map[1:2], spec.build(1, WIDTH, 9, generators(2)[1:]).map)
    before, labels = bundle.map.clone(), torch.zeros(3, 4, dtype=torch.long)
    bundle.start(draw(12, WIDTH), labels)
    bundle.observe(draw(12, WIDTH), labels)
    bundle.end_epoch()
    assert torch.equal(bundle.map, before)


@pytest.mark.parametrize("bias", [True, False])
def test_mapped_logits_are_those_of_the_classifier_and_gradients_reach_the_features(bias):
    classifier = source(bias=bias)
    bundle = LabelMapping(classifier, "random").build(2, WIDTH, 4, generators())
    features = draw(6, WIDTH).requires_grad_()
    logits = bundle(features)
    for k, part in enumerate(features.chunk(2)):
        torch.testing.assert_close(logits[k], classifier(part)[:, bundle.map[k]])
        torch.testing.assert_close(bundle.export(k)(part), logits[k])
    logits.square().sum().backward()
    assert features.grad.abs().min() > 0
    assert not list(bundle.parameters())


def test_the_map_is_all_the_state_there_is():
    spec = LabelMapping(source(), "random")
    bundle, other = spec.build(2, WIDTH, 4, generators()), spec.build(2, WIDTH, 4, generators(4)[2:])
    assert {name: value.shape for name, value in bundle.state_dict().items()} == {"map": (2, 4)}
    other.load_state_dict(bundle.state_dict())
    assert torch.equal(other(draw(6, WIDTH)), bundle(draw(6, WIDTH)))


@pytest.mark.parametrize(
    ("how", "assignment"),
    [("random", "mode"), ("frequency", "greedy"), ("iterative", "greedy"), ("frequency", "ordered")],
)
def test_too_few_source_classes_for_a_one_to_one_map_is_an_error(how, assignment):
    with pytest.raises(ValueError, match=r"classifier has 3 classes, too few .* task's 4 .*use assignment='mode'"):
        LabelMapping(source(3), how, assignment).build(1, WIDTH, 4, generators(1))
    LabelMapping(source(4), how, assignment).build(1, WIDTH, 4, generators(1))


def test_classes_may_share_a_source_class_by_mode():
    bundle = LabelMapping(source(3), "frequency", "mode").build(1, WIDTH, 4, generators(1))
    bundle.start(draw(40, WIDTH), torch.arange(40).view(1, 40) % 4)
    assert len(set(bundle.map[0].tolist())) < 4


def test_of_classes_that_share_a_source_the_earliest_is_predicted_however_logits_round():
    classifier = source(3, 256)
    bundle = LabelMapping(classifier, "frequency", "mode").build(1, 256, 9, generators(1))
    bundle.map.copy_(torch.tensor([[2, 2, 2, 0, 2, 1, 2, 0, 2]]))
    features = draw(300, 256)
    expected = torch.tensor([3, 5, 0])[classifier(features).argmax(1)]
    for logits in (bundle(features)[0], bundle.export(0)(features)):
        assert torch.equal(logits.argmax(1), expected)
        torch.testing.assert_close(logits, classifier(features)[:, bundle.map[0]], rtol=0, atol=6e-3)


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"how is 'once'; expected one of random, frequency"):
        LabelMapping.__post_init__(_unchecked(classifier=source(), how="once", assignment="greedy"))
    with pytest.raises(ValueError, match=r"classifier is a VisionTransformer; expected the nn.Linear of backbones"):
        LabelMapping.__post_init__(_unchecked(classifier=tiny.backbone("vit")))
    with pytest.raises(ValueError, match=r"classifier takes 6 features and the backbone gives 7; take backbones.class"):
        LabelMapping(source()).build(1, WIDTH + 1, 3, generators(1))
    with pytest.raises(ValueError, match=r"text features are 3 of width 6; the task has 4 classes .* of width 6"):
        TextHead(draw(3, WIDTH), 1.0).build(1, WIDTH, 4, generators(1))


def _unchecked(**fields: Any) -> LabelMapping:
    """A specification with values that the type checker of the tests would refuse first."""
    spec = object.__new__(LabelMapping)
    spec.__dict__.update(fields)
    return spec


# ------------------------------------------------------------------------------------------ text heads


def test_a_text_head_gives_scaled_cosines():
    text, features = 3 * draw(4, WIDTH), draw(6, WIDTH, seed=2).requires_grad_()
    bundle = TextHead(text, 50.0).build(2, WIDTH, 4, generators())
    logits = bundle(features)
    expected = 50 * torch.cosine_similarity(features.unsqueeze(1), text.unsqueeze(0), dim=2)
    torch.testing.assert_close(logits.flatten(0, 1), expected)
    torch.testing.assert_close(bundle(7 * features), logits)
    torch.testing.assert_close(bundle.export(1)(features[3:]), logits[1])
    logits[..., 0].sum().backward()
    assert features.grad.abs().min() > 0
    assert not list(bundle.parameters())
    assert not bundle.state_dict()


# ------------------------------------------------------------------------------------------ in training


@pytest.mark.parametrize("how", ["random", "frequency", "iterative"])
def test_a_prompt_learns_through_a_mapped_head(how, tmp_path: Path):
    backbone, task = tiny.backbone("resnet"), tiny.task(96)
    width = backbone(tiny.images("resnet", 1)).shape[1]
    spec = LabelMapping(source(9, width), how)
    method = apthory.ActivationPrompting(site="layer2.0:input", lr_scale=1.0)
    recipe = apthory.Recipe(num_epochs=4, num_train=48, num_validation=24, num_test=24, precision="float32")
    rates = [apthory.Configuration(learning_rate=rate) for rate in (1e-2, 3e-2)]
    fits = apthory.fit(backbone, task, method, rates, recipe=recipe, head=spec)
    assert fits[1].train_curve[-1] < fits[1].train_curve[0]
    assert list(fits[0].head_state) == ["map"]
    (alone,) = apthory.fit(backbone, task, method, rates[1:], recipe=recipe, head=spec)
    assert torch.equal(alone.head_state["map"], fits[1].head_state["map"])
    torch.testing.assert_close(alone.state["layer2.0:input.values"], fits[1].state["layer2.0:input.values"])
    evaluations = apthory.evaluate(fits, task)
    x = backbones.normalize(backbone, task.test[fits[1].split.test])
    correct = fits[1].model(x).argmax(1) == task.test.labels[fits[1].split.test]
    assert torch.equal(correct, evaluations[1].correct)
    loaded = apthory.load_prompt(fits[1].save(tmp_path / "prompt.safetensors"), backbone)
    assert torch.equal(loaded(x), fits[1].model(x))


def test_the_first_epoch_of_an_iterative_map_is_that_of_frequency_and_later_ones_may_differ():
    backbone, task = tiny.backbone("resnet"), tiny.task(96)
    width = backbone(tiny.images("resnet", 1)).shape[1]
    recipe = apthory.Recipe(
        num_epochs=1, batch_size=12, num_train=48, num_validation=24, num_test=24, precision="float32"
    )
    method = apthory.ActivationPrompting(site="layer2.0:input")
    maps, curves = [], []
    for how in ("frequency", "iterative"):
        fit = apthory.fit(backbone, task, method, recipe=recipe, head=LabelMapping(source(9, width), how))
        maps.append(fit.head_state["map"])
        curves.append(fit.train_curve)
    assert torch.equal(*maps)
    assert curves[0] == curves[1]


def test_predictions_are_counted_with_or_without_the_initial_prompt():
    backbone, task = tiny.backbone("resnet"), tiny.task(96)
    classifier = source(9, backbone(tiny.images("resnet", 1)).shape[1])
    recipe = apthory.Recipe(
        num_epochs=1, batch_size=12, num_train=48, num_validation=24, num_test=24, precision="float32"
    )

    def map_of(method, counted: str) -> torch.Tensor:
        spec = LabelMapping(classifier, "frequency", "mode", counted)
        return apthory.fit(backbone, task, method, recipe=recipe, head=spec).head_state["map"]

    plain = map_of(apthory.LinearProbe(), "prompt")  # which has none
    noise = apthory.VP(width=8, init=5.0)
    assert torch.equal(map_of(noise, "images"), plain)
    assert not torch.equal(map_of(noise, "prompt"), plain)
    assert torch.equal(map_of(apthory.EVP(width=4), "images"), plain)


def test_a_model_with_nothing_to_train_is_evaluated_as_it_is():
    backbone, task = tiny.backbone("resnet"), tiny.task(96)
    recipe = apthory.Recipe(num_epochs=2, num_train=48, num_validation=24, num_test=24, precision="float32")
    classifier = source(9, backbone(tiny.images("resnet", 1)).shape[1])
    fit = apthory.fit(backbone, task, apthory.LinearProbe(), recipe=recipe, head=LabelMapping(classifier, "frequency"))
    train = backbones.normalize(backbone, task.train[fit.split.train])
    counts = counted(classifier, backbone(train), task.train.labels[fit.split.train].view(1, -1), 3)
    assert fit.head_state["map"].tolist() == greedy(counts[0].tolist())
    assert fit.train_curve[0] == pytest.approx(fit.train_curve[1])
    logits = classifier(backbone(backbones.normalize(backbone, task.test[fit.split.test])))
    predicted = logits[:, fit.head_state["map"]].argmax(1)
    evaluation = apthory.evaluate(fit, task)
    assert torch.equal(evaluation.correct, predicted == task.test.labels[fit.split.test])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spec",
    [LinearHead(), LabelMapping(source()), LabelMapping(source(), "random"), TextHead(draw(4, WIDTH), 50.0)],
    ids=["linear", "iterative", "random", "text"],
)
def test_a_gpu_gives_the_same_logits(spec: heads.HeadSpec):
    features, labels, found = draw(40, WIDTH), torch.arange(20).repeat(2, 1) % 4, []
    for device in ("cpu", "cuda"):
        bundle = spec.build(2, WIDTH, 4, generators()).to(device)
        bundle.start(features.to(device), labels.to(device))
        bundle.observe(-features.to(device), labels.to(device))
        bundle.end_epoch()
        logits = bundle(features.to(device))
        assert logits.device.type == device
        exported = bundle.export(1).to(device)
        torch.testing.assert_close(exported(features[20:].to(device)), logits[1], rtol=1e-4, atol=1e-4)
        found.append(logits.cpu())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
