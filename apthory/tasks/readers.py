"""Tasks by name, from a folder, from Parquet files and from the hub: which images there are, of which classes."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from apthory._tools.extras import from_extra
from apthory.tasks.decoding import EncodedPart, Stamp, check_unchanged, make_task
from apthory.tasks.embedded import EMBEDDED, draw_task
from apthory.tasks.task import Task, sha256, some

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TEST_NAMES = ("test", "val", "validation")  # the first that exists is the test part
_ROWS_AT_ONCE = 64  # of a Parquet file that are read at once


def load_task(name: str, size: int, data: str | Path | None = None) -> Task:
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
        return draw_task(name, size)
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
    in_folder = sorted(path.name for path in Path(folder).iterdir() if any(path.glob("train-*.parquet")))
    if name not in in_folder:
        there = ", ".join(in_folder) or "no folder with train-*.parquet"
        raise ValueError(f"no task {name!r} in the data folder {str(folder)!r}, which has: {there}. {known}")
    return from_parquet(Path(folder) / name, size)


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
        images = {os.path.abspath(file): Stamp.of(file.stat()) for files in by_class.values() for file in files}
        labels = [classes.index(name) for name, files in by_class.items() for _ in files]
        parts.append(EncodedPart(part, labels, partial(_at_paths, list(images)), images))
    return make_task(root.resolve().name, classes, parts, size, how)


def _at_paths(files: Sequence[str], indices: Sequence[int]) -> Iterator[Mapping[str, Any]]:
    return ({"bytes": None, "path": files[index]} for index in indices)


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    by_class = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(file for file in path.rglob("*") if file.is_file())
        by_class[path.name] = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not by_class[path.name]:
            raise ValueError(
                f"class {path.name!r} in {str(folder)!r} has no images ({len(files)} other files); expected "
                f"files that end in {', '.join(IMAGE_SUFFIXES)}: add some or remove the folder"
            )
    if not by_class:
        raise ValueError(f"{str(folder)!r} has no class folders; expected <class>/*.png in it")
    return by_class


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
    parts, names = [], []
    for part in ("train", "test"):
        files = sorted(Path(path).glob(f"{part}-*.parquet"))
        if not files:
            raise ValueError(f"no file {Path(path) / part}-*.parquet; a task needs train and test files")
        stamps = {os.path.abspath(file): Stamp.of(file.stat()) for file in files}
        _check_columns(files[0].name, (image, label, *where), pq.read_schema(files[0]).names)
        table = pq.read_table(files, columns=list({label: None, **where}))  # the images stay where they are
        is_kept = np.ones(len(table), dtype=bool)
        for column, keep in where.items():
            there = table[column].unique().to_pylist()
            if absent := [value for value in keep if value not in there]:
                raise ValueError(f"no {part} row with {column} {some(absent)}; there are {some(there)}")
            is_kept &= [value in keep for value in table[column].to_pylist()]
        [rows] = is_kept.nonzero()
        sizes = [pq.read_metadata(file).num_rows for file in files]
        encoded = partial(_stored, stamps, sizes, image, rows)
        parts.append(EncodedPart(part, table[label].take(rows).to_pylist(), encoded, stamps))
        info = json.loads((table.schema.metadata or {}).get(b"huggingface", "{}"))  # where `datasets` puts names
        names.append(info.get("info", {}).get("features", {}).get(label, {}).get("names"))
    if names[0] != names[1]:
        raise ValueError(f"train and test in {str(path)!r} name their classes differently: {names[0]}, {names[1]}")
    chosen = "".join(f"[{column}={'|'.join(map(str, keep))}]" for column, keep in where.items())
    options = {"image": image, "label": label, "where": repr(where)}
    return make_task(Path(path).resolve().name + chosen, names[0], parts, size, options=options)


def _stored(
    files: Mapping[str, Stamp],
    sizes: Sequence[int],
    column: str,
    rows: Int64[np.ndarray, " image"],
    indices: Sequence[int],
) -> Iterator[Mapping[str, Any] | None]:
    """Read encoded images from Parquet files, a few at a time; groups of rows without any that is wanted are skipped.

    Args:
        files: In the order of their rows.
        sizes: Numbers of their rows.
        column: Of the encoded images.
        rows: For each image of the part, its row in all files together, ascending.
        indices: The images that are wanted, ascending.
    """
    import pyarrow.parquet as pq

    wanted, end = rows[list(indices)], 0
    for (path, stamp), size in zip(files.items(), sizes, strict=True):
        end, start = end + size, end
        in_file, wanted = _cut(wanted, end)
        if not len(in_file):
            continue
        check_unchanged(path, stamp, Stamp.of(os.stat(path)) if os.path.exists(path) else None)
        # Page by page: with pre_buffer, or without a buffer of its own, all images of a group would be in memory.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            for group in range(file.num_row_groups):
                row, start = start, start + file.metadata.row_group(group).num_rows
                in_group, in_file = _cut(in_file, start)
                for batch in file.iter_batches(_ROWS_AT_ONCE, [group], [column]) if len(in_group) else ():
                    in_batch, in_group = _cut(in_group, row + len(batch))
                    yield from (batch.column(0)[number].as_py() for number in (in_batch - row).tolist())
                    row += len(batch)
                    if not len(in_group):
                        break


def _cut(rows: Int64[np.ndarray, " row"], end: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending rows before `end`, and those from there on."""
    number = int(np.searchsorted(rows, end))
    return rows[:number], rows[number:]


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
    with from_extra("data"):
        import datasets

    try:
        dataset = datasets.load_dataset(identifier, **options)
    except Exception as error:  # the hub's client has many, which differ between versions
        raise OSError(
            f"cannot load {identifier!r} from the hub ({type(error).__name__}: {error}); check identifier, "
            "options and connection, or read a local copy by folder:PATH or parquet:PATH"
        ) from error
    if not isinstance(dataset, datasets.DatasetDict):
        raise ValueError("the options split= and streaming= do not fit here; choose splits by train= and test=")
    test = test or next((name for name in _TEST_NAMES if name in dataset), "test")
    if missing := [name for name in (train, test) if name not in dataset]:
        raise ValueError(f"{identifier!r} has no split {some(missing)}; name them by train=, test=: {list(dataset)}")
    parts, names, fingerprints = [], None, []
    for part, name in (("train", train), ("test", test)):
        _check_columns(identifier, (image, label), dataset[name].column_names)
        rows = dataset[name].select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
        names = getattr(rows.features[label], "names", None)
        parts.append(EncodedPart(part, list(rows[label]), partial(_listed, rows.select_columns([image]), image)))
        fingerprints.append(rows._fingerprint)  # changes with the data
    return make_task(identifier, names, parts, size, options={"fingerprints": fingerprints})


def _listed(rows: Any, column: str, indices: Sequence[int]) -> Iterator[Mapping[str, Any]]:
    return (rows[index][column] for index in indices)


def _check_columns(name: str, wanted: Sequence[str], there: Sequence[str]) -> None:
    if missing := [column for column in wanted if column not in there]:
        raise ValueError(f"{name} has no column {some(missing)}; it has {some(there)}")
