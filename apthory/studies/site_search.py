"""Scores of sites and searches among them, as records; and a picture of a ranking."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from apthory import selection, training
from apthory.lab import figures, records
from apthory.studies import cells, looks, record_format
from apthory.theory import tangent

SITE_SEARCH_SOURCES = (selection, tangent)  # their code decides the records, besides a cell's modules
UNITS = {  # units of the scores; a larger score is better
    "coherence": "coherence (share of the gradient that images share)",
    "windows": "minus the windows to cover",
    "gain": "first-order gain (nats, at the norm of the activation)",
    "newton": "second-order gain (nats), after three steps of conjugate gradients",
    "alignment": "alignment of the tangent kernel with the labels",
    "windows_times_gradient": "windows times gradient of single images",
}


@records.versioned(4, name="apthory.layers.score")
def score(
    backbone: Mapping[str, Any],
    task: str,
    size: int,
    places: Sequence[str],
    num_examples: int,
    num_second_order: int,
    num_validation: int,
    seed: int = 0,
) -> dict[str, Any]:
    """`selection.rank_sites`, in the order of the sites given, and what it cost."""
    model, data = cells.load_backbone_and_task(backbone, task, size)
    table = selection.rank_sites(
        model,
        data,
        places,
        num_examples=num_examples,
        num_second_order=num_second_order,
        num_validation=num_validation,
        seed=seed,
    )
    ordered = table.set_index("site").loc[list(places)].reset_index()
    return {"sites": ordered.to_dict("records"), "cost": table.attrs["cost"]}


@records.versioned(3, name="apthory.layers.search")
def search(
    backbone: Mapping[str, Any],
    task: str,
    size: int,
    places: Sequence[str],
    recipe: Mapping[str, Any],
    learning_rates: Sequence[float],
    budget: float,
    score: str,
    seed: int = 0,
) -> dict[str, Any]:
    """`selection.find_site` among the sites given, and the chosen prompt on the test part, once."""
    model, data = cells.load_backbone_and_task(backbone, task, size)
    result = selection.find_site(
        model,
        data,
        recipe=record_format.recipe_of(recipe),
        budget=budget,
        learning_rates=learning_rates,
        places=places,
        score=record_format.score_of(score),
        seed=seed,
    )
    evaluation = training.evaluate(result.fit, data)
    return {
        "site": result.site,
        "learning_rate": result.fit.configuration.learning_rate,
        "validation_accuracy": result.fit.validation_accuracy,
        "accuracy": evaluation.accuracy,
        "correct": evaluation.correct.int(),
        "flops": result.flops,
        "exhaustive_flops": result.exhaustive_flops,
        "trials": result.trials.to_dict("records"),
    }


def draw_ranking(table: pd.DataFrame, score: str, title: str, path: Path) -> None:
    """The score by site, in the order of the backbone, as a picture of any format that matplotlib knows."""
    score = selection.current_name(score)
    ordered = table.assign(score=selection.SCORES[score](table)).sort_values("depth", kind="stable")
    is_best = ordered["site"] == table["site"][0]
    with figures.theme(width=0.7, rows=2):
        figure = figures.Figure()
        ax = figure.subplots()
        colors = [looks.COLORS["ap" if best else "full"] for best in is_best]
        ax.barh(ordered["site"], ordered["score"], color=colors)
        ax.invert_yaxis()
        ax.axvline(0, color="black", lw=0.6)
        ax.set(title=title, xlabel=UNITS[score], ylabel="site, from the input to the output")
        figure.savefig(path)
