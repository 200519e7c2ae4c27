"""Claims about when images are decoded: what is used, once; the digest is that of all, and is remembered."""

import hashlib
import io
import json
import os
import pickle
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from apthory import tasks
from apthory.tasks import decoding, remembered

SIZE = 16
NUM_TRAIN, NUM_TEST = 20, 8  # of the tasks below; labels are 0, 1, 0, 1 ...


def pattern(number: int, side: int = SIZE) -> Image.Image:
    """An image that is like no other, by arithmetic alone."""
    values = (np.arange(side * side * 3) * (2 * number + 3) + number * number) % 251
    return Image.fromarray(values.astype(np.uint8).reshape(side, side, 3))


def write_folder(root: Path) -> Path:
    for part, first, count in (("train", 0, NUM_TRAIN), ("test", 100, NUM_TEST)):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
        for number in range(count):
            pattern(first + number).save(root / part / "ab"[number % 2] / f"{number:02}.png")
    return root


def write_parquet(root: Path) -> Path:
    """Two train files, groups of three rows, and a column to choose rows by."""
    root.mkdir(parents=True)

    def write(file: str, numbers: Sequence[int]) -> None:
        images = []
        for number in numbers:
            buffer = io.BytesIO()
            pattern(number).save(buffer, "png")
            images.append({"bytes": buffer.getvalue(), "path": None})
        encoded = pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        domain = [("photo", "sketch", "photo")[number % 3] for number in numbers]
        table = pa.table({"image": encoded, "label": [number % 2 for number in numbers], "domain": domain})
        pq.write_table(table, root / file, row_group_size=3)

    write("train-0.parquet", range(11))
    write("train-1.parquet", range(11, NUM_TRAIN))
    write("test-0.parquet", range(100, 100 + NUM_TEST))
    return root


SOURCES = {"folder": (write_folder, tasks.from_folder), "parquet": (write_parquet, tasks.from_parquet)}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("APTHORY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=sorted(SOURCES))
def load(request, tmp_path, cache) -> Callable[..., tasks.Task]:
    write, read = SOURCES[request.param]
    root = write(tmp_path / "images")
    return lambda size=SIZE, **options: read(root, size, **options)


@pytest.fixture
def decoded(monkeypatch) -> Counter:
    """How many images were decoded, under "number"."""
    counter, original = Counter(), decoding._pixels

    def count(image: Image.Image, size: int) -> np.ndarray:
        counter["number"] += 1
        return original(image, size)

    monkeypatch.setattr(decoding, "_pixels", count)
    return counter


# Digests


def slow_digest(task: tasks.Task) -> str:
    """The digest as it was defined when all images were in memory."""
    content = json.dumps(task.classes).encode()
    for images in (task.train, task.test):
        for array in (images.pixels.numpy(), images.labels.numpy()):
            content += f"{array.dtype.str}{array.shape}".encode() + array.tobytes()
    return hashlib.sha256(content).hexdigest()


# Records are named by these: a change makes every record of the task one of other data.
FROZEN = {
    "folder": "2ca5f5610e4ad58ed812779fcbb752b4e938ebfa249e9fb912f3dbb49898f46f",
    "parquet": "07b6c9e0e2ea6fdf5be2bf5c240b984fbf190db1b652ab02642ac822ede791e3",
    "digits": "cbd28ba7f5de03b76824ab6848af131b82952b3ec3af65e5d1c9a5a5fbbbfd1b",
    "textures": "fba0f6e618c5c12077bafbe8ae67b9e04a00d925e4e26ec22ebed390d2241785",
    "count": "3df5d3af491a0f80633a9776fecbdd0d5bcab05a199a7269a13ca6f5b90a6e0b",
    "position": "cb6e9aef49deef262916fe73d34b3ccfd99d4157ce4f9a453332ed4acb48cdf1",
    "orientation": "4226f4f6bc42c56d356505f2db3b6213d462c6d2e14fe13f5361748348e22a6b",
    "color_shape": "c525cedd87162aef9c2225b5f3669c28932f3132c0011f94fe8f254f41ea101b",
}


@pytest.mark.parametrize("name", tasks.EMBEDDED)
def test_digests_of_embedded_tasks_never_change(name):
    assert tasks.load(name, 16).digest == FROZEN[name]


@pytest.mark.parametrize("kind", SOURCES)
def test_digests_of_images_in_files_never_change(kind, tmp_path, cache):
    write, read = SOURCES[kind]
    assert read(write(tmp_path / "images"), SIZE).digest == FROZEN[kind]


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "dropped"])
def test_the_digest_is_that_of_all_pixels_in_memory(load, keeps, monkeypatch):
    monkeypatch.setattr(decoding, "_KEPT", decoding._KEPT if keeps else 0)
    first, second = load(), load()
    assert first.digest == second.digest == slow_digest(first) == slow_digest(second)
    assert replace(second).digest == first.digest  # a new task is not told its digest: it is computed
    assert first.transform == second.transform
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert torch.equal(first.train.labels, second.train.labels)


def test_a_task_of_other_images_has_another_digest(load):
    task = load()
    assert replace(task, test=task.train).digest != task.digest


# What is decoded, and when


def test_a_task_that_is_remembered_decodes_what_is_used_and_each_image_once(load, decoded):
    load()
    assert decoded["number"] == NUM_TRAIN + NUM_TEST
    decoded.clear()
    task = load()
    assert (len(task.digest), task.transform) == (64, "png, resize 16 (bicubic, shorter side), centre crop 16")
    assert decoded["number"] == task.train.num_bytes == 0
    task.train[torch.tensor([3, 7])]
    task.train[[3, 7, 3, 4]]
    assert decoded["number"] == 3
    assert (task.train.num_bytes, task.test.num_bytes) == (3 * 3 * SIZE * SIZE, 0)
    assert len(task.train.pixels) == NUM_TRAIN
    assert decoded["number"] == NUM_TRAIN
    task.train.pixels[:5]
    assert decoded["number"] == NUM_TRAIN
    assert task.train.num_bytes == NUM_TRAIN * 3 * SIZE * SIZE


def test_a_small_task_is_decoded_once_and_a_large_one_is_not_kept(load, decoded, monkeypatch):
    assert load().train.num_bytes == NUM_TRAIN * 3 * SIZE * SIZE
    monkeypatch.setattr(decoding, "_KEPT", (NUM_TRAIN + NUM_TEST) * 3 * 24 * 24 - 1)
    decoded.clear()
    task = load(24)
    assert (decoded["number"], task.train.num_bytes) == (NUM_TRAIN + NUM_TEST, 0)


@pytest.mark.parametrize(
    "index",
    [
        5,
        -1,
        slice(2, 9, 3),
        [4, 1, 1],
        [],
        torch.tensor([7, 0, 19]),
        torch.tensor([[1, 2], [2, 1]]),
        torch.arange(NUM_TRAIN) % 3 == 0,
    ],
    ids=str,
)
def test_images_are_indexed_as_a_tensor_is(load, index):
    load()
    images = load().train
    assert images.num_bytes == 0
    assert torch.equal(images[index], load().train.pixels[index])


def test_an_index_out_of_range_is_refused(load):
    load()
    with pytest.raises(IndexError):
        load().train[NUM_TRAIN]


def test_iterating_gives_every_image_and_keeps_none(load):
    pixels = load().train.pixels
    images = load().train
    assert torch.equal(torch.stack(list(images)), pixels)
    assert images.num_bytes == 0


def test_neither_a_task_nor_its_splits_look_at_pixels():
    class Sealed:
        shape = (4, 3, 8, 8)

        def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
            raise AssertionError("looked at")

    images = tasks.Images(Sealed(), torch.tensor([0, 1, 0, 1]))
    task = tasks.Task("sealed", ("a", "b"), images, images, "")
    assert len(task.split(0, 2, 1, 1).train) == 2
    assert repr(task) == "Task('sealed', 2 classes ('a', 'b'), 4 train and 4 test images of 8 px)"
    with pytest.raises(AssertionError, match="looked at"):
        images[0]


def test_chosen_rows_of_parquet_are_the_images_of_these_rows(tmp_path, cache):
    root = write_parquet(tmp_path / "images")
    for _ in range(2):  # from the first pass, then on demand
        task = tasks.from_parquet(root, SIZE, where={"domain": ["sketch"]})
        numbers = range(1, NUM_TRAIN, 3)
        assert task.train.labels.tolist() == [number % 2 for number in numbers]
        for index, number in reversed(list(enumerate(numbers))):
            np.testing.assert_array_equal(task.train[index].movedim(0, -1).numpy(), np.asarray(pattern(number)))


def test_groups_of_rows_without_a_wanted_image_are_not_read(tmp_path, cache, monkeypatch):
    root = write_parquet(tmp_path / "images")
    tasks.from_parquet(root, SIZE)
    groups, original = [], pq.ParquetFile.iter_batches

    def iter_batches(self, batch_size, row_groups, columns):
        groups.extend(row_groups)
        return original(self, batch_size, row_groups, columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    images = tasks.from_parquet(root, SIZE).train
    images[[0, 2, 10, 12]]  # files of 11 and 9 rows, groups of three
    assert groups == [0, 3, 0]


def test_a_task_survives_pickling(load):
    load()
    task = pickle.loads(pickle.dumps(load()))
    assert task.digest == slow_digest(task) == load().digest


def test_a_relative_path_holds_after_the_folder_is_left(tmp_path, cache, monkeypatch):
    write_folder(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    tasks.from_folder("images", SIZE)
    images = tasks.from_folder("images", SIZE).train
    monkeypatch.chdir("/")
    assert images[3].shape == (3, SIZE, SIZE)


# Files that change


def files(root: Path, part: str) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and part in str(path.relative_to(root)))


def touch(file: Path) -> None:
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def grow(file: Path) -> None:
    status = file.stat()
    file.write_bytes(file.read_bytes() + b"x")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "what"),
    [(touch, "it is of another date"), (grow, r"it had [\d,]+ bytes and has [\d,]+"), (Path.unlink, "gone|No such")],
)
def test_a_file_that_changed_since_loading_is_named_and_its_images_are_refused(load, tmp_path, change, what):
    load()
    task = load()
    seen = task.train[0].clone()
    for file in files(tmp_path / "images", "train"):
        change(file)
    assert torch.equal(task.train[0], seen)  # what was decoded before is what the digest says
    with pytest.raises(RuntimeError, match=rf"{what}.*load the task again"):
        task.train[1]
    task.test[1]


def test_a_changed_file_is_decoded_again_when_its_task_is_loaded_again(load, tmp_path, decoded):
    before = load()
    for file in files(tmp_path / "images", "train"):
        touch(file)
    decoded.clear()
    assert load().digest == before.digest
    assert decoded["number"] == NUM_TRAIN + NUM_TEST


# What is remembered


def test_what_decides_the_pixels_decides_what_is_remembered(load, cache, decoded, monkeypatch):
    load()
    decoded.clear()
    load(SIZE + 8)
    assert decoded["number"] == NUM_TRAIN + NUM_TEST  # another size
    monkeypatch.setattr(decoding, "_VERSION", decoding._VERSION + 1)
    load()
    assert decoded["number"] == 2 * (NUM_TRAIN + NUM_TEST)  # another reader
    monkeypatch.setattr(decoding.PIL, "__version__", "0")
    load()
    assert decoded["number"] == 3 * (NUM_TRAIN + NUM_TEST)  # another decoder
    assert len(list(cache.iterdir())) == 4
    assert all(file.stat().st_size < 400 for file in cache.iterdir())


def test_options_are_told_apart(tmp_path, cache):
    root = write_parquet(tmp_path / "images")
    digests = [tasks.from_parquet(root, SIZE, where=where).digest for where in (None, {"domain": ["photo"]})]
    assert [tasks.from_parquet(root, SIZE, where=where).digest for where in (None, {"domain": ["photo"]})] == digests
    assert len(set(digests)) == len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_not_used(load, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("APTHORY_CACHE", str(tmp_path / "file"))
    assert load().digest == load().digest


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"digest": 1, "encoding": 2}', '{"digest": "0", "by": "x"}'])
def test_a_cache_that_cannot_be_read_is_made_again(load, cache, content):
    digest = load().digest
    (file,) = cache.iterdir()
    whole = file.read_text()
    file.write_text(content)
    assert load().digest == digest
    assert file.read_text() == whole


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_pass_that_was_cut_short_leaves_nothing(load, cache, error, monkeypatch):
    def interrupt(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_pixels", interrupt)
        with pytest.raises((KeyboardInterrupt, ValueError)):
            load()
    assert not cache.exists()
    assert load().train.num_bytes


def test_a_task_with_an_unreadable_image_is_not_remembered(tmp_path, cache):
    root = write_folder(tmp_path / "images")
    (root / "test" / "a" / "00.png").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(ValueError, match="1 of 28 images cannot be read"):
            tasks.from_folder(root, SIZE)
    assert not cache.exists()


def test_images_beside_their_parquet_file_are_checked_every_time(tmp_path, cache, decoded):
    """What is remembered is known by the Parquet files, which do not tell when such an image changes."""
    root = write_folder(tmp_path / "images")
    for part in ("train", "test"):
        rows = [{"bytes": None, "path": str(file)} for file in files(root, part)]
        encoded = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        table = pa.table({"image": encoded, "label": [number % 2 for number in range(len(rows))]})
        pq.write_table(table, root / f"{part}-0.parquet")
    tasks.from_parquet(root, SIZE)
    tasks.from_parquet(root, SIZE)
    assert decoded["number"] == 2 * (NUM_TRAIN + NUM_TEST)
    assert not cache.exists()


def test_data_sets_of_the_hub_are_remembered_by_their_fingerprint(tmp_path, cache, decoded, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    root = write_parquet(tmp_path / "images")
    options = {"cache_dir": str(tmp_path / "hub")}
    first = tasks.from_hub(str(root), SIZE, **options)
    decoded.clear()
    second = tasks.from_hub(str(root), SIZE, **options)
    assert second.digest == first.digest
    assert decoded["number"] == 0
    assert torch.equal(second.test[[1, 5]], first.test[[1, 5]])
    assert decoded["number"] == 2


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"APTHORY_CACHE": "own", "XDG_CACHE_HOME": "xdg", "HOME": "home"}, Path("own")),
        ({"XDG_CACHE_HOME": "xdg", "HOME": "home"}, Path("xdg/apthory")),
        ({"HOME": "home"}, Path("home/.cache/apthory")),
    ],
)
def test_the_cache_is_where_it_is_asked_for_or_in_the_users_own(variables, folder, monkeypatch):
    for name in ("APTHORY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert remembered.findings_folder() == folder


# Memory


@pytest.mark.slow
def test_memory_grows_with_the_images_that_are_used_and_not_with_those_there_are(tmp_path, cache):
    """2,000 images of 224 pixels are 301 MB, 100 of them are 15 MB."""
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(1000):
            pattern(number, 32).save(tmp_path / "images" / name / f"{number}.jpg")
    tracemalloc.start()
    try:
        for _ in range(2):  # with the first pass, and without
            tracemalloc.reset_peak()
            task = tasks.from_folder(tmp_path / "images", 224)
            split = task.split(0, num_train=60, num_validation=20, num_test=20)
            for images, indices in ((task.train, split.train), (task.train, split.validation), (task.test, split.test)):
                for chunk in indices.split(16):
                    images[chunk]
            assert task.train.num_bytes + task.test.num_bytes == 100 * 3 * 224 * 224
            assert tracemalloc.get_traced_memory()[1] < 40e6  # bytes
    finally:
        tracemalloc.stop()
