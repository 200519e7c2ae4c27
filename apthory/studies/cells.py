"""Bundles of work with a record each, run one after the other or on any concurrent.futures executor.

A *cell* is one backbone, task and method under one protocol: the unit of a sweep, of its cache and of failure. A
killed sweep goes on where it stopped, with the same bits.
"""

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import nn

from apthory import backbones, clip, heads, methods, sites, tasks, training
from apthory._tools import determinism
from apthory._tools.progress import progress
from apthory.lab import records
from apthory.studies import record_format

# Whose code decides what a cell records.
_SOURCES = (determinism, sites, methods, heads, training, backbones, clip, tasks)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How every method of a suite is trained and chosen."""

    recipe: training.Recipe
    learning_rates: tuple[float, ...] = (4e-3, 1.6e-2, 6.4e-2)  # of the head; a choice at the edge extends the grid
    seeds: tuple[int, ...] = (0, 1, 2)  # the first one chooses the learning rate
    control_seeds: tuple[int, ...] = (0, 1, 2)  # of controls that cost as much as a prompt


def cell(
    protocol: Protocol,
    backbone: Mapping[str, Any],
    task: str,
    method: Mapping[str, Any],
    *,
    control: bool = False,
    head: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Configuration of `run_cell` under a protocol."""
    seeds = protocol.control_seeds if control else protocol.seeds
    return record_format.spell_cell(backbone, task, method, protocol.recipe, protocol.learning_rates, seeds, head)


def fetch_all(
    configs: Sequence[Mapping[str, Any]],
    folder: Path,
    executor: Executor | None = None,
    function: Callable[..., Mapping[str, Any]] | None = None,
) -> list[records.Record]:
    """Records of many cells, in the order asked for.

    Args:
        function: Of the cells, at the top level of a module; `run_cell` by default.
        executor: Where to run them; this process, one by one, if left out. Processes and machines must see the
            same folders of data, weights and records.
    """
    if executor is None:
        return [fetch_cell(config, folder, function) for config in progress(configs, desc="cells")]
    known = [_recorded(config, folder, function) for config in progress(configs, desc="records")]
    pairs = zip(configs, known, strict=True)
    futures = [executor.submit(fetch_cell, config, folder, function) for config, record in pairs if record is None]
    try:
        for future in progress(as_completed(futures), desc="cells", total=len(futures)):
            future.result()  # the first failure ends the sweep; what is done stays recorded
    finally:
        for future in futures:  # an executor that is left computes all that still waits
            future.cancel()
    computed = (future.result() for future in futures)
    return [record or next(computed) for record in known]


def processes(num: int) -> Executor:
    """An executor of so many processes with one thread each, which start when there is something to compute."""
    return ProcessPoolExecutor(num, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))


def fetch_cell(
    config: Mapping[str, Any],
    folder: Path,
    function: Callable[..., Mapping[str, Any]] | None = None,
    sources: Sequence[ModuleType] = (),
) -> records.Record:
    """One cell, or the record of another function of a backbone and a task, computed or read.

    Where neither APTHORY_DATA nor APTHORY_WEIGHTS is set, a record that was made with data and weights from there is
    taken as it is, with a warning, so that committed results can be drawn again without them.

    Args:
        config: Of `run_cell` or ``function``; has at least its backbone, task and size.
        folder: Of the records.
        function: `run_cell` by default.
        sources: Further modules whose code decides the values.
    """
    function = function or run_cell
    try:
        model, task = load_backbone_and_task(config["backbone"], config["task"], config["size"])
    except (ValueError, OSError) as error:
        if {"APTHORY_DATA", "APTHORY_WEIGHTS", "APTHORY_FRESH"} & set(os.environ):
            raise
        record = _by_config(folder, records.name_of(function)).get(key(config))
        if record is None:
            raise
        records.note(record.key)
        warnings.warn(f"taking the record of {config['task']!r} as it is, since {error}", stacklevel=2)
        return record
    sources = (*_SOURCES, *sources)
    return records.fetch(function, config, **_digests(model, task), sources=sources, folder=folder)


def _recorded(
    config: Mapping[str, Any], folder: Path, function: Callable[..., Mapping[str, Any]] | None
) -> records.Record | None:
    """What `fetch_cell` gives without computing anything; None where there is something to compute."""
    try:
        model, task = load_backbone_and_task(config["backbone"], config["task"], config["size"])
    except (ValueError, OSError):
        return fetch_cell(config, folder, function)  # reads, or says what is wrong
    return records.lookup(function or run_cell, config, **_digests(model, task), folder=folder)


def _digests(model: nn.Module, task: tasks.Task) -> dict[str, Any]:
    """What a record's key takes besides the configuration."""
    return {"data": task.digest, "weights": record_format.weights_digest(model)}


@records.versioned(1, name="apthory.sweeps.run_cell")
def run_cell(
    backbone: Mapping[str, Any],
    task: str,
    size: int,
    method: Mapping[str, Any],
    recipe: Mapping[str, Any],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    head: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Tune one method on one task under the protocol, then evaluate it on the test part, once.

    Args:
        backbone: Arguments of `backbones.load`.
        task: Name for `tasks.load`.
        size: Side of the images in pixels.
        method: Its name in the field's tables, its site, and further fields of the method's class.
        recipe: Fields of `training.Recipe`.
        learning_rates: Grid for the first seed.
        seeds: All seeds.
        head: Of `record_format.head_of`; a trained one if left out.
    """
    started = time.perf_counter()
    model, data = load_backbone_and_task(backbone, task, size)
    how = record_format.recipe_of(recipe)
    if method["name"] == "random_prompt":
        fits = _fit_random(model, data, method, how, learning_rates, seeds)
        evaluations = [training.evaluate(trained, data) for trained in fits]
    else:
        spec: training.Head | None = record_format.head_of(head, backbone, data.classes)
        if method["name"] == "frozen_head":
            probe = methods.LinearProbe()
            spec = training.FrozenHead(
                training.tune(model, data, probe, recipe=how, learning_rates=learning_rates, seeds=seeds)
            )
        fits = training.tune(
            model,
            data,
            record_format.method_of(method),
            recipe=how,
            learning_rates=learning_rates,
            seeds=seeds,
            head=spec,
        )
        evaluations = training.evaluate(fits, data)
    return {**cell_values(data, fits, evaluations), "bundle_seconds": time.perf_counter() - started}


def cell_values(
    data: tasks.Task, fits: Sequence[training.Fit], evaluations: Sequence[training.Evaluation]
) -> dict[str, Any]:
    """What the record of a cell holds, besides its time."""
    return {
        "accuracy": [e.accuracy for e in evaluations],
        "balanced_accuracy": [e.balanced_accuracy for e in evaluations],
        "recall": [[None if math.isnan(share) else share for share in e.recall.tolist()] for e in evaluations],
        "correct": [np.packbits(e.correct.numpy()).tobytes().hex() for e in evaluations],
        "num_test": len(fits[0].split.test),
        "learning_rate": fits[0].configuration.learning_rate,
        "validation_accuracy": [fit.validation_accuracy for fit in fits],
        "epoch": [fit.epoch for fit in fits],
        "prompt_norm": [fit.prompt_norm for fit in fits],
        "relative_norm": [fit.relative_norm for fit in fits],
        "train_curve": [loss if math.isfinite(loss) else None for loss in fits[0].train_curve],
        "validation_curve": list(fits[0].validation_curve),
        "split": [fit.split.digest for fit in fits],
        "transform": data.transform,
        "cache_bytes": fits[0].cache_bytes,
    }


def table(cells: Iterable[records.Record]) -> pd.DataFrame:
    """One row for each cell and seed.

    Columns: backbone, task, method, site, depth (0 at the input, 1 at the last block's output), seed, accuracy in
    percent, correct (by test image), validation_accuracy, learning_rate, relative_norm, seconds of the bundle,
    record's key.
    """
    rows = []
    for record in cells:
        config = record.config
        site = record_format.site_of(config["method"])
        depth = _site_depth(json.dumps(config["backbone"]), site)
        for index, seed in enumerate(config["seeds"]):
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(record["correct"][index]), np.uint8))
            rows.append(
                {
                    "backbone": config["backbone"]["name"],
                    "task": config["task"],
                    "method": record_format.method_name(config["method"]),
                    "site": site,
                    "depth": depth,
                    "seed": seed,
                    "accuracy": record["accuracy"][index],
                    "correct": bits[: record["num_test"]].astype(bool),
                    "validation_accuracy": record["validation_accuracy"][index],
                    "learning_rate": record["learning_rate"],
                    "relative_norm": record["relative_norm"][index],
                    "seconds": record["bundle_seconds"],
                    "key": record.key,
                }
            )
    return pd.DataFrame(rows)


def best(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """Of each backbone and task the rows with the best validation accuracy, averaged over seeds.

    Args:
        table: Rows of one method, as `table` gives them.
        by: The column that is chosen, such as ``"site"``.
    """
    means = table.groupby(["backbone", "task", by], sort=False)["validation_accuracy"].mean()
    chosen = set(means.groupby(["backbone", "task"]).idxmax())
    return table[[place in chosen for place in zip(table["backbone"], table["task"], table[by], strict=True)]]


def best_sites(table: pd.DataFrame) -> pd.DataFrame:
    """`best` by site."""
    return best(table, "site")


def load_backbone_and_task(backbone: Mapping[str, Any], task: str, size: int) -> tuple[nn.Module, tasks.Task]:
    """Backbone and task of a configuration, from memory where they were wanted before."""
    return record_format.backbone_of(backbone), _task(task, size)


def _fit_random(
    model: nn.Module,
    data: tasks.Task,
    method: Mapping[str, Any],
    recipe: training.Recipe,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
) -> list[training.Fit]:
    """A frozen random prompt of the trained prompt's norm for each seed; the first seed chooses the learning rate."""
    fixed = record_format.random_prompts_of(method, seeds)
    fits = training.tune(model, data, fixed[0], recipe=recipe, learning_rates=learning_rates, seeds=seeds[:1])
    for prompt, seed in zip(fixed[1:], seeds[1:], strict=True):
        configuration = training.Configuration(learning_rate=fits[0].configuration.learning_rate, seed=seed)
        fits += training.fit(model, data, prompt, [configuration], recipe=recipe)
    return fits


def key(config: Mapping[str, Any]) -> str:
    """A configuration as a string, equal for equal ones."""
    return json.dumps(config, sort_keys=True)


def by_config(recorded: Iterable[records.Record]) -> dict[str, records.Record]:
    """Records that hold, by the `key` of their configuration.

    Raises:
        ValueError: If two are of one configuration, but of other data or weights: which one is meant, only these tell.
    """
    kept: dict[str, records.Record] = {}
    for record in recorded:
        if not records.superseded(record):
            other = kept.setdefault(key(record.config), record)
            if other.key != record.key:
                raise ValueError(
                    f"records {other.key[:12]} and {record.key[:12]} are of one configuration, but of other data or "
                    "weights; remove the one that no longer counts, or give the data (APTHORY_DATA)"
                )
    return kept


@lru_cache(maxsize=4)
def _by_config(folder: Path, name: str) -> dict[str, records.Record]:
    return by_config(records.load_all(folder, name))


@lru_cache(maxsize=16)  # a sweep goes over its tasks several times
def _task(name: str, size: int) -> tasks.Task:
    return tasks.load(name, size)


def _site_depth(spec: str, site: str) -> float:
    if site == ":output":
        return 1.0
    blocks = _site_depths(spec, "block")
    return blocks[site] if site in blocks else _site_depths(spec, "all")[site]


@lru_cache
def _site_depths(spec: str, kind: Literal["block", "all"]) -> dict[str, float]:
    """Depths of a backbone's sites, which need no weights."""
    untrained = backbones.create(**_architecture_of(json.loads(spec)))
    return {site.name: site.depth for site in sites.describe(untrained, kind)}


def _architecture_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    data = ("weights", "pretrained", "input_size", "mean", "std", "device")
    return {key: value for key, value in spec.items() if key not in data}
