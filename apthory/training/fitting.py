"""Training under the protocol: fit a bundle, tune on validation data, evaluate on the test part once."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, overload

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from apthory import backbones
from apthory._tools import moved
from apthory._tools.progress import progress
from apthory.heads import Heads, HeadSpec, LinearHead
from apthory.methods import AdaptedBackbone, Method, PreparedBackbone
from apthory.tasks import Task
from apthory.training.bundle import NUM_CALIBRATION, Bundle
from apthory.training.cache import PrefixCache, chunks_of, run_prefix
from apthory.training.config import Configuration, Recipe
from apthory.training.prediction import logits
from apthory.training.results import Evaluation, Fit, FrozenHead, Head, restored_heads


@overload
def fit(
    backbone: nn.Module,
    task: Task,
    method: Method,
    configurations: Configuration | None = None,
    *,
    recipe: Recipe | None = None,
    head: Head | None = None,
    heads: Sequence[Fit] | None = None,
    cache: PrefixCache | None = None,
) -> Fit: ...
@overload
def fit(
    backbone: nn.Module,
    task: Task,
    method: Method,
    configurations: Sequence[Configuration],
    *,
    recipe: Recipe | None = None,
    head: Head | None = None,
    heads: Sequence[Fit] | None = None,
    cache: PrefixCache | None = None,
) -> list[Fit]: ...


def fit(
    backbone: nn.Module,
    task: Task,
    method: Method,
    configurations: Configuration | Sequence[Configuration] | None = None,
    *,
    recipe: Recipe | None = None,
    head: Head | None = None,
    heads: Sequence[Fit] | None = None,
    cache: PrefixCache | None = None,
) -> Fit | list[Fit]:
    """Train one configuration, or a bundle of several together; the test part is not touched.

    Args:
        backbone: Frozen; only the method's edits and the heads receive gradients, and a checksum holds it to that.
        task: What to learn; its images have the size that the backbone takes.
        method: What is trained beside the head.
        configurations: One, or a list of those that are trained together; the default one if left out.
        recipe: Shared by all; the default one if left out.
        head: What stands on the features; a trained linear layer by default. A label mapping or a text head on a
            `LinearProbe` leaves nothing to train, and every epoch gives the frozen model's own accuracy: one is enough.
            `FrozenHead(fits)` holds earlier heads still.
        heads: The old way to give what is now ``head=FrozenHead(fits)``.
        cache: Results of the same prefix from an earlier bundle on the same task, which this one extends.

    Returns:
        One fit for one configuration, a list of them for a list.

    Raises:
        ValueError: If an argument is of another kind, a split leaves a class without training images, or no loss is
            ever finite.
        MemoryError: If even a single configuration does not fit; larger bundles are halved, with a warning.
    """
    if isinstance(configurations, Recipe):
        raise ValueError(
            "configurations is a Recipe, and should be a Configuration or a list of them; a recipe goes by its name: "
            "fit(backbone, task, method, recipe=...)"
        )
    if isinstance(method, Method) and (lacking := [field for field in ("name", "site") if not hasattr(method, field)]):
        raise ValueError(
            f"{type(method).__name__} has no {lacking[0]}; a method has a name (a ClassVar) and a site (a field or a "
            "ClassVar), as methods.Method says"
        )
    if not isinstance(method, Method):
        raise ValueError(f"method is {method!r}; expected a method such as ActivationPrompting(site=...) or VP()")
    if heads is not None:
        moved.warn_of_old_name("the argument heads of fit", "head=FrozenHead(fits)")
        _refuse_other_kind(head, heads)
        head = FrozenHead(heads)
    if head is not None and not isinstance(head, HeadSpec | FrozenHead):
        raise ValueError(
            f"head is {head!r}; expected LinearHead(), LabelMapping(classifier, ...), FrozenHead(fits) or a TextHead "
            "(CLIP.text_head)"
        )
    configurations = Configuration() if configurations is None else configurations
    is_single = isinstance(configurations, Configuration)
    bundle = [configurations] if isinstance(configurations, Configuration) else list(configurations)
    if not bundle:
        raise ValueError("configurations is empty; give one or more, or leave it out for the default one")
    recipe = recipe or Recipe()
    check_ready(backbone, task)
    split = task.split(bundle[0].seed, recipe.num_train, recipe.num_validation, recipe.num_test)
    if len(split.train) < min(len(split.validation), recipe.num_train or math.inf):
        warnings.warn(
            f"validation takes {len(split.validation)} of {len(task.train)} images and leaves {len(split.train)} to "
            f"train on; lower num_validation, now {recipe.num_validation}",
            stacklevel=2,
        )
    before = backbones.digest(backbone)
    with _deterministic(recipe.deterministic):
        fits = _fit_or_halve(backbone, task, method, bundle, recipe, head or LinearHead(), cache)
    if backbones.digest(backbone) != before:
        raise RuntimeError("the frozen backbone changed during training; something else holds a reference to it")
    return fits[0] if is_single else fits


def _refuse_other_kind(head: Any, fits: Sequence[Fit]) -> None:
    """The old pair of arguments had to name the same kind of head twice."""
    wanted = type(head or LinearHead()).__name__
    if wanted != (kind := type(FrozenHead(fits).spec).__name__):
        raise ValueError(f"the fits in heads= have a {kind}; head= asks for a {wanted}")


def check_ready(backbone: nn.Module, task: Task) -> None:
    """Raise ValueError unless the backbone is frozen and takes images of the task's size."""
    if not (isinstance(backbone, nn.Module) and isinstance(task, Task)):
        given = f"a {type(backbone).__name__} and a {type(task).__name__}"
        raise ValueError(f"expected a backbone (a module), then a task of load_task; got {given}")
    if backbone.training or any(parameter.requires_grad for parameter in backbone.parameters()):
        raise ValueError("the backbone is in train mode or its weights want gradients; call backbones.freeze(model)")
    if classifier := backbones.carried_classifier(backbone):
        warnings.warn(
            f"the backbone still ends in its classifier {classifier!r}, whose logits are taken for features; load it "
            f"with num_classes=0, or put nn.Identity() in the place of {classifier!r}",
            stacklevel=3,
        )
    check_image_size(backbone, task)


def check_image_size(backbone: nn.Module, task: Task) -> None:
    """Raise ValueError unless the task's images have the size that the backbone takes."""
    side, expected = task.train.shape[-1], backbones.input_size(backbone)
    if side != expected:
        raise ValueError(
            f"the task's images are {side} pixels wide, the backbone takes {expected}; load the task with "
            f"size={expected}, or the backbone with input_size={side} (img_size={side} if it is a ViT)"
        )


@overload
def evaluate(fits: Fit | AdaptedBackbone, task: Task) -> Evaluation: ...
@overload
def evaluate(fits: Sequence[Fit], task: Task) -> list[Evaluation]: ...


def evaluate(fits: Any, task: Any) -> Evaluation | list[Evaluation]:
    """Accuracy and recall on the task's test part. Use it once.

    Args:
        fits: One fit, a list of fits of one bundle, or a model as `load_prompt` gives it, which is evaluated on all
            test images.
        task: The one that they were trained on.

    Returns:
        One evaluation, or a list of them for a list.

    Raises:
        ValueError: If the fits are not of one bundle, or were trained on another task's images or classes.
    """
    if isinstance(fits, Task):  # up to version 0.1 the task came first
        moved.warn_of_old_name("evaluate(task, fits)", "evaluate(fits, task)")
        return _evaluate([task] if isinstance(task, Fit) else task, fits)
    if isinstance(fits, AdaptedBackbone):
        return _evaluate_model(fits, task)
    if isinstance(fits, Fit):
        return _evaluate([fits], task)[0]
    if isinstance(fits, str) or not isinstance(fits, Sequence) or not fits or not isinstance(fits[0], Fit):
        raise ValueError(f"fits is {fits!r}; expected a fit, a list of at least one, or a model of load_prompt")
    return _evaluate(fits, task)


def _evaluate(fits: Sequence[Fit], task: Task) -> list[Evaluation]:
    first = fits[0]
    check_image_size(first.backbone, task)
    recipe = first.recipe
    split = task.split(first.configuration.seed, recipe.num_train, recipe.num_validation, recipe.num_test)
    if len(task.classes) != first.head_shape[1] or split.digest != first.split.digest:
        raise ValueError(
            f"the fits were not trained on {task.name!r} ({len(task.classes)} classes): they have "
            f"{first.head_shape[1]} classes and another split; evaluate them on their own task"
        )
    for other in fits[1:]:
        same_run = all(getattr(other, name) == getattr(first, name) for name in ("method", "recipe", "head_spec"))
        if not same_run or other.backbone is not first.backbone or not torch.equal(other.split.test, first.split.test):
            raise ValueError(
                "the fits differ in backbone, method, head, recipe or test part; evaluate them one bundle at a time"
            )
    prepared, heads = _restore(first.backbone, fits)
    indices = first.split.test
    correct = []
    for chunk in chunks_of(indices, len(fits)):
        labels = task.test.labels[chunk]
        crossing = run_prefix(first.backbone, prepared.prefix, task.test, first.recipe.precision, chunk)
        with torch.no_grad():
            with backbones.autocast(first.backbone, first.recipe.precision):
                features = prepared.suffix(*(_repeat(z, len(fits)) for z in crossing))
            correct.append(heads(features).argmax(-1).cpu() == labels)
    labels = task.test.labels[indices]
    return [Evaluation.of(row, labels, len(task.classes)) for row in torch.cat(correct, dim=1)]


def _evaluate_model(model: AdaptedBackbone, task: Task) -> Evaluation:
    check_ready(model.backbone, task)
    if not model.classes:
        raise ValueError("the model does not say which classes its logits stand for; set model.classes = task.classes")
    if model.head is None or tuple(task.classes) != tuple(model.classes):
        raise ValueError(
            f"the model knows the classes {', '.join(model.classes)}, and {task.name!r} has {', '.join(task.classes)}; "
            "evaluate it on the task that it was trained on"
        )
    correct = []
    for chunk in chunks_of(torch.arange(len(task.test))):
        correct.append(logits(model, task.test[chunk]).argmax(1) == task.test.labels[chunk])
    return Evaluation.of(torch.cat(correct), task.test.labels, len(task.classes))


def tune(
    backbone: nn.Module,
    task: Task,
    method: Method,
    *,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    recipe: Recipe | None = None,
    head: Head | None = None,
    heads: Sequence[Fit] | None = None,
    max_extensions: int = 2,
) -> list[Fit]:
    """The protocol: the first seed chooses the learning rate on validation data, then every seed is trained with it.

    A choice at the edge of the grid extends the grid by its own ratio, at most ``max_extensions`` times.

    Args:
        learning_rates: Ascending grid.
        seeds: Of subsample, split, head and order; all are trained with the rate that the first one chooses.
        recipe: Shared by all; the default one if left out, as in `fit`.
        head: As in `fit`; a `FrozenHead` has one fit for each seed.
        heads: The old way to give what is now ``head=FrozenHead(fits)``.
        max_extensions: How often the grid may be extended.

    Returns:
        One fit for each seed; none has seen the test part.

    Raises:
        ValueError: If there is no learning rate or no seed, and what `fit` raises.
    """
    if not len(learning_rates) or not len(seeds):
        raise ValueError(f"learning_rates is {learning_rates!r} and seeds {seeds!r}; expected one or more of each")
    if heads is not None:
        moved.warn_of_old_name("the argument heads of tune", "head=FrozenHead(fits)")
        _refuse_other_kind(head, heads)
        head = FrozenHead(heads)
    if isinstance(head, FrozenHead) and len(head.fits) != len(seeds):
        raise ValueError(f"FrozenHead has {len(head.fits)} fits for {len(seeds)} seeds; give one for each")
    rates = sorted(learning_rates)
    cache = PrefixCache()

    def train(rates: Sequence[float]) -> list[Fit]:
        bundle = [Configuration(learning_rate=rate, seed=seeds[0]) for rate in rates]
        own = FrozenHead([head.fits[0]] * len(bundle)) if isinstance(head, FrozenHead) else head
        return fit(backbone, task, method, bundle, recipe=recipe, head=own, cache=cache)

    tried = train(rates)
    for _ in range(max_extensions if len(rates) > 1 else 0):
        rate = choose(tried).configuration.learning_rate
        if rate == rates[0]:
            rates.insert(0, rates[0] ** 2 / rates[1])
            tried += train(rates[:1])
        elif rate == rates[-1]:
            rates.append(rates[-1] ** 2 / rates[-2])
            tried += train(rates[-1:])
        else:
            break
    best = choose(tried)
    if not best.epoch:
        raise ValueError(f"no learning rate of {rates} gave a finite loss for seed {seeds[0]}; choose lower rates")
    others = [replace(best.configuration, seed=seed) for seed in seeds[1:]]
    if not others:
        return [best]
    rest = FrozenHead(head.fits[1:]) if isinstance(head, FrozenHead) else head
    fits = [best, *fit(backbone, task, method, others, recipe=recipe, head=rest, cache=cache)]
    if lost := [fit.configuration.seed for fit in fits if not fit.epoch]:
        raise ValueError(f"the loss was never finite for the seeds {lost} at {best.configuration}; choose lower rates")
    return fits


def choose(fits: Sequence[Fit]) -> Fit:
    """The fit with the highest validation accuracy; ties go to the lower validation loss."""
    return max(fits, key=lambda fit: (fit.validation_accuracy, -fit.validation_loss))


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _fit_or_halve(
    backbone: nn.Module,
    task: Task,
    method: Method,
    configurations: Sequence[Configuration],
    recipe: Recipe,
    head: Head,
    cache: PrefixCache | None,
) -> list[Fit]:
    try:
        return _fit(backbone, task, method, configurations, recipe, head, cache)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        if len(configurations) == 1:
            raise MemoryError(
                f"one configuration of {method} does not fit the memory; use a smaller recipe.batch_size "
                f"(now {recipe.batch_size}), fewer training images, or recipe.cache=False"
            ) from error
        reason = str(error).splitlines()[0]
    half = len(configurations) // 2
    warnings.warn(
        f"a bundle of {len(configurations)} configurations does not fit the memory ({reason}); halved", stacklevel=3
    )
    fits = []
    for part in (slice(None, half), slice(half, None)):
        own = head[part] if isinstance(head, FrozenHead) else head
        fits += _fit_or_halve(backbone, task, method, configurations[part], recipe, own, cache)
    return fits


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _fit(
    backbone: nn.Module,
    task: Task,
    method: Method,
    configurations: Sequence[Configuration],
    recipe: Recipe,
    head: Head,
    cache: PrefixCache | None,
) -> list[Fit]:
    bundle = Bundle(backbone, task, method, configurations, recipe, cache, head=head)
    num, num_train = len(configurations), len(bundle.splits[0].train)
    steps = math.ceil(num_train / recipe.batch_size)
    if recipe.num_epochs * steps == 1 and bundle.optimizer.parameters:
        warnings.warn(
            f"one step is all of an epoch of {num_train} images in batches of {recipe.batch_size}, and the last step "
            "of the schedule has rate zero: what follows it is not trained; take more epochs or a smaller batch_size",
            stacklevel=4,
        )
    curves: list[tuple[list[float], list[float]]] = [([], []) for _ in configurations]
    best = [(0.0, -math.inf, 0)] * num  # accuracy, minus loss, epoch; nothing counts until a loss is finite
    states = [bundle.state(k) for k in range(num)]
    for epoch in progress(range(recipe.num_epochs), desc=f"{task.name} {method.name} {method.site} x{num}"):
        orders = [_order(split.train, c.seed, epoch) for split, c in zip(bundle.splits, configurations, strict=True)]
        totals = torch.zeros(num)
        bundle.begin_epoch(epoch)
        for step in range(steps):
            chunks = [order[step * recipe.batch_size : (step + 1) * recipe.batch_size] for order in orders]
            done = (epoch * steps + step + 1) / (recipe.num_epochs * steps)
            totals += bundle.step(chunks, done).cpu() * (len(chunks[0]) / num_train)
        for k, (accuracy, loss) in enumerate(zip(*bundle.validate(), strict=True)):
            curves[k][0].append(float(totals[k]))
            curves[k][1].append(accuracy)
            if math.isfinite(loss) and (accuracy, -loss) > best[k][:2]:
                best[k] = (accuracy, -loss, epoch + 1)
                states[k] = bundle.state(k)
        bundle.heads.end_epoch()
    if not any(epoch for *_, epoch in best):
        rates = ", ".join(f"{c.learning_rate:g}" for c in configurations)
        raise ValueError(f"no configuration (learning rates {rates}) ever had a finite loss; choose lower rates")

    norms = _prompt_norms(bundle, [edits for edits, _ in states])
    return [
        Fit(
            backbone=backbone,
            method=method,
            configuration=configurations[k],
            recipe=recipe,
            split=bundle.splits[k],
            epoch=best[k][2],
            validation_accuracy=best[k][0],
            validation_loss=-best[k][1],
            validation_curve=tuple(curves[k][1]),
            train_curve=tuple(curves[k][0]),
            prompt_norm=norms[k][0],
            relative_norm=norms[k][0] / norms[k][1],
            cache_bytes=bundle.cache_bytes,
            state=states[k][0],
            head_state=states[k][1],
            head_spec=bundle.head_spec,
            head_shape=bundle.head_shape,
            classes=tuple(task.classes),
            transform=task.transform,
        )
        for k in range(num)
    ]


def _restore(backbone: nn.Module, fits: Sequence[Fit]) -> tuple[PreparedBackbone, Heads]:
    """The bundle of these fits, ready for evaluation."""
    prepared = fits[0].method.build(backbone, len(fits))
    prepared.load([fit.state for fit in fits])
    device = next(backbone.parameters()).device
    prepared.suffix.to(device)
    return prepared, restored_heads(fits).to(device)


def _order(indices: Int64[Tensor, " image"], seed: int, epoch: int) -> Int64[Tensor, " image"]:
    """The epoch's order of examples; depends on seed and epoch alone, so bundling cannot change it."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
    return indices[torch.randperm(len(indices), generator=generator)]


def _prompt_norms(bundle: Bundle, states: Sequence[dict[str, Tensor]]) -> list[tuple[float, float]]:
    """Of each configuration: norm of what its prompt adds, and mean norm of what it is added to."""
    bundle.prepared.load(states)
    some_of = [partial(bundle.source, split.train[:NUM_CALIBRATION]) for split in bundle.splits]
    with backbones.autocast(bundle.backbone, bundle.recipe.precision):
        return [bundle.prepared.prompt_norm(k, activations) for k, activations in enumerate(some_of)]


def _repeat(z: Tensor, num: int) -> Tensor:
    return z.unsqueeze(0).expand(num, *z.shape).flatten(0, 1)
