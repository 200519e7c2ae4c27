"""What is not installed is named with its extra, and prompting a model needs none."""

import subprocess
import sys
from pathlib import Path

import pytest
from imports import PACKAGE
from typer.testing import CliRunner

from apthory import tasks
from apthory.__main__ import app
from apthory._tools.extras import MissingExtraError, from_extra

STUDIES = ("jupyter", "jupytext", "papermill", "nbformat", "seaborn", "datasets", "open_clip", "torch_cka")


@pytest.fixture
def without_extras(monkeypatch):
    for name in STUDIES:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError


def test_an_error_names_the_package_and_the_extra():
    message = r"^no_such_package is not installed; the extra 'x' brings it: pip install 'apthory\[x\]'$"
    with pytest.raises(MissingExtraError, match=message), from_extra("x"):
        import no_such_package  # noqa: F401


def test_each_use_of_an_extra_says_which(without_extras, tmp_path, monkeypatch):
    with pytest.raises(MissingExtraError, match=r"datasets is not installed.*'apthory\[data\]'"):
        tasks.load("hub:someone/something", 32)
    for name in ("notebooks", "figures"):
        (tmp_path / name).mkdir()
    (tmp_path / "notebooks" / "01_one.py").write_text("# %% tags=[\"parameters\"]\nsuite: str = 'embedded'\n")
    monkeypatch.setenv("APTHORY_ROOT", str(tmp_path))
    shown = CliRunner().invoke(app, ["run"])
    assert shown.exit_code == 1
    assert shown.stderr == (
        "Error: papermill is not installed; the extra 'studies' brings it: pip install 'apthory[studies]'\n"
    )


def test_prompting_a_model_needs_no_extra(tmp_path: Path):
    code = f"""
        import sys
        for name in {STUDIES}:
            sys.modules[name] = None
        import apthory as ap
        backbone, task = ap.load_backbone("vit_micro"), ap.load_task("orientation", 64)
        recipe = ap.Recipe(num_epochs=2, num_train=32, num_validation=16, num_test=16)
        fits = ap.fit(backbone, task, ap.ActivationPrompting(site="blocks.6:input"), recipe=recipe)
        ap.evaluate(fits, task)
        ap.load_prompt(fits[0].save({str(tmp_path / "prompt.safetensors")!r}), backbone)
        ap.rank_sites(backbone, task, num_examples=32, num_validation=0)
        print("done")
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert shown.stdout == "done\n", shown.stderr
