"""Image classification tasks: embedded, from a folder, from Parquet files, from the hub.

Images are decoded once and kept as uint8, always in the same way: EXIF orientation applied, greyscale as
three equal channels (deeper than 8 bits: scaled by its bit depth), transparency composed on white, the
shorter side resized (bicubic, antialiased), the centre cropped. Nothing is random; a split records indices.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TEST_NAMES = ("test", "val", "validation")  # the first that exists is the test part
_BITS_PER_SAMPLE = 258  # TIFF tag


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
        return _sha256(*(part.numpy() for part in (self.train, self.validation, self.test)))

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
        return f"Task({self.name!r}, {len(self.classes)} classes ({_some(self.classes)}), {images})"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of pixels, labels and class names, in hex."""
        arrays = (part.numpy() for images in (self.train, self.test) for part in (images.pixels, images.labels))
        return _sha256(json.dumps(self.classes).encode(), *arrays)

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
        return _some([name for name, count in zip(self.classes, counts, strict=True) if not count])


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
        return _embedded(name, size)
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
            ranked = sorted(files, key=lambda file: _sha256(file.relative_to(root).as_posix().encode()))
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
            f"{str(root / present[1])!r} has the classes {_some(unknown)}, which train lacks (it has "
            f"{_some(list(train))}); add training images or remove them"
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
                raise ValueError(f"no {part} row with {column} {_some(absent)}; there are {_some(there)}")
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
        raise ValueError(f"{identifier!r} has no split {_some(missing)}; name them by train=, test=: {list(found)}")
    parts, names = [], None
    for part, name in (("train", train), ("test", test)):
        _check_columns(identifier, (image, label), found[name].column_names)
        rows = found[name].select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
        names = getattr(rows.features[label], "names", None)
        parts.append(_Part(part, list(rows[label]), rows[image].__getitem__))
    return _task(identifier, names, parts, size)


def _check_columns(name: str, wanted: Sequence[str], there: Sequence[str]) -> None:
    if missing := [column for column in wanted if column not in there]:
        raise ValueError(f"{name} has no column {_some(missing)}; it has {_some(there)}")


def _task(name: str, classes: Sequence[str] | None, parts: Sequence[_Part], size: int, how: str = "") -> Task:
    """Decode all parts into one tensor; without names, the classes are the sorted values of the labels."""
    _check_size(size)
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


def _check_size(size: int) -> None:
    if size < 8:
        raise ValueError(f"images of {size} px; expected at least 8")


def _some(names: Sequence[Any]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _sha256(*items: bytes | np.ndarray) -> str:
    """SHA-256 in hex of byte strings and of arrays with their type and shape."""
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, bytes):
            digest.update(item)
        else:
            digest.update(f"{item.dtype.str}{item.shape}".encode())
            digest.update(np.ascontiguousarray(item).data)
    return digest.hexdigest()


# Embedded tasks. Image `number` of a part (0 train, 1 test) has the class `number` modulo the number of
# classes, and is drawn in units of its side, so that a task is the same at every size. The constants were
# chosen such that a linear probe on either shipped backbone, trained on 400 images, gets 40 to 90 % right.

_NUM_IMAGES = 500  # in each part
_SHAPES = {  # signed distance from the outline in units of the radius, negative inside
    "disc": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.85,
    "triangle": lambda x, y: np.maximum(abs(x) * 0.866 - y * 0.5, y) - 0.6,
    "cross": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) - 0.33, np.maximum(abs(x), abs(y)) - 1),
    "bar": lambda x, y: np.maximum(abs(x) - 1, abs(y) - 0.25),
}
_KINDS = ("disc", "triangle", "cross")  # of color_shape
_COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220)}
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
_PHOTOGRAPHS = {  # in scikit-image's wheel, and the box that is all texture: left half train, right half test
    "brick": ("brick.png", (0, 0, 512, 512)),
    "grass": ("grass.png", (0, 0, 512, 512)),
    "gravel": ("gravel.png", (0, 0, 512, 512)),
    "tissue": ("ihc.png", (0, 0, 512, 512)),
    "galaxies": ("hubble_deep_field.jpg", (0, 0, 1000, 872)),
    "moon": ("moon.png", (0, 0, 512, 512)),
    "retina": ("retina.jpg", (300, 200, 1100, 1200)),
    "fur": ("chelsea.png", (60, 180, 300, 300)),
    "print": ("page.png", (0, 0, 384, 170)),
}


class _Scene:
    """A canvas to paint on; at first a smooth, noisy, almost grey background."""

    def __init__(self, random: np.random.Generator, size: int, low: int = 80, high: int = 176):
        self.size = size
        self.base = random.uniform(low, high) + random.uniform(-25, 25, 3)
        self.canvas = self.base + 0.1 * _field(random, 4, size)
        self.noise = 0.1 * _field(random, 64, size)

    def contrasting(self, random: np.random.Generator) -> Float[np.ndarray, " channel"]:
        """A random colour that differs from the background by at least 68 in every channel."""
        return (self.base + random.uniform(68, 188, 3)) % 256

    def paint(self, cover: Float[np.ndarray, "height width"], colour: Float[np.ndarray, " channel"]) -> None:
        self.canvas = self.canvas * (1 - cover[..., None]) + colour * cover[..., None]

    def draw(self, shape: str, x: float, y: float, radius: float, angle: float, colour: np.ndarray) -> None:
        """Paint a shape around (x, y) with smooth edges; angle in radians, counter-clockwise."""
        axis = (np.arange(self.size) + 0.5) / self.size
        u, v = (axis[None, :] - x) / radius, (y - axis[:, None]) / radius
        cos, sin = math.cos(angle), math.sin(angle)
        distance = _SHAPES[shape](cos * u + sin * v, cos * v - sin * u) * radius * self.size
        self.paint(np.clip(0.5 - distance, 0, 1), colour)

    def pixels(self) -> UInt8[np.ndarray, "channel height width"]:
        return np.clip(np.rint(self.canvas + self.noise), 0, 255).astype(np.uint8).transpose(2, 0, 1)


def _field(random: np.random.Generator, cells: int, size: int) -> Float[np.ndarray, "height width channel"]:
    """Random colours from -127.5 to 127.5 on a square of cells, interpolated."""
    colours = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.asarray(colours.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64) - 127.5


def _digit(random: np.random.Generator, part: int, number: int, size: int) -> np.ndarray:
    """Handwritten digits of scikit-learn (first half train, second half test), bright on dark."""
    scene = _Scene(random, size, low=10, high=30)
    side = round(size * random.uniform(0.9, 1))
    left, top = (random.uniform(0, 1, 2) * (size - side)).astype(int)
    ink = Image.fromarray(_handwriting(part, number % 10)[number // 10])
    cover = np.zeros((size, size))
    cover[top : top + side, left : left + side] = ink.resize((side, side), Image.Resampling.BICUBIC)
    scene.paint(cover / 255, random.uniform(220, 250, 3))
    return scene.pixels()


@cache
def _handwriting(part: int, digit: int) -> UInt8[np.ndarray, "image height width"]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    in_part = np.arange(len(digits.target)) * 2 // len(digits.target) == part
    return np.rint(digits.images[in_part & (digits.target == digit)] * (255 / 16)).astype(np.uint8)


def _texture(random: np.random.Generator, part: int, number: int, size: int) -> np.ndarray:
    """Grey crops of 32 to 64 px of photographs, turned by right angles, of random brightness and contrast."""
    file, (left, top, right, bottom) = list(_PHOTOGRAPHS.values())[number % len(_PHOTOGRAPHS)]
    middle = (left + right) // 2
    left, right = ((left, middle), (middle, right))[part]
    side = int(random.integers(32, 65))
    x, y = int(random.integers(left, right - side + 1)), int(random.integers(top, bottom - side + 1))
    crop = _photograph(file).crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BICUBIC)
    grey = np.rot90(np.asarray(crop, dtype=np.float64), random.integers(4))
    grey = (grey - grey.mean()) * random.uniform(0.5, 1.5) + random.uniform(70, 186)
    return np.repeat(np.clip(np.rint(grey), 0, 255).astype(np.uint8)[None], 3, axis=0)


@cache
def _photograph(file: str) -> Image.Image:
    with resources.as_file(resources.files("skimage") / "data" / file) as path, Image.open(path) as image:
        return image.convert("L")


def _count(random: np.random.Generator, part: int, number: int, size: int) -> np.ndarray:
    """From 1 to 4 shapes; kind, size, angle, colour and place vary."""
    scene = _Scene(random, size)
    for cell in random.permutation(9)[: number % 4 + 1]:  # of a 3 x 3 grid: shapes do not touch
        x, y = (np.array(divmod(cell, 3)) + random.uniform(0.4, 0.6, 2)) / 3
        radius, angle = random.uniform(0.1, 0.14), random.uniform(0, math.tau)
        kind = random.choice(["disc", "square", "triangle"])
        scene.draw(kind, x, y, radius, angle, scene.contrasting(random))
    return scene.pixels()


def _position(random: np.random.Generator, part: int, number: int, size: int) -> np.ndarray:
    """The cell of a 3 x 3 grid that holds the centre of a bright shape; kind, size and angle vary."""
    scene = _Scene(random, size, low=50, high=90)
    y, x = (np.array(divmod(number % 9, 3)) + random.uniform(0, 1, 2)) / 3
    radius, angle = random.uniform(0.2, 0.45), random.uniform(0, math.tau)
    kind = random.choice(["disc", "square", "triangle", "cross"])
    scene.draw(kind, x, y, radius, angle, random.uniform(160, 240, 3))
    return scene.pixels()


def _orientation(random: np.random.Generator, part: int, number: int, size: int) -> np.ndarray:
    """The direction of a bar in steps of 30 degrees, give or take 9; length, colour and place vary."""
    scene = _Scene(random, size)
    x, y = random.uniform(0.3, 0.7, 2)
    angle = (number % 6 + random.uniform(-0.3, 0.3)) * math.pi / 6
    scene.draw("bar", x, y, random.uniform(0.3, 0.45), angle, scene.contrasting(random))
    return scene.pixels()


def _color_shape(random: np.random.Generator, part: int, number: int, size: int) -> np.ndarray:
    """The conjunction of a shape's colour and kind; shade, size, angle and place vary."""
    scene = _Scene(random, size)
    x, y = random.uniform(0.3, 0.7, 2)
    colour, kind = divmod(number % 9, 3)
    shade = list(_COLOURS.values())[colour] + random.uniform(-30, 30, 3)
    scene.draw(_KINDS[kind], x, y, random.uniform(0.22, 0.3), random.uniform(0, math.tau), shade)
    return scene.pixels()


_DRAWINGS = {  # the classes, and what draws an image
    "digits": (tuple("0123456789"), _digit),
    "textures": (tuple(_PHOTOGRAPHS), _texture),
    "count": (tuple("1234"), _count),
    "position": (tuple(f"{row} {column}" for row in _ROWS for column in _COLUMNS), _position),
    "orientation": (tuple(f"{degrees} degrees" for degrees in range(0, 180, 30)), _orientation),
    "color_shape": (tuple(f"{colour} {kind}" for colour in _COLOURS for kind in _KINDS), _color_shape),
}
EMBEDDED = tuple(_DRAWINGS)


def _embedded(name: str, size: int) -> Task:
    _check_size(size)
    classes, draw = _DRAWINGS[name]

    def images(part: int) -> Images:
        random = np.random.Generator(np.random.PCG64([part, *name.encode()]))
        pixels = np.stack([draw(random, part, number, size) for number in range(_NUM_IMAGES)])
        return Images(torch.from_numpy(pixels), torch.arange(_NUM_IMAGES) % len(classes))

    return Task(name, classes, images(0), images(1), f"drawn at {size} px")
