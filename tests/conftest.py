"""What every test shares: which tests run on this machine, and that no test changes the process for the next.

apthory is never imported here: jaxtyping's import hook (see pyproject.toml) has to be in place first.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import guard
import hypothesis
import numpy as np
import pytest
import timm.layers.config
import torch

pytest_plugins = ["plan", "pytester"]

# The same examples on every run, and no deadline: the first call of a test pays for imports and traces.
hypothesis.settings.register_profile("apthory", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("apthory")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="no CUDA device on this machine")
    data = os.environ.get("APTHORY_DATA")
    if data is None:
        skips["data"] = pytest.mark.skip(reason="APTHORY_DATA does not name the small suite's images")
    elif not Path(data).is_dir():
        raise pytest.UsageError(f"APTHORY_DATA is {data!r}, which is no folder; unset it or name the images")
    for item in items:
        for name in skips.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(skips[name])


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    """At most two threads: the tests' models are small, and more threads only wait for each other."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered about tasks stays in a folder of this run, away from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APTHORY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# Variables that pytest, OpenMP and open_clip set when they are used or imported for the first time.
_SET_BY_LIBRARIES = ("PYTEST_CURRENT_TEST", "KMP_", "TOKENIZERS_")


def _set_environ(values: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)


# What a library must leave as it found it: how to read it, and how to set it back.
_PROCESS = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "gradients enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "seed": (torch.initial_seed, torch.manual_seed),
    "oneDNN": (lambda: torch.backends.mkldnn.enabled, lambda value: setattr(torch.backends.mkldnn, "enabled", value)),
    "denormal numbers": (lambda: float(torch.tensor(1e-40) * 1) > 0, lambda value: torch.set_flush_denormal(not value)),
    "fused attention": (timm.layers.config.use_fused_attn, timm.layers.config.set_fused_attn),
    "floating-point errors": (np.geterr, lambda value: np.seterr(**value)),
    "working directory": (os.getcwd, os.chdir),
    "environment": (
        lambda: {name: value for name, value in os.environ.items() if not name.startswith(_SET_BY_LIBRARIES)},
        _set_environ,
    ),
}


def _difference(old: object, new: object) -> str:
    """In words; of dictionaries the names alone that differ, since values may be private."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
        return f"in {', '.join(sorted(names))}"
    return f"from {old} to {new}"


@pytest.fixture(autouse=True)
def _process_unchanged() -> Iterator[None]:
    """Fail a test that leaves the process changed, so that no result depends on the order of tests."""
    torch.manual_seed(0)
    before = {name: get() for name, (get, _) in _PROCESS.items()}
    yield
    changed = {name: (before[name], get()) for name, (get, _) in _PROCESS.items() if get() != before[name]}
    for name, (value, _) in changed.items():
        _PROCESS[name][1](value)
    if changed:
        changes = ", ".join(f"{name} {_difference(old, new)}" for name, (old, new) in changed.items())
        pytest.fail(f"the test left the process changed: {changes}; change it inside a context that restores")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> Iterator[object]:
    value = yield
    if fixturedef.scope != "function" and not type(value).__module__.startswith("_pytest"):
        guard.FIXTURES[fixturedef] = value
        guard.GUARD.note(f"fixture {fixturedef.argname}", value)
    return value


def pytest_fixture_post_finalizer(fixturedef: pytest.FixtureDef) -> None:
    guard.FIXTURES.pop(fixturedef, None)


@pytest.fixture(autouse=True)
def _shared_unchanged(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that changes what other tests see too, by name; they get a new network in the changed one's place."""
    guard.GUARD.meet(request.node.module)
    yield
    if changed := guard.GUARD.changes(request.node.module):
        if "tiny" in sys.modules:
            sys.modules["tiny"].MADE.clear()
        pytest.fail(f"the test changed what it shares with others: {', '.join(changed)}; make a copy, or set it back")
