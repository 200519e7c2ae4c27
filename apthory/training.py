"""One training loop for every method: a cached frozen prefix, and a bundle of configurations trained together.

The configurations of a bundle (learning rate, weight decay, seed) share backbone, task, method and kind of head. The
frozen prefix runs once for every image; after it each step feeds the suffix one batch that stacks a batch of every
configuration. What is random (augmentation of images, Gumbel noise) lies after the cut and is drawn from each
configuration's own generator in training steps alone, so the cache stays exact. Validation data chooses epoch and
configuration; the test part is used by `evaluate` alone.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from apthory import backbones, prompts
from apthory.heads import Heads, HeadSpec, LinearHead
from apthory.methods import Body, Method, relative_rate
from apthory.pixels import Overlay, PixelPrompt
from apthory.progress import progress
from apthory.tasks import Images, Split, Task

_CHUNK = 64  # images that the prefix and evaluations see at once; more fall out of the processor's cache
_CALIBRATION = 128  # training images from which scales are read


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What may differ within a bundle."""

    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    seed: int = 0  # subsample, validation split, initial head and order of examples

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or self.weight_decay < 0 or self.seed < 0:
            raise ValueError(f"{self}: the learning rate is positive, weight decay and seed are not negative")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a bundle shares."""

    num_epochs: int = 10
    batch_size: int = 32  # examples of each configuration in a step
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9  # of sgd
    warmup: float = 0.1  # share of all steps with a rising learning rate, before the cosine
    num_train: int | None = 400  # at most so many images; None for all
    num_validation: int | None = 100  # held out of the train part
    num_test: int | None = 500
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the hardware has it
    deterministic: bool = False  # refuse kernels whose results may vary from run to run
    cache: bool = True  # keep the prefix's result; False computes it anew at every step

    def __post_init__(self) -> None:
        if self.num_epochs < 1 or self.batch_size < 1:
            raise ValueError(f"num_epochs is {self.num_epochs} and batch_size {self.batch_size}; both are at least 1")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; it is a share of all steps, from 0 to below 1")
        if self.num_validation == 0:
            raise ValueError("num_validation is 0, but validation images choose epoch and configuration; hold some out")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One trained configuration, at the epoch that was best on validation data."""

    backbone: nn.Module = field(repr=False)
    method: Method
    configuration: Configuration
    recipe: Recipe
    split: Split = field(repr=False)
    epoch: int  # counted from 1
    validation_accuracy: float  # percent, at that epoch
    validation_loss: float
    validation_curve: tuple[float, ...]  # percent, by epoch
    train_curve: tuple[float, ...]  # mean cross-entropy, by epoch
    prompt_norm: float  # Euclidean norm of the prompt, in the activation's units; 0 without a prompt
    relative_norm: float  # prompt_norm divided by the mean norm of the activations
    cache_bytes: int  # memory that the prefix's results took
    state: dict[str, Tensor] = field(repr=False)
    head_spec: HeadSpec  # the kind of head
    head_shape: tuple[int, int]  # features and classes

    @property
    def prompt(self) -> prompts.ActivationPrompt | PixelPrompt:
        """The trained prompt, in the units of the activation."""
        if "edits.prompt.values" not in self.state:
            raise ValueError(f"the method {self.method.name!r} has no prompt")
        overlays = self.method.build(self.backbone, 1).overlays if self.method.site == ":input" else []
        if overlays:
            _load(overlays[0], [self.state], "edits.prompt.")
            return PixelPrompt(overlays[0]).requires_grad_(False)
        delta = self.state["edits.prompt.unit"][0] * self.state["edits.prompt.values"][0]
        return prompts.ActivationPrompt(self.method.site, delta, self.method.shape).requires_grad_(False)

    @property
    def head(self) -> nn.Module:
        """The head as an ordinary module on the backbone's features."""
        return _restored_heads([self]).cpu().export(0)

    @property
    def model(self) -> prompts.PromptedBackbone:
        """Backbone, prompt and head as one module that maps normalized images to logits."""
        device = next(self.backbone.parameters()).device
        return prompts.PromptedBackbone(self.backbone, self.prompt, self.head).to(device)

    def save(self, path: str | Path) -> Path:
        """Write prompt and head, without the backbone; `apthory.load_prompt` reads them back."""
        return prompts.save(path, self.prompt, self.backbone, self.head)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A trained configuration on the test part."""

    accuracy: float  # percent
    correct: Bool[Tensor, " image"]  # by test image, in the order of the split


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
    for chunk in _chunks(indices, len(fits)):
        labels = task.test.labels[chunk]
        crossing = run_prefix(first.backbone, body.prefix, task.test, first.recipe.precision, chunk)
        with torch.no_grad():
            with autocast(first.backbone, first.recipe.precision):
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


class PrefixCache:
    """Results of a frozen prefix, by training image; exact, since nothing before the cut is trained or random."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.parts: list[Tensor] = []
        self.is_channels_last: list[bool] = []
        self.owner: tuple[object, ...] = ()  # what the results belong to

    @property
    def num_bytes(self) -> int:
        """Memory that the results take."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    def extend(
        self, backbone: nn.Module, prefix: nn.Module, images: Images, indices: Int64[Tensor, " image"], precision: str
    ) -> None:
        """Run the prefix on the images that are not in the cache yet.

        Raises:
            ValueError: If the cache holds results of another prefix, of other images or in another precision.
        """
        owner = (id(backbone), getattr(prefix, "code", type(prefix)), id(images), precision)
        if self.owner and self.owner != owner:
            raise ValueError("the cache holds the results of another prefix, task or precision; start with a new one")
        self.owner = owner
        new = [index for index in indices.unique().tolist() if index not in self.rows]
        if not new:
            return
        chunks = [run_prefix(backbone, prefix, images, precision, c) for c in _chunks(torch.tensor(new))]
        is_channels_last = [_is_channels_last(z) for z in chunks[0]]
        parts = []
        for index, flag in enumerate(is_channels_last):
            # Channels go last in storage, so that picking rows keeps the layout that convolutions want.
            pieces = [chunk[index].movedim(1, -1) if flag else chunk[index] for chunk in chunks]
            parts.append(torch.cat([self.parts[index], *pieces] if self.rows else pieces))
        # Assigned at the end, all at once: running out of memory on the way leaves the cache as it was.
        self.parts, self.is_channels_last = parts, is_channels_last
        self.rows = self.rows | {index: len(self.rows) + place for place, index in enumerate(new)}

    def get(self, indices: Int64[Tensor, " image"]) -> list[Tensor]:
        """The crossing tensors of some images, in the order asked for."""
        rows = torch.tensor([self.rows[index] for index in indices.tolist()], device=self.parts[0].device)
        picked = [part.index_select(0, rows) for part in self.parts]
        return [z.movedim(-1, 1) if flag else z for z, flag in zip(picked, self.is_channels_last, strict=True)]


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def autocast(backbone: nn.Module, precision: str) -> AbstractContextManager:
    """Mixed precision as a recipe asks for it; ``auto`` means bfloat16 where the hardware computes in it."""
    device = next(backbone.parameters()).device.type
    has_bfloat16 = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    wanted = precision == "bfloat16" or (precision == "auto" and has_bfloat16)
    return torch.autocast(device, torch.bfloat16, enabled=wanted)


# ------------------------------------------------------------------------------------------ inside a bundle


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


_Source = Callable[[Int64[Tensor, " image"]], list[Tensor]]


class Bundle:
    """Configurations in training: the prefix's results, the suffix with the stacked edits, heads and optimizer."""

    def __init__(
        self,
        backbone: nn.Module,
        task: Task,
        method: Method,
        configurations: Sequence[Configuration],
        recipe: Recipe,
        heads: Sequence[Fit] | None = None,
        cache: "PrefixCache | None" = None,
        *,
        head: HeadSpec | None = None,
    ) -> None:
        self.backbone, self.task, self.method, self.recipe = backbone, task, method, recipe
        self.configurations = configurations
        sizes = (recipe.num_train, recipe.num_validation, recipe.num_test)
        self.splits = [task.split(c.seed, *sizes) for c in configurations]
        self.device = next(backbone.parameters()).device
        self.body = method.build(backbone, len(configurations))
        self.body.start([c.seed for c in configurations])
        self.body.suffix.to(self.device)
        self.source, self.cache_bytes = self._make_source(cache)
        self.heads, self.head_shape = self._start(head or LinearHead())
        if method.head == "frozen":
            if heads is None or len(heads) != len(configurations):
                num = len(configurations)
                raise ValueError(f"a frozen head needs heads=, one fit for each of the {num} configurations")
            found, wanted = {type(one.head_spec).__name__ for one in heads}, type(head or LinearHead()).__name__
            if found != {wanted}:
                raise ValueError(
                    f"the fits in heads= have a {' and a '.join(sorted(found))}; head= asks for a {wanted}"
                )
            _load(self.heads, [one.state for one in heads], "heads.")
            self.heads.requires_grad_(False)
        self.optimizer = _Optimizer(self.body, self.heads, method, configurations, recipe)

    def begin_epoch(self, epoch: int) -> None:
        """Move schedules by epoch on; epochs count from 0."""
        self.body.begin_epoch(epoch, self.recipe.num_epochs)

    def step(self, chunks: Sequence[Int64[Tensor, " image"]], done: float) -> Float[Tensor, " num"]:
        """One update of every configuration; its losses before the update.

        Args:
            chunks: Train images of each configuration.
            done: Share of all steps that are done after this one.
        """
        labels = torch.stack([self.task.train.labels[chunk] for chunk in chunks]).to(self.device)
        crossing = self.source(torch.cat(list(chunks)))
        with autocast(self.backbone, self.recipe.precision), self.body.drawing():
            features = self.body.suffix(*crossing)
        by_configuration = losses(self.heads(features), labels)
        self.heads.observe(features.detach(), labels)
        if self.optimizer.has_work:
            by_configuration.sum().backward()
            self.optimizer.step(done)
        return by_configuration.detach()

    @torch.no_grad()
    def validate(self) -> tuple[list[float], list[float]]:
        """Accuracy in percent and mean cross-entropy of every configuration on its validation images."""
        indices = torch.stack([split.validation for split in self.splits])
        hits, totals = torch.zeros(len(indices), dtype=torch.long), torch.zeros(len(indices))
        for chunk in _chunks(indices, len(indices)):
            crossing = self.source(chunk.flatten())
            with autocast(self.backbone, self.recipe.precision):
                features = self.body.suffix(*crossing)
            logits = self.heads(features).cpu()
            labels = self.task.train.labels[chunk]
            hits += (logits.argmax(-1) == labels).sum(1)
            totals += losses(logits, labels) * chunk.shape[1]
        accuracies = [100 * count / indices.shape[1] for count in hits.tolist()]
        return accuracies, (totals / indices.shape[1]).tolist()

    def state(self, k: int) -> dict[str, Tensor]:
        """A copy of the parameters and units of one configuration, as a bundle of one."""
        state = {f"heads.{name}": value[k : k + 1].clone() for name, value in self.heads.state_dict().items()}
        for name, value in self.body.edits.state_dict().items():
            if not name.startswith("weights."):
                state[f"edits.{name}"] = value[k : k + 1].clone()
            elif name.startswith(f"weights.{k}."):
                state[f"edits.weights.0.{name.removeprefix(f'weights.{k}.')}"] = value.clone()
        return {name: value.cpu() for name, value in state.items()}

    def _make_source(self, cache: "PrefixCache | None") -> tuple[_Source, int]:
        arguments = (self.backbone, self.body.prefix, self.task.train)
        wanted = torch.cat([torch.cat([split.train, split.validation]) for split in self.splits])
        if not self.recipe.cache:
            self.task.train.decode(wanted.tolist())  # from front to back: batches will want them in random order
            return partial(run_prefix, *arguments, self.recipe.precision), 0
        cache = PrefixCache() if cache is None else cache
        cache.extend(*arguments, wanted, self.recipe.precision)
        return cache.get, cache.num_bytes

    def _start(self, spec: HeadSpec) -> tuple[Heads, tuple[int, int]]:
        """Initial heads, and the scale of activations and features on some training images."""
        with self.body.calibrating():
            features = self._features([split.train[:_CALIBRATION] for split in self.splits])
        if "prompt" in self.body.edits and not self.body.edits["prompt"].activation_norm.all():
            raise ValueError(f"the activation at {self.method.site!r} is zero, so a prompt has no scale; take another")
        generators = [torch.Generator().manual_seed(c.seed) for c in self.configurations]
        shape = (features.shape[1], len(self.task.classes))
        heads = spec.build(len(generators), *shape, generators).to(self.device)
        chosen = torch.stack([split.train[: heads.num_start] for split in self.splits])
        if heads.num_start != _CALIBRATION or heads.starts_unprompted:
            see = self._unprompted if heads.starts_unprompted else self._features
            parts = [see(list(part)) for part in _chunks(chosen, len(chosen))]
            parts = [part.unflatten(0, (len(chosen), -1)) for part in parts]
            features = torch.cat(parts, dim=1).flatten(0, 1)
        heads.start(features, self.task.train.labels[chosen].to(self.device))
        return heads, shape

    @torch.no_grad()
    def _features(self, images: Sequence[Int64[Tensor, " image"]]) -> Float[Tensor, "stack width"]:
        """Of each configuration's own images, before training."""
        crossing = self.source(torch.cat(list(images)))
        with autocast(self.backbone, self.recipe.precision):
            return self.body.suffix(*crossing).float()

    def _unprompted(self, images: Sequence[Int64[Tensor, " image"]]) -> Float[Tensor, "stack width"]:
        """The same of the backbone by itself."""
        arguments = (self.task.train, self.recipe.precision, torch.cat(list(images)))
        [features] = run_prefix(self.backbone, _Whole(self.backbone), *arguments)
        return features.float()


class _Whole(nn.Module):
    """A backbone in the form of a prefix."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> tuple[Tensor]:
        return (self.backbone(x),)


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


class _Optimizer:
    """AdamW, or SGD with momentum, with a learning rate and a weight decay for each configuration of the bundle.

    The updates are torch.optim's own; those take one learning rate for a whole stacked parameter, hence this class.
    Edits with an update rule of their own follow it instead.
    """

    def __init__(
        self,
        body: Body,
        heads: Heads,
        method: Method,
        configurations: Sequence[Configuration],
        recipe: Recipe,
    ) -> None:
        trained = [*body.edits.parameters(), *heads.parameters()]
        device = trained[0].device if trained else None
        rates = torch.tensor([c.learning_rate for c in configurations], device=device)
        decays = torch.tensor([c.weight_decay for c in configurations], device=device)
        self.recipe = recipe
        self.parameters: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        own_rule = [overlay for overlay in body.overlays if overlay.normalization is not None]
        self.own: list[tuple[Overlay, Tensor]] = [(overlay, rates * method.rate) for overlay in own_rule]
        for name, parameter in body.edits.named_parameters():
            if any(parameter is value for overlay in own_rule for value in overlay.parameters()):
                continue
            if name.startswith("weights."):  # one network for each configuration
                k = int(name.split(".")[1])
                self.parameters.append((parameter, rates[k] * relative_rate(method, name), decays[k]))
            else:
                self._add_stacked(parameter, rates * relative_rate(method, name), decays)
        for parameter in heads.parameters():
            if parameter.requires_grad:
                self._add_stacked(parameter, rates, decays)
        zeros = [torch.zeros_like(parameter) for parameter, _, _ in self.parameters]
        self.first, self.second = zeros, [zero.clone() for zero in zeros]
        self.num_steps = 0
        self.has_work = bool(self.parameters or self.own)  # heads without parameters may be all there is

    def _add_stacked(self, parameter: nn.Parameter, rates: Tensor, decays: Tensor) -> None:
        shape = (-1, *(1 for _ in parameter.shape[1:]))
        self.parameters.append((parameter, rates.view(shape), decays.view(shape)))

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """One update; progress is the share of all steps that are done after it."""
        self.num_steps += 1
        warmup = self.recipe.warmup
        if progress < warmup:
            factor = progress / warmup
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
        for (parameter, rate, decay), first, second in zip(self.parameters, self.first, self.second, strict=True):
            gradient = parameter.grad
            if gradient is None:
                continue
            if self.recipe.optimizer == "sgd":
                first.mul_(self.recipe.momentum).add_(gradient + decay * parameter)
                parameter.sub_(factor * rate * first)
            else:
                first.lerp_(gradient, 1 - 0.9)
                second.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
                scale = second.div(1 - 0.999**self.num_steps).sqrt_().add_(1e-8)
                update = first / (1 - 0.9**self.num_steps) / scale
                parameter.sub_(factor * rate * (update + decay * parameter))
            parameter.grad = None
        for overlay, rate in self.own:
            overlay.descend(rate)


def _restore(backbone: nn.Module, fits: Sequence[Fit]) -> tuple[Body, Heads]:
    """The bundle of these fits, ready for evaluation."""
    body = fits[0].method.build(backbone, len(fits))
    _load(body.edits, [one.state for one in fits], "edits.")
    device = next(backbone.parameters()).device
    body.suffix.to(device)
    return body, _restored_heads(fits).to(device)


def _restored_heads(fits: Sequence[Fit]) -> Heads:
    heads = fits[0].head_spec.build(len(fits), *fits[0].head_shape, [torch.Generator() for _ in fits])
    _load(heads, [one.state for one in fits], "heads.")
    return heads


def _load(module: nn.Module, states: Sequence[dict[str, Tensor]], part: str) -> None:
    """Stack the states of several configurations again."""
    together: dict[str, Tensor] = {}
    for name in (key.removeprefix(part) for key in states[0] if key.startswith(part)):
        if name.startswith("weights.0."):
            for k, state in enumerate(states):
                together[f"weights.{k}.{name.removeprefix('weights.0.')}"] = state[part + name]
        else:
            together[name] = torch.cat([state[part + name] for state in states])
    module.load_state_dict(together)


def _order(indices: Int64[Tensor, " image"], seed: int, epoch: int) -> Int64[Tensor, " image"]:
    """The epoch's order of examples; depends on seed and epoch alone, so bundling cannot change it."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
    return indices[torch.randperm(len(indices), generator=generator)]


def losses(logits: Float[Tensor, "num batch class"], labels: Int64[Tensor, "num batch"]) -> Float[Tensor, " num"]:
    """Mean cross-entropy of each configuration."""
    by_example = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return by_example.view_as(labels).mean(1)


def _prompt_norm(state: dict[str, Tensor], bundle: Bundle, k: int) -> tuple[float, float]:
    """Norm over all units of what a prompt adds, and the same divided by the mean norm of the activations.

    Where it differs between images (AdaViPro), the mean over the training images that scales are read from.
    """
    if "edits.prompt.values" not in state:
        return 0.0, 0.0
    edit = bundle.body.edits["prompt"]
    if isinstance(edit, Overlay) and edit.masks is not None:
        overlay = bundle.method.build(bundle.backbone, 1).overlays[0].to(bundle.device)
        _load(overlay, [state], "edits.prompt.")
        with autocast(bundle.backbone, bundle.recipe.precision):
            norm = float(overlay.added_norm(*bundle.source(bundle.splits[k].train[:_CALIBRATION])))
    else:
        delta = state["edits.prompt.unit"][0] * state["edits.prompt.values"][0]
        norm = float(delta.expand(edit.unit_shape).norm())
    return norm, norm / float(state["edits.prompt.activation_norm"])


def normalized(
    backbone: nn.Module, images: Images, indices: Int64[Tensor, " image"]
) -> Float[Tensor, "batch channel height width"]:
    """Normalized images on the backbone's device, in the memory layout of its weights."""
    weight = next(backbone.parameters())
    mean, std = (value.to(weight.device) for value in backbones.mean_std(backbone))
    pixels = images[indices].to(weight.device)
    x = (pixels.to(weight.dtype) / 255 - mean) / std
    return x.contiguous(memory_format=torch.channels_last) if backbones.is_channels_last(backbone) else x


def run_prefix(
    backbone: nn.Module, prefix: nn.Module, images: Images, precision: str, indices: Int64[Tensor, " image"]
) -> list[Tensor]:
    """What crosses the cut for these images, without gradients."""
    with torch.no_grad(), autocast(backbone, precision):
        return list(prefix(normalized(backbone, images, indices)))


def _chunks(indices: Int64[Tensor, "*num image"], num: int = 1) -> tuple[Tensor, ...]:
    """Parts of the images that a stack of ``num`` can take at once, as equal as can be: new shapes cost set-up time."""
    return indices.tensor_split(math.ceil(indices.shape[-1] / max(1, _CHUNK // num)), dim=-1)


def _repeat(z: Tensor, num: int) -> Tensor:
    return z.unsqueeze(0).expand(num, *z.shape).flatten(0, 1)


def _is_channels_last(z: Tensor) -> bool:
    return z.ndim == 4 and not z.is_contiguous() and z.is_contiguous(memory_format=torch.channels_last)
