"""Claims about sweeps: cells in order, records that a killed run goes on from, one table whatever ran them."""

import json
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from apthory import backbones, sites, tasks, training
from apthory.__main__ import app
from apthory.lab import records
from apthory.studies import cells, layers, record_format

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "input_size": 32}
RECIPE = training.Recipe(num_epochs=2, batch_size=16, num_train=24, num_validation=9, num_test=12, precision="float32")
CLOCKS = {"bundle_seconds"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> layers.LayerStudy:
    """A backbone of two blocks in a weight file, and a task in an image folder, so that any process sees the same."""
    folder = tmp_path_factory.mktemp("study")
    spec = {key: value for key, value in SMALL.items() if key != "input_size"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(backbones.create("vit_micro", **spec).state_dict(), folder / "weights.safetensors")
    task = tiny.task(42, 12)
    for part, images in (("train", task.train), ("test", task.test)):
        for index, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
            place = folder / "images" / part / task.classes[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / f"{index:03}.png")
    return layers.LayerStudy(
        protocol=cells.Protocol(recipe=RECIPE, learning_rates=(2e-2,), seeds=(0, 1), control_seeds=(0,)),
        backbones=({"name": "vit_micro", "weights": str(folder / "weights.safetensors"), "device": "cpu", **SMALL},),
        tasks=(f"folder:{folder / 'images'}",),
        last_sites=2,
    )


@pytest.fixture(scope="module")
def done(study: layers.LayerStudy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[records.Record]]:
    """The whole study, run once in this process."""
    folder = tmp_path_factory.mktemp("records")
    return folder, layers.fetch_study(study, folder)


def same(one: records.Record, other: records.Record) -> bool:
    """Bit for bit, but for the clocks."""
    values = ({k: v for k, v in record.values.items() if k not in CLOCKS} for record in (one, other))
    return one.key == other.key and one.config == other.config and next(values) == next(values)


def names(cells: list[dict]) -> list[tuple[str, str]]:
    return [(cell["method"]["name"], cell["method"].get("site", "")) for cell in cells]


# ---------------------------------------------------------------------------------------------- cells


def test_finer_studies_prompt_after_every_norm_layer_too(study: layers.LayerStudy):
    finer = names(list(layers.layer_cells(replace(study, finer=True))))
    added = [cell for cell in finer if cell not in names(list(layers.layer_cells(study)))]
    assert added == [("ap", f"{place}:output") for place in ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1",
                                                             "blocks.1.norm2", "norm")]  # fmt: skip


def test_a_norm_layer_lies_between_the_ends_of_its_block():
    spec = json.dumps({"name": "vit_micro"})
    names = [":input", "blocks.0:input", "blocks.0.norm1:output", "blocks.0.norm2:output", "blocks.1:input"]
    depths = [cells._site_depth(spec, name) for name in names]
    assert depths == pytest.approx([0, 1 / 9, 4 / 27, 5 / 27, 2 / 9])
    assert cells._site_depth(spec, "blocks.7:output") == cells._site_depth(spec, ":output") == 1


def test_the_paper_suite_names_networks_that_exist():
    for spec in layers.WIDE:
        model = backbones.create(**cells._architecture_of(spec))
        assert len(sites.list_sites(model)) > 10


def test_cells_are_prompts_and_cheap_controls_first(study: layers.LayerStudy):
    assert names(list(layers.layer_cells(study))) == [
        ("linear_probe", ""),
        ("ap", "blocks.1:input"),
        ("site_probe", "blocks.1:input"),
        ("ap", "blocks.1:output"),
        ("site_probe", "blocks.1:output"),
        ("frozen_head", "blocks.1:input"),
        ("norm", "blocks.1:input"),
        ("full", ""),
    ]


def test_all_sites_start_at_the_image_where_prompting_is_visual(study: layers.LayerStudy):
    every = replace(study, last_sites=None, norm_every=2, frozen_every=3, full=False)
    prompts = [pair for pair in names(list(layers.layer_cells(every))) if pair[0] in ("vp", "ap")]
    assert prompts == [("vp", ":input"), *(("ap", f"blocks.{end}") for end in ("0:input", "1:input", "1:output"))]
    chosen = names(list(layers.layer_cells(every)))
    assert [site for name, site in chosen if name == "frozen_head"] == ["blocks.1:input"]
    assert [site for name, site in chosen if name == "norm"] == ["blocks.1:input"]  # none lies after ":input"
    assert not any(name == "full" for name, _ in chosen)


def test_a_cell_is_json_and_holds_the_whole_protocol(study: layers.LayerStudy):
    for cell in layers.layer_cells(study):
        assert json.loads(json.dumps(cell)) == json.loads(json.dumps(cell, sort_keys=True))
        assert training.Recipe(**cell["recipe"]) == RECIPE
        assert cell["learning_rates"] == [2e-2]
        control = cell["method"]["name"] in ("frozen_head", "norm", "full")
        assert cell["seeds"] == ([0] if control else [0, 1])
        assert cell["size"] == 32


def test_studies_are_found_by_name_and_all_of_a_suite_without():
    assert layers.find_studies("small", "mobilenet, S") == {
        n: layers.LAYER_STUDIES["small"][n] for n in ("mobilenet", "S")
    }
    assert layers.find_studies("small") == layers.LAYER_STUDIES["small"]
    for suite, names in (("small", "S,nothing"), ("huge", "S"), ("huge", "")):
        with pytest.raises(ValueError, match=f"no study .* in the suite '{suite}'; there are S "):
            layers.find_studies(suite, names)


@pytest.mark.parametrize(("suite", "name"), [("embedded", "S"), ("small", "S"), ("paper", "S5")])
@pytest.mark.parametrize("backbone", backbones.SHIPPED)
def test_named_studies_hold_every_block_site_of_the_shipped_backbones(suite: str, name: str, backbone: str):
    study = replace(layers.LAYER_STUDIES[suite][name], tasks=("textures",), finer=False)
    cells = [cell for cell in layers.layer_cells(study) if cell["backbone"]["name"] == backbone]
    places = sites.list_sites(backbones.load(backbone, device="cpu"))
    assert [site for name, site in names(cells) if name in ("vp", "ap")] == places[:: study.site_every]
    assert study.site_every == 1 or suite == "embedded"
    for cell in cells:
        record_format.method_of(cell["method"])
        training.Recipe(**cell["recipe"])


def test_an_unknown_method_lists_those_there_are():
    with pytest.raises(ValueError, match=r"no method 'prompt'; expected ap, norm, .*, frozen_head, site_probe, full"):
        record_format.method_of({"name": "prompt"})


# ---------------------------------------------------------------------------------------------- records


def test_records_follow_the_cells_and_end_with_random_prompts_of_the_trained_norms(
    study: layers.LayerStudy, done: tuple[Path, list[records.Record]]
):
    main = list(layers.layer_cells(study))
    found = done[1]
    assert [r.config for r in found[: len(main)]] == json.loads(json.dumps(main))
    trained = [r for r in found if r.config["method"]["name"] == "ap"]
    random = found[len(main) :]
    assert [r.config["method"]["name"] for r in random] == ["random_prompt"] * 2
    for one, other in zip(trained, random, strict=True):
        assert other.config["method"]["site"] == one.config["method"]["site"]
        assert other.config["method"]["norms"] == pytest.approx(one["prompt_norm"], rel=5e-3)
        assert other.config["seeds"] == one.config["seeds"]
    assert len({r.key for r in found}) == len(found)


def test_a_cell_says_what_tuning_and_evaluating_says(study: layers.LayerStudy, done: tuple[Path, list[records.Record]]):
    record = next(r for r in done[1] if r.config["method"]["name"] == "ap")
    spec = record.config["backbone"]
    backbone, task = backbones.load(**spec), tasks.load(record.config["task"], 32)
    fits = training.tune(
        backbone,
        task,
        record_format.method_of(record.config["method"]),
        recipe=RECIPE,
        learning_rates=(2e-2,),
        seeds=(0, 1),
    )
    evaluations = training.evaluate(fits, task)
    assert record["accuracy"] == [e.accuracy for e in evaluations]
    assert record["learning_rate"] == fits[0].configuration.learning_rate
    assert record["prompt_norm"] == [fit.prompt_norm for fit in fits]
    assert record["epoch"] == [fit.epoch for fit in fits]
    assert record["split"] == [fit.split.digest for fit in fits]
    assert record["num_test"] == 12
    assert record.data == task.digest
    assert record.weights == backbones.digest(backbone)


def test_every_value_is_json(done: tuple[Path, list[records.Record]]):
    for record in done[1]:
        assert json.loads(json.dumps(record.values, allow_nan=False)) == record.values


def test_a_finished_study_is_read_and_nothing_is_trained(
    study: layers.LayerStudy, done: tuple[Path, list[records.Record]], monkeypatch: pytest.MonkeyPatch
):
    def never(*args: object, **options: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "tune", never)
    assert layers.fetch_study(study, done[0]) == done[1]


@pytest.mark.parametrize("after", [3, 9])
def test_a_killed_study_goes_on_with_the_same_bits(
    after: int, study: layers.LayerStudy, done: tuple[Path, list[records.Record]], tmp_path: Path
):
    tune, calls = training.tune, []

    def killed(*args: object, **options: object) -> list[training.Fit]:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return tune(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "tune", killed)
        with pytest.raises(KeyboardInterrupt):
            layers.fetch_study(study, tmp_path)
    left = records.load_all(tmp_path)
    assert len(left) < len(done[1])
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".json"]
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    resumed = layers.fetch_study(study, tmp_path)
    assert all(map(same, resumed, done[1]))
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in times} == times  # what was done stays as it was


def test_an_executor_gives_the_same_records_in_the_same_order(
    study: layers.LayerStudy, done: tuple[Path, list[records.Record]], tmp_path: Path
):
    pools: list[Executor] = [
        ThreadPoolExecutor(1),  # torch.fx traces change the process, so threads cannot share one
        cells.processes(1),
    ]
    short = replace(study, last_sites=1, full=False)
    expected = [r for r in done[1] if r.config["method"].get("site") in (None, "blocks.1:output")]
    expected = [r for r in expected if r.config["method"]["name"] != "full"]
    for index, pool in enumerate(pools):
        with pool:
            found = layers.fetch_study(short, tmp_path / str(index), pool)
        assert [r.key for r in found] == [r.key for r in expected]
        if index:  # a process of its own computes with its own number of threads: the same up to rounding
            for one, other in zip(found, expected, strict=True):
                assert one["prompt_norm"] == pytest.approx(other["prompt_norm"], rel=1e-3)
                assert one["split"] == other["split"]
        else:
            assert all(map(same, found, expected))


def test_an_executor_is_given_only_what_is_not_on_record(
    study: layers.LayerStudy, done: tuple[Path, list[records.Record]], tmp_path: Path
):
    given = []

    class Counting(ThreadPoolExecutor):
        def submit(self, function, /, config, *args):
            given.append(config)
            return super().submit(function, config, *args)

    first, second, *_ = done[1]
    with Counting(1) as pool:
        assert cells.fetch_all([first.config, second.config], done[0], pool) == [first, second]
        assert not given
        (tmp_path / f"{second.key}.json").write_bytes((done[0] / f"{second.key}.json").read_bytes())
        found = cells.fetch_all([first.config, second.config], tmp_path, pool)
    assert given == [first.config]
    assert same(found[0], first)
    assert found[1] == second


def test_a_failing_cell_ends_the_sweep_and_keeps_what_is_done(study: layers.LayerStudy, tmp_path: Path):
    first, *_ = layers.layer_cells(study)
    broken = {**first, "method": {"name": "ap", "site": "blocks.7"}}
    later = [{**first, "learning_rates": [rate]} for rate in (1e-3, 2e-3, 3e-3, 4e-3)]
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match=r"no module 'blocks.7'"):
        cells.fetch_all([first, broken, *later], tmp_path, pool)
    left = records.load_all(tmp_path)
    assert first in [record.config for record in left]
    assert len(left) <= 2  # the one that had begun may end; the others are never begun


def test_two_records_of_one_configuration_are_not_told_apart(done: tuple[Path, list[records.Record]], tmp_path: Path):
    record = done[1][0]
    assert cells.by_config([record, record]) == {json.dumps(record.config, sort_keys=True): record}
    other = replace(record, key="0" * 64, weights="of another training")
    with pytest.raises(ValueError, match=rf"records {record.key[:12]} and 000000000000 are of one configuration"):
        cells.by_config([record, other])


def test_without_the_data_a_record_is_taken_as_it_is(
    study: layers.LayerStudy, done: tuple[Path, list[records.Record]], tmp_path: Path
):
    record = done[1][0]
    gone = {**record.config, "task": "caltech101"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "_task", lambda name, size: tasks.load("folder:/nowhere", size))
        for variable in ("APTHORY_DATA", "APTHORY_WEIGHTS", "APTHORY_FRESH"):
            patch.delenv(variable, raising=False)
        with pytest.warns(UserWarning, match=r"taking the record of .* as it is, since no folder '/nowhere'"):
            assert cells.fetch_cell(record.config, done[0]) == record
        with pytest.raises(ValueError, match="no folder '/nowhere'"):
            cells.fetch_cell(gone, done[0])


# ---------------------------------------------------------------------------------------------- tables


def test_the_table_has_a_row_for_each_cell_and_seed(done: tuple[Path, list[records.Record]]):
    table = cells.table(done[1])
    assert list(table.columns) == [
        "backbone",
        "task",
        "method",
        "site",
        "depth",
        "seed",
        "accuracy",
        "correct",
        "validation_accuracy",
        "learning_rate",
        "relative_norm",
        "seconds",
        "key",
    ]
    assert len(table) == sum(len(r.config["seeds"]) for r in done[1])
    for _, row in table.iterrows():
        assert row["correct"].dtype == bool
        assert len(row["correct"]) == 12
        assert 100 * row["correct"].mean() == pytest.approx(row["accuracy"])
    places = table.groupby("site")["depth"].first().to_dict()
    assert places == pytest.approx({":output": 1.0, "blocks.1:input": 2 / 3, "blocks.1:output": 1.0})
    assert set(table["key"]) == {r.key for r in done[1]}
    assert (table["seconds"] > 0).all()


def test_correct_images_survive_packing():
    """Twelve test images are a byte and a half; the padding must not come back."""
    random = np.random.default_rng(0)
    for number in (1, 7, 8, 9, 12, 500):
        correct = random.random(number) < 0.5
        packed = np.packbits(correct).tobytes().hex()
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8))[:number].astype(bool)
        np.testing.assert_array_equal(bits, correct)


def test_best_sites_are_chosen_by_validation_for_each_task(done: tuple[Path, list[records.Record]]):
    table = cells.table(done[1])
    table = table[table["method"] == "ap"].copy()
    first, second = table["site"] == "blocks.1:input", table["site"] == "blocks.1:output"
    table.loc[first, ["validation_accuracy", "accuracy"]] = [60.0, 10.0]
    table.loc[second, ["validation_accuracy", "accuracy"]] = [50.0, 90.0]
    other = table.copy()
    other["task"] = "other"
    other.loc[second, "validation_accuracy"] = 70.0
    best = cells.best_sites(pd.concat([table, other], ignore_index=True))
    assert best.groupby("task")["site"].unique().map(list).to_dict() == {
        table["task"].iloc[0]: ["blocks.1:input"],
        "other": ["blocks.1:output"],
    }
    assert len(best) == 4  # both seeds of each


def test_run_study_is_the_table_of_its_records(study: layers.LayerStudy, done: tuple[Path, list[records.Record]]):
    table = layers.run_layer_study(study, done[0])
    assert list(table["key"]) == list(cells.table(done[1])["key"])


# ---------------------------------------------------------------------------------------------- command


def test_the_command_names_the_studies_there_are():
    result = CliRunner().invoke(app, ["sweep", "Z", "--suite", "embedded"])
    assert result.exit_code != 0
    output = " ".join(result.output.replace("│", " ").split())
    assert "no study 'Z' in the suite 'embedded'" in output
    assert "S (embedded)" in output
    assert "mobilenet (small)" in output


def test_the_command_prints_means_of_a_study(
    study: layers.LayerStudy, done: tuple[Path, list[records.Record]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(layers.LAYER_STUDIES, "embedded", {"tiny": study})
    monkeypatch.setattr(records, "folder", lambda suite: done[0])
    result = CliRunner().invoke(app, ["sweep", "tiny", "--suite", "embedded"])
    assert result.exit_code == 0, result.output
    assert "blocks.1:input" in result.output
    assert "random_prompt" in result.output
