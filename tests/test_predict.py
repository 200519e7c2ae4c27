"""Claims about using what was trained: files and folders are classified as tasks are, and no mistake costs anything."""

import csv
import inspect
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner, Result

import apthory as ap
from apthory import __main__ as command
from apthory import backbones, methods, tasks, training
from apthory._tools.files import check_output
from apthory.methods import files, registry
from apthory.training import prediction

SITE = "layer2.0:input"
NAMES = ("red", 'green, or "mint"', "blue")
OLD = Path(__file__).parent / "saved_0_1_0"


@pytest.fixture(scope="module")
def task() -> tasks.Task:
    return tiny.task(60, 30)


@pytest.fixture(scope="module")
def model(task: tasks.Task) -> methods.AdaptedBackbone:
    recipe = ap.Recipe(num_epochs=3, num_train=None, num_validation=12, num_test=None)
    return ap.fit(tiny.backbone("resnet"), task, ap.ActivationPrompting(site=SITE), recipe=recipe).model


def write_images(folder: Path, images: tasks.Images, names: Sequence[str] = NAMES) -> Path:
    """One folder a class."""
    for index, (pixels, label) in enumerate(zip(images, images.labels.tolist(), strict=True)):
        file = folder / names[label] / f"{index:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
    return folder


@pytest.fixture(scope="module")
def folder(task: tasks.Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of the tiny task in files: with train and test folders, and class names that CSV has to quote."""
    root = tmp_path_factory.mktemp("images")
    for part in ("train", "test"):
        write_images(root / part, getattr(task, part))
    return root


# ---------------------------------------------------------------------------------------------- predictions


def test_predictions_are_those_that_evaluate_counts(model: methods.AdaptedBackbone, task: tasks.Task):
    evaluation = ap.evaluate(model, task)
    table = ap.predict(model, task.test)
    assert table.columns.tolist() == ["file", "class", "probability"]
    assert table["file"].tolist() == list(range(30))
    right = [name == task.classes[label] for name, label in zip(table["class"], task.test.labels, strict=True)]
    assert right == evaluation.correct.tolist()
    assert 1 / 3 < evaluation.accuracy / 100 < 1  # so that both answers are there
    assert table["probability"].between(1 / 3, 1).all()
    pd.testing.assert_frame_equal(ap.predict(model, task.test.pixels), table)


def test_the_probability_is_the_softmax_of_the_logits(model: methods.AdaptedBackbone, task: tasks.Task):
    with torch.no_grad(), backbones.autocast(model.backbone, "auto"):
        features = model.features(backbones.normalize(model.backbone, task.test[:7]))
    with torch.no_grad():
        expected = (features.float() @ model.head.weight.T + model.head.bias).softmax(1).max(1).values
    table = ap.predict(model, task.test[:7])
    torch.testing.assert_close(torch.tensor(table["probability"]), expected.double(), rtol=1e-5, atol=1e-6)


def test_a_folder_gives_what_the_task_of_the_same_folder_gives(model: methods.AdaptedBackbone, folder: Path):
    images = tasks.load(f"folder:{folder}", 32).test
    expected = ap.predict(model, images)
    table = ap.predict(model, folder / "test")
    assert table["file"].tolist() == sorted(map(str, (folder / "test").rglob("*.png")))
    by_file = dict(zip(table["file"], table["probability"], strict=True))
    in_order = [by_file[str(file)] for name in sorted(NAMES) for file in sorted((folder / "test" / name).iterdir())]
    assert in_order == pytest.approx(expected["probability"].tolist(), rel=1e-5)
    assert table.attrs["unreadable"] == []


def test_files_are_decoded_as_tasks_decode_them(model: methods.AdaptedBackbone, tmp_path: Path):
    """Turned by EXIF, wider than high, with transparency, grey, of 16 bits."""
    noise = torch.randint(0, 256, (48, 80, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a right angle
    Image.fromarray(noise[:, :, :3]).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(noise).save(tmp_path / "transparent.PNG")
    Image.fromarray(noise[:, :, 0]).save(tmp_path / "grey.webp")
    Image.fromarray(noise[:, :, 0].astype("uint16") * 200).save(tmp_path / "deep.tiff")
    for part in ("train", "test"):
        for name in ("a", "b"):
            shutil.copytree(tmp_path, tmp_path / part / name, ignore=shutil.ignore_patterns("train", "test"))
    pixels = tasks.from_folder(tmp_path, 32).test[:4]
    table = ap.predict(model, [file for file in tmp_path.iterdir() if file.is_file()])
    assert [Path(file).name for file in table["file"]] == ["deep.tiff", "grey.webp", "transparent.PNG", "turned.jpg"]
    expected = ap.predict(model, pixels)["probability"]
    assert table["probability"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 30, 1000])
def test_the_batch_size_changes_nothing(model: methods.AdaptedBackbone, task: tasks.Task, batch_size: int):
    expected, table = ap.predict(model, task.test), ap.predict(model, task.test, batch_size=batch_size)
    assert table["probability"].tolist() == pytest.approx(expected["probability"].tolist(), rel=2e-2)
    assert (table["class"] == expected["class"]).mean() > 0.9  # one in thirty may change sides in bfloat16


def test_a_folder_is_read_at_any_depth_and_what_is_no_image_is_left_alone(
    model: methods.AdaptedBackbone, folder: Path, tmp_path: Path
):
    image = next((folder / "test").rglob("*.png"))
    wanted = [tmp_path / "b" / "c" / "2.png", tmp_path / "1.PNG", tmp_path / "a b.png"]
    for file in [*wanted, tmp_path / "notes.txt"]:
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, file)
    (tmp_path / "folder.png").mkdir()
    assert ap.predict(model, str(tmp_path))["file"].tolist() == sorted(map(str, wanted))
    assert ap.predict(model, wanted[:1] * 2)["file"].tolist() == [str(wanted[0])]
    assert ap.predict(model, wanted[1])["file"].tolist() == [str(wanted[1])]


def test_images_that_cannot_be_read_are_named_and_the_others_are_there(
    model: methods.AdaptedBackbone, folder: Path, tmp_path: Path
):
    image = next((folder / "test").rglob("*.png"))
    shutil.copy(image, tmp_path / "good.png")
    for index in range(6):
        (tmp_path / f"bad{index}.jpg").write_bytes(b"not an image")
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:500])
    with pytest.warns(UserWarning, match=r"7 of 8 images cannot be read: .*bad0.jpg \(not an image.*bad4.* and 2 more"):
        table = ap.predict(model, tmp_path)
    assert table["file"].tolist() == [str(tmp_path / "good.png")]
    unreadable = dict(table.attrs["unreadable"])
    assert sorted(map(os.path.basename, unreadable)) == [*(f"bad{index}.jpg" for index in range(6)), "cut.png"]
    assert all(unreadable.values())
    with pytest.raises(ValueError, match=r"none of 1 images can be read: .*bad0.jpg \(not an image"):
        ap.predict(model, [tmp_path / "bad0.jpg"])


def test_without_any_image_there_is_an_error(model: methods.AdaptedBackbone, tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"no images in .*\(1 other files\); expected files that end in .bmp"):
        ap.predict(model, tmp_path)
    with pytest.raises(ValueError, match="there is no folder or file 'nowhere'"):
        ap.predict(model, "nowhere")
    with pytest.raises(ValueError, match=r"none of 1 images can be read: nowhere.png \(.*No such file"):
        ap.predict(model, ["nowhere.png"])
    for images in ([], torch.zeros(0, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="images is empty; give a folder, files, or pixels"):
            ap.predict(model, images)


def test_a_batch_size_below_one_is_an_error(model: methods.AdaptedBackbone, task: tasks.Task):
    with pytest.raises(ValueError, match="batch_size is 0; expected 1 or more"):
        ap.predict(model, task.test, batch_size=0)


def test_pixels_that_are_none_are_an_error(model: methods.AdaptedBackbone):
    for pixels in (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"expected uint8 pixels, not normalized, of shape \(number, 3, 32, 32\)"):
            prediction._check_pixels(model, pixels)


def test_a_model_that_knows_no_classes_is_an_error(model: methods.AdaptedBackbone, task: tasks.Task):
    bare = methods.AdaptedBackbone(model.backbone, model.prompt).eval()
    with pytest.raises(ValueError, match=r"the model has no head, so it gives features and no classes; Fit.save keeps"):
        ap.predict(bare, task.test)
    with pytest.raises(ValueError, match="model is a ResNet; expected what load_prompt gives"):
        inspect.unwrap(prediction._check_model)(model.backbone, None)  # without the type check of the tests
    learning = methods.AdaptedBackbone(model.backbone, model.prompt, model.head)
    with pytest.raises(ValueError, match="the model is in train mode"):
        ap.predict(learning, task.test)


def test_names_of_classes_can_be_given_for_files_that_have_none(task: tasks.Task):
    old = ap.load_prompt(OLD / "full.safetensors", backbones.load("resnet_micro", device="cpu"))
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=r"does not know the names of its classes.*predict\(..., classes=task.classes\)"
    ):
        ap.predict(old, pixels)
    names = [f"class {index}" for index in range(len(old.head.weight))]
    assert set(ap.predict(old, pixels, classes=names)["class"]) <= set(names)
    with pytest.raises(
        ValueError, match=f"the model has {len(names)} classes, and classes= names 2; name each of them"
    ):
        ap.predict(old, pixels, classes=names[:2])
    with pytest.raises(ValueError, match="classes is 'class 0'; expected a list of names"):
        ap.predict(old, pixels, classes="class 0")


# ---------------------------------------------------------------------------------------------- backbones, found again


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    backbone = ap.load_backbone("resnet_micro", device="cpu")
    prompt = ap.ActivationPrompt.zeros(backbone, SITE)
    return ap.save_prompt(tmp_path / "prompt.safetensors", prompt, backbone, nn.Linear(256, 3))


def rewritten(path: Path, **changes: Any) -> Path:
    config = files.describe_file(path) | changes
    config = {name: value for name, value in config.items() if value is not None}
    tensors = load_file(path)
    config["sha256"] = files._file_digest(config, tensors)
    save_file(tensors, path, {"apthory": json.dumps(config)})
    return path


def test_a_backbone_remembers_how_it_was_loaded():
    load, arguments = backbones.load, backbones.load_arguments
    assert arguments(load("resnet_micro", device="cpu")) == {"name": "resnet_micro"}
    assert arguments(load("vit_micro.random", device="cpu")) == {"name": "vit_micro.random"}
    assert arguments(load("resnet_micro", pretrained=False, input_size=96, std=(0.2, 0.2, 0.2), device="cpu")) == {
        "name": "resnet_micro",
        "pretrained": False,
        "input_size": 96,
        "std": [0.2, 0.2, 0.2],
    }
    assert arguments(load("resnet_micro", pretrained=None, device="cpu")) == {
        "name": "resnet_micro",
        "pretrained": False,
    }
    file = backbones.shipped_folder() / "resnet_micro.safetensors"
    assert arguments(load("resnet_micro", weights=file, device="cpu"))["weights"] == str(file)
    assert (
        arguments(load("resnet18", pretrained=False, drop_rate=0.1, device="cpu")) == {}
    )  # none that a file may carry
    assert arguments(load("vit_micro", pretrained=False, norm_layer=nn.LayerNorm, device="cpu")) == {}
    assert arguments(tiny.backbone("vit")) == {}


@pytest.mark.parametrize(
    ("name", "size", "argument"),
    [("resnet_micro", 96, "input_size"), ("vit_micro", 64, "img_size"), ("vit_micro", None, "")],
)
def test_a_size_is_given_by_the_argument_that_the_architecture_takes(name: str, size: int | None, argument: str):
    backbone = backbones.load_sized(name, size, device="cpu")
    assert backbones.input_size(backbone) == (size or 64)
    assert backbones.load_arguments(backbone) == {"name": name, **({argument: size} if size else {})}
    again = backbones.load_again(backbones.load_arguments(backbone), device="cpu")
    assert backbones.input_size(again) == (size or 64)
    assert backbones.digest(again) == backbones.digest(backbone)


def test_weights_of_a_vit_do_not_fit_another_size():
    with pytest.raises(
        ValueError, match="does not hold the weights of 'vit_micro': 'pos_embed' of the file does not fit"
    ):
        backbones.load_sized("vit_micro", 32)


def test_a_file_finds_its_backbone(saved: Path):
    found = ap.load_prompt(saved)
    assert backbones.digest(found.backbone) == files.describe_file(saved)["digest"]
    assert files.describe_file(saved)["load_arguments"] == {"name": "resnet_micro"}
    weights = shutil.copy(backbones.shipped_folder() / "resnet_micro.safetensors", saved.parent / "moved.safetensors")
    for given in (
        {"weights": weights},
        {"size": 64},
        {"name": "resnet_micro", "weights": weights},
        {"name": "resnet_micro"},
    ):
        own = files.backbone_of_file(saved, device="cpu", **given)
        assert backbones.digest(own) == backbones.digest(found.backbone)


def test_a_file_that_does_not_say_its_backbone_asks_for_it(saved: Path):
    message = (
        r"does not say how to load its backbone 'resnet_micro'; name it \(--backbone.*load_prompt\(path, backbone\)"
    )
    for path in (rewritten(saved, load_arguments=None), OLD / "full.safetensors"):
        with pytest.raises(ValueError, match=message):
            ap.load_prompt(path)
        assert files.load_prompt(path, files.backbone_of_file(path, name="resnet_micro")).head is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("resnet_micro", "is damaged: its load_arguments are 'resnet_micro', and should be a dict"),
        ({"weights": "x"}, "cannot load a backbone by {'weights': 'x'}; expected a name"),
        ({"name": "resnet18", "checkpoint_path": "x.pt"}, "expected a name, and some of pretrained, weights"),
        ({"name": "nothing"}, "no backbone 'nothing'"),
        ({"name": "resnet_micro", "patch_size": 8}, "cannot load a backbone by .*patch_size"),
        ({"name": "resnet_micro", "weights": [1]}, "cannot load a backbone by .*weights"),
    ],
)
def test_a_file_can_name_no_more_than_a_backbone_of_ours(saved: Path, arguments: Any, message: str):
    with pytest.raises(ValueError, match=message):
        ap.load_prompt(rewritten(saved, load_arguments=arguments))


def test_weights_that_moved_are_an_error_with_a_way_out(saved: Path):
    path = rewritten(saved, load_arguments={"name": "resnet_micro", "weights": "gone.safetensors"})
    with pytest.raises(OSError, match=r"no weight file gone.safetensors; pass weights=FILE.safetensors"):
        ap.load_prompt(path)


# ---------------------------------------------------------------------------------------------- methods by options


@dataclass(frozen=True, kw_only=True)
class _Plain(methods.Method):
    name: ClassVar[str] = "plain"
    site: ClassVar[str] = ":input"


def test_a_method_is_made_by_its_name_and_its_fields():
    assert registry.make("ap", {"site": SITE, "shape": "channel", "lr_scale": 3}) == ap.ActivationPrompting(
        site=SITE, shape="channel", lr_scale=3
    )
    assert registry.make("evp", {"diversity": ["flip"], "width": None}) == ap.EVP(diversity=("flip",))
    assert registry.make("linear_probe", {}) == ap.LinearProbe()
    assert [registry.needed(registry.find_method(name)) for name in ("ap", "random_prompt", "vp")] == [
        ["site"],
        ["site", "norm"],
        [],
    ]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("app", {}, "no method 'app'; there are ap, norm, linear_probe"),
        ("ap", {}, "the method 'ap' needs the option 'site': a text"),
        ("ap", {"site": 3}, "site of the method 'ap' is 3; expected a text"),
        ("vp", {"site": SITE}, "the method 'vp' has no option 'site'; it has width, place, normalized"),
        ("ap", {"site": SITE, "shape": "row"}, "shape of the method 'ap' is 'row'; expected one of 'full', 'channel'"),
        ("ap", {"site": SITE, "lr_scale": "fast"}, "lr_scale of the method 'ap' is 'fast'; expected a number"),
        ("ap", {"site": SITE, "lr_scale": True}, "lr_scale of the method 'ap' is True; expected a number"),
        ("vp", {"width": 1.5}, "width of the method 'vp' is 1.5; expected a whole number or None"),
        ("vp", {"normalized": 1}, "normalized of the method 'vp' is 1; expected True or False"),
        ("evp", {"diversity": "flip"}, "is 'flip'; expected a tuple, each entry one of 'flip', 'crop', 'randaugment'"),
        ("plain", {"width": 1}, "the method 'plain' has no option 'width'; it has none"),
    ],
)
def test_a_method_refuses_what_it_does_not_know(name: str, options: dict, message: str, monkeypatch):
    monkeypatch.setitem(registry.METHODS, "plain", _Plain)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared as it stands
        registry.make(name, options)
    assert message in str(error.value)


# ---------------------------------------------------------------------------------------------- files to be written


def test_what_can_be_written_passes_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "there.safetensors").touch()
    for name in ("new.safetensors", "a/b/new.safetensors", "there.safetensors"):
        assert check_output(tmp_path / name, ".safetensors") == tmp_path / name
    assert check_output("new.csv") == Path("new.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]


def test_what_cannot_be_written_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    (tmp_path / "there.csv").touch()
    with pytest.raises(IsADirectoryError, match=r"is a folder; name a file, such as .*NAME.csv"):
        check_output(tmp_path, ".csv")
    with pytest.raises(ValueError, match=r"new.txt should end in .csv; name it .*new.csv"):
        check_output(tmp_path / "new.txt", ".csv")
    with pytest.raises(FileExistsError, match=r"there.csv is there already; name another file"):
        check_output(tmp_path / "there.csv", overwrite=False)
    with pytest.raises(NotADirectoryError, match="file is a file, not a folder"):
        check_output(tmp_path / "file" / "a" / "new.csv")
    with pytest.raises(OSError, match=r"cannot be written: File name too long \(.*\); name another file or folder"):
        check_output(tmp_path / ("a" * 245))

    def refuse(path: Path, **options: bool) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(OSError, match=rf"new.csv cannot be written: Permission denied \({tmp_path}\)"):
        check_output(tmp_path / "a" / "new.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there.csv"]


def test_a_fit_is_not_saved_in_the_place_of_a_folder(model: methods.AdaptedBackbone, tmp_path: Path):
    with pytest.raises(IsADirectoryError, match="is a folder; name a file"):
        files.save_model(tmp_path, model)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- the commands


def call(*arguments: object) -> Result:
    return CliRunner().invoke(command.app, [str(argument) for argument in arguments])


FIT = ("fit", "--backbone", "resnet_micro", "--site", SITE, "--epochs", 2)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of real textures, twelve images each, under names that CSV has to quote."""
    task = tasks.load("textures", 64)
    images = tasks.Images(task.train[:72], task.train.labels[:72] % 3)
    return write_images(tmp_path_factory.mktemp("photographs") / "photos", images)


@pytest.fixture(scope="module")
def trained(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """What `apthory fit` wrote and said."""
    path = tmp_path_factory.mktemp("trained") / "a b" / "prompt.safetensors"
    return path, call(*FIT, "--data", photographs, "--output", path)


def test_fit_trains_tests_once_and_says_how_to_go_on(trained: tuple[Path, Result], photographs: Path):
    path, result = trained
    assert (result.exit_code, result.exception) == (0, None), result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "photos: 3 classes; 46 images to train on, 11 held out for validation, 15 to test"
    assert lines[1].startswith(f"ap at {SITE} of resnet_micro: ")
    assert lines[2].startswith("validation accuracy ")
    assert lines[2].endswith(" of 2 at learning rate 0.01")
    assert lines[3] == f"saved in {path} ({path.stat().st_size / 1000:,.0f} kB: all but the backbone)"
    evaluation = ap.evaluate(ap.load_prompt(path), tasks.load(f"folder:{photographs}", 64))
    overall, balanced = f"{evaluation.accuracy:.1f} %", f"{evaluation.balanced_accuracy:.1f} %"
    assert lines[4] == f"test accuracy {overall} on 15 images, {balanced} where each class counts alike"
    assert lines[5] == "recall by class, lowest first:"
    recalls = [float(line.split("%")[0]) for line in lines[6:9]]
    assert recalls == pytest.approx(sorted(evaluation.recall.tolist()), abs=0.06)
    assert {line.split(maxsplit=4)[4] for line in lines[6:9]} == set(NAMES)
    assert lines[9:] == ["next, for images without labels:", f"  apthory predict --prompt '{path}' --images FOLDER"]


def test_fit_remembers_all_that_predict_needs(trained: tuple[Path, Result], photographs: Path, tmp_path: Path):
    path, _ = trained
    result = call("predict", "--prompt", path, "--images", photographs)
    assert result.exit_code == 0, result.output
    rows = list(csv.reader(result.stdout.splitlines()))
    assert rows[0] == ["file", "class", "probability"]
    assert [row[0] for row in rows[1:]] == sorted(map(str, photographs.rglob("*.png")))
    table = ap.predict(ap.load_prompt(path), photographs)
    assert [row[1] for row in rows[1:]] == table["class"].tolist()
    assert set(table["class"]) == set(NAMES)  # the names with commas and quotes, too
    assert [float(row[2]) for row in rows[1:]] == pytest.approx(table["probability"].tolist(), abs=1e-6)
    output = tmp_path / "new" / "predictions.csv"
    result = call("predict", "--prompt", path, "--images", photographs, "--output", output, "--batch-size", 5)
    assert (result.exit_code, result.stdout) == (0, f"72 images, in {output}\n")
    assert pd.read_csv(output)["class"].tolist() == table["class"].tolist()
    assert [file.name for file in output.parent.iterdir()] == ["predictions.csv"]


def test_predict_names_what_it_cannot_read_and_gives_the_rest(
    trained: tuple[Path, Result], photographs: Path, tmp_path: Path
):
    shutil.copy(next(photographs.rglob("*.png")), tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    result = call("predict", "--prompt", trained[0], "--images", tmp_path)
    assert result.exit_code == 0
    assert [line.split(",")[0] for line in result.stdout.splitlines()] == ["file", str(tmp_path / "good.png")]
    bad = f"cannot be read: {tmp_path / 'bad.png'} (not an image, or of an unknown format)"
    assert f"{bad}\n1 of 2 images cannot be read\n" in result.stderr
    assert "Warning" not in result.stderr
    (tmp_path / "good.png").unlink()
    result = call("predict", "--prompt", trained[0], "--images", tmp_path, "--output", tmp_path / "table.csv")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Error: none of 1 images can be read: " in result.stderr
    assert not (tmp_path / "table.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "{photos}", "--prompt", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--images", "nowhere"], "there is no folder or file 'nowhere'; name a folder of images"),
        (["--images", "{empty}"], "no images in '{empty}' (0 other files); expected files that end in .bmp"),
        (["--images", "{photos}", "--output", "table.txt"], "table.txt should end in .csv; name it table.csv"),
        (["--images", "{photos}", "--backbone", "vit_micro"], "was trained for the backbone 'resnet_micro', not"),
        (["--images", "{photos}", "--weights", "gone.safetensors"], "no weight file gone.safetensors"),
        (["--images", "{photos}", "--size", "96"], "was trained with image_size 64, and this backbone has 96"),
        (["--images", "{photos}", "--batch-size", "0"], "batch_size is 0; expected 1 or more"),
    ],
)  # fmt: skip
def test_a_mistake_of_predict_is_one_line(
    trained: tuple[Path, Result], photographs: Path, tmp_path: Path, arguments: list[str], message: str
):
    places = {"photos": photographs, "empty": tmp_path}
    result = call("predict", "--prompt", trained[0], *(argument.format(**places) for argument in arguments))
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert message.format(**places) in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> list:
    """Calls of what takes long: decoding a task, and training."""
    calls: list = []
    monkeypatch.setattr(tasks, "load", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(training, "tune", lambda *arguments, **options: calls.append(arguments))
    return calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "{folder}"], "{folder} is a folder; name a file, such as {folder}/NAME.safetensors"),
        (["--output", "{folder}/p.pt"], "{folder}/p.pt should end in .safetensors; name it {folder}/p.safetensors"),
        (["--output", "{folder}/there.safetensors"], "there.safetensors is there already; name another file"),
        (["--output", "{folder}/there.safetensors/p.safetensors"], "there.safetensors is a file, not a folder"),
        (["--method", "app"], "no method 'app'; there are ap, norm, "),
        (["--site", ""], "the method 'ap' needs a site: give --site, one of :input, layer1.0:input, "),
        (["--site", ""], "`apthory layers --backbone resnet_micro --task textures` ranks them"),
        (["--site", "layer9.0:input"], "no module 'layer9.0' in this ResNet; did you mean"),
        (["--method", "vp"], "the method 'vp' has no option 'site'; it has width, "),
        (["--option", "shape=row"], "shape of the method 'ap' is 'row'; expected one of 'full', 'channel'"),
        (["--option", "width=3"], "the method 'ap' has no option 'width'; it has site, shape, "),
        (["--method", "random_prompt"], "the method 'random_prompt' needs the option 'norm': a number"),
        (["--backbone", "nothing"], "no backbone 'nothing'; shipped are vit_micro, resnet_micro, or any timm name"),
        (["--weights", "gone.safetensors"], "no weight file gone.safetensors"),
        (["--epochs", "0"], "num_epochs is 0 and batch_size 32; both are at least 1"),
        (["--num-validation", "0"], "num_validation is 0, but validation images choose epoch and configuration"),
        (["--learning-rate", "-1"], "the learning rate is positive, weight decay and seed are not negative"),
        (["--seed", "-1"], "the learning rate is positive, weight decay and seed are not negative"),
        (["--backbone", "vit_micro", "--size", "96"], "or leave out the size 96, if the weights are for another one"),
    ],
)  # fmt: skip
def test_a_mistake_of_fit_is_one_line_before_any_training(
    tmp_path: Path, no_training: list, arguments: list[str], message: str
):
    (tmp_path / "there.safetensors").touch()
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    result = call(*FIT, "--task", "textures", "--output", tmp_path / "p.safetensors", *arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert message.format(folder=tmp_path) in result.stderr
    assert result.stderr.count("\n") == 1
    assert not no_training
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]


@pytest.mark.parametrize(
    "arguments",
    [["--data", "nowhere"], ["--data", ".", "--task", "digits"], [], ["--task", "digits", "--option", "shape"]],
    ids=" ".join,
)
def test_a_call_of_fit_that_cannot_be_read_is_a_usage_error(tmp_path: Path, no_training: list, arguments: list[str]):
    result = call(*FIT, "--output", tmp_path / "p.safetensors", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr
    assert not no_training


def test_of_several_learning_rates_validation_chooses_and_force_replaces(photographs: Path, tmp_path: Path):
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"earlier")
    rates = ("--learning-rate", 1e-6, "--learning-rate", 1e-2, "--learning-rate", 1e-6)
    numbers = ("--num-train", 30, "--num-validation", 9, "--seed", 3, "--batch-size", 10)
    options = ("--method", "norm", "--option", "parameters=beta", "--size", 64)
    result = call(*FIT, "--data", photographs, "--output", path, *rates, *numbers, *options, "--force")
    assert result.exit_code == 0, result.output
    assert "30 images to train on, 9 held out for validation, 15 to test" in result.stdout
    assert "at learning rate 1e-06" not in result.stdout
    assert files.describe_file(path)["options"]["parameters"] == "beta"
    assert ap.load_prompt(path).source.method == ap.NormTuning(site=SITE, parameters="beta")


def test_a_method_without_a_site_is_trained_without_one(photographs: Path, tmp_path: Path):
    path = tmp_path / "p.safetensors"
    arguments = ("fit", "--backbone", "resnet_micro", "--method", "linear_probe", "--epochs", 1)
    result = call(*arguments, "--data", photographs, "--output", path)
    assert result.exit_code == 0, result.output
    assert "linear_probe at :output of resnet_micro: 0 trained values beside the head" in result.stdout


def test_a_failing_test_loses_nothing(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object) -> None:
        raise ValueError("no test")

    monkeypatch.setattr(training, "evaluate", fail)
    path = tmp_path / "p.safetensors"
    result = call(*FIT, "--data", photographs, "--output", path)
    assert result.exit_code == 1
    assert f"saved in {path}" in result.stdout
    assert ap.load_prompt(path).classes == tuple(sorted(NAMES))


def test_a_warning_of_training_is_one_line(tmp_path: Path, photographs: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [])
        result = call(*FIT, "--data", photographs, "--output", tmp_path / "p.safetensors", "--num-validation", 40)
    assert result.exit_code == 0, result.output
    assert "Warning: validation takes 40 of 57 images and leaves 17 to train on; lower num_validation" in result.stderr
    assert "fitting.py" not in result.stderr
