"""Records are whole or absent, and named by what produced them."""

import hashlib
import importlib
import json
import math
import os
import re
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

from apthory._tools.environment import environment
from apthory.lab import records, registry

ROOT = Path(records.__file__).parents[2]
calls: list[dict] = []


@pytest.fixture(autouse=True)
def _no_calls(monkeypatch):
    monkeypatch.delenv("APTHORY_FRESH", raising=False)
    yield
    calls.clear()


@records.versioned(1, name="tests.double")
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
    identity = {"config": {"a": [1, 2.5], "x": 3}, "data": "d", "name": "tests.double", "version": 1}
    text = json.dumps({**identity, "weights": "w"}, sort_keys=True, separators=(",", ":"))
    record = fetch(tmp_path, config={"x": 3, "a": (1, 2.5)}, data="d", weights="w")
    assert record.key == hashlib.sha256(text.encode()).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == [f"{record.key}.json"]


@given(st.dictionaries(st.text(min_size=1), st.integers() | st.floats(allow_nan=False, allow_infinity=False)))
def test_key_does_not_depend_on_the_order_of_the_configuration(config):
    backwards = dict(reversed(config.items()))
    assert records._digest(records._plain(config, "")) == records._digest(records._plain(backwards, ""))


@records.versioned(1, name="tests.twice")
def twice(x):
    return {"y": 2 * x}


def test_each_part_of_the_identity_changes_the_key(tmp_path, monkeypatch):
    keys = {
        fetch(tmp_path).key,
        fetch(tmp_path, config={"x": 4}).key,
        fetch(tmp_path, data="other images").key,
        fetch(tmp_path, weights="other weights").key,
        fetch(tmp_path, function=twice).key,
    }
    monkeypatch.setattr(double, "version", 2)
    keys.add(fetch(tmp_path).key)
    assert len(keys) == 6


def test_a_function_may_move_and_keeps_its_records(tmp_path):
    def moved(x):
        raise AssertionError("computed again")

    moved.version, moved.recorded_as = 1, "tests.double"
    assert fetch(tmp_path, function=moved if list(tmp_path.iterdir()) else double)["y"] == 6
    assert fetch(tmp_path, function=moved)["y"] == 6


def test_two_functions_cannot_record_under_one_name(monkeypatch):
    monkeypatch.setattr(registry, "_loaded", {"tests.double": double})
    with pytest.raises(ValueError, match=r"two functions record as 'tests\.double': .*:double and .*<lambda>; rename"):
        records.versioned(1, name="tests.double")(lambda x: {"y": x})
    with pytest.raises(ValueError, match=r"the table of names has 'apthory\.bench\.race' at .*; correct it"):
        records.versioned(1, name="apthory.bench.race")(lambda x: {"y": x})


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

    broken.version, broken.recorded_as = 1, "tests.broken"
    with pytest.raises(error, match=message):
        fetch(tmp_path, function=broken)
    assert list(tmp_path.iterdir()) == []


def test_functions_without_a_name_for_their_records_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no name for its records; decorate it: @records\.versioned\(1, name="):
        fetch(tmp_path, function=lambda x: {"y": x})


def test_computing_can_be_made_an_error(tmp_path, monkeypatch):
    kept = fetch(tmp_path)
    monkeypatch.setenv("APTHORY_COMPUTE", "0")
    assert fetch(tmp_path) == kept
    with pytest.raises(
        records.MissingRecordError, match=r"record \w{12} of tests\.double is not there in .* forbids .*\"x\":4"
    ):
        fetch(tmp_path, config={"x": 4})
    with pytest.raises(records.MissingRecordError, match="is wanted anew"):
        fetch(tmp_path, fresh=True)
    with pytest.raises(records.MissingRecordError, match="is not computed again"):
        records.recompute(kept)
    monkeypatch.setenv("APTHORY_COMPUTE", "no")
    with pytest.raises(ValueError, match="APTHORY_COMPUTE is 'no'; expected 0, which makes computing an error, or 1"):
        fetch(tmp_path, config={"x": 4})
    assert len(calls) == 1
    assert [path.stem for path in tmp_path.iterdir()] == [kept.key]


def test_keys_that_are_asked_for_can_be_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("APTHORY_KEYS", str(tmp_path / "asked.txt"))
    kept = fetch(tmp_path / "records")
    other = fetch(tmp_path / "records", config={"x": 4})
    assert records.lookup(double, {"x": 3}, folder=tmp_path / "records") == kept
    assert records.lookup(double, {"x": 5}, folder=tmp_path / "records") is None
    assert (tmp_path / "asked.txt").read_text().splitlines() == [kept.key, other.key, kept.key]


def planted(folder, name, module="tests.nothing"):
    """A whole record that claims to be the result of any function, with the source of any module."""
    identity = {"name": name, "version": 1, "config": {"command": "touch done"}, "data": "", "weights": ""}
    content = {
        "key": records._digest(identity), **identity, "values": {"y": 0}, "code": {module: "0"}, "environment": {},
        "wall_seconds": 0.1,
    }  # fmt: skip
    content["sha256"] = records._digest(content)
    folder.mkdir(exist_ok=True)
    path = folder / f"{content['key']}.json"
    path.write_text(json.dumps(content))
    return records.read(path)


def test_no_record_makes_anything_be_imported_or_called(tmp_path, monkeypatch):
    """A record is data: what it names is looked up in the table of names, and its sources are read, not run."""
    package = tmp_path / "harmful"
    package.mkdir()
    for name in ("__init__.py", "inner.py"):
        (package / name).write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "harmful.inner.run", "apthory.sweeps.no_such_function"):
        record = planted(tmp_path / "records", name, module="harmful.inner")
        assert records.superseded(record).startswith(f"no function records as {name!r}; remove the record, or load")
        with pytest.raises(ValueError, match="cannot be computed again: no function records as"):
            records.recompute(record)
        assert records.changed_code(record) == ["harmful.inner"]
    assert not (tmp_path / "done").exists()
    source = hashlib.sha256((package / "inner.py").read_bytes()).hexdigest()
    assert records._source_digest("harmful.inner") == source
    assert "harmful" not in sys.modules


def test_every_recorded_function_is_where_the_table_of_names_says():
    marked = set()
    for path in (ROOT / "apthory").rglob("*.py"):
        marked |= set(re.findall(r'versioned\(\d+, name="([\w.]+)"\)', path.read_text()))
    assert marked == registry.PLACES.keys()
    for name in registry.PLACES:
        assert registry.find_function(name).recorded_as == name


NAMES_FOR_EVER = """
apthory.bench.race apthory.efficiency.measure_methods apthory.efficiency.measure_sites
apthory.equivalence_study.measure_diagnoses apthory.equivalence_study.measure_gap
apthory.equivalence_study.measure_layers apthory.equivalence_study.measure_trained
apthory.equivalence_study.measure_trajectories apthory.global_study.measure_attention
apthory.global_study.measure_profile apthory.global_study.measure_similarity apthory.input_study.measure_frame
apthory.input_study.measure_rank apthory.input_study.measure_residuals apthory.input_study.measure_universality
apthory.layers.score apthory.layers.search apthory.mask_study.draw_prompt apthory.mask_study.measure_masks
apthory.metric_bench.race apthory.pixel_bench.race apthory.pixel_bench.race_words apthory.pixel_study.run_shifted
apthory.sweeps.run_cell apthory.theory.study.measure_counts apthory.theory.study.measure_descent
apthory.theory.study.measure_epochs apthory.theory.study.measure_errors
"""


def test_names_of_records_are_never_changed():
    assert set(NAMES_FOR_EVER.split()) <= registry.PLACES.keys()


def test_failing_function_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        fetch(tmp_path, config={"x": None})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [{"name": ["a"]}, {"code": ["y"]}, {"code": {"a": 1}}, {"version": "1"}, {"config": []}, {"values": None}],
    ids=str,
)
def test_a_sealed_file_with_fields_of_other_kinds_is_no_record(tmp_path, content):
    """Digests that fit do not make a record: whoever writes a file can write its digests."""
    kept = json.loads((tmp_path / f"{fetch(tmp_path).key}.json").read_text())
    kept.pop("sha256")
    kept |= content
    kept["key"] = records._digest({name: kept[name] for name in ("name", "version", "config", "data", "weights")})
    kept["sha256"] = records._digest(kept)
    path = tmp_path / f"{kept['key']}.json"
    path.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=f"is not a whole record: its field '{next(iter(content))}' is"):
        records.read(path)


def test_a_module_without_a_python_source_is_missing():
    assert records._source_digest("numpy._core._multiarray_umath") == "missing"
    assert records._source_digest("numpy") != "missing"


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
        import sys
        from pathlib import Path
        from apthory._tools.files import write_atomically
        for index in range(10**6):
            text = bytes([65 + index % 26]) * 2_000_000
            write_atomically(Path(sys.argv[1]) / f"{index % 3}.json", text)
            print(index, flush=True)
    """)
    command = [sys.executable, "-c", writer, str(tmp_path)]
    interrupted = 0
    for attempt in range(10):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
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
        assert [record.key for record in records.load_all(tmp_path, "tests.double")] == [
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
    header = "from apthory.lab import records\n\n\n@records.versioned(1, name='study.run')\n"
    source.write_text(
        f"{header}def run(x):\n    return {{'accuracy': 50.0 + x, 'sites': ['a'], 'step_seconds': 1.0}}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("study")
    yield source, module
    del sys.modules["study"], registry._loaded["study.run"]


def edit(study, old, new):
    source, module = study
    source.write_text(source.read_text().replace(old, new))
    importlib.invalidate_caches()
    exec(compile(source.read_text(), source, "exec"), module.__dict__)  # reload() trusts clocks


def test_older_code_is_told_from_a_newer_version(study, tmp_path):
    record = fetch(tmp_path / "records", function=study[1].run, config={"x": 1}, sources=(records,))
    assert record.code.keys() == {"study", "apthory.lab.records"}
    assert records.changed_code(record) == []
    assert records.superseded(record) == ""
    edit(study, "def run", "# a remark\ndef run")
    assert records.changed_code(record) == ["study"]
    assert records.superseded(record) == ""
    study[1].run.version = 2
    assert records.superseded(record) == "study.run is at version 2, not 1"


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
    found = environment()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["processor"]
    assert json.loads(json.dumps(found)) == found


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


# ------------------------------------------------------------------------------------- the committed records

BENCHMARKS = ("apthory.bench.", "apthory.pixel_bench.", "apthory.metric_bench.")
SPARE = {"c10eae115b9e"}  # VP on CIFAR-10 by itself, run before the same prompt was run under corruption


@pytest.mark.parametrize("suite", ["embedded", "small"])
def test_every_key_that_notebooks_ask_for_has_its_record(suite):
    """The list is compared with what notebooks ask for by `make notebooks-check`; here with what is kept."""
    folder = ROOT / "figures" / suite
    keys = (folder / "keys.txt").read_text().split()
    assert keys == sorted(set(keys))
    kept = {record.key: record for record in records.load_all(folder / "records")}
    assert set(keys) <= kept.keys(), "records are gone that the notebooks ask for"
    rest = [kept[key] for key in kept.keys() - set(keys) if key[:12] not in SPARE]
    others = {record.name for record in rest if not record.name.startswith(BENCHMARKS)}
    assert not others, "records that no notebook asks for; remove them, or list their keys"


def test_records_that_are_kept_are_those_of_the_functions_as_they_are():
    for suite in ("embedded", "small"):
        for record in records.load_all(ROOT / "figures" / suite / "records"):
            assert records.superseded(record) == "", record.key
