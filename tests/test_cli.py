"""The command `apthory` ends with the right exit code, and says in one line what was wrong and what to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from apthory import __main__ as command
from apthory import tasks
from apthory.lab import claims, notebooks, records

ROOT = Path(command.__file__).parents[1]

NOTEBOOK = """\
# %% [markdown]
# # One is one

# %% tags=["parameters"]
suite: str = "embedded"  # embedded, small or paper

# %%
assert 1 == 1
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one notebook that was never run."""
    for name in ("notebooks", "figures"):
        (tmp_path / name).mkdir()
    (tmp_path / "notebooks" / "01_one.py").write_text(NOTEBOOK)
    monkeypatch.setenv("APTHORY_ROOT", str(tmp_path))
    monkeypatch.delenv("APTHORY_DATA", raising=False)
    monkeypatch.delenv("APTHORY_DEBUG", raising=False)
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(command.app, arguments)


def mark_as_run(source):
    stamp = {"parameters": {}, "source_sha256": notebooks.source_digest(source)}
    source.with_suffix(".ipynb").write_text(json.dumps({"metadata": {"papermill": stamp}}))


# ------------------------------------------------------------------------------------------- what it does


def test_help_needs_no_torch_and_lists_the_commands():
    code = "import sys; from apthory.__main__ import app\n"
    code += "try: app(['--help'])\n"
    code += "finally: print({'torch', 'pandas', 'papermill'} & sys.modules.keys(), file=sys.stderr)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stderr == "set()\n"
    for name in ("run", "check", "tasks", "cite", *LATER):
        assert f" {name} " in shown.stdout


def test_the_module_runs_as_a_command(project):
    shown = subprocess.run(
        [sys.executable, "-m", "apthory", "run", "07"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    folder = project / "notebooks"
    assert (shown.returncode, shown.stdout) == (1, "")
    assert shown.stderr == f"Error: no notebook '07' in {folder}; there are: 01_one\n"


def test_tasks_lists_the_embedded_tasks(project):
    result = call("tasks", "--size", "16")
    assert result.exit_code == 0
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == list(tasks.EMBEDDED)
    digits = tasks.load("digits", 16)
    counts = f"{len(digits.train)} train and {len(digits.test)} test images"
    assert result.stdout.startswith(f"digits: 10 classes, {counts}, digest {digits.digest[:12]}\n")


def test_tasks_looks_at_those_that_are_named(project):
    assert call("tasks", "count", "--size", "16").stdout.startswith("count: 4 classes, ")


def test_check_passes_only_while_everything_is_current(project):
    source = project / "notebooks" / "01_one.py"
    result = call("check")
    assert result.exit_code == 1
    assert result.stdout.endswith("\nstale:\n  01_one was not run for the embedded suite\n")
    mark_as_run(source)
    result = call("check")
    assert result.exit_code == 0
    assert result.stdout.endswith("\nresults current\n")
    assert all(f"\n{key} " in f"\n{result.stdout}" for key in claims.claims())
    source.write_text(NOTEBOOK + "# a remark\n")
    assert call("check").exit_code == 1


@pytest.mark.parametrize("options", [[], ["--recompute"]])
def test_check_calls_nothing_that_a_record_names(project, monkeypatch, options):
    mark_as_run(project / "notebooks" / "01_one.py")
    identity = {"name": "os.system", "version": 1, "config": {"command": "touch done"}, "data": "", "weights": ""}
    content = {"key": records._digest(identity), **identity, "values": {}, "code": {}, "environment": {}}
    content |= {"wall_seconds": 0.1}
    content["sha256"] = records._digest(content)
    folder = records.folder("embedded")
    folder.mkdir(parents=True)
    (folder / f"{content['key']}.json").write_text(json.dumps(content))
    monkeypatch.chdir(project)
    result = call("check", *options)
    assert result.exit_code == 1
    assert (
        f"stale:\n  record {content['key'][:12]}: no function records as 'os.system'; remove the record"
        in result.stdout
    )
    assert not (project / "done").exists()


def test_check_of_a_claim_says_what_it_is_and_how_it_was_judged(project):
    scope = {"suite": "small", "backbones": ["vit_micro"], "tasks": ["digits"], "seeds": [0], "made_from": []}
    claims.verdict("AP-1.full", -2.0, (-3.0, -1.0), tag="vit_micro", note="On one task.", **scope)
    result = call("check", "AP-1")
    assert result.exit_code == 0
    known = claims.claims()
    lines = result.stdout.splitlines()
    assert lines[0] == f"AP-1: {known['AP-1.full'].claim}."
    assert f"AP-1.full: {known['AP-1.full'].statistic}, claimed < 0" in lines
    assert f"AP-1.linear: {known['AP-1.linear'].statistic}, claimed < 0" in lines
    judged = next(line for line in lines if line.startswith("AP-1.full@vit_micro"))
    assert judged.split()[1] == "supported"
    assert "-2 [-3, -1]" in judged
    assert lines[lines.index(judged) + 1] == "  On one task."
    assert next(line for line in lines if line.startswith("AP-1.linear ")).split()[1:3] == ["not", "run"]
    assert not [line for line in lines if line.startswith("AP-11")]
    assert "AP-1.full" not in call("check", "AP-1.linear").stdout


def test_check_of_an_unknown_name_suggests_claims(project):
    result = call("check", "AP-5c")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: no claim and no file 'AP-5c'; claims like it: AP-5a, AP-5b, AP-c\n"


def test_check_recompute_without_records_fails(project):
    mark_as_run(project / "notebooks" / "01_one.py")
    result = call("check", "--recompute")
    assert result.exit_code == 1
    assert "there is no record to compute again" in result.stdout


def test_check_of_a_picture_that_is_none_of_ours_fails(project):
    picture = project / "picture.png"
    picture.write_bytes(b"not a picture")
    result = call("check", str(picture))
    assert result.exit_code == 1
    assert "picture.png" in result.stdout


# ---------------------------------------------------------------------------------------------- user errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "07"], "no notebook '07' in {notebooks}; there are: 01_one"),
        (["run", "--suite", "tiny"], "no suite 'tiny'; there are embedded, small, paper"),
        (["run", "-p", "limit=3"], "01_one.py has no parameter limit; it has suite"),
        (["tasks", "nothing"], "no embedded task 'nothing', and no data folder to look in. Set APTHORY_DATA"),
        (["tasks", "nothing", "--data", "nowhere"], "no task 'nothing': the data folder 'nowhere' does not"),
        (["tasks", "digits", "--size", "4"], "images of 4 px; expected at least 8"),
        (["tasks", "folder:nowhere"], "no folder 'nowhere'; expected PATH/train/<class>/*.png"),
        (["cite"], "there is no {root}/CITATION.bib; call this from the repository or set APTHORY_ROOT"),
    ],
)  # fmt: skip
def test_a_users_error_is_one_line(project, arguments, message):
    result = call(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: {message.format(root=project, notebooks=project / 'notebooks')}")
    assert result.stderr.count("\n") == 1
    assert not list(project.rglob("*.ipynb"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["run", "--speed"],
        ["run", "-p", "limit"],
        ["run", "--data", "nowhere"],
        ["tasks", "--size", "x"],
    ],
    ids=" ".join,
)
def test_a_call_that_cannot_be_read_is_a_usage_error(project, arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr


LATER = {  # commands that import what they call when they are called: their arguments, and the function to replace
    "sweep": ([], "apthory.studies.catalogue.known"),
    "layers": (["--backbone", "vit_micro", "--task", "digits"], "apthory.backbones.load"),
    "fit": (
        ["--backbone", "vit_micro", "--task", "digits", "--site", "blocks.2:input", "--output", "p.safetensors"],
        "apthory.backbones.load_sized",
    ),
    "predict": (["--prompt", "p.safetensors", "--images", "."], "apthory.methods.files.backbone_of_file"),
    "pretrain": (["vit_micro", "--output", "run"], "apthory.pretraining.pretrain"),
    "ship": (["vit_micro.safetensors"], "apthory.pretraining.cards.ship"),
    "bench": ([], "apthory.benchmarks.prefix_cache.run_prefix_cache"),
    "bench-pixels": ([], "apthory.benchmarks.pixels.run_pixels"),
    "bench-metrics": ([], "apthory.benchmarks.metrics.run_metrics"),
}


@pytest.fixture(params=["run", "check", "tasks", "cite", *LATER])
def fails_with(request, project, monkeypatch):
    """Each command, its work replaced by an error."""

    def fails_with(error, *options):
        def fail(*arguments, **options):
            raise error

        arguments, function = LATER.get(request.param, ([], ""))
        if function:
            monkeypatch.setattr(function, fail)
        monkeypatch.setattr(notebooks, "run", fail)
        monkeypatch.setattr(claims, "ledger", fail)
        monkeypatch.setattr(tasks, "load", fail)
        if request.param in ("check", "cite"):
            monkeypatch.setattr(records, "root", fail)
        return call(*options, request.param, *arguments)

    return fails_with


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no site 'x';\n  did you mean 'y'?"), "Error: no site 'x'; did you mean 'y'?\n"),
        (FileNotFoundError(2, "No such file", "here"), "Error: [Errno 2] No such file: 'here'\n"),
        (FloatingPointError("the loss is nan"), "Error: the loss is nan\n"),
        (MemoryError(), "Error: MemoryError\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_command_says_an_error_in_one_line(fails_with, error, line):
    result = fails_with(error)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", line)


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_the_traceback_is_there_for_those_who_ask(fails_with, monkeypatch, by):
    error = ValueError("no site 'x'")
    if by == "environment":
        monkeypatch.setenv("APTHORY_DEBUG", "1")
    result = fails_with(error, *["--debug"] * (by == "flag"))
    assert result.exception is error
    assert "Error: no site" not in result.stderr


def test_a_mistake_of_ours_is_never_hidden(fails_with):
    error = KeyError("a bug")
    assert fails_with(error).exception is error


def test_a_reader_that_stops_reading_is_no_error(fails_with):
    result = fails_with(BrokenPipeError(32, "Broken pipe"))
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "")


def test_check_outside_the_repository_says_where_to_call_it(tmp_path, monkeypatch):
    monkeypatch.setenv("APTHORY_ROOT", str(tmp_path))
    result = call("check")
    assert result.exit_code == 1
    assert f"no notebooks and figures in {tmp_path}; call this from the repository or set APTHORY_ROOT" in result.output
