"""Layer studies: prompts and their controls at every site of some backbones on some tasks."""

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from apthory import sites, training
from apthory.lab import records
from apthory.studies import record_format
from apthory.studies.cells import Protocol, cell, fetch_all, table

SMALL_TASKS = ("cifar10", "gtsrb", "caltech101", "dtd10", "pacs", "rsscn7", "sign_digits", "trashnet")
MOBILENET = {
    "name": "mobilenetv2_100",
    "weights": "mobilenetv2_100.imagenet1k_dequant_fp16.safetensors",
    "pad_type": "same",
    "input_size": 128,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
WIDE = (  # pretrained by `make gpu` and not shipped: their weights are files in the folder of APTHORY_WEIGHTS
    {"name": "vit_small_patch8_224", "weights": "vit_small_patch8_224.safetensors", "img_size": 64},
    {"name": "resnet50", "weights": "resnet50.safetensors", "input_size": 64},
)


@dataclass(frozen=True, kw_only=True)
class LayerStudy:
    """A layer study: which backbones, tasks and sites."""

    protocol: Protocol
    backbones: tuple[Mapping[str, Any], ...] = ({"name": "vit_micro"}, {"name": "resnet_micro"})
    tasks: tuple[str, ...] = SMALL_TASKS
    last_sites: int | None = None  # how many block sites, counted from the last one; None for all
    site_every: int = 1  # n takes every n-th of these sites, from the first
    norm_every: int = 1  # n tunes normalization at every n-th site, counted back from the last site but one
    frozen_every: int = 1  # the same for prompts with a frozen head
    controls: bool = True  # whether prompts have controls at their own site; if not, there is the linear probe alone
    full: bool = True  # whether full fine-tuning is compared
    finer: bool = False  # whether there are prompts after every normalization layer too


_FIVE_SEEDS = Protocol(recipe=training.Recipe(), seeds=(0, 1, 2, 3, 4), control_seeds=(0, 1, 2, 3, 4))
LAYER_STUDIES: dict[str, dict[str, LayerStudy]] = {
    "embedded": {
        "S": LayerStudy(
            protocol=Protocol(
                recipe=training.Recipe(num_epochs=4, num_train=96, num_validation=64, num_test=200),
                seeds=(0, 1),
                control_seeds=(0,),
            ),
            tasks=("textures", "orientation"),
            site_every=2,
            frozen_every=4,
        ),
    },
    "small": {
        "S": LayerStudy(protocol=Protocol(recipe=training.Recipe(), control_seeds=(0,)), norm_every=2, frozen_every=4),
        "mobilenet": LayerStudy(
            protocol=Protocol(recipe=training.Recipe(), control_seeds=(0,)),
            backbones=(MOBILENET,),
            tasks=("dtd10", "pacs", "caltech101"),
            last_sites=9,
            norm_every=2,
            frozen_every=4,
            full=False,
        ),
    },
    "paper": {
        "S5": LayerStudy(protocol=_FIVE_SEEDS, finer=True),
        "wide": LayerStudy(protocol=_FIVE_SEEDS, backbones=WIDE),
    },
}


def find_studies(
    suite: str, names: str = "", studies: Mapping[str, Mapping[str, Any]] = LAYER_STUDIES
) -> dict[str, Any]:
    """Studies of a suite by their names, with commas between; all of them if none is named.

    Args:
        studies: By suite and name; layer studies by default.
    """
    known = studies.get(suite, {})
    chosen = [name.strip() for name in names.split(",")] if names else list(known)
    if unknown := [name for name in chosen or [""] if name not in known]:
        known_names = ", ".join(f"{name} ({home})" for home, by_name in studies.items() for name in by_name)
        raise ValueError(f"no study {unknown[0]!r} in the suite {suite!r}; there are {known_names}")
    return {name: known[name] for name in chosen}


def run_layer_study(study: LayerStudy, folder: Path, executor: Executor | None = None) -> pd.DataFrame:
    """All cells of a layer study, computed or read from their records, as a tidy table (see `table`)."""
    return table(fetch_study(study, folder, executor))


def fetch_study(study: LayerStudy, folder: Path, executor: Executor | None = None) -> list[records.Record]:
    """The records of `run_layer_study`."""
    main = fetch_all(list(layer_cells(study)), folder, executor)
    if not study.controls:
        return main
    random = []
    for record in main:
        if record.config["method"]["name"] in ("ap", "vp"):
            method = record_format.random_prompt(record.config["method"]["site"], record["prompt_norm"])
            random.append({**record.config, "method": method})
    return main + fetch_all(random, folder, executor)


def layer_cells(study: LayerStudy) -> Iterable[dict[str, Any]]:
    """Configurations of `run_cell`: the prompts and cheap controls first, then the controls that cost as much."""
    cheap, costly = [], []
    for backbone in study.backbones:
        model = record_format.backbone_of(backbone)
        places = sites.list_sites(model)
        chosen = (places if study.last_sites is None else places[-study.last_sites :])[:: study.site_every]
        with_norm, with_frozen = chosen[-2::-1][:: study.norm_every], chosen[-2::-1][:: study.frozen_every]
        for task in study.tasks:
            cheap.append(cell(study.protocol, backbone, task, {"name": "linear_probe"}))
            for site in chosen:
                prompt = "vp" if site == ":input" else "ap"
                cheap.append(cell(study.protocol, backbone, task, {"name": prompt, "site": site}))
                if not study.controls:
                    continue
                cheap.append(cell(study.protocol, backbone, task, {"name": "site_probe", "site": site}))
                if site in with_frozen:
                    costly.append(
                        cell(study.protocol, backbone, task, {"name": "frozen_head", "site": site}, control=True)
                    )
                if site in with_norm and sites.norms_between(model, site):
                    costly.append(cell(study.protocol, backbone, task, {"name": "norm", "site": site}, control=True))
            for site in sites.list_sites(model, "norm") if study.finer else ():
                cheap.append(cell(study.protocol, backbone, task, {"name": "ap", "site": site}))
            if study.full:
                costly.append(cell(study.protocol, backbone, task, {"name": "full"}, control=True))
    return cheap + costly
