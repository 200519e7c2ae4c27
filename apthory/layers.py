"""Which layer to prompt, as records for studies and as a command for a model and images of one's own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from apthory import backbones, figures, ranking, records, selection, sweeps, tasks, training
from apthory.theory import tangent

SOURCES = (ranking, selection, tangent)  # of the records, besides those of a sweep
UNITS = {  # of the scores, larger being better
    "coherence": "coherence (share of the gradient that images share)",
    "windows": "minus the windows to cover",
    "gain": "first-order gain (nats, at the norm of the activation)",
    "newton": "second-order gain (nats), after three steps of conjugate gradients",
    "alignment": "alignment of the tangent kernel with the labels",
    "found": "windows times gradient of single images",
}


@records.versioned(3, name="apthory.layers.score")
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
    """`ranking.rank_sites`, in the order of the sites given, and what it cost."""
    model, data = sweeps.load(backbone, task, size)
    table = ranking.rank_sites(
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


@records.versioned(2, name="apthory.layers.search")
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
    model, data = sweeps.load(backbone, task, size)
    found = selection.find_site(
        model,
        data,
        recipe=training.Recipe(**recipe),
        budget=budget,
        learning_rates=learning_rates,
        places=places,
        score=score,
        seed=seed,
    )
    (evaluation,) = training.evaluate(data, [found.fit])
    return {
        "site": found.site,
        "learning_rate": found.fit.configuration.learning_rate,
        "validation_accuracy": found.fit.validation_accuracy,
        "accuracy": evaluation.accuracy,
        "correct": evaluation.correct.int(),
        "flops": found.flops,
        "exhaustive_flops": found.exhaustive_flops,
        "trials": found.trials.to_dict("records"),
    }


def command(
    backbone: Annotated[str, typer.Option(help="vit_micro, resnet_micro, or any name that timm knows")],
    data: Annotated[str, typer.Option(help="folder with train/<class>/* and test/<class>/*, or <class>/*")] = "",
    task: Annotated[str, typer.Option(help="instead of a folder: a task's name, such as textures")] = "",
    weights: Annotated[str, typer.Option(help="safetensors file; else shipped or timm's own")] = "",
    size: Annotated[int, typer.Option(help="side of the images in pixels; the backbone's own if left out")] = 0,
    examples: Annotated[int, typer.Option(help="images to score with, at most 1,000")] = 400,
    second_order: Annotated[int, typer.Option(help="images for the slow scores, at most 200; 0 skips them")] = 0,
    score: Annotated[str, typer.Option(help=f"rank by {', '.join(ranking.SCORES)}")] = ranking.DEFAULT,
    output: Annotated[str, typer.Option(help="picture of the ranking; layers_<backbone>.png if left out")] = "",
) -> None:
    """Rank the layers of a backbone on a task by one backward pass, and name the one to prompt."""
    data = data.removeprefix("folder:")  # as `tasks.load` wants it
    if bool(data) == bool(task):
        raise typer.BadParameter("name either a folder of images (--data) or a task (--task)")
    if data and not Path(data).is_dir():
        raise typer.BadParameter(f"there is no folder {data!r}", param_hint="--data")
    if score in ranking.SECOND_ORDER and not second_order:
        raise typer.BadParameter(f"{score} wants images of its own, such as --second-order 40", param_hint="--score")
    model = backbones.load(backbone, weights=weights or None, input_size=size or None)
    images = tasks.load(f"folder:{data}" if data else task, backbones.input_size(model))
    table = ranking.rank_sites(
        model,
        images,
        score=score,
        num_examples=examples,
        num_second_order=second_order,
        num_validation=0,  # nothing is trained, so nothing has to be held out
    )
    table.insert(1, "score", ranking.SCORES[score](table))
    shown = table.drop(columns="depth").set_index(pd.RangeIndex(1, len(table) + 1, name="rank"))
    typer.echo(f"by the score {score!r}: {UNITS[score]}")
    typer.echo(shown.to_string(float_format=lambda value: f"{value:.3g}"))
    for order, cost in table.attrs["cost"].items():
        typer.echo(
            f"{order}: {cost['examples']} images, {cost['flops'] / 1e9:.0f} GFLOP, {cost['seconds']:.1f} seconds"
        )
    path = Path(output or f"layers_{backbone.replace('/', '_')}.png")
    draw(table, score, f"{backbone} on {images.name}", path)
    typer.echo(f"drawn in {path}")
    typer.echo(f"prompt {table['site'][0]}")


def draw(table: pd.DataFrame, score: str, title: str, path: Path) -> None:
    """The score by site, in the order of the backbone, as a picture of any format that matplotlib knows."""
    ordered = table.assign(score=ranking.SCORES[score](table)).sort_values("depth", kind="stable")
    is_best = ordered["site"] == table["site"][0]
    with figures.theme(width=0.7, rows=2):
        figure = figures.Figure()
        ax = figure.subplots()
        colors = [figures.COLORS["ap" if best else "full"] for best in is_best]
        ax.barh(ordered["site"], ordered["score"], color=colors)
        ax.invert_yaxis()
        ax.axvline(0, color="black", lw=0.6)
        ax.set(title=title, xlabel=UNITS[score], ylabel="site, from the input to the output")
        figure.savefig(path)
