"""Claims about prompts: zero is the identity, after a norm they are a shift, a file holds a prompt and nothing else."""

import inspect
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from apthory import backbones, methods, sites
from apthory.methods import ActivationPrompt, AdaptedBackbone, files

KINDS = ("full", "channel")


def random_prompt(backbone: nn.Module, site: str, shape: methods.Shape = "full", seed: int = 0) -> ActivationPrompt:
    prompt = ActivationPrompt.zeros(backbone, site, shape)
    with torch.no_grad():
        prompt.delta.normal_(generator=torch.Generator().manual_seed(seed))
    return prompt


@torch.no_grad()
@pytest.mark.parametrize("shape", KINDS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_zero_prompt_is_the_identity_bit_for_bit(family: str, shape: methods.Shape):
    backbone, x = tiny.backbone(family), tiny.images(family, 3)
    for site in (":input", sites.list_sites(backbone)[2], sites.list_sites(backbone, "norm")[2]):
        prompt = ActivationPrompt.zeros(backbone, site, shape)
        assert torch.equal(AdaptedBackbone(backbone, prompt)(x), backbone(x))
        prompt.delta.normal_()  # and what is not zero is seen
        assert not torch.equal(AdaptedBackbone(backbone, prompt)(x), backbone(x))


@torch.no_grad()
@pytest.mark.parametrize(("family", "site"), [("resnet", "layer2.0.bn1"), ("vit", "blocks.1.norm1"), ("vit", "norm")])
def test_a_channel_prompt_after_a_norm_is_a_shift_of_its_bias_exactly(family: str, site: str):
    """The output of an evaluated norm layer is an affine map's, so the prompt and beta add up."""
    backbone = tiny.backbone.__wrapped__(family, torch.float64)
    x = tiny.images(family, 3, dtype=torch.float64)
    prompt = random_prompt(backbone, site, "channel").double()
    prompted = AdaptedBackbone(backbone, prompt)(x)
    plain = backbone(x)
    backbone.get_submodule(site).bias += prompt.delta.flatten()
    torch.testing.assert_close(backbone(x), prompted, rtol=1e-12, atol=1e-12)
    assert (plain - prompted).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_prompt_at_the_input_is_added_to_the_image(family: str):
    backbone, x = tiny.backbone(family), tiny.images(family, 3)
    prompt = random_prompt(backbone, ":input")
    assert prompt.delta.shape == x.shape[1:]
    assert torch.equal(AdaptedBackbone(backbone, prompt)(x), backbone(x + prompt.delta))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "site", "full", "channel"),
    [
        ("vit", "blocks.1", (17, 32), (1, 32)),
        ("swin", "layers.0.blocks.1:input", (14, 14, 24), (1, 1, 24)),
        ("convnext", "stages.1.blocks.1:input", (16, 4, 4), (16, 1, 1)),
        ("resnet", "layer2.0:input", (8, 8, 8), (8, 1, 1)),
        ("resnet", "layer4.0:output", (32, 1, 1), (32, 1, 1)),
        ("mobilenetv2", ":input", (3, 32, 32), (3, 1, 1)),
    ],
)
def test_a_full_prompt_has_a_value_for_each_unit_and_a_channel_prompt_for_each_channel(
    family: str, site: str, full: tuple[int, ...], channel: tuple[int, ...]
):
    backbone = tiny.backbone(family)
    assert methods.prompt_shape(backbone, site) == ActivationPrompt.zeros(backbone, site).delta.shape == full
    assert methods.prompt_shape(backbone, site, "channel") == channel


def test_an_alias_becomes_the_canonical_site():
    assert ActivationPrompt.zeros(tiny.backbone("vit"), "blocks.0").site == "blocks.1:input"


def test_a_prompt_borrows_the_backbone_and_returns_it():
    backbone, x = tiny.backbone("vit"), tiny.images("vit", 2)
    before = backbones.digest(backbone)
    with torch.no_grad():
        plain = backbone(x)
        AdaptedBackbone(backbone, random_prompt(backbone, "blocks.1:input"))(x)
        assert torch.equal(backbone(x), plain)
    assert backbones.digest(backbone) == before


def test_only_the_prompt_learns():
    backbone, x = tiny.backbone("vit"), tiny.images("vit", 2)
    prompted = AdaptedBackbone(backbone, ActivationPrompt.zeros(backbone, "blocks.1:input"))
    prompted(x).sum().backward()
    assert prompted.prompt.delta.grad.abs().sum() > 0
    assert [name for name, p in prompted.named_parameters() if p.grad is not None] == ["edits.0.delta"]


def test_gradients_of_a_prompt_are_right():
    backbone = tiny.backbone("vit", torch.float64)
    x = tiny.images("vit", 2, dtype=torch.float64)
    prompt = ActivationPrompt.zeros(backbone, "blocks.2:input", "channel").double()

    def features(delta: torch.Tensor) -> torch.Tensor:
        with sites.edited(backbone, {prompt.site: lambda z: z + delta}):
            return backbone(x)

    delta = prompt.delta.detach().normal_().requires_grad_()
    assert torch.autograd.gradcheck(features, delta)


def test_the_relative_norm_is_measured_in_activations():
    z = torch.full((4, 6, 10), 2.0)
    full = ActivationPrompt("x:input", torch.full((6, 10), 0.5))
    channel = ActivationPrompt("x:input", torch.full((1, 10), 0.5), "channel")
    assert full.relative_norm(z) == pytest.approx(0.25)
    assert channel.relative_norm(z) == pytest.approx(0.25)


def test_a_prompt_of_the_wrong_shape_says_which_is_right():
    backbone, x = tiny.backbone("vit"), tiny.images("vit", 2)
    wrong = ActivationPrompt("blocks.1:input", torch.zeros(16, 32))
    with pytest.raises(
        ValueError, match=r"shape \(16, 32\) does not fit the activation \(17, 32\) at 'blocks.1:input'"
    ):
        AdaptedBackbone(backbone, wrong)(x)
    taller = ActivationPrompt("norm:output", torch.zeros(2, 17, 32))  # it would broadcast over the batch
    with pytest.raises(ValueError, match=r"\(2, 17, 32\) does not fit"):
        AdaptedBackbone(backbone, taller)(x)
    with pytest.raises(ValueError, match="prompt shape 'row' is not one of full, channel"):
        inspect.unwrap(methods.prompt_shape)(backbone, "blocks.1:input", "row")  # without the type check of the tests


# ---------------------------------------------------------------------------------------------- files


@torch.no_grad()
@pytest.mark.parametrize("shape", KINDS)
@pytest.mark.parametrize("family", ["vit", "resnet", "swin"])
def test_saving_and_loading_changes_no_logit(family: str, shape: methods.Shape, tmp_path: Path):
    backbone, x = tiny.backbone(family), tiny.images(family, 3)
    prompt = random_prompt(backbone, sites.list_sites(backbone)[2], shape)
    for linear in (None, nn.Linear(backbone(x).shape[1], 5)):
        path = files.save_prompt(tmp_path / "prompt.safetensors", prompt, backbone, linear)
        loaded = files.load_prompt(path, backbone)
        assert torch.equal(loaded(x), AdaptedBackbone(backbone, prompt, linear)(x))
        assert (loaded.prompt.site, loaded.prompt.shape) == (prompt.site, prompt.shape)
        assert not any(p.requires_grad for p in loaded.parameters())


def test_a_file_is_kilobytes_and_holds_no_weight_of_the_backbone(tmp_path: Path):
    backbone = backbones.load("vit_micro", device="cpu")
    prompt = ActivationPrompt.zeros(backbone, "blocks.3")
    path = files.save_prompt(tmp_path / "prompt.safetensors", prompt, backbone, nn.Linear(128, 10))
    with safe_open(path, "pt") as file:
        place = "edits.blocks.4:input"
        names = {f"{place}.values", f"{place}.unit", f"{place}.activation_norm", "head.weight", "head.bias"}
        assert set(file.keys()) == names
        config = json.loads(file.metadata()["apthory"])
    numbers = 65 * 128 + 10 * 128 + 10
    assert path.stat().st_size < 4 * numbers + 2000
    assert path.stat().st_size < sum(p.numel() * 4 for p in backbone.parameters()) / 100
    options = {"site": "blocks.4:input", "shape": "full", "in_rms_units": False, "lr_scale": 10.0}
    assert {name: value for name, value in config.items() if name not in ("mean", "std", "sha256")} == {
        "format": "apthory.adapted/2",
        "method": "ap",
        "options": options,
        "head": "linear",
        "classes": [],
        "image_size": 64,
        "transform": "",
        "backbone": "vit_micro",
        "digest": backbones.digest(backbone),
        "load_arguments": {"name": "vit_micro"},
    }
    assert config == files.describe_file(path)
    assert [file.name for file in tmp_path.iterdir()] == ["prompt.safetensors"]


def test_another_backbone_is_refused(tmp_path: Path):
    backbone = tiny.backbone("vit")
    path = files.save_prompt(tmp_path / "p.safetensors", random_prompt(backbone, "blocks.1"), backbone)
    with pytest.raises(ValueError, match="trained for the backbone 'tiny_vit', not 'tiny_resnet'; load that one"):
        files.load_prompt(path, tiny.backbone("resnet"))


def test_other_weights_are_refused(tmp_path: Path):
    backbone = tiny.backbone("vit")
    path = files.save_prompt(tmp_path / "p.safetensors", random_prompt(backbone, "blocks.1"), backbone)
    other = tiny.backbone.__wrapped__("vit")
    assert isinstance(files.load_prompt(path, other), AdaptedBackbone)  # another object, the same weights
    other.norm.bias.data[0] += 1e-6
    with pytest.raises(ValueError, match="trained for other weights of 'tiny_vit'"):
        files.load_prompt(path, other)


def rewrite(path: Path, tensors: dict | None = None, *, seal: bool = False, **changes: object) -> Path:
    """The same file with other tensors or metadata, under a new digest if wanted; None takes a field away."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["apthory"]) | changes
        old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = {name: value for name, value in config.items() if value is not None}
    content = old if tensors is None else tensors
    if seal:
        config["sha256"] = files._file_digest(config, content)
    save_file(content, path, {"apthory": json.dumps(config)})
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    backbone = tiny.backbone("vit")
    linear = nn.Linear(32, 3)
    return files.save_prompt(tmp_path / "p.safetensors", random_prompt(backbone, "blocks.1"), backbone, linear)


def test_a_wrong_shape_or_site_is_refused(saved: Path):
    backbone, place = tiny.backbone("vit"), "edits.blocks.2:input"
    with safe_open(saved, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        options = json.loads(file.metadata()["apthory"])["options"]
    other = tensors | {f"{place}.values": torch.zeros(3, 32)}
    with pytest.raises(ValueError, match=r"p.safetensors does not fit 'tiny_vit' .*it may be damaged: save it anew"):
        files.load_prompt(rewrite(saved, other, seal=True), backbone)
    rewrite(saved, tensors, seal=True)
    with pytest.raises(ValueError, match=r"no module 'blocks.9'"):
        files.load_prompt(rewrite(saved, seal=True, options=options | {"site": "blocks.9:input"}), backbone)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"method": None}, "its method is None, and should be a str"),
        ({"options": None}, "its options is None, and should be a dict"),
        ({"options": {"place": 3}}, "does not fit 'tiny_vit'"),
        (
            {"method": "lora"},
            "trained by the method 'lora', which is not known here .*import the module that registers it",
        ),
        ({"head": ""}, r"a head of the kind '' has the tensors \[\], and there are \['bias', 'weight'\]"),
        ({"head": "cosine"}, r"a head of the kind 'cosine' has the tensors \['weight', 'scale'\]"),
        ({"head": "mlp"}, "a head of the kind 'mlp'"),
        ({"classes": ["a", "a", "b"]}, r"its class names are \['a', 'a', 'b'\], and should be different texts"),
        ({"classes": ["a", None, "b"]}, "and should be different texts"),
        (
            {"options": {"site": "blocks.2:input", "lr_scale": "x"}},
            "lr_scale of the method 'ap' is 'x'; expected a num",
        ),
        ({"classes": ["a", "b"]}, r"it names 2 classes, and its head has weights of shape \(3, 32\)"),
        ({"image_size": 64}, "trained with image_size 64, and this backbone has 32; load the backbone with the same"),
        ({"mean": [0.0, 0.0, 0.0]}, r"trained with mean \[0.0, 0.0, 0.0\], and this backbone has"),
        ({"sha256": "0" * 64}, "it is not what was saved"),
        ({"digest": None}, "its digest is None"),
        ({"format": "apthory.adapted/3"}, "format 'apthory.adapted/3'.*a newer version of apthory may read it"),
    ],
)
def test_metadata_that_cannot_be_right_are_refused(changes: dict, fault: str, saved: Path):
    with pytest.raises(ValueError, match=fault):
        files.load_prompt(rewrite(saved, seal="sha256" not in changes, **changes), tiny.backbone("vit"))


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ["b", "a", "c"]},
        {"transform": "other"},
        {"method": "norm"},
        {"options": {"site": "blocks.1:input", "shape": "full", "in_rms_units": False, "lr_scale": 10.0}},
    ],
)
def test_metadata_that_were_changed_are_refused(changes: dict, saved: Path):
    with pytest.raises(ValueError, match=r"it is not what was saved \(SHA-256\)"):
        files.load_prompt(rewrite(saved, **changes), tiny.backbone("vit"))


def test_a_renamed_head_is_refused_instead_of_lost(saved: Path):
    with safe_open(saved, "pt") as file:
        tensors = {name.replace("head.", "haed."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with pytest.raises(ValueError, match=r"it is not what was saved"):
        files.load_prompt(rewrite(saved, tensors), tiny.backbone("vit"))
    with pytest.raises(ValueError, match=r"a head of the kind 'linear' has the tensors .*, and there are \[\]"):
        files.load_prompt(rewrite(saved, tensors, seal=True), tiny.backbone("vit"))


def test_a_flipped_bit_is_refused(saved: Path):
    content = bytearray(saved.read_bytes())
    content[-100] ^= 16  # in the last tensor
    saved.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged: it is not what was saved .*; save it anew, or cop"):
        files.load_prompt(saved, tiny.backbone("vit"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_saved_nor_loaded(value: float, saved: Path):
    backbone = tiny.backbone("vit")
    prompt = random_prompt(backbone, "blocks.1")
    with torch.no_grad():
        prompt.delta[0, 0] = value
    before = saved.read_bytes()
    with pytest.raises(ValueError, match=r"edits.blocks.2:input.values has values that are not finite, so .* not writ"):
        files.save_prompt(saved, prompt, backbone)
    assert saved.read_bytes() == before
    with safe_open(saved, "pt") as file:
        tensors = {name: torch.full_like(file.get_tensor(name), value) for name in file.keys()}  # noqa: SIM118
    with pytest.raises(ValueError, match=r"is damaged: .* has values that are not finite"):
        files.load_prompt(rewrite(saved, tensors, seal=True), backbone)


def test_metadata_that_are_no_json_are_refused(tmp_path: Path):
    save_file({"prompt": torch.zeros(17, 32)}, tmp_path / "p.safetensors", {"apthory": '{"format": "apthory.p'})
    with pytest.raises(ValueError, match=r"p.safetensors is not a prompt saved by apthory \(its metadata are no JSON"):
        files.load_prompt(tmp_path / "p.safetensors", tiny.backbone("vit"))


# ---------------------------------------------------------------------------------- files of version 0.1.0

OLD = Path(__file__).parent / "saved_0_1_0"


@pytest.fixture(scope="module")
def resnet_micro() -> nn.Module:
    return backbones.load("resnet_micro", device="cpu")


@pytest.mark.parametrize("name", ["full", "channel", "vp", "evp", "adavipro"])
def test_a_file_of_version_0_1_0_gives_its_logits_and_can_be_saved_anew(
    name: str, resnet_micro: nn.Module, tmp_path: Path
):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = files.load_prompt(OLD / f"{name}.safetensors", resnet_micro)
    with torch.no_grad():
        torch.testing.assert_close(model(x), load_file(OLD / "logits.safetensors")[name], rtol=1e-4, atol=1e-4)
        again = files.load_prompt(files.save_model(tmp_path / "new.safetensors", model), resnet_micro)
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        ("full", {"site": None}, "is damaged: its site is None, and should be a str"),
        ("full", {"shape": None}, "is damaged: its shape is None"),
        ("evp", {"layout": {"size": 64}}, "is damaged"),
        ("evp", {"layout": None}, "is damaged: its layout is None"),
    ],
)
def test_a_damaged_file_of_version_0_1_0_is_refused(
    name: str, changes: dict, fault: str, resnet_micro: nn.Module, tmp_path: Path
):
    path = shutil.copy(OLD / f"{name}.safetensors", tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=fault):
        files.load_prompt(rewrite(path, **changes), resnet_micro)


def test_a_renamed_head_of_version_0_1_0_is_refused(resnet_micro: nn.Module, tmp_path: Path):
    tensors = load_file(OLD / "full.safetensors")
    for old, new in (("head.", "haed."), ("head.weight", "head.weigth")):
        path = shutil.copy(OLD / "full.safetensors", tmp_path / "p.safetensors")
        renamed = {name.replace(old, new): value for name, value in tensors.items()}
        with pytest.raises(ValueError, match="is damaged"):
            files.load_prompt(rewrite(path, renamed), resnet_micro)


@pytest.mark.parametrize("metadata", [None, {"apthory": "{}"}, {"apthory": '{"format": "apthory.prompt/99"}'}])
def test_a_file_that_is_no_prompt_is_refused(metadata: dict | None, tmp_path: Path):
    save_file({"prompt": torch.zeros(17, 32)}, tmp_path / "p.safetensors", metadata)
    with pytest.raises(ValueError, match=r"p.safetensors is not a prompt saved by apthory"):
        files.load_prompt(tmp_path / "p.safetensors", tiny.backbone("vit"))


def test_a_file_of_another_format_is_refused(tmp_path: Path):
    (tmp_path / "p.jpg").write_bytes(b"\xff\xd8\xff" * 20)
    with pytest.raises(ValueError, match=r"p.jpg is not a prompt saved by apthory .*Fit.save"):
        files.load_prompt(tmp_path / "p.jpg", tiny.backbone("vit"))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(OSError, match=r"nothing.safetensors"):
        files.load_prompt(tmp_path / "nothing.safetensors", tiny.backbone("vit"))


def test_an_interrupted_save_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    backbone, x = tiny.backbone("vit"), tiny.images("vit", 2)
    first, second = (random_prompt(backbone, "blocks.1", seed=seed) for seed in (0, 1))
    path = files.save_prompt(tmp_path / "p.safetensors", first, backbone)

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)  # the last step before the file gets its name
    for target in (path, tmp_path / "new.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            files.save_prompt(target, second, backbone)
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]
    with torch.no_grad():
        assert torch.equal(files.load_prompt(path, backbone)(x), AdaptedBackbone(backbone, first)(x))
