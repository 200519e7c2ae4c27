"""Pretraining: exact resume, refusals, the moving average, augmentation, the exported file."""

import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import safetensors.torch
import torch
import typer
from torch.nn import functional as F
from typer.testing import CliRunner

from apthory import __main__ as command
from apthory import backbones, pretraining, tasks
from apthory._tools.determinism import random_stream
from apthory._tools.files import write_atomically
from apthory.pretraining import Config, cards, crop_and_flip, export, exports, pretrain, run, ship
from apthory.tasks import Images, Task


@pytest.fixture(scope="module")
def task() -> Task:
    return small_task()


def small_task() -> Task:
    """Noise in four colours, 80 images to train and 24 to test."""

    def part(count: int) -> Images:
        labels = torch.arange(count) % 4
        colours = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200], [160, 160, 160]])[labels]
        noise = torch.randint(-50, 50, (count, 3, 32, 32), generator=generator)
        return Images((colours[:, :, None, None] + noise).to(torch.uint8), labels)

    generator = torch.Generator().manual_seed(0)
    return Task("colours", ("red", "green", "blue", "grey"), part(80), part(24), "drawn at 32 px")


def small_config(**changes: object) -> Config:
    """Two epochs of four steps each, with every random part of the recipe switched on."""
    small = {"backbone": "test_vit", "task": "colours", "size": 32, "num_validation": 16, "batch_size": 16}
    recipe = {
        "epochs": 2,
        "warmup_epochs": 0.5,
        "padding": 4,
        "randaugment": 9,
        "mixup": 0.2,
        "device": "cpu",
    }
    return Config(**small | recipe | changes)


def read(folder: Path, epoch: int) -> dict:
    return torch.load(folder / f"checkpoints/epoch-{epoch:04d}.pt", weights_only=True)


def assert_same_bits(one: object, other: object) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same_bits(one[name], other[name])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_same_bits(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def assert_same_run(one: Path, other: Path, epoch: int) -> None:
    one, other = ({**read(folder, epoch), "seconds": 0.0} for folder in (one, other))
    assert_same_bits(one, other)


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert pretrain(small_config(), folder, task=task, keep=[0]) == folder / "test_vit.safetensors"
    return folder


def die_while_writing_epoch_2(folder: str, threads: int) -> None:
    """Run in another process: killed after the second checkpoint is written, before it bears its name."""
    torch.set_num_threads(threads)
    replace = Path.replace

    def replace_or_die(path: Path, target: Path) -> Path:
        if target.name == "epoch-0002.pt":
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = replace_or_die
    pretrain(small_config(), Path(folder), task=small_task(), keep=[0])


def test_a_killed_and_resumed_run_gives_the_bits_of_an_uninterrupted_one(task, finished, tmp_path):
    arguments = f"{str(tmp_path)!r}, {torch.get_num_threads()}"
    code = f"import test_pretraining; test_pretraining.die_while_writing_epoch_2({arguments})"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(pretraining.__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "checkpoints/epoch-0002.pt").exists()
    assert len(list(tmp_path.rglob("*.partial"))) == 1
    assert_same_run(tmp_path, finished, 1)

    resumed = pretrain(small_config(), tmp_path, task=task, keep=[0])
    assert_same_run(tmp_path, finished, 2)
    assert resumed.read_bytes() == (finished / resumed.name).read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_that_ran_out_of_time_resumes_to_the_same_bits_with_batch_norm(task, tmp_path, device):
    config = small_config(backbone="test_resnet", device=device)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    pretrain(config, whole, task=task)
    assert pretrain(config, pieces, task=task, minutes=0.0) == pieces / "checkpoints/epoch-0001.pt"
    assert pretrain(config, pieces, task=task, minutes=0.0) == pieces / "test_resnet.safetensors"
    assert_same_run(whole, pieces, 2)


def test_training_learns_and_leaves_the_random_state_as_it_was(task, tmp_path):
    before = torch.get_rng_state()
    quiet = {"randaugment": None, "mixup": 0.0, "learning_rate": 3e-3, "epochs": 5, "precision": "float32"}
    output = pretrain(small_config(backbone="test_resnet", **quiet), tmp_path, task=task)
    assert torch.equal(torch.get_rng_state(), before)
    card = json.loads(output.with_suffix(".json").read_text())
    assert card["curve"][-1]["loss"] < 0.7 * card["curve"][0]["loss"]
    assert card["test"]["top1"] > 0.9


def test_ctrl_c_names_the_checkpoint_and_the_command_ends_with_130(task, finished, tmp_path, monkeypatch):
    looks = []

    def interrupt(*_: object) -> None:
        looks.append(1)
        if len(looks) == 2:  # once an epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "load", lambda *_: task)
    monkeypatch.setattr(run.Run, "_require_finite", interrupt)
    app = typer.Typer()
    app.command()(command.pretrain)
    skipped = ("data", "backbone")
    options = {field.name: getattr(small_config(), field.name) for field in fields(Config)}
    given = {f"--{name.replace('_', '-')}": value for name, value in options.items() if name not in skipped}
    words = [str(word) for name, value in given.items() if value is not None for word in (name, value)]
    call = ["test_vit", "--output", str(tmp_path), "--keep", "0", *words]
    stopped = CliRunner().invoke(app, call)
    assert stopped.exit_code == 130
    assert str(tmp_path / "checkpoints/epoch-0001.pt") in stopped.output

    monkeypatch.undo()
    monkeypatch.setattr(tasks, "load", lambda *_: task)
    resumed = CliRunner().invoke(app, call)
    assert resumed.exit_code == 0, resumed.output
    assert_same_run(tmp_path, finished, 2)


def test_the_command_offers_every_field_of_the_configuration_with_its_default():
    parameters = inspect.signature(command.pretrain).parameters
    for field in fields(Config):
        if field.name != "backbone":
            assert parameters[field.name].default == field.default, field.name


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 2e-3}, {"seed": 1}, {"backbone": "test_resnet"}, {"num_classes": 3}]
)
def test_a_folder_of_another_run_is_refused_with_the_differing_field(task, finished, changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"with .*{name}=.*, not .*{name}={value!r}"):
        pretrain(small_config(**changes), finished, task=task)


def test_a_folder_trained_on_other_images_is_refused(task, finished):
    train = Images(255 - task.train.pixels, task.train.labels)
    other = Task(task.name, task.classes, train, task.test, task.transform)
    with pytest.raises(ValueError, match="digest="):
        pretrain(small_config(), finished, task=other)
    with pytest.raises(ValueError, match="was not trained on these images"):
        export(finished / "checkpoints/epoch-0002.pt", finished / "other.safetensors", task=other)


def test_where_the_images_lie_is_no_part_of_the_run(task, finished):
    assert pretrain(small_config(data=Path("elsewhere")), finished, task=task).exists()


@pytest.mark.parametrize("damage", ["one byte", "cut", "empty"])
def test_a_corrupt_checkpoint_is_set_aside_and_the_one_before_it_used(task, finished, tmp_path, damage):
    for epoch in (1, 2):
        content = bytearray((finished / f"checkpoints/epoch-{epoch:04d}.pt").read_bytes())
        if epoch == 2:
            content[len(content) // 2] ^= 1
            content = {"one byte": content, "cut": content[:5000], "empty": b""}[damage]
        write_atomically(tmp_path / f"checkpoints/epoch-{epoch:04d}.pt", bytes(content))
    with pytest.raises(ValueError, match="corrupt"):
        export(tmp_path / "checkpoints/epoch-0002.pt", tmp_path / "any.safetensors", task=task)
    with pytest.warns(RuntimeWarning, match=r"epoch-0002.pt is corrupt, set aside as epoch-0002.pt.corrupt"):
        pretrain(small_config(), tmp_path, task=task)
    assert (tmp_path / "checkpoints/epoch-0002.pt.corrupt").exists()
    assert_same_run(tmp_path, finished, 2)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(task, tmp_path):
    config = small_config(learning_rate=1e30, max_gradient_norm=1e30, precision="float32")
    with pytest.raises(FloatingPointError, match=r"epoch 1, step \d of 4.*learning_rate below.*epoch-0000.pt"):
        pretrain(config, tmp_path, task=task)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch-0000.pt"]
    assert all(value.isfinite().all() for value in read(tmp_path, 0)["model"].values())


def test_only_the_last_two_checkpoints_and_those_to_keep_stay(task, tmp_path):
    config = small_config(backbone="test_resnet", epochs=5, randaugment=None)
    pretrain(config, tmp_path, task=task, keep=[2])
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["epoch-0002.pt", "epoch-0004.pt", "epoch-0005.pt"]
    assert (tmp_path / "test_resnet.epoch-0002.safetensors").exists()
    with pytest.raises(ValueError, match="keep=1"):
        pretrain(config, tmp_path, task=task, keep=[1])


def test_a_call_that_resumes_keeps_what_the_calls_before_kept(task, tmp_path):
    config = small_config(backbone="test_resnet", epochs=5, randaugment=None)
    pretrain(config, tmp_path, task=task, keep=[1], minutes=0.0)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["epoch-0000.pt", "epoch-0001.pt"]
    pretrain(config, tmp_path, task=task)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["epoch-0001.pt", "epoch-0004.pt", "epoch-0005.pt"]
    assert cards.read_card(tmp_path / "test_resnet.epoch-0001.safetensors")["epochs"] == 1


def test_the_exported_file_loads_strictly_and_computes_what_the_average_computes(task, tmp_path):
    output = pretrain(small_config(backbone="test_resnet", epochs=2), tmp_path, task=task)
    state, checkpoint = safetensors.torch.load_file(output), read(tmp_path, 2)
    types = {name: value.dtype for name, value in state.items() if value.is_floating_point()}
    full = {name for name in types if name.endswith("running_var")}
    assert full
    assert all(dtype == (torch.float32 if name in full else torch.float16) for name, dtype in types.items())

    exported, average = (backbones.create("test_resnet", 4).eval() for _ in range(2))
    exported.load_state_dict(state, strict=True)
    average.load_state_dict(checkpoint["ema"], strict=True)
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), average(x), rtol=2e-3, atol=2e-3)
        assert not torch.equal(exported(x), average(x)), "half precision leaves a trace"


def test_the_model_card_tells_what_was_done_and_the_random_start_is_exported_untrained(task, finished):
    card = json.loads((finished / "test_vit.json").read_text())
    assert card["recipe"] == small_config().recipe
    assert card["data"]["digest"] == task.digest
    assert [point["epoch"] for point in card["curve"]] == [1, 2]
    assert card["test"]["images"] == 24
    text = (finished / "test_vit.md").read_text()
    assert f"Top-1 {card['test']['top1']:.2%}" in text
    assert "| 2 |" in text

    start = json.loads((finished / "test_vit.epoch-0000.json").read_text())
    assert (start["epochs"], start["curve"]) == (0, [])
    assert "Not recorded." in (finished / "test_vit.epoch-0000.md").read_text()
    random = backbones.start("test_vit", 4, img_size=32).state_dict()
    assert all(torch.equal(value, random[name]) for name, value in read(finished, 0)["model"].items())
    weights = safetensors.torch.load_file(finished / "test_vit.epoch-0000.safetensors")
    trained = safetensors.torch.load_file(finished / "test_vit.safetensors")
    assert not torch.equal(weights["head.weight"], trained["head.weight"])
    assert "img_size" not in card["recipe"]
    assert len(trained["pos_embed"][0]) == 1 + (32 // 16) ** 2


def test_a_run_may_begin_with_the_average_of_another_and_its_card_tells_of_both(task, finished, tmp_path, monkeypatch):
    first = finished / "checkpoints/epoch-0002.pt"
    gentle = small_config(epochs=1, warmup_epochs=0.0, randaugment=None, mixup=0.0)
    streams, stream = [], random_stream
    monkeypatch.setattr(
        run, "random_stream", lambda seed, index, *rest: streams.append(index) or stream(seed, index, *rest)
    )
    weights = pretrain(gentle, tmp_path / "second", task=task, after=first, keep=[0])
    assert streams == [3]  # the first run's two epochs have drawn their orders and crops
    begun = read(tmp_path / "second", 0)
    assert_same_bits(begun["model"], read(finished, 2)["ema"])
    card = cards.read_card(weights)
    assert (card["epochs"], len(card["curve"]), card["recipe"]) == (1, 1, gentle.recipe)
    assert [point["epoch"] for point in cards.curve(card)] == [1, 2, 3]
    assert cards.num_epochs(card) == 3
    [before] = card["before"]
    assert (before["epoch"], before["recipe"]) == (2, small_config().recipe)
    assert before["sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()
    text = weights.with_suffix(".md").read_text()
    assert "after 1 of 1 epochs from the weights of an earlier run (2 of 2 epochs, below)" in text
    assert "## The run before: 2 of 2 epochs" in text
    assert before["sha256"] in text

    assert pretrain(gentle, tmp_path / "second", task=task, after=first) == weights  # resumes: nothing to do
    with pytest.raises(ValueError, match=r"with after='\w{64}', not after=None; take another output folder"):
        pretrain(gentle, tmp_path / "second", task=task)
    third = pretrain(gentle, tmp_path / "third", task=task, after=tmp_path / "second/checkpoints/epoch-0001.pt")
    assert [run["epoch"] for run in cards.read_card(third)["before"]] == [2, 1]
    for wrong in ({"backbone": "test_resnet"}, {"seed": 1}):
        with pytest.raises(ValueError, match=r"epoch-0002.pt is of 'test_vit' on images \w{8}, split \w{8}; to begin"):
            pretrain(small_config(**wrong), tmp_path / "other", task=task, after=first)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs=0; expected at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"warmup_epochs": 2.0}, "warmup_epochs=2.0; expected 0 to below epochs=2"),
        ({"padding": 32}, "padding=32; expected 0 to below size=32"),
        ({"randaugment": 31}, "randaugment=31"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_unknown_backbones_classes_and_devices_are_refused(task, tmp_path):
    with pytest.raises(ValueError, match="no backbone 'vit_mikro'"):
        pretrain(small_config(backbone="vit_mikro"), tmp_path, task=task)
    with pytest.raises(ValueError, match="num_classes=5, but 'colours' has 4"):
        pretrain(small_config(num_classes=5), tmp_path, task=task)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no CUDA device"):
            pretrain(small_config(device="cuda"), tmp_path, task=task)
    assert not list(tmp_path.iterdir())


def test_the_first_classes_of_a_task_are_all_that_a_limited_run_sees(task):
    limited = exports.first_classes(task, 3)
    assert limited.classes == ("red", "green", "blue")
    assert limited.train.labels.unique().tolist() == [0, 1, 2]
    assert torch.equal(limited.test.pixels, task.test.pixels[task.test.labels < 3])


def test_the_average_follows_its_formula(task, monkeypatch):
    one = run.Run(small_config(ema_decay=0.7, precision="float32", randaugment=None), task)
    weights, update = [], one.ema.update

    def watched_update(model: torch.nn.Module, step: int) -> None:
        weights.append(model.head.weight.detach().double())
        update(model, step)

    monkeypatch.setattr(one.ema, "update", watched_update)
    one.train_epoch()
    one.train_epoch()

    average = weights[0]
    for n, weight in enumerate(weights[1:], start=2):
        keep = min(0.7, 1 - n ** (-2 / 3))  # the limit is reached within the second epoch
        average = keep * average + (1 - keep) * weight
    assert len(weights) == 8
    torch.testing.assert_close(one.ema.module.head.weight.detach().double(), average, rtol=0, atol=1e-7)


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine_over_all_steps(task, monkeypatch):
    one, rates = run.Run(small_config(epochs=3, warmup_epochs=1.0), task), []
    groups = one.optimizer.param_groups
    monkeypatch.setattr(one.ema, "update", lambda *_, **__: rates.append(groups[0]["lr"]))
    for _ in range(3):
        one.train_epoch()
    warm = torch.arange(1, 5, dtype=torch.float64) / 4  # the peak is step 4, the cosine ends behind step 12
    cosine = (1 + torch.cos(torch.pi * torch.arange(1, 9, dtype=torch.float64) / 9)) / 2
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), 1e-3 * torch.cat([warm, cosine]))


def test_crop_and_flip_is_pad_slice_and_mirror_with_the_same_draws():
    pixels = torch.randint(0, 256, (10, 3, 12, 16), dtype=torch.uint8)
    index, padding = torch.tensor([3, 3, 0, 9, 1, 2, 7]), 5
    batch = crop_and_flip(pixels, index, padding, torch.Generator().manual_seed(1))
    assert batch.dtype == torch.uint8
    assert batch.shape == (7, 3, 12, 16)
    assert torch.equal(batch, crop_and_flip(pixels, index, padding, torch.Generator().manual_seed(1)))
    assert not torch.equal(batch, crop_and_flip(pixels, index, padding, torch.Generator().manual_seed(2)))

    padded = F.pad(pixels[index].float(), (padding,) * 4, mode="reflect").to(torch.uint8)
    found = []
    for image, source in zip(batch, padded, strict=True):
        crops = {
            (top, left, flip): crop.flip(-1) if flip else crop
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            for crop in [source[:, top : top + 12, left : left + 16]]
            for flip in (False, True)
        }
        matches = [key for key, crop in crops.items() if torch.equal(crop, image)]
        assert len(matches) == 1
        found += matches
    assert len({key[:2] for key in found}) > 3
    assert {key[2] for key in found} == {False, True}


def test_no_padding_and_no_mirror_draw_gives_the_images_themselves():
    pixels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    batch = crop_and_flip(pixels, torch.arange(40), 0, torch.Generator().manual_seed(0))
    same = (batch == pixels).flatten(1).all(1)
    mirrored = (batch == pixels.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 10 < same.sum() < 30


def test_epochs_and_seeds_draw_from_streams_of_their_own():
    draws = {}
    for seed in range(3):
        for epoch in range(3):
            with random_stream(seed, epoch, torch.device("cpu")) as generator:
                draws[seed, epoch] = (torch.rand(1).item(), torch.rand(1, generator=generator).item())
    assert len({value for pair in draws.values() for value in pair}) == 18


# ------------------------------------------------------------------------------------------ what ships


def shipped_files() -> list[Path]:
    return sorted(backbones.shipped_folder().glob("*.safetensors"))


def test_every_shipped_backbone_has_weights_and_epochs_take_little_room():
    assert {path.stem for path in shipped_files() if "." not in path.stem} == set(backbones.SHIPPED)
    assert sum(path.stat().st_size for path in shipped_files() if "." in path.stem) <= cards.MAX_CHECKPOINT_BYTES
    endings = {path.name for path in backbones.shipped_folder().iterdir()}
    assert endings == {
        f"{path.stem}{ending}" for path in shipped_files() for ending in (".safetensors", ".json", ".md")
    }


@pytest.mark.parametrize("path", shipped_files(), ids=lambda path: path.stem)
def test_a_shipped_file_is_what_its_card_says_and_the_text_is_made_from_the_json(path):
    assert cards.card_problems(path) == []
    card = cards.read_card(path)
    assert path.with_suffix(".md").read_text() == cards.text(card)
    assert "non-commercial" in card["note"]


@pytest.mark.data
@pytest.mark.slow
def test_shipped_files_reach_the_top1_of_their_cards():
    whole = tasks.load("tiny_imagenet", 64)
    for path in shipped_files():
        card = cards.read_card(path)
        task = exports.first_classes(whole, card["data"]["classes"])
        assert (task.digest, len(task.test)) == (card["data"]["digest"], card["test"]["images"])
        model = backbones.load(path.stem, num_classes=len(task.classes), device="cpu")
        _, top1 = exports.loss_and_accuracy(model, task.test, torch.arange(len(task.test)))
        assert top1 == pytest.approx(card["test"]["top1"], abs=2 / len(task.test))


@pytest.fixture
def exported(tmp_path) -> Path:
    """Exports as a run leaves them, of random weights: the last of both backbones, and two epochs of each."""
    for name in backbones.SHIPPED:
        for stem, epochs in ((name, 30), (f"{name}.epoch-0002", 2), (f"{name}.epoch-0008", 8)):
            model = backbones.start(name, 7, seed=epochs)
            content = safetensors.torch.save({k: exports._half(k, v) for k, v in model.state_dict().items()})
            card = {
                "backbone": name,
                "file": {
                    "name": f"{stem}.safetensors",
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "weights": "ema",
                },
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "epochs": epochs,
                "test": {"top1": 0.5, "loss": 2.0, "images": 10},
                "note": "For tests.",
                "data": {"name": "colours", "classes": 7},
                "recipe": {"size": 64, "epochs": 30, "seed": 0},
                "hours": 1.5,
                "environment": {"gpu": None},
                "curve": [{"epoch": 1, "loss": 2.5}],
            }
            (tmp_path / f"{stem}.safetensors").write_bytes(content)
            cards.write(card, tmp_path / f"{stem}.safetensors")
    return tmp_path


EARLIER = {"hours": 1.0, "curve": [{"epoch": 30, "loss": 2.0}], "sha256": "0" * 64, "environment": {"gpu": None}}


def change(weights: Path, **changes: object) -> None:
    """Another card, as JSON alone."""
    weights.with_suffix(".json").write_text(json.dumps(cards.read_card(weights) | changes))


def test_shipping_replaces_all_of_a_backbone_and_leaves_the_others(exported, tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    last, early, later = (exported / f"vit_micro{tag}.safetensors" for tag in ("", ".epoch-0002", ".epoch-0008"))
    ship([last, early, exported / "resnet_micro.safetensors"], folder)
    was = cards.read_card(last)
    change(last, recipe=was["recipe"] | {"mixup": 0.2}, before=[{"epoch": 30, "recipe": was["recipe"]} | EARLIER])
    ship([last, early], folder)  # an epoch of the run before
    change(last, **{"before": [], **was})
    last.with_suffix(".md").unlink()  # exported by another version: the text is made anew
    assert ship([last, later], folder) == [folder / last.name, folder / later.name]
    stems = {path.name.removesuffix(path.suffix) for path in folder.iterdir()}
    assert stems == {"vit_micro", "vit_micro.epoch-0008", "resnet_micro"}
    assert len(list(folder.iterdir())) == 9
    assert (folder / last.name).read_bytes() == last.read_bytes()
    assert (folder / "vit_micro.md").read_text() == cards.text(cards.read_card(last))

    monkeypatch.setattr(backbones.loading, "shipped_folder", lambda: folder)
    assert backbones.checkpoints("vit_micro") == ("vit_micro.random", "vit_micro.epoch-0008", "vit_micro")
    assert backbones.card("vit_micro.epoch-0008")["epochs"] == 8
    model = backbones.load("vit_micro.epoch-0008", device="cpu")
    assert torch.equal(model.norm.bias, safetensors.torch.load_file(later)["norm.bias"].float())
    assert backbones.architecture(model) == "vit_micro"
    assert backbones.classifier("vit_micro.epoch-0008", device="cpu").out_features == 7


def test_what_may_not_ship_is_refused_and_nothing_is_written(exported, tmp_path):
    last, early, late = (exported / f"vit_micro{tag}.safetensors" for tag in ("", ".epoch-0002", ".epoch-0008"))
    resnet, resnet_late = (exported / f"resnet_micro{tag}.safetensors" for tag in ("", ".epoch-0008"))

    def refused(message: str, *files: Path) -> None:
        with pytest.raises(ValueError, match=message):
            ship(files, tmp_path / "shipped")
        assert not (tmp_path / "shipped").exists()

    refused("epoch-0008.safetensors without vit_micro.safetensors", late, resnet)
    refused(
        r"8 MB together, not vit_micro.epoch-0008.safetensors 3.3 MB, resnet.* 5.\d MB", last, late, resnet, resnet_late
    )
    change(early, recipe={"size": 64, "epochs": 30, "seed": 1})
    refused("epoch-0002.safetensors began from seed 1, but vit_micro.random", last, early)
    change(early, recipe={"size": 64, "epochs": 20, "seed": 0})
    refused("are of two runs: they differ in recipe", last, early)
    was = cards.read_card(last)
    change(last, before=[{"epoch": 7, "recipe": was["recipe"]} | EARLIER])
    refused(
        "epoch-0008.safetensors is not on the way to vit_micro.safetensors, which left that run at epoch 7", last, late
    )
    change(last, before=[])
    again = [{"epoch": 30, "recipe": cards.read_card(last)["recipe"]}]
    change(early, recipe=cards.read_card(last)["recipe"], before=again)
    refused("epoch-0002.safetensors did not begin with random weights; ship epochs of the first run", last, early)
    change(early, before=[{"epoch": 2, "recipe": {"seed": 1}}])
    refused("epoch-0002.safetensors began from seed 1, but vit_micro.random", last, early)
    change(early, before=[])
    change(early, note=" ")
    refused("no note; say the licence", last, early)
    change(late, epochs=9)
    refused("the epochs of its card, 'epoch-0009', is not that of the file, 'epoch-0008'", last, late)
    change(late, epochs=8, data={"name": "colours", "classes": 9})
    refused("'head.(weight|bias)' of the file does not fit", last, late)
    change(resnet, backbone="test_resnet")
    refused("of 'test_resnet'; those that ship are vit_micro, resnet_micro", resnet)
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    refused("vit_micro.safetensors is not the file of its card: the SHA-256 differs", last)
    last.with_suffix(".json").unlink()
    refused("has no model card vit_micro.json", last)
