"""What a method trained, with its head, in one file: safetensors, the rest in its metadata; never the backbone.

The file says all that is needed to use it: method, sites, class names, image size and normalization, which backbone
with which weights, and a digest of its own tensors. `load_prompt` checks each of these. Files of version 0.1.0 still
load.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from apthory import backbones, sites
from apthory._tools.files import check_output, write_atomically
from apthory.heads import CosineHead
from apthory.methods import registry
from apthory.methods.activation import ActivationPrompt, prompt_shape
from apthory.methods.adapted import Adaptation, AdaptedBackbone, Prompt, adapt, ready
from apthory.methods.pixels.overlay import Overlay, PixelPrompt

_FORMAT = "apthory.adapted/2"
_OLD_FORMATS = ("apthory.prompt/1", "apthory.pixels/1")  # of version 0.1.0
_FIELDS = {  # of the metadata, with their kinds
    "format": str,
    "method": str,
    "options": dict,
    "head": str,
    "classes": list,
    "image_size": int,
    "mean": list,
    "std": list,
    "transform": str,
    "backbone": str,
    "digest": str,
    "sha256": str,
}
_HEADS = {"": (), "linear": ("weight", "bias"), "cosine": ("weight", "scale")}  # kinds, with the names of their tensors


def save_model(path: str | Path, model: AdaptedBackbone) -> Path:
    """Write what was trained and the head.

    Raises:
        ValueError: If the head is of another kind than linear or cosine, or a value is not finite.
        OSError: If the file cannot be written.
    """
    path = check_output(path)
    source, backbone = model.source, model.backbone
    _check_source(path, source, model)
    tensors = {f"edits.{name}": value for name, value in source.state.items()}
    kind = ""
    if model.head is not None:
        kind = {nn.Linear: "linear", CosineHead: "cosine"}.get(type(model.head), "other")
        if kind == "other":
            raise ValueError(
                f"a head of the kind {type(model.head).__name__} cannot be saved; take nn.Linear or CosineHead"
            )
        tensors |= {f"head.{name}": value.detach() for name, value in model.head.named_parameters()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"{bad[0]} has values that are not finite, so {path} was not written; train with lower rates")
    mean, std = (value.flatten().tolist() for value in backbones.mean_std(backbone))
    config = {
        "format": _FORMAT,
        "method": source.method.name,
        "options": {field.name: getattr(source.method, field.name) for field in fields(cast(Any, source.method))},
        "head": kind,
        "classes": list(model.classes),
        "image_size": backbones.input_size(backbone),
        "mean": mean,
        "std": std,
        "transform": model.transform,
        "backbone": backbones.architecture(backbone),
        "digest": backbones.digest(backbone),
        "load_arguments": backbones.load_arguments(backbone),
    }
    config["sha256"] = _file_digest(config, tensors)
    write_atomically(path, serialize(tensors, {"apthory": json.dumps(config)}))
    return path


def save_prompt(path: str | Path, prompt: Prompt, backbone: nn.Module, head: nn.Module | None = None) -> Path:
    """Write a prompt that was made by hand, and its head; `training.Fit.save` writes what was trained."""
    return save_model(path, AdaptedBackbone(backbone, prompt, head))


def load_prompt(path: str | Path, backbone: nn.Module | None = None) -> AdaptedBackbone:
    """Read what was trained back onto the backbone for which it was trained.

    Args:
        path: Of the file.
        backbone: That backbone; `backbone_of_file` makes it if it is left out.

    Raises:
        ValueError: If the file is not of this kind, is damaged, or belongs to another backbone, site or image size.
        OSError: If there is no such file.
    """
    config, tensors = _read(path)
    if backbone is None:
        backbone = backbone_of_file(path)
    own = backbones.architecture(backbone)
    if config["backbone"] != own:
        raise ValueError(f"{path} was trained for the backbone {config['backbone']!r}, not {own!r}; load that one")
    if config["digest"] != backbones.digest(backbone):
        raise ValueError(f"{path} was trained for other weights of {own!r}; load the backbone with those weights")
    if config["format"] in _OLD_FORMATS:
        return _load_old(path, config, tensors, backbone)
    _check_images(path, config, backbone)
    head = _head(path, config["head"], _part(tensors, "head."), len(config["classes"]))
    state = _part(tensors, "edits.")
    if config["method"] not in registry.METHODS:
        raise ValueError(
            f"{path} was trained by the method {config['method']!r}, which is not known here (there are "
            f"{', '.join(registry.METHODS)}); import the module that registers it (methods.register) first"
        )
    try:
        method = registry.make(config["method"], config["options"])
        model = adapt(backbone, method, state, head, classes=config["classes"], transform=config["transform"])
    except (TypeError, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} does not fit {own!r} ({reason}); it may be damaged: save it anew") from error
    return model


def backbone_of_file(
    path: str | Path,
    *,
    name: str | None = None,
    weights: str | Path | None = None,
    size: int | None = None,
    device: str | torch.device = "auto",
) -> nn.Module:
    """The backbone for which a file was trained, by the arguments of `backbones.load_backbone` that the file carries.

    Args:
        path: Of the file.
        name: Of the backbone, where the file does not say it, or says another one.
        weights: File of its weights, where that lies elsewhere now.
        size: Side of its images in pixels, where the file does not say it.
        device: As for `backbones.load_backbone`.

    Raises:
        ValueError: If there is no name, and what `backbones.load_backbone` raises.
        OSError: If there is no such file, or the weights cannot be had.
    """
    config = _read(path)[0]
    arguments: dict[str, Any] = config.get("load_arguments", {})
    if name is None and not arguments:
        raise ValueError(
            f"{path} does not say how to load its backbone {config['backbone']!r}; name it (--backbone, and perhaps "
            "--weights and --size), or load it yourself: load_prompt(path, backbone)"
        )
    if name is None and size is None:
        return backbones.load_again(arguments | ({} if weights is None else {"weights": str(weights)}), device)
    if name is None:
        name, weights = str(arguments.get("name")), weights or arguments.get("weights")
    return backbones.load_sized(name, size or config.get("image_size"), weights=weights, device=device)


def describe_file(path: str | Path) -> dict[str, Any]:
    """What a file says of itself: its metadata, without the backbone."""
    return _read(path)[0]


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors, checked as far as that goes without the backbone."""
    way_out = "Fit.save writes them"
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, not a prompt saved by apthory; name the file in it")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("apthory", "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a prompt saved by apthory ({error}); {way_out}") from error
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not a prompt saved by apthory (its metadata are no JSON: {error}); {way_out}"
        ) from error
    version = config.get("format") if isinstance(config, dict) else None
    if version not in (_FORMAT, *_OLD_FORMATS):
        newer = "; a newer version of apthory may read it" if str(version).startswith("apthory.") else ""
        raise ValueError(f"{path} is not a prompt saved by apthory (format {version!r}){newer}; {way_out}")
    old = {"backbone": str, "digest": str} | (
        {"layout": dict} if version == "apthory.pixels/1" else {"site": str, "shape": str}
    )
    for name, kind in (_FIELDS if version == _FORMAT else old).items():
        if not isinstance(config.get(name), kind):
            raise ValueError(f"{path} is damaged: its {name} is {config.get(name)!r}, and should be a {kind.__name__}")
    if not isinstance(own := config.get("load_arguments", {}), dict):
        raise ValueError(f"{path} is damaged: its load_arguments are {own!r}, and should be a dict")
    if version == _FORMAT and (
        len(set(config["classes"])) < len(config["classes"])
        or not all(isinstance(name, str) for name in config["classes"])
    ):
        raise ValueError(f"{path} is damaged: its class names are {config['classes']}, and should be different texts")
    if version == _FORMAT and config["sha256"] != _file_digest(config, tensors):
        raise ValueError(f"{path} is damaged: it is not what was saved (SHA-256); save it anew, or copy it again")
    if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"{path} is damaged: {bad[0]} has values that are not finite; save it anew")
    return config, tensors


def _load_old(
    path: str | Path, config: Mapping[str, Any], tensors: dict[str, Tensor], backbone: nn.Module
) -> AdaptedBackbone:
    kind = "cosine" if "head.scale" in tensors else "linear" if "head.weight" in tensors else ""
    stray = [name for name in tensors if name != "prompt" and not name.startswith(("prompt.", "head."))]
    own_head = _part(tensors, "head.")
    if stray or (own_head and not kind):
        raise ValueError(f"{path} is damaged: it has the tensor {(stray or list(own_head))[0]!r}, which no prompt has")
    head = _head(path, kind, own_head, 0)
    prompt: Prompt
    if "layout" in config:
        prompt = _old_pixels(path, config["layout"], _part(tensors, "prompt."))
    else:
        site = sites.resolve(backbone, config["site"])
        expected = prompt_shape(backbone, site, config["shape"])
        shape = tuple(tensors["prompt"].shape) if "prompt" in tensors else None
        if shape != expected:
            raise ValueError(f"{path} holds a prompt of shape {shape}; {site!r} of this backbone takes {expected}")
        prompt = ActivationPrompt(site, tensors["prompt"], config["shape"])
    return ready(AdaptedBackbone(backbone, prompt, head))


def _old_pixels(path: str | Path, layout: Mapping[str, Any], state: dict[str, Tensor]) -> PixelPrompt:
    try:
        return PixelPrompt.restore(layout, state)
    except (TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def _head(path: str | Path, kind: str, tensors: Mapping[str, Tensor], num_classes: int) -> nn.Module | None:
    if kind not in _HEADS or set(tensors) != set(_HEADS[kind]):
        raise ValueError(
            f"{path} is damaged: a head of the kind {kind!r} has the tensors {list(_HEADS.get(kind, ()))}, and "
            f"there are {sorted(tensors)}; save it anew"
        )
    if not kind:
        return None
    if tensors["weight"].ndim != 2 or (num_classes and len(tensors["weight"]) != num_classes):
        raise ValueError(
            f"{path} is damaged: it names {num_classes} classes, and its head has weights of shape "
            f"{tuple(tensors['weight'].shape)}; save it anew"
        )
    count, width = tensors["weight"].shape
    if "bias" in tensors and tensors["bias"].shape != (count,):
        raise ValueError(
            f"{path} is damaged: its head has weights of shape {(count, width)} and a bias of shape "
            f"{tuple(tensors['bias'].shape)}; save it anew"
        )
    head = nn.Linear(width, count) if kind == "linear" else CosineHead(tensors["weight"], 1.0)
    head.load_state_dict(dict(tensors))
    return head


def _check_images(path: str | Path, config: Mapping[str, Any], backbone: nn.Module) -> None:
    mean, std = (value.flatten().tolist() for value in backbones.mean_std(backbone))
    own = {"image_size": backbones.input_size(backbone), "mean": mean, "std": std}
    for name, value in own.items():
        if config[name] != value:
            raise ValueError(
                f"{path} was trained with {name} {config[name]}, and this backbone has {value}; load the backbone with "
                "the same input_size, mean and std"
            )


def _check_source(path: str | Path, source: Adaptation, model: AdaptedBackbone) -> None:
    """Refuse what `load_prompt` could not make again: methods that are not registered, pixel prompts of no method."""
    if registry.METHODS.get(source.method.name) is not type(source.method):
        raise ValueError(
            f"the method {type(source.method).__name__} is not registered, so {path} could not be loaded; call "
            "methods.register(...) on it first"
        )
    if len(model.edits) == 1 and isinstance(model.edits[0], PixelPrompt):
        [overlay] = source.method.build(model.backbone, 1).stacks.values()
        assert isinstance(overlay, Overlay)
        if asdict(overlay.layout) != asdict(model.edits[0].layout):
            raise ValueError(f"no method makes a prompt of the layout {model.edits[0].layout}; {path} was not written")


def _file_digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over all metadata but itself, and over names, types, shapes and values of the tensors."""
    said = {name: value for name, value in config.items() if name != "sha256"}
    return backbones.tensors_digest(tensors, json.dumps(said, sort_keys=True).encode())


def _part(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
