"""Claims about the study of checkpoints: which cells it has, and statistics that say by hand what they should."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from apthory import backbones, sites, training
from apthory.studies import catalogue, cells, during_training, layers

PROBE = {"name": "linear_probe"}


@pytest.mark.parametrize("suite", ["embedded", "small"])
def test_every_checkpoint_has_the_same_prompts_and_a_linear_probe_and_no_more(suite: str):
    study = during_training.STAGE_STUDIES[suite]["stages"]
    assert catalogue.known()[suite]["stages"] is study
    cells = list(layers.layer_cells(study))
    for name in backbones.SHIPPED:
        places = sites.list_sites(backbones.load(name, device="cpu"))[1::2]
        assert (len(places), places[-1].split(":")[-1]) == (5, "output")
        for checkpoint in backbones.checkpoints(name):
            for task in study.tasks:
                there = [c["method"] for c in cells if (c["backbone"], c["task"]) == ({"name": checkpoint}, task)]
                assert there == [PROBE, *({"name": "ap", "site": place} for place in places)]
    assert len(cells) == sum(len(backbones.checkpoints(name)) for name in backbones.SHIPPED) * len(study.tasks) * 6


def test_the_last_checkpoint_of_the_small_suite_is_a_part_of_sweep_s():
    layer_study = {json.dumps(cell, sort_keys=True) for cell in layers.layer_cells(layers.LAYER_STUDIES["small"]["S"])}
    study = during_training.STAGE_STUDIES["small"]["stages"]
    cells = [json.dumps(cell, sort_keys=True) for cell in layers.layer_cells(study)]
    trained = [cell for cell in cells if json.loads(cell)["backbone"]["name"] in backbones.SHIPPED]
    assert len(trained) == 2 * 4 * 6
    assert set(trained) <= layer_study


def test_a_study_runs_and_its_table_names_backbone_and_checkpoint_apart(tmp_path: Path):
    protocol = cells.Protocol(
        recipe=training.Recipe(
            num_epochs=1, batch_size=12, num_train=24, num_validation=9, num_test=12, precision="float32"
        ),
        learning_rates=(1e-2,),
        seeds=(0,),
    )
    small = {"depth": 2, "embed_dim": 16, "num_heads": 2, "device": "cpu"}
    study = replace(
        during_training.STAGE_STUDIES["embedded"]["stages"],
        protocol=protocol,
        backbones=({"name": "vit_micro.random", **small},),
        last_sites=3,
        tasks=("textures",),
    )
    table = during_training.with_stage(layers.run_layer_study(study, tmp_path))
    assert list(table["method"]) == ["linear_probe", "ap", "ap"]
    assert list(table["site"]) == [":output", "blocks.0:input", "blocks.1:output"]
    assert (set(table["backbone"]), set(table["stage"])) == ({"vit_micro"}, {"random"})
    assert len(list(tmp_path.glob("*.json"))) == 3


def rows(accuracies: dict[str, list[float]], correct: list[int] | None = None) -> pd.DataFrame:
    """Prompts at sites a, b, c (as deep as they come), two seeds alike."""
    return pd.DataFrame(
        {
            "backbone": "vit_micro",
            "task": task,
            "site": site,
            "depth": depth,
            "seed": seed,
            "accuracy": value,
            "validation_accuracy": value,
            "correct": np.array(correct or [1, 0, 1, 0], bool),
        }
        for task, values in accuracies.items()
        for site, depth, value in zip("abc", (0.1, 0.5, 1.0), values, strict=True)
        for seed in (0, 1)
    )


def test_a_name_without_a_checkpoint_is_the_last_one():
    table = pd.DataFrame({"backbone": ["vit_micro.random", "vit_micro.epoch-0008", "vit_micro"]})
    found = during_training.with_stage(table)
    assert list(found["stage"]) == ["random", "epoch-0008", "last"]
    assert set(found["backbone"]) == {"vit_micro"}
    assert list(table.columns) == ["backbone"]


def test_checkpoints_agree_where_they_rank_sites_alike():
    one = rows({"flowers": [1, 2, 3], "birds": [3, 1, 2], "cars": [1, 2, 3]})
    other = rows({"cars": [30, 20, 10], "flowers": [10, 20, 30], "birds": [1, 2, 3]})
    assert during_training.agreement(one, other).to_dict() == pytest.approx(
        {"flowers": 1.0, "cars": -1.0, "birds": -0.5}
    )


def test_the_gain_is_that_of_the_site_that_validation_chose_over_the_probe_image_by_image():
    prompts = rows({"flowers": [1, 3, 2]})
    prompts.loc[prompts["site"] == "b", "correct"] = pd.Series([np.array([1, 1, 0, 0], bool)] * 6)
    probe = rows({"flowers": [0, 0, 0]}, [0, 1, 0, 1])
    probe = probe[probe["site"] == "a"].assign(site=":output")
    gain = during_training.gain(prompts, probe)
    assert list(gain["seed"]) == [0, 1]
    assert [one.tolist() for one in gain["correct"]] == [[1, 0, 0, -1]] * 2
