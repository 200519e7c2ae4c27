"""What the prefix cache gains: the same sweep over sites with and without it, side by side in one run."""

import copy
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from apthory import backbones, costs, methods, sites, tasks, training
from apthory._tools.progress import progress
from apthory.lab import records
from apthory.studies import record_format
from apthory.tasks import Task

LEARNING_RATES = (4e-3, 1.6e-2, 6.4e-2)
RECIPE = training.Recipe(num_epochs=10, num_train=192, num_validation=48, num_test=48)


BACKBONES: Mapping[str, Mapping[str, Any]] = {  # at 64 pixels
    "vit_micro": {},
    "resnet_micro": {},
    "mobilenetv2_100": {"pretrained": False, "pad_type": "same", "input_size": 64},
}


@records.versioned(1, name="apthory.bench.race")
def race_prefix_cache(
    backbone: Mapping[str, Any],
    recipe: Mapping[str, Any],
    learning_rates: Sequence[float],
) -> dict[str, Any]:
    """Train a bundle at every block site, with the cache and by loops without it, on the embedded textures.

    Three loops, one after the other at each site, the first two in changing order:

    - ``cached``: this package's.
    - ``frozen``: the same loop with the prefix run anew at every step. Weights are frozen, images lie in memory,
      evaluations are the same: everything sensible but the cache.
    - ``customary``: as published code does it. Weight gradients are kept, images decoded again in every epoch, each
      configuration trained by itself, and the test set evaluated in every epoch. One epoch of one configuration
      is timed and scaled to the whole.

    With s the suffix's share of the FLOPs, training steps alone can gain sum(1 + s) / sum(2 s) over ``frozen``.
    Validation in every epoch can gain more, 1 / s, and the one pass of the prefix costs something;
    ``schedule_bound`` counts the FLOPs of both loops as they are, with all of that.
    """
    model = backbones.load(**backbone)
    how = record_format.recipe_of(recipe)
    task = tasks.load("textures", backbones.input_size(model))
    bundle = [training.Configuration(learning_rate=rate) for rate in learning_rates]
    customary = _Customary(model, task, how)
    places = sites.list_sites(model)
    training.fit(
        model, task, methods.ActivationPrompting(site=places[-1]), bundle, recipe=replace(how, num_epochs=1)
    )  # warm
    customary.epoch_seconds(places[-1])
    rows = []
    for index, site in enumerate(progress(places, desc=f"race on {backbone['name']}")):
        method = methods.ActivationPrompting(site=site)
        seconds, accuracy, cache_bytes = {}, {}, 0
        for name in ("cached", "frozen") if index % 2 else ("frozen", "cached"):
            start = perf_counter()
            fits = training.fit(model, task, method, bundle, recipe=replace(how, cache=name == "cached"))
            seconds[name] = perf_counter() - start
            accuracy[name] = training.evaluate(training.choose(fits), task).accuracy
            cache_bytes = max(cache_bytes, fits[0].cache_bytes)
        seconds["customary"] = customary.epoch_seconds(site) * how.num_epochs * len(bundle)
        rows.append(
            {
                "site": site,
                "suffix_share": _suffix_share(model, site),
                **{f"{name}_seconds": value for name, value in seconds.items()},
                **{f"{name}_accuracy": value for name, value in accuracy.items()},
                "step_over_bare": step_over_bare(model, task, method, how, len(bundle)),
                "cache_bytes": cache_bytes,
            }
        )
    return {"sites": rows, "device": costs.device_name(next(model.parameters()).device)}


def summarize_prefix_cache(record: records.Record) -> pd.DataFrame:
    """Gains against their bounds, for the full sweep over sites and for its last quarter."""
    rows = pd.DataFrame(record["sites"])
    recipe, num = record.config["recipe"], len(record.config["learning_rates"])
    train, validation = recipe["num_train"], recipe["num_validation"]
    passes = recipe["num_epochs"] * num
    share = rows["suffix_share"]
    # Forward passes of the whole backbone: steps, validation in every epoch, and the one pass of the prefix.
    rows["frozen_cost"] = passes * (train * (1 + share) + validation)
    rows["cached_cost"] = passes * (train * 2 * share + validation * share) + (train + validation) * (1 - share)
    out = {}
    for label, part in (("all sites", rows), ("last quarter", rows.tail(math.ceil(len(rows) / 4)))):
        total = part.sum(numeric_only=True)
        gain = total["frozen_seconds"] / total["cached_seconds"]
        bound = (len(part) + total["suffix_share"]) / (2 * total["suffix_share"])
        out[record.config["backbone"]["name"], label] = {
            "cached (s)": total["cached_seconds"],
            "frozen, sensible (s)": total["frozen_seconds"],
            "gain": gain,
            "bound, steps alone": bound,
            "gain / bound": gain / bound,
            "bound, whole schedule": total["frozen_cost"] / total["cached_cost"],
            "customary loop (s)": total["customary_seconds"],
            "gain over customary": total["customary_seconds"] / total["cached_seconds"],
            "step / bare suffix, median": part["step_over_bare"].median(),
            "step / bare suffix, largest": part["step_over_bare"].max(),
            "cache (MiB)": part["cache_bytes"].max() / 2**20,
            "accuracy, cached minus frozen": (part["cached_accuracy"] - part["frozen_accuracy"]).mean(),
            "largest difference of accuracy": (part["cached_accuracy"] - part["frozen_accuracy"]).abs().max(),
        }
    return pd.DataFrame(out)


def step_over_bare(
    model: nn.Module, task: Task, method: methods.Method, recipe: training.Recipe, num: int, num_repeats: int = 9
) -> float:
    """Time of the loop's step, divided by that of the bare suffix's forward and backward on the same stack.

    Args:
        num: Configurations in the stack, one batch each.
    """
    configurations = [training.Configuration(learning_rate=rate) for rate in LEARNING_RATES[:num]]
    bundle = training.Bundle(model, task, method, configurations, recipe)
    chunks = [bundle.splits[0].train[: recipe.batch_size]] * num
    prefix, plain = sites.split(model, method.site)
    # Not `bundle.source`: EVP's gives shrunk images.
    leaf, *others = training.run_prefix(model, prefix, task.train, recipe.precision, torch.cat(chunks))
    leaf.requires_grad_(True)

    def bare() -> None:
        with backbones.autocast(model, recipe.precision):
            features = plain(leaf, *others)
        features.float().sum().backward()
        leaf.grad = None

    works = {"step": lambda: bundle.step(chunks, 0.5), "bare": bare}
    seconds = costs.interleaved_seconds(works, num_repeats, bundle.device)
    return float(np.median(seconds["step"]) / np.median(seconds["bare"]))


def run_prefix_cache(suite: str, num_epochs: int = RECIPE.num_epochs, only: str = "") -> Iterator[records.Record]:
    """A race on each of `BACKBONES`, or on one of them alone; records are made anew, since a machine is measured.

    Raises:
        ValueError: If there is no such backbone in the race.
    """
    if only and only not in BACKBONES:
        raise ValueError(f"no backbone {only!r} in this race; there are {', '.join(BACKBONES)}")
    for backbone in ({"name": name, **spec} for name, spec in BACKBONES.items() if only in ("", name)):
        config = {
            "backbone": backbone,
            "recipe": record_format.recipe(replace(RECIPE, num_epochs=num_epochs)),
            "learning_rates": list(LEARNING_RATES),
        }
        yield records.fetch(
            race_prefix_cache, config, sources=(training, sites), folder=records.folder(suite), fresh=True
        )


def _suffix_share(model: nn.Module, site: str) -> float:
    side = backbones.input_size(model)
    x = torch.zeros(2, 3, side, side, device=next(model.parameters()).device)
    prefix, suffix = sites.split(model, site)
    with torch.no_grad():
        crossing = prefix(x)
        return costs.count_flops(lambda: suffix(*crossing)) / costs.count_flops(lambda: model(x))


class _Customary:
    """The loop of published code: all gradients kept, images decoded in every epoch, the test set evaluated too."""

    def __init__(self, model: nn.Module, task: Task, recipe: training.Recipe) -> None:
        self.model = copy.deepcopy(model).requires_grad_(True)
        self.task, self.recipe = task, recipe
        self.split = task.split(0, recipe.num_train, recipe.num_validation, recipe.num_test)
        self.files = {
            "train": [_encode(pixels) for pixels in task.train],
            "test": [_encode(pixels) for pixels in task.test],
        }

    def epoch_seconds(self, site: str) -> float:
        """Time of one epoch of one configuration, with evaluations on the validation and on the test part."""
        prompt = methods.ActivationPrompt.zeros(self.model, site).to(next(self.model.parameters()).device)
        with torch.no_grad():
            width = self.model(self._images("train", self.split.train[:2])).shape[1]
        head = nn.Linear(width, len(self.task.classes)).to(prompt.delta.device)
        prompted = methods.AdaptedBackbone(self.model, prompt, head)
        optimizer = torch.optim.AdamW([*prompt.parameters(), *head.parameters()], LEARNING_RATES[0])
        start = perf_counter()
        for chunk in self.split.train.split(self.recipe.batch_size):
            labels = self.task.train.labels[chunk].to(prompt.delta.device)
            with backbones.autocast(self.model, self.recipe.precision):
                logits = prompted(self._images("train", chunk))
            functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        for part, indices in (("train", self.split.validation), ("test", self.split.test)):
            for chunk in indices.split(self.recipe.batch_size):
                with torch.no_grad(), backbones.autocast(self.model, self.recipe.precision):
                    prompted(self._images(part, chunk))
        seconds = perf_counter() - start
        self.model.zero_grad()
        return seconds

    def _images(self, part: str, indices: Tensor) -> Tensor:
        arrays = [np.asarray(Image.open(io.BytesIO(self.files[part][index]))) for index in indices.tolist()]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        return backbones.normalize(self.model, pixels)


def _encode(pixels: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="jpeg", quality=90)
    return file.getvalue()
