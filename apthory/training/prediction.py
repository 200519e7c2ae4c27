"""What a trained model says of images: in files, in a folder, or as pixels."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from apthory import backbones
from apthory._tools.progress import progress
from apthory.methods import AdaptedBackbone
from apthory.tasks import IMAGE_SUFFIXES, Images, read_images


def predict(
    model: AdaptedBackbone,
    images: str | Path | Sequence[str | Path] | Images | UInt8[Tensor, "image channel height width"],
    *,
    batch_size: int = 64,
    classes: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The most probable class of each image.

    Files are decoded as tasks decode them, to the size that the backbone takes. Those that cannot be read are left out,
    with a warning.

    Args:
        model: As `apthory.load_prompt` gives it; or `Fit.model`.
        images: A folder, of which all files are taken that end in one of `IMAGE_SUFFIXES`, at any depth; a file, or a
            list of files; or pixels from 0 to 255, such as ``task.test``.
        batch_size: Images that the model is given at once.
        classes: Names of the classes, in the order of the logits, where the model does not know them.

    Returns:
        One row for each image: its ``file`` (of pixels the index of the image), its ``class``, and the ``probability``
        of that class. Files are sorted. ``attrs["unreadable"]`` lists the files that could not be read, each with the
        reason.

    Raises:
        ValueError: If the model has no head, or its classes have no names; if there is no image, or none can be read.
    """
    names = _check_model(model, classes)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
    if isinstance(images, Tensor | Images):
        _check_pixels(model, images)
        chunks = torch.arange(len(images)).split(batch_size)
        pixels = (images[chunk] for chunk in progress(chunks, desc="images", unit="batch"))
        return _table_of_answers(list(range(len(images))), _answers(model, pixels, names), names)
    files = _files(images)
    read: list[str] = []
    unreadable: list[tuple[str, str]] = []

    def decoded() -> Iterator[UInt8[np.ndarray, "channel height width"]]:
        for image in read_images(files, backbones.input_size(model.backbone)):
            if image.pixels is None:
                unreadable.append((image.place, image.reason))
            else:
                read.append(image.place)
                yield image.pixels

    answers = _answers(model, _batches(decoded(), batch_size), names)
    faults = ", ".join(f"{file} ({reason})" for file, reason in unreadable[:5])
    faults += f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    if not read:
        raise ValueError(f"none of {len(files)} images can be read: {faults}; replace them")
    table = _table_of_answers(read, answers, names)
    table.attrs["unreadable"] = unreadable
    if unreadable:
        warnings.warn(f"{len(unreadable)} of {len(files)} images cannot be read: {faults}", stacklevel=2)
    return table


@torch.no_grad()
def logits(model: AdaptedBackbone, pixels: UInt8[Tensor, "batch channel height width"]) -> Float[Tensor, "batch class"]:
    """Logits of a few images: the backbone in mixed precision where there is hardware for it, the head in float32."""
    with backbones.autocast(model.backbone, "auto"):
        features = model.features(backbones.normalize(model.backbone, pixels))
    assert model.head is not None, "callers make sure that there is a head"
    return model.head(features.float()).cpu()


def _answers(
    model: AdaptedBackbone, batches: Iterable[UInt8[Tensor, "batch channel height width"]], classes: Sequence[str]
) -> list[Tensor]:
    """Probabilities of the classes, one table for each batch."""
    answers = []
    for pixels in batches:
        answers.append(logits(model, pixels).softmax(1))
        if (width := answers[0].shape[1]) != len(classes):
            raise ValueError(f"the model has {width} classes, and classes= names {len(classes)}; name each of them")
    return answers


def _table_of_answers(files: Sequence[str | int], answers: Sequence[Tensor], classes: Sequence[str]) -> pd.DataFrame:
    top = torch.cat(list(answers)).max(1)
    named = [classes[index] for index in top.indices.tolist()]
    table = pd.DataFrame({"file": files, "class": named, "probability": top.values.double().numpy()})
    table.attrs["unreadable"] = []
    return table


def _batches(images: Iterator[UInt8[np.ndarray, "channel height width"]], size: int) -> Iterator[Tensor]:
    while batch := list(islice(images, size)):
        yield torch.from_numpy(np.stack(batch))


def _files(images: str | Path | Sequence[str | Path]) -> list[str]:
    """Sorted names of the files that are meant."""
    if not isinstance(images, str | Path):
        files = sorted({str(file) for file in images})
        if not files:
            raise ValueError("images is empty; give a folder, files, or pixels")
        return files
    if not os.path.isdir(images):
        if not os.path.exists(images):
            raise ValueError(f"there is no folder or file {str(images)!r}; name a folder of images")
        return [str(images)]
    there = [path for path in Path(images).rglob("*") if path.is_file()]
    files = sorted(str(path) for path in there if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(
            f"no images in {str(images)!r} ({len(there)} other files); expected files that end in "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    return files


def _check_model(model: AdaptedBackbone, classes: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the classes, after a check that the model can tell them apart."""
    if not isinstance(model, AdaptedBackbone):
        raise ValueError(f"model is a {type(model).__name__}; expected what load_prompt gives, or a fit's .model")
    if model.head is None:
        raise ValueError(
            "the model has no head, so it gives features and no classes; Fit.save keeps the head that was trained"
        )
    if model.training or model.backbone.training:
        raise ValueError("the model is in train mode, where it would answer otherwise; call model.eval()")
    if isinstance(classes, str):
        raise ValueError(f"classes is {classes!r}; expected a list of names, in the order of the logits")
    names = tuple(model.classes if classes is None else classes)
    if not names:
        raise ValueError(
            "the model does not know the names of its classes (files of version 0.1.0 do not keep them); give them in "
            "the order of the logits: predict(..., classes=task.classes)"
        )
    return names


def _check_pixels(model: AdaptedBackbone, images: Tensor | Images) -> None:
    side = backbones.input_size(model.backbone)
    is_bytes = isinstance(images, Images) or images.dtype == torch.uint8
    if tuple(images.shape[1:]) != (3, side, side) or not is_bytes:
        kind = "" if isinstance(images, Images) else f"{images.dtype} of "
        raise ValueError(
            f"images are {kind}shape {tuple(images.shape)}; expected uint8 pixels, not normalized, of shape "
            f"(number, 3, {side}, {side})"
        )
    if not len(images):
        raise ValueError("images is empty; give a folder, files, or pixels")
