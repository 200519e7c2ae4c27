"""Checkpoints, and the weights in half precision that become of them, measured on the test images."""

import hashlib
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn import functional as F

from apthory import backbones, tasks
from apthory._tools.files import write_atomically
from apthory.pretraining import cards
from apthory.pretraining.augmentation import mean_std_on_device, normalized
from apthory.pretraining.config import Config, find_device
from apthory.tasks import Images, Task

FORMAT = 1  # of a checkpoint; raised when its content changes


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
    if (state := read_checkpoint(checkpoint)) is None:
        raise ValueError(f"{checkpoint} is corrupt; export another one of its folder")
    config = Config(**state["recipe"])
    task = task or first_classes(tasks.load(config.task, config.size, data), config.num_classes)
    if task.digest != state["data"]["digest"]:
        raise ValueError(f"{checkpoint} was not trained on these images of {task.name!r}; give the same task")
    half = {name: _half(name, value) for name, value in state[weights].items()}
    content = safetensors.torch.save(half, {"format": "pt"})  # safetensors writes a second key in random order
    model = random_start(config, len(task.classes))
    model.load_state_dict(safetensors.torch.load(content))
    loss, top1 = loss_and_accuracy(model.to(find_device(device)), task.test, torch.arange(len(task.test)))
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
        "before": state.get("before", []),
    }
    cards.write(card, output)
    write_atomically(output, content)  # last: where the file is, its card is
    return output


def random_start(config: Config, num_classes: int) -> nn.Module:
    """The network with random weights from which a run starts, on the CPU, for images of the run's size."""
    model = backbones.start(config.backbone, num_classes, config.seed)
    if hasattr(model, "set_input_size") and backbones.input_size(model) != config.size:
        model = backbones.start(config.backbone, num_classes, config.seed, img_size=config.size)
    return model


def first_classes(task: Task, count: int | None) -> Task:
    """The task with only so many of its classes; None for all."""
    if count is None or count == len(task.classes):
        return task
    if count > len(task.classes):
        raise ValueError(f"num_classes={count}, but {task.name!r} has {len(task.classes)}")
    parts = [(part, part.labels < count) for part in (task.train, task.test)]
    train, test = (Images(part[chosen], part.labels[chosen]) for part, chosen in parts)
    return replace(task, name=f"{task.name}[:{count}]", classes=task.classes[:count], train=train, test=test)


@torch.no_grad()
def loss_and_accuracy(
    model: nn.Module, images: Images, index: Int64[Tensor, " subset"], precision: str = "float32"
) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers."""
    model.eval()
    mean, std = mean_std_on_device(model)
    total = torch.zeros(2, device=mean.device)
    for part in index.to(images.labels.device).split(512):
        pixels, labels = (values[part].to(mean.device) for values in (images, images.labels))
        with torch.autocast(mean.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(normalized(pixels, mean, std)).float()
        right = (logits.argmax(1) == labels).sum()
        total += torch.stack((F.cross_entropy(logits, labels, reduction="sum"), right))
    loss, top1 = (total / len(index)).tolist()
    return loss, top1


def path_of(folder: Path, epoch: int) -> Path:
    """Where the checkpoint of an epoch lies."""
    return folder / f"epoch-{epoch:04d}.pt"


def epoch_of(checkpoint: Path) -> int:
    """The epoch that a checkpoint is of."""
    return int(checkpoint.stem.removeprefix("epoch-"))


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """The content of a checkpoint, or None if damaged: `torch.load` compares no checksums, `testzip` does."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, EOFError):
        return None
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} has format {state.get('format')}, not {FORMAT}; take another output")
    return state


def _half(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point() or name.endswith("running_var"):
        return value.contiguous()
    if not (half := value.half().contiguous()).isfinite().all():
        raise ValueError(f"{name} reaches {value.abs().max():.3g}, beyond float16; raise weight_decay")
    return half
