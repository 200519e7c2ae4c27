"""Claims about CLIP: a frozen backbone with a head in words, all tried on a small one with random weights."""

import copy
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import nn

import apthory
from apthory import __main__ as command
from apthory import backbones, clip, methods, sites, tasks
from apthory.benchmarks import pixels as pixel_benchmark
from apthory.lab import records
from apthory.studies import cells, pixel_grids, record_format
from apthory.studies import pixels as pixel_study

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed; the extra open-clip brings it")

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
RECIPE = apthory.Recipe(num_epochs=3, num_train=48, num_validation=24, num_test=24, precision="float32")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip says in the root logger that weights are random, which installs a handler there."""
    monkeypatch.setattr(logging.root, "handlers", [logging.NullHandler()])


def make(**options: object) -> clip.CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return clip.load_clip("ViT-B-32", None, device="cpu", **(SMALL | options))


small = cache(make)


def images(task: tasks.Task, num: int = 8) -> torch.Tensor:
    return backbones.normalize(small().image, task.test[torch.arange(num)])


# ------------------------------------------------------------------------------------------ the image tower


def test_the_image_tower_is_a_frozen_backbone_with_clips_data_configuration():
    model = small()
    for module in (model.image, model.model):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
    assert backbones.input_size(model.image) == 32
    assert backbones.architecture(model.image) == "clip:ViT-B-32"
    assert backbones.carried_classifier(model.image) == ""
    mean, std = backbones.mean_std(model.image)
    assert mean.flatten().tolist() == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    assert std.flatten().tolist() == pytest.approx(open_clip.OPENAI_DATASET_STD)
    assert torch.equal(model.image(images(tiny.task())), model.model.encode_image(images(tiny.task())))


def test_every_block_of_the_image_tower_is_a_site_with_a_prefix_to_cache():
    image, x = small().image, images(tiny.task())
    names = [f"transformer.resblocks.{index}:input" for index in range(3)]
    assert sites.list_sites(image) == [":input", *names, "transformer.resblocks.2:output"]
    with torch.no_grad():
        for site in sites.list_sites(image):
            prefix, suffix = sites.split(image, site)
            crossing = prefix(x)
            assert len(crossing) == 1
            assert torch.equal(suffix(*crossing), image(x))
            assert sites.site_shape(image, site) == crossing[0].shape[1:]


def test_a_resnet_of_clip_can_be_cut_too():
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    image = clip.load_clip("RN50", None, device="cpu", **(SMALL | {"vision_cfg": vision})).image
    assert backbones.carried_classifier(image) == ""
    assert sites.list_sites(image)[1:3] == ["layer1.0:input", "layer2.0:input"]
    prefix, suffix = sites.split(image, "layer3.0:input")
    x = images(tiny.task())
    with torch.no_grad():
        assert torch.equal(suffix(*prefix(x)), image(x))


def test_the_image_tower_is_loaded_by_its_name_and_has_its_clip_at_hand():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = backbones.load("clip:ViT-B-32", pretrained=None, device="cpu", mean=(0.1, 0.2, 0.3), **SMALL)
    model = clip.of(tower)
    assert model.image is tower
    assert model.model.visual is tower
    assert not any(module.training for module in model.model.modules())
    assert backbones.digest(tower) == backbones.digest(small().image)
    assert backbones.digest(model.model) == backbones.digest(small().model)
    assert backbones.mean_std(tower)[0].flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert torch.equal(model.text_head(["a", "b"]).features, small().text_head(["a", "b"]).features)


def test_the_text_tower_is_no_part_of_the_image_tower():
    model = small()
    inside = {id(module) for module in model.image.modules()}
    outside = [module for module in model.model.modules() if id(module) not in inside]
    assert any(isinstance(module, nn.Embedding) for module in outside)
    assert backbones.digest(model.image) == backbones.digest(copy.deepcopy(model.image))
    assert set(model.image.state_dict()) == {
        name.removeprefix("visual.") for name in model.model.state_dict() if name.startswith("visual.")
    }


def test_a_copy_of_the_image_tower_has_a_clip_of_its_own_with_the_same_text_tower():
    image = copy.deepcopy(small().image)
    with torch.no_grad():
        image.proj.zero_()
    model = clip.of(image)
    assert model.image is model.model.visual is image
    assert model.model.token_embedding is small().model.token_embedding
    assert not model.model.encode_image(images(tiny.task())).any()
    assert clip.of(small().image).model.visual is small().image
    assert small().image.proj.any()


def test_an_untrained_image_tower_can_be_made_for_its_sites():
    image = backbones.create("clip:ViT-B-32", **SMALL)
    assert all(parameter.requires_grad for parameter in image.parameters())
    assert sites.list_sites(image) == sites.list_sites(small().image)
    with pytest.raises(ValueError, match=r"'clip:ViT-B-32' has no text tower"):
        clip.of(image)


@pytest.mark.parametrize("verb", [backbones.create, backbones.load])
def test_an_image_tower_has_no_classifier(verb: Callable[..., nn.Module]):
    with pytest.raises(ValueError, match=r"num_classes is 10, but 'clip:ViT-B-32' has no classifier, so expected 0"):
        verb("clip:ViT-B-32", num_classes=10)
    with pytest.raises(ValueError, match=r"'clip:ViT-B-32' has no source classifier; clip.of\(backbone\).text_head"):
        backbones.classifier("clip:ViT-B-32")


# ------------------------------------------------------------------------------------------ classes in words


def test_text_features_are_those_of_open_clips_own_zero_shot_classifier():
    model, names = small(), ["red disc", "blue cross", "tissue"]
    expected = open_clip.build_zero_shot_classifier(model.model, model.tokenize, names, [clip.VP_TEMPLATE])
    head = model.text_head(names)
    torch.testing.assert_close(head.features, expected.T)
    torch.testing.assert_close(head.features.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("template", "start"), [(clip.VP_TEMPLATE, "This is a photo of a "), (clip.EVP_TEMPLATE, "this is a photo of a ")]
)
def test_class_names_are_put_in_words_as_the_papers_do(template: str, start: str):
    said: list[str] = []

    def listen(texts: list[str]) -> torch.Tensor:
        said.extend(texts)
        return small().tokenize(texts)

    classes = ["Art_Painting", "t-shirt", "3", "SeaLake", "River"]
    replace(small(), tokenize=listen).text_head(classes, template)
    assert said == [start + name for name in ("art painting", "t shirt", "three", "sea & lake", "river")]
    said.clear()
    replace(small(), tokenize=listen).text_head(classes, template, names={"River": "Brook"})
    assert said == [start + name for name in ("art painting", "t shirt", "3", "sealake", "brook")]


def test_the_logit_scale_is_kept_and_clamped():
    model = make(init_logit_scale=2.0)
    assert model.scale == pytest.approx(7.389, abs=1e-3)
    assert model.text_head(["a", "b"]).scale == model.scale
    hot = make(init_logit_scale=5.0)
    assert hot.scale > 148
    assert hot.text_head(["a", "b"]).scale == 100.0
    assert hot.text_head(["a", "b"], max_scale=200.0).scale == hot.scale


def test_names_that_text_cannot_tell_apart_and_templates_without_a_place_are_errors():
    with pytest.raises(ValueError, match=r"more than one class is called 'This is a photo of a sea lion'.*pass names="):
        small().text_head(["sea_lion", "tiger", "Sea lion"])
    with pytest.raises(ValueError, match=r"'a photo' has no \{\} for the class name; VP's is 'This is a photo of a"):
        small().text_head(["a", "b"], "a photo")


# ------------------------------------------------------------------------------------------ zero-shot, and prompts


def test_zero_shot_accuracy_is_that_of_clips_own_logits_on_the_test_part():
    model, task, recipe = small(), tiny.task(96), replace(RECIPE, num_test=12)
    evaluation = model.zero_shot(task, recipe=recipe)
    test = task.split(3, 48, 24, 12).test
    assert len(test) == 12
    texts = model.tokenize([clip.VP_TEMPLATE.format(name) for name in task.classes])
    with torch.no_grad():
        logits, _ = model.model.get_logits(backbones.normalize(model.image, task.test[test]), texts)
    assert torch.equal(evaluation.correct, logits.argmax(1) == task.test.labels[test])
    assert evaluation.accuracy == pytest.approx(100 * float(evaluation.correct.float().mean()))
    head = model.text_head(task.classes)
    (fit,) = apthory.fit(
        model.image, task, apthory.LinearProbe(), [apthory.Configuration(seed=3)], recipe=recipe, head=head
    )  # a loop that has nothing to train
    assert torch.equal(apthory.evaluate(fit, task).correct, evaluation.correct)
    with pytest.raises(ValueError, match=r"the head has 2 classes, the task 'tiny' 3"):
        model.zero_shot(task, model.text_head(["a", "b"]))


@pytest.mark.parametrize("site", ["transformer.resblocks.0:input", "transformer.resblocks.2:input"])
def test_a_prompt_inside_the_image_tower_learns_and_the_tower_does_not(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, task = small(), tiny.task(96)
    calls: list[int] = []
    encode = model.model.encode_text
    monkeypatch.setattr(model.model, "encode_text", lambda tokens: calls.append(len(tokens)) or encode(tokens))
    head = model.text_head(task.classes)
    before = backbones.digest(model.model)
    method = apthory.ActivationPrompting(site=site, lr_scale=3.0)
    rates = [apthory.Configuration(learning_rate=rate) for rate in (1e-3, 3e-2)]
    fits = apthory.fit(model.image, task, method, rates, recipe=RECIPE, head=head)
    assert backbones.digest(model.model) == before
    assert calls == [3]  # one text for each class, for all configurations and epochs
    assert fits[1].train_curve[-1] < 0.9 * fits[1].train_curve[0]
    assert fits[1].cache_bytes == 72 * 17 * 32 * 4
    x = images(task, 24)
    loaded = apthory.load_prompt(fits[1].save(tmp_path / "prompt.safetensors"), model.image)
    with torch.no_grad():
        own = fits[1].model(x)
        assert torch.equal(loaded(x), own)
        with sites.edited(model.image, {site: fits[1].prompt}):
            cosines = nn.functional.normalize(model.image(x), dim=1) @ head.features.T
    torch.testing.assert_close(own, head.scale * cosines, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_features_and_trains():
    task, results = tiny.task(96), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = clip.load_clip("ViT-B-32", None, device="cuda", **SMALL)
    for towers in (small(), model):
        head = towers.text_head(task.classes)
        x = backbones.normalize(towers.image, task.test[torch.arange(8)])
        results.append((head.features.cpu(), towers.image(x).cpu()))
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(cpu, gpu, rtol=1e-3, atol=1e-3)
    method = apthory.ActivationPrompting(site="transformer.resblocks.1:input")
    fits = apthory.fit(model.image, task, method, recipe=RECIPE, head=model.text_head(task.classes))
    assert fits[0].train_curve[-1] < fits[0].train_curve[0]
    assert model.zero_shot(task, recipe=RECIPE).correct.device.type == "cpu"


def test_a_zero_prompt_at_any_block_leaves_zero_shot_as_it_is():
    model, x = small(), images(tiny.task())
    with torch.no_grad():
        for site in sites.list_sites(model.image):
            prompted = methods.AdaptedBackbone(model.image, apthory.ActivationPrompt.zeros(model.image, site))
            assert torch.equal(prompted(x), model.image(x))


@pytest.mark.parametrize(
    "method",
    [apthory.LinearProbe(), apthory.FineTuning(), apthory.NormTuning(site="transformer.resblocks.1:input")],
)
def test_the_baselines_run_on_the_image_tower(method: object):
    model, task = small(), tiny.task(96)
    head = None if isinstance(method, apthory.LinearProbe) else model.text_head(task.classes)
    before = backbones.digest(model.model)
    (fit,) = apthory.fit(
        model.image, task, method, [apthory.Configuration(learning_rate=1e-2)], recipe=RECIPE, head=head
    )
    assert fit.train_curve[-1] < fit.train_curve[0]
    assert backbones.digest(model.model) == before


# ------------------------------------------------------------------------------------------ weights


def test_a_file_of_weights_gives_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def digest(pretrained: str | None) -> str:
        return backbones.digest(clip.load_clip("ViT-B-32", pretrained, device="cpu", **SMALL).model)

    expected = backbones.digest(small().model)
    torch.save(small().model.state_dict(), tmp_path / "small.pt")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert digest(None) != expected
        assert digest(str(tmp_path / "small.pt")) == expected
        monkeypatch.setenv("APTHORY_WEIGHTS", str(tmp_path))
        assert digest("small.pt") == expected
        tower = backbones.load("clip:ViT-B-32", weights="small.pt", device="cpu", **SMALL)
        assert backbones.digest(clip.of(tower).model) == expected
        with pytest.raises(OSError, match=r"no weight file .*; pass weights=FILE"):
            backbones.load("clip:ViT-B-32", weights="other.pt", **SMALL)
        with pytest.raises(
            OSError, match=r"small.pt' of 'RN50' cannot be had .* pass pretrained=FILE with the weights"
        ):
            clip.load_clip(
                "RN50", "small.pt", device="cpu", **(SMALL | {"vision_cfg": {"layers": [1] * 4, "width": 8}})
            )


def test_a_tag_brings_its_activation_function(monkeypatch: pytest.MonkeyPatch):
    create: Callable[..., nn.Module] = open_clip.create_model
    asked: dict[str, object] = {}

    def downloaded(name: str, pretrained: str, **options: object) -> nn.Module:
        asked.update(options, pretrained=pretrained)
        return create(name, **options)

    monkeypatch.setattr(open_clip, "create_model", downloaded)
    model = clip.load_clip("ViT-B-32", "openai", device="cpu", **SMALL)
    assert asked["pretrained"] == "openai"
    backbones.load("clip:ViT-B-32", device="cpu", input_size=64, **SMALL)
    assert (asked["pretrained"], asked["force_image_size"]) == ("openai", 64)
    assert any(isinstance(module, open_clip.transformer.QuickGELU) for module in model.image.modules())
    model = clip.load_clip("ViT-B-32", "laion2b_s34b_b79k", device="cpu", **SMALL)
    assert not any(isinstance(module, open_clip.transformer.QuickGELU) for module in model.image.modules())


def test_weights_out_of_reach_say_the_ways_out(monkeypatch: pytest.MonkeyPatch):
    def offline(*args: object, **options: object) -> None:
        raise RuntimeError("no route to the hub")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(
        OSError, match=r"'openai' of 'ViT-B-32' cannot be had .*no route.*pretrained=FILE.*=None for rand"
    ):
        clip.load_clip()


def test_a_tag_is_read_from_its_file_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = {name: value.contiguous() for name, value in small().model.state_dict().items()}
    save_file(state, tmp_path / "ViT-B-32.openai.safetensors")
    monkeypatch.setenv("APTHORY_WEIGHTS", str(tmp_path))
    model = clip.load_clip("ViT-B-32", "openai", device="cpu", **SMALL)
    assert backbones.digest(model.model) == backbones.digest(small().model)
    assert any(isinstance(module, open_clip.transformer.QuickGELU) for module in model.image.modules())
    mean, std = backbones.mean_std(model.image)
    assert mean.flatten().tolist() == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    assert std.flatten().tolist() == pytest.approx(open_clip.OPENAI_DATASET_STD)


def test_unknown_names_and_tags_list_what_there_is():
    with pytest.raises(ValueError, match=r"open_clip has no 'ViT-B-23'; it has .*ViT-B-32"):
        clip.load_clip("ViT-B-23")
    with pytest.raises(ValueError, match=r"'opanai' is neither a file nor weights that open_clip has .*: openai, "):
        clip.load_clip("ViT-B-32", "opanai")


def test_an_image_tower_that_returns_more_than_its_feature_is_an_error():
    with pytest.raises(ValueError, match=r"'ViT-B-32' returns tokens beside its feature; take one without a captioner"):
        make(vision_cfg=SMALL["vision_cfg"] | {"output_tokens": True})


def test_without_open_clip_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"^open_clip is not installed; .*'apthory\[open-clip\]'$"):
        clip.load_clip()


# ------------------------------------------------------------------------------------------ the study

STUDY_RECIPE = apthory.Recipe(
    num_epochs=2, batch_size=16, num_train=27, num_validation=9, num_test=12, precision="float32"
)


@pytest.fixture
def spec(tmp_path: Path) -> dict:
    """A backbone of a study's configuration: the small CLIP, in a file of weights."""
    torch.save(small().model.state_dict(), tmp_path / "small.pt")
    fields = {"pretrained": str(tmp_path / "small.pt"), "input_size": 32, "device": "cpu"}
    return {"name": "clip:ViT-B-32", **fields, **SMALL}


def test_the_study_runs_end_to_end(spec: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the command, through records, to the tables that the notebook reads; then again, without computing."""
    protocol = cells.Protocol(recipe=STUDY_RECIPE, learning_rates=(2e-2,), seeds=(0, 1))
    study = pixel_grids._clip(
        backbones=(spec,),
        tasks=("textures",),
        protocol=protocol,
        places={spec["name"]: ("transformer.resblocks.1:input",)},
    )
    monkeypatch.setitem(pixel_grids.PIXEL_STUDIES["small"], "clip", study)
    monkeypatch.setenv("APTHORY_ROOT", str(tmp_path))
    folder, texts = records.folder("small"), []
    assert pixel_study.recorded(study, folder) is None
    encode = clip.CLIP.text_features
    monkeypatch.setattr(
        clip.CLIP, "text_features", lambda self, classes: texts.append(classes) or encode(self, classes)
    )
    command.sweep("clip", "small", "", "", 1)
    assert len(texts) == 1  # the text tower ran once for all cells
    assert all(text.startswith("This is a photo of a ") for text in texts[0])

    table = pixel_study.recorded(study, folder)
    assert set(zip(table["arm"], table["head"], table["site"], strict=True)) == {
        ("zero-shot", "text", ":output"),
        ("vp", "text", ":input"),
        ("evp", "text", ":input"),
        ("ap", "text", "transformer.resblocks.1:input"),
        ("linear_probe", "linear", ":output"),
    }
    assert table[table["arm"] == "ap"]["depth"].tolist() == [0.5, 0.5]  # the second of sites 0 to 4: image, three, end
    task = tasks.load("textures", 32)
    expected = small().zero_shot(task, recipe=STUDY_RECIPE).correct.numpy()
    for correct in table[table["arm"] == "zero-shot"]["correct"]:
        assert (correct == expected).all()
    head = small().text_head(task.classes)
    method = apthory.ActivationPrompting(site="transformer.resblocks.1:input")
    configurations = [apthory.Configuration(learning_rate=2e-2, seed=0)]
    fits = apthory.fit(small().image, task, method, configurations, recipe=STUDY_RECIPE, head=head)
    (own,) = apthory.evaluate(fits, task)
    first = table[(table["arm"] == "ap") & (table["seed"] == 0)]["correct"].iloc[0]
    assert (first == own.correct.numpy()).all()
    kept = records.load_all(folder)
    assert {record.weights for record in kept} == {backbones.digest(small().model)}  # the text tower's too
    command.sweep("clip", "small", "", "", 1)
    assert {record.key for record in records.load_all(folder)} == {record.key for record in kept}


def test_records_of_an_image_tower_name_the_weights_of_its_whole_clip(spec: dict, tmp_path: Path):
    """The digest is a part of keys, so it stays that of the model as open_clip makes it, text tower included."""
    whole = open_clip.create_model("ViT-B-32", pretrained=spec["pretrained"], force_image_size=32, **SMALL)
    tower = record_format.backbone_of(spec)
    assert record_format.weights_digest(tower) == backbones.digest(whole) != backbones.digest(tower)
    nn.init.zeros_(whole.token_embedding.weight)
    torch.save(whole.state_dict(), tmp_path / "other.pt")
    other = record_format.backbone_of(spec | {"pretrained": str(tmp_path / "other.pt")})
    assert backbones.digest(other) == backbones.digest(tower)
    assert record_format.weights_digest(other) == backbones.digest(whole) != record_format.weights_digest(tower)


def test_records_of_other_backbones_name_their_own_weights():
    model = tiny.backbone("vit")
    assert backbones.whole(model) is model
    assert record_format.weights_digest(model) == backbones.digest(model)


def test_without_weights_the_sweep_says_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(*args: object, **options: object) -> None:
        raise RuntimeError("no route to the hub")

    monkeypatch.setattr(open_clip, "create_model", offline)
    monkeypatch.setenv("APTHORY_ROOT", str(tmp_path))
    monkeypatch.setenv("APTHORY_WEIGHTS", str(tmp_path))
    where = "huggingface.co/timm/vit_base_patch32_clip_224.openai as ViT-B-32.openai.safetensors to the folder that"
    with pytest.raises(OSError, match=f"download its open_clip_model.safetensors from https://{where}"):
        command.sweep("clip", "small", "", "", 1)


def test_classes_of_the_studys_tasks_can_be_put_in_words(monkeypatch: pytest.MonkeyPatch):
    """Where the images are, as two classes of one name or numbers for names would be seen by training alone."""
    names = pixel_grids.PIXEL_STUDIES["small"]["clip"]["methods"].tasks
    for name in sorted({*names} - {"cifar10"}):  # its ten are well known, and its many images take long to read
        try:
            classes = tasks.load(name, 32).classes
        except (ValueError, OSError) as error:
            pytest.skip(str(error))
        assert not any(clip.EVP_NAMES.get(label, label).isdigit() for label in classes), name
        assert len({clip.readable(clip.EVP_NAMES.get(label, label)) for label in classes}) == len(classes), name


def test_a_head_in_words_wants_clip():
    with pytest.raises(
        ValueError, match=r"'vit_micro' has no text tower; a text head wants CLIP, such as clip:ViT-B-32"
    ):
        record_format.head_of({"template": clip.VP_TEMPLATE}, {"name": "vit_micro"}, ["a", "b"])


@pytest.mark.parametrize("classes", ["cat", []])
def test_names_that_are_no_list_are_an_error(classes):
    with pytest.raises(ValueError, match="expected a list of class names"):
        small().text_head(classes)


def test_text_features_are_timed_beside_a_run(tmp_path):
    recipe = {
        "num_epochs": 2,
        "batch_size": 8,
        "num_train": 16,
        "num_validation": 8,
        "num_test": 8,
        "precision": "float32",
    }
    config = {"backbone": {"name": "clip:ViT-B-32", "pretrained": None, "device": "cpu", **SMALL}, "recipe": recipe}
    record = records.fetch(pixel_benchmark.race_words, config, folder=tmp_path)
    (words,), (run,) = record["seconds"].values()
    assert list(record["seconds"]) == ["text features", "run, text head"]
    assert min(words, run) > 0
