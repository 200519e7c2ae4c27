"""The benchmark of prompts on pixels: every piece is timed, and ratios are those of the recorded times."""

import pytest

from apthory.benchmarks import pixels
from apthory.lab import records


@pytest.mark.parametrize("backbone", ["resnet_micro", pytest.param("vit_micro", marks=pytest.mark.slow)])
def test_steps_and_the_mapping_are_timed_and_their_ratios_follow(tmp_path, backbone):
    sizes = {"batch_size": 16, "num_train": 32, "num_validation": 16, "num_test": 16}
    recipe = {"num_epochs": 1, **sizes, "precision": "float32"}
    config = {"backbone": {"name": backbone, "device": "cpu"}, "recipe": recipe, "num_repeats": 2}
    record = records.fetch(pixels.race_pixels, config, folder=tmp_path)
    assert {name: len(values) for name, values in record["step_over_bare"].items()} == {
        "vp": 2,
        "evp": 2,
        "adavipro": 2,
    }
    assert all(value > 0 for values in record["step_over_bare"].values() for value in values)
    seconds = {name: sum(values) / 2 for name, values in record["seconds"].items()}  # the median of two
    assert list(seconds) == ["start, trained head", "start, mapping", "run, mapping"]
    assert all(value > 0 for values in record["seconds"].values() for value in values)
    table = pixels.summarize_pixels(record)
    assert table["step of evp / bare"] == pytest.approx(sum(record["step_over_bare"]["evp"]) / 2)
    extra = seconds["start, mapping"] - seconds["start, trained head"]
    assert table["mapping / run"] == pytest.approx(extra / seconds["run, mapping"])
