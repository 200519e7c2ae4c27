"""What a task is: labelled images in two parts, classes with names, and subsets that are drawn from them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor


@runtime_checkable
class Source(Protocol):
    """Images that are decoded when they are asked for, always to the same pixels."""

    shape: tuple[int, int, int, int]  # images, channels, height and width

    def read(self, indices: Sequence[int]) -> Iterator[UInt8[np.ndarray, "channel height width"]]:
        """Decode the images at ascending indices, one after the other."""


class Images:
    """Labelled images: RGB values from 0 to 255, and for each image the index of its class.

    Images of a `Source` are decoded when their pixels are first looked at, and then kept: memory grows with the
    images that are used, not with those there are. ``images[index]`` gives the pixels of some, where the index is
    what a tensor takes (a number, a slice, a list or tensor of indices, a mask); iterating gives one image after the
    other and keeps none.

    Args:
        pixels: The decoded images, or where to decode them from.
        labels: From 0 up.

    Raises:
        ValueError: If there is not one label for each image, or images do not have three channels.
    """

    def __init__(self, pixels: UInt8[Tensor, "image channel height width"] | Source, labels: Int64[Tensor, " image"]):
        self.labels = labels
        self.shape: tuple[int, ...] = tuple(pixels.shape)  # images, channels, height and width
        if self.shape[0] != len(labels):
            raise ValueError(f"{self.shape[0]} images and {len(labels)} labels; expected one label each")
        if self.shape[1] != 3:
            raise ValueError(f"images of {self.shape[1]} channels; expected 3 (red, green, blue)")
        self._all: Tensor | None = pixels if isinstance(pixels, Tensor) else None
        self._source: Source | None = None if isinstance(pixels, Tensor) else pixels
        self._some: dict[int, np.ndarray] = {}  # the pixels of images decoded so far, while they are not all there

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"Images({len(self)} of {' x '.join(map(str, self.shape[1:]))})"

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> UInt8[Tensor, "*batch channel height width"]:
        if self._all is not None:
            return self._all[index]
        chosen = torch.arange(len(self))[index]
        rows = chosen.flatten().tolist()
        self.decode(rows)
        pixels = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        for place, row in enumerate(rows):
            pixels[place] = self._some[row]
        return torch.from_numpy(pixels).reshape(*chosen.shape, *self.shape[1:])

    def __iter__(self) -> Iterator[UInt8[Tensor, "channel height width"]]:
        return map(torch.from_numpy, self._source.read(range(len(self)))) if self._all is None else iter(self._all)

    @property
    def pixels(self) -> UInt8[Tensor, "image channel height width"]:
        """All images at once; those that are not decoded yet are decoded now."""
        if self._all is None:
            pixels = np.empty(self.shape, dtype=np.uint8)
            missing = [row for row in range(len(self)) if row not in self._some]
            for row, image in zip(missing, self._source.read(missing), strict=True):
                pixels[row] = image
            while self._some:  # one by one, so that no image is held twice
                row, image = self._some.popitem()
                pixels[row] = image
            self._all, self._source = torch.from_numpy(pixels), None
        return self._all

    @property
    def num_bytes(self) -> int:
        """Memory that decoded images take."""
        return sum(image.nbytes for image in self._some.values()) if self._all is None else self._all.nbytes

    def decode(self, indices: Sequence[int]) -> None:
        """Decode and keep these images, in one pass over their files: quickest before a random order of batches."""
        if self._all is None:
            missing = sorted(set(indices) - self._some.keys())
            for row, image in zip(missing, self._source.read(missing), strict=True):
                self._some[row] = image


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
        if (shape := self.train.shape[1:]) != (other := self.test.shape[1:]):
            raise ValueError(f"{here} has train images of shape {shape} but test images of {other}")
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
        images = f"{len(self.train)} train and {len(self.test)} test images of {self.train.shape[-1]} px"
        return f"Task({self.name!r}, {len(self.classes)} classes ({some(self.classes)}), {images})"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of class names, pixels and labels, in hex. What has to be decoded for it is not kept."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for images in (self.train, self.test):
            digest.update(_header(np.dtype(np.uint8), images.shape))
            for pixels in images:
                digest.update(np.ascontiguousarray(pixels.numpy()).data)
            labels = images.labels.numpy()
            digest.update(_header(labels.dtype, labels.shape) + labels.tobytes())
        return digest.hexdigest()

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
            digest.update(_header(item.dtype, item.shape))
            digest.update(np.ascontiguousarray(item).data)
    return digest.hexdigest()


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What is hashed before an array's bytes, so that arrays of other types and shapes do not hash alike."""
    return f"{dtype.str}{shape}".encode()
