"""Backbones by name: timm's models, two micro networks that ship with the package, image towers of CLIP."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from apthory._tools.determinism import random_stream, same_erfinv
from apthory.backbones import clip_towers
from apthory.backbones.files import shipped_folder, weight_file
from apthory.backbones.frozen import as_dict, default_device, freeze

SHIPPED = ("vit_micro", "resnet_micro")
# The arguments of `load_backbone` that a backbone remembers and a file may carry. By none of them can a file from
# elsewhere run code, as it could by arguments of timm that name checkpoints.
_REMEMBERED = (
    "pretrained", "weights", "num_classes", "input_size", "mean", "std",
    "img_size", "patch_size", "pad_type", "global_pool",
)  # fmt: skip
_MICRO_DATA = {  # statistics of Tiny-ImageNet, on which the micro backbones were trained
    "input_size": (3, 64, 64),
    "mean": (0.480, 0.448, 0.397),
    "std": (0.277, 0.269, 0.282),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}


def create(name: str, num_classes: int = 0, **kwargs: Any) -> nn.Module:
    """A trainable backbone with random weights, its data configuration attached.

    Args:
        name: ``vit_micro``, ``resnet_micro``, any name that timm knows, or ``clip:`` and a name that open_clip knows.
            What follows a dot names weights, which make no difference here.
        num_classes: Size of the classifier; 0 leaves it out, so that the result is the pooled feature.
        kwargs: Passed on to timm, for instance ``pad_type="same"``, or to open_clip.
    """
    if name.startswith(clip_towers.PREFIX):
        return clip_towers.create_tower(name, num_classes, **kwargs)
    family, _ = _split(name)
    if family == "vit_micro":
        shape = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 8, "num_heads": 4, **kwargs}
        model = timm.models.VisionTransformer(num_classes=num_classes, **shape)
    elif family == "resnet_micro":
        shape = {"block": BasicBlock, "layers": [2, 2, 2, 2], "channels": (32, 64, 128, 256), **kwargs}
        model = timm.models.ResNet(num_classes=num_classes, **shape)
    elif timm.is_model(name):
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **kwargs)
    else:
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(
            f"no backbone {name!r}; shipped are {', '.join(SHIPPED)}, or any timm name"
            + (f" such as {', '.join(near)}" if near else "; timm.list_models() lists them")
        )
    model.pretrained_cfg = model.default_cfg = {"architecture": family, **_MICRO_DATA}
    return model


def start(name: str, num_classes: int = 0, seed: int = 0, **kwargs: Any) -> nn.Module:
    """`create`, with the random weights that pretraining with this seed starts from, on every processor the same."""
    with random_stream(seed, 0), same_erfinv():
        return create(name, num_classes, **kwargs)


def checkpoints(name: str) -> tuple[str, ...]:
    """Names of a shipped backbone for `load_backbone`, in the order of its training, from random weights to the last.

    ``vit_micro.random`` is the start of training, ``vit_micro.epoch-0008`` what it was eight epochs later (there are
    only those epochs whose weights ship), ``vit_micro`` what became of it.
    """
    kept = sorted(path.stem for path in shipped_folder().glob(f"{name}.epoch-*.safetensors"))
    return (f"{name}.random", *kept, name)


def card(name: str) -> dict[str, Any]:
    """What is known of a shipped file: data, recipe, curve, accuracy, hardware, as `apthory.pretraining` wrote it.

    Raises:
        ValueError: If no weights of that name ship.
    """
    return json.loads(_shipped(name).with_suffix(".json").read_text("utf-8"))


def load_backbone(
    name: str,
    *,
    pretrained: bool | str | None = True,
    weights: str | Path | None = None,
    num_classes: int = 0,
    input_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device = "auto",
    **kwargs: Any,
) -> nn.Module:
    """A frozen backbone in eval mode that maps normalized images to pooled features.

    Args:
        name: ``vit_micro`` or ``resnet_micro`` (weights ship with the package, also those of `checkpoints`, such as
            ``vit_micro.random``), any timm name, or ``clip:`` and an architecture that open_clip knows, such as
            ``clip:ViT-B-32``: the image tower of a CLIP, which `clip.of` completes.
        pretrained: Use the shipped weights, or timm's. ``False`` or None leaves random weights. Of a CLIP also the
            tag of its weights, or a file of them, as for `clip.load`; OpenAI's by default.
        weights: A safetensors file with a state dict, used instead, also looked for in the folder that
            APTHORY_WEIGHTS names; half precision is widened to float32. Of a CLIP it holds both towers.
        num_classes: 0 drops the classifier; otherwise it must match the weights.
        input_size: Side in pixels when it differs from the model's own data configuration. A ViT of timm is also
            laid out for it: give ``img_size`` instead. A CLIP is laid out for it here.
        mean: Mean by channel, of pixels in [0, 1], when the weight file wants another than the model's own.
        std: Standard deviation by channel, likewise.
        device: ``"auto"`` takes a CUDA device if there is one.
        kwargs: Passed on to timm, for instance ``pad_type="same"``, or to open_clip.

    Raises:
        ImportError: If the name is that of a CLIP, and open_clip is not installed.
        ValueError: If the name is unknown or a weight file does not fit the architecture.
        OSError: If the weight file, or a download, cannot be had.
    """
    given: dict[str, Any] = {"pretrained": pretrained or False, "weights": weights, "num_classes": num_classes}
    given |= {"input_size": input_size, "mean": mean, "std": std, **kwargs}
    place = default_device() if device == "auto" else device
    if name.startswith(clip_towers.PREFIX):
        model = clip_towers.load_tower(name, pretrained, weights, num_classes, input_size, place, **kwargs)
    elif isinstance(pretrained, str):
        raise ValueError(
            f"pretrained is {pretrained!r}, expected True or False for {name!r}; name timm's weights after a dot, as "
            "in 'resnet50.a1_in1k', and a file by weights=FILE.safetensors"
        )
    else:
        model = _load(name, bool(pretrained), weights, num_classes, kwargs)
    input_size = input_size or kwargs.get("img_size")
    laid_out = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if input_size and laid_out and set(laid_out) != {input_size}:
        raise ValueError(f"{name!r} is laid out for {laid_out[0]} pixels, not {input_size}; pass img_size={input_size}")
    own = {"input_size": input_size and (3, input_size, input_size), "mean": mean, "std": std}
    model.pretrained_cfg = as_dict(model.pretrained_cfg) | {k: tuple(v) for k, v in own.items() if v}
    model.load_arguments = _as_json(name, given)
    return freeze(model).to(place)


def load_sized(
    name: str, size: int | None, *, weights: str | Path | None = None, device: str | torch.device = "auto"
) -> nn.Module:
    """`load_backbone` for images of a size in pixels, by that argument which the architecture takes; None: its own."""
    if not size:
        return load_backbone(name, weights=weights, device=device)
    if getattr(getattr(create(name), "patch_embed", None), "img_size", None):
        try:
            return load_backbone(name, weights=weights, device=device, img_size=size)
        except ValueError as error:
            raise ValueError(f"{error}; or leave out the size {size}, if the weights are for another one") from error
    return load_backbone(name, weights=weights, device=device, input_size=size)


def load_arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments by which `load_backbone` makes a backbone again, fit for JSON; empty if it was not made so.

    The device is not among them, and neither are values that `load_backbone` has by itself. Files are named as they
    were given.
    """
    return dict(getattr(model, "load_arguments", {}))


def load_again(arguments: Mapping[str, Any], device: str | torch.device = "auto") -> nn.Module:
    """The backbone whose `load_arguments` these are.

    Raises:
        ValueError: If there are arguments among them that no backbone remembers, and what `load_backbone` raises.
        OSError: As `load_backbone`.
    """
    name, unknown = arguments.get("name"), arguments.keys() - {"name", *_REMEMBERED}
    if not isinstance(name, str) or unknown:
        raise ValueError(
            f"cannot load a backbone by {dict(arguments)}; expected a name, and some of {', '.join(_REMEMBERED)}"
        )
    try:
        return load_backbone(**arguments, device=device)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"cannot load a backbone by {dict(arguments)} ({error}); load it by its name") from error


def _as_json(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `load_backbone` that differ from its defaults; none at all if JSON has no place for one of them."""
    defaults = {"pretrained": True, "num_classes": 0}
    chosen = {key: value for key, value in given.items() if value is not None and value is not defaults.get(key)}
    if isinstance(chosen.get("weights"), Path):
        chosen["weights"] = str(chosen["weights"])
    try:
        arguments = json.loads(json.dumps({"name": name, **chosen}))
    except (TypeError, ValueError):
        return {}
    return arguments if chosen.keys() <= set(_REMEMBERED) else {}


def classifier(
    name: str, *, weights: str | Path | None = None, device: str | torch.device = "auto", **kwargs: Any
) -> nn.Linear:
    """The frozen source classifier that `load_backbone` leaves out: on its features it gives the source logits.

    Args:
        name: As for `load_backbone`.
        weights: As for `load_backbone`; the file must hold the classifier too.
        device: As for `load_backbone`.
        kwargs: As for `load_backbone`; those about images make no difference.

    Raises:
        ValueError: If the name is unknown, the file has no classifier, or the classifier is not linear in the features.
        OSError: If the weight file, or timm's download, cannot be had.
    """
    family, checkpoint = _split(name)
    file = weights
    if family in SHIPPED and weights is None:
        file = _shipped(family if checkpoint == "random" else name)
    if name.startswith(clip_towers.PREFIX):
        raise ValueError(
            f"{name!r} has no source classifier; clip.of(backbone).text_head(classes) makes a head of class names"
        )
    if file is not None:
        shape = {key: value for key, value in kwargs.items() if key not in ("input_size", "mean", "std")}
        num_classes = _num_source_classes(create(name, **shape), weight_file(file), name)
    elif timm.is_model(name):
        num_classes = timm.get_pretrained_cfg(name).num_classes
    else:
        create(name)  # raises, naming what there is
    layer = load_backbone(name, weights=weights, num_classes=num_classes, device=device, **kwargs).get_classifier()
    if not isinstance(layer, nn.Linear) and not (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)):
        raise ValueError(f"the classifier of {name!r} is no linear layer on the pooled features: {layer}")
    weight, bias = layer.weight.flatten(1), layer.bias
    num_classes, width = weight.shape
    linear = nn.Linear(width, num_classes, bias=bias is not None, device=weight.device).requires_grad_(False)
    linear.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return linear


def _split(name: str) -> tuple[str, str]:
    """A shipped backbone's architecture and its checkpoint; other names are left as they are."""
    family, _, checkpoint = name.partition(".")
    return (family, checkpoint) if family in SHIPPED else (name, "")


def _shipped(name: str) -> Path:
    path = shipped_folder() / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(checkpoint for family in SHIPPED for checkpoint in checkpoints(family)[1:])
        starts = ", ".join(f"{family}.random" for family in SHIPPED)
        raise ValueError(
            f"no file of {name!r} ships with the package; there are {known} (and {starts}, which need none)"
        )
    return path


def _classifier_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that give the logits."""
    layers = as_dict(model.pretrained_cfg).get("classifier", "fc" if hasattr(model, "fc") else "head")
    return (layers,) if isinstance(layers, str) else tuple(layers)


def _num_source_classes(model: nn.Module, path: Path, name: str) -> int:
    with safe_open(path, "pt") as file:
        keys = [f"{layer}.weight" for layer in _classifier_layers(model)]
        if missing := [key for key in keys if key not in file.keys()]:  # noqa: SIM118
            raise ValueError(f"{path.name} has no {missing[0]!r}, so it holds no source classifier of {name!r}")
        return int(file.get_slice(keys[0]).get_shape()[0])


def _load(
    name: str, pretrained: bool, weights: str | Path | None, num_classes: int, kwargs: Mapping[str, Any]
) -> nn.Module:
    """A shipped backbone, or one of timm, with its weights."""
    family, checkpoint = _split(name)
    is_ours = family in SHIPPED and pretrained and weights is None
    if checkpoint and not is_ours:
        raise ValueError(f"{name!r} names weights by itself; give it alone, or {family!r} with weights= or pretrained=")
    if is_ours and checkpoint != "random":
        weights = _shipped(name)
    if is_ours or weights is not None or not pretrained:
        model = create(name, num_classes, **kwargs)
    elif not timm.is_model(name):
        model = create(name)  # raises, naming what there is
    else:
        try:
            model = timm.create_model(name, pretrained=True, num_classes=num_classes, **kwargs)
        except Exception as error:  # the hub's errors are many: offline, gated, unknown tag
            raise OSError(
                f"pretrained weights of {name!r} cannot be had ({type(error).__name__}: {error}); "
                "pass weights=FILE.safetensors, or pretrained=False for random weights"
            ) from error
    if weights is not None:
        _fill(model, _tensors_of(weight_file(weights)), Path(weights).name, name, num_classes)
    elif is_ours:  # with a classifier as large as in training, which takes random numbers too
        first = start(name, _num_source_classes(model, _shipped(family), family), **kwargs)
        _fill(model, first.state_dict(), "random weights", name, num_classes)
    return model


def _tensors_of(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file ({error}); write one from a state dict: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'weights.safetensors')"
        ) from error


def _fill(model: nn.Module, state: Mapping[str, Tensor], source: str, name: str, num_classes: int) -> None:
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    if not num_classes:
        dropped = tuple(f"{layer}." for layer in _classifier_layers(model))
        state = {key: value for key, value in state.items() if not key.startswith(dropped)}
    own = model.state_dict()
    wrong = [key for key in state if key not in own or own[key].shape != state[key].shape]
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    if wrong or missing:
        what = f"{wrong[0]!r} of the file does not fit" if wrong else f"{missing[0]!r} is missing from the file"
        raise ValueError(
            f"{source} does not hold the weights of {name!r}: {what} "
            f"({len(wrong)} misfits, {len(missing)} missing); check the name and timm's keyword arguments"
        )
    model.load_state_dict(state, strict=False)
