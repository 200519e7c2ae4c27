"""The guard of what tests share sees every kind of change, and names it."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import guard
import numpy as np
import pytest
import tiny
import torch
from torch import nn

import apthory

CHANGES: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "a weight": ("conv1", lambda model: model.layer1[0].conv1.weight.data[:1].neg_()),
    "a running mean": ("running_mean", lambda model: model.bn1.running_mean.add_(1e-6)),
    "a weight in another's place": ("conv1", lambda model: setattr(model.conv1.weight, "data", model.conv1.weight * 2)),
    "training mode": ("bn1", lambda model: model.bn1.train()),
    "gradients wanted": ("conv1", lambda model: model.conv1.weight.requires_grad_()),
    "a gradient": ("grad", lambda model: setattr(model.bn1.weight, "grad", torch.ones_like(model.bn1.weight))),
    "a hook": ("_forward_hooks", lambda model: model.bn1.register_forward_hook(print)),
    "the data configuration": ("pretrained_cfg", lambda model: model.pretrained_cfg.update(mean=(0.5, 0.5, 0.5))),
    "an attribute": ("", lambda model: setattr(model, "fused_attn", True)),
    "the memory layout": ("conv1", lambda model: model.to(memory_format=torch.contiguous_format)),
    "another type": ("conv1", lambda model: model.double()),
    "a module": ("fc", lambda model: setattr(model, "fc", nn.Linear(32, 2))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_kind_of_change_of_a_network_is_seen(change: str):
    model = tiny.backbone.__wrapped__("resnet")
    before = guard.fingerprint(model)
    assert guard.fingerprint(model) == before
    CHANGES[change][1](model)
    assert guard.fingerprint(model) != before


@pytest.mark.parametrize("name", ["a running mean", "a hook", "training mode"])
def test_a_change_is_named_once(name: str, monkeypatch: pytest.MonkeyPatch):
    where, change = CHANGES[name]
    own, key = guard.Guard(), ("resnet", torch.float32)
    model = tiny.backbone.__wrapped__(*key)
    monkeypatch.setattr(tiny, "IN_USE", {})
    own.note(f"tiny.backbone{key}", model)
    own.changes(None)
    change(model)
    tiny.IN_USE[key] = model  # as if a test had asked for it
    found = own.changes(None)
    assert all(one.startswith("tiny.backbone('resnet', torch.float32)") for one in found)
    assert any(where in one for one in found)
    tiny.IN_USE[key] = model
    assert own.changes(None) == []


@pytest.mark.parametrize("maxsize", [None, 2])
def test_a_change_of_what_a_cache_or_a_wide_fixture_holds_is_seen(maxsize: int | None, monkeypatch: pytest.MonkeyPatch):
    @functools.lru_cache(maxsize)
    def made(num: int) -> dict[str, Any]:
        return {"values": np.zeros(num)}

    made.__module__ = tiny.__name__
    held = [torch.zeros(2)]
    monkeypatch.setattr(tiny, "made", made, raising=False)
    monkeypatch.setitem(guard.FIXTURES, type("Definition", (), {"argname": "held"}), held)
    made(3)
    own = guard.Guard()
    own.changes(None)
    assert own.changes(None) == []
    made(3)["values"][1] = 1.0
    held[0][0] = 1.0
    found = own.changes(None)
    assert len(found) == 2
    assert any("['values']" in name for name in found)
    assert "fixture held[0]" in found


def test_a_guilty_test_fails_and_the_next_has_a_new_network(pytester: pytest.Pytester):
    """Only what this directory's conftest does is asked for, in a process of its own."""
    tests = guard.__file__.rpartition("/")[0]
    pytester.makeini(f"[pytest]\npythonpath = {tests} {tests}/..\nmarkers =\n    slow: as here")
    pytester.makeconftest(Path(tests, "conftest.py").read_text())
    pytester.makepyfile(
        """
        import tiny

        def test_guilty():
            tiny.backbone("resnet").bn1.running_mean += 1

        def test_next():
            mean = tiny.backbone("resnet").bn1.running_mean
            assert mean.equal(tiny.backbone.__wrapped__("resnet").bn1.running_mean)
        """
    )
    result = pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*the test changed what it shares*tiny.backbone('resnet'*running_mean*"])


@pytest.mark.parametrize("may_grow", [False, True])
def test_a_registry_of_ours_may_grow_and_no_other_value(may_grow: bool, monkeypatch: pytest.MonkeyPatch):
    home = apthory if may_grow else tiny
    monkeypatch.setattr(home, "table", {"a": 1, "b": [1], "c": {}}, raising=False)
    own, name = guard.Guard(), home.__name__
    own.changes(None)
    home.table["d"] = print
    assert own.changes(None) == ([] if may_grow else ["tiny['table']['d']"])
    home.table["a"] = 2
    assert own.changes(None) == [f"{name}['table']['a']"]
    home.table["b"].append(2)
    assert own.changes(None) == [f"{name}['table']['b']"]
    del home.table["a"]
    assert own.changes(None) == [f"{name}['table']['a']"]
