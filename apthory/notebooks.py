"""Notebooks that argue claims, and the ledger of their verdicts.

The source of a notebook is text, notebooks/NN_name.py (jupytext, percent format). papermill executes it in a
process of its own; the executed twin is stored without clocks, random ids and progress bars, so that equal
results are equal bytes. Twins of the embedded suite lie beside their sources, others beside their figures.

A claim's statistic and threshold stand in claims.toml before anything runs; a notebook's last cell hands in
the value and its interval, and `verdict` applies the rule.
"""

import hashlib
import json
import os
import re
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from apthory import figures, records
from apthory.progress import progress
from apthory.statistics import Estimate

Judgement = Literal["supported", "refuted", "open", "not run"]


class NotebookError(RuntimeError):
    """A cell failed, with its traceback; or it took too long, or the kernel died."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row of the ledger: what is measured, and which side of which threshold the claim is on."""

    id: str  # "AP-5a.spearman"; the part before the dot is the claim, the rest one of its statistics
    claim: str
    paper: str  # the paper's own figure
    statistic: str
    threshold: str  # "< 0", "!= 0", "in [0.25, 0.75]"
    notebooks: tuple[str, ...]  # numbers of the notebooks that judge it
    models: tuple[str, ...] = ()  # if the claim is about these only: prefixes of backbone names

    def __post_init__(self) -> None:
        self.judge(0.0, 0.0)  # a threshold that cannot be read fails here

    def covers(self, backbones: Sequence[str]) -> bool:
        """Whether a value on these backbones bears on the claim."""
        named = [name for name in backbones if name.startswith(self.models)]
        return not self.models or (len(named) > 0 and len(named) == len(backbones))

    def judge(self, low: float, high: float) -> Judgement:
        """Supported if the whole interval lies on the claimed side, refuted if on the other, else open."""
        if inside := re.fullmatch(r"in \[(\S+), (\S+)\]", self.threshold):
            floor, ceiling = float(inside[1]), float(inside[2])
            holds, fails = floor <= low and high <= ceiling, high < floor or ceiling < low
        elif compared := re.fullmatch(r"(<|<=|>|>=|!=) (\S+)", self.threshold):
            bound = float(compared[2])
            holds, fails = {
                "<": (high < bound, low >= bound),
                "<=": (high <= bound, low > bound),
                ">": (low > bound, high <= bound),
                ">=": (low >= bound, high < bound),
                "!=": (high < bound or low > bound, low == high == bound),
            }[compared[1]]
        else:
            raise ValueError(f"{self.id}: cannot read the threshold {self.threshold!r}; write e.g. '< 0'")
        return "supported" if holds else "refuted" if fails else "open"


@dataclass(frozen=True, kw_only=True, repr=False)
class Verdict:
    """A judged claim with its scope; it says nothing about other backbones, tasks or suites."""

    id: str
    claim: str
    statistic: str
    threshold: str
    verdict: Judgement
    value: float
    low: float
    high: float
    suite: str
    backbones: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    records: tuple[str, ...]  # short names
    tag: str = ""  # tells verdicts on one claim apart, e.g. a backbone or a task
    note: str = ""

    def __repr__(self) -> str:
        return self._repr_markdown_().replace("**", "")

    def _repr_markdown_(self) -> str:
        tag = f" ({self.tag})" if self.tag else ""
        scope = [self.suite, ", ".join(self.backbones), ", ".join(self.tasks)]
        scope.append("seeds " + ", ".join(map(str, self.seeds)) if self.seeds else "")
        interval = f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"
        lines = [
            f"**{self.id}{tag}: {self.verdict}.** {self.claim}.",
            f"{self.statistic}: {interval}, claimed: {self.threshold}.",
            f"Scope: {'; '.join(part for part in scope if part)}.",
        ]
        return "  \n".join(lines + ([self.note] if self.note else []))


def claims() -> dict[str, Claim]:
    """Every claim with each of its statistics, by id, as fixed in claims.toml."""
    return {claim.id: claim for claim in _read_claims(Path(__file__).with_name("claims.toml"))}


def verdict(
    claim_id: str,
    value: float,
    interval: tuple[float, float] | None,
    *,
    suite: str,
    backbones: Sequence[str],
    tasks: Sequence[str],
    seeds: Sequence[int],
    made_from: Iterable[records.Record | str],
    tag: str = "",
    note: str = "",
) -> Verdict:
    """Judge a claim by its fixed rule and write figures/<suite>/ledger/<claim_id>[@<tag>].json.

    Args:
        claim_id: An id of claims.toml.
        value: The statistic.
        interval: Its 95 % interval; None for an exact quantity. Where two or three tasks agree to the last digit, an
            interval over them has no width and says nothing: then the verdict is `open`.
        suite: "embedded", "small" or "paper".
        backbones: All backbones behind the value; empty for a closed form.
        tasks: All tasks behind the value.
        seeds: All seeds behind the value.
        made_from: Records behind the value, or their keys.
        tag: Where one claim is judged several times: the backbone, task or metric.
        note: One sentence for the reader.
    """
    known = claims()
    if claim_id not in known:
        raise ValueError(f"no claim {claim_id!r}; there are {', '.join(known)}")
    if not re.fullmatch(r"[\w.-]*", tag):
        raise ValueError(f"tag {tag!r} becomes part of a file name; use letters, digits, '_', '.' and '-'")
    value, low, high = map(_rounded, (value, value, value) if interval is None else (value, *interval))
    if not (abs(low) < float("inf") and low <= value <= high < float("inf")):
        raise ValueError(f"{claim_id}: the value {value} must lie in a finite interval, not [{low}, {high}]")
    claim = known[claim_id]
    decides = interval is None or low < high or len(tasks) > 3
    judgement: Judgement = claim.judge(low, high) if decides else "open"
    result = Verdict(
        id=claim.id,
        claim=claim.claim,
        statistic=claim.statistic,
        threshold=claim.threshold,
        verdict=judgement if claim.covers(backbones) else "not run",
        value=value,
        low=low,
        high=high,
        suite=suite,
        backbones=tuple(backbones),
        tasks=tuple(tasks),
        seeds=tuple(int(seed) for seed in seeds),
        records=tuple(records.citation(made_from)),
        tag=tag,
        note=note,
    )
    name = f"{claim.id}@{tag}.json" if tag else f"{claim.id}.json"
    content = json.dumps(asdict(result), indent=1, ensure_ascii=False, allow_nan=False)
    records.write_atomically(records.suite_folder(suite) / "ledger" / name, (content + "\n").encode())
    return result


class Judge:
    """The verdicts of one notebook: call it once for each, show `table` at the end."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.verdicts: list[Verdict] = []
        self._are_exact: list[bool] = []

    def __call__(
        self,
        claim_id: str,
        value: Estimate | float,
        *,
        backbones: Sequence[str] = (),
        rows: Sequence[pd.DataFrame] = (),
        tasks: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        made_from: Iterable[records.Record | str] | None = None,
        tag: str = "",
        note: str = "",
    ) -> Verdict:
        """`verdict`, with the scope read off the tables that were compared where it is not given.

        Args:
            value: With its interval; a plain number is exact.
            rows: Tables behind the value, with columns task, seed and key: the scope is what they share of tasks and
                seeds, and the records are all of theirs.
        """

        def shared(column: str) -> list[Any]:
            return sorted(set.intersection(*(set(table[column]) for table in rows))) if rows else []

        if made_from is None:
            made_from = sorted({key for table in rows for key in table["key"]})
        result = verdict(
            claim_id,
            value.value if isinstance(value, Estimate) else float(value),
            value.interval if isinstance(value, Estimate) else None,
            suite=self.suite,
            backbones=backbones,
            tasks=shared("task") if tasks is None else tasks,
            seeds=shared("seed") if seeds is None else seeds,
            made_from=made_from,
            tag=tag,
            note=note,
        )
        self.verdicts.append(result)
        self._are_exact.append(not isinstance(value, Estimate))
        return result

    @property
    def table(self) -> pd.DataFrame:
        """One row for each verdict, in the order in which they were judged."""
        return pd.DataFrame(
            {
                "claim": one.id,
                "of": one.tag,
                "value": f"{one.value:.3g}",
                "interval": "exact" if is_exact else f"[{one.low:.3g}, {one.high:.3g}]",
                "rule": one.threshold,
                "verdict": one.verdict,
            }
            for one, is_exact in zip(self.verdicts, self._are_exact, strict=True)
        )


def ledger(root: Path | None = None) -> pd.DataFrame:
    """Every claim with its verdicts, one row each; a claim that was never judged is `not run`.

    A verdict on a statistic or threshold that claims.toml does not hold any more is `stale`.
    """
    known = claims()
    judged = [json.loads(path.read_text("utf-8")) for path in _verdict_files(root or records.root())]
    for row in judged:
        fixed = known.get(row["id"])
        if fixed is None or (row["statistic"], row["threshold"]) != (fixed.statistic, fixed.threshold):
            row["verdict"] = "stale"
    absent = known.keys() - {row["id"] for row in judged}
    rows = judged + [asdict(claim) | {"verdict": "not run"} for key, claim in known.items() if key in absent]
    columns = ["id", "tag", "claim", "statistic", "threshold", "verdict", "value", "low", "high"]
    columns += ["suite", "backbones", "tasks", "seeds", "records", "note"]
    order = {key: index for index, key in enumerate(known)}
    rows.sort(key=lambda row: (order.get(row["id"], len(order)), row.get("suite", ""), row.get("tag", "")))
    return pd.DataFrame(rows, columns=columns)


def sources(names: Sequence[str] = ()) -> list[Path]:
    """Text notebooks of the project, all or those named ("03" or "03_layer_preference")."""
    found = sorted((records.root() / "notebooks").glob("[0-9][0-9]_*.py"))
    chosen = []
    for name in names:
        matches = [path for path in found if Path(name).stem in (path.stem, path.stem[:2])]
        if not matches:
            there = ", ".join(path.stem for path in found) or "none"
            raise ValueError(f"no notebook {name!r} in {records.root() / 'notebooks'}; there are: {there}")
        chosen += matches
    return chosen if names else found


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
            records.write_atomically(twin, notebook.encode())
            written.append(twin)
            bar.update()
    return written


def execute(source: Path, parameters: Mapping[str, Any], *, timeout: int | None = None) -> str:
    """Run one text notebook; return the executed one as JSON text, stripped of all that is not content."""
    import nbformat  # these two take seconds to import, and every notebook imports this module
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


def problems() -> list[str]:
    """All that is stale in the project: notebooks, figures and verdicts; one sentence each.

    For suites other than the embedded one, only what was run is looked at.
    """
    root = records.root()
    found: list[str] = []
    for suite in records.SUITES:
        for source in sources():
            twin = twin_path(source, suite)
            if suite == "embedded" or twin.exists():
                found += filter(None, [stale(source, twin, suite)])
        for path in sorted(records.suite_folder(suite).glob("*.p[nd][gf]")):
            found += figures.problems(path)
        for record in records.load_all(records.folder(suite)):
            if reason := records.superseded(record):
                found.append(f"record {record.key[:12]}: {reason}")
    for path in _verdict_files(root):
        judged = json.loads(path.read_text("utf-8"))
        cited = figures.record_problems(judged["records"], judged["suite"])
        found += [f"{path}: {problem}" for problem in cited]
    table = ledger(root)
    for row in table[table.verdict == "stale"].itertuples():
        found.append(f"the verdict on {row.id} in {row.suite} was judged by another rule than claims.toml's")
    return found


def older_records() -> list[str]:
    """Records made by code that has changed since, one sentence each; their version says they still hold."""
    found = []
    for suite in records.SUITES:
        for record in records.load_all(records.folder(suite)):
            if modules := records.changed_code(record):
                found.append(f"record {record.key[:12]} ({record.name}): {', '.join(modules)} changed since")
    return found


def _rounded(value: float) -> float:
    """To 12 digits: the last ones differ from processor to processor, and equal results are to be equal bytes."""
    return float(f"{float(value):.12g}")


def _read_claims(path: Path) -> Iterator[Claim]:
    for key, row in tomllib.loads(path.read_text("utf-8")).items():
        shared = {"claim": row["claim"], "paper": row["paper"], "notebooks": tuple(row["notebooks"])}
        several = {name: part for name, part in row.items() if isinstance(part, dict)}
        statistics = several or {"": row}
        for name, part in statistics.items():
            yield Claim(
                id=f"{key}.{name}" if name else key,
                **shared,
                statistic=part["statistic"],
                threshold=part["threshold"],
                models=tuple(part.get("models", ())),
            )


def _verdict_files(root: Path) -> list[Path]:
    return sorted((root / "figures").glob("*/ledger/*.json"))


def _read_source(source: Path) -> Any:
    import jupytext

    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return notebook


def _check_parameters(source: Path, overrides: Mapping[str, Any]) -> None:
    """Unknown parameters are errors here; papermill itself only warns."""
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
