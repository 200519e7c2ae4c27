"""Notebooks are text that executes to the same bytes, resumes, and fails without leaving a trace."""

import ast
import contextlib
import importlib
import io
import json
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import papermill
import pytest
from typer.testing import CliRunner

from apthory.__main__ import app
from apthory._tools.progress import progress
from apthory.lab import check, notebooks, records, registry

REPOSITORY = Path(notebooks.__file__).parents[2]

EXAMPLE = """\
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sums grow

# %% tags=["parameters"]
suite: str = "embedded"  # embedded, small or paper
limit: int = 3  # largest number

# %%
import sys
import warnings

import matplotlib.pyplot as plt
import pandas as pd
from sums import total
from tqdm.auto import tqdm

from apthory._tools.progress import progress
from apthory.lab import claims, figures, records

print("first")
for step in progress(range(3), desc="counting"):
    print(step)
for step in tqdm(range(2), desc="widget"):
    pass
warnings.warn("a real warning")

# %%
record = records.fetch(total, {"limit": limit}, folder=records.folder(suite))
record.values

# %%
with figures.theme():
    figure, ax = plt.subplots()
    ax.plot(record["sums"])
    figures.save(figure, "00_sums", [record], pd.DataFrame({"sum": record["sums"]}), suite=suite)

# %%
change = record["sums"][-1] - record["sums"][0]
scope = {"suite": suite, "backbones": ["resnet_micro"], "tasks": [], "seeds": [], "made_from": [record]}
claims.verdict("AP-11", change - 3, None, **scope)
"""

SUMS = """\
from apthory.lab import records


@records.versioned(1, name="sums.total")
def total(limit):
    with open(__file__ + ".log", "a") as log:
        log.write(f"{limit}\\n")
    if limit < 0:
        raise ValueError(f"limit {limit} is negative")
    return {"sums": [sum(range(n + 1)) for n in range(limit)]}
"""


def make_project(folder):
    for name in ("notebooks", "figures"):
        (folder / name).mkdir()
    (folder / "notebooks" / "00_sums.py").write_text(EXAMPLE)
    (folder / "sums.py").write_text(SUMS)
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("APTHORY_ROOT", str(tmp_path))
    return make_project(tmp_path)


def contents(project):
    kept = (path for path in project.rglob("*.*") if path.suffix in (".ipynb", ".png", ".pdf", ".csv", ".json"))
    return {path.relative_to(project).as_posix(): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A project whose notebook was run twice by our runner and once by plain papermill."""
    project = make_project(tmp_path_factory.mktemp("project"))
    found, shown = {"project": project}, io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APTHORY_ROOT", str(project))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(project), str(REPOSITORY)]))
        patch.setenv("MPLBACKEND", "agg")  # as in continuous integration; must not cost the twin its pictures
        before = dict(os.environ)
        with contextlib.redirect_stderr(shown):
            found["twins"] = notebooks.run()
        found |= {"first": contents(project), "shown": shown.getvalue()}
        notebooks.run(["00"], fresh=True)
        found["second"] = contents(project)
        assert dict(os.environ) == before
        papermill.execute_notebook(
            project / "notebooks" / "00_sums.ipynb",
            project / "out.ipynb",
            {"suite": "small", "limit": 5},
            progress_bar=False,
        )
    return found


@pytest.fixture
def inside(executed, monkeypatch):
    """The command `apthory`, called inside the executed project."""
    monkeypatch.setenv("APTHORY_ROOT", str(executed["project"]))
    monkeypatch.syspath_prepend(executed["project"])
    importlib.import_module("sums")  # its function is known to `check` by name alone
    yield lambda *arguments: CliRunner().invoke(app, arguments)
    del sys.modules["sums"], registry._loaded["sums.total"]


def test_executing_twice_gives_the_same_bytes(executed):
    first, second = executed["first"], executed["second"]
    assert first.keys() == second.keys()
    assert sorted(name.rpartition(".")[2] for name in first) == ["csv", "ipynb", "json", "json", "pdf", "png"]
    changed = [name for name in first if first[name] != second[name]]
    assert all("/records/" in name for name in changed)  # a fresh record has its own wall seconds


def test_a_fresh_run_computes_and_a_picture_is_found_beside_its_suite(executed):
    computed = (executed["project"] / "sums.py.log").read_text().split()
    assert computed[:3] == ["3", "3", "5"]  # first, fresh, and the small suite by plain papermill
    assert executed["twins"] == [executed["project"] / "notebooks" / "00_sums.ipynb"]


def test_plain_papermill_runs_the_executed_notebook(executed):
    out = nbformat.read(executed["project"] / "out.ipynb", as_version=4)
    assert len([cell for cell in out.cells if "injected-parameters" in cell.metadata.tags]) == 1
    figures = executed["project"] / "figures"
    assert (figures / "small" / "00_sums.csv").read_text() == "sum\n0\n1\n3\n6\n10\n"
    assert (figures / "embedded" / "00_sums.csv").read_text() == "sum\n0\n1\n3\n"


def test_a_twin_holds_content_only(executed):
    source = executed["project"] / "notebooks" / "00_sums.py"
    text = executed["second"]["notebooks/00_sums.ipynb"].decode()
    twin = nbformat.reads(text, as_version=4)
    nbformat.validate(twin)
    assert twin.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "papermill": {"parameters": {}, "source_sha256": notebooks.source_digest(source)},
    }
    assert notebooks.stale(source, source.with_suffix(".ipynb")) == ""
    outputs = [output for cell in twin.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output.get("name") or sorted(output.data) for output in outputs] == [
        "stdout",
        ["text/plain"],
        ["image/png", "text/plain"],
        ["text/markdown", "text/plain"],
    ]
    assert outputs[0].text == "first\n0\n1\n2\n"
    assert outputs[1].data["text/plain"] == "{'sums': [0, 1, 3]}"
    assert "application/vnd.jupyter.widget" not in text


def test_warnings_and_bars_reach_the_terminal(executed):
    for part in ("a real warning", "counting", "00_sums"):
        assert part in executed["shown"]


def test_check_prints_the_ledger_and_recomputes(inside):
    result = inside("check", "--recompute")
    assert result.exit_code == 0, result.output
    assert re.search(r"AP-11 +supported +< 1 +0 \[0, 0\] +embedded", result.output)
    assert re.search(r"AP-10\.rank +not run", result.output)
    assert re.search(r"computing record \w{12} again: sums\.total", result.output)
    assert "results current" in result.output


def test_check_fails_and_names_what_was_changed(executed, inside):
    csv = executed["project"] / "figures" / "embedded" / "00_sums.csv"
    kept = csv.read_bytes()
    assert "00_sums (embedded suite)" in inside("check", str(csv.with_suffix(".png"))).output
    csv.write_text("sum\n42\n")
    try:
        for arguments in (["check"], ["check", str(csv.with_suffix(".pdf"))]):
            result = inside(*arguments)
            assert result.exit_code == 1
            assert "00_sums.csv is not the table that was drawn" in result.output
    finally:
        csv.write_bytes(kept)
    assert inside("check").exit_code == 0


def test_check_lists_records_of_older_code_without_failing(executed, inside):
    code = executed["project"] / "sums.py"
    kept = code.read_text()
    code.write_text(kept + "# a remark\n")
    try:
        result = inside("check")
    finally:
        code.write_text(kept)
    assert result.exit_code == 0
    assert "(sums.total): sums changed since" in result.output


def test_check_of_a_file_that_is_not_there_fails(tmp_path):
    result = CliRunner().invoke(app, ["check", str(tmp_path / "nothing.png")])
    assert result.exit_code == 1
    assert f"no claim and no file '{tmp_path / 'nothing.png'}'" in result.output


def test_a_failing_cell_is_shown_and_nothing_is_written(project, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(project))
    body = "from sums import total\n\ntotal(limit)\n"
    (project / "notebooks" / "00_sums.py").write_text(EXAMPLE.partition("# %%\nimport")[0] + "# %%\n" + body)
    twin = project / "notebooks" / "00_sums.ipynb"
    twin.write_text("the old twin")
    before = dict(os.environ)
    result = CliRunner().invoke(app, ["run", "-p", "limit=-1"])
    assert result.exit_code == 1
    assert "ValueError: limit -1 is negative" in result.output
    assert "total(limit)" in result.output
    assert "00_sums.py failed; its twin was not touched." in result.output
    assert twin.read_text() == "the old twin"
    assert sorted(path.name for path in (project / "notebooks").iterdir()) == ["00_sums.ipynb", "00_sums.py"]
    assert list((project / "figures").iterdir()) == []
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("cell", "options", "message"),
    [
        ("import time\ntime.sleep(60)", {"timeout": 1}, "timed out"),
        ("import os\nos._exit(1)", {}, "Kernel died"),
    ],
    ids=["takes too long", "kills the kernel"],
)
def test_a_cell_that_does_not_end_is_an_error_of_the_notebook(project, capfd, cell, options, message):
    source = project / "notebooks" / "00_sums.py"
    source.write_text(EXAMPLE.partition("# %%\nimport")[0] + f"# %%\n{cell}\n")
    with pytest.raises(notebooks.NotebookError, match=rf"(?s){message}.*\n00_sums\.py failed; its twin was"):
        notebooks.run(**options)
    assert not source.with_suffix(".ipynb").exists()
    assert "encrypt" not in capfd.readouterr().err  # kernels do not warn of their own transport


def test_unknown_parameters_notebooks_and_suites_are_errors(project):
    with pytest.raises(ValueError, match=r"00_sums\.py has no parameter limits; it has suite, limit"):
        notebooks.run(parameters={"limits": 3})
    with pytest.raises(ValueError, match=r"no notebook '07' in .*; there are: 00_sums"):
        notebooks.run(["00", "07"])
    with pytest.raises(ValueError, match="no suite 'tiny'"):
        notebooks.run(suite="tiny")
    result = CliRunner().invoke(app, ["run", "-p", "limit"])
    assert result.exit_code == 2
    assert "is not NAME=VALUE" in result.output
    assert "there is no folder" in CliRunner().invoke(app, ["run", "--data", "nowhere"]).output
    assert not list(project.rglob("*.ipynb"))


@pytest.mark.parametrize("name", ["00", "00_sums", "00_sums.py", "notebooks/00_sums.py"])
def test_notebooks_are_found_by_number_or_name(project, name):
    assert notebooks.sources([name]) == notebooks.sources() == [project / "notebooks" / "00_sums.py"]


def test_stale_tells_why(project):
    source = project / "notebooks" / "00_sums.py"
    twin = notebooks.twin_path(source, "small")
    assert twin == project / "figures" / "small" / "00_sums.ipynb"
    assert notebooks.stale(source, twin, "small") == "00_sums was not run for the small suite"
    stamp = {"parameters": {"suite": "small"}, "source_sha256": notebooks.source_digest(source)}
    twin.parent.mkdir()
    twin.write_text(json.dumps({"metadata": {"papermill": stamp}}))
    assert notebooks.stale(source, twin, "small") == ""
    assert "run with the parameters {'suite': 'small'}, not with {}" in notebooks.stale(source, twin)
    source.write_text(EXAMPLE + "\n# a remark\n")
    assert "another version of 00_sums.py" in notebooks.stale(source, twin, "small")
    twin.write_text(json.dumps({"metadata": {}}))
    assert "another version" in notebooks.stale(source, twin, "small")
    assert len(check.problems()) == 2  # not run for the embedded suite, and this one


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("vit_micro", "vit_micro"),
        ("[1, 2]", [1, 2]),
        ("True", True),
        ("a=b", "a=b"),
    ],
)
def test_parameters_of_the_command_have_pythons_types(project, monkeypatch, text, value):
    seen = {}
    monkeypatch.setattr(notebooks, "run", lambda names, suite, **options: seen.update(options) or [])
    assert CliRunner().invoke(app, ["run", "-p", f"limit={text}"]).exit_code == 0
    assert seen["parameters"] == {"limit": value}


def test_cite_prints_bibtex_for_the_software_and_the_papers(monkeypatch):
    monkeypatch.setenv("APTHORY_ROOT", str(REPOSITORY))
    result = CliRunner().invoke(app, ["cite"])
    assert result.exit_code == 0
    assert result.output.startswith("@software{apthory,")
    assert result.output == (REPOSITORY / "CITATION.bib").read_text()
    for number in ("2604.06440", "2212.10556", "2403.13282"):
        assert result.output.count(f"{{{number}}}") == 1


@pytest.mark.parametrize(("target", "is_below"), [("terminal", True), ("log", False)])
def test_bars_of_a_kernel_are_text_below_the_runners_own(monkeypatch, target, is_below):
    monkeypatch.setenv("APTHORY_PROGRESS", target)
    shown = io.StringIO()
    for _ in progress(range(2), desc="outer", file=shown):
        assert "outer" in shown.getvalue()
    assert ("\x1b[A" in shown.getvalue()) == is_below
    assert shown.getvalue().split("\r")[-1].strip("\n\x1b[A ") == ""  # gone when done


# The project's own notebooks.
SOURCES = sorted((REPOSITORY / "notebooks").glob("*.py"))
each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def test_the_notebooks_were_found():
    assert len(SOURCES) >= 3


@each_notebook
def test_a_notebook_has_one_title_and_one_cell_of_annotated_parameters(source):
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", source.stem)
    cells = jupytext.read(source).cells
    titles = [line for cell in cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    titles = [line for line in titles if line.startswith("# ")]
    assert len(titles) == 1
    (parameters,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    lines = [line for line in parameters.splitlines() if line.strip()]
    for line, statement in zip(lines, ast.parse(parameters).body, strict=True):
        assert isinstance(statement, ast.AnnAssign), line
        ast.literal_eval(statement.value)
        assert re.search(r"  # \S", line), f"no comment on {line!r}"
    assert 'suite: str = "embedded"' in parameters
    assert papermill.inspect_notebook(notebooks._read_source(source))["suite"]["default"] == '"embedded"'


def twins():
    for source in SOURCES:
        for suite in records.SUITES:
            folder = source.parent if suite == "embedded" else REPOSITORY / "figures" / suite
            twin = folder / f"{source.stem}.ipynb"
            if suite == "embedded" or twin.exists():
                yield pytest.param(source, twin, suite, id=f"{source.stem}-{suite}")


@pytest.mark.parametrize(("source", "twin", "suite"), list(twins()))
def test_a_twin_is_its_source_executed(source, twin, suite):
    assert notebooks.stale(source, twin, suite) == ""
    notebook = nbformat.read(twin, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    sources = jupytext.read(source).cells
    assert [(cell.cell_type, cell.source) for cell in cells] == [(cell.cell_type, cell.source) for cell in sources]
    for cell in cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            shown = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(r"at 0x[0-9a-f]{6,}", shown), f"an address changes with each run: {shown}"


@pytest.mark.parametrize("suite", records.SUITES)
def test_every_figure_is_named_by_its_notebook_and_the_other_way_round(suite):
    if not (REPOSITORY / "figures" / suite).is_dir():
        pytest.skip(f"nothing was committed for the {suite} suite")
    for ending in ("png", "pdf", "csv"):
        drawn = {path.stem for path in (REPOSITORY / "figures" / suite).glob(f"*.{ending}")}
        ran = [source for source in SOURCES if notebooks_ran(source, suite)]
        named = {name for source in ran for name in re.findall(rf'"({source.stem[:2]}_\w+)"', source.read_text())}
        assert drawn == named


def notebooks_ran(source, suite):
    return suite == "embedded" or (REPOSITORY / "figures" / suite / f"{source.stem}.ipynb").exists()
