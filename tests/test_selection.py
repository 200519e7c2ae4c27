"""Scores and the search: gradients as a slow loop gives them, costs as they are counted, budgets that hold."""

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import tiny
import torch
from PIL import Image
from scipy.sparse.linalg import cg
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

from apthory import backbones, costs, methods, selection, sites, tasks, training
from apthory.__main__ import app
from apthory.lab import records
from apthory.selection import scores, search
from apthory.studies import record_format, site_search
from apthory.theory import tangent

RECIPE = training.Recipe(num_epochs=9, batch_size=16, num_train=30, num_validation=12, num_test=12, precision="float32")
RATES = (4e-3, 1.6e-2, 6.4e-2)
FAMILIES = ("vit", "resnet", "mobilenetv2")


def tangents(family, num=24):
    model, task = tiny.backbone(family), tiny.task()
    return scores._Tangents(model, task, sites.list_sites(model)[1:], task.split(0, num, 12).train)


class Untraceable(nn.Module):
    """A tiny backbone behind a branch that torch.fx cannot follow."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.body = copy.deepcopy(tiny.backbone(family))
        self.pretrained_cfg = self.body.pretrained_cfg

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x if x.shape[0] < 10**6 and float(x.detach().sum()) < 1e30 else 0 * x)


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_one_image_and_one_site_at_a_time(family):
    prepared = tangents(family)
    model, images = prepared.backbone, tiny.task().train
    labels = images.labels[prepared.unseen]
    sizes = labels.bincount().double()
    same = labels[:, None] == labels
    pairs = torch.where(same, (sizes / (sizes - 1))[labels], 1.0).fill_diagonal_(0.0)  # a class's stand for its squares
    rows = {row["site"]: row for row in prepared.first_order()}
    for site in prepared.places[1:-1:3]:
        prefix, suffix = sites.split(model, site)
        norms = [float(prefix(backbones.normalize(model, images[one[None]]))[0].norm()) for one in prepared.seen]
        gradients = []
        for index in prepared.unseen:
            z, *rest = prefix(backbones.normalize(model, images[index[None]]))
            z = z.detach().requires_grad_()
            functional.cross_entropy(prepared.head(suffix(z, *rest)), images.labels[index[None]]).backward()
            gradients.append(z.grad[0].double().flatten())
        products = torch.stack(gradients) @ torch.stack(gradients).T
        shared, own = float((pairs * products).sum()) / len(labels) ** 2, float(products.trace()) / len(labels)
        expected = np.mean(norms) * np.sign(shared) * abs(shared) ** 0.5
        assert rows[site]["norm"] == pytest.approx(np.mean(norms), rel=1e-4)
        assert rows[site]["coherence"] == pytest.approx(shared / own, rel=1e-2, abs=1e-4)
        assert rows[site]["individual"] == pytest.approx(np.mean(norms) * own**0.5, rel=1e-3)
        assert rows[site]["gain"] == pytest.approx(expected, rel=1e-2, abs=1e-2 * rows[site]["individual"])


def test_a_head_sees_none_of_the_images_whose_gradients_are_taken():
    prepared = tangents("vit")
    images = tiny.task().train
    assert not set(prepared.seen.tolist()) & set(prepared.unseen.tolist())
    assert images.labels[prepared.seen].bincount().tolist() == images.labels[prepared.unseen].bincount().tolist()
    again, _ = scores._fit_head(prepared._features(), images.labels[prepared.seen], 3)
    assert torch.equal(prepared.head.weight, again.weight)
    # A head that saw them and fits them leaves no gradient: scores would be about the head, not the site.
    x, labels, shifts = prepared._at(prepared.unseen)
    own, _ = scores._solve_head(prepared.backbone(x), labels, 3, 1e-9)

    def size(head):
        prepared.head = head
        loss = lambda y: functional.cross_entropy(y, labels, reduction="none")  # noqa: E731
        g = tangent.example_gradients(lambda s: prepared._model(x, s), shifts, loss)
        return tangent.Gradients.of(g["blocks.1:input"]).individual_norm

    cross_fitted = size(prepared.head)
    assert size(own) < 0.05 * cross_fitted


@pytest.mark.parametrize("num_second_order", [0, 8])
def test_scores_ignore_validation_and_test_images(num_second_order):
    model, task = tiny.backbone("resnet"), tiny.task()
    options = {"num_examples": 24, "num_second_order": num_second_order, "num_validation": 12}
    options["places"] = ["layer2.0:input", "layer4.0:input"]

    def changed(indices, part, *, relabelled=False):
        images = getattr(task, part)
        pixels, labels = images.pixels.clone(), images.labels.clone()
        pixels[indices] = 255 - pixels[indices]
        if relabelled:
            labels[indices] = (labels[indices] + 1) % 3
        return replace(task, **{part: tasks.Images(pixels, labels)})

    split = task.split(0, 24, 12)
    table = selection.rank_sites(model, task, **options)
    for other in (changed(split.validation, "train"), changed(split.test, "test", relabelled=True)):
        assert selection.rank_sites(model, other, **options).equals(table)
    assert not selection.rank_sites(model, changed(split.train[:1], "train"), **options).equals(table)
    # Labels decide the split, so those of validation images are changed behind it.
    rows = [
        scores._Tangents(model, other, options["places"], split.train).first_order()
        for other in (task, changed(split.validation, "train", relabelled=True))
    ]
    assert rows[0] == rows[1]


def many_classes(num_classes=12, num_train=96):
    """A task of few images a class, in a random order."""
    order = torch.randperm(num_train, generator=torch.Generator().manual_seed(0))
    task, classes = tiny.task(num_train), tuple(f"class {label}" for label in range(num_classes))
    images = tasks.Images(task.train.pixels, order % num_classes)
    return replace(task, classes=classes, train=images, test=tasks.Images(task.test.pixels, torch.arange(24) % 12))


@pytest.mark.parametrize("num", [4, 10, 16, 200])
def test_halves_of_the_second_order_have_the_same_classes(num):
    task = many_classes()  # 96 images of 12 classes: each has four unseen ones, two pairs
    prepared = scores._Tangents(tiny.backbone("vit"), task, ["blocks.1:input"], torch.arange(96), num)
    one, other = (task.train.labels[half].bincount(minlength=12) for half in prepared.pairs.unbind(1))
    assert torch.equal(one, other)
    assert len(prepared.pairs) == min(num // 2, 24)
    assert prepared.pairs.unique().numel() == prepared.pairs.numel()
    assert set(prepared.pairs.flatten().tolist()) <= set(prepared.unseen.tolist())
    assert int(one.max() - one.min()) <= 1  # in proportion to the classes, which are of one size


def test_a_class_with_an_odd_number_of_images_leaves_one_out():
    task = many_classes()
    indices = torch.cat([torch.where(task.train.labels == label)[0][:6] for label in (0, 1, 2)])  # three unseen each
    prepared = scores._Tangents(tiny.backbone("vit"), task, ["blocks.1:input"], indices, 200)
    assert len(prepared.unseen) == 9
    assert task.train.labels[prepared.pairs].tolist() == [[0, 0], [1, 1], [2, 2]]


def test_pairs_of_a_single_class_are_refused_before_anything_runs():
    task = many_classes()
    labels = task.train.labels
    indices = torch.cat([torch.where(labels == 0)[0][:4], *(torch.where(labels == c)[0][:1] for c in range(1, 12))])
    with pytest.raises(ValueError, match=r"all 2 images of the second order are of one class, out of \d+; raise"):
        scores._Tangents(nn.Linear(1, 1), task, ["blocks.1:input"], indices, 40)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_second_order_scores_are_those_of_dense_matrices(family):
    """newton: the step by a matrix of all second derivatives, judged by gradients image by image; and alignment."""
    model, task = tiny.backbone(family), many_classes()
    site = sites.list_sites(model)[-2]
    prepared = scores._Tangents(model, task, [site], torch.arange(48), 16)
    assert prepared.pairs.numel() == 16 < len(prepared.unseen)
    [row] = prepared.second_order(seed=0)
    labels, (prefix, suffix) = task.train.labels, sites.split(model, site)
    with torch.no_grad():
        crossing = {
            int(index): prefix(backbones.normalize(model, task.train[index[None]])) for index in prepared.unseen
        }
    unit = prepared.units[site]

    def logits(index, flat):
        z, *rest = crossing[int(index)]
        return prepared.head(suffix(z + flat.view(1, *unit), *rest))[0]

    zero = torch.zeros(math.prod(unit))
    jacobians = {index: torch.func.jacrev(partial(logits, index))(zero).double() for index in crossing}
    residuals = {}
    for index in crossing:
        p = logits(index, zero).double().softmax(0).detach()
        residuals[index] = p, p - functional.one_hot(labels[index], 12)
    gains = []
    for half in prepared.pairs.unbind(1):
        chosen = half.tolist()
        g = sum(jacobians[i].T @ residuals[i][1] for i in chosen) / len(chosen)
        H = sum(
            jacobians[i].T
            @ (torch.diag(residuals[i][0]) - torch.outer(residuals[i][0], residuals[i][0]))
            @ jacobians[i]
            for i in chosen
        ) / len(chosen)
        matrix = H + torch.eye(len(zero)) / prepared.norms[site] ** 2
        step, _ = cg(matrix.numpy(), g.numpy(), rtol=1e-10, maxiter=3)
        by_class = {}
        for index in sorted(set(crossing) - set(chosen)):
            by_class.setdefault(int(labels[index]), []).append(jacobians[index].T @ residuals[index][1])
        sizes = labels[prepared.unseen].bincount(minlength=12).tolist()
        judge = sum(sizes[label] * torch.stack(own).mean(0) for label, own in by_class.items()) / sum(sizes)
        assert float((step @ judge.numpy()) - step @ g.numpy()) != 0.0
        gains.append(step @ judge.numpy() / 2)
    assert row["newton"] == pytest.approx(np.mean(gains), rel=1e-3)
    several = [jacobians[int(index)] for index in prepared.pairs.flatten()]
    kernel = torch.stack([torch.stack([(one * two).sum() for two in several]) for one in several])
    expected = tangent.alignment(kernel, tangent.label_kernel(labels[prepared.pairs.flatten()]))
    assert row["alignment"] == pytest.approx(expected, rel=1e-3)


def silenced(family="resnet"):
    model = copy.deepcopy(tiny.backbone(family))
    model.layer2[0].register_forward_hook(lambda _, args, z: 0 * z)
    return model


def test_a_silent_site_is_left_out_with_a_warning():
    options = {"num_examples": 24, "num_validation": 12}
    places = ["layer2.0:input", "layer3.0:input", "layer4.0:input"]
    with pytest.warns(UserWarning, match="zero for all 12 images at layer3.0:input: left out of the ranking"):
        table = selection.rank_sites(silenced(), tiny.task(), places, **options)
    assert sorted(table["site"]) == [places[0], places[2]]
    assert np.isfinite(table.drop(columns="site").to_numpy()).all()
    with pytest.raises(ValueError, match=r"at layer3\.0:input, so there is no site to rank; choose other places"):
        selection.rank_sites(silenced(), tiny.task(), ["layer3.0:input"], **options)


def test_a_module_that_is_never_called_is_refused():
    model = Untraceable("vit")
    model.unused = nn.Linear(2, 2)
    model = backbones.freeze(model)
    with pytest.raises(ValueError, match="never calls the module of site 'unused:output'; leave it out of places"):
        selection.rank_sites(
            model, tiny.task(), ["body.blocks.1:input", "unused:output"], num_examples=16, num_validation=12
        )


def test_activations_that_are_not_finite_are_refused():
    model = copy.deepcopy(tiny.backbone("resnet"))
    model.layer2[0].register_forward_hook(lambda _, args, z: z / 0)
    with pytest.raises(ValueError, match=r"the activation at site 'layer3\.0:input' is not finite"):
        selection.rank_sites(model, tiny.task(), ["layer3.0:input"], num_examples=24, num_validation=12)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_head_is_a_converged_linear_probe_that_decays_its_weights_alone(num_classes: int):
    x, labels = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % num_classes
    head, _ = scores._solve_head(x, labels, num_classes, 1e-2)
    unit = float(x.square().mean().sqrt())
    weight = (head.weight * unit).double().requires_grad_()
    bias = head.bias.double().requires_grad_()
    logits = (x / unit).double() @ weight + bias
    (functional.cross_entropy(logits, labels) + 1e-2 / 2 * weight.square().sum()).backward()
    assert float(weight.grad.abs().max()) < 1e-5
    assert float(bias.grad.abs().max()) < 1e-5  # hence the mean residual is zero, class by class
    assert float((logits.detach().softmax(1).mean(0) - 1 / num_classes).abs().max()) < 1e-5


@pytest.mark.parametrize("num_met", [1, 2, 3])
def test_a_class_without_images_changes_nothing_and_is_impossible(num_met: int):
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([4, 1, 2])[torch.arange(30) % num_met]
    met = labels.unique()
    head, _ = scores._solve_head(x, labels, 6, 1e-2)
    alone, _ = scores._solve_head(x, torch.searchsorted(met, labels), num_met, 1e-2)
    assert torch.equal(head.weight[:, met], alone.weight)
    assert torch.equal(head.bias[met], alone.bias)
    probabilities = head(1e3 * x).softmax(1)  # for any image
    assert float(probabilities[:, [label for label in range(6) if label not in met]].max()) < 1e-6


@pytest.mark.parametrize(("num_images", "num_classes"), [(40, 2), (60, 3), (60, 40)])
def test_a_head_costs_at_least_what_its_solver_evaluates(monkeypatch, num_images: int, num_classes: int):
    evaluations, minimize = [], scipy.optimize.minimize

    def counted(*arguments, **options):
        result = minimize(*arguments, **options)
        evaluations.append(result.nfev)
        return result

    monkeypatch.setattr(scipy.optimize, "minimize", counted)
    x = torch.randn(num_images, 8, generator=torch.Generator().manual_seed(0))
    _, flops = scores._solve_head(x, torch.arange(num_images) % num_classes, num_classes, 1e-2)
    product = 2 * num_images * 9 * (1 if num_classes == 2 else num_classes)
    assert evaluations[0] <= flops / (2 * product) <= 1.2 * evaluations[0]


def test_folds_choose_the_decay_that_suits_unseen_images_of_classes_that_both_have():
    labels = torch.cat([torch.arange(3).repeat_interleave(6), torch.arange(3, 9)])  # six classes of one image each
    noise = torch.randn(24, 30, generator=torch.Generator().manual_seed(0))  # nothing to learn: strong decay is best
    for features, best in (
        (noise, max(scores._DECAYS)),
        (noise + 30 * torch.eye(9, 30)[labels], min(scores._DECAYS)),
    ):
        expected, _ = scores._solve_head(features, labels, 9, best)
        assert torch.equal(scores._fit_head(features, labels, 9)[0].weight, expected.weight)


def test_ranking_is_a_table_of_sites_best_first_with_its_cost():
    model, task = tiny.backbone("resnet"), tiny.task()
    table = selection.rank_sites(model, task, num_examples=24, num_validation=12)
    assert sorted(table["site"]) == sorted(sites.list_sites(model)[1:])
    assert selection.SCORES[selection.DEFAULT](table).is_monotonic_decreasing
    assert not table.isna().any().any()
    first = table.attrs["cost"]["first order"]
    assert first["examples"] == 24
    # Every image goes forward once, every second one backward, up to the first site.
    with torch.no_grad():
        forward = costs.count_flops(lambda: model(tiny.images("resnet", 1)))
    earliest = selection.site_costs(model, sites.list_sites(model)[1:2])["layer1.0:input"]
    passes = 25 * forward + 12 * earliest.backward  # one forward pass for the channels
    assert first["flops"] == pytest.approx(passes + tangents("resnet").head_flops, rel=1e-3)  # beside: the head
    by_windows = selection.rank_sites(model, task, score="windows", num_examples=24, num_validation=12)
    assert by_windows["windows"].is_monotonic_increasing
    assert "newton" not in by_windows


def test_after_the_last_pooling_no_alignment_is_left_for_a_prompt():
    """There a prompt shifts all images' features alike: the tangent kernel is constant."""
    model = tiny.backbone("resnet")
    before, last = sites.list_sites(model)[-2:]
    table = selection.rank_sites(
        model, tiny.task(), [before, last], score="newton", num_examples=24, num_second_order=12, num_validation=12
    )
    alignment = table.set_index("site")["alignment"]
    assert alignment[last] == pytest.approx(0.0, abs=1e-6)
    assert abs(alignment[before]) > 1e-3
    assert table["newton"].is_monotonic_decreasing
    assert table.attrs["cost"]["second order"]["examples"] == 12
    assert table.attrs["cost"]["second order"]["flops"] > 0 < table.attrs["cost"]["second order"]["seconds"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "luck"}, "cannot rank by 'luck'; there are coherence, windows, gain"),
        ({"score": "newton"}, "with num_second_order 0; newton and alignment need 4 to 200 images"),
        ({"num_examples": 1001}, "num_examples is 1001"),
        ({"num_second_order": 201}, "num_second_order 201; give 8 to 1000 images, and 0 or 4 to 200"),
        ({"places": ["blocks.9:input"]}, "no module 'blocks.9'"),
    ],
)
def test_what_cannot_be_ranked_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        selection.rank_sites(tiny.backbone("vit"), tiny.task(), **options)


def test_the_old_name_of_a_score_works_with_a_warning():
    model, task, options = tiny.backbone("vit"), tiny.task(), {"num_examples": 16, "num_validation": 12}
    expected = selection.rank_sites(model, task, score="windows_times_gradient", **options)
    message = "the score 'found' is 'windows_times_gradient' now; the old name goes with version 0.2"
    with pytest.warns(DeprecationWarning, match=message) as caught:
        table = selection.rank_sites(model, task, score="found", **options)
    assert [warning.filename for warning in caught] == [__file__]
    assert table.equals(expected)
    with pytest.warns(DeprecationWarning, match=message) as caught:
        selection.find_site(model, task, score="found", recipe=RECIPE, budget=0.9, places=["blocks.2:input"])
    assert [warning.filename for warning in caught] == [__file__]
    assert record_format.score_of("found") == selection.DEFAULT
    assert [record_format.score_of(record_format.spell_score(name)) for name in selection.SCORES] == list(
        selection.SCORES
    )


def test_ranking_leaves_the_backbone_as_it_was():
    model = tiny.backbone("vit")
    before = backbones.digest(model)
    places = ["blocks.2:input"]
    selection.rank_sites(model, tiny.task(), places, num_examples=16, num_second_order=8, num_validation=12)
    assert backbones.digest(model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_sample_without_four_images_of_a_class_is_refused():
    with pytest.raises(ValueError, match=r"none of the 3 classes has four of the 8 images, .* raise num_examples"):
        selection.rank_sites(tiny.backbone("vit"), tiny.task(), num_examples=8, num_validation=12)


@pytest.mark.parametrize("family", ["vit", "swin", "convnext", "resnet"])
def test_a_backbone_that_cannot_be_traced_is_ranked_all_the_same(family):
    model = backbones.freeze(Untraceable(family))
    task = tiny.task(size=backbones.input_size(model))
    options = {"num_examples": 16, "num_validation": 12}
    with pytest.raises(sites.UntraceableError):
        sites.channel_axis(model, "body:output")
    table = selection.rank_sites(tiny.backbone(family), task, **options)
    places = [f"body.{site}" for site in table["site"]]
    again = selection.rank_sites(model, task, places, **options)
    numbers = ["norm", "coherence", "reach", "coverage", "gain", "individual"]  # reach tells channels from positions
    expected = table.set_index("site")[numbers].add_prefix("", axis=0).rename(index=lambda site: f"body.{site}")
    pd.testing.assert_frame_equal(again.set_index("site")[numbers].loc[places], expected, rtol=1e-4, atol=1e-6)


def test_a_shape_that_no_layer_knows_has_no_channels():
    with pytest.raises(ValueError, match="cannot tell the channel axis of site ':input': no layer is given or makes"):
        scores._called_axes(nn.Flatten(), [":input"], torch.zeros(1, 2, 3))


def test_memory_holds_the_graph_of_one_chunk(monkeypatch):
    model, task = tiny.backbone("vit"), tiny.task()
    options = {"num_examples": 24, "num_second_order": 12, "num_validation": 12, "score": "newton"}
    options["places"] = ["blocks.1:input", "blocks.2:input"]
    expected = selection.rank_sites(model, task, **options).set_index("site")
    monkeypatch.setattr(scores, "_CHUNK", 5)
    sizes = []

    def note(_, args):
        if isinstance(args[0], torch.Tensor):  # torch.fx passes by as well
            sizes.append(len(args[0]))

    handle = model.blocks[1].mlp.register_forward_pre_hook(note)
    found = selection.rank_sites(model, task, **options).set_index("site")
    handle.remove()
    assert max(sizes) == 5
    pd.testing.assert_frame_equal(found.loc[expected.index], expected, rtol=1e-3, atol=1e-5)


# -------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_counts_what_every_cut_costs(family):
    model = tiny.backbone(family)
    places = sites.list_sites(model)
    x = tiny.images(family, 1)
    for site, cost in selection.site_costs(model, places).items():
        prefix, suffix = sites.split(model, site)
        with torch.no_grad():
            crossing = prefix(x)
        leaf = crossing[0].clone().requires_grad_()
        forward = costs.count_flops(lambda: suffix(*crossing))  # noqa: B023
        both = costs.count_flops(lambda: suffix(leaf, *crossing[1:]).sum().backward())  # noqa: B023
        assert (cost.suffix, cost.backward) == (forward, both - forward), site
        assert cost.prefix == costs.count_flops(lambda: prefix(x)), site  # noqa: B023


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_training_costs_what_is_counted_while_it_runs(family):
    model, task = tiny.backbone(family), tiny.task()
    site = sites.list_sites(model)[2]
    bundle = [training.Configuration(learning_rate=rate) for rate in RATES[:2]]
    recipe = replace(RECIPE, num_epochs=2)

    def fit():
        training.fit(model, task, methods.ActivationPrompting(site=site), bundle, recipe=recipe)

    counted = costs.count_flops(fit)
    race = search._Race(model, task, recipe, [site], seed=0)
    stated = race.cost([search._Candidate(site, rate) for rate in RATES[:2]], recipe)
    assert stated == pytest.approx(counted, rel=0.04)  # one image goes through the backbone for its shapes


# ------------------------------------------------------------------------------------------------ search


@pytest.fixture(scope="module")
def found():
    return selection.find_site(tiny.backbone("vit"), tiny.task(), recipe=RECIPE, budget=0.5, learning_rates=RATES)


def test_a_search_chooses_on_validation(found):
    assert found.fit is training.choose(found.fits)
    assert found.site == found.fit.method.site
    assert found.fit.recipe.num_epochs == 9
    assert list(found.trials["epochs"]) == sorted(found.trials["epochs"])
    last = found.trials[found.trials["epochs"] == 9]
    assert found.fit.validation_accuracy == last["validation_accuracy"].max()


@pytest.mark.parametrize("family", ["vit", "mobilenetv2"])
def test_flops_counted_while_it_runs_keep_the_budget(family):
    model, task = tiny.backbone(family), tiny.task()
    every = sites.list_sites(model)
    places = every[1:] if family == "vit" else every[-3:]
    bundle = [training.Configuration(learning_rate=rate) for rate in RATES]
    budget, found = 0.3, []

    def search():
        options = {"budget": budget, "learning_rates": RATES, "places": places}
        found.append(selection.find_site(model, task, recipe=RECIPE, **options))

    def exhaust():
        for site in places:
            training.fit(model, task, methods.ActivationPrompting(site=site), bundle, recipe=RECIPE)

    spent, whole = costs.count_flops(search), costs.count_flops(exhaust)
    # What torch does not count: the fit of the head. What it counts beside: one image for each bundle's shapes.
    heads = scores._Tangents(model, task, places, task.split(0, 30, 12).train).head_flops
    assert found[0].flops == pytest.approx(spent + heads, rel=0.05)
    assert found[0].exhaustive_flops == pytest.approx(whole, rel=0.05)
    assert spent + heads <= 1.05 * budget * whole
    assert found[0].share <= budget


def test_the_full_rung_takes_the_best_of_the_one_before(found):
    short, full = (rows for _, rows in found.trials.groupby("epochs"))
    assert (set(short["epochs"]), set(full["epochs"])) == ({3}, {9})
    ranked = short.sort_values(["validation_accuracy", "validation_loss"], ascending=[False, True])
    tried = list(zip(ranked["site"], ranked["learning_rate"], strict=True))
    entrants = list(zip(full["site"], full["learning_rate"], strict=True))
    assert tried[0] in entrants
    assert set(entrants) <= set(tried)
    assert len(entrants) < len(tried)


def test_sites_enter_with_the_middle_rate_in_the_order_of_their_scores():
    queue = [(c.site, RATES.index(c.learning_rate)) for c in search._queue(["good", "bad"], RATES[::-1])]
    assert queue == [("good", 1), ("bad", 1), ("good", 0), ("good", 2), ("bad", 0), ("bad", 2)]


def test_what_the_budget_has_left_goes_to_sites_that_it_can_still_pay_for(monkeypatch):
    """Scores that put the input first: an early site takes most of a small budget, late ones what remains."""
    model, task = tiny.backbone("vit"), tiny.task()
    monkeypatch.setitem(selection.SCORES, selection.DEFAULT, lambda table: -table["depth"])
    found = selection.find_site(model, task, recipe=RECIPE, budget=0.3, learning_rates=RATES)
    assert found.scores["site"][0] == "blocks.0:input"
    short = found.trials[found.trials["epochs"] == 3]
    assert {"blocks.0:input", "blocks.2:output"} <= set(short["site"])
    every = len(found.scores) * len(RATES)
    assert 3 < len(short) < every


def test_a_full_training_is_put_aside_for_the_costliest_in_the_race():
    model, task = tiny.backbone("vit"), tiny.task()
    early, late = "blocks.0:input", "blocks.2:input"
    race = search._Race(model, task, RECIPE, [early, late], seed=0)
    short, full = search._ladder(RECIPE)
    candidates = [search._Candidate(site, RATES[1]) for site in (early, late)]
    both = sum(race.cost([candidate], short) for candidate in candidates)
    enough = both + race._training(early, 1, full)
    assert list(race.affordable(candidates, short, enough, aside=full)) == [early, late]
    assert list(race.affordable(candidates, short, enough - 1, aside=full)) == [early]
    assert list(race.affordable(candidates[::-1], short, enough - 1, aside=full)) == [late]
    assert list(race.affordable(candidates, short, both)) == [early, late]


def test_learning_rates_of_a_single_site_compete_as_well():
    model, task = tiny.backbone("vit"), tiny.task()
    found = selection.find_site(model, task, recipe=RECIPE, budget=0.9, learning_rates=RATES, places=["blocks.1:input"])
    short = found.trials[found.trials["epochs"] == 3]
    assert set(short["site"]) == {"blocks.1:input"}
    assert len(short) > 1
    assert len(found.trials[found.trials["epochs"] == 9]) < len(short)


def test_a_larger_budget_tries_more(found):
    more = selection.find_site(tiny.backbone("vit"), tiny.task(), recipe=RECIPE, budget=1.0, learning_rates=RATES)
    assert len(more.trials) > len(found.trials)


def test_the_test_part_is_not_looked_at(found):
    task = tiny.task()
    other = replace(task, test=tasks.Images(255 - task.test.pixels, task.test.labels.flip(0)))
    again = selection.find_site(tiny.backbone("vit"), other, recipe=RECIPE, budget=0.5, learning_rates=RATES)
    assert again.trials.equals(found.trials)
    assert torch.equal(again.fit.prompt.delta, found.fit.prompt.delta)


def test_a_budget_that_buys_nothing_says_what_would():
    model, task = tiny.backbone("vit"), tiny.task()
    with pytest.raises(
        ValueError, match=r"a budget of 0\.01 .* buys no whole training; at least (0\.\d+) does"
    ) as error:
        selection.find_site(model, task, recipe=RECIPE, budget=0.01, learning_rates=RATES)
    least = float(str(error.value).split("at least ")[1].split()[0])
    assert selection.find_site(model, task, recipe=RECIPE, budget=least, learning_rates=RATES).share <= least


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5, math.inf])
def test_a_budget_is_a_share(budget: float):
    with pytest.raises(ValueError, match="give a share of the exhaustive sweep's FLOPs, above 0 and at most 1"):
        selection.find_site(tiny.backbone("vit"), tiny.task(), recipe=RECIPE, budget=budget, learning_rates=RATES)


def test_a_backbone_that_is_not_frozen_is_refused_before_anything_runs():
    model = copy.deepcopy(tiny.backbone("resnet")).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"call backbones.freeze\(model\)"):
        selection.rank_sites(model, tiny.task())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_second_order_scores_of_a_few_images_are_refused():
    with pytest.raises(ValueError, match=r"num_second_order 1; give 8 to 1000 images, and 0 or 4 to 200 of them"):
        selection.rank_sites(tiny.backbone("vit"), tiny.task(), num_second_order=1)


# ------------------------------------------------------------------------------------- records and command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place, task = tmp_path_factory.mktemp("images"), tiny.task(48, 12, size=64)
    for part, images in (("train", task.train), ("test", task.test)):
        for index, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
            path = place / part / task.classes[label] / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return place


def test_scores_are_recorded_in_the_order_of_the_sites(folder, tmp_path):
    places = ["layer1.1:input", "layer4.0:input"]
    config = {"backbone": {"name": "resnet_micro"}, "task": f"folder:{folder}", "size": 64, "places": places}
    config |= {"num_examples": 16, "num_second_order": 0, "num_validation": 9, "seed": 0}
    record = records.fetch(site_search.score, config, folder=tmp_path)
    assert [row["site"] for row in record["sites"]] == places
    direct = selection.rank_sites(
        backbones.load("resnet_micro"), tasks.load(f"folder:{folder}", 64), places, num_examples=16, num_validation=9
    ).set_index("site")
    for row in record["sites"]:
        assert row["gain"] == pytest.approx(direct["gain"][row["site"]], rel=1e-3, abs=1e-3)


def test_a_search_is_recorded_with_what_it_spent_and_the_test_part_once(folder, tmp_path):
    places, rates = ["layer3.0:input", "layer4.0:input"], [4e-3, 1.6e-2, 6.4e-2]
    recipe = {"num_epochs": 2, "batch_size": 8, "num_train": 24, "num_validation": 9, "num_test": 9}
    config = {"backbone": {"name": "resnet_micro"}, "task": f"folder:{folder}", "size": 64, "places": places}
    config |= {"recipe": recipe, "learning_rates": rates, "budget": 0.9, "score": "windows", "seed": 0}
    record = records.fetch(site_search.search, config, folder=tmp_path)
    direct = selection.find_site(
        backbones.load("resnet_micro"),
        tasks.load(f"folder:{folder}", 64),
        recipe=training.Recipe(**recipe),
        budget=0.9,
        learning_rates=rates,
        places=places,
        score="windows",
    )
    assert (record["site"], record["flops"]) == (direct.site, direct.flops)
    assert record["flops"] <= 0.9 * record["exhaustive_flops"]
    assert record["validation_accuracy"] == direct.fit.validation_accuracy
    assert record["accuracy"] == pytest.approx(100 * np.mean(record["correct"]))
    assert len(record["correct"]) == 9
    assert [row["site"] for row in record["trials"]] == list(direct.trials["site"])


def call(*arguments):
    return CliRunner().invoke(app, ["layers", *map(str, arguments)])


@pytest.mark.parametrize("prefix", ["", "folder:"])
def test_the_command_prints_a_ranked_table_draws_it_and_names_the_site(folder, prefix, tmp_path):
    picture = tmp_path / "scores.png"
    shown = call("--backbone", "resnet_micro", "--data", f"{prefix}{folder}", "--examples", 24, "--output", picture)
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    ranked = [line.split()[1] for line in lines if line[:1].isdigit()]
    assert sorted(ranked) == sorted(sites.list_sites(backbones.load("resnet_micro"))[1:])
    assert lines[-1] == f"prompt {ranked[0]}"
    with Image.open(picture) as image:
        assert image.width > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "resnet_micro"], "name either a folder of images (--data) or a task (--task)"),
        (["--backbone", "resnet_micro", "--data", "nowhere"], "there is no folder 'nowhere'"),
        (["--backbone", "resnet_mikro", "--task", "textures"], "no backbone 'resnet_mikro'"),
        (["--backbone", "resnet_micro", "--task", "textures", "--score", "luck"], "cannot rank by 'luck'"),
        (["--backbone", "resnet_micro", "--task", "textures", "--score", "newton"], "such as --second-order 40"),
        (["--task", "textures"], "Missing option '--backbone'"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message):
    shown = call(*arguments)
    assert shown.exit_code != 0
    assert message in " ".join(shown.output.replace("│", " ").split())


def test_empty_lists_are_refused_and_aliases_are_one_site():
    backbone, task = tiny.backbone("vit"), tiny.task(96)
    with pytest.raises(ValueError, match="learning_rates is empty"):
        selection.find_site(backbone, task, learning_rates=())
    with pytest.raises(ValueError, match="places is empty"):
        selection.rank_sites(backbone, task, [])
    table = selection.rank_sites(backbone, task, ["blocks.0", "blocks.1:input", "blocks.0:output"], num_validation=24)
    assert list(table["site"]) == ["blocks.1:input"]
