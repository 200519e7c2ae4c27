"""Tasks from a folder, from Parquet files and from the hub.

Images are decoded once and kept as uint8, always in the same way: EXIF orientation applied, greyscale as
three equal channels (deeper than 8 bits: scaled by its bit depth), transparency composed on white, the
shorter side resized (bicubic, antialiased), the centre cropped. Nothing is random; a split records indices.
"""

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from apthory.tasks.embedded import EMBEDDED, draw
from apthory.tasks.task import Images, Task, check_size, sha256, some

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TEST_NAMES = ("test", "val", "validation")  # the first that exists is the test part
_BITS_PER_SAMPLE = 258  # TIFF tag


def load(name: str, size: int, data: str | Path | None = None) -> Task:
    """Load a task by name.

    Args:
        name: One of `EMBEDDED`, a folder of Parquet files in the data folder, or "folder:PATH",
            "parquet:PATH", "hub:ID" for `from_folder`, `from_parquet`, `from_hub` with default options.
        size: Height and width in pixels.
        data: The data folder; the environment variable APTHORY_DATA if left out.

    Raises:
        ValueError: If there is no such task; the message lists those there are.
    """
    prefix, _, rest = name.partition(":")
    readers = {"folder": from_folder, "parquet": from_parquet, "hub": from_hub}
    if prefix in readers and rest:
        return readers[prefix](rest, size)
    if name in EMBEDDED:
        return draw(name, size)
    folder = data or os.environ.get("APTHORY_DATA")
    known = f"Embedded tasks: {', '.join(EMBEDDED)}. Elsewhere: folder:PATH, parquet:PATH, hub:ID."
    way_out = "Set APTHORY_DATA or pass data= to name the folder that holds the tasks"
    if Path(name).is_dir() and not (folder and (Path(folder) / name).is_dir()):
        kind = "parquet" if any(Path(name).glob("train-*.parquet")) else "folder"
        raise ValueError(f"{name!r} is a folder, no task's name; write {f'{kind}:{name}'!r} to read the images in it")
    if not folder:
        raise ValueError(f"no embedded task {name!r}, and no data folder to look in. {way_out}. {known}")
    if not Path(folder).is_dir():
        raise ValueError(f"no task {name!r}: the data folder {str(folder)!r} does not exist. {way_out}. {known}")
    found = sorted(path.name for path in Path(folder).iterdir() if any(path.glob("train-*.parquet")))
    if name not in found:
        there = ", ".join(found) or "no folder with train-*.parquet"
        raise ValueError(f"no task {name!r} in the data folder {str(folder)!r}, which has: {there}. {known}")
    return from_parquet(Path(folder) / name, size)


class _Part(NamedTuple):
    """Train or test part before decoding; `fetch(index)` gives a mapping with "bytes" or else "path"."""

    name: str
    labels: Sequence[Any]
    fetch: Callable[[int], Mapping[str, Any]]


def from_folder(path: str | Path, size: int) -> Task:
    """Read PATH/train/<class>/* and PATH/test/<class>/*, or PATH/<class>/* with a test part held out.

    The test part is the first of test, val and validation that exists. Without such folders, a fifth of each
    class (at least one image, never the last) is held out: those whose names below PATH have the smallest
    SHA-256, the same on every machine. Images are all files below a class folder that end in one of
    `IMAGE_SUFFIXES`.

    Raises:
        ValueError: If a class has no images, or images cannot be read (counted and named).
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"no folder {str(path)!r}; expected PATH/train/<class>/*.png or PATH/<class>/*.png")
    present = [name for name in ("train", *_TEST_NAMES) if (root / name).is_dir()]
    how = ""
    if not present:
        train, test = _files_by_class(root), {}
        for name, files in train.items():
            ranked = sorted(files, key=lambda file: sha256(file.relative_to(root).as_posix().encode()))
            number = min(max(1, round(len(files) / 5)), len(files) - 1)
            train[name], test[name] = sorted(ranked[number:]), sorted(ranked[:number])
        how = "; test: a fifth of each class, by SHA-256 of the file names"
    elif present[0] == "train" and len(present) > 1:
        train, test = _files_by_class(root / "train"), _files_by_class(root / present[1])
    else:
        raise ValueError(
            f"{str(path)!r} has {present[0]} but not both train and one of {', '.join(_TEST_NAMES)}; "
            "add the other, or have class folders only (a fifth of the images is then held out for testing)"
        )
    if unknown := sorted(test.keys() - train.keys()):
        raise ValueError(
            f"{str(root / present[1])!r} has the classes {some(unknown)}, which train lacks (it has "
            f"{some(list(train))}); add training images or remove them"
        )
    classes, parts = tuple(train), []
    for part, by_class in (("train", train), ("test", test)):
        images = [{"bytes": None, "path": str(file)} for files in by_class.values() for file in files]
        labels = [classes.index(name) for name, files in by_class.items() for _ in files]
        parts.append(_Part(part, labels, images.__getitem__))
    return _task(root.resolve().name, classes, parts, size, how)


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    found = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(file for file in path.rglob("*") if file.is_file())
        found[path.name] = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not found[path.name]:
            raise ValueError(
                f"class {path.name!r} in {str(folder)!r} has no images ({len(files)} other files); expected "
                f"files that end in {', '.join(IMAGE_SUFFIXES)}: add some or remove the folder"
            )
    if not found:
        raise ValueError(f"{str(folder)!r} has no class folders; expected <class>/*.png in it")
    return found


def from_parquet(
    path: str | Path,
    size: int,
    *,
    image: str = "image",
    label: str = "label",
    where: Mapping[str, Sequence[Any]] | None = None,
) -> Task:
    """Read PATH/train-*.parquet and PATH/test-*.parquet, the layout of image data on the Hugging Face hub.

    Args:
        path: The folder of the files.
        size: Height and width in pixels.
        image: The column of encoded images, struct<bytes, path>.
        label: The column of labels: integers with names in the schema (ClassLabel), or integers or strings.
        where: Keep the rows whose column has one of the values, e.g. {"domain": ("photo",)}.

    Raises:
        ValueError: If files, columns or values are missing, or images cannot be read (counted and named).
    """
    import pyarrow.parquet as pq

    where = {column: [keep] if isinstance(keep, str) else list(keep) for column, keep in (where or {}).items()}
    filters = [(column, "in", keep) for column, keep in where.items()] or None
    parts, names = [], []
    for part in ("train", "test"):
        files = sorted(Path(path).glob(f"{part}-*.parquet"))
        if not files:
            raise ValueError(f"no file {Path(path) / part}-*.parquet; a task needs train and test files")
        _check_columns(files[0].name, (image, label, *where), pq.read_schema(files[0]).names)
        for column, keep in where.items():
            there = pq.read_table(files, columns=[column])[column].unique().to_pylist()
            if absent := [value for value in keep if value not in there]:
                raise ValueError(f"no {part} row with {column} {some(absent)}; there are {some(there)}")
        table = pq.read_table(files, columns=[image, label], filters=filters)
        parts.append(_Part(part, table[label].to_pylist(), partial(_row, table[image])))
        info = json.loads((table.schema.metadata or {}).get(b"huggingface", "{}"))  # where `datasets` puts names
        names.append(info.get("info", {}).get("features", {}).get(label, {}).get("names"))
    if names[0] != names[1]:
        raise ValueError(f"train and test in {str(path)!r} name their classes differently: {names[0]}, {names[1]}")
    chosen = "".join(f"[{column}={'|'.join(map(str, keep))}]" for column, keep in where.items())
    return _task(Path(path).resolve().name + chosen, names[0], parts, size)


def _row(column: Any, index: int) -> Mapping[str, Any]:
    return column[index].as_py()


def from_hub(
    identifier: str,
    size: int,
    *,
    image: str = "image",
    label: str = "label",
    train: str = "train",
    test: str | None = None,
    **options: Any,
) -> Task:
    """Read a data set of the Hugging Face hub, or anything else that `datasets.load_dataset` reads.

    Args:
        identifier: Such as "uoft-cs/cifar10".
        size: Height and width in pixels.
        image: The column of images.
        label: The column of labels.
        train: The split to train on.
        test: The split to test on; the first of test, val and validation if left out.
        **options: For `datasets.load_dataset`, such as name= (the configuration) or revision=.

    Raises:
        OSError: If the data set cannot be loaded.
        ValueError: If splits or columns are missing, or images cannot be read (counted and named).
    """
    import datasets

    try:
        found = datasets.load_dataset(identifier, **options)
    except Exception as error:  # the hub's client has many, which differ between versions
        raise OSError(
            f"cannot load {identifier!r} from the hub ({type(error).__name__}: {error}); check identifier, "
            "options and connection, or read a local copy by folder:PATH or parquet:PATH"
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        raise ValueError("the options split= and streaming= do not fit here; choose splits by train= and test=")
    test = test or next((name for name in _TEST_NAMES if name in found), "test")
    if missing := [name for name in (train, test) if name not in found]:
        raise ValueError(f"{identifier!r} has no split {some(missing)}; name them by train=, test=: {list(found)}")
    parts, names = [], None
    for part, name in (("train", train), ("test", test)):
        _check_columns(identifier, (image, label), found[name].column_names)
        rows = found[name].select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
        names = getattr(rows.features[label], "names", None)
        parts.append(_Part(part, list(rows[label]), rows[image].__getitem__))
    return _task(identifier, names, parts, size)


def _check_columns(name: str, wanted: Sequence[str], there: Sequence[str]) -> None:
    if missing := [column for column in wanted if column not in there]:
        raise ValueError(f"{name} has no column {some(missing)}; it has {some(there)}")


def _task(name: str, classes: Sequence[str] | None, parts: Sequence[_Part], size: int, how: str = "") -> Task:
    """Decode all parts into one tensor; without names, the classes are the sorted values of the labels."""
    check_size(size)
    rows = [(part, index) for part in parts for index in range(len(part.labels))]
    labels = [label for part in parts for label in part.labels]
    if None in labels:
        raise ValueError(f"{labels.count(None)} of {len(labels)} images of {name!r} have no label; remove them")
    if classes is None:
        values = sorted(set(labels))
        classes, labels = [str(value) for value in values], [values.index(label) for label in labels]
    pixels = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    target = pixels.numpy()

    def decode(row: int) -> tuple[str, str]:  # the encoding, or what went wrong
        part, index = rows[row]
        place = f"{part.name} row {index}"
        try:
            source = part.fetch(index)
            place = source["path"] or place
            with Image.open(source["path"] if source["bytes"] is None else io.BytesIO(source["bytes"])) as image:
                target[row] = _pixels(image, size)
                return image.format.lower(), ""
        except UnidentifiedImageError:
            return "", f"{place} (not an image, or of an unknown format)"
        except Exception as error:  # noqa: BLE001 - of many kinds; raised below, for all images at once
            return "", f"{place} ({error})"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # PIL decodes outside the GIL
        results = list(tqdm(pool.map(decode, range(len(rows))), name, len(rows), disable=len(rows) <= 5000))
    if failures := [failure for _, failure in results if failure]:
        more = ", ..." if len(failures) > 5 else ""
        raise ValueError(
            f"{len(failures)} of {len(rows)} images cannot be read: {', '.join(failures[:5])}{more}; "
            "remove or replace them"
        )
    indices, cut = torch.tensor(labels, dtype=torch.int64), len(parts[0].labels)
    encoding = "/".join(sorted({encoding for encoding, _ in results}))
    transform = f"{encoding}, resize {size} (bicubic, shorter side), centre crop {size}{how}"
    train, test = (Images(pixels[part], indices[part]) for part in (slice(cut), slice(cut, None)))
    return Task(name, tuple(classes), train, test, transform)


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
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
