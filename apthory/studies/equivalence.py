"""How exact the statements of `equivalence` are on a backbone: the measurements behind their table and figures."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from apthory import backbones, equivalence, methods, sites, tasks, training
from apthory.lab import records

_OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.5),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=0.03),
}
_EDGES: tuple[equivalence.layers.Edge, ...] = ("output", "input")


@records.versioned(2, name="apthory.equivalence_study.measure_layers")
def measure_layers(backbone: Mapping[str, Any], num_images: int = 2, every: int = 1) -> dict[str, Any]:
    """Fold a random channel prompt at every edge where a layer takes it, and compare features with the prompt's.

    Args:
        backbone: Arguments of `backbones.load`.
        num_images: Random images.
        every: Take every so many-th layer only.

    Returns:
        For every layer and edge: statement, layer type, largest relative difference of features, and how much the
        prompt (as large as the activations) changes them. Edges that no bias shift equals are there as well, with
        the shift that would hold without padding, or for LayerNorm with the mean shift.
    """
    model = backbones.load(**backbone).double()
    x = _random_images(model, num_images)
    rows = []
    kinds = (*sites.NORMS, nn.Linear, nn.Conv2d)
    layers = [n for n, m in model.named_modules() if isinstance(m, kinds) and getattr(m, "bias", None) is not None]
    layers = layers[::every]
    outputs = {
        n: sites.affine_output(model, n) if isinstance(model.get_submodule(n), sites.NORMS) else n for n in layers
    }
    with torch.no_grad():
        plain = model(x)
        seen = sites.capture(model, [place for n in layers for place in (outputs[n], f"{n}:input")], x)
        for name in layers:
            layer = model.get_submodule(name)
            is_norm = isinstance(layer, sites.NORMS)
            for edge in _EDGES:
                place = outputs[name] if edge == "output" else f"{name}:input"
                z = seen[place]
                axis = 1 if equivalence.layers.has_channels_first(layer) else -1
                generator = torch.Generator().manual_seed(0)
                values = torch.randn(z.shape[axis], generator=generator, dtype=z.dtype) * z.square().mean().sqrt()
                delta = values.view(*(-1 if i == axis % z.ndim else 1 for i in range(1, z.ndim)))
                with sites.edited(model, {place: partial(torch.add, delta)}):
                    prompted = model(x)
                try:
                    shift, exact = equivalence.bias_shift(layer, values, edge=edge), True
                except ValueError:
                    if is_norm:  # of LayerNorm: the mean over positions is the best that its own result offers
                        shift = (layer(z + delta) - layer(z)).movedim(axis, -1).flatten(0, -2).mean(0)
                    else:
                        shift = equivalence.bias_shift(layer, values, edge=edge, border="ignore")
                    exact = False
                tuned = functional_call(model, {f"{name}.bias": layer.bias + shift}, (x,))
                rows.append(
                    {
                        "statement": equivalence.layers.statement(layer, edge),
                        "layer": name,
                        "type": type(layer).__name__,
                        "edge": edge,
                        "exact": exact,
                        "difference": equivalence.difference(tuned, prompted),
                        "effect": equivalence.difference(prompted, plain),
                    }
                )
    return {"rows": rows}


@records.versioned(2, name="apthory.equivalence_study.measure_diagnoses")
def measure_diagnoses(backbone: Mapping[str, Any], places: Sequence[str]) -> dict[str, Any]:
    """`equivalence.diagnose` at some sites of a backbone, with random images."""
    model = backbones.load(**backbone)
    return {"diagnoses": [asdict(equivalence.diagnose(model, place)) for place in places]}


@records.versioned(2, name="apthory.equivalence_study.measure_gap")
def measure_gap(
    backbone: Mapping[str, Any],
    site: str,
    layer: str,
    shape: methods.Shape,
    norms: Sequence[float],
    num_images: int = 8,
    is_training: bool = False,
) -> dict[str, Any]:
    """`equivalence.distance_to_tuning` of a random prompt by its norm.

    With batch statistics (``is_training``), a channel prompt at the input of BatchNorm has no effect; the distance
    given as ``tuning`` is then from the shift of beta that equals the prompt under running statistics.
    """
    model = backbones.load(**backbone)
    x = _random_images(model.double(), num_images)
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(methods.prompt_shape(model, site, shape), generator=generator, dtype=torch.float64)
    prompt = methods.ActivationPrompt(site, delta, shape).requires_grad_(False)
    if not is_training:
        return {
            "gaps": [
                asdict(distance) for distance in equivalence.distance_to_tuning(model, prompt, layer, norms, images=x)
            ]
        }
    unit = prompt.relative_norm(sites.capture(model, [site], x)[site])
    norm_layer = model.get_submodule(layer)
    shift = equivalence.bias_shift(norm_layer, delta, edge="input") / unit
    distances = equivalence.distance_to_tuning(copy.deepcopy(model).train(), prompt, layer, norms, images=x)
    model.train()
    with torch.no_grad():
        plain = model(x)
        for index, distance in enumerate(distances):
            tuned = functional_call(model, {f"{layer}.bias": norm_layer.bias + distance.norm * shift}, (x,))
            distances[index] = equivalence.DistanceToTuning(
                **{**asdict(distance), "tuning": float((tuned - plain).norm() / plain.norm())}
            )
    return {"gaps": [asdict(distance) for distance in distances]}


@records.versioned(2, name="apthory.equivalence_study.measure_trajectories")
def measure_trajectories(
    backbone: Mapping[str, Any], task: str, layer: str, num_steps: int = 12, num_images: int = 6
) -> dict[str, Any]:
    """Training losses of a tied prompt, a full prompt and beta at one norm layer, from the same start (E6).

    The loss is cross-entropy under a fixed random head, in float64, of the same images at every step.

    Returns:
        By optimizer: the losses of the tied prompt at the layer's output and of beta, the largest relative
        difference of the two. Also a full prompt that is given its gradients along beta's path: its way (the mean
        over positions, times their number) divided by beta's, after every step; median over steps and channels, and
        the largest distance from it. Channels that no image switches on do not move, and are left out. For BatchNorm
        also a tied prompt at its input against beta at the matched rate.
    """
    model = backbones.load(**backbone)
    data = tasks.load(task, size=backbones.input_size(model))
    chosen = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(0))
    chosen = chosen[:num_images]
    images = backbones.normalize(model, data.train[chosen]).double()
    labels = data.train.labels[chosen]
    model = model.double()
    generator = torch.Generator().manual_seed(1)
    width = model(images[:1]).shape[1]
    head = torch.randn(width, len(data.classes), generator=generator, dtype=torch.float64) / width**0.5
    norm_layer, name = model.get_submodule(layer), f"{layer}.bias"

    def loss(features: Callable[[Tensor], Tensor]) -> Tensor:
        return nn.functional.cross_entropy(features(images) @ head, labels)

    def prompted(site: str, delta: Tensor, step: int) -> Tensor:
        with sites.edited(model, {site: lambda z: z + delta}):
            return loss(model)

    def tuned(beta: Tensor, step: int) -> Tensor:
        change = {name: norm_layer.bias + beta.flatten()}
        return loss(lambda x: functional_call(model, change, (x,)))

    output = sites.affine_output(model, layer)
    tied = torch.zeros(methods.prompt_shape(model, output, "channel"), dtype=torch.float64)
    full = torch.zeros(methods.prompt_shape(model, output), dtype=torch.float64)
    num_positions = full.numel() // tied.numel()
    positions = [axis for axis, size in enumerate(tied.shape) if size == 1]
    compared: dict[str, Any] = {}
    for optimizer, make in _OPTIMIZERS.items():
        by_prompt, _ = equivalence.descend(partial(prompted, output), tied, make, num_steps)
        by_beta, beta_path = equivalence.descend(tuned, tied, make, num_steps)
        places = torch.cat([tied[None], beta_path[:-1]])

        def followed(delta: Tensor, step: int, places: Tensor = places) -> Tensor:
            return prompted(output, places[step] + (delta - delta.detach()), step)

        _, full_path = equivalence.descend(followed, full, make, num_steps)
        way = full_path.mean([axis + 1 for axis in positions], keepdim=True)
        ratio = num_positions * way[beta_path != 0] / beta_path[beta_path != 0]
        compared[optimizer] = {
            "prompt": by_prompt,
            "beta": by_beta,
            "difference": equivalence.difference(by_prompt, by_beta),
            "mean_way_ratio": ratio.median(),
            "mean_way_spread": (ratio - ratio.median()).abs().max(),
        }
    if isinstance(norm_layer, nn.BatchNorm2d):
        make = _OPTIMIZERS["momentum"]
        rate = equivalence.matched_rate(norm_layer, 1.0, edge="input").view_as(tied)
        by_prompt, _ = equivalence.descend(partial(prompted, f"{layer}:input"), tied, make, num_steps)
        by_beta, _ = equivalence.descend(tuned, tied, make, num_steps, scale=rate)
        difference = equivalence.difference(by_prompt, by_beta)
        compared["momentum, input"] = {"prompt": by_prompt, "beta": by_beta, "difference": difference}
    return {"num_positions": num_positions, "optimizers": compared}


@records.versioned(2, name="apthory.equivalence_study.measure_trained")
def measure_trained(
    backbone: Mapping[str, Any],
    task: str,
    site: str,
    layer: str,
    shape: methods.Shape,
    learning_rate: float = 4e-3,
    num_epochs: int = 3,
    num_images: int = 8,
) -> dict[str, Any]:
    """Train a prompt and measure how far it is from tuning a norm layer, on test images."""
    model = backbones.load(**backbone)
    data = tasks.load(task, size=backbones.input_size(model))
    method = methods.ActivationPrompting(site=site, shape=shape)
    recipe = training.Recipe(num_epochs=num_epochs, precision="float32")
    [fit] = training.fit(model, data, method, [training.Configuration(learning_rate=learning_rate)], recipe=recipe)
    images = backbones.normalize(model, data.test[fit.split.test[:num_images]])
    prompt = cast(methods.ActivationPrompt, fit.prompt)
    [distance] = equivalence.distance_to_tuning(model, prompt, layer, [fit.relative_norm], images=images)
    return {"validation_accuracy": fit.validation_accuracy, **asdict(distance)}


def _random_images(model: nn.Module, num: int) -> Tensor:
    """Standard normal images, in float64."""
    side = backbones.input_size(model)
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
