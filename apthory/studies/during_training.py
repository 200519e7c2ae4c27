"""How the layer preference arises: prompts by site on what a backbone was at several checkpoints of its training."""

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from apthory import backbones, training
from apthory.lab import intervals
from apthory.studies import cells, layers

# Every second place between blocks, from the first block's input to the last one's output.
_EVERY = layers.LayerStudy(
    protocol=layers.LAYER_STUDIES["small"]["S"].protocol,  # the last checkpoint's cells are those of Sweep S
    backbones=tuple({"name": checkpoint} for name in backbones.SHIPPED for checkpoint in backbones.checkpoints(name)),
    tasks=("cifar10", "gtsrb", "dtd10", "pacs"),  # objects, signs, textures, styles
    last_sites=9,
    site_every=2,
    controls=False,
    full=False,
)
_FIXED_RATE = cells.Protocol(
    recipe=training.Recipe(num_epochs=3, num_train=96, num_validation=100, num_test=300),
    learning_rates=(1.6e-2,),  # the middle of the usual grid
    seeds=(0, 1),
)
STAGE_STUDIES: Mapping[str, Mapping[str, layers.LayerStudy]] = {
    "embedded": {"stages": replace(_EVERY, protocol=_FIXED_RATE, tasks=("textures", "orientation"))},
    "small": {"stages": _EVERY},
}


def with_stage(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `cells.table` with the checkpoint in a column of its own, stage, and backbone without it.

    It is ``random``, ``epoch-0008``, or ``last``.
    """
    parts = table["backbone"].str.partition(".")
    return table.assign(backbone=parts[0], stage=parts[2].replace("", "last"))


def gain(prompts: pd.DataFrame, probe: pd.DataFrame) -> pd.DataFrame:
    """What the prompt at the site that validation data chose adds to the linear probe, by task, seed and test image.

    The column correct holds 1 where the prompt alone is right, -1 where the probe alone is, else 0, so that
    `intervals.paired_difference` compares two such tables.
    """
    best = cells.best_sites(prompts)
    both = best.merge(probe, on=["task", "seed"], suffixes=("", "_probe"), validate="one_to_one")
    pairs = zip(both["correct"], both["correct_probe"], strict=True)
    return both[["task", "seed"]].assign(correct=[a.astype(float) - b for a, b in pairs])


def agreement(first: pd.DataFrame, second: pd.DataFrame) -> pd.Series:
    """Rank correlation over sites of the mean accuracies of two tables of prompts, by task."""
    means = [table.groupby(["task", "site"])["accuracy"].mean() for table in (first, second)]
    both = pd.concat(means, axis=1, keys=["first", "second"], join="inner")
    return both.groupby("task")[["first", "second"]].apply(
        lambda rows: intervals.spearman(rows["first"], rows["second"])
    )
