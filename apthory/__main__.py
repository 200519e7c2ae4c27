"""The command `apthory`: run the notebooks, check what they left, cite."""

import ast
import importlib
import os
import random
from collections import Counter
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class _Commands(TyperGroup):
    """Commands whose errors are one line, unless the traceback is asked for."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, MemoryError, FloatingPointError) as error:
            if ctx.params["debug"] or isinstance(error, BrokenPipeError):  # `apthory check | head`
                raise
            typer.echo(f"Error: {' '.join(str(error).split()) or type(error).__name__}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback(help=__doc__)
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="APTHORY_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None: ...


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help="Notebooks, e.g. 03; else all.")] = None,
    suite: Annotated[str, typer.Option(help="embedded, small or paper.")] = "embedded",
    data: Annotated[Path | None, typer.Option(help="Folder of real images (else APTHORY_DATA).")] = None,
    fresh: Annotated[bool, typer.Option(help="Compute anew instead of reading records.")] = False,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="Set a parameter.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the executed notebooks.")] = None,
    timeout: Annotated[int | None, typer.Option(help="Seconds after which a cell is stopped.")] = None,
) -> None:
    """Execute notebooks; records make an interrupted run resume."""
    from apthory import notebooks

    if data is not None:
        if not data.is_dir():
            raise typer.BadParameter(f"there is no folder {data}", param_hint="--data")
        os.environ["APTHORY_DATA"] = str(data.resolve())
    parameters = dict(_parse_parameter(text) for text in parameter or [])
    try:
        for twin in notebooks.run(
            names or [], suite, output=output, parameters=parameters, fresh=fresh, timeout=timeout
        ):
            typer.echo(twin)
    except notebooks.NotebookError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Claims (AP-1, AP-5a.thirds) or figures; else all.")] = None,
    recompute: Annotated[bool, typer.Option(help="Compute one random record again and compare.")] = False,
) -> None:
    """Print the ledger of claims and all that is stale; exit with 1 if anything is.

    A claim is printed with what it says, how it is measured, and its verdicts; a figure with what it was made from.
    """
    from apthory import notebooks, records

    if not any((records.root() / name).is_dir() for name in ("notebooks", "figures")):
        raise FileNotFoundError(
            f"no notebooks and figures in {records.root()}; call this from the repository or set APTHORY_ROOT"
        )
    found = []
    if names:
        table = notebooks.ledger()
        for name in names:
            rows = table[(table["id"] == name) | table["id"].str.startswith(f"{name}.")]
            if len(rows):
                _print_claim(rows)
            elif Path(name).is_file():
                found += _check_figure(Path(name))
            else:
                near = get_close_matches(name, {*table["id"], *table["id"].str.partition(".")[0]}, cutoff=0.3)
                raise ValueError(f"no claim and no file {name!r}; claims like it: {', '.join(sorted(near)) or 'none'}")
    else:
        _print_ledger(notebooks.ledger())
        found += notebooks.problems()
        if older := notebooks.older_records():
            typer.echo(f"\n{len(older)} records were made by older code (kept: their version holds):")
            typer.echo("\n".join(f"  {line}" for line in older[:10] + ["..."] * (len(older) > 10)))
    if recompute:
        found += _recompute_one()
    if found:
        typer.echo("\n".join(["", "stale:", *(f"  {line}" for line in found)]))
    elif not names or recompute or any(Path(name).is_file() for name in names):
        typer.echo("\nresults current")
    if found:
        raise typer.Exit(1)


@app.command()
def tasks(
    names: Annotated[list[str] | None, typer.Argument(help="Tasks; else the embedded ones.")] = None,
    size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 64,
    data: Annotated[Path | None, typer.Option(help="Folder of real images (else APTHORY_DATA).")] = None,
) -> None:
    """List tasks with their classes, images and digest."""
    from apthory import tasks

    for name in names or tasks.EMBEDDED:
        task = tasks.load(name, size, data)
        counts = f"{len(task.train.labels)} train and {len(task.test.labels)} test images"
        typer.echo(f"{name}: {len(task.classes)} classes, {counts}, digest {task.digest[:12]}")


@app.command()
def cite() -> None:
    """Print BibTeX for apthory and the papers that it studies."""
    import yaml

    from apthory import records

    path = records.root() / "CITATION.cff"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; call this from the repository or set APTHORY_ROOT")
    software = yaml.safe_load(path.read_text("utf-8"))
    typer.echo("\n\n".join(map(_bibtex, [software, *software.get("references", ())])))


def _later(name: str, module: str, summary: str) -> None:
    """Register apthory.<module>.command without importing it: torch and timm take seconds."""

    @app.command(name, help=summary, add_help_option=False, context_settings={"ignore_unknown_options": True})
    def forward(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
        inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        inner.command(help=summary)(importlib.import_module(f"apthory.{module}").command)
        inner(arguments or [], prog_name=f"apthory {name}")


_later("pretrain", "pretraining", "Train a backbone; resumes where it was interrupted.")
_later("ship", "pretraining.cards", "Put pretrained weights into the package, each with its model card.")
_later("sweep", "studies", "Run studies by name: prompts at every site, prompts on pixels; resumes.")
_later("layers", "layers", "Rank the layers of a backbone on a task by one backward pass, and name the one to prompt.")
_later("bench", "bench", "Measure training speed against the bounds, side by side.")
_later("bench-pixels", "pixel_bench", "Time prompts on pixels beside bare passes, and a label mapping beside a run.")
_later("bench-metrics", "metric_bench", "Race CKA and attention distance against the usual tools, side by side.")


def _parse_parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="-p")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _print_ledger(table: Any) -> None:
    for row in table.to_dict("records"):
        is_judged = isinstance(row["suite"], str)
        name = f"{row['id']}@{row['tag']}" if is_judged and row["tag"] else row["id"]
        line = f"{name:<32} {row['verdict']:<10} {row['threshold']:<18}"
        if is_judged:
            scope = [row["suite"], *(", ".join(row[part]) for part in ("backbones", "tasks") if row[part])]
            seeds = [f"{len(row['seeds'])} seeds"] if row["seeds"] else []
            interval = f"{row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
            line += f" {interval:<24} {'; '.join(scope + seeds)}"
        typer.echo(line.rstrip())


def _print_claim(rows: Any) -> None:
    """Its statistics one by one, each with its verdicts."""
    typer.echo(f"{rows['id'].iloc[0].partition('.')[0]}: {rows['claim'].iloc[0]}.")
    for (key, statistic), several in rows.groupby(["id", "statistic"], sort=False):
        typer.echo(f"\n{key}: {statistic}, claimed {several['threshold'].iloc[0]}")
        for place, note in enumerate(several["note"].astype(object).fillna("")):
            _print_ledger(several.iloc[[place]])
            typer.echo(f"  {note}\n" if note else "", nl=False)


def _check_figure(path: Path) -> list[str]:
    from apthory import figures

    try:
        typer.echo(_describe(figures.provenance(path)))
    except (OSError, ValueError) as error:
        return [str(error)]
    return figures.problems(path)


def _describe(note: dict[str, Any]) -> str:
    from apthory import records

    keys = note["records"]
    kinds = Counter(r.name for r in records.load_all(records.folder(note["suite"])) if r.key[:12] in set(keys))
    head = [f"{note['figure']} ({note['suite']} suite)", f"  numbers: SHA-256 {note['csv_sha256']}"]
    made = [f"  {count} records of {name}" for name, count in kinds.most_common()]
    return "\n".join([*head, *made, *(f"  {' '.join(keys[i : i + 8])}" for i in range(0, len(keys), 8))])


def _recompute_one() -> list[str]:
    from apthory import records

    kept = [record for suite in records.SUITES for record in records.load_all(records.folder(suite))]
    kept = [record for record in kept if not records.superseded(record)]
    if not kept:
        return ["there is no record to compute again"]
    record = random.SystemRandom().choice(kept)
    typer.echo(f"\ncomputing record {record.key[:12]} again: {record.name}, took {record.wall_seconds:.1f} s")
    return [f"record {record.key[:12]}: {difference}" for difference in records.recompute(record)]


def _bibtex(work: dict[str, Any]) -> str:
    """A work of CITATION.cff, the software itself or one of its references, as a BibTeX entry."""
    names = [[person.get("family-names"), person.get("given-names")] for person in work["authors"]]
    authors = [
        f"{{{person['name']}}}" if "name" in person else ", ".join(filter(None, name))
        for person, name in zip(work["authors"], names, strict=True)
    ]
    year = str(work.get("year") or work.get("date-released", ""))[:4]
    identifiers = [identifier["value"] for identifier in work.get("identifiers", ())]
    entries = {
        "title": f"{{{work['title']}}}",
        "author": " and ".join(authors),
        "year": year,
        "version": work.get("version"),
        "url": work.get("repository-code") or work.get("url"),
        "note": ", ".join([*identifiers, *filter(None, [work.get("notes")])]),
    }
    is_software = "cff-version" in work
    key = work["title"] if is_software else f"{names[0][0]}{year}".lower()
    lines = [f"  {name:<7} = {{{value}}}" for name, value in entries.items() if value]
    return f"@{'software' if is_software else 'misc'}{{{key},\n" + ",\n".join(lines) + "\n}"


def main() -> None:
    """Run the command."""
    app(prog_name="apthory")


if __name__ == "__main__":
    main()
