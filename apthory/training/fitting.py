"""Training under the protocol: fit a bundle, tune on validation data, evaluate on the test part once."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from apthory import backbones
from apthory._tools.progress import progress
from apthory.heads import Heads, HeadSpec, LinearHead
from apthory.methods import Body, Method
from apthory.methods.pixels import Overlay
from apthory.tasks import Task
from apthory.training.bundle import NUM_CALIBRATION, Bundle
from apthory.training.cache import PrefixCache, chunks_of, run_prefix
from apthory.training.config import Configuration, Recipe
from apthory.training.results import Evaluation, Fit, load_stacked, restored_heads


def fit(
    backbone: nn.Module,
    task: Task,
    method: Method,
    configurations: Sequence[Configuration] | None = None,
    *,
    recipe: Recipe | None = None,
    head: HeadSpec | None = None,
    heads: Sequence[Fit] | None = None,
    cache: "PrefixCache | None" = None,
) -> list[Fit]:
    """Train a bundle of configurations; the test part is not touched.

    Args:
        backbone: Frozen; only the method's edits and the heads receive gradients, and a checksum holds it to that.
        configurations: One by default.
        head: The kind of head; a trained linear one by default. A label mapping or a text head on a `LinearProbe`
            leaves nothing to train, and every epoch gives the frozen model's own accuracy: one is enough.
        heads: Fits whose heads a method with a frozen head uses, one for each configuration.
        cache: Results of the same prefix from an earlier bundle on the same task, which this one extends.

    Raises:
        ValueError: If an argument is of another kind, a split leaves a class without training images, or no loss is
            ever finite.
        MemoryError: If even a single configuration does not fit; larger bundles are halved, with a warning.
    """
    if isinstance(configurations, Recipe | Configuration):
        raise ValueError(
            f"configurations is one {type(configurations).__name__}, and should be a list of Configuration; a recipe "
            "goes by its name: fit(backbone, task, method, recipe=...)"
        )
    if isinstance(method, type) or not hasattr(method, "build"):
        raise ValueError(f"method is {method!r}; expected a method such as ActivationPrompting(site=...) or VP()")
    if method.head not in ("trained", "frozen"):
        raise ValueError(
            f"the method's head is {method.head!r}; expected 'trained' or 'frozen'; other kinds go to fit(head=...)"
        )
    if head is not None and not isinstance(head, HeadSpec):
        raise ValueError(
            f"head is {head!r}; expected LinearHead(), LabelMapping(classifier, ...) or a TextHead (CLIP.text_head)"
        )
    configurations = [Configuration()] if configurations is None else list(configurations)
    recipe = recipe or Recipe()
    check_ready(backbone, task)
    split = task.split(configurations[0].seed, recipe.num_train, recipe.num_validation, recipe.num_test)
    if len(split.train) < min(len(split.validation), recipe.num_train or math.inf):
        warnings.warn(
            f"validation takes {len(split.validation)} of {len(task.train)} images and leaves {len(split.train)} to "
            f"train on; lower num_validation, now {recipe.num_validation}",
            stacklevel=2,
        )
    before = backbones.digest(backbone)
    with _deterministic(recipe.deterministic):
        fits = _fit_or_halve(backbone, task, method, configurations, recipe, head or LinearHead(), heads, cache)
    if backbones.digest(backbone) != before:
        raise RuntimeError("the frozen backbone changed during training; something else holds a reference to it")
    return fits


def check_ready(backbone: nn.Module, task: Task) -> None:
    """Raise ValueError unless the backbone is frozen and takes images of the task's size."""
    if not (isinstance(backbone, nn.Module) and isinstance(task, Task)):
        given = f"a {type(backbone).__name__} and a {type(task).__name__}"
        raise ValueError(f"expected a backbone (a module), then a task of load_task; got {given}")
    if backbone.training or any(parameter.requires_grad for parameter in backbone.parameters()):
        raise ValueError("the backbone is in train mode or its weights want gradients; call backbones.freeze(model)")
    side, expected = task.train.shape[-1], backbones.input_size(backbone)
    if side != expected:
        raise ValueError(
            f"the task's images are {side} pixels wide, the backbone takes {expected}; load the task with "
            f"size={expected}, or the backbone with input_size={side} (img_size={side} if it is a ViT)"
        )


def evaluate(task: Task, fits: Sequence[Fit]) -> list[Evaluation]:
    """Accuracy of trained configurations of one bundle on the task's test part. Use it once.

    Raises:
        ValueError: If they are not of one bundle, or were trained on another task's images or classes.
    """
    if isinstance(fits, Fit) or not fits:
        raise ValueError("evaluate takes a list of fits, at least one: evaluate(task, [fit])")
    first = fits[0]
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
    body, heads = _restore(first.backbone, fits)
    indices = first.split.test
    correct = []
    for chunk in chunks_of(indices, len(fits)):
        labels = task.test.labels[chunk]
        crossing = run_prefix(first.backbone, body.prefix, task.test, first.recipe.precision, chunk)
        with torch.no_grad():
            with backbones.autocast(first.backbone, first.recipe.precision):
                features = body.suffix(*(_repeat(z, len(fits)) for z in crossing))
            correct.append(heads(features).argmax(-1).cpu() == labels)
    table = torch.cat(correct, dim=1)
    return [Evaluation(accuracy=100 * int(row.sum()) / len(row), correct=row) for row in table]


def tune(
    backbone: nn.Module,
    task: Task,
    method: Method,
    *,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    recipe: Recipe | None = None,
    head: HeadSpec | None = None,
    heads: Sequence[Fit] | None = None,
    max_extensions: int = 2,
) -> list[Fit]:
    """The protocol: the first seed chooses the learning rate on validation data, then every seed is trained with it.

    A choice at the edge of the grid extends the grid by its own ratio, at most ``max_extensions`` times.

    Args:
        learning_rates: Ascending grid.
        seeds: Of subsample, split, head and order; all are trained with the rate that the first one chooses.
        recipe: Shared by all; the default one if left out, as in `fit`.
        head: The kind of head; a trained linear one by default.
        heads: Fits whose heads a method with a frozen head uses, one for each seed.

    Returns:
        One fit for each seed; none has seen the test part.

    Raises:
        ValueError: If there is no learning rate or no seed, and what `fit` raises.
    """
    if not len(learning_rates) or not len(seeds):
        raise ValueError(f"learning_rates is {learning_rates!r} and seeds {seeds!r}; expected one or more of each")
    rates = sorted(learning_rates)
    cache = PrefixCache()
    first_head = None if heads is None else heads[:1]

    def train(rates: Sequence[float]) -> list[Fit]:
        bundle = [Configuration(learning_rate=rate, seed=seeds[0]) for rate in rates]
        repeated = None if first_head is None else list(first_head) * len(bundle)
        return fit(backbone, task, method, bundle, recipe=recipe, head=head, heads=repeated, cache=cache)

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
    fits = [
        best,
        *fit(backbone, task, method, others, recipe=recipe, head=head, heads=heads and heads[1:], cache=cache),
    ]
    if lost := [one.configuration.seed for one in fits if not one.epoch]:
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
    head: HeadSpec,
    heads: Sequence[Fit] | None,
    cache: PrefixCache | None,
) -> list[Fit]:
    try:
        return _fit(backbone, task, method, configurations, recipe, head, heads, cache)
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
    parts = (configurations[:half], heads and heads[:half]), (configurations[half:], heads and heads[half:])
    halves = [_fit_or_halve(backbone, task, method, part, recipe, head, own, cache) for part, own in parts]
    return [one for half in halves for one in half]


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _fit(
    backbone: nn.Module,
    task: Task,
    method: Method,
    configurations: Sequence[Configuration],
    recipe: Recipe,
    head: HeadSpec,
    heads: Sequence[Fit] | None,
    cache: PrefixCache | None,
) -> list[Fit]:
    bundle = Bundle(backbone, task, method, configurations, recipe, heads, cache, head=head)
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

    def result(k: int) -> Fit:
        norm, relative_norm = _prompt_norm(states[k], bundle, k)
        return Fit(
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
            prompt_norm=norm,
            relative_norm=relative_norm,
            cache_bytes=bundle.cache_bytes,
            state=states[k],
            head_spec=head,
            head_shape=bundle.head_shape,
        )

    return [result(k) for k in range(num)]


def _restore(backbone: nn.Module, fits: Sequence[Fit]) -> tuple[Body, Heads]:
    """The bundle of these fits, ready for evaluation."""
    body = fits[0].method.build(backbone, len(fits))
    load_stacked(body.edits, [one.state for one in fits], "edits.")
    device = next(backbone.parameters()).device
    body.suffix.to(device)
    return body, restored_heads(fits).to(device)


def _order(indices: Int64[Tensor, " image"], seed: int, epoch: int) -> Int64[Tensor, " image"]:
    """The epoch's order of examples; depends on seed and epoch alone, so bundling cannot change it."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
    return indices[torch.randperm(len(indices), generator=generator)]


def _prompt_norm(state: dict[str, Tensor], bundle: Bundle, k: int) -> tuple[float, float]:
    """Norm over all units of what a prompt adds, and the same divided by the mean norm of the activations.

    Where it differs between images (AdaViPro), the mean over the training images that scales are read from.
    """
    if "edits.prompt.values" not in state:
        return 0.0, 0.0
    edit = bundle.body.edits["prompt"]
    if isinstance(edit, Overlay) and edit.masks is not None:
        overlay = bundle.method.build(bundle.backbone, 1).overlays[0].to(bundle.device)
        load_stacked(overlay, [state], "edits.prompt.")
        with backbones.autocast(bundle.backbone, bundle.recipe.precision):
            norm = float(overlay.added_norm(*bundle.source(bundle.splits[k].train[:NUM_CALIBRATION])))
    else:
        delta = state["edits.prompt.unit"][0] * state["edits.prompt.values"][0]
        norm = float(delta.expand(edit.unit_shape).norm())
    return norm, norm / float(state["edits.prompt.activation_norm"])


def _repeat(z: Tensor, num: int) -> Tensor:
    return z.unsqueeze(0).expand(num, *z.shape).flatten(0, 1)
