"""What a frozen backbone is: its settings, its images, its identity."""

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import timm
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

_CLASSIFIERS = ("fc", "classifier", "head", "heads", "linear", "last_linear")  # names that models give theirs


def freeze(model: nn.Module) -> nn.Module:
    """Eval mode, no gradients for weights, and the kernels that are fastest on this machine."""
    model.eval().requires_grad_(False)
    if not torch.cuda.is_available():
        for module in model.modules():  # measured: with bf16 on CPUs the fused kernel is half as fast
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
    if any(isinstance(module, nn.Conv2d) and module.kernel_size != module.stride for module in model.modules()):
        model.to(memory_format=torch.channels_last)
    return model


def default_device() -> torch.device:
    """A CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def input_size(model: nn.Module) -> int:
    """Side of the square image that the backbone expects, in pixels."""
    return int(_data_config(model)["input_size"][-1])


def mean_std(model: nn.Module) -> tuple[Float[Tensor, "channel 1 1"], Float[Tensor, "channel 1 1"]]:
    """Mean and standard deviation of pixels in [0, 1], from the model's own data configuration."""
    _data_config(model)
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return mean, std


def architecture(model: nn.Module) -> str:
    """The name under which the backbone was made."""
    return str(as_dict(getattr(model, "pretrained_cfg", {})).get("architecture", type(model).__name__))


def carried_classifier(model: nn.Module) -> str:
    """The name of the linear layer that makes the model's output classes instead of features; empty if there is none.

    Models of timm say it themselves. Of others it is the layer whose output the model returns, as one pass over a
    blank image shows, if it is named as classifiers are. A projection that features end in by design, as CLIP's do, is
    no classifier.
    """
    if _ends_in_projection(model):
        return ""
    names: dict[nn.Module | None, str] = {module: name for name, module in model.named_modules()}
    if hasattr(model, "num_classes") and hasattr(model, "get_classifier"):
        layers = model.get_classifier() if model.num_classes else None
        layer = layers[0] if isinstance(layers, tuple) else layers
        return "" if isinstance(layer, nn.Identity) else names.get(layer, "")
    named_so = {name for module, name in names.items() if isinstance(module, nn.Linear) and _is_classifier(name)}
    last = names.get(_last_layer(model)) if named_so else None
    return last if last in named_so else ""


def _ends_in_projection(model: nn.Module) -> bool:
    """Whether it is a CLIP's image tower, ours or timm's, whose last layer is the one that CLIP was trained with.

    Models of timm count that projection as their classifier. Where it was replaced or fine-tuned, it is one.
    """
    config = as_dict(getattr(model, "pretrained_cfg", {}))
    name = f"{config.get('architecture')}.{config.get('tag')}"
    is_as_trained = getattr(model, "num_classes", None) == config.get("num_classes")
    return "clip" in name and "_ft_" not in name and is_as_trained


def _is_classifier(name: str) -> bool:
    """Whether a layer is named as classifiers are, such as ``fc``, ``heads.head`` or ``classifier.1``."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return bool(parts) and parts[-1] in _CLASSIFIERS


def _last_layer(model: nn.Module) -> nn.Module | None:
    """The last module without modules in it whose output is the model's; dropout, which passes it on, is none."""
    made: list[tuple[nn.Module, Any]] = []
    watched = [module for module in model.modules() if not isinstance(module, nn.Dropout | nn.Identity)]
    handles = [
        module.register_forward_hook(lambda layer, _, output: made.append((layer, output)))
        for module in watched
        if not any(module.children())
    ]
    modes = [(module, module.training) for module in model.modules()]
    weight, side = next(model.parameters()), input_size(model)
    try:
        model.eval()
        with torch.no_grad():
            output = model(torch.zeros(1, 3, side, side, dtype=weight.dtype, device=weight.device))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return next((layer for layer, result in reversed(made) if result is output), None)


def is_channels_last(model: nn.Module) -> bool:
    """Whether the weights lie in the memory layout that convolutions on images want."""
    kernels = (p for p in model.parameters() if p.ndim == 4 and min(p.shape[1:3]) > 1)
    return any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in kernels)


def digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all weights and buffers; equal digests mean equal networks."""
    return tensors_digest(model.state_dict())


def tensors_digest(tensors: Mapping[str, Tensor], before: bytes = b"") -> str:
    """SHA-256 over names, types, shapes and values of tensors, in the order of their names.

    Args:
        tensors: By name.
        before: What is hashed in front of them.
    """
    total = hashlib.sha256(before)
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _data_config(model: nn.Module) -> dict[str, Any]:
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError(
            f"{type(model).__name__} does not say what images it takes; set its attribute pretrained_cfg to "
            '{"architecture": NAME, "input_size": (3, SIDE, SIDE), "mean": (R, G, B), "std": (R, G, B)}'
        )
    return as_dict(model.pretrained_cfg)


def as_dict(config: Any) -> dict[str, Any]:
    """A data configuration of timm, or our own, as a dictionary."""
    return dict(config) if isinstance(config, dict) else config.to_dict()


def autocast(backbone: nn.Module, precision: str) -> AbstractContextManager:
    """Mixed precision as a recipe asks for it; ``auto`` means bfloat16 where the hardware computes in it."""
    device = next(backbone.parameters()).device.type
    has_bfloat16 = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    wanted = precision == "bfloat16" or (precision == "auto" and has_bfloat16)
    return torch.autocast(device, torch.bfloat16, enabled=wanted)


def normalize(
    backbone: nn.Module, pixels: UInt8[Tensor, "batch channel height width"]
) -> Float[Tensor, "batch channel height width"]:
    """Images as the backbone takes them, on its device and in the memory layout of its weights.

    Args:
        pixels: From 0 to 255, such as ``task.test[:8]``.
    """
    weight = next(backbone.parameters())
    mean, std = (value.to(weight.device) for value in mean_std(backbone))
    x = (pixels.to(weight.device).to(weight.dtype) / 255 - mean) / std
    return x.contiguous(memory_format=torch.channels_last) if is_channels_last(backbone) else x
