"""What prompts on pixels cost: steps beside bare passes; label mappings and CLIP's text features beside a run."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import pandas as pd

from apthory import backbones, clip, costs, heads, methods, tasks, training
from apthory._tools.progress import progress
from apthory.benchmarks import prefix_cache
from apthory.lab import records
from apthory.studies import record_format

RANDOM_CLIP: Mapping[str, Any] = {"name": "clip:ViT-B-32", "pretrained": None}  # its weights are random
TIMED_METHODS: Mapping[str, methods.Method] = {"vp": methods.VP(), "evp": methods.EVP(), "adavipro": methods.AdaViPro()}


@records.versioned(1, name="apthory.pixel_bench.race")
def race_pixels(backbone: Mapping[str, Any], recipe: Mapping[str, Any], num_repeats: int = 3) -> dict[str, Any]:
    """Time steps of one configuration and a one-time label mapping on the embedded textures.

    - A step of each method (data, prompt, head and optimizer included) stands beside the backbone's bare forward and
      backward pass to the image, on the same batch.
    - To begin a run with a mapping by frequency takes one pass over the training images; what it takes beyond the
      start with a trained head stands beside a whole run of VP with that mapping.

    Args:
        backbone: Arguments of `backbones.load`; its classifier has to be at hand.
        recipe: Of the run that the mapping is held against.
        num_repeats: Rounds of nine steps, and timed starts and runs.

    Returns:
        Ratios of the steps' medians by method, one a round; seconds by piece of work; the device.
    """
    model, how = backbones.load(**backbone), record_format.recipe_of(recipe)
    task = tasks.load("textures", backbones.input_size(model))
    over_bare: dict[str, list[float]] = {name: [] for name in TIMED_METHODS}
    for _ in progress(range(num_repeats), desc=f"steps of {backbone['name']}"):
        for name, method in TIMED_METHODS.items():
            over_bare[name].append(prefix_cache.step_over_bare(model, task, method, how, 1))
    mapping = heads.LabelMapping(backbones.classifier(**backbone), how="frequency", counted="images")
    configurations = [training.Configuration(learning_rate=prefix_cache.LEARNING_RATES[0])]
    works: dict[str, Callable[[], Any]] = {
        "start, trained head": partial(training.Bundle, model, task, TIMED_METHODS["vp"], configurations, how),
        "start, mapping": partial(training.Bundle, model, task, TIMED_METHODS["vp"], configurations, how, head=mapping),
        "run, mapping": partial(
            training.fit, model, task, TIMED_METHODS["vp"], configurations, recipe=how, head=mapping
        ),
    }
    device = next(model.parameters()).device
    seconds = costs.interleaved_seconds(works, num_repeats, device)
    return {"step_over_bare": over_bare, "seconds": seconds, "device": costs.device_name(device)}


@records.versioned(1, name="apthory.pixel_bench.race_words")
def race_words(backbone: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Time CLIP's text features for the embedded textures, and a run of VP with the head they make.

    Args:
        backbone: Arguments of `backbones.load`, of a CLIP; random weights cost what trained ones do.
        recipe: Of the run.

    Returns:
        Seconds by piece of work, of the second time; the device.
    """
    towers, how = clip.of(backbones.load(**backbone)), record_format.recipe_of(recipe)
    task = tasks.load("textures", backbones.input_size(towers.image))
    configurations = [training.Configuration(learning_rate=prefix_cache.LEARNING_RATES[0])]
    head = towers.text_head(task.classes)
    works: dict[str, Callable[[], Any]] = {
        "text features": partial(towers.text_head, task.classes),
        "run, text head": partial(
            training.fit, towers.image, task, TIMED_METHODS["vp"], configurations, recipe=how, head=head
        ),
    }
    device = next(towers.image.parameters()).device
    return {"seconds": costs.interleaved_seconds(works, 1, device), "device": costs.device_name(device)}


def summarize_pixels(record: records.Record) -> pd.Series:
    """Medians: steps over bare passes, and the mapping's share of a run; or the share of CLIP's text features."""
    if record.name == records.name_of(race_words):
        (words,), (whole,) = record["seconds"].values()
        return pd.Series(
            {"text features (s)": words, "text features / two epochs": words / whole}, name=RANDOM_CLIP["name"]
        )
    seconds = {name: median(values) for name, values in record["seconds"].items()}
    extra = seconds["start, mapping"] - seconds["start, trained head"]
    rows = {f"step of {name} / bare": median(values) for name, values in record["step_over_bare"].items()}
    rows |= {f"{name} (s)": value for name, value in seconds.items()}
    rows["mapping / run"] = extra / seconds["run, mapping"]
    return pd.Series(rows, name=record.config["backbone"]["name"])


def run_pixels(suite: str, num_epochs: int = 10, num_repeats: int = 3) -> Iterator[records.Record]:
    """A race on each of the micro backbones, then one of CLIP's text features; records are made anew.

    Args:
        num_epochs: Of the run that a mapping is held against.
        num_repeats: Timed calls of each piece of work.
    """
    recipe = record_format.recipe(replace(prefix_cache.RECIPE, num_epochs=num_epochs))
    sources, folder = (training, methods, heads, prefix_cache, clip), records.folder(suite)
    for name in backbones.SHIPPED:
        config = {"backbone": {"name": name}, "recipe": recipe, "num_repeats": num_repeats}
        yield records.fetch(race_pixels, config, sources=sources, folder=folder, fresh=True)
    config = {"backbone": RANDOM_CLIP, "recipe": recipe | {"num_epochs": 2}}
    yield records.fetch(race_words, config, sources=sources, folder=folder, fresh=True)
