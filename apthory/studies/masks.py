"""Where AdaViPro's prompts lie once they are trained: how decisions differ, and prompts to draw over images."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from apthory import backbones, training
from apthory.lab import records
from apthory.methods import pixels
from apthory.methods.pixels import regions
from apthory.studies import cells, record_format
from apthory.tasks import Task


@records.versioned(2, name="apthory.mask_study.measure_masks")
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
    """How much of the frame AdaViPro shows, and how that differs between test images and between seeds.

    A region weighs as much as the frame has pixels in it: outside the frame a decision changes nothing and is not
    trained, and a region that holds a sliver of it is hardly worth a decision.

    Args:
        learning_rate: As the cell of the same method chose it.
        num_images: The first of the test part.

    Returns:
        Of decisions the mean distances, which are shares of the frame, and the share of it that is shown; the same
        distances of the probabilities behind them, with the quantiles of these over regions at 5, 50 and 95 %; how many
        regions the frame reaches.
    """
    model, data = cells.load_backbone_and_task(backbone, task, size)
    fits = _fit_prompts(model, data, method, recipe, learning_rate, seeds)
    x = backbones.normalize(model, data.test[fits[0].split.test[:num_images]])
    prompts: list[Any] = [fit.prompt for fit in fits]
    weights = frame_pixels(prompts[0].layout)
    reached = weights > 0
    weights = weights[reached] / weights.sum()
    masks, probabilities = (
        torch.stack([see(prompt)[:, reached] for prompt in prompts])
        for see in (lambda prompt: prompt.regions(x), lambda prompt: prompt.probabilities(x))
    )
    return {
        "between_images": mean_distance(masks, weights),
        "between_seeds": mean_distance(masks.transpose(0, 1), weights),
        "share": float((masks * weights).sum(-1).mean()),
        "probability_between_images": mean_distance(probabilities, weights),
        "probability_between_seeds": mean_distance(probabilities.transpose(0, 1), weights),
        "probability": probabilities.flatten().quantile(torch.tensor([0.05, 0.5, 0.95])),
        "num_regions": int(reached.sum()),
    }


@records.versioned(2, name="apthory.mask_study.draw_prompt")
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
        the share of the frame that is shown.
    """
    model, data = cells.load_backbone_and_task(backbone, task, size)
    (fit,) = _fit_prompts(model, data, method, recipe, learning_rate, [seed])
    chosen = fit.split.test[:num_images]
    x = backbones.normalize(model, data.test[chosen])
    _, std = backbones.mean_std(model)
    steps = (255 * fit.prompt.delta.cpu() * std).round().clamp(-32768, 32767).to(torch.int16)
    prompt: Any = fit.prompt
    shown, share = torch.ones(len(chosen), 1, 1), torch.ones(len(chosen))
    if prompt.layout.region is not None:
        shown, weights = prompt.regions(x), frame_pixels(prompt.layout)
        share = (shown * weights).sum((1, 2)) / weights.sum()
    return {
        "images": chosen,
        "shape": list(steps.shape),
        "prompt": zlib.compress(steps.numpy().tobytes(), 9).hex(),
        "regions": shown.int(),
        "share": share,
        "accuracy": training.evaluate(fit, data).accuracy,
    }


def unpack(record: records.Record) -> Float[Tensor, "image channel height width"]:
    """The prompts of `draw_prompt` as they lie on each image, in units of pixels in [0, 1]."""
    steps = np.frombuffer(zlib.decompress(bytes.fromhex(record["prompt"])), np.int16).reshape(record["shape"])
    mask = regions.by_pixel(torch.tensor(record["regions"], dtype=torch.float32), steps.shape[-1])
    return torch.from_numpy(steps / np.float32(255)) * mask.unsqueeze(1)


def frame_pixels(layout: pixels.Layout) -> Float[Tensor, "row column"]:
    """Pixels of the frame in each region."""
    if layout.region is None:
        raise ValueError("this prompt has no regions; only AdaViPro decides by region")
    return layout.region**2 * functional.avg_pool2d(layout.mask[None].float(), layout.region)[0]


def mean_distance(values: Float[Tensor, "group member region"], weights: Float[Tensor, " region"]) -> float:
    """Absolute difference of two members of a group: weighted mean over regions, mean over pairs and groups.

    Of decisions, which are 0 or 1, it is the weight of the regions in which they differ.

    Args:
        weights: Of the regions; they sum to one.
    """
    num = values.shape[1]
    if num < 2:
        raise ValueError("a distance needs at least two members in a group")
    # Sorted, the k-th value is the larger of k pairs and the smaller of the others.
    signs = 2 * torch.arange(num, dtype=torch.float64) - (num - 1)
    sums = (signs.view(-1, 1) * values.double().sort(1).values).sum(1)
    return float((sums.mean(0) * weights.double()).sum() / math.comb(num, 2))


def _fit_prompts(
    model: nn.Module,
    data: Task,
    method: Mapping[str, Any],
    recipe: Mapping[str, Any],
    learning_rate: float,
    seeds: Sequence[int],
) -> list[training.Fit]:
    bundle = [training.Configuration(learning_rate=learning_rate, seed=seed) for seed in seeds]
    return training.fit(model, data, record_format.method_of(method), bundle, recipe=record_format.recipe_of(recipe))
