"""Claims about tasks: pixels, splits, sources, embedded tasks, and what bad input says."""

import io
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from apthory import tasks
from apthory.tasks import embedded

SIZE = 16
COLOURS = {"blue": (20, 40, 230), "green": (30, 200, 40), "red": (250, 10, 10)}


def plain(colour: tuple[int, int, int], side: int = SIZE) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def write_folder(root: Path, **counts: int) -> Path:
    """Images of one colour a class: write_folder(root, red=3) makes root/red/0.png to root/red/2.png."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            plain(COLOURS[name]).save(root / name / f"{number}.png")
    return root


def encode(image: Image.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "webp", lossless=True)
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(
    file: Path,
    labels: list,
    names: list[str] | None = None,
    images: list[dict] | None = None,
    **columns: list,
) -> None:
    """A file in the layout of image data on the hub: struct<bytes, path>, names in the schema's metadata."""
    images = images or [encode(plain(list(COLOURS.values())[(label or 0) % 3])) for label in labels]
    encoded = pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = pa.table({"image": encoded, "label": pa.array(labels), **columns})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        info = {"info": {"features": features}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def make_task(train: list[int], test: list[int]) -> tasks.Task:
    """Labels are given, pixels count upwards so that no two images are equal."""

    def images(labels: list[int]) -> tasks.Images:
        pixels = torch.arange(len(labels) * 3, dtype=torch.uint8).reshape(-1, 3, 1, 1).expand(-1, 3, 8, 8)
        return tasks.Images(pixels.clone(), torch.tensor(labels))

    classes = tuple(f"class {label}" for label in range(max(train) + 1))
    return tasks.Task("made", classes, images(train), images(test), "made")


def read_one(image: Image.Image, folder: Path, suffix: str = ".png", **options) -> np.ndarray:
    """Pixels of one image, the first of its class, read from a folder."""
    write_folder(folder / "train", blue=1)
    write_folder(folder / "test", blue=1)
    (folder / "train" / "a").mkdir()
    image.save(folder / "train" / "a" / f"image{suffix}", **options)
    task = tasks.from_folder(folder, SIZE)
    return task.train.pixels[0].numpy()


# Pixels


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (33, 33), (17, 100), (9, 5), (SIZE, SIZE)])
def test_pixels_are_those_of_torchvision_resize_and_centre_crop(tmp_path, shape):
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8))
    expected = v2.CenterCrop(SIZE)(v2.Resize(SIZE, v2.InterpolationMode.BICUBIC)(image))
    np.testing.assert_array_equal(read_one(image, tmp_path), np.asarray(expected).transpose(2, 0, 1))


def test_greyscale_becomes_three_equal_channels(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    np.testing.assert_array_equal(read_one(Image.fromarray(grey), tmp_path), np.stack([grey] * 3))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_are_scaled_to_eight_and_not_clipped(tmp_path, suffix):
    deep = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    pixels = read_one(Image.fromarray(deep), tmp_path, suffix)
    np.testing.assert_array_equal(pixels, np.stack([np.rint(deep / 257).astype(np.uint8)] * 3))


def test_thirty_two_bits_are_scaled_by_their_own_depth(tmp_path):
    deep = Image.fromarray(np.full((SIZE, SIZE), 2**30, dtype=np.int32))
    assert np.unique(read_one(deep, tmp_path, ".tif")) == [64]  # 255 / 4, rounded


def test_transparent_pixels_show_white(tmp_path):
    image = Image.new("RGBA", (SIZE, SIZE), (200, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, SIZE, SIZE // 2))
    image.paste((200, 0, 0, 51), (0, SIZE // 2, SIZE, SIZE // 2 + 1))  # a fifth red, four fifths white
    pixels = read_one(image, tmp_path)
    assert pixels[:, 0, 0].tolist() == [200, 0, 0]
    assert pixels[:, SIZE // 2, 0].tolist() == [244, 204, 204]
    assert pixels[:, -1, 0].tolist() == [255, 255, 255]


def test_a_palette_keeps_its_colours_and_its_transparency(tmp_path):
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.paste(0, (0, 0, SIZE, SIZE // 2))
    pixels = read_one(image, tmp_path, transparency=0)
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, -1, 0].tolist() == [10, 200, 30]


def test_cmyk_becomes_rgb(tmp_path):
    pixels = read_one(Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), tmp_path, ".tif")
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]


def test_the_exif_orientation_is_applied(tmp_path):
    image = plain((0, 0, 0))
    image.paste((255, 255, 255), (0, 0, SIZE, SIZE // 2))  # white above black
    exif = Image.Exif()
    exif[274] = 3  # upside down
    pixels = read_one(image, tmp_path, exif=exif)
    assert pixels[0, 0, 0] == 0
    assert pixels[0, -1, 0] == 255


def test_floating_point_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"1 of 3 images cannot be read: .*image\.tif \(floating-point pixels"):
        read_one(Image.fromarray(np.ones((SIZE, SIZE), dtype=np.float32)), tmp_path, ".tif")


def test_negative_values_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"values from -5 to -5 do not fit 32 bits"):
        read_one(Image.fromarray(np.full((SIZE, SIZE), -5, dtype=np.int32)), tmp_path, ".tif")


# Unreadable images


def test_unreadable_images_are_counted_over_both_parts_and_five_are_named(tmp_path):
    write_folder(tmp_path / "train", blue=20, red=20)
    write_folder(tmp_path / "test", blue=5, red=5)
    for number in (3, 4, 5, 6):
        (tmp_path / "train" / "blue" / f"{number}.png").write_bytes(b"no image")
    (tmp_path / "train" / "red" / "7.png").write_bytes(b"")
    whole = (tmp_path / "test" / "red" / "1.png").read_bytes()
    (tmp_path / "test" / "red" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"6 of 50 images cannot be read: .*, \.\.\.; remove or replace") as error:
        tasks.from_folder(tmp_path, SIZE)
    named = [f"blue{os.sep}{number}.png (not an image" for number in (3, 4, 5, 6)] + [f"red{os.sep}7.png (not an"]
    assert all(name in str(error.value) for name in named)
    assert f"test{os.sep}red" not in str(error.value)


def test_a_truncated_image_is_named_with_the_reason(tmp_path):
    write_folder(tmp_path / "train", blue=2, red=2)
    write_folder(tmp_path / "test", blue=2, red=2)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "test" / "red" / "1.png")
    whole = (tmp_path / "test" / "red" / "1.png").read_bytes()
    (tmp_path / "test" / "red" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"1 of 8 images cannot be read: .*1\.png \(.*truncated.*\); remove"):
        tasks.from_folder(tmp_path, SIZE)


def test_an_unreadable_image_in_parquet_is_named_by_part_and_row(tmp_path):
    images = [
        encode(plain(COLOURS["red"])),
        {"bytes": b"no image", "path": None},
        {"bytes": None, "path": None},
    ]
    write_parquet(tmp_path / "train-0.parquet", [0, 1, 1], ["a", "b"], images)
    write_parquet(tmp_path / "test-0.parquet", [0, 1], ["a", "b"])
    with pytest.raises(ValueError, match=r"2 of 5 images cannot be read: train row 1 \(not an .*train row 2 \("):
        tasks.from_parquet(tmp_path, SIZE)


# Folders


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_a_folder_with_train_and_test_is_read_as_it_is(tmp_path, name):
    write_folder(tmp_path / "train", red=3, blue=2)
    write_folder(tmp_path / name, red=1, blue=2)
    task = tasks.from_folder(tmp_path, SIZE)
    assert task.classes == ("blue", "red")
    assert task.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert task.test.labels.tolist() == [0, 0, 1]
    assert task.train.pixels.shape == (5, 3, SIZE, SIZE)
    assert task.train.pixels.dtype == torch.uint8
    assert task.train.pixels[:, :, 5, 7].tolist() == [[*COLOURS["blue"]]] * 2 + [[*COLOURS["red"]]] * 3
    assert task.transform == "png, resize 16 (bicubic, shorter side), centre crop 16"


def test_test_is_preferred_over_validation(tmp_path):
    for part, count in (("train", 2), ("val", 3), ("test", 4)):
        write_folder(tmp_path / part, red=count, blue=count)
    assert len(tasks.from_folder(tmp_path, SIZE).test) == 8


def test_without_a_test_folder_a_fifth_of_each_class_is_held_out(tmp_path):
    random = np.random.default_rng(0)
    for name, count in {"a": 20, "b": 10, "c": 2, "d": 1}.items():
        (tmp_path / name).mkdir()
        for number in range(count):
            noise = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{number:02}.png")
    task = tasks.from_folder(tmp_path, SIZE)
    assert task.train.labels.bincount().tolist() == [16, 8, 1, 1]
    assert task.test.labels.bincount(minlength=4).tolist() == [4, 2, 1, 0]
    assert "a fifth of each class" in task.transform
    everything = torch.cat([task.train.pixels, task.test.pixels]).flatten(1)
    assert len(everything.unique(dim=0)) == 33  # each image once
    assert tasks.from_folder(tmp_path, SIZE).digest == task.digest


def test_the_held_out_images_depend_on_names_below_the_folder_only(tmp_path):
    first = tasks.from_folder(write_folder(tmp_path / "one", red=10, blue=10), SIZE)
    second = tasks.from_folder(write_folder(tmp_path / "two", blue=10, red=10), SIZE)
    assert first.digest == second.digest


def test_other_files_beside_images_are_left_out(tmp_path):
    write_folder(tmp_path / "train", red=2, blue=2)
    write_folder(tmp_path / "test", red=1, blue=1)
    (tmp_path / "train" / "red" / "notes.txt").write_text("three")
    (tmp_path / "train" / ".cache").mkdir()
    assert len(tasks.from_folder(tmp_path, SIZE).train) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, r"has no class folders; expected <class>"),
        (lambda root: write_folder(root, red=4), r"has the classes \['red'\]; at least two are needed"),
        (
            lambda root: write_folder(root, red=3, blue=0),
            r"class 'blue' in .* has no images \(0 other files\).*\.png",
        ),
        (lambda root: write_folder(root, red=1, blue=1), r"has no test images"),
        (
            lambda root: write_folder(root / "train", red=3, blue=3),
            r"has train but not both train and one of test",
        ),
        (
            lambda root: write_folder(root / "test", red=3, blue=3),
            r"has test but not both train and one of test",
        ),
    ],
    ids=["empty", "single class", "empty class", "nothing to hold out", "no test", "no train"],
)
def test_a_folder_without_a_task_says_what_is_missing(tmp_path, make: Callable, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        tasks.from_folder(tmp_path, SIZE)


def test_a_class_with_other_files_only_says_how_many(tmp_path):
    write_folder(tmp_path, red=3, blue=0)
    (tmp_path / "blue" / "image.svg").write_text("<svg/>")
    with pytest.raises(ValueError, match=r"class 'blue' .* has no images \(1 other files\); expected files that end"):
        tasks.from_folder(tmp_path, SIZE)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no folder '.*nowhere'; expected PATH/train/<class>"):
        tasks.from_folder(tmp_path / "nowhere", SIZE)


def test_a_class_in_test_that_train_lacks_is_named(tmp_path):
    write_folder(tmp_path / "train", red=2, blue=2)
    write_folder(tmp_path / "test", red=1, green=1)
    with pytest.raises(ValueError, match=r"has the classes 'green', which train lacks \(it has 'blue', 'red'\)"):
        tasks.from_folder(tmp_path, SIZE)


def test_a_class_in_train_that_test_lacks_is_allowed(tmp_path):
    write_folder(tmp_path / "train", red=2, blue=2)
    write_folder(tmp_path / "test", red=1)
    task = tasks.from_folder(tmp_path, SIZE)
    assert task.classes == ("blue", "red")
    assert task.test.labels.tolist() == [1]


# Parquet


@pytest.fixture
def parquet(tmp_path) -> Path:
    """Two train files, one test file, names in an order that is not the alphabet's, and a domain."""
    domains = {"domain": ["photo", "sketch", "photo", "sketch"]}
    for file in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / "pets" / f"{file}.parquet", [1, 0, 0, 1], ["dog", "cat"], **domains)
    return tmp_path / "pets"


def test_parquet_files_keep_the_class_names_of_their_schema(parquet):
    task = tasks.from_parquet(parquet, SIZE)
    assert (task.name, task.classes) == ("pets", ("dog", "cat"))
    assert task.train.labels.tolist() == [1, 0, 0, 1] * 2
    assert task.test.labels.tolist() == [1, 0, 0, 1]
    colours = list(COLOURS.values())
    assert task.test.pixels[:, :, 2, 2].tolist() == [list(colours[label]) for label in (1, 0, 0, 1)]
    assert task.transform == "webp, resize 16 (bicubic, shorter side), centre crop 16"


def test_the_layout_is_that_of_datasets(tmp_path):
    """A file that `datasets` writes is read with the names and pixels that `datasets` reads."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = {"image": [plain(COLOURS["red"]), plain(COLOURS["blue"])], "label": [1, 0]}
    for part in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{part}-00000-of-00001.parquet")
    task = tasks.from_parquet(tmp_path, SIZE)
    assert task.classes == ("x", "y")
    assert task.train.labels.tolist() == [1, 0]
    assert task.train.pixels[:, :, 0, 0].tolist() == [list(COLOURS["red"]), list(COLOURS["blue"])]


@pytest.mark.parametrize("keep", [("photo",), "photo"])
def test_where_keeps_the_rows_asked_for(parquet, keep):
    task = tasks.from_parquet(parquet, SIZE, where={"domain": keep})
    assert task.name == "pets[domain=photo]"
    assert task.train.labels.tolist() == [1, 0] * 2
    assert task.test.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"where": {"domain": ("photo", "drawing")}},
            r"no train row with domain 'drawing'; there are 'photo', 'sketch'",
        ),
        ({"where": {"style": ("photo",)}}, r"has no column 'style'; it has 'image', 'label', 'domain'"),
        ({"image": "picture"}, r"has no column 'picture'; it has 'image', 'label', 'domain'"),
        ({"label": "fine_label"}, r"has no column 'fine_label'; it has 'image'"),
    ],
)
def test_a_missing_column_or_value_lists_those_there_are(parquet, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.from_parquet(parquet, SIZE, **options)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_file_says_the_pattern_looked_for(parquet, part):
    for file in parquet.glob(f"{part}-*"):
        file.unlink()
    with pytest.raises(ValueError, match=rf"no file .*pets.{part}-\*\.parquet; a task needs train and test"):
        tasks.from_parquet(parquet, SIZE)


@pytest.mark.parametrize("labels", [["ox", "ant", "ox"], [7, -3, 7]])
def test_labels_without_names_are_named_by_their_sorted_values(tmp_path, labels):
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}-0.parquet", labels, images=[encode(plain(COLOURS["red"]))] * 3)
    task = tasks.from_parquet(tmp_path, SIZE)
    assert task.classes == tuple(str(label) for label in sorted(set(labels)))
    assert task.train.labels.tolist() == [1, 0, 1]


def test_names_that_differ_between_train_and_test_are_refused(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [0, 1], ["cat", "dog"])
    write_parquet(tmp_path / "test-0.parquet", [0, 1], ["dog", "cat"])
    with pytest.raises(ValueError, match=r"name their classes differently: \['cat', 'dog'\], \['dog', 'cat'\]"):
        tasks.from_parquet(tmp_path, SIZE)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 1, None], [0, 1], r"1 of 5 images of '.*' have no label"),
        ([0, 1, 2], [-1, -1], r"test labels from -1 to -1; expected 0 to 2 \(-1 often marks"),
        ([0, 1, 3], [0, 1], r"train labels from 0 to 3; expected 0 to 2"),
        ([0, 1, 1], [0, 2], r"no training image of 'c'; add some or remove the class"),
    ],
    ids=["no label", "published without labels", "no class", "missing from train"],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, train, test, message):
    write_parquet(tmp_path / "train-0.parquet", train, ["a", "b", "c"])
    write_parquet(tmp_path / "test-0.parquet", test, ["a", "b", "c"])
    with pytest.raises(ValueError, match=message):
        tasks.from_parquet(tmp_path, SIZE)


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Path]:
    """A local folder, which `datasets` reads like an identifier of the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    write_folder(tmp_path / "hub" / "train", red=3, blue=2)
    write_folder(tmp_path / "hub" / "validation", red=1, blue=1)
    yield tmp_path / "hub"
    datasets.enable_progress_bars()


def test_the_hub_reads_what_the_folder_reads(hub, tmp_path):
    options = {"cache_dir": str(tmp_path / "cache")}
    task = tasks.from_hub(str(hub), SIZE, **options)
    assert task.classes == ("blue", "red")
    assert task.train.labels.bincount().tolist() == [2, 3]
    assert task.digest == tasks.from_folder(hub, SIZE).digest
    with pytest.raises(ValueError, match=r"has no split 'holdout'; name them by train=, test=: \['train', 'valid"):
        tasks.from_hub(str(hub), SIZE, test="holdout", **options)
    with pytest.raises(ValueError, match=r"has no column 'fine'; it has 'image', 'label'"):
        tasks.from_hub(str(hub), SIZE, label="fine", **options)
    with pytest.raises(ValueError, match=r"split= and streaming= do not fit here"):
        tasks.from_hub(str(hub), SIZE, split="train", **options)


def test_a_data_set_that_the_hub_does_not_give_keeps_the_hubs_own_error(hub):
    with pytest.raises(OSError, match=r"cannot load 'nobody/nothing' from the hub \(.*\); check identifier") as error:
        tasks.load("hub:nobody/nothing", SIZE)
    assert error.value.__cause__ is not None


# Loading by name


@pytest.fixture
def no_data(monkeypatch) -> None:
    monkeypatch.delenv("APTHORY_DATA", raising=False)


def test_a_name_in_the_data_folder_is_found_by_argument_and_by_environment(parquet, monkeypatch, no_data):
    task = tasks.load("pets", SIZE, data=parquet.parent)
    monkeypatch.setenv("APTHORY_DATA", str(parquet.parent))
    assert tasks.load("pets", SIZE).digest == task.digest == tasks.load(f"parquet:{parquet}", SIZE).digest


def test_a_prefix_reads_a_folder(tmp_path):
    write_folder(tmp_path, red=5, blue=5)
    assert tasks.load(f"folder:{tmp_path}", SIZE).digest == tasks.from_folder(tmp_path, SIZE).digest


def test_without_a_data_folder_the_error_says_how_to_name_one(no_data):
    with pytest.raises(
        ValueError, match=r"no embedded task 'caltech101', and no data.* Set APTHORY_DATA or pass data="
    ):
        tasks.load("caltech101", SIZE)


def test_a_plain_path_is_answered_with_the_prefix_that_reads_it(parquet, tmp_path, no_data):
    images = tmp_path / "mine"
    write_folder(images, red=2, blue=2)
    for path, kind in ((images, "folder"), (parquet, "parquet")):
        with pytest.raises(ValueError, match=f"is a folder, no task's name; write '{kind}:{path}' to read"):
            tasks.load(str(path), SIZE)
        assert len(tasks.load(f"{kind}:{path}", SIZE).classes) > 1


def test_a_task_of_the_data_folder_comes_before_a_folder_of_its_name(parquet, monkeypatch):
    monkeypatch.chdir(parquet.parent)
    assert tasks.load("pets", SIZE, data=parquet.parent).name == "pets"


def test_a_data_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data folder '.*gone' does not exist\. Set APTHORY_DATA or pass data="):
        tasks.load("caltech101", SIZE, data=tmp_path / "gone")


@pytest.mark.parametrize("name", ["birds", "folder:", "zip:birds"])
def test_an_unknown_name_lists_embedded_tasks_those_found_and_the_prefixes(parquet, name):
    with pytest.raises(ValueError, match=rf"no task '{name}' in the data folder .* which has: pets\.") as error:
        tasks.load(name, SIZE, data=parquet.parent)
    assert all(known in str(error.value) for known in (*tasks.EMBEDDED, "folder:PATH", "parquet:PATH", "hub:ID"))


def test_a_data_folder_without_tasks_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"which has: no folder with train-\*\.parquet"):
        tasks.load("birds", SIZE, data=tmp_path)


@pytest.mark.parametrize("size", [0, -1, 7])
def test_a_size_that_is_no_size_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=rf"images of {size} px; expected at least 8"):
        tasks.load("count", size)
    with pytest.raises(ValueError, match=rf"images of {size} px; expected at least 8"):
        tasks.from_folder(write_folder(tmp_path, red=2, blue=2), size)


# Tasks and splits

POOL = [0] * 60 + [1] * 30 + [2] * 10
TEST = [0] * 40 + [1] * 40 + [2] * 20


def test_a_task_is_shown_by_its_sizes_and_not_by_its_pixels():
    task = tasks.load("count", 16)
    assert repr(task) == "Task('count', 4 classes ('1', '2', '3', '4'), 500 train and 500 test images of 16 px)"
    assert repr(task.train) == "Images(500 of 3 x 16 x 16)"
    assert repr(task.split(3, 40, 20, 100)) == "Split(seed=3, train=40, validation=20, test=100)"


def test_images_need_one_label_each_and_three_channels(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what users see, without checks of shapes
    with pytest.raises(ValueError, match=r"3 images and 2 labels; expected one label each"):
        tasks.Images(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"images of 1 channels; expected 3"):
        tasks.Images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))


def test_a_task_needs_two_classes_distinct_names_and_one_size():
    two, small = make_task([0, 1], [0, 1]), tasks.load("count", 8)
    with pytest.raises(ValueError, match=r"has the classes \['only'\]; at least two"):
        tasks.Task("made", ("only",), two.train, two.test, "")
    with pytest.raises(ValueError, match=r"names a class twice: \['cat', 'cat'\]"):
        tasks.Task("made", ("cat", "cat"), two.train, two.test, "")
    large = tasks.load("count", 9)
    with pytest.raises(ValueError, match=r"train images of shape \(3, 8, 8\) but test images of \(3, 9, 9\)"):
        tasks.Task("made", small.classes, small.train, large.test, "")


def test_the_digest_follows_pixels_labels_and_classes_and_nothing_else():
    task = make_task([0, 1, 1], [0, 1])
    same = tasks.Task("other name", task.classes, task.train, task.test, "other words")
    assert same.digest == task.digest
    assert len(task.digest) == 64
    pixels, labels = task.test.pixels.clone(), task.test.labels.flip(0)
    pixels[1, 2, 7, 7] += 1
    changes = [
        tasks.Task(task.name, task.classes[::-1], task.train, task.test, ""),
        tasks.Task(task.name, task.classes, task.train, tasks.Images(pixels, task.test.labels), ""),
        tasks.Task(task.name, task.classes, task.train, tasks.Images(task.test.pixels, labels), ""),
    ]
    assert len({task.digest, *(changed.digest for changed in changes)}) == 4


def test_splits_are_stratified_exactly_where_the_shares_are_whole():
    task = make_task(POOL, TEST)
    split = task.split(3, num_train=20, num_validation=10, num_test=50)
    assert task.train.labels[split.train].bincount().tolist() == [12, 6, 2]
    assert task.train.labels[split.validation].bincount().tolist() == [6, 3, 1]
    assert task.test.labels[split.test].bincount().tolist() == [20, 20, 10]


@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=8),
    numbers=st.tuples(st.integers(0, 120), st.integers(0, 60), st.integers(0, 60)),
    seed=st.integers(0, 10**6),
)
def test_every_split_is_disjoint_of_the_size_asked_for_and_holds_every_class(counts, numbers, seed):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    task = make_task(labels, labels)
    num_train, num_validation, num_test = numbers
    left = max(len(labels) - num_validation, 0)
    if min(num_train, left) < len(counts):
        with pytest.raises(ValueError, match=r"the train subset has no image of 'class \d'"):
            task.split(seed, *numbers)
        return
    split = task.split(seed, *numbers)
    assert len(split.train) == min(num_train, left)
    assert len(split.validation) == len(labels) - left
    assert len(split.test) == min(num_test, len(labels))
    assert not set(split.train.tolist()) & set(split.validation.tolist())
    assert task.train.labels[split.train].bincount(minlength=len(counts)).min() >= 1
    for part in (split.train, split.validation, split.test):
        assert part.tolist() == sorted(set(part.tolist()))


@given(
    counts=st.lists(st.integers(1, 200), min_size=2, max_size=6),
    part=st.sampled_from(["train", "test"]),
    fraction=st.floats(0, 1),
)
def test_no_exchange_of_one_image_makes_a_subset_more_proportional(counts, part, fraction):
    """Webster's condition: whoever got an image last had at least the claim of whoever would get one next."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    task = make_task(labels, labels)
    number = len(counts) + round(fraction * (len(labels) - len(counts)))
    indices = getattr(task.split(0, **{f"num_{part}": number}), part)
    shares = task.train.labels[indices].bincount(minlength=len(counts)).tolist()
    pairs = list(zip(counts, shares, strict=True))
    last = [count / (share - 0.5) for count, share in pairs if share > 1]  # the first image is every class's right
    following = [count / (share + 0.5) for count, share in pairs if share < count]
    assert sum(shares) == number
    assert min(last, default=math.inf) >= max(following, default=0) * (1 - 1e-12)


def test_none_and_more_than_there_is_mean_all_there_is():
    task = make_task(POOL, TEST)
    split = task.split(0)
    assert (len(split.train), len(split.validation), len(split.test)) == (100, 0, 100)
    split = task.split(0, num_train=1000, num_validation=30, num_test=1000)
    assert (len(split.train), len(split.validation), len(split.test)) == (70, 30, 100)


def test_the_seed_changes_train_and_validation_and_never_test():
    task = make_task(POOL, TEST)
    first, second = (task.split(seed, 40, 20, 30) for seed in (0, 1))
    assert first.train.tolist() != second.train.tolist()
    assert first.validation.tolist() != second.validation.tolist()
    assert first.test.tolist() == second.test.tolist()
    assert first.digest != second.digest


def test_equal_arguments_give_equal_splits_and_a_recorded_one_never_changes():
    task = make_task(POOL, TEST)
    split = task.split(7, num_train=6, num_validation=3, num_test=4)
    assert split.digest == task.split(7, num_train=6, num_validation=3, num_test=4).digest
    recorded = [[6, 32, 37, 67, 74, 96], [16, 19, 68], [3, 11, 59, 92]]
    assert [part.tolist() for part in (split.train, split.validation, split.test)] == recorded


def test_more_images_of_a_seed_contain_the_fewer():
    task = make_task(POOL, TEST)
    few, many = task.split(5, 10, 5, 20), task.split(5, 40, 25, 60)
    for part in ("train", "validation", "test"):
        assert set(getattr(few, part).tolist()) < set(getattr(many, part).tolist())


def test_validation_spares_the_only_image_of_a_class():
    task = make_task([0] * 50 + [1], [0, 1])
    for seed in range(20):
        assert 50 in task.split(seed, num_validation=40).train.tolist()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_train": 2}, r"no image of 'class \d': it is 2 of 100 images for 3 classes.*; raise num_train"),
        ({"num_validation": 98}, r"no image of 'class \d': it is 2 of 100 .*; lower num_validation"),
        (
            {"num_validation": None},
            r"no image of 'class 0', 'class 1', 'class 2': it is 0 of 100.*; lower num_valid",
        ),
        ({"num_train": -1}, r"num_train is -1; expected None \(all there is\) or a number from 0 up"),
        ({"num_validation": -2}, r"num_validation is -2"),
        ({"num_test": -3}, r"num_test is -3"),
    ],
)
def test_a_split_that_cannot_be_names_the_class_and_the_way_out(numbers, message):
    with pytest.raises(ValueError, match=message):
        make_task(POOL, TEST).split(0, **numbers)


# Embedded tasks


@pytest.mark.parametrize("name", tasks.EMBEDDED)
def test_embedded_tasks_are_balanced_deterministic_and_have_no_image_in_both_parts(name):
    task = tasks.load(name, 32)
    assert task.name == name
    assert (len(task.train), len(task.test)) == (500, 500)
    assert task.train.pixels.shape == (500, 3, 32, 32)
    counts = task.train.labels.bincount()
    assert len(counts) == len(task.classes)
    assert counts.max() - counts.min() <= 1
    assert len(torch.cat([task.train.pixels, task.test.pixels]).flatten(1).unique(dim=0)) == 1000
    assert tasks.load(name, 32).digest == task.digest


@pytest.mark.parametrize("name", ["digits", "count", "position", "orientation", "color_shape"])
def test_a_drawn_task_is_the_same_at_every_size(name):
    small, large = tasks.load(name, 24), tasks.load(name, 72)
    assert (small.train.labels == large.train.labels).all()
    shrunk = torch.nn.functional.avg_pool2d(large.train.pixels.float(), 3)
    pairs = torch.stack([small.train.pixels.float().flatten(1), shrunk.flatten(1)])
    own = (pairs[0] - pairs[1]).square().mean(1)
    other = (pairs[0] - pairs[1].roll(len(small.classes), 0)).square().mean(1)  # next image of the class
    assert (own < other).float().mean() > 0.99
    assert own.mean() < 0.2 * other.mean()


@pytest.mark.parametrize("part", ["train", "test"])
def test_texture_crops_of_a_part_read_their_own_half_of_each_photograph(part, monkeypatch):
    """Replacing the other half of every photograph by noise changes nothing; replacing this half does."""
    boxes = dict(embedded._PHOTOGRAPHS.values())
    original = embedded._photograph
    before = tasks.load("textures", 24)

    def spoil(half: int) -> tasks.Task:
        def spoiled(file: str) -> Image.Image:
            pixels = np.array(original(file))
            left, _, right, _ = boxes[file]
            middle = (left + right) // 2
            columns = (slice(0, middle), slice(middle, None))[half]
            pixels[:, columns] = np.random.default_rng(0).integers(0, 256, pixels[:, columns].shape)
            return Image.fromarray(pixels)

        with monkeypatch.context() as patch:
            patch.setattr(embedded, "_photograph", spoiled)
            return tasks.load("textures", 24)

    own, other = (0, 1) if part == "train" else (1, 0)
    assert torch.equal(getattr(spoil(other), part).pixels, getattr(before, part).pixels)
    changed = (getattr(spoil(own), part).pixels != getattr(before, part).pixels).flatten(1).any(1)
    assert changed.all()


def test_a_crop_fits_into_half_of_each_box():
    for file, (left, top, right, bottom) in embedded._PHOTOGRAPHS.values():
        width, height = embedded._photograph(file).size
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert min((right - left) // 2, bottom - top) >= 64


def test_digits_of_train_and_test_come_from_different_halves_of_the_file():
    from sklearn.datasets import load_digits

    images = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    for digit in range(10):
        parts = [embedded._handwriting(part, digit) for part in (0, 1)]
        assert min(map(len, parts)) >= 50
        places = [[(images == image).all((1, 2)).argmax() for image in part] for part in parts]
        assert max(places[0]) < len(images) / 2 <= min(places[1])


def test_the_angle_of_a_drawn_bar_is_its_label():
    """Independent of the drawing: the principal axis of the pixels that differ from the background."""
    scene = embedded._Scene(np.random.default_rng(0), 64)
    for degrees in range(0, 180, 30):
        cover = np.zeros((64, 64, 3))
        scene.canvas = cover
        scene.draw("bar", 0.5, 0.5, 0.4, np.radians(degrees), np.ones(3))
        rows, columns = np.nonzero(scene.canvas[..., 0] > 0.5)
        axis = np.linalg.eigh(np.cov(columns, -rows))[1][:, -1]
        assert abs((np.degrees(np.arctan2(axis[1], axis[0])) - degrees + 90) % 180 - 90) < 1


# Real images


@pytest.mark.data
def test_tasks_of_the_data_folder_split_as_the_protocol_asks():
    if not (Path(os.environ["APTHORY_DATA"]) / "dtd10").is_dir():
        pytest.skip("the data folder has no dtd10")
    task = tasks.load("dtd10", 64)
    assert (len(task.classes), len(task.train), len(task.test)) == (10, 800, 400)
    split = task.split(0, 400, 100, 500)
    assert (len(split.train), len(split.validation), len(split.test)) == (400, 100, 400)
    assert task.train.labels[split.train].bincount().tolist() == [40] * 10
