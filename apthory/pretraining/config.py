"""What a run of pretraining is: one frozen dataclass, refused before anything is loaded if it cannot be run."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from apthory import backbones


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
        device = find_device(self.device)
        recipe = asdict(self) | {"device": device.type, "precision": find_precision(self.precision, device)}
        del recipe["data"]
        return recipe


def find_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is a CUDA device if there is one."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}, but torch sees no CUDA device; take 'cpu' or 'auto'")
    return backbones.default_device() if name == "auto" else torch.device(name)


def find_precision(name: str, device: torch.device) -> str:
    """The precision of this name; ``auto`` is bfloat16 where the device computes faster in it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return "bfloat16" if fast else "float32"
