"""Prompts on pixels beside activation prompts and tuning: cells by question, and what prompts do on other images.

A study is made of parts, one for each question. Cells that several parts share, and those that a layer study under
the same protocol has, are computed once. What each suite asks is in `apthory.studies.pixel_grids`.
"""

import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import ndimage

from apthory import tasks, training
from apthory.lab import records
from apthory.methods import pixels
from apthory.studies import cells, record_format
from apthory.tasks import Images, Task

Arms = Mapping[str, Mapping[str, Any]]  # methods by the name that tables give them; lengths in pixels at 224
NUM_CLASSES = {"cifar10": 10, "gtsrb": 43, "dtd10": 10, "pacs": 7, "rsscn7": 7, "textures": 9, "orientation": 6}


@dataclass(frozen=True, kw_only=True)
class StudyPart:
    """Cells that answer one question: every arm with every head on every task of every backbone."""

    arms: Arms
    backbones: Sequence[Mapping[str, Any]] = ({"name": "resnet_micro"},)
    tasks: Sequence[str]
    protocol: cells.Protocol
    usual: cells.Protocol | None = None  # for methods without options, so that they share the cells of another part
    heads: Mapping[str, Mapping[str, Any] | None] = field(default_factory=lambda: {"linear": None})
    places: Mapping[str, Sequence[str]] = field(default_factory=dict)  # sites by backbone, for arms at the site "each"
    domain: str = ""  # train on this part of the task alone
    shifts: Sequence[Mapping[str, Any]] = ()  # test images of another kind, see `run_shifted`
    per_class: int | None = None  # training images for each class on average, instead of the recipe's; as many steps


PixelStudy = Mapping[str, StudyPart]
_MAX_EPOCHS = 60  # each is followed by a pass over the validation images


def pixel_cells(study: PixelStudy) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For every cell what tables call it, and its configuration (of `run_shifted` if it has shifts)."""
    named = []
    for name, part in study.items():
        for spec, task, (head, fields), (arm, method) in itertools.product(
            part.backbones, part.tasks, part.heads.items(), part.arms.items()
        ):
            protocol = _protocol(part, task, method, fields)
            for scaled in _methods(method, spec, part.places):
                config = cells.cell(protocol, spec, task, scaled, control=scaled["name"] == "full", head=fields)
                if part.shifts:
                    config |= {"domain": part.domain, "shifts": [dict(shift) for shift in part.shifts]}
                named.append(({"part": name, "arm": arm, "head": head, "width": method.get("width", 30)}, config))
    return named


def run_pixel_study(study: PixelStudy, folder: Path, executor: Executor | None = None) -> pd.DataFrame:
    """All cells, computed or read, as `cells.table` with the columns part, arm, head, width and shift in front.

    Width is in pixels at 224. Shift is empty for the task's own test part.
    """
    named = _shared(pixel_cells(study))
    by_key: dict[str, records.Record] = {}
    for is_shifted, function in ((False, cells.run_cell), (True, run_shifted)):
        chosen = {cells.key(config): config for _, config, _ in named if ("shifts" in config) == is_shifted}
        by_key |= dict(zip(chosen, cells.fetch_all(list(chosen.values()), folder, executor, function), strict=True))
    return _tidy(study, named, by_key)


def recorded(study: PixelStudy, folder: Path) -> pd.DataFrame | None:
    """The table of `run_pixel_study` from records alone, without data and weights; None if a cell has no record."""
    named = _shared(pixel_cells(study))
    names = {records.name_of(function) for function in (cells.run_cell, run_shifted)}
    wanted = {cells.key(config) for _, config, _ in named}
    candidates = (record for record in records.load_all(folder) if record.name in names) if named else ()
    by_key = cells.by_config(record for record in candidates if cells.key(record.config) in wanted)
    is_whole = bool(named) and wanted <= by_key.keys()
    for record in by_key.values() if is_whole else ():
        records.note(record.key)
    return _tidy(study, named, by_key) if is_whole else None


def slope(
    position: Float[np.ndarray, " n"], accuracy: Float[np.ndarray, "*draw n"]
) -> Float[np.ndarray, "*draw"] | float:
    """The slope of the least-squares line."""
    away = position - position.mean()
    return accuracy @ away / (away @ away)


def _protocol(part: StudyPart, task: str, method: Mapping[str, Any], head: Mapping[str, Any] | None) -> cells.Protocol:
    as_it_comes = method.keys() == {"name"} and head is None
    protocol = (as_it_comes and part.usual) or part.protocol
    if part.per_class:
        recipe, num_train = protocol.recipe, part.per_class * NUM_CLASSES[task]
        steps = recipe.num_epochs * math.ceil((recipe.num_train or num_train) / recipe.batch_size)
        num_epochs = min(_MAX_EPOCHS, max(1, round(steps / math.ceil(num_train / recipe.batch_size))))
        return replace(protocol, recipe=replace(recipe, num_train=num_train, num_epochs=num_epochs))
    if method["name"] == "linear_probe" and head is not None:  # nothing is trained, so nothing has to be chosen
        rates = protocol.learning_rates[:1]
        return replace(protocol, recipe=replace(protocol.recipe, num_epochs=1), learning_rates=rates)
    return protocol


def _methods(
    method: Mapping[str, Any], spec: Mapping[str, Any], places: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """The arm on this backbone: lengths scaled to its input, one method for each site."""
    fields, size = dict(method), spec.get("input_size", 64)
    for name, scaled in (("width", pixels.scaled), ("region", pixels.scaled_region)):
        if name in fields:
            fields[name] = scaled(fields[name], size)
    if fields.get("site") != "each":
        return [fields]
    return [{**fields, "site": site} for site in places[spec["name"]]]


_Named = tuple[dict[str, Any], dict[str, Any], bool]  # names, the cell to run, whether its shifts are asked for


def _shared(named: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[_Named]:
    """A shifted cell that was trained on its whole task is the plain cell as well."""
    whole = {}
    for _, config in named:
        if config.get("domain") == "":
            plain = {name: value for name, value in config.items() if name not in ("domain", "shifts")}
            whole[cells.key(plain)] = config
    return [(names, whole.get(cells.key(config), config), "shifts" in config) for names, config in named]


def _tidy(study: PixelStudy, named: Sequence[_Named], by_key: Mapping[str, records.Record]) -> pd.DataFrame:
    """One row for each cell, seed and test part that a part asks for; cells may have more."""
    tables = {key: _by_shift(by_key[key]) for key in {cells.key(config) for _, config, _ in named}}
    parts = []
    for names, config, with_shifts in named:
        rows = tables[cells.key(config)].assign(**names)
        rows = rows[rows["seed"].isin(study[names["part"]].protocol.seeds)]
        parts.append(rows if with_shifts else rows[rows["shift"] == ""])
    rows = pd.concat(parts, ignore_index=True)
    first = ["part", "arm", "head", "width", "shift"]
    return rows[[*first, *(column for column in rows if column not in first)]]


def _by_shift(record: records.Record) -> pd.DataFrame:
    """One row for each seed and test part."""
    tables = [cells.table([record]).assign(shift="")]
    for shifted in record.values.get("shifts", ()):
        name = shifted["domain"] or f"{shifted['corruption']} {shifted['strength']:g}"
        tables.append(cells.table([replace(record, values={**record.values, **shifted})]).assign(shift=name))
    return pd.concat(tables)


@records.versioned(1, name="apthory.pixel_study.run_shifted")
def run_shifted(
    backbone: Mapping[str, Any],
    task: str,
    size: int,
    method: Mapping[str, Any],
    recipe: Mapping[str, Any],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    domain: str,
    shifts: Sequence[Mapping[str, Any]],
    head: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`cells.run_cell`, then the same prompts on test images of another kind, which nothing was chosen on.

    Args:
        domain: Value of the task's column ``domain`` to train and choose on; empty for the whole task.
        shifts: Test parts: ``{"domain": value}``, or ``{"corruption": name, "strength": number}`` of the own one.
    """
    started = time.perf_counter()
    model, whole = cells.load_backbone_and_task(backbone, task, size)
    data = _domain(task, size, domain) if domain else whole
    how, spec = record_format.recipe_of(recipe), record_format.head_of(head, backbone, data.classes)
    fits = training.tune(
        model, data, record_format.method_of(method), recipe=how, learning_rates=learning_rates, seeds=seeds, head=spec
    )
    values = cells.cell_values(data, fits, training.evaluate(fits, data))
    tested = []
    for shift in shifts:
        other = _domain(task, size, shift["domain"]) if "domain" in shift else data
        if other.classes != data.classes:
            raise ValueError(f"{other.name} and {data.name} differ in classes; a shift keeps them")
        test = other.split(0, how.num_train, how.num_validation, how.num_test).test
        images = Images(other.test[test], other.test.labels[test])
        if "corruption" in shift:
            images = corrupted(images, shift["corruption"], shift["strength"])
        whole_test = replace(fits[0].split, test=torch.arange(len(images)))
        there_fits = [replace(trained, split=whole_test) for trained in fits]
        shifted = training.evaluate(there_fits, replace(data, test=images))
        there = cells.cell_values(data, fits, shifted)
        labels = {name: shift.get(name, "") for name in ("domain", "corruption", "strength")}
        tested.append({**labels, "num_test": len(images), **{key: there[key] for key in ("accuracy", "correct")}})
    return {**values, "shifts": tested, "bundle_seconds": time.perf_counter() - started}


def corrupted(images: Images, how: str, strength: float, seed: int = 0) -> Images:
    """Images of lower quality, each with its label.

    Args:
        how: Three families of Hendrycks and Dietterich (2019, arXiv:1903.12261): Gaussian ``noise``, Gaussian ``blur``,
            loss of ``contrast`` around each image's mean colour.
        strength: Standard deviation of the noise, of pixels in [0, 1]; that of the blur, in pixels; or the share of
            contrast that is left.
        seed: Of the noise.
    """
    x = images.pixels.float() / 255
    if how == "noise":
        x = x + strength * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    elif how == "blur":
        x = torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 0, strength, strength), mode="reflect"))
    elif how == "contrast":
        mean = x.mean((2, 3), keepdim=True)
        x = mean + strength * (x - mean)
    else:
        raise ValueError(f"no corruption {how!r}; expected noise, blur or contrast")
    return Images((255 * x).round().clamp(0, 255).to(torch.uint8), images.labels)


def _domain(task: str, size: int, domain: str) -> Task:
    """The part of a task whose column ``domain`` has this value."""
    return tasks.from_parquet(Path(os.environ["APTHORY_DATA"]) / task, size, where={"domain": [domain]})
