"""Notebooks as text, executed by papermill.

The source of a notebook is text, notebooks/NN_name.py (jupytext, percent format). papermill executes it in a
process of its own; the executed twin is stored without clocks, random ids and progress bars, so that equal
results are equal bytes. Twins of the embedded suite lie beside their sources, others beside their figures.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apthory._tools.extras import from_extra
from apthory._tools.files import write_atomically
from apthory._tools.progress import progress
from apthory.lab import records


class NotebookError(RuntimeError):
    """A cell failed, with its traceback; or it took too long, or the kernel died."""


def sources(names: Sequence[str] = ()) -> list[Path]:
    """Text notebooks of the project, all or those named ("03" or "03_layer_preference")."""
    paths = sorted((records.root() / "notebooks").glob("[0-9][0-9]_*.py"))
    chosen = []
    for name in names:
        matches = [path for path in paths if Path(name).stem in (path.stem, path.stem[:2])]
        if not matches:
            there = ", ".join(path.stem for path in paths) or "none"
            raise ValueError(f"no notebook {name!r} in {records.root() / 'notebooks'}; there are: {there}")
        chosen += matches
    return chosen if names else paths


def twin_path(source: Path, suite: str) -> Path:
    """Where the executed notebook of a suite is stored."""
    folder = source.parent if suite == "embedded" else records.suite_folder(suite)
    return folder / f"{source.stem}.ipynb"


def run(
    names: Sequence[str] = (),
    suite: str = "embedded",
    *,
    output: Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    fresh: bool = False,
    timeout: int | None = None,
) -> list[Path]:
    """Execute notebooks, one process each, and store their twins. Records make an interrupted run resume.

    Args:
        names: Which notebooks; all if empty.
        suite: The suite that each notebook's ``suite`` parameter is set to.
        output: Folder for the twins instead of `twin_path`.
        parameters: Further parameters; each must exist in every notebook chosen.
        fresh: Compute anew what records from before this run hold.
        timeout: Seconds after which a cell is stopped.

    Raises:
        ValueError: If a notebook or parameter does not exist; nothing has run then.
        NotebookError: If a cell fails; the old twin stays.
    """
    records.suite_folder(suite)  # fails for an unknown suite
    chosen = sources(names)
    overrides = dict(parameters or {})
    if suite != "embedded":
        overrides["suite"] = suite
    for source in chosen:
        _check_parameters(source, overrides)
    written = []
    bar = progress(total=len(chosen), unit="notebook", disable=not chosen)
    with bar, _kernel_environment(fresh):
        for source in chosen:
            bar.set_description(source.stem)
            notebook = execute(source, overrides, timeout=timeout)
            twin = output / f"{source.stem}.ipynb" if output else twin_path(source, suite)
            write_atomically(twin, notebook.encode())
            written.append(twin)
            bar.update()
    return written


def execute(source: Path, parameters: Mapping[str, Any], *, timeout: int | None = None) -> str:
    """Run one text notebook; return the executed one as JSON text, stripped of all that is not content."""
    with from_extra("studies"):  # they take seconds to import, and every notebook imports this module
        import nbformat
        import papermill

    notebook = _read_source(source)
    try:
        executed = papermill.execute_notebook(
            notebook,
            None,
            parameters=dict(parameters),
            kernel_name="python3",
            cwd=source.parent,
            progress_bar=False,
            stderr_file=sys.stderr,  # warnings and bars are forwarded as they come
            execution_timeout=timeout,
            extra_arguments=["--log-level=ERROR"],  # or each kernel warns that it does not encrypt
        )
    except (papermill.PapermillExecutionError, TimeoutError, RuntimeError) as error:  # the last: kernel died
        raise NotebookError(f"{error}\n{source.name} failed; its twin was not touched.") from error
    executed.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "papermill": {"parameters": dict(parameters), "source_sha256": source_digest(source)},
        }
    )
    for index, cell in enumerate(executed.cells):
        cell.id = f"cell-{index:03d}"
        cell.metadata = nbformat.from_dict({"tags": tags} if (tags := cell.metadata.get("tags")) else {})
        if cell.cell_type == "code":
            cell.outputs = list(_content_only(cell.outputs))
    return nbformat.writes(executed) + "\n"


def source_digest(source: Path) -> str:
    """SHA-256 of a text notebook, the same on every system."""
    return hashlib.sha256(source.read_text("utf-8").encode()).hexdigest()


def stale(source: Path, twin: Path, suite: str = "embedded") -> str:
    """Say why an executed notebook is not what its source gives; empty if it is."""
    if not twin.exists():
        return f"{source.stem} was not run for the {suite} suite"
    stamp = json.loads(twin.read_text("utf-8"))["metadata"].get("papermill", {})
    expected = {} if suite == "embedded" else {"suite": suite}
    if stamp.get("source_sha256") != source_digest(source):
        return f"{twin} was made from another version of {source.name}"
    if stamp.get("parameters") != expected:
        return f"{twin} was run with the parameters {stamp.get('parameters')}, not with {expected}"
    return ""


def _read_source(source: Path) -> Any:
    with from_extra("studies"):
        import jupytext

    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return notebook


def _check_parameters(source: Path, overrides: Mapping[str, Any]) -> None:
    """Unknown parameters are errors here; papermill itself only warns."""
    with from_extra("studies"):
        import papermill

    known = papermill.inspect_notebook(_read_source(source))
    if unknown := sorted(overrides.keys() - known.keys()):
        raise ValueError(f"{source.name} has no parameter {', '.join(unknown)}; it has {', '.join(known)}")


@contextmanager
def _kernel_environment(fresh: bool) -> Iterator[None]:
    """What kernels inherit; restored afterwards."""
    before = dict(os.environ)
    os.environ["APTHORY_ROOT"] = str(records.root().resolve())
    os.environ["APTHORY_PROGRESS"] = "terminal" if sys.stderr.isatty() else "log"
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # whatever this process draws with
    os.environ["PYTHONHASHSEED"] = "0"
    if fresh:
        os.environ["APTHORY_FRESH"] = str(time.time())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _content_only(outputs: Iterable[Any]) -> Iterator[Any]:
    """Outputs without stderr (it was forwarded) and widgets; what was printed in pieces becomes one."""
    last: Any = None
    for output in outputs:
        is_print = output.output_type == "stream" and output.name == "stdout"
        is_widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
        if is_widget or (output.output_type == "stream" and not is_print):
            continue
        if is_print and last is not None and last.output_type == "stream":
            last.text += output.text
            continue
        if last is not None:
            yield last
        last = output
    if last is not None:
        yield last
