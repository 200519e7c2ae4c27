"""Measurements behind the limits of input prompts: ranks, residuals, frames and universality, each as a record."""

import copy
import itertools
from collections.abc import Mapping
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apthory import backbones, equivalence, methods, metrics, sites, tasks, training
from apthory.lab import records
from apthory.studies import record_format


@records.versioned(1, name="apthory.input_study.measure_rank")
def measure_rank(backbone: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """The rank of a backbone's patch embedding, or the reason why an input prompt is no fixed prompt on tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of weights that are drawn
        model = backbones.load(**backbone)
    try:
        span = equivalence.input_span(model)
    except ValueError as error:
        return {"reason": str(error)}
    dim, pixels = span.weight.shape
    values = span.singular_values
    return {
        "rank": span.rank,
        "dim": dim,
        "pixels": pixels,
        "tokens": len(span.offset),
        "extra_tokens": span.num_extra_tokens,
        "largest": float(values[0]),
        "smallest": float(values[span.rank - 1]),
        "tolerance": span.tolerance,
    }


@records.versioned(1, name="apthory.input_study.measure_residuals")
def measure_residuals(
    backbone: Mapping[str, Any], task: str, recipe: Mapping[str, Any], learning_rate: float, seed: int = 0
) -> dict[str, Any]:
    """How much of a trained prompt at the first block no image prompt can add, and how large one the rest takes.

    Returns:
        For a full and a channel prompt: the residual, that of a random prompt, norm of the prompt and of the image
        prompt that adds the part in the span (each relative to what it is added to), and the validation accuracy.
    """
    model = backbones.load(**backbone)
    span, data = equivalence.input_span(model), tasks.load(task, size=backbones.input_size(model))
    images = backbones.normalize(model, data.train[torch.arange(64)])
    rows = {}
    for shape in get_args(methods.Shape):
        fit = _trained_prompt(model, data, span.site, shape, recipe, learning_rate, seed)
        random = torch.randn(fit.prompt.delta.shape, generator=torch.Generator().manual_seed(seed))
        needed = span.as_image(fit.prompt.delta)
        rows[shape] = {
            "residual": span.residual(fit.prompt.delta),
            "random_residual": span.residual(random.to(images.device)),
            "relative_norm": fit.relative_norm,
            "relative_image_norm": float(needed.norm() / images.double().flatten(1).norm(dim=1).mean()),
            "validation_accuracy": fit.validation_accuracy,
        }
    return rows


@records.versioned(1, name="apthory.input_study.measure_frame")
def measure_frame(backbone: Mapping[str, Any], width: int, num_images: int = 4, seed: int = 0) -> dict[str, Any]:
    """Largest differences between features of framed images and of their tokens, relative to the largest, in float64.

    Returns:
        ``difference`` with the image's tokens where they lie in the frame; ``elsewhere`` with the position
        embeddings of the grid's corner, as if the image had not been moved: what must differ.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of weights that are drawn
        model = backbones.load(**backbone).double()
    span, generator = equivalence.input_span(model), torch.Generator().manual_seed(seed)
    size, margin = backbones.input_size(model), width // span.patch[0]
    pixels = torch.randn(num_images + 1, 3, size, size, generator=generator, dtype=torch.float64)
    frame, *x = pixels.to(span.weight.device)
    small = torch.stack(x)[..., 2 * width :, 2 * width :]
    own, ring = equivalence.as_tokens(span, small, frame)
    positions = span.offset[span.num_extra_tokens :].unflatten(0, span.grid)
    side = span.grid[0] - 2 * margin
    moved = positions[:side, :side] - positions[margin : margin + side, margin : margin + side]
    moved = nn.functional.pad(moved.flatten(0, 1), (0, 0, span.num_extra_tokens, 0))
    _, blocks = sites.split(model, span.site)
    with torch.no_grad():
        expected = model(equivalence.framed(small, frame))
        features = [blocks(torch.cat([z, ring.expand(num_images, -1, -1)], 1)) for z in (own, own + moved)]
    same, elsewhere = (float((y - expected).abs().max() / expected.abs().max()) for y in features)
    return {
        "difference": same,
        "elsewhere": elsewhere,
        "tokens": equivalence.frame_tokens(size, width, span.patch[0])._asdict(),
    }


@records.versioned(1, name="apthory.input_study.measure_universality")
def measure_universality(
    backbone: Mapping[str, Any],
    task: str,
    recipe: Mapping[str, Any],
    learning_rate: float,
    num_images: int = 24,
    num_groups: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Universality of a trained visual prompt and of a random one at every block site, on groups of test images.

    Returns:
        The sites, and a row for each network (trained or shuffled), prompt (trained or random) and group of images:
        one value a site.
    """
    model = backbones.load(**backbone)
    data, generator = tasks.load(task, size=backbones.input_size(model)), torch.Generator().manual_seed(seed)
    fit = _trained_prompt(model, data, ":input", "full", recipe, learning_rate, seed)
    trained = fit.prompt.delta
    random = torch.randn(trained.shape, generator=generator).to(trained.device)
    chosen = fit.split.test[torch.randperm(len(fit.split.test), generator=generator)][: num_groups * num_images]
    groups = [backbones.normalize(model, data.test[group]) for group in chosen.split(num_images)]
    networks = {"trained": model, "shuffled": shuffled(model, torch.cat(groups), seed)}
    rows = []
    for (network, net), (prompt, direction), (index, x) in itertools.product(
        networks.items(), {"trained": trained, "random": random}.items(), enumerate(groups)
    ):
        values = {site: metrics.universality(moved) for site, moved in metrics.arrivals(net, x, direction).items()}
        rows.append({"network": network, "prompt": prompt, "group": index, "values": list(values.values())})
    return {"sites": list(values), "rows": rows}


def shuffled(backbone: nn.Module, x: Float[Tensor, "batch channel height width"], seed: int = 0) -> nn.Module:
    """A twin that learned nothing: the entries of every weight matrix in random order, batch statistics taken anew."""
    twin, generator = copy.deepcopy(backbone), torch.Generator().manual_seed(seed)
    for weight in (parameter for parameter in twin.parameters() if parameter.ndim > 1):
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        weight.data = weight.detach().flatten()[order].view_as(weight).contiguous()
    norms = [module for module in twin.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # a plain average
    with torch.no_grad():
        twin(x)
    return backbones.freeze(twin)


def _trained_prompt(
    model: nn.Module,
    data: tasks.Task,
    site: str,
    shape: methods.Shape,
    recipe: Mapping[str, Any],
    learning_rate: float,
    seed: int,
) -> training.Fit:
    method = methods.ActivationPrompting(site=site, shape=shape)
    configuration = training.Configuration(learning_rate=learning_rate, seed=seed)
    return training.fit(model, data, method, [configuration], recipe=record_format.recipe_of(recipe))[0]
