"""The pixel prompts beside activation prompts and tuning: which cells each question takes, and where prompts lie.

A study is made of parts, one for each question. Cells that several parts share, and those that a layer study under
the same protocol has, are computed once.
"""

import itertools
import json
import math
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from apthory import backbones, pixels, records, sweeps, tasks, training
from apthory.tasks import Images, Task

Arms = Mapping[str, Mapping[str, Any]]  # methods by the name that tables give them; lengths in pixels at 224
PLACES = {  # of activation prompts: all block sites but the image; of MobileNetV2 some
    "vit_micro": (*(f"blocks.{index}:input" for index in range(8)), "blocks.7:output"),
    "resnet_micro": (
        *(f"layer{stage}.{block}:input" for stage in (1, 2, 3, 4) for block in (0, 1)),
        "layer4.1:output",
    ),
    "mobilenetv2_100": ("blocks.3.3:input", "blocks.4.2:input", "blocks.6.0:input"),
}
NUM_CLASSES = {"cifar10": 10, "gtsrb": 43, "dtd10": 10, "pacs": 7, "rsscn7": 7, "textures": 9, "orientation": 6}
WIDTHS = (5, 30, 60, 90, 112)  # the papers', 112 being the whole image
AROUND = (5, 30, 60)  # frames that leave 214, 164 (the paper's best) and 104 of 224 pixels to the image
RATES = {"l2": (1.0, 10.0, 100.0), "none": (3e3, 3e4, 3e5)}  # gradients have a root mean square of some 4e-4
CORRUPTIONS = tuple(
    {"corruption": name, "strength": strength}
    for name, strengths in {"noise": (0.05, 0.1, 0.2), "blur": (1.0, 2.0, 3.0), "contrast": (0.5, 0.3, 0.15)}.items()
    for strength in strengths
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Cells that answer one question: every arm with every head on every task of every backbone."""

    arms: Arms
    backbones: Sequence[Mapping[str, Any]] = ({"name": "resnet_micro"},)
    tasks: Sequence[str]
    protocol: sweeps.Protocol
    heads: Mapping[str, Mapping[str, Any] | None] = field(default_factory=lambda: {"linear": None})
    places: Mapping[str, Sequence[str]] = field(default_factory=lambda: PLACES)  # of arms at the site "each"
    domain: str = ""  # train on this part of the task alone
    shifts: Sequence[Mapping[str, Any]] = ()  # test parts of another kind, see `run_shifted`
    per_class: int | None = None  # training images, on average over classes, instead of the recipe's


Study = Mapping[str, Part]


# ------------------------------------------------------------------------------------------ cells


def cells(study: Study) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For every cell what tables call it, and its configuration (of `run_shifted` if it has shifts)."""
    found = []
    for name, part in study.items():
        for spec, task, (head, fields), (arm, method) in itertools.product(
            part.backbones, part.tasks, part.heads.items(), part.arms.items()
        ):
            protocol = _protocol(part, task, method, fields)
            for one in _methods(method, spec, part.places):
                config = sweeps.cell(protocol, spec, task, one, control=one["name"] == "full", head=fields)
                if part.shifts:
                    config |= {"domain": part.domain, "shifts": [dict(shift) for shift in part.shifts]}
                found.append(({"part": name, "arm": arm, "head": head, "width": method.get("width", 30)}, config))
    return found


def run_study(study: Study, folder: Path, executor: Executor | None = None) -> pd.DataFrame:
    """All cells, computed or read, as `sweeps.table` with the columns part, arm, head, width and shift in front.

    Width is in pixels at 224. Shift is empty for the task's own test part.
    """
    named = cells(study)
    found: dict[str, records.Record] = {}
    for is_shifted, function in ((False, sweeps.run_cell), (True, run_shifted)):
        chosen = {_key(config): config for _, config in named if ("shifts" in config) == is_shifted}
        found |= dict(zip(chosen, sweeps.fetch_all(list(chosen.values()), folder, executor, function), strict=True))
    tables = {key: _by_shift(record) for key, record in found.items()}
    rows = pd.concat([tables[_key(config)].assign(**names) for names, config in named], ignore_index=True)
    first = ["part", "arm", "head", "width", "shift"]
    return rows[[*first, *(column for column in rows if column not in first)]]


def slope(position: Float[np.ndarray, " n"], accuracy: Float[np.ndarray, " n"]) -> float:
    """Of the least-squares line."""
    return float(np.polyfit(position, accuracy, 1)[0])


def _protocol(part: Part, task: str, method: Mapping[str, Any], head: Mapping[str, Any] | None) -> sweeps.Protocol:
    if part.per_class:
        return replace(
            part.protocol, recipe=replace(part.protocol.recipe, num_train=part.per_class * NUM_CLASSES[task])
        )
    if method["name"] == "linear_probe" and head is not None:  # nothing is trained, so nothing has to be chosen
        rates = part.protocol.learning_rates[:1]
        return replace(part.protocol, recipe=replace(part.protocol.recipe, num_epochs=1), learning_rates=rates)
    return part.protocol


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


def _by_shift(record: records.Record) -> pd.DataFrame:
    """One row for each seed and test part."""
    tables = [sweeps.table([record]).assign(shift="")]
    for one in record.values.get("shifts", ()):
        name = one["domain"] or f"{one['corruption']} {one['strength']:g}"
        tables.append(sweeps.table([replace(record, values={**record.values, **one})]).assign(shift=name))
    return pd.concat(tables)


def _key(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


# ------------------------------------------------------------------------------------------ distribution shift


@records.versioned(1)
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
    """`sweeps.run_cell`, then the same prompts on test images of another kind, which nothing was chosen on.

    Args:
        domain: Value of the task's column ``domain`` to train and choose on; empty for the whole task.
        shifts: Test parts: ``{"domain": value}``, or ``{"corruption": name, "strength": number}`` of the own one.
    """
    started = time.perf_counter()
    model, whole = sweeps.load(backbone, task, size)
    data = _domain(task, size, domain) if domain else whole
    how, spec = training.Recipe(**recipe), sweeps.make_head(head, backbone)
    fits = training.tune(model, data, sweeps.make(method), how, learning_rates, seeds, head=spec)
    values = sweeps.describe(data, fits, training.evaluate(data, fits))
    tested = []
    for shift in shifts:
        other = _domain(task, size, shift["domain"]) if "domain" in shift else data
        if other.classes != data.classes:
            raise ValueError(f"{other.name} and {data.name} differ in classes; a shift keeps them")
        test = other.split(0, how.num_train, how.num_validation, how.num_test).test
        images = Images(other.test.pixels[test], other.test.labels[test])
        if "corruption" in shift:
            images = corrupted(images, shift["corruption"], shift["strength"])
        every = replace(fits[0].split, test=torch.arange(len(images)))
        shifted = training.evaluate(replace(data, test=images), [replace(one, split=every) for one in fits])
        there = sweeps.describe(data, fits, shifted)
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


# ------------------------------------------------------------------------------------------ where prompts lie


@records.versioned(1)
def measure_masks(
    backbone: Mapping[str, Any],
    task: str,
    size: int,
    method: Mapping[str, Any],
    recipe: Mapping[str, Any],
    learning_rate: float,
    seeds: Sequence[int],
    num_images: int,
) -> dict[str, Any]:
    """How the regions that AdaViPro prompts differ between test images and between seeds.

    Only regions that the prompt's frame touches count: elsewhere a decision changes nothing and is not trained.

    Args:
        learning_rate: As the cell of the same method chose it.
        num_images: The first of the test part.

    Returns:
        Mean pairwise Hamming distances, as shares of regions; the share of regions with the prompt; how many count.
    """
    model, data = sweeps.load(backbone, task, size)
    fits = _fit(model, data, method, recipe, learning_rate, seeds)
    x = training.normalized(model, data.test, fits[0].split.test[:num_images])
    found: list[Any] = [fit.prompt for fit in fits]
    counts = touched(found[0].layout)
    masks = torch.stack([prompt.regions(x)[:, counts] for prompt in found]).bool()
    return {
        "between_images": mean_hamming(masks),
        "between_seeds": mean_hamming(masks.transpose(0, 1)),
        "share": float(masks.float().mean()),
        "num_regions": int(counts.sum()),
    }


@records.versioned(1)
def draw_prompt(
    backbone: Mapping[str, Any],
    task: str,
    size: int,
    method: Mapping[str, Any],
    recipe: Mapping[str, Any],
    learning_rate: float,
    seed: int,
    num_images: int,
) -> dict[str, Any]:
    """A trained pixel prompt and the regions that have it, to draw over the first images of the test part.

    Returns:
        The prompt in steps of 1/255 (see `unpack`), and for each image its grid of regions, 1 where the prompt is.
    """
    model, data = sweeps.load(backbone, task, size)
    (fit,) = _fit(model, data, method, recipe, learning_rate, [seed])
    chosen = fit.split.test[:num_images]
    x = training.normalized(model, data.test, chosen)
    _, std = backbones.mean_std(model)
    steps = (255 * fit.prompt.delta.cpu() * std).round().clamp(-32768, 32767).to(torch.int16)
    has_regions = fit.prompt.layout.region is not None
    shown = fit.prompt.regions(x).int() if has_regions else torch.ones(len(chosen), 1, 1, dtype=torch.int32)
    return {
        "images": chosen,
        "shape": list(steps.shape),
        "prompt": zlib.compress(steps.numpy().tobytes(), 9).hex(),
        "regions": shown,
        "accuracy": training.evaluate(data, [fit])[0].accuracy,
    }


def unpack(record: records.Record) -> Float[Tensor, "image channel height width"]:
    """The prompts of `draw_prompt` as they lie on each image, in units of pixels in [0, 1]."""
    steps = np.frombuffer(zlib.decompress(bytes.fromhex(record["prompt"])), np.int16).reshape(record["shape"])
    regions = torch.tensor(record["regions"], dtype=torch.float32)
    side = steps.shape[-1] // regions.shape[-1]
    mask = regions.repeat_interleave(side, 1).repeat_interleave(side, 2)
    return torch.from_numpy(steps / np.float32(255)) * mask.unsqueeze(1)


def touched(layout: pixels.Layout) -> Bool[Tensor, "row column"]:
    """Regions in which the prompt has a pixel at all."""
    if layout.region is None:
        raise ValueError("this prompt has no regions; only AdaViPro decides by region")
    return functional.max_pool2d(layout.mask[None].float(), layout.region)[0].bool()


def mean_hamming(masks: Bool[Tensor, "group member region"]) -> float:
    """Share of regions in which two members of a group differ: mean over pairs, then over groups."""
    num = masks.shape[1]
    if num < 2:
        raise ValueError("a distance needs at least two masks in a group")
    ones = masks.sum(1)
    return float((ones * (num - ones)).double().mean() / math.comb(num, 2))


def _fit(
    model: torch.nn.Module,
    data: Task,
    method: Mapping[str, Any],
    recipe: Mapping[str, Any],
    learning_rate: float,
    seeds: Sequence[int],
) -> list[training.Fit]:
    bundle = [training.Configuration(learning_rate=learning_rate, seed=seed) for seed in seeds]
    return training.fit(model, data, sweeps.make(method), bundle, training.Recipe(**recipe))


# ------------------------------------------------------------------------------------------ the studies


def _wide(name: str, width: int, **fields: Any) -> dict[str, Any]:
    """A method with a frame of some width; the default one is left out, so that it is the same cell everywhere."""
    return {"name": name, **({} if width == 30 else {"width": width}), **fields}


METHODS: Arms = {
    "vp": {"name": "vp"},
    "evp": {"name": "evp"},
    "adavipro": {"name": "adavipro"},
    "ap": {"name": "ap", "site": "each"},
    "linear_probe": {"name": "linear_probe"},
    "full": {"name": "full"},
}
BY_WIDTH: Arms = {f"{name} {width}": _wide(name, width) for name in ("vp", "adavipro") for width in WIDTHS}
PLACEMENT: Arms = {
    f"{place} {width}": _wide("evp", width, **({"around": False} if place == "on top" else {}))
    for place in ("around", "on top")
    for width in AROUND
}
ABLATIONS: Arms = {
    "evp": {"name": "evp"},
    "no diversity": {"name": "evp", "diversity": []},
    "with RandAugment": {"name": "evp", "diversity": ["flip", "crop", "randaugment"]},
    "L1": {"name": "evp", "normalization": "l1"},
    "Linf": {"name": "evp", "normalization": "linf"},
    "adavipro": {"name": "adavipro"},
    "no edges": {"name": "adavipro", "edges": False},
    "from zero": {"name": "adavipro", "init": 0.0},
    **{f"region {side}": {"name": "adavipro", "region": side} for side in (8, 16, 56)},
}
NORMALIZED: Arms = {
    f"{norm} x{rate:g}": {
        "name": "evp",
        **({} if (norm, rate) == ("l2", 10) else {"normalization": norm, "rate": rate}),
    }
    for norm, rates in RATES.items()
    for rate in rates
}
MAPPED: Arms = {"unprompted": {"name": "linear_probe"}, "vp": {"name": "vp"}, "evp": {"name": "evp"}}
HEADS = {
    "random": {"how": "random"},
    "frequency": {"how": "frequency", "counted": "images"},
    "frequency, shared": {"how": "frequency", "assignment": "mode", "counted": "images"},
    "iterative": {"how": "iterative"},
}


SHOWN: Arms = {
    **{f"{name} {width}": _wide(name, width) for name in ("vp", "adavipro") for width in (30, 60)},
    "from zero 30": {"name": "adavipro", "init": 0.0},
}


def _arms(arms: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: arms[name] for name in names}


def _embedded() -> dict[str, Study]:
    recipe = training.Recipe(num_epochs=2, batch_size=16, num_train=64, num_validation=40, num_test=120)
    protocol = sweeps.Protocol(recipe=recipe, learning_rates=(1.6e-2, 6.4e-2), seeds=(0, 1), control_seeds=(0,))
    one = replace(protocol, recipe=replace(recipe, num_epochs=4, num_train=96), seeds=(0,))
    tasks = ("textures", "orientation")
    two: dict[str, Any] = {"tasks": tasks, "protocol": protocol}
    scaled, ends = _arms(METHODS, "vp", "evp", "linear_probe"), ("vp 30", "vp 112", "adavipro 30", "adavipro 112")
    return {
        "pixels": {
            "methods": Part(arms=METHODS, places={"resnet_micro": PLACES["resnet_micro"][3::2]}, **two),
            "mapping": Part(arms=MAPPED, heads=_arms(HEADS, "frequency"), **two),
            "widths": Part(arms=_arms(BY_WIDTH, *ends), **two),
            "placement": Part(arms=_arms(PLACEMENT, "around 30", "on top 30"), **two),
            "ablations": Part(arms=_arms(ABLATIONS, "evp", "no diversity", "adavipro", "no edges"), **two),
            "normalization": Part(arms=_arms(NORMALIZED, "l2 x10", "none x30000"), **two),
            "4 per class": Part(arms=scaled, per_class=4, **two),
            "corruptions": Part(arms=scaled, shifts=CORRUPTIONS[1::3], **two),
        },
        "masks": {
            "judged": Part(arms=_arms(ABLATIONS, "adavipro", "from zero"), tasks=tasks, protocol=one),
            "shown": Part(arms=SHOWN, tasks=tasks, protocol=one),
        },
    }


def _small() -> dict[str, Study]:
    protocol = sweeps.STUDIES["small"]["S"].protocol
    recipe = protocol.recipe
    few = replace(protocol, recipe=replace(recipe, num_epochs=30))  # more epochs, as there are fewer steps in one
    some = replace(protocol, recipe=replace(recipe, num_epochs=20))
    every = replace(protocol, recipe=replace(recipe, num_epochs=4, num_train=None), seeds=(0, 1))
    short = replace(protocol, recipe=replace(recipe, num_epochs=5, num_train=256), seeds=(0, 1))
    tasks = ("cifar10", "gtsrb", "dtd10", "pacs", "rsscn7")
    real: dict[str, Any] = {"tasks": tasks, "protocol": protocol}
    micro: dict[str, Any] = {"backbones": ({"name": "vit_micro"}, {"name": "resnet_micro"})}
    mobile: dict[str, Any] = {"backbones": (sweeps.MOBILENET,), "protocol": short}
    scaled, moved = (
        _arms(METHODS, "vp", "evp", "linear_probe"),
        {name: METHODS[name] for name in METHODS if name != "full"},
    )
    few_places: dict[str, Any] = {
        "places": {name: places[1::3] for name, places in PLACES.items()},
        "protocol": protocol,
    }
    domains = [{"domain": name} for name in ("art_painting", "cartoon", "sketch")]
    return {
        "pixels": {
            "methods": Part(arms=METHODS, **micro, **real),
            "mapping": Part(arms=MAPPED, heads=_arms(HEADS, "frequency"), **micro, **real),
            "widths": Part(arms=BY_WIDTH, **real),
            "placement": Part(arms=PLACEMENT, **real),
            "ablations": Part(arms=ABLATIONS, **real),
            "normalization": Part(arms=NORMALIZED, **real),
            "4 per class": Part(arms=scaled, per_class=4, tasks=tasks, protocol=few),
            "16 per class": Part(arms=scaled, per_class=16, tasks=tasks, protocol=some),
            "all images": Part(arms=scaled, tasks=tasks, protocol=every),
            "domains": Part(arms=moved, tasks=("pacs",), domain="photo", shifts=domains, **micro, **few_places),
            "corruptions": Part(arms=moved, tasks=("cifar10",), shifts=CORRUPTIONS, **micro, **few_places),
        },
        "pixels-mobilenet": {
            "methods": Part(arms=METHODS, tasks=tasks, **mobile),
            "mapping": Part(arms=_arms(MAPPED, "unprompted"), heads=HEADS, tasks=tasks, **mobile),
            "mapping, prompted": Part(
                arms=_arms(MAPPED, "vp", "evp"), heads=_arms(HEADS, "frequency", "iterative"), tasks=tasks[2:], **mobile
            ),
        },
        "masks": {
            "judged": Part(arms=_arms(ABLATIONS, "adavipro", "from zero"), **micro, **real),
            "shown": Part(arms=SHOWN, tasks=("textures", "orientation"), protocol=protocol),
        },
    }


STUDIES: dict[str, dict[str, Study]] = {"embedded": _embedded(), "small": _small()}
