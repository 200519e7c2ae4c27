"""Configurations in training together: prefix, suffix with stacked edits, heads and optimizer."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from apthory import backbones
from apthory.heads import Heads, HeadSpec, LinearHead
from apthory.methods import Method
from apthory.tasks import Task
from apthory.training.cache import PrefixCache, chunks_of, run_prefix
from apthory.training.config import Configuration, Recipe
from apthory.training.optimizer import Optimizer
from apthory.training.results import FrozenHead, Head, load_heads

NUM_CALIBRATION = 128  # training images from which scales are read
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
        cache: PrefixCache | None = None,
        *,
        head: Head | None = None,
    ) -> None:
        self.backbone, self.task, self.method, self.recipe = backbone, task, method, recipe
        self.configurations = configurations
        sizes = (recipe.num_train, recipe.num_validation, recipe.num_test)
        self.splits = [task.split(c.seed, *sizes) for c in configurations]
        self.device = next(backbone.parameters()).device
        frozen = head if isinstance(head, FrozenHead) else None
        if frozen is not None and len(frozen.fits) != len(configurations):
            raise ValueError(
                f"FrozenHead has {len(frozen.fits)} fits for {len(configurations)} configurations; give one for each"
            )
        self.prepared = method.build(backbone, len(configurations))
        self.prepared.start([c.seed for c in configurations])
        self.prepared.suffix.to(self.device)
        self.source, self.cache_bytes = self._make_source(cache)
        self.head_spec: HeadSpec = frozen.spec if frozen else head or LinearHead()
        self.heads, self.head_shape = self._start(self.head_spec)
        if frozen is not None:
            load_heads(self.heads, frozen.fits)
            self.heads.requires_grad_(False)
        self.optimizer = Optimizer(self.prepared, self.heads, configurations, recipe)

    def begin_epoch(self, epoch: int) -> None:
        """Move schedules by epoch on; epochs count from 0."""
        self.prepared.begin_epoch(epoch, self.recipe.num_epochs)

    def step(self, chunks: Sequence[Int64[Tensor, " image"]], done: float) -> Float[Tensor, " num"]:
        """One update of every configuration; its losses before the update.

        Args:
            chunks: Train images of each configuration.
            done: Share of all steps that are done after this one.
        """
        labels = torch.stack([self.task.train.labels[chunk] for chunk in chunks]).to(self.device)
        crossing = self.source(torch.cat(list(chunks)))
        with backbones.autocast(self.backbone, self.recipe.precision), self.prepared.drawing():
            features = self.prepared.suffix(*crossing)
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
        for chunk in chunks_of(indices, len(indices)):
            crossing = self.source(chunk.flatten())
            with backbones.autocast(self.backbone, self.recipe.precision):
                features = self.prepared.suffix(*crossing)
            logits = self.heads(features).cpu()
            labels = self.task.train.labels[chunk]
            hits += (logits.argmax(-1) == labels).sum(1)
            totals += losses(logits, labels) * chunk.shape[1]
        accuracies = [100 * count / indices.shape[1] for count in hits.tolist()]
        return accuracies, (totals / indices.shape[1]).tolist()

    def state(self, k: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A copy of what one configuration's edits and its head hold."""
        head = {name: value[k].detach().clone().cpu() for name, value in self.heads.state_dict().items()}
        return self.prepared.state(k), head

    def _make_source(self, cache: PrefixCache | None) -> tuple[_Source, int]:
        arguments = (self.backbone, self.prepared.prefix, self.task.train)
        wanted = torch.cat([torch.cat([split.train, split.validation]) for split in self.splits])
        if not self.recipe.cache:
            self.task.train.decode(wanted.tolist())  # from front to back: batches will want them in random order
            return partial(run_prefix, *arguments, self.recipe.precision), 0
        cache = PrefixCache() if cache is None else cache
        cache.extend(*arguments, wanted, self.recipe.precision)
        return cache.get, cache.num_bytes

    def _start(self, spec: HeadSpec) -> tuple[Heads, tuple[int, int]]:
        """Initial heads, and the scale of activations and features on some training images."""
        with self.prepared.calibrating():
            features = self._features([split.train[:NUM_CALIBRATION] for split in self.splits])
        generators = [torch.Generator().manual_seed(c.seed) for c in self.configurations]
        shape = (features.shape[1], len(self.task.classes))
        heads = spec.build(len(generators), *shape, generators).to(self.device)
        chosen = torch.stack([split.train[: heads.num_start] for split in self.splits])
        if heads.num_start != NUM_CALIBRATION or heads.starts_unprompted:
            see = self._unprompted if heads.starts_unprompted else self._features
            parts = [see(list(part)) for part in chunks_of(chosen, len(chosen))]
            parts = [part.unflatten(0, (len(chosen), -1)) for part in parts]
            features = torch.cat(parts, dim=1).flatten(0, 1)
        heads.start(features, self.task.train.labels[chosen].to(self.device))
        return heads, shape

    @torch.no_grad()
    def _features(self, images: Sequence[Int64[Tensor, " image"]]) -> Float[Tensor, "stack width"]:
        """Of each configuration's own images, before training."""
        crossing = self.source(torch.cat(list(images)))
        with backbones.autocast(self.backbone, self.recipe.precision):
            return self.prepared.suffix(*crossing).float()

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


def losses(logits: Float[Tensor, "num batch class"], labels: Int64[Tensor, "num batch"]) -> Float[Tensor, " num"]:
    """Mean cross-entropy of each configuration."""
    by_example = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return by_example.view_as(labels).mean(1)
