"""Claims about the study of pixel prompts: cells, shifted test parts, masks, and what is read off them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from apthory import backbones, methods, sites, tasks, training
from apthory.lab import records
from apthory.methods import pixels
from apthory.studies import catalogue, cells, layers, masks, pixel_grids, record_format
from apthory.studies import pixels as pixel_study
from apthory.studies.pixels import StudyPart

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "input_size": 32}
RECIPE = training.Recipe(num_epochs=2, batch_size=16, num_train=24, num_validation=9, num_test=12, precision="float32")
PROTOCOL = cells.Protocol(recipe=RECIPE, learning_rates=(2e-2,), seeds=(0, 1), control_seeds=(0,))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A ViT of two blocks in a weight file; its source classifier has twelve classes."""
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    fields = {key: value for key, value in SMALL.items() if key != "input_size"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(backbones.create("vit_micro", 12, **fields).state_dict(), path)
    return {"name": "vit_micro", "weights": str(path), "device": "cpu", **SMALL}


@pytest.fixture
def part(spec: dict) -> StudyPart:
    return StudyPart(
        arms={"evp": {"name": "evp", "width": 60}, "linear_probe": {"name": "linear_probe"}, "full": {"name": "full"}},
        backbones=(spec,),
        tasks=("textures",),
        protocol=PROTOCOL,
    )


def config(spec: dict, method: dict, **fields) -> dict:
    return cells.cell(replace(PROTOCOL, seeds=(0,)), spec, "textures", method) | fields


# ------------------------------------------------------------------------------------------ cells


def test_cells_of_the_default_protocol_are_those_of_the_layer_study():
    some = {"backbones": ({"name": "resnet_micro"},), "tasks": ("dtd10",)}
    layer = list(
        layers.layer_cells(replace(layers.LAYER_STUDIES["small"]["S"], **some, norm_every=99, frozen_every=99))
    )
    main = replace(pixel_grids.PIXEL_STUDIES["small"]["pixels"]["methods"], **some)
    for names, cell in pixel_study.pixel_cells({"methods": main}):
        assert (cell in layer) == (names["arm"] in ("ap", "linear_probe", "full"))


@pytest.mark.parametrize("name", backbones.SHIPPED)
def test_places_are_all_block_sites_but_the_image(name: str):
    assert list(pixel_grids.PROMPT_SITES[name]) == sites.list_sites(backbones.create(name))[1:]


def test_places_of_mobilenet_exist():
    model = backbones.create("mobilenetv2_100", pad_type="same")
    assert set(pixel_grids.PROMPT_SITES["mobilenetv2_100"]) <= set(sites.list_sites(model))


def test_lengths_are_scaled_to_the_input_and_the_default_is_one_cell(part: StudyPart):
    arms = {"evp": pixel_grids._wide("evp", 30), "wide": pixel_grids._wide("evp", 60, around=False)}
    arms |= {"regions": {"name": "adavipro", "region": 56}}
    found = [cell["method"] for _, cell in pixel_study.pixel_cells({"x": replace(part, arms=arms)})]
    assert found == [
        {"name": "evp"},
        {"name": "evp", "width": 9, "around": False},
        {"name": "adavipro", "region": 8},
    ]


def test_only_full_fine_tuning_is_a_control_and_an_unprompted_mapping_trains_nothing(part: StudyPart):
    heads = {"linear": None, "frequency": {"how": "frequency"}}
    found = {(n["arm"], n["head"]): c for n, c in pixel_study.pixel_cells({"x": replace(part, heads=heads)})}
    assert {arm: len(cell["seeds"]) for (arm, _), cell in found.items()} == {"evp": 2, "linear_probe": 2, "full": 1}
    assert [key for key, cell in found.items() if cell["recipe"]["num_epochs"] == 1] == [("linear_probe", "frequency")]
    assert all(("head" in cell) == (head == "frequency") for (_, head), cell in found.items())


def test_images_per_class_follow_the_task(part: StudyPart):
    found = pixel_study.pixel_cells({"x": replace(part, per_class=4, tasks=("textures", "orientation"))})
    assert {cell["task"]: cell["recipe"]["num_train"] for _, cell in found} == {"textures": 36, "orientation": 24}


def test_few_images_are_trained_on_for_as_many_steps_as_the_usual_number():
    parts = pixel_grids.PIXEL_STUDIES["small"]["pixels"]
    few = {name: parts[name] for name in ("4 per class", "16 per class")}
    for names, cell in pixel_study.pixel_cells(few):
        recipe = cell["recipe"]
        epochs, steps = recipe["num_epochs"], -(-recipe["num_train"] // recipe["batch_size"])
        assert epochs == 60 or abs(epochs * steps - 130) <= steps / 2, (names, cell["task"])  # 10 epochs of 13 steps


@pytest.mark.parametrize("name", [name for name in pixel_study.NUM_CLASSES if name in tasks.EMBEDDED])
def test_numbers_of_classes_are_the_tasks(name: str):
    assert pixel_study.NUM_CLASSES[name] == len(tasks.load(name, 32).classes)


@pytest.mark.parametrize("suite", pixel_grids.PIXEL_STUDIES)
def test_every_named_cell_can_be_made(suite: str):
    for study in pixel_grids.PIXEL_STUDIES[suite].values():
        for _, cell in pixel_study.pixel_cells(study):
            assert json.loads(json.dumps(cell)) == cell
            record_format.method_of(cell["method"])
            training.Recipe(**cell["recipe"])


def test_the_command_knows_these_studies_and_the_layer_studies():
    known = catalogue.known()
    assert {"S", "mobilenet", "pixels", "pixels-mobilenet", "masks"} <= set(known["small"])
    assert layers.find_studies("small", "pixels", known)["pixels"] is pixel_grids.PIXEL_STUDIES["small"]["pixels"]


# ------------------------------------------------------------------------------------------ a study


@pytest.fixture(scope="module")
def table(spec: dict, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("records")
    arms = {"ap": {"name": "ap", "site": "each"}, "vp": {"name": "vp"}, "linear_probe": {"name": "linear_probe"}}
    shared = {"backbones": (spec,), "tasks": ("textures",), "protocol": PROTOCOL}
    places = {"vit_micro": ("blocks.0:input", "blocks.1:input")}
    study = {
        "methods": StudyPart(arms=arms, places=places, **shared),
        "again": StudyPart(arms={"same": {"name": "vp"}}, **shared),
        "mapping": StudyPart(arms={"evp": {"name": "evp"}}, heads={"random": {"how": "random"}}, **shared),
        "shift": StudyPart(arms={"vp": {"name": "vp"}}, shifts=pixel_grids.CORRUPTIONS[::4], **shared),
    }
    return pixel_study.run_pixel_study(study, folder)


def test_parts_share_cells(table: pd.DataFrame):
    vp = table[(table["part"] == "methods") & (table["arm"] == "vp")]
    assert set(table[table["arm"] == "same"]["key"]) == set(vp["key"])
    assert len(vp) == 2  # seeds


def test_an_arm_at_each_site_has_rows_for_each(table: pd.DataFrame):
    ap = table[table["arm"] == "ap"]
    assert ap.groupby("site")["seed"].apply(list).to_dict() == {"blocks.0:input": [0, 1], "blocks.1:input": [0, 1]}
    assert set(table[table["arm"] == "vp"]["site"]) == {":input"}


def test_a_cell_with_shifts_is_the_plain_cell_too(spec: dict, tmp_path: Path):
    shared = {"backbones": (spec,), "tasks": ("textures",), "protocol": PROTOCOL}
    vp = {"vp": {"name": "vp"}}
    study = {
        "methods": StudyPart(arms=vp, **shared),
        "corruptions": StudyPart(arms=vp, shifts=pixel_grids.CORRUPTIONS[:2], **shared),
    }
    table = pixel_study.run_pixel_study(study, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert table.groupby("part")["shift"].apply(set).to_dict() == {
        "methods": {""},
        "corruptions": {"", "noise 0.05", "noise 0.1"},
    }


def test_a_method_as_it_comes_is_the_cell_of_another_part_and_gives_the_seeds_asked_for(spec: dict, tmp_path: Path):
    shared = {"backbones": (spec,), "tasks": ("textures",)}
    fewer = replace(PROTOCOL, seeds=(0,))
    study = {
        "methods": StudyPart(arms={"vp": {"name": "vp"}}, protocol=PROTOCOL, **shared),
        "side": StudyPart(arms={"vp": {"name": "vp"}}, protocol=fewer, usual=PROTOCOL, **shared),
    }
    assert pixel_study.recorded(study, tmp_path) is None
    table = pixel_study.run_pixel_study(study, tmp_path)
    assert table.groupby("part")["seed"].apply(list).to_dict() == {"methods": [0, 1], "side": [0]}
    assert table["key"].nunique() == 1
    assert pixel_study.recorded(study, tmp_path).drop(columns="correct").equals(table.drop(columns="correct"))
    assert pixel_study.recorded({}, tmp_path) is None


def test_the_choice_is_by_mean_validation_accuracy(table: pd.DataFrame):
    ap = table[table["arm"] == "ap"].copy()
    ap["validation_accuracy"] = [50.0, 60.0, 90.0, 10.0]
    ap["accuracy"] = [0.0, 0.0, 100.0, 100.0]
    assert set(cells.best(ap, "site")["site"]) == {"blocks.0:input"}


def test_shifted_rows_stand_beside_the_own_test_part(table: pd.DataFrame):
    shifted = table[table["part"] == "shift"]
    assert list(shifted["shift"].unique()) == ["", "noise 0.05", "blur 2", "contrast 0.15"]
    own, plain = shifted[shifted["shift"] == ""], table[(table["part"] == "methods") & (table["arm"] == "vp")]
    for one, other in zip(own.itertuples(), plain.itertuples(), strict=True):
        assert one.accuracy == other.accuracy  # the same training
        assert (one.correct == other.correct).all()
    assert {len(row) for row in shifted["correct"]} == {12}


def test_the_slope_is_that_of_the_line():
    assert pixel_study.slope(np.array([0.0, 0.5, 1.0]), np.array([10.0, 30.0, 20.0])) == pytest.approx(10.0)


# ------------------------------------------------------------------------------------------ corruptions


def test_corruptions_do_what_they_are_called():
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(64, 192, (4, 3, 32, 32), generator=random).to(torch.uint8)
    images = tasks.Images(pixels, torch.arange(4))
    change = {name: pixel_study.corrupted(images, name, 0.1) for name in ("noise", "contrast")}
    spread = (change["noise"].pixels.float() - pixels.float()).std()
    assert spread == pytest.approx(25.5, rel=0.05)
    less = change["contrast"].pixels.float()
    assert less.std((2, 3)).mean() == pytest.approx(0.1 * float(pixels.float().std((2, 3)).mean()), rel=0.1)
    assert torch.allclose(less.mean((2, 3)), pixels.float().mean((2, 3)), atol=0.5)
    blurred = pixel_study.corrupted(images, "blur", 2.0).pixels.float()
    assert blurred.std((2, 3)).mean() < 0.25 * pixels.float().std((2, 3)).mean()
    assert torch.allclose(blurred.mean((2, 3)), pixels.float().mean((2, 3)), atol=2.0)
    assert all(torch.equal(one.labels, images.labels) for one in change.values())
    with pytest.raises(ValueError, match="no corruption 'fog'; expected noise, blur or contrast"):
        pixel_study.corrupted(images, "fog", 1.0)


def test_a_domain_is_trained_on_alone_and_another_tested(spec: dict, monkeypatch: pytest.MonkeyPatch):
    whole = tasks.load("textures", 32)
    seen = []

    def load(task: str, size: int, domain: str) -> tasks.Task:
        seen.append(domain)
        other = tasks.Images(255 - whole.test.pixels, whole.test.labels)
        return whole if domain == "bright" else replace(whole, name="dark", test=other)

    monkeypatch.setattr(pixel_study, "_domain", load)
    cell = config(spec, {"name": "linear_probe"}, domain="bright", shifts=[{"domain": "dark"}])
    values = pixel_study.run_shifted(**cell)
    assert seen == ["bright", "dark"]
    (shift,) = values["shifts"]
    assert shift["domain"] == "dark"
    model = backbones.load(**spec)
    (fit,) = training.tune(model, whole, methods.LinearProbe(), recipe=RECIPE, learning_rates=[2e-2], seeds=[0])
    plain = training.evaluate(fit, load("", 32, "dark"))
    assert shift["accuracy"] == [plain.accuracy]


# ------------------------------------------------------------------------------------------ masks


def test_distances_are_means_over_all_pairs():
    values = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    weights = torch.arange(7) / 21
    for several in (values, (values < 0.3).float()):
        gaps = [(group[i] - group[j]).abs().double() for group in several for i in range(5) for j in range(i)]
        expected = float((torch.stack(gaps).mean(0) * weights).sum())
        assert masks.mean_distance(several, weights) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least two"):
        masks.mean_distance(values[:, :1], weights)


def test_regions_weigh_as_much_as_the_frame_has_pixels_in_them():
    layout = pixels.Layout(size=32, mean=(0.5,) * 3, std=(0.5,) * 3, width=5, region=4)
    found = masks.frame_pixels(layout)
    assert found[0].tolist() == [16.0] * 8
    assert found[1].tolist() == [16.0, 7.0, 4.0, 4.0, 4.0, 4.0, 7.0, 16.0]  # one of the frame's pixels reaches here
    assert found.sum() == 32**2 - 22**2
    assert not found[2:-2, 2:-2].any()
    with pytest.raises(ValueError, match="no regions"):
        masks.frame_pixels(replace(layout, region=None))


def on_frame(prompt: nn.Module, masks: Tensor) -> Tensor:
    """Values of regions at each of the frame's pixels."""
    side = prompt.layout.region
    return masks.repeat_interleave(side, -2).repeat_interleave(side, -1)[..., prompt.layout.mask]


@pytest.fixture(scope="module")
def drawn(spec: dict) -> tuple[dict, dict]:
    cell = config(spec, {"name": "adavipro", "width": 5})
    again = {name: cell[name] for name in ("backbone", "task", "size", "method", "recipe")} | {"learning_rate": 2e-2}
    return cell, again


def test_a_drawn_prompt_is_the_trained_one(drawn: tuple[dict, dict], spec: dict, tmp_path: Path):
    _, again = drawn
    record = records.fetch(masks.draw_prompt, {**again, "seed": 0, "num_images": 3}, folder=tmp_path)
    model, task = backbones.load(**spec), tasks.load("textures", 32)
    (fit,) = training.fit(
        model, task, methods.AdaViPro(width=5), [training.Configuration(learning_rate=2e-2)], recipe=RECIPE
    )
    x = backbones.normalize(model, task.test[fit.split.test[:3]])
    _, std = backbones.mean_std(model)
    expected = (fit.prompt(x) - x) * std
    assert record["images"] == fit.split.test[:3].tolist()
    assert torch.allclose(masks.unpack(record), expected, atol=0.51 / 255)
    assert record["share"] == pytest.approx(on_frame(fit.prompt, fit.prompt.regions(x)).mean(1).tolist())


def test_measured_masks_are_those_of_the_fits(drawn: tuple[dict, dict], spec: dict):
    _, again = drawn
    values = masks.measure_masks(**again, seeds=[0, 1], num_images=6)
    model, task = backbones.load(**spec), tasks.load("textures", 32)
    bundle = [training.Configuration(learning_rate=2e-2, seed=seed) for seed in (0, 1)]
    fits = training.fit(model, task, methods.AdaViPro(width=5), bundle, recipe=RECIPE)
    x = backbones.normalize(model, task.test[fits[0].split.test[:6]])
    shown = torch.stack([on_frame(fit.prompt, fit.prompt.regions(x)) for fit in fits])
    assert values["share"] == pytest.approx(float(shown.mean()))
    assert values["between_seeds"] == pytest.approx(float((shown[0] != shown[1]).double().mean()))
    chances = torch.stack([fit.prompt.probabilities(x) for fit in fits])
    by_pixel = torch.stack([on_frame(fit.prompt, chance) for fit, chance in zip(fits, chances, strict=True)])
    apart = float((by_pixel[0] - by_pixel[1]).abs().mean())
    assert values["probability_between_seeds"] == pytest.approx(apart, abs=1e-6)
    reached = masks.frame_pixels(fits[0].prompt.layout) > 0
    assert values["num_regions"] == int(reached.sum()) == 64 - 16
    assert values["probability"][1] == pytest.approx(float(chances[..., reached].flatten().quantile(0.5)))
