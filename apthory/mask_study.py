"""Where AdaViPro's prompts lie once they are trained: how decisions differ, and prompts to draw over images."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from apthory import backbones, pixels, records, sweeps, training
from apthory.tasks import Task


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
        Of decisions the mean distances, which are shares of regions, and the share of regions with the prompt; the
        same of the probabilities behind them, with their quantiles at 5, 50 and 95 %; how many regions count.
    """
    model, data = sweeps.load(backbone, task, size)
    fits = _fit(model, data, method, recipe, learning_rate, seeds)
    x = training.normalized(model, data.test, fits[0].split.test[:num_images])
    found: list[Any] = [fit.prompt for fit in fits]
    counts = touched(found[0].layout)
    masks, probabilities = (
        torch.stack([see(prompt)[:, counts] for prompt in found])
        for see in (lambda prompt: prompt.regions(x), lambda prompt: prompt.probabilities(x))
    )
    return {
        "between_images": mean_distance(masks),
        "between_seeds": mean_distance(masks.transpose(0, 1)),
        "share": float(masks.mean()),
        "probability_between_images": mean_distance(probabilities),
        "probability_between_seeds": mean_distance(probabilities.transpose(0, 1)),
        "probability": probabilities.flatten().quantile(torch.tensor([0.05, 0.5, 0.95])),
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
        The prompt in steps of 1/255 (see `unpack`), and for each image its grid of regions, 1 where the prompt is, and
        the share of them among those that the frame touches.
    """
    model, data = sweeps.load(backbone, task, size)
    (fit,) = _fit(model, data, method, recipe, learning_rate, [seed])
    chosen = fit.split.test[:num_images]
    x = training.normalized(model, data.test, chosen)
    _, std = backbones.mean_std(model)
    steps = (255 * fit.prompt.delta.cpu() * std).round().clamp(-32768, 32767).to(torch.int16)
    prompt: Any = fit.prompt
    everywhere = torch.ones(len(chosen), 1, 1)
    shown = everywhere if prompt.layout.region is None else prompt.regions(x)
    share = everywhere[:, 0] if prompt.layout.region is None else shown[:, touched(prompt.layout)]
    return {
        "images": chosen,
        "shape": list(steps.shape),
        "prompt": zlib.compress(steps.numpy().tobytes(), 9).hex(),
        "regions": shown.int(),
        "share": share.mean(1),
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


def mean_distance(values: Float[Tensor, "group member region"]) -> float:
    """Absolute difference of two members of a group: mean over regions, pairs and groups.

    Of decisions, which are 0 or 1, it is the share of regions in which they differ.
    """
    num = values.shape[1]
    if num < 2:
        raise ValueError("a distance needs at least two members in a group")
    # Sorted, the k-th value is the larger of k pairs and the smaller of the others.
    weights = 2 * torch.arange(num, dtype=torch.float64) - (num - 1)
    sums = (weights.view(-1, 1) * values.double().sort(1).values).sum(1)
    return float(sums.mean() / math.comb(num, 2))


def _fit(
    model: nn.Module,
    data: Task,
    method: Mapping[str, Any],
    recipe: Mapping[str, Any],
    learning_rate: float,
    seeds: Sequence[int],
) -> list[training.Fit]:
    bundle = [training.Configuration(learning_rate=learning_rate, seed=seed) for seed in seeds]
    return training.fit(model, data, sweeps.make(method), bundle, recipe=training.Recipe(**recipe))
