"""How configurations are spelled in keys: what is written here once is never written in another way."""

from dataclasses import asdict, dataclass, fields

import pytest

from apthory import backbones, methods, training
from apthory.studies import record_format

RECIPE = {  # the eleven fields that every recorded recipe has
    "num_epochs": 10,
    "batch_size": 32,
    "optimizer": "adamw",
    "momentum": 0.9,
    "warmup": 0.1,
    "num_train": 400,
    "num_validation": 100,
    "num_test": 500,
    "precision": "auto",
    "deterministic": False,
    "cache": True,
}


def test_a_cell_is_spelled_as_it_was():
    backbone = {"name": "mobilenetv2_100", "input_size": 128}
    cell = record_format.spell_cell(
        backbone, "pacs", {"name": "ap", "site": "blocks.2.0"}, training.Recipe(), (4e-3, 1.6e-2), (0, 1)
    )
    assert list(cell) == ["backbone", "task", "size", "method", "recipe", "learning_rates", "seeds"]
    assert cell == {
        "backbone": backbone,
        "task": "pacs",
        "size": 128,
        "method": {"name": "ap", "site": "blocks.2.0"},
        "recipe": RECIPE,
        "learning_rates": [4e-3, 1.6e-2],
        "seeds": [0, 1],
    }
    small = record_format.spell_cell(
        {"name": "vit_micro"}, "pacs", {"name": "vp"}, training.Recipe(), (1.0,), (0,), {"how": "random"}
    )
    assert small["size"] == 64
    assert small["head"] == {"how": "random"}


def test_a_later_field_of_a_recipe_is_written_only_where_it_is_not_at_its_default():
    @dataclass(frozen=True, kw_only=True)
    class Later(training.Recipe):
        label_smoothing: float = 0.0

    assert record_format.recipe(Later()) == RECIPE
    assert record_format.recipe(Later(label_smoothing=0.1, num_epochs=3)) == {
        **RECIPE, "num_epochs": 3, "label_smoothing": 0.1,
    }  # fmt: skip
    assert RECIPE.keys() <= {field.name for field in fields(training.Recipe)}, "a recorded field is gone"


@pytest.mark.parametrize(
    ("spelled", "method"),
    [
        ({"name": "vp"}, methods.VP()),
        ({"name": "vp", "site": ":input"}, methods.ActivationPrompting(site=":input")),
        ({"name": "vp", "rate": 100.0, "width": 9}, methods.VP(lr_scale=100.0, width=9)),
        ({"name": "ap", "site": "layer2.0:input"}, methods.ActivationPrompting(site="layer2.0:input")),
        ({"name": "frozen_head", "site": "a"}, methods.ActivationPrompting(site="a")),
        ({"name": "norm", "site": "a"}, methods.NormTuning(site="a")),
        ({"name": "linear_probe"}, methods.LinearProbe()),
        ({"name": "site_probe", "site": "a"}, methods.LinearProbe(site="a")),
        ({"name": "full"}, methods.FineTuning()),
        ({"name": "evp", "around": False, "diversity": ["flip"]}, methods.EVP(around=False, diversity=("flip",))),
        ({"name": "adavipro", "generator_rate": 0.1}, methods.AdaViPro(generator_lr_scale=0.1)),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_recorded_spellings_are_read_for_ever(spelled, method):
    assert record_format.method_of(spelled) == method


def test_a_renamed_score_is_recorded_under_its_first_name():
    assert record_format.spell_score("windows_times_gradient") == "found"
    assert record_format.score_of("found") == "windows_times_gradient"
    assert record_format.spell_score("gain") == record_format.score_of("gain") == "gain"


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"no method 'prompt'; expected ap, norm, .*vp, .*full"):
        record_format.method_of({"name": "prompt"})


def test_norms_of_random_prompts_have_three_digits():
    spelled = record_format.random_prompt("a", [12.3456, 0.0123456])
    assert spelled == {"name": "random_prompt", "site": "a", "norms": [12.3, 0.0123]}


def test_the_random_start_of_the_vit_has_the_same_bits_and_recorded_name_everywhere():
    """Its last bits once depended on the processor, and its records bear the digest that one of them gave."""
    digest = backbones.digest(backbones.load("vit_micro.random", device="cpu"))
    assert digest == "6519a8b80a67dd10f2bd2a8743cfbf56f6ce99cca2233ce9f40c1230b60b3cd1"
    assert record_format.weights(digest) == "e88dde13ad5611572a3327e71f66380fa7c0d753cdae386527c002bf79dd452b"
    assert record_format.weights("0" * 64) == "0" * 64


# What a recorded method means by the fields that it leaves out. A default may change in the class only if `method_of`
# goes on filling in the one that is recorded here; otherwise old records would claim to be what they are not.
LEFT_OUT = {
    "ap": {"shape": "full", "in_rms_units": True, "lr_scale": 10.0},
    "norm": {"layers": "block", "parameters": "both", "lr_scale": 10.0},
    "full": {"lr_scale": 0.05},
    "vp": {"width": None, "place": "frame", "normalized": True, "init": 1.0, "lr_scale": 10.0},
    "evp": {
        "width": None,
        "around": True,
        "diversity": ("flip", "crop"),
        "normalization": "l2",
        "lr_scale": 1.0,
    },
    "adavipro": {
        "width": None,
        "region": None,
        "dim": 64,
        "edges": True,
        "temperature": 5.0,
        "decay": 0.98,
        "floor": 0.1,
        "init": 1.0,
        "lr_scale": 1.0,
        "generator_lr_scale": 0.25,
    },
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_a_recorded_method_leaves_out_means_what_it_meant(name):
    site = {"site": "a"} if name in ("ap", "norm") else {}
    method = asdict(record_format.method_of({"name": name, **site}))
    assert {key: method[key] for key in LEFT_OUT[name]} == LEFT_OUT[name]
