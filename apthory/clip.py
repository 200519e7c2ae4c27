"""CLIP by open_clip: the image tower as a frozen backbone, class names as a head, zero-shot accuracy.

The image tower is a backbone like any other: it has sites (``transformer.resblocks.3:input``), a data
configuration, and, traced by torch.fx, a prefix that can be cached. The text tower runs once for each head.
"""

import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from apthory import backbones, training
from apthory._tools.extras import from_extra
from apthory.heads import CosineHead, TextHead
from apthory.tasks import Task

PREFIX = "clip:"  # of the names of image towers among backbones: "clip:ViT-B-32"
VP_TEMPLATE = "This is a photo of a {}"  # Bahng et al. 2022
EVP_TEMPLATE = "this is a photo of a {}"  # Wu et al. 2022
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# What EVP's code calls classes whose names in the data are no words: numbers (SVHN, CLEVR), and those of EuroSAT.
EVP_NAMES = {str(number): word for number, word in enumerate(NUMBERS)} | {
    "AnnualCrop": "Annual Crop",
    "HerbaceousVegetation": "Herbaceous Vegetation",
    "Industrial": "Industrial Buildings",
    "PermanentCrop": "Permanent Crop",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea & Lake",
}
_CHUNK = 64  # images or texts that a tower sees at once


@dataclass(frozen=True, eq=False)
class CLIP:
    """Both towers of a CLIP, frozen, in eval mode."""

    image: nn.Module = field(repr=False)  # the backbone: normalized images -> features
    model: nn.Module = field(repr=False)  # open_clip's whole model
    tokenize: Callable[[list[str]], Tensor] = field(repr=False)

    @property
    def scale(self) -> float:
        """What CLIP was trained to multiply cosines with: the exponential of its ``logit_scale``."""
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "text width"]:
        """The text tower's features, of unit length."""
        tokens = self.tokenize(list(texts)).to(next(self.model.parameters()).device)
        parts = [self.model.encode_text(chunk).float() for chunk in tokens.split(_CHUNK)]
        return functional.normalize(torch.cat(parts), dim=1)

    def text_head(
        self,
        classes: Sequence[str],
        template: str = VP_TEMPLATE,
        *,
        names: Mapping[str, str] = EVP_NAMES,
        max_scale: float = 100.0,
    ) -> TextHead:
        """The head that reads each class off its name; the text tower runs here, once, and never in training.

        Args:
            classes: Names in the task's order.
            template: A text with one ``{}``.
            names: What some classes are called instead. Then all are put in lower case, with spaces for ``_`` and
                ``-``, as VP and EVP do.
            max_scale: Clamp of the scale, as in VP's code.

        Raises:
            ValueError: If there are no names, the template has no place for one, or two classes get the same text.
        """
        if isinstance(classes, str) or not classes:
            raise ValueError(f"classes is {classes!r}; expected a list of class names, such as task.classes")
        if "{}" not in template:
            raise ValueError(f"the template {template!r} has no {{}} for the class name; VP's is {VP_TEMPLATE!r}")
        texts = [template.format(readable(names.get(name, name))) for name in classes]
        if same := [text for text in texts if texts.count(text) > 1]:
            raise ValueError(f"more than one class is called {same[0]!r}, so text cannot tell them apart; pass names=")
        return TextHead(self.text_features(texts), min(self.scale, max_scale))

    @torch.no_grad()
    def zero_shot(
        self, task: Task, head: TextHead | None = None, recipe: training.Recipe | None = None
    ) -> training.Evaluation:
        """Accuracy with nothing trained, on the test images that fits with the same recipe are evaluated on.

        Args:
            head: Of the task's classes; by default `text_head` with VP's template.
            recipe: Number of test images, and precision.
        """
        recipe = recipe or training.Recipe()
        training.check_ready(self.image, task)
        head = self.text_head(task.classes) if head is None else head
        if len(head.features) != len(task.classes):
            raise ValueError(f"the head has {len(head.features)} classes, the task {task.name!r} {len(task.classes)}")
        cosines = CosineHead(head.features, head.scale)
        correct = []
        test = task.split(0, recipe.num_train, recipe.num_validation, recipe.num_test).test  # no seed changes it
        for chunk in test.split(_CHUNK):
            with backbones.autocast(self.image, recipe.precision):
                features = self.image(backbones.normalize(self.image, task.test[chunk]))
            correct.append(cosines(features).argmax(1).cpu() == task.test.labels[chunk])
        table = torch.cat(correct)
        return training.Evaluation.of(table, task.test.labels[test], len(task.classes))


def load(
    name: str = "ViT-B-32",
    pretrained: str | None = "openai",
    *,
    device: str | torch.device = "auto",
    **kwargs: Any,
) -> CLIP:
    """A frozen CLIP.

    Args:
        name: Architecture, as open_clip calls it.
        pretrained: Tag of weights, read from the file NAME.TAG.safetensors in the folder that APTHORY_WEIGHTS names
            (``ViT-B-32.openai.safetensors``) or else downloaded by open_clip; or any other file of weights, also
            looked for in that folder; or None for random weights. A tag brings the activation function it was trained
            with. Another file does not: OpenAI's weights want the architecture with ``-quickgelu`` in its name.
        device: ``"auto"`` takes a CUDA device if there is one.
        kwargs: Passed on to open_clip, for instance ``vision_cfg={...}`` of a smaller architecture.

    Raises:
        ImportError: If open_clip is not installed.
        ValueError: If there is no such architecture, or no such tag or file of weights.
        OSError: If the weights cannot be had, or do not fit.
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
                    pretrained = str(backbones.weight_file(file))
                    pixels = {key: own[key] for key in ("mean", "std", "interpolation") if key in own}
                    kwargs = {"force_preprocess_cfg": pixels, **kwargs}
            else:
                pretrained = str(backbones.weight_file(pretrained))
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
        "architecture": f"clip:{name}",
        "input_size": (3, side, side),
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": 1.0,
    }
    backbones.freeze(model)
    model.to(backbones.default_device() if device == "auto" else device)
    return CLIP(model.visual, model, open_clip.get_tokenizer(name, context_length=model.context_length))


def is_tower(backbone: Mapping[str, Any]) -> bool:
    """Whether the fields of a backbone in a study's configuration name the image tower of a CLIP."""
    return str(backbone["name"]).startswith(PREFIX)


def of(backbone: Mapping[str, Any]) -> CLIP:
    """The CLIP behind a backbone of a study's configuration, from memory where it was wanted before.

    Args:
        backbone: ``name`` ("clip:ViT-B-32"), ``input_size``, and further arguments of `load`.
    """
    return _of(json.dumps(dict(backbone)))


def text_head_of(backbone: Mapping[str, Any], classes: Sequence[str], template: str) -> TextHead:
    """`CLIP.text_head` of such a backbone; the text tower runs once for all studies of a process."""
    if not is_tower(backbone):
        raise ValueError(f"{backbone['name']!r} has no text tower; a text head wants CLIP, such as {PREFIX}ViT-B-32")
    return _text_head_of(json.dumps(dict(backbone)), tuple(classes), template)


@lru_cache(maxsize=2)
def _of(spec: str) -> CLIP:
    fields = json.loads(spec)
    size = fields.pop("input_size", None)
    return load(fields.pop("name").removeprefix(PREFIX), force_image_size=size, **fields)


@lru_cache
def _text_head_of(spec: str, classes: tuple[str, ...], template: str) -> TextHead:
    return _of(spec).text_head(classes, template)


def readable(name: str) -> str:
    """A class name in lower case, with spaces for ``_`` and ``-``."""
    return name.lower().replace("_", " ").replace("-", " ")
