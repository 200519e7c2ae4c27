"""Records are whole or absent, and named by what produced them."""

import hashlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apthory import records

calls: list[dict] = []


@pytest.fixture(autouse=True)
def _no_calls(monkeypatch):
    monkeypatch.delenv("APTHORY_FRESH", raising=False)
    yield
    calls.clear()


def double(x, **rest):
    calls.append({"x": x, **rest})
    return {"y": 2 * x, "run_seconds": time.perf_counter()}


def fetch(folder, function=double, config=None, **options):
    return records.fetch(function, {"x": 3} if config is None else config, folder=folder, **options)


def test_second_fetch_reads_what_the_first_computed(tmp_path):
    first, second = fetch(tmp_path), fetch(tmp_path)
    assert first == second
    assert len(calls) == 1
    assert second["y"] == 6
    with pytest.raises(KeyError, match="recorded no 'z'; it recorded y, run_seconds"):
        second["z"]


def test_lookup_reads_what_fetch_would_read_and_computes_nothing(tmp_path, monkeypatch):
    assert records.lookup(double, {"x": 3}, folder=tmp_path) is None
    assert not calls
    record = fetch(tmp_path, data="d")
    assert records.lookup(double, {"x": 3}, data="d", folder=tmp_path) == record
    assert records.lookup(double, {"x": 3}, folder=tmp_path) is None
    monkeypatch.setenv("APTHORY_FRESH", str(time.time() + 60))
    assert records.lookup(double, {"x": 3}, data="d", folder=tmp_path) is None
    assert len(calls) == 1


def test_key_is_the_digest_of_what_the_docstring_names(tmp_path):
    """Computed independently: old records must stay readable under their names."""
    identity = {"config": {"a": [1, 2.5], "x": 3}, "data": "d", "name": f"{__name__}.double", "version": 1}
    text = json.dumps({**identity, "weights": "w"}, sort_keys=True, separators=(",", ":"))
    record = fetch(tmp_path, config={"x": 3, "a": (1, 2.5)}, data="d", weights="w")
    assert record.key == hashlib.sha256(text.encode()).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == [f"{record.key}.json"]


@given(st.dictionaries(st.text(min_size=1), st.integers() | st.floats(allow_nan=False, allow_infinity=False)))
def test_key_does_not_depend_on_the_order_of_the_configuration(config):
    backwards = dict(reversed(config.items()))
    assert records._digest(records._plain(config, "")) == records._digest(records._plain(backwards, ""))


def test_each_part_of_the_identity_changes_the_key(tmp_path):
    @records.versioned(2)
    def other(x):
        return {"y": x}

    other.__qualname__ = "double"  # the same function, at its next version
    keys = {
        fetch(tmp_path).key,
        fetch(tmp_path, config={"x": 4}).key,
        fetch(tmp_path, data="other images").key,
        fetch(tmp_path, weights="other weights").key,
        fetch(tmp_path, function=other).key,
    }
    assert len(keys) == 5


def test_function_receives_the_configuration_that_is_recorded(tmp_path):
    @dataclass(frozen=True)
    class Optimizer:
        rates: tuple[float, ...] = (0.1, 0.01)

    record = fetch(tmp_path, config={"x": 1, "optimizer": Optimizer()})
    assert calls == [record.config] == [{"x": 1, "optimizer": {"rates": [0.1, 0.01]}}]


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ((1, 2), [1, 2]),
        (np.float32(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
        (torch.tensor([[0.5], [1.0]]), [[0.5], [1.0]]),
        (True, True),
        (None, None),
    ],
)
def test_values_become_jsons_own_types(value, stored):
    plain = records._plain(value, "values")
    assert plain == stored
    assert type(plain) is type(stored)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"loss": [1.0, math.nan]}, ValueError, r"values\.loss\[1\] is nan"),
        ({"loss": np.array([math.inf])}, ValueError, r"values\.loss\[0\] is inf"),
        ({"path": Path("a")}, TypeError, r"values\.path is a PosixPath"),
        ({"by_site": {3: 1.0}}, TypeError, r"values\.by_site has the key 3"),
        ([1.0], TypeError, "values must be a mapping or a dataclass, not list"),
    ],
)
def test_what_cannot_be_recorded_is_named_and_leaves_no_file(tmp_path, value, error, message):
    with pytest.raises(error, match=message):
        records._plain_mapping(value, "values")

    def broken(x):
        return value

    broken.__qualname__ = "double"
    with pytest.raises(error, match=message):
        fetch(tmp_path, function=broken)
    assert list(tmp_path.iterdir()) == []


def test_functions_that_cannot_be_imported_are_refused(tmp_path):
    with pytest.raises(ValueError, match="top level of a module"):
        fetch(tmp_path, function=lambda x: {"y": x})


def test_failing_function_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        fetch(tmp_path, config={"x": None})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace('"y": 6', '"y": 7'),
        lambda text: text.replace('"x": 3', '"x": 4'),
        lambda text: "[]",
        lambda text: "\x00" * len(text),
    ],
    ids=["truncated", "empty", "another value", "another configuration", "no record", "zeros"],
)
def test_a_damaged_record_is_set_aside_and_computed_again(tmp_path, damage):
    key = fetch(tmp_path).key
    path = tmp_path / f"{key}.json"
    damaged = damage(path.read_text())
    path.write_text(damaged)
    with pytest.warns(RuntimeWarning, match=f"{key}.*set aside"):
        assert fetch(tmp_path)["y"] == 6
    assert len(calls) == 2
    assert (tmp_path / f"{key}.json.corrupt").read_text() == damaged
    assert records.read(path)["y"] == 6


def test_a_record_under_another_name_is_not_whole(tmp_path):
    key = fetch(tmp_path).key
    (tmp_path / f"{key}.json").rename(tmp_path / f"{'0' * 64}.json")
    with pytest.raises(ValueError, match="digests do not fit"):
        records.read(tmp_path / f"{'0' * 64}.json")


def test_killed_writers_leave_no_half_record(tmp_path):
    """Kill -9 writers of large records at ten different moments: each record is whole or absent."""
    writer = textwrap.dedent("""
        import importlib.util
        import sys
        from pathlib import Path
        spec = importlib.util.spec_from_file_location("records", sys.argv[2])  # no torch
        records = importlib.util.module_from_spec(spec)
        sys.modules["records"] = records
        spec.loader.exec_module(records)
        for index in range(10**6):
            text = bytes([65 + index % 26]) * 2_000_000
            records.write_atomically(Path(sys.argv[1]) / f"{index % 3}.json", text)
            print(index, flush=True)
    """)
    command = [sys.executable, "-c", writer, str(tmp_path), records.__file__]
    interrupted = 0
    for attempt in range(10):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # the first file is written, the next is on its way
        time.sleep(0.0007 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for path in tmp_path.glob("*.json"):
            content = path.read_bytes()
            assert len(content) == 2_000_000
            assert len(set(content)) == 1
        partial = list(tmp_path.glob("*.partial"))
        interrupted += len(partial) > 0
        for path in partial:
            path.unlink()
    assert interrupted > 0, "no kill fell into a write; the test shows nothing"


def test_concurrent_writers_of_one_key_agree(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: fetch(tmp_path, fresh=True), range(32)))
    assert {record.key for record in found} == {found[0].key}
    assert [path.name for path in tmp_path.iterdir()] == [f"{found[0].key}.json"]
    assert records.read(tmp_path / f"{found[0].key}.json")["y"] == 6


def test_a_fresh_run_computes_each_record_once(tmp_path, monkeypatch):
    path = tmp_path / f"{fetch(tmp_path).key}.json"
    monkeypatch.setenv("APTHORY_FRESH", "1")
    os.utime(path, (0, 0))  # from before this process
    fetch(tmp_path), fetch(tmp_path)
    assert len(calls) == 2
    monkeypatch.setenv("APTHORY_FRESH", str(time.time() - 3600))  # of a run that began an hour ago
    fetch(tmp_path)
    assert len(calls) == 2
    os.utime(path, (0, 0))
    fetch(tmp_path), fetch(tmp_path)
    assert len(calls) == 3
    fetch(tmp_path, fresh=True)
    assert len(calls) == 4


def test_load_all_keeps_the_whole_records_of_a_function(tmp_path):
    keys = sorted(fetch(tmp_path, config={"x": x}).key for x in range(3))
    assert [record.key for record in records.load_all(tmp_path)] == keys
    assert records.load_all(tmp_path, "apthory.sweeps.run_bundle") == []
    (tmp_path / f"{keys[1]}.json").write_text("{")
    with pytest.warns(RuntimeWarning, match="set aside"):
        assert [record.key for record in records.load_all(tmp_path, f"{__name__}.double")] == [
            keys[0],
            keys[2],
        ]


def test_citations_are_short_sorted_and_find_their_record(tmp_path):
    found = [fetch(tmp_path, config={"x": x}) for x in range(3)]
    cited = records.citation([*found, found[0].key])
    assert cited == sorted(record.key[:12] for record in found)
    assert records.find(cited[0], tmp_path) == tmp_path / f"{min(record.key for record in found)}.json"
    assert records.find("0" * 12, tmp_path) is None


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A module whose code can change."""
    source = tmp_path / "study.py"
    source.write_text("def run(x):\n    return {'accuracy': 50.0 + x, 'sites': ['a'], 'step_seconds': 1.0}\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("study")
    yield source, module
    del sys.modules["study"]


def edit(study, old, new):
    source, module = study
    source.write_text(source.read_text().replace(old, new))
    importlib.invalidate_caches()
    exec(compile(source.read_text(), source, "exec"), module.__dict__)  # reload() trusts clocks


def test_older_code_is_told_from_a_newer_version(study, tmp_path):
    record = fetch(tmp_path / "records", function=study[1].run, config={"x": 1}, sources=(records,))
    assert record.code.keys() == {"study", "apthory.records"}
    assert records.changed_code(record) == []
    assert records.superseded(record) == ""
    edit(study, "def run", "# a remark\ndef run")
    assert records.changed_code(record) == ["study"]
    assert records.superseded(record) == ""
    study[1].run.version = 2
    assert records.superseded(record) == "study.run is at version 2, not 1"
    edit(study, "def run", "def gone")
    del study[1].run
    assert records.superseded(record) == "study.run does not exist any more"


def test_recomputing_compares_values_but_no_timings(study, tmp_path):
    record = fetch(tmp_path / "records", function=study[1].run, config={"x": 1})
    assert records.recompute(record) == []
    edit(study, "1.0}", "9.0}")  # slower
    assert records.recompute(record) == []
    edit(study, "50.0", "50.1")  # within a hundredth
    assert records.recompute(record) == []
    edit(study, "50.1", "53.0")
    assert records.recompute(record) == ["values.accuracy was 51, is 54"]
    edit(study, "['a']", "['a', 'b']")
    assert len(records.recompute(record)) == 2
    study[1].run.version = 2
    with pytest.raises(ValueError, match="study\\.run is at version 2, not 1"):
        records.recompute(record)


def test_environment_tells_versions_and_hardware():
    environment = records.environment()
    assert environment["torch"] == torch.__version__.split("+")[0] or environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert environment["processor"]
    assert json.loads(json.dumps(environment)) == environment


def test_the_project_is_found_from_inside_it(tmp_path, monkeypatch):
    monkeypatch.delenv("APTHORY_ROOT", raising=False)
    (tmp_path / "figures").mkdir()
    (tmp_path / "notebooks" / "drafts").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notebooks" / "drafts")
    assert records.folder("small") == tmp_path / "figures" / "small" / "records"
    monkeypatch.setenv("APTHORY_ROOT", "/elsewhere")
    assert records.folder("small") == Path("/elsewhere/figures/small/records")
    with pytest.raises(ValueError, match="no suite 'huge'; there are embedded, small, paper"):
        records.folder("huge")
