"""Claims with fixed statistic and threshold, and the ledger of their verdicts.

A claim's statistic and threshold stand in claims.toml before anything runs; a notebook's last cell hands in the value
and its interval, and `verdict` applies the rule.
"""

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from apthory._tools.estimate import Estimate
from apthory._tools.files import write_atomically
from apthory.lab import records

Judgement = Literal["supported", "refuted", "open", "not run"]


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
    write_atomically(records.suite_folder(suite) / "ledger" / name, (content + "\n").encode())
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
                "claim": verdict.id,
                "of": verdict.tag,
                "value": f"{verdict.value:.3g}",
                "interval": "exact" if is_exact else f"[{verdict.low:.3g}, {verdict.high:.3g}]",
                "rule": verdict.threshold,
                "verdict": verdict.verdict,
            }
            for verdict, is_exact in zip(self.verdicts, self._are_exact, strict=True)
        )


def ledger(root: Path | None = None) -> pd.DataFrame:
    """Every claim with its verdicts, one row each; a claim that was never judged is `not run`.

    A verdict on a statistic or threshold that claims.toml does not hold any more is `stale`.
    """
    known = claims()
    judged = [json.loads(path.read_text("utf-8")) for path in verdict_files(root or records.root())]
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


def _rounded(value: float) -> float:
    """To 12 digits: the last ones differ from processor to processor, and equal results are to be equal bytes."""
    return float(f"{float(value):.12g}")


def _read_claims(path: Path) -> Iterator[Claim]:
    for key, row in tomllib.loads(path.read_text("utf-8")).items():
        shared = {"claim": row["claim"], "paper": row["paper"], "notebooks": tuple(row["notebooks"])}
        parts = {name: part for name, part in row.items() if isinstance(part, dict)}
        statistics = parts or {"": row}
        for name, part in statistics.items():
            yield Claim(
                id=f"{key}.{name}" if name else key,
                **shared,
                statistic=part["statistic"],
                threshold=part["threshold"],
                models=tuple(part.get("models", ())),
            )


def verdict_files(root: Path) -> list[Path]:
    """The files of all verdicts of a project."""
    return sorted((root / "figures").glob("*/ledger/*.json"))
