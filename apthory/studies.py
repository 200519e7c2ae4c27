"""The studies of all suites by name, and the command that runs them."""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Annotated

import typer

from apthory import pixel_study, pixel_suites, records, stage_study, sweeps

Study = sweeps.Study | pixel_study.Study


def known() -> dict[str, Mapping[str, Study]]:
    """All studies, by suite and name."""
    several = (sweeps.STUDIES, stage_study.STUDIES, pixel_suites.STUDIES)
    return {suite: {name: one for by in several for name, one in by.get(suite, {}).items()} for suite in records.SUITES}


def command(
    study: Annotated[str, typer.Argument(help="names of studies, with commas between")] = "S",
    suite: Annotated[str, typer.Option(help="embedded, small or paper")] = "small",
    data: Annotated[str, typer.Option(help="folder of the tasks; APTHORY_DATA if left out")] = "",
    weights: Annotated[str, typer.Option(help="folder of weight files; APTHORY_WEIGHTS if left out")] = "",
    workers: Annotated[int, typer.Option(min=1, help="processes of one thread each; 1 uses this process")] = 1,
) -> None:
    """Run studies by name; finished cells are kept, so it can be stopped and started again."""
    try:
        chosen = sweeps.find_studies(suite, study, known())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if data:
        os.environ["APTHORY_DATA"] = data
    if weights:
        os.environ["APTHORY_WEIGHTS"] = weights
    with sweeps.processes(workers) if workers > 1 else nullcontext() as pool:
        for one in chosen.values():
            run = sweeps.run_study if isinstance(one, sweeps.Study) else pixel_study.run_study
            result = run(one, records.folder(suite), pool)
            named = [column for column in ("part", "backbone", "method", "arm", "site") if column in result]
            typer.echo(result.groupby(named, sort=False)["accuracy"].mean().round(1).to_string())
