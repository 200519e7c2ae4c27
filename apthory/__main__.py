"""The command `apthory`: every command's arguments and what it prints; the work is done elsewhere."""

import ast
import os
import shlex
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from apthory._tools.extras import MissingExtraError


class _Commands(TyperGroup):
    """Commands whose errors are one line, unless the traceback is asked for."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, MemoryError, FloatingPointError, MissingExtraError) as error:
            if ctx.params["debug"] or isinstance(error, BrokenPipeError):  # `apthory check | head`
                raise
            typer.echo(f"Error: {' '.join(str(error).split()) or type(error).__name__}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback(help="Prompt a model of your own and use it; run notebooks and studies, and check what they left.")
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
    from apthory.lab import notebooks

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
    from apthory.lab import check as stale
    from apthory.lab import claims, records

    if not any((records.root() / name).is_dir() for name in ("notebooks", "figures")):
        raise FileNotFoundError(
            f"no notebooks and figures in {records.root()}; call this from the repository or set APTHORY_ROOT"
        )
    faults = []
    if names:
        table = claims.ledger()
        for name in names:
            rows = table[(table["id"] == name) | table["id"].str.startswith(f"{name}.")]
            if len(rows):
                _print_claim(rows)
            elif Path(name).is_file():
                faults += _check_figure(Path(name))
            else:
                near = get_close_matches(name, {*table["id"], *table["id"].str.partition(".")[0]}, cutoff=0.3)
                raise ValueError(f"no claim and no file {name!r}; claims like it: {', '.join(sorted(near)) or 'none'}")
    else:
        _print_ledger(claims.ledger())
        faults += stale.problems()
        if older := stale.older_records():
            typer.echo(f"\n{len(older)} records were made by older code (kept: their version holds):")
            typer.echo("\n".join(f"  {line}" for line in older[:10] + ["..."] * (len(older) > 10)))
    if recompute:
        if record := stale.random_record():
            typer.echo(f"\ncomputing record {record.key[:12]} again: {record.name}, took {record.wall_seconds:.1f} s")
            faults += [f"record {record.key[:12]}: {difference}" for difference in records.recompute(record)]
        else:
            faults.append("there is no record to compute again")
    if faults:
        typer.echo("\n".join(["", "stale:", *(f"  {line}" for line in faults)]))
    elif not names or recompute or any(Path(name).is_file() for name in names):
        typer.echo("\nresults current")
    if faults:
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
    from apthory.lab import citation

    typer.echo(citation.bibtex())


@app.command()
def sweep(
    study: Annotated[str, typer.Argument(help="Names of studies, with commas between.")] = "S",
    suite: Annotated[str, typer.Option(help="embedded, small or paper.")] = "small",
    data: Annotated[str, typer.Option(help="Folder of the tasks (else APTHORY_DATA).")] = "",
    weights: Annotated[str, typer.Option(help="Folder of weight files (else APTHORY_WEIGHTS).")] = "",
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each; 1 uses this process.")] = 1,
) -> None:
    """Run studies by name; finished cells are kept, so it can be stopped and started again."""
    from apthory.lab import records
    from apthory.studies import catalogue, cells, layers

    known = catalogue.known()
    try:
        chosen = layers.find_studies(suite, study, known)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if data:
        os.environ["APTHORY_DATA"] = data
    if weights:
        os.environ["APTHORY_WEIGHTS"] = weights
    with cells.processes(workers) if workers > 1 else nullcontext() as pool:
        for chosen_study in chosen.values():
            result = catalogue.run_study(chosen_study, records.folder(suite), pool)
            named = [column for column in ("part", "backbone", "method", "arm", "site") if column in result]
            typer.echo(result.groupby(named, sort=False)["accuracy"].mean().round(1).to_string())


@app.command()
def layers(
    backbone: Annotated[str, typer.Option(help="vit_micro, resnet_micro, or any name that timm knows.")],
    data: Annotated[str, typer.Option(help="Folder with train/<class>/* and test/<class>/*, or <class>/*.")] = "",
    task: Annotated[str, typer.Option(help="Instead of a folder: a task's name, such as textures.")] = "",
    weights: Annotated[str, typer.Option(help="Safetensors file; else shipped or timm's own.")] = "",
    size: Annotated[int, typer.Option(help="Side of the images in pixels; the backbone's own if left out.")] = 0,
    examples: Annotated[int, typer.Option(help="Images to score with, at most 1,000.")] = 400,
    second_order: Annotated[int, typer.Option(help="Images for the slow scores, at most 200; 0 skips them.")] = 0,
    score: Annotated[
        str, typer.Option(help="Rank by coherence, windows, gain, newton, alignment or windows_times_gradient.")
    ] = "windows_times_gradient",
    output: Annotated[str, typer.Option(help="Picture of the ranking; layers_<backbone>.png if left out.")] = "",
) -> None:
    """Rank the layers of a backbone on a task by one backward pass, and name the one to prompt."""
    name = _task_name(data, task)
    import pandas as pd

    from apthory import backbones, selection, tasks
    from apthory.studies import site_search

    score = selection.current_name(score)
    if score in selection.SECOND_ORDER and not second_order:
        raise typer.BadParameter(f"{score} wants images of its own, such as --second-order 40", param_hint="--score")
    model = backbones.load(backbone, weights=weights or None, input_size=size or None)
    images = tasks.load(name, backbones.input_size(model))
    table = selection.rank_sites(
        model,
        images,
        score=score,
        num_examples=examples,
        num_second_order=second_order,
        num_validation=0,  # nothing is trained, so nothing has to be held out
    )
    table.insert(1, "score", selection.SCORES[score](table))
    shown = table.drop(columns="depth").set_index(pd.RangeIndex(1, len(table) + 1, name="rank"))
    typer.echo(f"by the score {score!r}: {site_search.UNITS[score]}")
    typer.echo(shown.to_string(float_format=lambda value: f"{value:.3g}"))
    for order, cost in table.attrs["cost"].items():
        typer.echo(
            f"{order}: {cost['examples']} images, {cost['flops'] / 1e9:.0f} GFLOP, {cost['seconds']:.1f} seconds"
        )
    path = Path(output or f"layers_{backbone.replace('/', '_')}.png")
    site_search.draw_ranking(table, score, f"{backbone} on {images.name}", path)
    typer.echo(f"drawn in {path}")
    typer.echo(f"prompt {table['site'][0]}")


@app.command()
def fit(
    backbone: Annotated[str, typer.Option(help="vit_micro, resnet_micro, or any name that timm knows.")],
    output: Annotated[Path, typer.Option(help="File to write, *.safetensors.")],
    data: Annotated[str, typer.Option(help="Folder with train/<class>/* and test/<class>/*, or <class>/*.")] = "",
    task: Annotated[str, typer.Option(help="Instead of a folder: a task's name, such as textures.")] = "",
    site: Annotated[str, typer.Option(help="Where to prompt, such as blocks.2:input; see `apthory layers`.")] = "",
    method: Annotated[str, typer.Option(help="ap (activation prompt), norm, linear_probe, vp, evp, ...")] = "ap",
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A field of the method, such as shape=channel.")
    ] = None,
    weights: Annotated[str, typer.Option(help="Safetensors file of the backbone; else shipped or timm's own.")] = "",
    size: Annotated[int, typer.Option(help="Side of the images in pixels; the backbone's own if left out.")] = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images of a step.")] = 32,
    learning_rate: Annotated[
        list[float] | None, typer.Option(help="0.01 if left out; of several, validation chooses one.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the initial head and the order of images.")] = 0,
    num_train: Annotated[int | None, typer.Option(help="Training images at most; all if left out.")] = None,
    num_validation: Annotated[
        int | None,
        typer.Option(help="Training images held out to choose epoch and rate; a fifth, at most 100, if left out."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it is there.")] = False,
) -> None:
    """Train a prompt, or another method, on your images; then test it once, on all test images."""
    name = _task_name(data, task)
    from apthory import backbones, methods, sites, tasks, training
    from apthory._tools.files import check_output

    check_output(output, ".safetensors", overwrite=force)
    options = dict(_parse_parameter(text, "--option") for text in option or []) | ({"site": site} if site else {})
    lacks_site = "site" in methods.registry.needed(methods.registry.find_method(method)) and "site" not in options
    chosen = None if lacks_site else methods.registry.make(method, options)
    recipe = training.Recipe(
        num_epochs=epochs,
        batch_size=batch_size,
        num_train=num_train,
        num_validation=training.Recipe.num_validation if num_validation is None else num_validation,
        num_test=None,
    )
    rates = sorted(set(learning_rate or [training.Configuration.learning_rate]))
    for rate in rates:
        training.Configuration(learning_rate=rate, seed=seed)  # raises now if it would later
    model = backbones.load_sized(backbone, size or None, weights=weights or None)
    if chosen is None:
        raise ValueError(
            f"the method {method!r} needs a site: give --site, one of {', '.join(sites.list_sites(model))}; "
            f"`apthory layers --backbone {backbone} {f'--data {data}' if data else f'--task {task}'}` ranks them"
        )
    num_parameters = chosen.num_parameters(model)  # meets a site that is not there before any image is read
    images = tasks.load(name, backbones.input_size(model))
    if num_validation is None:
        recipe = replace(recipe, num_validation=max(1, min(100, len(images.train) // 5)))
    split = images.split(seed, recipe.num_train, recipe.num_validation, recipe.num_test)
    typer.echo(
        f"{images.name}: {len(images.classes)} classes; {len(split.train)} images to train on, "
        f"{len(split.validation)} held out for validation, {len(split.test)} to test"
    )
    typer.echo(f"{method} at {chosen.site} of {backbone}: {num_parameters:,} trained values beside the head")
    with _plain_warnings():
        [best] = training.tune(model, images, chosen, learning_rates=rates, seeds=[seed], recipe=recipe)
    path = best.save(output)
    typer.echo(
        f"validation accuracy {best.validation_accuracy:.1f} %, by epoch {best.epoch} of {epochs} at learning rate "
        f"{best.configuration.learning_rate:g}"
    )
    typer.echo(f"saved in {path} ({path.stat().st_size / 1000:,.0f} kB: all but the backbone)")
    _print_evaluation(training.evaluate(best, images), images)
    typer.echo("next, for images without labels:")
    typer.echo(f"  apthory predict --prompt {shlex.quote(str(path))} --images FOLDER")


@app.command()
def predict(
    prompt: Annotated[Path, typer.Option(help="File that `apthory fit` or Fit.save wrote.")],
    images: Annotated[Path, typer.Option(help="Folder of images, at any depth; or one image.")],
    output: Annotated[Path | None, typer.Option(help="File to write, *.csv; else the table is printed.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images that the model is given at once.")] = 64,
    backbone: Annotated[str, typer.Option(help="Name of the backbone, where the file does not say it.")] = "",
    weights: Annotated[str, typer.Option(help="Its weights, if they lie elsewhere now.")] = "",
    size: Annotated[int, typer.Option(help="Side of its images in pixels, where the file does not say it.")] = 0,
) -> None:
    """Name the class of each image of a folder: a table of file, class and probability."""
    from apthory import training
    from apthory._tools.files import check_output, write_atomically
    from apthory.methods import files

    if output is not None:
        check_output(output, ".csv")
    own = files.backbone_of_file(prompt, name=backbone or None, weights=weights or None, size=size or None)
    with _plain_warnings(is_silent=True):  # what cannot be read is said below
        table = training.predict(files.load_prompt(prompt, own), images, batch_size=batch_size)
    content = table.to_csv(index=False, float_format="%.6f").encode("utf-8", "surrogateescape")
    if output is None:
        typer.echo(content, nl=False)
    else:
        write_atomically(output, content)
        typer.echo(f"{len(table)} images, in {output}")
    if unreadable := table.attrs["unreadable"]:
        for file, reason in unreadable:
            typer.echo(f"cannot be read: {file} ({reason})", err=True)
        typer.echo(f"{len(unreadable)} of {len(table) + len(unreadable)} images cannot be read", err=True)


@app.command()
def pretrain(
    backbone: Annotated[str, typer.Argument(help="vit_micro, resnet_micro or any timm name.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; the same call resumes it.")],
    task: Annotated[str, typer.Option(help="What to learn.")] = "tiny_imagenet",
    data: Annotated[Path | None, typer.Option(help="Folder that holds the task.")] = None,
    size: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = 64,
    num_classes: Annotated[int | None, typer.Option(help="Only the first classes.")] = None,
    num_validation: Annotated[int, typer.Option(help="Training images held out.")] = 2000,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Images of a step.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, at its peak.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW, on matrices and kernels alone.")] = 0.05,
    warmup_epochs: Annotated[float, typer.Option(help="Epochs before the cosine.")] = 5.0,
    max_gradient_norm: Annotated[float, typer.Option(help="Longer ones are shortened.")] = 1.0,
    label_smoothing: Annotated[float, typer.Option(help="Of the labels; 0 is off.")] = 0.1,
    padding: Annotated[int, typer.Option(help="Reflected pixels around the random crop.")] = 6,
    randaugment: Annotated[int | None, typer.Option(help="Magnitude, 0 to 30; else off.")] = None,
    mixup: Annotated[float, typer.Option(help="Alpha of the Beta distribution; 0 is off.")] = 0.0,
    ema_decay: Annotated[float, typer.Option(help="Of the exported moving average.")] = 0.9995,
    seed: Annotated[int, typer.Option(help="Of weights, held-out images and order.")] = 0,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    after: Annotated[Path | None, typer.Option(help="Checkpoint of another run to begin with.")] = None,
    keep: Annotated[list[int] | None, typer.Option(help="Epoch to export at the end as well; 0: the start.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop between epochs before this.")] = None,
    note: Annotated[str, typer.Option(help="For the model card, for instance a licence.")] = "",
) -> None:
    """Train a backbone; a killed run goes on, to the bit, by the same call."""
    given = dict(locals())
    from apthory import pretraining

    config = pretraining.Config(**{field.name: given[field.name] for field in fields(pretraining.Config)})
    try:
        path = pretraining.pretrain(config, output, after=after, keep=keep or (), minutes=minutes, note=note)
    except KeyboardInterrupt as interrupt:
        typer.echo(interrupt, err=True)
        raise typer.Exit(130) from None
    typer.echo(path if path.suffix == ".safetensors" else f"{path}: out of time, the same call goes on")


@app.command()
def ship(
    files: Annotated[list[Path], typer.Argument(help="NAME.safetensors, NAME.epoch-0008.safetensors, ...")],
) -> None:
    """Put exported weights into the package, with their cards, in place of those that it has of these backbones."""
    from apthory.pretraining import cards

    for path in cards.ship(files):
        card = cards.read_card(path)
        typer.echo(f"{path.name}: top-1 {card['test']['top1']:.2%} on {card['test']['images']:,} test images")


@app.command()
def bench(
    suite: Annotated[str, typer.Option(help="Where the records go.")] = "small",
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each training.")] = 10,
    only: Annotated[str, typer.Option(help="One of the backbones; all of them if left out.")] = "",
) -> None:
    """Race the cached sweep against a frozen loop and the customary one, on three backbones at 64 pixels."""
    from apthory.benchmarks import prefix_cache

    for record in prefix_cache.run_prefix_cache(suite, epochs, only):
        typer.echo(record["device"])
        typer.echo(prefix_cache.summarize_prefix_cache(record).round(2).to_string())


@app.command()
def bench_pixels(
    suite: Annotated[str, typer.Option(help="Where the records go.")] = "small",
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the run that a mapping is held against.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each piece of work.")] = 3,
) -> None:
    """Time steps of VP, EVP and AdaViPro beside bare passes; a label mapping and CLIP's text features beside a run."""
    from apthory.benchmarks import pixels

    for record in pixels.run_pixels(suite, epochs, repeats):
        typer.echo(record["device"])
        typer.echo(pixels.summarize_pixels(record).round(3).to_string())


@app.command()
def bench_metrics(
    suite: Annotated[str, typer.Option(help="Where the record goes.")] = "small",
    images: Annotated[int, typer.Option(help="Images in all.")] = 32,
    batch: Annotated[int, typer.Option(help="Images in a batch.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each piece of work.")] = 3,
    backbone: Annotated[str, typer.Option(help="A ViT of timm, with random weights.")] = "vit_base_patch16_224",
) -> None:
    """Race CKA against torch-cka, and attention distance against a forward pass and loops."""
    from apthory.benchmarks import metrics

    record = metrics.run_metrics(suite, backbone, images, batch, repeats)
    typer.echo(record["device"])
    typer.echo(metrics.summarize_metrics(record).to_string(float_format="{:.4g}".format))


def _task_name(data: str, task: str) -> str:
    """What `tasks.load` is to load, of a folder or a task."""
    data = data.removeprefix("folder:")
    if bool(data) == bool(task):
        raise typer.BadParameter("name either a folder of images (--data) or a task (--task)")
    if data and not Path(data).is_dir():
        raise typer.BadParameter(f"there is no folder {data!r}", param_hint="--data")
    return f"folder:{data}" if data else task


@contextmanager
def _plain_warnings(is_silent: bool = False) -> Iterator[None]:
    """While this lasts, a warning is one line on stderr."""
    with warnings.catch_warnings():
        if is_silent:
            warnings.simplefilter("ignore", UserWarning)
        warnings.showwarning = lambda message, *_, **__: typer.echo(f"Warning: {message}", err=True)
        yield


def _print_evaluation(evaluation: Any, task: Any) -> None:
    """Accuracy, and the classes that are recognized worst."""
    typer.echo(
        f"test accuracy {evaluation.accuracy:.1f} % on {len(evaluation.correct)} images, "
        f"{evaluation.balanced_accuracy:.1f} % where each class counts alike"
    )
    counts = task.test.labels.bincount(minlength=len(task.classes)).tolist()
    rows = zip(evaluation.recall.tolist(), task.classes, counts, strict=True)
    worst = sorted((row for row in rows if row[2]), key=lambda row: row[0])[:10]
    typer.echo("recall by class, lowest first:" if len(worst) == len(counts) else "the lowest recalls:")
    for recall, name, count in worst:
        typer.echo(f"  {recall:5.1f} % of {count} {name}")


def _parse_parameter(text: str, option: str = "-p") -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint=option)
    try:
        return name, ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value, value))
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
    for (key, statistic), statistic_rows in rows.groupby(["id", "statistic"], sort=False):
        typer.echo(f"\n{key}: {statistic}, claimed {statistic_rows['threshold'].iloc[0]}")
        for place, note in enumerate(statistic_rows["note"].astype(object).fillna("")):
            _print_ledger(statistic_rows.iloc[[place]])
            typer.echo(f"  {note}\n" if note else "", nl=False)


def _check_figure(path: Path) -> list[str]:
    from apthory.lab import figures

    try:
        typer.echo(_describe(figures.provenance(path)))
    except (OSError, ValueError) as error:
        return [str(error)]
    return figures.figure_problems(path)


def _describe(note: dict[str, Any]) -> str:
    from apthory.lab import records

    keys = note["records"]
    kinds = Counter(r.name for r in records.load_all(records.folder(note["suite"])) if r.key[:12] in set(keys))
    head = [f"{note['figure']} ({note['suite']} suite)", f"  numbers: SHA-256 {note['csv_sha256']}"]
    made = [f"  {count} records of {name}" for name, count in kinds.most_common()]
    return "\n".join([*head, *made, *(f"  {' '.join(keys[i : i + 8])}" for i in range(0, len(keys), 8))])


def main() -> None:
    """Run the command."""
    app(prog_name="apthory")


if __name__ == "__main__":
    main()
