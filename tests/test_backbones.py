"""Claims about backbones: frozen, normalized as they were trained, exactly the weights that were asked for."""

import os
from pathlib import Path

import pytest
import timm
import tiny
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import apthory
from apthory import backbones, tasks

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}


def small(num_classes: int = 0) -> nn.Module:
    return backbones.create("vit_micro", num_classes, **SMALL)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    save_file(small().state_dict(), path)
    return path


@pytest.mark.parametrize("name", backbones.SHIPPED)
def test_shipped_backbones_are_frozen_and_give_pooled_features(name: str):
    model = backbones.load(name, device="cpu")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert backbones.input_size(model) == 64
    assert backbones.architecture(model) == name
    features = model(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, {"vit_micro": 128, "resnet_micro": 256}[name])
    assert features.dtype == torch.float32
    assert features.std() > 0.01


@pytest.mark.parametrize("name", backbones.SHIPPED)
def test_shipped_weights_are_those_of_the_file(name: str):
    model, state = (
        backbones.load(name, device="cpu"),
        load_file(Path(backbones.__file__).parent / "weights" / f"{name}.safetensors"),
    )
    own = model.state_dict()
    for key, value in own.items():
        if key in state:
            assert torch.equal(value, state[key].to(value.dtype)), key
        else:
            assert key.endswith("num_batches_tracked")
    assert {key.split(".")[0] for key in state if key not in own} <= {"head", "fc"}


@pytest.mark.parametrize("name", backbones.SHIPPED)
def test_loading_twice_gives_the_same_network(name: str):
    first, second = (backbones.load(name, device="cpu") for _ in range(2))
    assert backbones.digest(first) == backbones.digest(second)


@pytest.mark.parametrize("name", backbones.SHIPPED)
def test_the_random_twin_is_the_start_of_training_and_the_same_in_every_process(name: str):
    twin, again = (backbones.load(f"{name}.random", device="cpu") for _ in range(2))
    classes = backbones.classifier(name, device="cpu").out_features
    start = backbones.start(name, classes).state_dict()
    assert all(torch.equal(value, start[key]) for key, value in twin.state_dict().items())
    assert backbones.digest(twin) == backbones.digest(again) != backbones.digest(backbones.load(name, device="cpu"))
    assert not any(p.requires_grad for p in twin.parameters())
    assert backbones.architecture(twin) == name
    whole = backbones.load(f"{name}.random", num_classes=classes, device="cpu")
    assert torch.equal(whole.get_classifier().weight, backbones.classifier(f"{name}.random", device="cpu").weight)
    other = backbones.start(name, classes, seed=1).state_dict()
    assert not torch.equal(next(iter(other.values())), next(iter(start.values())))


@pytest.mark.parametrize("name", backbones.SHIPPED)
def test_checkpoints_go_from_random_weights_to_the_last_and_can_be_loaded(name: str):
    first, *_, last = backbones.checkpoints(name)
    assert (first, last) == (f"{name}.random", name)
    digests = {backbones.digest(backbones.load(checkpoint, device="cpu")) for checkpoint in backbones.checkpoints(name)}
    assert len(digests) == len(backbones.checkpoints(name))
    assert backbones.card(name)["data"]["classes"] == backbones.classifier(name, device="cpu").out_features


def test_weights_that_do_not_ship_name_those_that_do():
    for verb in (backbones.load, backbones.classifier, backbones.card):
        with pytest.raises(
            ValueError,
            match=r"no file of 'vit_micro.best' ships .* are vit_micro.*, resnet_micro \(and vit_micro.random, ",
        ):
            verb("vit_micro.best")
    with pytest.raises(ValueError, match=r"no backbone 'vit_mini.random'"):
        backbones.load("vit_mini.random")


def test_the_micro_backbones_have_the_shape_that_was_promised():
    vit, resnet = (backbones.create(name, 10) for name in backbones.SHIPPED)
    assert (len(vit.blocks), vit.embed_dim, vit.blocks[0].attn.num_heads, vit.patch_embed.patch_size) == (
        8,
        128,
        4,
        (8, 8),
    )
    stages = [resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4]
    assert [len(stage) for stage in stages] == [2, 2, 2, 2]
    assert [stage[-1].bn2.num_features for stage in stages] == [32, 64, 128, 256]
    for model in (vit, resnet):
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)
        assert all(p.requires_grad for p in model.parameters())


def test_without_pretraining_the_weights_are_random():
    first, second = (backbones.load("vit_micro", pretrained=False, device="cpu") for _ in range(2))
    assert backbones.digest(first) != backbones.digest(second)
    assert not any(p.requires_grad for p in first.parameters())


def test_any_timm_name_loads_without_its_weights():
    model = backbones.load("mobilenetv2_050", pretrained=False, pad_type="same", device="cpu")
    assert backbones.input_size(model) == 224
    assert backbones.architecture(model) == "mobilenetv2_050"
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1280)


@pytest.mark.parametrize("pretrained", [True, False])
def test_an_unknown_name_lists_those_near(pretrained: bool):
    with pytest.raises(
        ValueError, match=r"no backbone 'resnet_tiny'; shipped are vit_micro, resnet_micro.*such as .*resnet"
    ):
        backbones.load("resnet_tiny", pretrained=pretrained)
    with pytest.raises(ValueError, match=r"no backbone 'qqq'; .* timm.list_models\(\) lists them"):
        backbones.load("qqq", pretrained=pretrained)


def test_pretrained_weights_out_of_reach_say_the_ways_out(monkeypatch: pytest.MonkeyPatch):
    def offline(*args: object, **options: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        OSError, match=r"'mobilenetv2_050' cannot be had \(ConnectionError: no route.*weights=FILE.*pretrained=False"
    ):
        backbones.load("mobilenetv2_050")


def test_weights_of_timm_are_no_argument():
    with pytest.raises(ValueError, match=r"pretrained is 'a1_in1k', expected True or False for 'resnet10t'"):
        backbones.load("resnet10t", pretrained="a1_in1k")


# ---------------------------------------------------------------------------------------------- weight files


def test_a_weight_file_gives_its_weights(weights: Path):
    model = backbones.load("vit_micro", weights=weights, device="cpu", **SMALL)
    state = load_file(weights)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_weight_file_is_found_in_the_folder_of_the_environment(weights: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("APTHORY_WEIGHTS", str(weights.parent))
    model = backbones.load("vit_micro", weights=weights.name, device="cpu", **SMALL)
    assert torch.equal(model.norm.bias, load_file(weights)["norm.bias"])
    with pytest.raises(OSError, match=rf"no weight file {weights.parent}/other.safetensors; pass weights=FILE"):
        backbones.load("vit_micro", weights="other.safetensors", **SMALL)
    monkeypatch.delenv("APTHORY_WEIGHTS")
    with pytest.raises(OSError, match=r"no weight file .*set APTHORY_WEIGHTS to its folder"):
        backbones.load("vit_micro", weights="other.safetensors", **SMALL)


def test_half_precision_is_widened(weights: Path, tmp_path: Path):
    half = {key: value.half() for key, value in load_file(weights).items()}
    save_file(half, tmp_path / "half.safetensors")
    model = backbones.load("vit_micro", weights=tmp_path / "half.safetensors", device="cpu", **SMALL)
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, half[key].float())


def test_a_classifier_in_the_file_is_dropped_or_kept_as_asked(tmp_path: Path):
    model = small(7)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    headless = backbones.load("vit_micro", weights=tmp_path / "w.safetensors", device="cpu", **SMALL)
    assert headless(torch.randn(1, 3, 32, 32)).shape == (1, 32)
    whole = backbones.load("vit_micro", weights=tmp_path / "w.safetensors", num_classes=7, device="cpu", **SMALL)
    assert torch.equal(whole.head.weight, model.head.weight)
    with pytest.raises(ValueError, match=r"'head.(weight|bias)' of the file does not fit \(2 misfits, 0 missing\)"):
        backbones.load("vit_micro", weights=tmp_path / "w.safetensors", num_classes=5, **SMALL)


def test_weights_of_another_architecture_are_refused(weights: Path):
    with pytest.raises(
        ValueError, match=r"small.safetensors does not hold the weights of 'resnet_micro': .* of the file does not fit"
    ):
        backbones.load("resnet_micro", weights=weights)
    with pytest.raises(ValueError, match=r"'blocks.2.norm1.weight' is missing from the file \(0 misfits, 12 missing\)"):
        backbones.load("vit_micro", weights=weights, **(SMALL | {"depth": 3}))


# ---------------------------------------------------------------------------------------------- source classifiers

MOBILENET = "mobilenetv2_100.imagenet1k_dequant_fp16.safetensors"


def agrees(name: str, num_classes: int, size: int, **spec: object) -> None:
    """The source classifier on the backbone's features gives what the whole network gives."""
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    layer = backbones.classifier(name, device="cpu", **spec)
    assert not any(p.requires_grad for p in layer.parameters())
    whole = backbones.load(name, num_classes=num_classes, device="cpu", **spec)
    with torch.no_grad():
        logits = layer(backbones.load(name, device="cpu", **spec)(x))
        assert logits.shape == (2, num_classes)
        assert logits.std() > 0
        torch.testing.assert_close(logits, whole(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", backbones.SHIPPED)
def test_shipped_backbones_have_their_source_classifier(name: str):
    before = backbones.digest(backbones.load(name, device="cpu"))
    agrees(name, backbones.card(name)["data"]["classes"], 64)
    assert backbones.digest(backbones.load(name, device="cpu")) == before


@pytest.mark.skipif("APTHORY_WEIGHTS" not in os.environ, reason="APTHORY_WEIGHTS does not name the folder of weights")
def test_the_supplied_mobilenet_has_its_thousand_classes():
    about_images = {"input_size": 64, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    agrees("mobilenetv2_100", 1000, 64, weights=MOBILENET, pad_type="same", **about_images)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}),
        ("resnet10t", {}),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}),
        ("resnetv2_50", {"layers": (1, 1, 1, 1)}),  # its classifier is a convolution
        ("mobilenetv3_small_050", {}),  # pooled before a hidden layer
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (1, 1), "num_heads": (3, 6)}),
    ],
)
def test_the_source_classifier_of_a_weight_file_gives_the_whole_networks_logits(
    name: str, options: dict[str, object], tmp_path: Path
):
    model = backbones.create(name, 7, **options).requires_grad_(False)
    model.get_classifier().bias.normal_(generator=torch.Generator().manual_seed(1))
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    agrees(name, 7, options.get("img_size", 64), weights=tmp_path / "whole.safetensors", **options)


def test_the_source_classifier_of_a_timm_name_is_timms(monkeypatch: pytest.MonkeyPatch):
    create = timm.create_model

    def pretrained_from_a_seed(name: str, pretrained: bool, **options: object) -> nn.Module:
        assert pretrained
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model = create(name, pretrained=False, **(options | {"num_classes": 1000}))
        return model if options["num_classes"] else model.reset_classifier(0) or model

    monkeypatch.setattr(timm, "create_model", pretrained_from_a_seed)
    agrees("resnet10t", 1000, 64)


def test_a_source_classifier_that_there_is_not_is_an_error(weights: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"small.safetensors has no 'head.weight', so it holds no source classifier"):
        backbones.classifier("vit_micro", weights=weights, **SMALL)
    with pytest.raises(ValueError, match=r"no backbone 'resnet_tiny'; shipped are vit_micro"):
        backbones.classifier("resnet_tiny")
    with pytest.raises(OSError, match=r"no weight file .*other.safetensors"):
        backbones.classifier("vit_micro", weights="other.safetensors")
    options = {"img_size": 32, "depth": 1}
    two_heads = backbones.create("deit_tiny_distilled_patch16_224", 7, **options)
    save_file(two_heads.state_dict(), tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"'deit_tiny_distilled_patch16_224' is no linear layer on the pooled"):
        backbones.classifier("deit_tiny_distilled_patch16_224", weights=tmp_path / "two.safetensors", **options)
    backbones.load("deit_tiny_distilled_patch16_224", weights=tmp_path / "two.safetensors", device="cpu", **options)


# ---------------------------------------------------------------------------------------------- data configuration


def test_mean_and_standard_deviation_come_from_the_model_and_can_be_given(weights: Path):
    model = backbones.load("vit_micro", device="cpu")
    mean, std = backbones.mean_std(model)
    assert mean.shape == std.shape == (3, 1, 1)
    torch.testing.assert_close(mean.flatten(), torch.tensor([0.480, 0.448, 0.397]))
    torch.testing.assert_close(std.flatten(), torch.tensor([0.277, 0.269, 0.282]))
    spec = {"weights": weights, "input_size": 32, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "device": "cpu"}
    other = backbones.load("vit_micro", **spec, **SMALL)
    mean, std = backbones.mean_std(other)
    torch.testing.assert_close(mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(std.flatten(), torch.tensor([0.5, 0.6, 0.7]))
    assert backbones.input_size(other) == 32
    assert backbones.input_size(model) == 64  # what is given to one model stays with it


def test_the_statistics_of_timm_models_are_their_own():
    model = backbones.create("mobilenetv2_050")
    config = timm.data.resolve_model_data_config(model)
    assert backbones.mean_std(model)[0].flatten().tolist() == pytest.approx(config["mean"])
    assert backbones.input_size(model) == config["input_size"][-1]


# ---------------------------------------------------------------------------------------------- digests and layout


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_a_digest_changes_with_one_weight_or_buffer(family: str):
    model = tiny.backbone.__wrapped__(family)
    before = backbones.digest(model)
    assert before == backbones.digest(tiny.backbone(family))
    changed = {before}
    for name in ("norm.bias", "blocks.1.attn.qkv.weight") if family == "vit" else ("bn1.running_var", "conv1.weight"):
        value = model.state_dict()[name]
        last = (-1,) * value.ndim
        old = value[last].clone()
        value[last] += 1e-6
        changed.add(backbones.digest(model))
        value[last] = old
    assert backbones.digest(model) == before
    assert len(changed) == 3


def test_a_digest_is_that_of_the_network_not_of_its_layout():
    model = tiny.backbone.__wrapped__("resnet")
    before = backbones.digest(model)
    assert backbones.is_channels_last(model)
    model.to(memory_format=torch.contiguous_format)
    assert not backbones.is_channels_last(model)
    assert backbones.digest(model) == before


def test_convolutional_backbones_lie_channels_last_and_transformers_do_not():
    layout = {family: backbones.is_channels_last(tiny.backbone(family)) for family in tiny.FAMILIES}
    assert layout == {
        "vit": False,
        "deit": False,
        "swin": False,
        "convnext": True,
        "resnet": True,
        "mobilenetv2": True,
    }


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_freezing_changes_no_result(family: str):
    model = tiny.backbone.__wrapped__(family).to(memory_format=torch.contiguous_format).requires_grad_(True)
    x = tiny.images(family, 2).contiguous()
    with torch.no_grad():
        before = model(x)
        after = backbones.freeze(model)(x)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", backbones.SHIPPED)
@pytest.mark.parametrize("task", tasks.EMBEDDED)
def test_a_linear_probe_is_neither_hopeless_nor_perfect_on_embedded_tasks(task: str, name: str):
    """The tasks leave room on both sides for what a prompt does."""
    backbone = backbones.load(name, device="cpu")
    data = apthory.load_task(task, backbones.input_size(backbone))
    recipe = apthory.Recipe(num_train=400, num_validation=100, num_test=500)
    configurations = [apthory.Configuration(learning_rate=rate) for rate in (4e-3, 1.6e-2, 6.4e-2)]
    fits = apthory.fit(backbone, data, apthory.LinearProbe(), configurations, recipe=recipe)
    accuracy = max(evaluation.accuracy for evaluation in apthory.evaluate(fits, data))
    assert 40 <= accuracy <= 90


@pytest.mark.parametrize("given", [{"pretrained": False}, {"weights": "other.safetensors"}])
def test_a_name_of_a_checkpoint_takes_no_other_weights(given):
    with pytest.raises(ValueError, match=r"'vit_micro.random' names weights by itself; give it alone, or 'vit_micro'"):
        backbones.load("vit_micro.random", **given)


def test_random_weights_have_no_card():
    with pytest.raises(ValueError, match=r"no file of 'vit_micro.random' ships with the package; there are vit_micro"):
        backbones.card("vit_micro.random")


def test_an_input_size_that_a_vit_is_not_laid_out_for_is_an_error():
    with pytest.raises(ValueError, match=r"laid out for 224 pixels, not 64; pass img_size=64"):
        backbones.load("vit_tiny_patch16_224", pretrained=False, input_size=64)
    assert backbones.input_size(backbones.load("vit_tiny_patch16_224", pretrained=False, img_size=64)) == 64


# ---------------------------------------------------------------------------------------------- classifiers left on


VIT_OF_TORCHVISION = {
    "image_size": 16,
    "patch_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 16,
    "mlp_dim": 16,
}


def of_torchvision(name: str, **options: object) -> nn.Module:
    size = options.get("image_size", 32)
    model = getattr(torchvision.models, name)(**options)
    model.pretrained_cfg = {"architecture": name, "input_size": (3, size, size)}
    return model


@pytest.mark.parametrize(
    ("name", "options", "layer"),
    [
        ("resnet18", {}, "fc"),
        ("VisionTransformer", VIT_OF_TORCHVISION, "heads.head"),
        ("mobilenet_v3_small", {}, "classifier.3"),
        ("densenet121", {}, "classifier"),
        ("swin_t", {}, "head"),
    ],
)
def test_the_classifier_that_a_model_of_torchvision_carries_is_named(name: str, options: dict[str, int], layer: str):
    model = of_torchvision(name, **options)
    before, modes = backbones.digest(model), [module.training for module in model.modules()]
    assert backbones.carried_classifier(model) == layer
    assert backbones.digest(model) == before  # nor do statistics of batch norms change
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    wrapped = nn.Sequential(model, nn.Identity())
    wrapped.pretrained_cfg = model.pretrained_cfg
    assert backbones.carried_classifier(wrapped) == f"0.{layer}"


def test_a_model_of_torchvision_without_its_classifier_carries_none():
    resnet, mobilenet = of_torchvision("resnet18"), of_torchvision("mobilenet_v3_small")
    resnet.fc = nn.Identity()
    assert backbones.carried_classifier(resnet) == ""
    mobilenet.classifier = mobilenet.classifier[:-1]  # features that end in a layer with an activation, in place
    assert backbones.carried_classifier(mobilenet) == ""


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("test_vit", "head"),
        ("test_resnet", "fc"),
        ("test_convnext", "head.fc"),
        ("deit_tiny_distilled_patch16_224", "head"),
        ("vit_tiny_patch16_224", "head"),
    ],
)
def test_the_classifier_of_a_timm_model_is_named_if_it_has_classes(name: str, layer: str):
    assert backbones.carried_classifier(timm.create_model(name, num_classes=10)) == layer
    assert backbones.carried_classifier(timm.create_model(name, num_classes=0)) == ""
    model = timm.create_model(name, num_classes=10)
    model.reset_classifier(0)
    assert backbones.carried_classifier(model) == ""


def test_a_linear_projection_by_design_is_no_classifier():
    size = {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2}
    name = "vit_base_patch32_clip_224"
    assert timm.create_model(f"{name}.openai", **size).num_classes == 512
    assert backbones.carried_classifier(timm.create_model(f"{name}.openai", **size)) == ""
    assert backbones.carried_classifier(timm.create_model(f"{name}.openai", num_classes=10, **size)) == "head"
    assert backbones.carried_classifier(timm.create_model(f"{name}.openai_ft_in1k", **size)) == "head"
    own = nn.Sequential()
    own.add_module("flat", nn.Flatten())
    own.add_module("projection", nn.Linear(3 * 8 * 8, 4))
    own.pretrained_cfg = {"input_size": (3, 8, 8)}
    assert backbones.carried_classifier(own) == ""


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_backbones_that_give_features_carry_no_classifier(family: str):
    assert backbones.carried_classifier(tiny.backbone(family)) == ""


@pytest.mark.parametrize("name", [*backbones.SHIPPED, "vit_micro.random", "mobilenetv2_100"])
def test_backbones_that_are_loaded_carry_no_classifier(name: str):
    model = backbones.load(name, pretrained="micro" in name, device="cpu")
    assert backbones.carried_classifier(model) == ""


@pytest.mark.parametrize("verb", [backbones.input_size, backbones.mean_std])
def test_a_module_that_does_not_say_what_images_it_takes_is_an_error(verb):
    with pytest.raises(ValueError, match=r"Linear does not say what images it takes; set its attribute pretrained_cfg"):
        verb(torch.nn.Linear(2, 2))
