"""Both towers of a CLIP: class names as a head, zero-shot accuracy.

The image tower is a backbone like any other, ``load_backbone("clip:ViT-B-32")``: it has sites
(``transformer.resblocks.3:input``), a data configuration, and, traced by torch.fx, a prefix that can be cached. The
text tower runs once for each head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from apthory import backbones, training
from apthory.backbones import clip_towers
from apthory.backbones.clip_towers import PREFIX
from apthory.heads import CosineHead, TextHead
from apthory.tasks import Task

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
_TOWER_BATCH = 64  # images or texts that a tower sees at once


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
        parts = [self.model.encode_text(chunk).float() for chunk in tokens.split(_TOWER_BATCH)]
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
        cosines = CosineHead(head.features, head.scale).to(next(self.image.parameters()).device)
        correct = []
        test = task.split(0, recipe.num_train, recipe.num_validation, recipe.num_test).test  # no seed changes it
        for chunk in test.split(_TOWER_BATCH):
            with backbones.autocast(self.image, recipe.precision):
                features = self.image(backbones.normalize(self.image, task.test[chunk]))
            correct.append(cosines(features).argmax(1).cpu() == task.test.labels[chunk])
        table = torch.cat(correct)
        return training.Evaluation.of(table, task.test.labels[test], len(task.classes))


def load_clip(
    name: str = "ViT-B-32",
    pretrained: str | None = "openai",
    *,
    device: str | torch.device = "auto",
    **kwargs: Any,
) -> CLIP:
    """A frozen CLIP: that of `backbones.load` with the name ``clip:NAME``.

    Args:
        name: Architecture, as open_clip calls it.
        pretrained: Tag of weights, read from the file NAME.TAG.safetensors in the folder that APTHORY_WEIGHTS names
            (``ViT-B-32.openai.safetensors``) or else downloaded by open_clip; or any other file of weights, also
            looked for in that folder; or None for random weights. A tag brings the activation function it was trained
            with. Another file does not: OpenAI's weights want the architecture with ``-quickgelu`` in its name.
        device: ``"auto"`` takes a CUDA device if there is one.
        kwargs: Passed on, for instance ``input_size=384``, or ``vision_cfg={...}`` of a smaller architecture.

    Raises:
        ImportError: If open_clip is not installed.
        ValueError: If there is no such architecture, or no such tag or file of weights.
        OSError: If the weights cannot be had, or do not fit.
    """
    return of(backbones.load(f"{PREFIX}{name}", pretrained=pretrained, device=device, **kwargs))


def of(image: nn.Module) -> CLIP:
    """The CLIP that an image tower of `backbones.load` belongs to; nothing is loaded again.

    A copy of the tower, fine-tuned perhaps, gives a CLIP of that copy and the same text tower.

    Raises:
        ValueError: If the backbone is no image tower of a CLIP.
    """
    model = backbones.whole(image)
    if model is image:
        raise ValueError(
            f"{backbones.architecture(image)!r} has no text tower; a text head wants CLIP, such as {PREFIX}ViT-B-32"
        )
    return CLIP(image, model, clip_towers.tokenizer(image))


def readable(name: str) -> str:
    """A class name in lower case, with spaces for ``_`` and ``-``."""
    return name.lower().replace("_", " ").replace("-", " ")
