"""Scores and the search: gradients as a slow loop gives them, costs as they are counted, budgets that hold."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.nn import functional
from typer.testing import CliRunner

from apthory import backbones, efficiency, layers, methods, records, selection, sites, tasks, training
from apthory.__main__ import app
from apthory.theory import tangent

RECIPE = training.Recipe(num_epochs=9, batch_size=16, num_train=30, num_validation=12, num_test=12, precision="float32")
RATES = (4e-3, 1.6e-2, 6.4e-2)
FAMILIES = ("vit", "resnet", "mobilenetv2")


def tangents(family, num=24):
    model, task = tiny.backbone(family), tiny.task()
    return selection._Tangents(model, task, sites.list_sites(model)[1:], task.split(0, num, 12).train)


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_one_image_and_one_site_at_a_time(family):
    prepared = tangents(family)
    model, task = prepared.backbone, tiny.task()
    rows = {row["site"]: row for row in prepared.first_order()}
    for site in prepared.places[1:-1:3]:
        prefix, suffix = sites.split(model, site)
        squares, shares, norms = [], [], []
        for half, head in zip(prepared.halves, prepared.heads, strict=True):
            gradients = []
            for index in half:
                z, *rest = prefix(training.normalized(model, task.train, index[None]))
                norms.append(float(z.norm()))
                z = z.detach().requires_grad_()
                functional.cross_entropy(head(suffix(z, *rest)), task.train.labels[index[None]]).backward()
                gradients.append(z.grad[0].double().flatten())
            products = torch.stack(gradients) @ torch.stack(gradients).T
            num, own = len(half), float(products.trace())
            squares.append((float(products.sum()) - own) / (num * (num - 1)))
            shares.append(squares[-1] / (own / num))
        expected = np.mean(norms) * np.sign(np.mean(squares)) * abs(np.mean(squares)) ** 0.5
        assert rows[site]["norm"] == pytest.approx(np.mean(norms), rel=1e-4)
        assert rows[site]["coherence"] == pytest.approx(np.mean(shares), rel=1e-2, abs=1e-4)
        assert rows[site]["gain"] == pytest.approx(expected, rel=1e-2, abs=1e-2 * rows[site]["individual"])


def test_a_head_sees_none_of_the_images_whose_gradients_are_taken():
    prepared = tangents("vit")
    task = tiny.task()
    first, second = prepared.halves
    assert not set(first.tolist()) & set(second.tolist())
    features = [prepared._features(half) for half in prepared.halves]
    decays = [selection._fit_head(features[1], task.train.labels[second], 3, decay) for decay in selection._DECAYS]
    assert any(torch.equal(prepared.heads[0].weight, head.weight) for head, _ in decays)
    # A head that saw them and fits them leaves no gradient: scores would be about the head, not the site.
    own, _ = selection._fit_head(features[0], task.train.labels[first], 3, 1e-9)
    x, labels, shifts = prepared._at(first)

    def size(head):
        loss = lambda y: functional.cross_entropy(y, labels, reduction="none")  # noqa: E731
        g = tangent.example_gradients(lambda s: prepared._model(head, x, s), shifts, loss)
        return tangent.Gradients.of(g["blocks.1:input"]).individual_norm

    assert size(own) < 0.05 * size(prepared.heads[0])


def test_the_head_is_a_converged_linear_probe():
    x, labels = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
    head, _ = selection._fit_head(x, labels, 4, 1e-2)
    unit = float(x.square().mean().sqrt())
    table = torch.cat([head.weight * unit, head.bias[None]]).double().requires_grad_()
    loss = functional.cross_entropy((x / unit).double() @ table[:-1] + table[-1], labels)
    (loss + 1e-2 / 2 * table.square().sum()).backward()
    assert float(table.grad.abs().max()) < 1e-5


def test_ranking_is_a_table_of_sites_best_first_with_its_cost():
    model, task = tiny.backbone("resnet"), tiny.task()
    table = selection.rank_sites(model, task, num_examples=24, num_validation=12)
    assert sorted(table["site"]) == sorted(sites.list_sites(model)[1:])
    assert selection.SCORES[selection.DEFAULT](table).is_monotonic_decreasing
    assert not table.isna().any().any()
    first = table.attrs["cost"]["first order"]
    assert first["examples"] == 24
    # Two forward passes (features for the head, then the gradients) and a backward pass that ends at the first site.
    with torch.no_grad():
        forward = efficiency.count_flops(lambda: model(tiny.images("resnet", 1)))
    earliest = selection.site_costs(model, sites.list_sites(model)[1:2])["layer1.0:input"]
    passes = 24 * (2 * forward + earliest.backward)  # and one image for each site, and the head's own fit
    assert passes < first["flops"] < passes + len(table) * forward + 5e7
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
    assert table.attrs["cost"]["second order"]["flops"] > 0 < table.attrs["cost"]["second order"]["seconds"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "luck"}, "cannot rank by 'luck'; there are coherence, windows, gain"),
        ({"score": "newton"}, "newton and alignment want num_second_order above 0"),
        ({"num_examples": 1001}, "num_examples is 1001"),
        ({"num_second_order": 201}, "num_second_order 201; give 8 to 1000 images, and 0 or 4 to 200"),
        ({"places": ["blocks.9:input"]}, "no module 'blocks.9'"),
    ],
)
def test_what_cannot_be_ranked_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        selection.rank_sites(tiny.backbone("vit"), tiny.task(), **options)


def test_ranking_leaves_the_backbone_as_it_was():
    model = tiny.backbone("vit")
    before = backbones.digest(model)
    places = ["blocks.2:input"]
    selection.rank_sites(model, tiny.task(), places, num_examples=16, num_second_order=8, num_validation=12)
    assert backbones.digest(model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


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
        forward = efficiency.count_flops(lambda: suffix(*crossing))  # noqa: B023
        both = efficiency.count_flops(lambda: suffix(leaf, *crossing[1:]).sum().backward())  # noqa: B023
        assert (cost.suffix, cost.backward) == (forward, both - forward), site
        assert cost.prefix == efficiency.count_flops(lambda: prefix(x)), site  # noqa: B023


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_training_costs_what_is_counted_while_it_runs(family):
    model, task = tiny.backbone(family), tiny.task()
    site = sites.list_sites(model)[2]
    bundle = [training.Configuration(learning_rate=rate) for rate in RATES[:2]]
    recipe = replace(RECIPE, num_epochs=2)

    def fit():
        training.fit(model, task, methods.ActivationPrompting(site=site), bundle, recipe)

    counted = efficiency.count_flops(fit)
    race = selection._Race(model, task, recipe, [site], seed=0)
    stated = race.cost([selection._Candidate(site, rate) for rate in RATES[:2]], recipe)
    assert stated == pytest.approx(counted, rel=0.04)  # one image goes through the backbone for its shapes


# ------------------------------------------------------------------------------------------------ search


@pytest.fixture(scope="module")
def found():
    return selection.find_site(tiny.backbone("vit"), tiny.task(), RECIPE, budget=0.5, learning_rates=RATES)


def test_a_search_keeps_its_budget_and_chooses_on_validation(found):
    assert 0 < found.share <= 0.5
    assert found.fit is training.choose(found.fits)
    assert found.site == found.fit.method.site
    assert found.fit.recipe.num_epochs == 9
    assert list(found.trials["epochs"]) == sorted(found.trials["epochs"])
    last = found.trials[found.trials["epochs"] == 9]
    assert found.fit.validation_accuracy == last["validation_accuracy"].max()


def test_each_rung_takes_the_best_of_the_one_before(found):
    rungs = [rows for _, rows in found.trials.groupby("epochs")]
    assert len(rungs) > 1
    for before, after in itertools.pairwise(rungs):
        ranked = before.sort_values(["validation_accuracy", "validation_loss"], ascending=[False, True])
        entrants = list(zip(after["site"], after["learning_rate"], strict=True))
        assert (ranked["site"].iloc[0], ranked["learning_rate"].iloc[0]) in entrants
        assert set(entrants) <= set(zip(before["site"], before["learning_rate"], strict=True))
    assert len(rungs[-1]) < len(rungs[0])


def test_the_score_and_the_middle_of_the_grid_come_first(found):
    first = found.trials[found.trials["epochs"] == 1]
    assert (found.scores["site"][0], 1.6e-2) in list(zip(first["site"], first["learning_rate"], strict=True))


@pytest.mark.parametrize("budget", [0.2, 0.3, 0.8])
def test_every_budget_holds_whoever_wins(budget):
    model, task = tiny.backbone("resnet"), tiny.task()
    found = selection.find_site(model, task, RECIPE, budget=budget, learning_rates=RATES, score="windows")
    assert found.share <= budget


def test_a_larger_budget_tries_more(found):
    more = selection.find_site(tiny.backbone("vit"), tiny.task(), RECIPE, budget=1.0, learning_rates=RATES)
    assert len(more.trials) > len(found.trials)


def test_the_test_part_is_not_looked_at(found):
    task = tiny.task()
    other = replace(task, test=tasks.Images(255 - task.test.pixels, task.test.labels.flip(0)))
    again = selection.find_site(tiny.backbone("vit"), other, RECIPE, budget=0.5, learning_rates=RATES)
    assert again.trials.equals(found.trials)
    assert torch.equal(again.fit.prompt.delta, found.fit.prompt.delta)


def test_a_budget_that_buys_nothing_says_what_would():
    model, task = tiny.backbone("vit"), tiny.task()
    with pytest.raises(
        ValueError, match=r"a budget of 0\.01 .* buys no whole training; at least (0\.\d+) does"
    ) as error:
        selection.find_site(model, task, RECIPE, budget=0.01, learning_rates=RATES)
    least = float(str(error.value).split("at least ")[1].split()[0])
    assert selection.find_site(model, task, RECIPE, budget=least, learning_rates=RATES).share <= least


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5, math.inf])
def test_a_budget_is_a_share(budget: float):
    with pytest.raises(ValueError, match="give a share of the exhaustive sweep's FLOPs, above 0 and at most 1"):
        selection.find_site(tiny.backbone("vit"), tiny.task(), RECIPE, budget=budget, learning_rates=RATES)


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
    record = records.fetch(layers.score, config, folder=tmp_path)
    assert [row["site"] for row in record["sites"]] == places
    direct = selection.rank_sites(
        backbones.load("resnet_micro"), tasks.load(f"folder:{folder}", 64), places, num_examples=16, num_validation=9
    ).set_index("site")
    for row in record["sites"]:
        assert row["gain"] == pytest.approx(direct["gain"][row["site"]], rel=1e-3, abs=1e-3)


def call(*arguments):
    return CliRunner().invoke(app, ["layers", *map(str, arguments)])


def test_the_command_prints_a_ranked_table_draws_it_and_names_the_site(folder, tmp_path):
    picture = tmp_path / "ranking.png"
    shown = call("--backbone", "resnet_micro", "--data", folder, "--examples", 24, "--output", picture)
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
        (["--task", "textures"], "Missing option '--backbone'"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message):
    shown = call(*arguments)
    assert shown.exit_code != 0
    assert message in " ".join(shown.output.replace("│", " ").split())
