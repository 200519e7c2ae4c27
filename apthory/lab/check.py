"""What `apthory check` looks at: all that is stale in a project, and a record to compute again."""

import json
import random

from apthory.lab import claims, figures, notebooks, records


def problems() -> list[str]:
    """All that is stale in the project: notebooks, figures and verdicts; one sentence each.

    For suites other than the embedded one, only what was run is looked at.
    """
    root = records.root()
    stale: list[str] = []
    for suite in records.SUITES:
        for source in notebooks.sources():
            twin = notebooks.twin_path(source, suite)
            if suite == "embedded" or twin.exists():
                stale += filter(None, [notebooks.stale(source, twin, suite)])
        for path in sorted(records.suite_folder(suite).glob("*.p[nd][gf]")):
            stale += figures.figure_problems(path)
        for record in records.load_all(records.folder(suite)):
            if reason := records.superseded(record):
                stale.append(f"record {record.key[:12]}: {reason}")
    for path in claims.verdict_files(root):
        judged = json.loads(path.read_text("utf-8"))
        cited = figures.record_problems(judged["records"], judged["suite"])
        stale += [f"{path}: {problem}" for problem in cited]
    table = claims.ledger(root)
    for row in table[table.verdict == "stale"].itertuples():
        stale.append(f"the verdict on {row.id} in {row.suite} was judged by another rule than claims.toml's")
    return stale


def older_records() -> list[str]:
    """Records made by code that has changed since, one sentence each; their version says they still hold.

    Those whose modules are elsewhere now are one sentence together: whether these changed as well, no name tells.
    """
    sentences, num_gone, gone = [], 0, set[str]()
    for suite in records.SUITES:
        for record in records.load_all(records.folder(suite)):
            if modules := records.changed_code(record):
                sentences.append(f"record {record.key[:12]} ({record.name}): {', '.join(modules)} changed since")
            elif modules := records.gone_code(record):
                num_gone, gone = num_gone + 1, gone | {*modules}
    if num_gone:
        sentences.append(f"{num_gone} records of modules that are elsewhere now: {', '.join(sorted(gone))}")
    return sentences


def random_record() -> records.Record | None:
    """A record that still holds, drawn at random; None if there is none."""
    kept = [record for suite in records.SUITES for record in records.load_all(records.folder(suite))]
    kept = [record for record in kept if not records.superseded(record)]
    return random.SystemRandom().choice(kept) if kept else None
