"""Backbones and tasks that are small enough to test every claim on, but have every part of the real ones."""

from collections.abc import Callable
from functools import partial, wraps

import guard
import timm
import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from apthory import backbones, tasks

FAMILIES = ("vit", "deit", "swin", "convnext", "resnet", "mobilenetv2")

MADE: dict[tuple[str, torch.dtype], nn.Module] = {}
IN_USE: dict[tuple[str, torch.dtype], nn.Module] = {}  # handed out since the guard last looked (conftest.py)


def _shared(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """One network for all tests, so that it is made and traced once; ``__wrapped__`` makes one of a test's own."""

    @wraps(make)
    def shared(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        key = family, dtype
        if key not in MADE:
            MADE[key] = make(family, dtype)
            guard.GUARD.note(f"tiny.backbone{key}", MADE[key])
        IN_USE[key] = MADE[key]
        return MADE[key]

    return shared


@_shared
def backbone(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen backbone of random weights, none of them zero or one, so that no part of it can go unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size, model = _create(family)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases, gamma and beta, layer scales
            offset = 1.0 if parameter.mean() > 0.5 else 0.3 if 0 < parameter.abs().max() < 1e-3 else 0.0
            parameter.data = offset + 0.2 * torch.randn(parameter.shape, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer += 0.1 * torch.randn(buffer.shape, generator=generator)
        if name.endswith("running_var"):
            buffer *= 0.5 + torch.rand(buffer.shape, generator=generator)
    model.pretrained_cfg = model.default_cfg = {
        "architecture": f"tiny_{family}",
        "input_size": (3, size, size),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.25, 0.3),
    }
    return backbones.freeze(model.to(dtype))


def _create(family: str) -> tuple[int, nn.Module]:
    tokens = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
    match family:
        case "vit":
            return 32, timm.models.VisionTransformer(depth=3, **tokens)
        case "deit":
            return 32, timm.models.deit.VisionTransformerDistilled(depth=2, **tokens)
        case "swin":
            shape = {"img_size": 56, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 0}
            return 56, timm.models.SwinTransformer(**shape)
        case "convnext":
            return 32, timm.models.ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), num_classes=0)
        case "resnet" | "groupnorm":
            shape = {"channels": (8, 16, 24, 32), "num_classes": 0}
            norm = nn.BatchNorm2d if family == "resnet" else partial(timm.layers.GroupNorm, num_groups=4)
            return 32, timm.models.ResNet(BasicBlock, [2, 1, 1, 1], norm_layer=norm, **shape)
        case "mobilenetv2":
            generate = timm.models.efficientnet._gen_mobilenet_v2  # the registered ones are all 17 blocks deep
            shape = {"channel_multiplier": 0.5, "depth_multiplier": 0.3, "pad_type": "same", "num_classes": 0}
            return 32, generate("mobilenetv2_050", **shape)
    raise ValueError(f"no tiny {family!r}; there are {', '.join(FAMILIES)}")


def images(family: str, num: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalized images, in the memory layout that training gives them."""
    model = backbone(family, dtype)
    size = backbones.input_size(model)
    x = torch.randn(num, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last) if backbones.is_channels_last(model) else x


def task(num_train: int = 48, num_test: int = 24, size: int = 32, seed: int = 0) -> tasks.Task:
    """Three classes, each a colour under strong noise: neither trivial nor hopeless."""
    generator = torch.Generator().manual_seed(seed)

    def part(num: int) -> tasks.Images:
        labels = torch.arange(num) % 3
        tint = 45.0 * torch.eye(3)[labels].view(num, 3, 1, 1)
        noise = 40.0 * torch.randn(num, 3, size, size, generator=generator)
        shift = 25.0 * torch.randn(num, 3, 1, 1, generator=generator)
        return tasks.Images((110 + tint + shift + noise).clamp(0, 255).to(torch.uint8), labels)

    return tasks.Task("tiny", ("red", "green", "blue"), part(num_train), part(num_test), "drawn")
