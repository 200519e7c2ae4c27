"""Old names of modules and of what is in them still work, and a warning says what the name is now."""

import subprocess
import sys
import warnings
from importlib import import_module

import pytest
from imports import MODULES, PACKAGE

from apthory._tools import moved

NAMES = {  # what users of the old modules imported from them
    "bench": "step_over_bare", "determinism": "random_stream", "diversity": "randaugmented",
    "efficiency": "count_flops", "equivalence.gaps": "descend", "equivalence_study": "measure_layers",
    "figures": "theme", "global_study": "measure_profile", "input_study": "measure_rank", "layers": "score",
    "limits": "universality", "mask_study": "measure_masks", "metric_bench": "PEER", "notebooks": "Judge",
    "pixel_bench": "race_words", "pixel_study": "run_shifted", "pixel_suites": "WIDTHS", "pixels": "Layout",
    "profiles": "layer_profile", "progress": "progress", "prompts": "save_prompt", "ranking": "rank_sites",
    "records": "write_atomically", "regions": "MaskGenerator", "stage_study": "with_stage", "statistics": "Estimate",
    "sweeps": "fetch_study", "theory.study": "measure_counts", "tracing": "UntraceableError",
}  # fmt: skip


@pytest.fixture
def forgotten(monkeypatch):
    """Old modules as if none was imported yet."""
    for name in moved.MODULES:
        monkeypatch.delitem(sys.modules, f"apthory.{name}", raising=False)
    yield
    for name in moved.MODULES:
        package, _, module = f"apthory.{name}".rpartition(".")
        vars(sys.modules.get(package, moved)).pop(module, None)


@pytest.mark.parametrize("name", sorted(moved.MODULES))
def test_an_old_module_warns_and_has_what_it_had(name, forgotten):
    with pytest.warns(DeprecationWarning, match=rf"^apthory\.{name} is apthory\.[\w.]+ now; ") as caught:
        old = import_module(f"apthory.{name}")
    assert caught[0].filename == __file__
    found = [getattr(import_module(f"apthory.{place}"), NAMES[name], None) for place in moved.MODULES[name]]
    assert getattr(old, NAMES[name]) in [value for value in found if value is not None]
    with pytest.raises(AttributeError, match=f"module 'apthory.{name}' has no attribute 'nothing'"):
        _ = old.nothing


def test_both_spellings_of_an_import_warn_the_one_who_writes_it(forgotten):
    for line in (
        "from apthory import prompts",
        "from apthory.prompts import ActivationPrompt",
        "import apthory.prompts",
    ):
        sys.modules.pop("apthory.prompts", None)
        sys.modules["apthory"].__dict__.pop("prompts", None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exec(compile(line, "a user's file", "exec"), {})
        assert [str(one.filename) for one in caught if one.category is DeprecationWarning] == ["a user's file"], line


def test_no_old_name_is_a_module_again():
    assert not {name for name in moved.MODULES if name in MODULES or f"{name}.__init__" in MODULES}


@pytest.mark.slow
def test_nothing_of_ours_uses_an_old_name():
    code = f"""
import importlib, sys, warnings
warnings.filterwarnings("error", message=".*the old name goes with")
for name in {[name.removesuffix(".__init__") for name in MODULES if not name.startswith("__")]}:
    importlib.import_module(f"apthory.{{name}}")
print({{f"apthory.{{name}}" for name in {sorted(moved.MODULES)}}} & sys.modules.keys())
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


@pytest.mark.parametrize(("old", "new"), sorted(moved.RENAMED.items()))
def test_a_name_that_is_another_now_is_there(old, new, forgotten):
    module, _, name = old.rpartition(".")
    with pytest.warns(DeprecationWarning, match="now; the old name goes with version 0.2") as caught:
        value = getattr(import_module(module), name)
    assert value is getattr(import_module(f"apthory.{new[0]}"), new[1])
    assert caught[0].filename == __file__


def test_an_old_module_has_the_old_names_of_what_it_had(forgotten):
    with pytest.warns(DeprecationWarning, match=r"^apthory.bench is apthory.benchmarks.prefix_cache now; "):
        old = import_module("apthory.bench")
    with pytest.warns(DeprecationWarning, match=r"^apthory.benchmarks.prefix_cache.race is .*race_prefix_cache now; "):
        race = old.race
    assert race is import_module("apthory.benchmarks.prefix_cache").race_prefix_cache
    assert {"race", "race_prefix_cache"} <= set(old.__all__)


def test_an_old_module_inside_a_package_is_an_attribute_of_it(forgotten):
    with pytest.warns(DeprecationWarning, match=r"^apthory.equivalence.gaps is apthory.equivalence.tuning now; "):
        old = import_module("apthory.equivalence").gaps
    assert old.descend is import_module("apthory.equivalence").descend


def test_an_old_name_is_imported_from_its_module_and_from_a_new_process():
    line = "from apthory.theory.growth import Fit; print(Fit.__name__)"
    shown = subprocess.run([sys.executable, "-W", "always", "-c", line], capture_output=True, text=True, check=True)
    assert shown.stdout == "GrowthFit\n"
    assert (
        "<string>:1: DeprecationWarning: apthory.theory.growth.Fit is apthory.theory.growth.GrowthFit" in shown.stderr
    )


def test_a_star_imports_all_that_an_old_module_had(forgotten):
    names: dict = {}
    with pytest.warns(DeprecationWarning, match="^apthory.prompts is"):
        exec("from apthory.prompts import *", names)
    assert {"ActivationPrompt", "AdaptedBackbone", "save", "load"} <= names.keys()


@pytest.mark.parametrize("module", ["training", "studies", "backbones", "theory.growth"])
def test_a_name_that_never_was_is_the_usual_error(module):
    with pytest.raises(AttributeError, match=f"^module 'apthory.{module}' has no attribute 'nothing'$"):
        _ = import_module(f"apthory.{module}").nothing
