"""Train a backbone from random weights on an image classification task, resumable to the bit.

One run is one folder: a checkpoint after every epoch, and at the end the averaged weights in half precision
with a model card. Every random draw of an epoch comes from a stream seeded by (seed, epoch), so a checkpoint
holds no generator state, and a run that was killed and resumed ends in the bits of one that was not (on the
same hardware, with the same versions and number of threads).
"""

import hashlib
import io
import json
import math
import os
import pickle
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors.torch
import torch
import typer
from jaxtyping import Float, Int64, UInt8
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from apthory import backbones, records, tasks
from apthory.diversity import reflected
from apthory.progress import progress
from apthory.tasks import Images, Task

_FORMAT = 1  # of a checkpoint; raised when its content changes
_LOOK_EVERY = 20  # steps between two looks at the losses: each makes the host wait for the device
_GROUP = 8  # neighbours in a (shuffled) batch that share one draw of RandAugment


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained, on what, and how; the last three are how it is computed."""

    backbone: str  # vit_micro, resnet_micro, or any timm name
    task: str = "tiny_imagenet"  # as for `tasks.load`
    data: Path | None = None  # folder that holds the task; the images count, not where they lie
    size: int = 64  # pixels, side of the square images
    num_classes: int | None = None  # only the first classes of the task; None: all
    num_validation: int = 2000  # training images held out for the curve, so that test chooses nothing
    epochs: int = 100
    batch_size: int = 256  # the last, smaller batch of an epoch is left out
    learning_rate: float = 1e-3  # of AdamW, at its peak
    weight_decay: float = 0.05  # of matrices and kernels, not of biases, norms and position embeddings
    warmup_epochs: float = 5.0  # linear from zero, step by step; then a cosine to zero
    max_gradient_norm: float = 1.0  # longer gradients are scaled down to it
    label_smoothing: float = 0.1
    padding: int = 6  # pixels of reflection on every side before the random crop
    randaugment: int | None = None  # magnitude of its two operations, 0 to 30; None: off
    mixup: float = 0.0  # alpha of the Beta distribution; 0: off
    ema_decay: float = 0.9995  # update n keeps min(ema_decay, 1 - n^(-2/3)) of the average
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 autocast where it is faster
    device: str = "auto"  # auto: a CUDA device if there is one, else the CPU

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("size", self.size > 0, "at least 1 pixel"),
            ("num_classes", self.num_classes is None or self.num_classes > 1, "at least 2, or None for all"),
            ("num_validation", self.num_validation >= 0, "0 or more images"),
            ("epochs", self.epochs > 0, "at least 1"),
            ("batch_size", self.batch_size > 0, "at least 1"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "a positive number"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, f"0 to below epochs={self.epochs}"),
            ("max_gradient_norm", 0 < self.max_gradient_norm < math.inf, "a positive number"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "0 to below 1"),
            ("padding", 0 <= self.padding < self.size, f"0 to below size={self.size}"),
            ("randaugment", self.randaugment is None or 0 <= self.randaugment <= 30, "0 to 30, or None"),
            ("mixup", 0 <= self.mixup < math.inf, "0 or more"),
            ("ema_decay", 0 <= self.ema_decay < 1, "0 to below 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("precision", self.precision in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16"),
        ):
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected {expected}")

    @property
    def recipe(self) -> dict[str, Any]:
        """The fields that decide the result, with ``auto`` resolved; not the folder, not the GPU's number."""
        device = _device(self.device)
        recipe = asdict(self) | {"device": device.type, "precision": _precision(self.precision, device)}
        del recipe["data"]
        return recipe


def pretrain(
    config: Config,
    output: Path,
    *,
    task: Task | None = None,
    keep: Sequence[int] = (),
    minutes: float | None = None,
    note: str = "",
) -> Path:
    """Train a backbone, or go on where ``output`` left off, and export its averaged weights.

    Args:
        config: The run. A folder that holds another run is refused.
        output: Folder of the run. It gets ``checkpoints/epoch-NNNN.pt`` (the last two, and those of ``keep``)
            and at the end ``<backbone>.safetensors`` with its model card, see `export`.
        task: Used in place of ``tasks.load(config.task, config.size, config.data)``.
        keep: Epochs to keep and export too, as ``<backbone>.epoch-NNNN.safetensors``; 0 is the random start.
        minutes: Stop between epochs rather than pass this time, after one at least; the next call goes on.
        note: A sentence for the model card, for instance the licence of the data.

    Returns:
        The exported weights, or the last checkpoint where ``minutes`` ended the call.

    Raises:
        ValueError: If ``output`` holds a run of another configuration or of other data, or ``keep`` names an
            epoch that is gone or never comes.
        FloatingPointError: If loss or gradient are not finite; the checkpoints before stay.
        KeyboardInterrupt: On Ctrl-C, naming the checkpoint from which the same call goes on.
    """
    task = _first_classes(task or tasks.load(config.task, config.size, config.data), config.num_classes)
    run, folder = _Run(config, task), output / "checkpoints"
    path = run.resume(folder) or run.save(folder)
    first, clock = run.epoch, time.perf_counter()
    kept = {epoch: _checkpoint(folder, epoch) for epoch in keep}
    for epoch, checkpoint in kept.items():
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
            older = (old for old in folder.glob("epoch-*.pt") if _epoch(old) < run.epoch - 1)
            for old in (*older, *folder.glob("epoch-*.partial")):  # the latter of killed runs
                if old not in kept.values():
                    old.unlink()
            bar.update()
            bar.set_postfix({name: f"{value:.4g}" for name, value in run.curve[-1].items()})
    stem = config.backbone.replace("/", "_")
    for epoch, checkpoint in kept.items():
        target = output / f"{stem}.epoch-{epoch:04d}.safetensors"
        export(checkpoint, target, task=task, device=config.device, note=note)
    return export(path, output / f"{stem}.safetensors", task=task, device=config.device, note=note)


def export(
    checkpoint: Path,
    output: Path,
    *,
    weights: Literal["ema", "model"] = "ema",
    task: Task | None = None,
    data: Path | None = None,
    device: str = "auto",
    note: str = "",
) -> Path:
    """Write a checkpoint's weights in half precision, and beside them a model card, as JSON and as Markdown.

    Floats become float16, except the running variances of batch norms, which may be too small or too large.
    The accuracy in the card is that of the written file, in float32, on all test images.

    Args:
        checkpoint: Any ``epoch-NNNN.pt`` of a run.
        output: The file to write, ``*.safetensors``.
        weights: Their moving average, or the trained weights themselves.
        task: Used in place of loading the checkpoint's task from ``data``.
        data: Folder that holds the task.
        device: Where the test images are classified.
        note: A sentence for the model card.

    Returns:
        The file written.

    Raises:
        ValueError: If the checkpoint is corrupt, was trained on other images, or does not fit float16.
    """
    if (state := _read(checkpoint)) is None:
        raise ValueError(f"{checkpoint} is corrupt; export another one of its folder")
    config = Config(**state["recipe"])
    task = task or _first_classes(tasks.load(config.task, config.size, data), config.num_classes)
    if task.digest != state["data"]["digest"]:
        raise ValueError(f"{checkpoint} was not trained on these images of {task.name!r}; give the same task")
    half = {name: _half(name, value) for name, value in state[weights].items()}
    content = safetensors.torch.save(half, {"format": "pt"})  # safetensors writes a second key in random order
    records.write_atomically(output, content)
    model = _create(config, len(task.classes))
    model.load_state_dict(safetensors.torch.load(content))
    loss, top1 = _evaluate(model.to(_device(device)), task.test, torch.arange(len(task.test)))
    card = {
        "backbone": config.backbone,
        "file": {"name": output.name, "sha256": hashlib.sha256(content).hexdigest(), "weights": weights},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": state["epoch"],
        "test": {"top1": top1, "loss": loss, "images": len(task.test)},
        "note": note,
        "data": state["data"],
        "recipe": state["recipe"],
        "hours": round(state["seconds"] / 3600, 3),
        "environment": state["environment"],
        "curve": state["curve"],
    }
    records.write_atomically(output.with_suffix(".json"), json.dumps(card, indent=2).encode() + b"\n")
    records.write_atomically(output.with_suffix(".md"), _markdown(card).encode())
    return output


def crop_and_flip(
    pixels: UInt8[Tensor, "image channel height width"],
    index: Int64[Tensor, " batch"],
    padding: int,
    generator: torch.Generator,
) -> UInt8[Tensor, "batch channel height width"]:
    """Pick images, pad them by reflection, crop at random to the old size, mirror half of them.

    All of this only moves pixels, so it is a single gather: each image has its own rows and columns.

    Args:
        pixels: All images, on any device.
        index: Which of them, on the same device.
        padding: Pixels on every side, fewer than height and width.
        generator: On the CPU, so that the draws are the same for every device.
    """
    height, width = pixels.shape[-2:]
    down, right = torch.randint(-padding, padding + 1, (2, len(index), 1), generator=generator)
    mirrored = torch.randint(2, (len(index), 1), generator=generator).bool()
    rows, columns = reflected(torch.arange(height) + down), reflected(torch.arange(width) + right)
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = (axis.to(pixels.device, non_blocking=True) for axis in (rows, columns))
    channels = torch.arange(pixels.shape[1], device=pixels.device)[:, None, None]
    return pixels[index[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]]


class _Run:
    """The moving parts of a run: model, average, optimizer, schedule, and how far they are."""

    def __init__(self, config: Config, task: Task) -> None:
        self.config, self.task, self.device = config, task, _device(config.device)
        self.precision = _precision(config.precision, self.device)
        self.split = task.split(config.seed, None, config.num_validation, None)
        model = _create(config, len(task.classes))
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
        mean, std = _mean_std(self.model)
        watched = torch.zeros(self.steps, 2, device=self.device)  # loss and length of the gradient
        with _random_stream(config.seed, epoch, self.device) as generator, _deterministic(self.device):
            self.model.train()
            order = self.split.train[torch.randperm(len(self.split.train), generator=generator)]
            batches = order[: self.steps * config.batch_size].split(config.batch_size)
            for step, index in enumerate(progress(batches, desc=f"epoch {epoch}", unit="step"), start=1):
                index = index.to(self.device, non_blocking=True)
                images = crop_and_flip(self.images.pixels, index, config.padding, generator)
                if config.randaugment is not None:
                    images = _randaugment(images, config.randaugment, mean)
                x, labels = _normalized(images, mean, std), self.images.labels[index]
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
                scores = _evaluate(self.ema.module, self.images, self.split.validation, self.precision)
                point["validation_loss"], point["validation_top1"] = scores
        self.epoch, self.seconds = epoch, self.seconds + time.perf_counter() - clock
        self.curve.append(point)

    def save(self, folder: Path) -> Path:
        """Write the checkpoint of this epoch, whole or not at all."""
        state = {
            "format": _FORMAT,
            "recipe": self.config.recipe,
            "data": self.data,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "curve": self.curve,
            "environment": records.environment(),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path = _checkpoint(folder, self.epoch)
        records.write_atomically(path, buffer.getvalue())
        return path

    def resume(self, folder: Path) -> Path | None:
        """Go on from the last whole checkpoint of a folder, if there is one; corrupt ones are set aside."""
        for path in sorted(folder.glob("epoch-*.pt"), key=_epoch, reverse=True):
            if (state := _read(path)) is None:
                path.replace(aside := path.with_name(f"{path.name}.corrupt"))
                message = f"{path} is corrupt, set aside as {aside.name}; the one before it is used"
                warnings.warn(message, RuntimeWarning, stacklevel=3)
                continue
            held, asked = state["recipe"] | state["data"], self.config.recipe | self.data
            if changed := [name for name in asked if held.get(name) != asked[name]]:
                was, now = (", ".join(f"{n}={run.get(n)!r}" for n in changed) for run in (held, asked))
                raise ValueError(f"{path} is of a run with {was}, not {now}; take another output folder")
            self.model.load_state_dict(state["model"])
            self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch, self.seconds, self.curve = state["epoch"], state["seconds"], state["curve"]
            return path
        return None

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


def _create(config: Config, num_classes: int) -> nn.Module:
    """The random start of a run, on the CPU, for images of its size."""
    with _random_stream(config.seed, 0, torch.device("cpu")):
        model = backbones.create(config.backbone, num_classes)
        if hasattr(model, "set_input_size") and backbones.input_size(model) != config.size:
            model = backbones.create(config.backbone, num_classes, img_size=config.size)
    return model


def _first_classes(task: Task, count: int | None) -> Task:
    if count is None or count == len(task.classes):
        return task
    if count > len(task.classes):
        raise ValueError(f"num_classes={count}, but {task.name!r} has {len(task.classes)}")
    parts = [(part.pixels, part.labels, part.labels < count) for part in (task.train, task.test)]
    train, test = (Images(pixels[chosen], labels[chosen]) for pixels, labels, chosen in parts)
    return replace(task, name=f"{task.name}[:{count}]", classes=task.classes[:count], train=train, test=test)


@torch.no_grad()
def _evaluate(
    model: nn.Module, images: Images, index: Int64[Tensor, " subset"], precision: str = "float32"
) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers."""
    model.eval()
    mean, std = _mean_std(model)
    total = torch.zeros(2, device=mean.device)
    for part in index.to(images.pixels.device).split(512):
        pixels, labels = (values[part].to(mean.device) for values in (images.pixels, images.labels))
        with torch.autocast(mean.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(_normalized(pixels, mean, std)).float()
        right = (logits.argmax(1) == labels).sum()
        total += torch.stack((F.cross_entropy(logits, labels, reduction="sum"), right))
    loss, top1 = (total / len(index)).tolist()
    return loss, top1


def _mean_std(model: nn.Module) -> tuple[Float[Tensor, "channel 1 1"], Float[Tensor, "channel 1 1"]]:
    device = next(model.parameters()).device
    mean, std = backbones.mean_std(model)
    return mean.to(device), std.to(device)


def _normalized(
    images: UInt8[Tensor, "batch channel height width"],
    mean: Float[Tensor, "channel 1 1"],
    std: Float[Tensor, "channel 1 1"],
) -> Float[Tensor, "batch channel height width"]:
    return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def _randaugment(
    images: UInt8[Tensor, "batch channel height width"], magnitude: int, mean: Float[Tensor, "channel 1 1"]
) -> UInt8[Tensor, "batch channel height width"]:
    transform = v2.RandAugment(num_ops=2, magnitude=magnitude, fill=(255 * mean).flatten().tolist())
    return torch.cat([transform(group) for group in images.split(_GROUP)])


def _device(name: str) -> torch.device:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}, but torch sees no CUDA device; take 'cpu' or 'auto'")
    return backbones.default_device() if name == "auto" else torch.device(name)


def _precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return "bfloat16" if fast else "float32"


@contextmanager
def _random_stream(seed: int, epoch: int, device: torch.device) -> Iterator[torch.Generator]:
    """A generator for one epoch; torch's own, used by libraries and dropout, is seeded and restored."""
    words = np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint64)
    ours, own = (int(word) >> 1 for word in words)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(own)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(own)
        yield torch.Generator().manual_seed(ours)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """The same bits in every run, on CUDA too; torch warns of an operation that has no such kernel."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    before = torch.are_deterministic_algorithms_enabled()
    before_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=before_warn)


def _checkpoint(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:04d}.pt"


def _epoch(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("epoch-"))


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a checkpoint, or None if damaged: `torch.load` compares no checksums, `testzip` does."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, EOFError):
        return None
    if state.get("format") != _FORMAT:
        raise ValueError(f"{path} has format {state.get('format')}, not {_FORMAT}; take another output")
    return state


def _half(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point() or name.endswith("running_var"):
        return value.contiguous()
    if not (half := value.half().contiguous()).isfinite().all():
        raise ValueError(f"{name} reaches {value.abs().max():.3g}, beyond float16; raise weight_decay")
    return half


def _markdown(card: Mapping[str, Any]) -> str:
    def table(rows: Sequence[Mapping[str, Any]]) -> str:
        cells = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)] if rows else []
        lines = ([f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in cells)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def pairs(values: Mapping[str, Any]) -> str:
        return table([{"name": name, "value": value} for name, value in values.items()])

    file, test, data, epochs = card["file"], card["test"], card["data"], card["recipe"]["epochs"]
    return f"""# {card["backbone"]}

`{file["name"]}`: {card["parameters"]:,} parameters ({file["weights"]}) in float16, running variances in
float32, after {card["epochs"]} of {epochs} epochs ({card["hours"]} hours) from random weights.

**Top-1 {test["top1"]:.2%}** on the {test["images"]:,} test images of `{data["name"]}` ({data["classes"]}
classes). Nothing was chosen on them; the curve is of images held out of train.

{card["note"]}

## Data
{pairs(data)}

## Recipe
{pairs(card["recipe"])}

## Hardware and versions
{pairs(card["environment"])}

## Curve
{table(card["curve"])}
"""


def command(
    backbone: Annotated[str, typer.Argument(help="vit_micro, resnet_micro or any timm name.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; the same call resumes it.")],
    task: Annotated[str, typer.Option(help="What to learn.")] = Config.task,
    data: Annotated[Path | None, typer.Option(help="Folder that holds the task.")] = Config.data,
    size: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = Config.size,
    num_classes: Annotated[int | None, typer.Option(help="Only the first classes.")] = Config.num_classes,
    num_validation: Annotated[int, typer.Option(help="Images held out.")] = Config.num_validation,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = Config.epochs,
    batch_size: Annotated[int, typer.Option(help="Images of a step.")] = Config.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, at its peak.")] = Config.learning_rate,
    weight_decay: Annotated[float, typer.Option(help="Of matrices and kernels.")] = Config.weight_decay,
    warmup_epochs: Annotated[float, typer.Option(help="Linear, then a cosine.")] = Config.warmup_epochs,
    max_gradient_norm: Annotated[float, typer.Option(help="Limit.")] = Config.max_gradient_norm,
    label_smoothing: Annotated[float, typer.Option(help="0 is off.")] = Config.label_smoothing,
    padding: Annotated[int, typer.Option(help="Reflected pixels around the random crop.")] = Config.padding,
    randaugment: Annotated[int | None, typer.Option(help="Magnitude, 0 to 30.")] = Config.randaugment,
    mixup: Annotated[float, typer.Option(help="Alpha of the Beta distribution; 0 is off.")] = Config.mixup,
    ema_decay: Annotated[float, typer.Option(help="Of the average of the weights.")] = Config.ema_decay,
    seed: Annotated[int, typer.Option(help="Of weights, held-out images and order.")] = Config.seed,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = Config.precision,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = Config.device,
    keep: Annotated[list[int] | None, typer.Option(help="Epoch to export as well; 0 is random.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop between epochs before this.")] = None,
    note: Annotated[str, typer.Option(help="For the model card, for instance a licence.")] = "",
) -> None:
    """Train a backbone from random weights; a killed run goes on, to the bit, by the same call."""
    given = dict(locals())
    config = Config(**{field.name: given[field.name] for field in fields(Config)})
    try:
        path = pretrain(config, output, keep=keep or (), minutes=minutes, note=note)
    except KeyboardInterrupt as interrupt:
        typer.echo(interrupt, err=True)
        raise typer.Exit(130) from None
    typer.echo(path if path.suffix == ".safetensors" else f"{path}: out of time, the same call goes on")
