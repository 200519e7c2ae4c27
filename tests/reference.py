"""Slow and plain: what the fast code must agree with.

One configuration at a time, one forward pass of the whole backbone at every step, torch.optim's own optimizers,
edits by ordinary hooks or by other weights. Nothing is cached, stacked, cut or measured in clever units.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from apthory import methods, training
from apthory.tasks import Images, Task

CALIBRATION = 128  # training images whose root mean square is the unit of prompt and head


@dataclass
class Result:
    """What `training.fit` and `training.evaluate` report, found the slow way."""

    epoch: int = 0
    validation_accuracy: float = -1.0
    validation_loss: float = math.inf
    validation_curve: list[float] = field(default_factory=list)
    train_curve: list[float] = field(default_factory=list)
    correct: Tensor | None = None  # by test image, at the best epoch
    logits: Tensor | None = None
    prompt: Tensor | None = None


def fit(
    backbone: nn.Module, task: Task, method: Any, configuration: training.Configuration, recipe: training.Recipe
) -> Result:
    """Train one configuration and evaluate it at its best epoch."""
    split = task.split(configuration.seed, recipe.num_train, recipe.num_validation, recipe.num_test)
    some = normalized(backbone, task.train, split.train[:CALIBRATION])
    features_of, parameters, groups = _method(backbone, method, some)

    with torch.no_grad():
        unit = features_of(some).square().mean().sqrt()
    generator = torch.Generator().manual_seed(configuration.seed)
    width, num_classes = features_of(some[:1]).shape[1], len(task.classes)
    weight = nn.Parameter(0.01 * torch.randn(width, num_classes, generator=generator))
    bias = nn.Parameter(torch.zeros(num_classes))

    def logits_of(x: Tensor) -> Tensor:
        return (features_of(x) / unit) @ weight + bias

    head = {"params": [weight, bias], "lr": configuration.learning_rate}
    optimizer = make_optimizer([*groups(configuration.learning_rate), head], configuration.weight_decay, recipe)
    steps = math.ceil(len(split.train) / recipe.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule((step + 1) / (steps * recipe.num_epochs), recipe.warmup)
    )
    result = Result()
    for epoch in range(recipe.num_epochs):
        shuffle = torch.Generator().manual_seed(1_000_003 * (configuration.seed + 1) + epoch)
        order = split.train[torch.randperm(len(split.train), generator=shuffle)]
        total = 0.0
        for start in range(0, len(order), recipe.batch_size):
            batch = order[start : start + recipe.batch_size]
            logits = logits_of(normalized(backbone, task.train, batch))
            loss = functional.cross_entropy(logits, task.train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item() * len(batch)
        result.train_curve.append(total / len(order))
        with torch.no_grad():
            logits = logits_of(normalized(backbone, task.train, split.validation))
        labels = task.train.labels[split.validation]
        accuracy = 100 * float((logits.argmax(1) == labels).float().mean())
        loss = float(functional.cross_entropy(logits, labels))
        result.validation_curve.append(accuracy)
        if (accuracy, -loss) > (result.validation_accuracy, -result.validation_loss):
            result.epoch, result.validation_accuracy, result.validation_loss = epoch + 1, accuracy, loss
            with torch.no_grad():
                result.logits = logits_of(normalized(backbone, task.test, split.test))
            result.correct = result.logits.argmax(1) == task.test.labels[split.test]
            result.prompt = parameters["prompt"].detach().clone() if "prompt" in parameters else None
    return result


def schedule(progress: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if progress < warmup:
        return progress / warmup
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def make_optimizer(groups: list[dict], weight_decay: float, recipe: training.Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def normalized(backbone: nn.Module, images: Images, indices: Tensor) -> Tensor:
    """One image after the other, channel by channel."""
    config = backbone.pretrained_cfg
    rows = []
    for index in indices.tolist():
        pixels = images.pixels[index].double() / 255
        channels = [(pixels[c] - config["mean"][c]) / config["std"][c] for c in range(3)]
        rows.append(torch.stack(channels))
    return torch.stack(rows).float()


def forward(backbone: nn.Module, x: Tensor, edits: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
    """The whole backbone, with edits by one plain hook each."""
    handles = []
    for site, edit in edits.items():
        name, edge = site.rsplit(":", 1)
        module = backbone.get_submodule(name)
        if edge == "input":
            handles.append(module.register_forward_pre_hook(lambda _, args, edit=edit: (edit(args[0]), *args[1:])))
        else:
            handles.append(module.register_forward_hook(lambda _, args, out, edit=edit: edit(out)))
    try:
        return backbone(x)
    finally:
        for handle in handles:
            handle.remove()


def see(backbone: nn.Module, x: Tensor, site: str) -> Tensor:
    """The activation at a site."""
    seen = []
    with torch.no_grad():
        forward(backbone, x, {site: lambda z: seen.append(z.clone()) or z})
    return seen[0]


Groups = Callable[[float], list[dict]]


def _method(
    backbone: nn.Module, method: Any, some: Tensor
) -> tuple[Callable[[Tensor], Tensor], dict[str, Tensor], Groups]:
    """Features as a function of images, trained parameters, and the optimizer's groups for a learning rate."""
    match method:
        case methods.ActivationPrompting(site=site):
            z = see(backbone, some, site)
            shape = z.shape[1:] if method.shape == "full" else _channel_shape(z, method.site)
            unit = z.square().mean().sqrt() if method.in_rms_units else torch.tensor(1.0)
            values = nn.Parameter(torch.zeros(shape))
            parameters = {"prompt": values}
            groups = lambda rate: [{"params": [values], "lr": rate * method.lr_scale}]  # noqa: E731
            return lambda x: forward(backbone, x, {site: lambda z: z + unit * values}), parameters, groups
        case methods.NormTuning():
            return _norm_tuning(backbone, method)
        case methods.LinearProbe(site=":output"):
            return backbone, {}, lambda rate: []
        case methods.LinearProbe(site=site):
            # The layers tested here end in channels-first maps or in tokens.
            return lambda x: _mean_over_positions(see(backbone, x, site)), {}, lambda rate: []
        case methods.FineTuning():
            tuned = copy.deepcopy(backbone).requires_grad_(True)
            groups = lambda rate: [{"params": list(tuned.parameters()), "lr": rate * method.lr_scale}]  # noqa: E731
            return tuned, {}, groups
    raise ValueError(f"no reference for {method}")


def _channel_shape(z: Tensor, site: str) -> Sequence[int]:
    return (z.shape[1], 1, 1) if z.ndim == 4 else (1, z.shape[2])


def _mean_over_positions(z: Tensor) -> Tensor:
    return z.mean((2, 3)) if z.ndim == 4 else z.mean(1)


def _norm_tuning(backbone: nn.Module, method: methods.NormTuning) -> tuple[Callable, dict[str, Tensor], Groups]:
    """Gamma and beta themselves are replaced, as functions of what is trained."""
    from apthory import sites

    trained: dict[str, nn.Parameter] = {}
    originals = dict(backbone.named_parameters())
    layers = sites.norms_between(backbone, method.site)
    for layer in layers:
        for name, kinds in (("scale", ("gamma", "both")), ("shift", ("beta", "both"))):
            if method.parameters in kinds:
                trained[f"{layer} {name}"] = nn.Parameter(torch.zeros_like(originals[f"{layer}.weight"]))

    def features_of(x: Tensor) -> Tensor:
        weights = {}
        for layer in layers:
            gamma, beta = originals[f"{layer}.weight"], originals[f"{layer}.bias"]
            unit = (gamma.square() + beta.square()).mean().sqrt()
            scale, shift = (trained.get(f"{layer} {name}", torch.zeros(())) for name in ("scale", "shift"))
            weights[f"{layer}.weight"] = gamma * (1 + scale)
            weights[f"{layer}.bias"] = beta if method.parameters == "gamma" else beta * (1 + scale) + unit * shift
        return functional_call(backbone, weights, (x,))

    return features_of, trained, lambda rate: [{"params": list(trained.values()), "lr": rate * method.lr_scale}]


def paired_difference(first: Any, second: Any) -> float:
    """Mean over tasks of the mean over seeds of the difference of accuracies, in points."""
    by_task: dict[str, list[float]] = {}
    for _, one in first.iterrows():
        for _, other in second.iterrows():
            if (one["task"], one["seed"]) == (other["task"], other["seed"]):
                hits = [int(a) - int(b) for a, b in zip(one["correct"], other["correct"], strict=True)]
                by_task.setdefault(one["task"], []).append(100 * sum(hits) / len(hits))
    means = [sum(values) / len(values) for values in by_task.values()]
    return sum(means) / len(means)


__all__ = ["Result", "fit", "forward", "make_optimizer", "normalized", "paired_difference", "schedule", "see"]
