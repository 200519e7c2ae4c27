"""Encoded images become pixels: all once, which checks them and gives the task's digest, and then those that are used.

Images become uint8 always in the same way: EXIF orientation applied, greyscale as three equal channels (deeper than
8 bits: scaled by its bit depth), transparency composed on white, the shorter side resized (bicubic, antialiased), the
centre cropped. Nothing is random; a split records indices.
"""

import io
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from apthory._tools.progress import progress
from apthory.tasks import remembered
from apthory.tasks.task import Images, Task, check_size, sha256

_BITS_PER_SAMPLE = 258  # TIFF tag
_VERSION = 1  # of the pixels that a file becomes: raise it when they change, and every task is decoded anew
_KEPT = 2**26  # bytes of pixels up to which the first pass keeps them all, so that small tasks are not decoded twice
_WAITING = 64  # images that are read ahead of the one that is decoded next


class Stamp(NamedTuple):
    """What tells that a file has not changed."""

    num_bytes: int
    modified: int  # nanoseconds since 1970

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class EncodedPart:
    """The train or the test part of a task, before its images are decoded."""

    name: str  # "train" or "test"
    labels: Sequence[Any]
    # Takes ascending indices and gives a mapping for each, with the image's "bytes", or its "path" if there are none.
    encoded: Callable[[Sequence[int]], Iterator[Mapping[str, Any] | None]]
    files: Mapping[str, Stamp] = field(default_factory=dict)  # the files that hold the images, as far as they are known


def make_task(
    name: str,
    classes: Sequence[str] | None,
    parts: Sequence[EncodedPart],
    size: int,
    how: str = "",
    options: Mapping[str, Any] | None = None,
) -> Task:
    """A task whose images are decoded when they are used. The first time, each is decoded once to see that it can be.

    Args:
        name: Of the task.
        classes: Their names, where labels are indices into them; else the classes are the sorted values of the labels.
        parts: Train and test.
        size: Height and width in pixels.
        how: What the description of the pixels ends with.
        options: What decides the images beside files and size.

    Raises:
        ValueError: If an image has no label, or images cannot be read (counted and named).
    """
    check_size(size)
    labels = [label for part in parts for label in part.labels]
    if None in labels:
        raise ValueError(f"{labels.count(None)} of {len(labels)} images of {name!r} have no label; remove them")
    if classes is None:
        values = sorted(set(labels))
        classes, labels = [str(value) for value in values], [values.index(label) for label in labels]
    indices = torch.tensor(labels, dtype=torch.int64).split([len(part.labels) for part in parts])
    sources = [_Encoded(f"{name} {part.name}", part, size) for part in parts]
    train, test = map(Images, sources, indices)
    task = Task(name, tuple(classes), train, test, "")  # labels are judged before any image is decoded
    identity = {
        "reader": (_VERSION, PIL.__version__),
        "size": size,
        "options": options,
        "files": [[(path, *stamp) for path, stamp in part.files.items()] for part in parts],
        "labels": sha256(json.dumps(task.classes).encode(), *(part.numpy() for part in indices)),
    }
    if not (finding := remembered.recall(identity)):
        task, finding = _survey(task, sources)
        if all(source.stamps.keys() == source.part.files.keys() for source in sources):
            remembered.remember(identity, finding)  # else there are files whose change the identity would not tell
    task = replace(
        task, transform=f"{finding.encoding}, resize {size} (bicubic, shorter side), centre crop {size}{how}"
    )
    vars(task)["digest"] = finding.digest  # where `cached_property` looks first
    return task


def _survey(task: Task, sources: Sequence["_Encoded"]) -> tuple[Task, remembered.Finding]:
    """Decode all images once; gives the task, with the pixels if they are few, and what was found out."""
    num_images = len(task.train) + len(task.test)
    keeps = num_images * math.prod(task.train.shape[1:]) <= _KEPT
    surveyed = [_Surveyed(source, keeps) for source in sources]
    labels = task.train.labels, task.test.labels
    train, test = map(Images, surveyed, labels)
    digest = replace(task, train=train, test=test).digest  # reads every image
    if failures := [failure for source in surveyed for failure in source.failures]:
        more = ", ..." if len(failures) > 5 else ""
        raise ValueError(
            f"{len(failures)} of {num_images} images cannot be read: {', '.join(failures[:5])}{more}; "
            "remove or replace them"
        )
    if keeps:
        train, test = map(Images, (torch.from_numpy(source.kept) for source in surveyed), labels)
        task = replace(task, train=train, test=test)
    encodings = {encoding for source in surveyed for encoding in source.encodings}
    return task, remembered.Finding(digest, "/".join(sorted(encodings)))


class Decoded(NamedTuple):
    """An image, or what is wrong with it."""

    place: str  # its file, or its row
    pixels: UInt8[np.ndarray, "channel height width"] | None
    encoding: str = ""
    reason: str = ""  # why there are no pixels

    @property
    def failure(self) -> str:
        """Place and reason in one."""
        return f"{self.place} ({self.reason})"


def read_images(files: Sequence[str | Path], size: int) -> Iterator[Decoded]:
    """Decode image files one after the other, as tasks do; only a few are in memory at a time.

    Args:
        files: In the order in which they are wanted.
        size: Height and width in pixels.

    Yields:
        One image for each file; one that cannot be read has no pixels, and says why.
    """
    check_size(size)

    def encoded(indices: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        return ({"bytes": None, "path": str(files[index])} for index in indices)

    part = EncodedPart("images", [None] * len(files), encoded)
    yield from _Encoded("images", part, size).results(range(len(files)), most_without_bar=0)


class _Encoded:
    """A `Source` that decodes images of a part in several threads, and sees to it that no file changes meanwhile."""

    def __init__(self, name: str, part: EncodedPart, size: int):
        self.name, self.part = name, part
        self.shape = (len(part.labels), 3, size, size)
        self.stamps = dict(part.files)  # and of files that an image turns out to be in, when it is first read

    def read(self, indices: Sequence[int]) -> Iterator[UInt8[np.ndarray, "channel height width"]]:
        for result in self.results(indices):
            if result.pixels is None:
                raise RuntimeError(
                    f"an image of {self.name} can no longer be read: {result.failure}; load the task again"
                )
            yield result.pixels

    def results(self, indices: Sequence[int], most_without_bar: int = 5000) -> Iterator[Decoded]:
        """Decode the images at ascending indices; only a few of them are in memory at a time."""
        waiting: deque[Future[Decoded]] = deque()
        with (
            progress(desc=self.name, total=len(indices), disable=len(indices) <= most_without_bar) as bar,
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,  # PIL decodes outside the GIL
        ):
            for index, encoded in zip(indices, self.part.encoded(indices), strict=True):
                waiting.append(pool.submit(self._decode, index, encoded))
                if len(waiting) == _WAITING:
                    yield waiting.popleft().result()
                    bar.update()
            while waiting:
                yield waiting.popleft().result()
                bar.update()

    def _decode(self, index: int, encoded: Mapping[str, Any] | None) -> Decoded:
        place = f"{self.part.name} row {index}"
        try:
            if not encoded or (encoded["bytes"] is None and not encoded["path"]):
                raise ValueError("neither bytes nor a path")
            place = encoded["path"] or place
            with self._open(encoded) as file, Image.open(file) as image:
                return Decoded(place, _pixels(image, self.shape[-1]), image.format.lower())
        except _ChangedError:
            raise
        except UnidentifiedImageError:
            return Decoded(place, None, reason="not an image, or of an unknown format")
        except Exception as error:  # noqa: BLE001 - of many kinds; raised for all images at once
            return Decoded(place, None, reason=str(error))

    def _open(self, encoded: Mapping[str, Any]) -> io.BytesIO | io.BufferedReader:
        if encoded["bytes"] is not None:
            return io.BytesIO(encoded["bytes"])
        path = encoded["path"]
        file = open(path, "rb")  # noqa: SIM115 - closed by the caller
        stamp = Stamp.of(os.fstat(file.fileno()))
        try:
            check_unchanged(path, self.stamps.setdefault(path, stamp), stamp)
        except _ChangedError:
            file.close()
            raise
        return file


class _Surveyed:
    """A `Source` that is read once, from end to end: images that cannot be read are noted, and black."""

    def __init__(self, source: _Encoded, keeps: bool):
        self.source, self.shape = source, source.shape
        self.failures: list[str] = []
        self.encodings: set[str] = set()
        self.kept = np.empty(self.shape if keeps else 0, dtype=np.uint8)

    def read(self, indices: Sequence[int]) -> Iterator[UInt8[np.ndarray, "channel height width"]]:
        for index, result in zip(indices, self.source.results(indices), strict=True):
            if result.pixels is None:
                self.failures.append(result.failure)
                yield np.zeros(self.shape[1:], dtype=np.uint8)
            else:
                self.encodings.add(result.encoding)
                if len(self.kept):
                    self.kept[index] = result.pixels
                yield result.pixels


class _ChangedError(RuntimeError):
    pass


def check_unchanged(path: str, before: Stamp, now: Stamp | None) -> None:
    """Raise RuntimeError unless a file is the one that was there when its task was loaded.

    Args:
        path: Of the file.
        before: What told it then.
        now: What tells it now; None if there is none.
    """
    if now != before:
        what = "it is gone" if now is None else f"it had {before.num_bytes:,} bytes and has {now.num_bytes:,}"
        if now and now.num_bytes == before.num_bytes:
            what = "it is of another date"
        raise _ChangedError(
            f"{path!r} changed after its task was loaded ({what}), so its images are not those of the task's digest; "
            "load the task again"
        )


def _pixels(image: Image.Image, size: int) -> UInt8[np.ndarray, "channel height width"]:
    """Pixels of an opened image, made as the module's docstring says."""
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]  # 16 in all formats but TIFF
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels, which have no bit depth")
    if image.mode.startswith("I"):  # PIL's own conversion clips at 255
        values, top = np.asarray(image).astype(np.int64), 2**bits - 1
        if values.min() < 0 or values.max() > top:
            raise ValueError(f"values from {values.min()} to {values.max()} do not fit {bits} bits")
        image = Image.fromarray(((values * 255 + top // 2) // top).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    width, height = (size * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1))
