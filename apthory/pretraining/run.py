"""A run: epoch by epoch, each with random numbers of its own and a checkpoint at its end."""

import hashlib
import io
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from apthory import tasks
from apthory._tools.determinism import random_stream, same_bits
from apthory._tools.environment import environment
from apthory._tools.files import write_atomically
from apthory._tools.progress import progress
from apthory.pretraining import exports
from apthory.pretraining.augmentation import crop_and_flip, mean_std_on_device, normalized, randaugment
from apthory.pretraining.config import Config, find_device, find_precision
from apthory.tasks import Images, Task

_LOOK_EVERY = 20  # steps between two looks at the losses: each makes the host wait for the device


def pretrain(
    config: Config,
    output: Path,
    *,
    task: Task | None = None,
    after: Path | None = None,
    keep: Sequence[int] = (),
    minutes: float | None = None,
    note: str = "",
) -> Path:
    """Train a backbone, or go on where ``output`` left off, and export its averaged weights.

    Args:
        config: The run. A folder that holds another run is refused.
        output: Folder of the run. It gets ``checkpoints/epoch-NNNN.pt`` (the last two, and those of ``keep``)
            and at the end ``<backbone>.safetensors`` with its model card, see `exports.export`.
        task: Used in place of ``tasks.load(config.task, config.size, config.data)``.
        after: A checkpoint of another run on the same images, whose averaged weights this one begins with; random
            weights if left out. Epochs draw on where that run's ended, and the card tells of both runs.
        keep: Epochs to keep, and to export at the end as ``<backbone>.epoch-NNNN.safetensors``; 0 is where the run
            begins. A call that resumes keeps those of the calls before, too.
        minutes: Stop between epochs rather than pass this time, after one at least; the next call goes on.
        note: A sentence for the model card, for instance the licence of the data.

    Returns:
        The exported weights, or the last checkpoint where ``minutes`` ended the call.

    Raises:
        ValueError: If ``output`` holds a run of another configuration or of other data, ``keep`` names an
            epoch that is gone or never comes, or ``after`` is of another backbone or of other images.
        FloatingPointError: If loss or gradient are not finite; the checkpoints before stay.
        KeyboardInterrupt: On Ctrl-C, naming the checkpoint from which the same call goes on.
    """
    task = exports.first_classes(task or tasks.load(config.task, config.size, config.data), config.num_classes)
    run, folder = Run(config, task, after, keep), output / "checkpoints"
    path = run.resume(folder) or run.save(folder)
    first, clock = run.epoch, time.perf_counter()
    for epoch in keep:
        checkpoint = exports.path_of(folder, epoch)
        if not (first < epoch <= config.epochs or checkpoint.exists()):
            raise ValueError(f"keep={epoch}: no {checkpoint}; this call trains from {first} to {config.epochs}")
    with progress(total=config.epochs, initial=first, desc=config.backbone, unit="epoch") as bar:
        while run.epoch < config.epochs:
            done, seconds = run.epoch - first, time.perf_counter() - clock
            if minutes is not None and done and seconds * (done + 1) / done > 60 * minutes:
                return path
            try:
                run.train_epoch()
                path = run.save(folder)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"interrupted; the same call goes on from {path}") from None
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; the last good checkpoint is {path}") from None
            older = (old for old in folder.glob("epoch-*.pt") if exports.epoch_of(old) < run.epoch - 1)
            for old in (*older, *folder.glob("epoch-*.partial")):  # the latter of killed runs
                if old.suffix == ".partial" or exports.epoch_of(old) not in run.keep:
                    old.unlink()
            bar.update()
            bar.set_postfix({name: f"{value:.4g}" for name, value in run.curve[-1].items()})
    stem = config.backbone.replace("/", "_")
    for epoch in sorted(run.keep):
        if (checkpoint := exports.path_of(folder, epoch)).exists():
            target = output / f"{stem}.epoch-{epoch:04d}.safetensors"
            exports.export(checkpoint, target, task=task, device=config.device, note=note)
    return exports.export(path, output / f"{stem}.safetensors", task=task, device=config.device, note=note)


class Run:
    """The moving parts of a run: model, average, optimizer, schedule, and how far they are."""

    def __init__(self, config: Config, task: Task, after: Path | None = None, keep: Sequence[int] = ()) -> None:
        self.keep = set(keep)
        self.config, self.task, self.device = config, task, find_device(config.device)
        self.precision = find_precision(config.precision, self.device)
        self.split = task.split(config.seed, None, config.num_validation, None)
        model = exports.random_start(config, len(task.classes))
        self.before = self._begin(model, after) if after else []
        if self.device.type == "cpu" and self.precision == "bfloat16":
            for module in model.modules():  # measured: fused attention trains half as fast in bfloat16
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.ema = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True)
        self.optimizer = create_optimizer_v2(
            self.model, opt="adamw", lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.steps = max(1, len(self.split.train) // config.batch_size)  # of one epoch
        warmup = round(config.warmup_epochs * self.steps)
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=config.epochs * self.steps - warmup + 1,  # a step after the last would have rate zero
            warmup_t=warmup,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.epoch, self.seconds, self.curve = 0, 0.0, list[dict[str, float]]()

    @cached_property
    def images(self) -> Images:
        """All training images on the device, as uint8."""
        return Images(self.task.train.pixels.to(self.device), self.task.train.labels.to(self.device))

    def train_epoch(self) -> None:
        """Advance by one epoch, with all randomness from its own stream."""
        config, epoch, clock = self.config, self.epoch + 1, time.perf_counter()
        mixup = v2.MixUp(alpha=config.mixup, num_classes=len(self.task.classes)) if config.mixup else None
        mean, std = mean_std_on_device(self.model)
        watched = torch.zeros(self.steps, 2, device=self.device)  # loss and length of the gradient
        done = sum(run["epoch"] for run in self.before)
        with random_stream(config.seed, done + epoch, self.device) as generator, same_bits(self.device):
            self.model.train()
            order = self.split.train[torch.randperm(len(self.split.train), generator=generator)]
            batches = order[: self.steps * config.batch_size].split(config.batch_size)
            for step, index in enumerate(progress(batches, desc=f"epoch {epoch}", unit="step"), start=1):
                index = index.to(self.device, non_blocking=True)
                images = crop_and_flip(self.images.pixels, index, config.padding, generator)
                if config.randaugment is not None:
                    images = randaugment(images, config.randaugment, mean)
                x, labels = normalized(images, mean, std), self.images.labels[index]
                if mixup is not None:
                    x, labels = mixup(x, labels)
                update = self.epoch * self.steps + step
                self.schedule.step_update(update)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                    logits = self.model(x)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
                self.optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.max_gradient_norm)
                self.optimizer.step()
                self.ema.update(self.model, step=update)
                watched[step - 1] = torch.stack((loss.detach(), norm))
                if step % _LOOK_EVERY == 0 or step == self.steps:
                    self._require_finite(watched[:step].tolist(), epoch)
            point = {"epoch": epoch, "learning_rate": self.optimizer.param_groups[0]["lr"]}
            point["loss"] = watched[:, 0].mean().item()
            if len(self.split.validation):
                scores = exports.loss_and_accuracy(self.ema.module, self.images, self.split.validation, self.precision)
                point["validation_loss"], point["validation_top1"] = scores
        self.epoch, self.seconds = epoch, self.seconds + time.perf_counter() - clock
        self.curve.append(point)

    def save(self, folder: Path) -> Path:
        """Write the checkpoint of this epoch, whole or not at all."""
        state = {
            "format": exports.FORMAT,
            "recipe": self.config.recipe,
            "data": self.data,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "curve": self.curve,
            "before": self.before,
            "keep": sorted(self.keep),
            "environment": environment(),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path = exports.path_of(folder, self.epoch)
        write_atomically(path, buffer.getvalue())
        return path

    def resume(self, folder: Path) -> Path | None:
        """Go on from the last whole checkpoint of a folder, if there is one; corrupt ones are set aside."""
        for path in sorted(folder.glob("epoch-*.pt"), key=exports.epoch_of, reverse=True):
            if (state := exports.read_checkpoint(path)) is None:
                path.replace(aside := path.with_name(f"{path.name}.corrupt"))
                message = f"{path} is corrupt, set aside as {aside.name}; the one before it is used"
                warnings.warn(message, RuntimeWarning, stacklevel=3)
                continue
            held = state["recipe"] | state["data"] | {"after": _origin(state.get("before", []))}
            asked = self.config.recipe | self.data | {"after": _origin(self.before)}
            if changed := [name for name in asked if held.get(name) != asked[name]]:
                was, now = (", ".join(f"{n}={run.get(n)!r}" for n in changed) for run in (held, asked))
                raise ValueError(f"{path} is of a run with {was}, not {now}; take another output folder")
            self.model.load_state_dict(state["model"])
            self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch, self.seconds, self.curve = state["epoch"], state["seconds"], state["curve"]
            self.keep |= set(state.get("keep", []))
            return path
        return None

    def _begin(self, model: nn.Module, after: Path) -> list[dict[str, Any]]:
        """Take over the averaged weights of another run's checkpoint; what was done to them, run by run."""
        if (state := exports.read_checkpoint(after)) is None:
            raise ValueError(f"{after} is corrupt; begin with another checkpoint of its folder")
        was = state["recipe"]["backbone"], *(state["data"][name] for name in ("digest", "split"))
        if was != (self.config.backbone, self.data["digest"], self.data["split"]):
            raise ValueError(
                f"{after} is of {was[0]!r} on images {was[1][:8]}, split {was[2][:8]}; to begin with it takes the same "
                f"backbone and split: {self.config.backbone!r}, {self.data['digest'][:8]}, {self.data['split'][:8]}"
            )
        model.load_state_dict(state["ema"])
        told = {name: state[name] for name in ("recipe", "epoch", "curve", "environment")}
        origin = {"sha256": hashlib.sha256(after.read_bytes()).hexdigest(), "hours": round(state["seconds"] / 3600, 3)}
        return [*state.get("before", []), told | origin]

    @property
    def data(self) -> dict[str, Any]:
        """The images of this run, by digest."""
        return {
            "name": self.task.name,
            "classes": len(self.task.classes),
            "train": len(self.split.train),
            "validation": len(self.split.validation),
            "transform": self.task.transform,
            "digest": self.task.digest,
            "split": self.split.digest,
        }

    def _require_finite(self, watched: Sequence[Sequence[float]], epoch: int) -> None:
        for step, (loss, norm) in enumerate(watched, start=1):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(
                    f"loss {loss}, gradient norm {norm} in epoch {epoch}, step {step} of {self.steps}; take "
                    f"another output folder with learning_rate below {self.config.learning_rate}, a longer "
                    "warm-up or precision='float32'"
                )


def _origin(before: Sequence[Mapping[str, Any]]) -> str | None:
    return before[-1]["sha256"] if before else None
