"""What a task is: labelled images in two parts, classes with names, and subsets that are drawn from them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images: RGB pixels from 0 to 255, and for each image the index of its class."""

    pixels: UInt8[Tensor, "image channel height width"]
    labels: Int64[Tensor, " image"]

    def __post_init__(self):
        if len(self.pixels) != len(self.labels):
            raise ValueError(f"{len(self.pixels)} images and {len(self.labels)} labels; expected one label each")
        if self.pixels.shape[1] != 3:
            raise ValueError(f"images of {self.pixels.shape[1]} channels; expected 3 (red, green, blue)")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Images({len(self)} of {' x '.join(map(str, self.pixels.shape[1:]))})"


@dataclass(frozen=True, eq=False)
class Split:
    """Ascending indices of images: `train` and `validation` into `task.train`, `test` into `task.test`."""

    seed: int
    train: Int64[Tensor, " train"]
    validation: Int64[Tensor, " validation"]
    test: Int64[Tensor, " test"]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the three lists of indices, in hex."""
        return sha256(*(part.numpy() for part in (self.train, self.validation, self.test)))

    def __repr__(self) -> str:
        sizes = f"train={len(self.train)}, validation={len(self.validation)}, test={len(self.test)}"
        return f"Split(seed={self.seed}, {sizes})"


@dataclass(frozen=True, eq=False)
class Task:
    """A classification task. Every class has a training image; a class without test image is allowed.

    Raises:
        ValueError: If there is only one class, a label without class, or a class without training image.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    transform: str  # how the source became these pixels

    def __post_init__(self):
        here, last = f"task {self.name!r}", len(self.classes) - 1
        if last < 1:
            raise ValueError(f"{here} has the classes {list(self.classes)}; at least two are needed to classify")
        if len(set(self.classes)) <= last:
            raise ValueError(f"{here} names a class twice: {list(self.classes)}")
        if (shape := self.train.pixels.shape[1:]) != (other := self.test.pixels.shape[1:]):
            raise ValueError(f"{here} has train images of shape {tuple(shape)} but test images of {tuple(other)}")
        for part, images in (("train", self.train), ("test", self.test)):
            if not len(images):
                raise ValueError(f"{here} has no {part} images")
            low, high = int(images.labels.min()), int(images.labels.max())
            if low < 0 or high > last:
                raise ValueError(
                    f"{here} has {part} labels from {low} to {high}; expected 0 to {last} (-1 often marks "
                    "images published without labels: use another part of the data)"
                )
        if missing := self._absent(self.train.labels):
            raise ValueError(f"{here} has no training image of {missing}; add some or remove the class")

    def __repr__(self) -> str:
        side = self.train.pixels.shape[-1]
        images = f"{len(self.train)} train and {len(self.test)} test images of {side} px"
        return f"Task({self.name!r}, {len(self.classes)} classes ({some(self.classes)}), {images})"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of pixels, labels and class names, in hex."""
        arrays = (part.numpy() for images in (self.train, self.test) for part in (images.pixels, images.labels))
        return sha256(json.dumps(self.classes).encode(), *arrays)

    def split(
        self,
        seed: int,
        num_train: int | None = None,
        num_validation: int | None = 0,
        num_test: int | None = None,
    ) -> Split:
        """Draw subsets in proportion to the classes; each class is drawn once before any is drawn twice.

        `None`, or more than there is, means all there is. Validation is served first, out of the train part,
        and spares one image of each class while it can; train gets at most what is left. With the same seed,
        a larger subset contains the smaller one. The test subset is the same for every seed, so that
        comparisons between seeds and methods are paired.

        Raises:
            ValueError: If a number is negative, or a class would have no image in the train subset.
        """
        numbers = {"num_train": num_train, "num_validation": num_validation, "num_test": num_test}
        for name, number in numbers.items():
            if number is not None and number < 0:
                raise ValueError(f"{name} is {number}; expected None (all there is) or a number from 0 up")
        pool = len(self.train)
        left = 0 if num_validation is None else max(pool - num_validation, 0)
        order = _stratified_order(self.train.labels, seed)  # train from its front, validation from its back
        train = order[:left][:num_train]
        if missing := self._absent(self.train.labels[train]):
            way_out = "raise num_train" if len(train) < left else f"lower num_validation, now {num_validation}"
            raise ValueError(
                f"the train subset has no image of {missing}: it is {len(train)} of {pool} images for "
                f"{len(self.classes)} classes, with {numbers}; {way_out}"
            )
        test = _stratified_order(self.test.labels, 0)[:num_test]
        return Split(seed, *(part.sort().values for part in (train, order[left:], test)))

    def _absent(self, labels: Int64[Tensor, " image"]) -> str:
        counts = labels.bincount(minlength=len(self.classes))
        return some([name for name, count in zip(self.classes, counts, strict=True) if not count])


def _stratified_order(labels: Int64[Tensor, " image"], seed: int) -> Int64[Tensor, " image"]:
    """Order images at random such that every beginning and every end is stratified by class.

    The k-th image of a class of n stands at (k - 1/2) / n (Webster's apportionment), the first one at 0. The
    random numbers are raw bits of PCG64, which NumPy guarantees: the order is the same on every machine.
    """
    classes = labels.numpy()
    random = np.random.PCG64(seed).random_raw(len(classes))
    shuffled = np.lexsort((random, classes))  # by class, at random within
    sizes = np.bincount(classes)
    rank = np.arange(len(classes)) - (np.cumsum(sizes) - sizes)[classes[shuffled]]
    place = np.where(rank == 0, 0, (rank + 0.5) / sizes[classes[shuffled]])
    return torch.from_numpy(shuffled[np.lexsort((random[shuffled], place))])


def check_size(size: int) -> None:
    """Raise ValueError for a height and width in pixels that no image can have."""
    if size < 8:
        raise ValueError(f"images of {size} px; expected at least 8")


def some(names: Sequence[Any]) -> str:
    """At most five names, and how many more there are: for messages."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def sha256(*items: bytes | np.ndarray) -> str:
    """SHA-256 in hex of byte strings and of arrays with their type and shape."""
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, bytes):
            digest.update(item)
        else:
            digest.update(f"{item.dtype.str}{item.shape}".encode())
            digest.update(np.ascontiguousarray(item).data)
    return digest.hexdigest()
