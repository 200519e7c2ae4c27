"""Image towers of CLIP as backbones, opened by open_clip; the text tower of each stays within reach of `whole`."""

import copy
import difflib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apthory._tools.extras import from_extra
from apthory.backbones.files import weight_file
from apthory.backbones.frozen import freeze

PREFIX = "clip:"  # of the names of image towers among backbones: "clip:ViT-B-32"
_REST = "_rest_of_clip"  # the attribute of an image tower that holds a `_Rest`


@dataclass(frozen=True, eq=False)
class _Rest:
    """A CLIP without its image tower. It is no module, so it is no part of that tower; copies of the tower share it."""

    model: nn.Module
    name: str  # of the architecture, as open_clip calls it

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Rest":
        return self


def create_tower(name: str, num_classes: int = 0, **kwargs: Any) -> nn.Module:
    """A trainable image tower with random weights; no text tower belongs to it.

    Args:
        name: ``clip:`` and the architecture, as open_clip calls it.
        num_classes: 0, as CLIP has no classifier.
        kwargs: Passed on to open_clip.
    """
    _, tower = _open(_architecture_name(name, num_classes), None, kwargs)
    return tower


def load_tower(
    name: str,
    pretrained: bool | str | None,
    weights: str | Path | None,
    num_classes: int,
    input_size: int | None,
    device: str | torch.device,
    **kwargs: Any,
) -> nn.Module:
    """A frozen image tower whose whole CLIP is kept, too; arguments are those of `backbones.load`."""
    architecture = _architecture_name(name, num_classes)
    if weights is not None:
        pretrained = str(weight_file(weights))
    elif pretrained is True:
        pretrained = "openai"
    if input_size:
        kwargs = {"force_image_size": input_size, **kwargs}
    model, tower = _open(architecture, pretrained or None, kwargs)
    freeze(model).to(device)
    model.visual = None
    setattr(tower, _REST, _Rest(model, architecture))
    return tower


def whole(backbone: nn.Module) -> nn.Module:
    """The network that a backbone is a part of: the whole CLIP of an image tower, any other backbone itself.

    The CLIP is a new object each time, but its parts are not: they are this tower, and the text tower as it was loaded.
    """
    rest: _Rest | None = getattr(backbone, _REST, None)
    if rest is None:
        return backbone
    model = copy.copy(rest.model)
    model._modules = {**rest.model._modules, "visual": backbone}
    return model


def tokenizer(tower: nn.Module) -> Callable[[list[str]], Tensor]:
    """What turns texts into the tokens that the text tower behind an image tower takes."""
    rest: _Rest = getattr(tower, _REST)
    return _tokenizer(rest.name, rest.model.context_length)


@lru_cache(maxsize=4)
def _tokenizer(name: str, context_length: int) -> Callable[[list[str]], Tensor]:
    with from_extra("open-clip"):
        import open_clip
    return open_clip.get_tokenizer(name, context_length=context_length)


def _architecture_name(name: str, num_classes: int) -> str:
    if num_classes:
        raise ValueError(
            f"num_classes is {num_classes}, but {name!r} has no classifier, so expected 0; clip.of(backbone).text_head"
            "(classes) makes a head of class names"
        )
    return name.removeprefix(PREFIX)


def _open(name: str, pretrained: str | None, kwargs: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """A whole CLIP, and its image tower with a data configuration.

    Args:
        name: Architecture, as open_clip calls it.
        pretrained: Tag or file of weights; None for random ones.
        kwargs: Passed on to open_clip.
    """
    with from_extra("open-clip"):
        import open_clip
    known = open_clip.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        raise ValueError(f"open_clip has no {name!r}; it has {', '.join(near or known)}")
    to_download = ""
    if pretrained is not None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        try:
            if pretrained in tags:
                own = open_clip.pretrained.get_pretrained_cfg(name, pretrained)
                kwargs = {"force_quick_gelu": own.get("quick_gelu", False), **kwargs}
                file = f"{name}.{pretrained}.safetensors"
                page = f"https://huggingface.co/{own['hf_hub'].rstrip('/')}" if own.get("hf_hub") else own.get("url")
                to_download = f"download its open_clip_model.safetensors from {page} as {file} to the folder that "
                to_download += f"APTHORY_WEIGHTS names (now {os.environ.get('APTHORY_WEIGHTS') or 'not set'}), "
                with suppress(OSError):
                    pretrained = str(weight_file(file))
                    pixels = {key: own[key] for key in ("mean", "std", "interpolation") if key in own}
                    kwargs = {"force_preprocess_cfg": pixels, **kwargs}
            else:
                pretrained = str(weight_file(pretrained))
        except OSError as error:
            raise ValueError(
                f"{pretrained!r} is neither a file nor weights that open_clip has for {name!r}: "
                f"{', '.join(tags) or 'none'}"
            ) from error
    try:
        model = open_clip.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:
        if pretrained is None:
            raise
        reason = str(error).split("\n")[0]  # the hub's errors are many, and so are those of files that do not fit
        raise OSError(
            f"weights {pretrained!r} of {name!r} cannot be had ({type(error).__name__}: {reason}); {to_download}"
            "pass pretrained=FILE with the weights of this architecture, or pretrained=None for random weights"
        ) from error
    if getattr(model.visual, "output_tokens", False):
        raise ValueError(f"the image tower of {name!r} returns tokens beside its feature; take one without a captioner")
    config = open_clip.get_model_preprocess_cfg(model)
    side = config["size"][-1] if isinstance(config["size"], tuple | list) else config["size"]
    model.visual.pretrained_cfg = {
        "architecture": f"{PREFIX}{name}",
        "input_size": (3, side, side),
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": 1.0,
    }
    return model, model.visual
