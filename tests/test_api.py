"""The names of ``import apthory as ap``: all are there, and none costs before it is used."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import apthory

ROOT = Path(apthory.__file__).parents[1]
HEAVY = ("torch", "torchvision", "timm", "numpy", "pandas", "matplotlib", "papermill")


def definitions():
    """Public name -> (module, name there), as type checkers read it."""
    tree = ast.parse((ROOT / "apthory" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.asname or alias.name: (statement.module, alias.name)
        for statement in block.body
        for alias in statement.names
    }


def python(*arguments):
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("use", ["import apthory", "from apthory.__main__ import app", "import apthory; dir(apthory)"])
def test_importing_is_free_until_a_name_is_used(use):
    shown = python("-c", f"import sys; {use}; print(*(set({HEAVY}) & sys.modules.keys()))")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "\n", "")


def test_the_names_are_those_that_type_checkers_see():
    assert sorted(apthory.__all__) == sorted(definitions())
    assert len(apthory.__all__) == len(set(apthory.__all__)) == 39


@pytest.mark.parametrize("name", apthory.__all__)
def test_every_name_is_what_its_module_defines(name):
    module, original = definitions()[name]
    assert getattr(apthory, name) is getattr(import_module(module), original)
    assert name in dir(apthory)


def test_a_module_is_imported_when_it_or_its_name_is_used():
    code = "import sys, apthory as ap; print(ap.sites.split is ap.split, 'torch' in sys.modules)"
    shown = python("-c", code)
    assert shown.stdout == "True True\n", shown.stderr
    assert {"backbones", "methods", "selection", "sites", "tasks", "training"} <= set(dir(apthory))


def test_a_star_imports_the_names():
    namespace = {}
    exec("from apthory import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(apthory.__all__)


def test_an_unknown_name_is_the_usual_error():
    with pytest.raises(AttributeError, match=r"^module 'apthory' has no attribute 'fitt'$"):
        _ = apthory.fitt
    with pytest.raises(ImportError, match="cannot import name 'fitt' from 'apthory'"):
        exec("from apthory import fitt")
    shown = python("-c", "import apthory; apthory.fitt")
    assert shown.stderr.endswith("module 'apthory' has no attribute 'fitt'. Did you mean: 'fit'?\n")
