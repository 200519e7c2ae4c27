"""Claims about profiles: every number is the metric's own, in the row of its site; and about the studies behind 04."""

import copy
import json
import math

import pandas as pd
import pytest
import tiny
import torch
from torch import nn

from apthory import backbones, metrics, sites
from apthory.metrics import attention, profile, receptive, similarity, spectrum
from apthory.studies import global_features

TASK = {"task": "orientation", "size": 64}


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", ["vit", "swin", "convnext", "resnet"])
def test_a_profile_holds_what_each_metric_gives_alone(family: str):
    model, x = tiny.backbone(family), tiny.images(family, 6)
    before = backbones.digest(model)
    table = metrics.layer_profile(model, x, batch_size=4, seed=3)
    assert list(table["site"]) == sites.list_sites(model)
    assert list(table["depth"]) == pytest.approx(torch.linspace(0, 1, len(table)).tolist())
    fields = receptive.receptive_fields(model, x.split(4), generator=torch.Generator().manual_seed(3))
    spectra = spectrum.spectra(model, x)
    theory = receptive.theoretical_fields(model, x)
    alike = similarity.layer_similarity(model, None, x).iloc[:, -1]
    for row in table.itertuples():
        assert row.radius == pytest.approx(fields[row.site].radius, rel=1e-5)
        assert row.area == pytest.approx(fields[row.site].area, rel=1e-5)
        assert row.shared == pytest.approx(spectra[row.site].shared, rel=1e-5)
        assert row.field == theory[row.site].height
        assert row.similarity_to_last == pytest.approx(alike[row.site], abs=1e-4)
        shape = sites.site_shape(model, row.site)
        assert row.positions * row.channels == math.prod(shape)
        assert row.reach_share == row.reach / row.positions
        assert 1 <= row.reach <= row.coverage * 1.5
    assert table["similarity_to_last"].iloc[-1] == pytest.approx(1)
    assert backbones.digest(model) == before
    assert num_hooks(model) == 0


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_attention_stands_at_the_input_of_its_block(family: str):
    model, x = tiny.backbone(family), tiny.images(family, 4)
    table = metrics.layer_profile(model, x).set_index("site")
    means = attention.attention_profile(model, x).groupby("layer")[["distance_pixels", "entropy"]].mean()
    blocks = {layer.removesuffix(".attn"): row for layer, row in means.iterrows()}
    found = table.dropna(subset="attention_distance")
    assert {site.removesuffix(":input") for site in found.index} == set(blocks)
    for site, row in found.iterrows():
        expected = blocks[site.removesuffix(":input")]
        assert row["attention_distance"] == pytest.approx(expected["distance_pixels"], rel=1e-5)
        assert row["attention_entropy"] == pytest.approx(expected["entropy"], rel=1e-5)
    assert table["attention_distance"].isna().sum() == 2  # the image and the last output enter no block


def test_what_has_no_meaning_is_nan():
    model, x = tiny.backbone("resnet"), tiny.images("resnet", 4)
    places = ["layer2.0.bn1", "layer1.0:input", ":output"]
    table = metrics.layer_profile(model, x, places).set_index("site")
    assert list(table.index) == places
    assert table["attention_distance"].isna().all()
    assert math.isnan(table["depth"]["layer2.0.bn1"])
    assert math.isnan(table["high_frequency"][":output"])
    assert table["shared"][":output"] == table["reach_share"][":output"] == 1
    assert math.isinf(table["field"][":output"])


def test_a_layer_of_unknown_reach_leaves_the_theoretical_field_open():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).cumsum(-1)).flatten(1)

    table = metrics.layer_profile(Odd().eval(), torch.randn(4, 3, 8, 8), ["first", "last"])
    assert table["field"].isna().all()
    assert table["radius"].notna().all()


def test_attention_that_cannot_be_read_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    def unreadable(*_):
        raise ValueError("windows are padded")

    monkeypatch.setattr(attention, "attention_profile", unreadable)
    with pytest.warns(UserWarning, match="attention is left out, since windows are padded"):
        table = metrics.layer_profile(tiny.backbone("vit"), tiny.images("vit", 4))
    assert table["attention_distance"].isna().all()
    assert table["radius"].notna().all()


def test_long_work_shows_where_it_is(monkeypatch: pytest.MonkeyPatch):
    shown = []

    def note(batches, desc):
        shown.append((desc, len(batches)))
        return batches

    monkeypatch.setattr(profile, "progress", note)
    metrics.layer_profile(tiny.backbone("vit"), tiny.images("vit", 6), batch_size=2)
    assert [desc for desc, _ in shown] == ["receptive fields", "gradient spread", "spectra", "similarity", "attention"]
    assert [num for _, num in shown] == [3, 3, 3, 1, 3]


@pytest.mark.parametrize(("change", "message"), [
    (lambda x: x[:3], "at least 4 images, not 3"),
    (lambda x: x[:0], "at least 4 images, not 0"),
    (lambda x: x.index_fill(0, torch.tensor([2]), math.nan), "':input' is not finite at image 2"),
    (lambda x: x[:1].expand_as(x), "are the same for all samples"),
])  # fmt: skip
def test_images_that_cannot_be_measured_are_refused(change, message: str):
    with pytest.raises(ValueError, match=message):
        metrics.layer_profile(tiny.backbone("vit"), change(tiny.images("vit", 6)))


def test_training_mode_is_refused_before_any_statistic_moves():
    model = copy.deepcopy(tiny.backbone("resnet")).train()
    before = backbones.digest(model)
    with pytest.raises(ValueError, match="training mode"):
        metrics.layer_profile(model, tiny.images("resnet", 4))
    assert backbones.digest(model) == before


# ---------------------------------------------------------------------------------------------- the studies


def test_uniform_attention_of_patches_is_not_heeded_after_the_last_mixing():
    model, x = tiny.backbone("vit"), tiny.images("vit", 5)
    changes = [global_features.change_if_uniform(model, x, f"blocks.{index}.attn", "patches") for index in range(3)]
    assert changes[2] == 0  # nothing reads the patches after the last block
    assert min(changes[:2]) > 1e-4
    assert global_features.change_if_uniform(model, x, "blocks.2.attn", "class token") > 1e-4
    assert num_hooks(model) == 0


def test_queries_of_zero_attend_uniformly():
    """Against attention that averages the values of all tokens, written out."""
    model, x = tiny.backbone("vit", torch.float64), tiny.images("vit", 3, dtype=torch.float64)
    z = sites.capture(model, ["blocks.0.attn:input"], x)["blocks.0.attn:input"]
    layer = model.blocks[0].attn
    mean = layer.proj(layer.qkv(z)[..., -z.shape[-1] :].mean(1))
    seen = {}

    def averaged(out: torch.Tensor) -> torch.Tensor:
        seen["class"] = out[:, :1]
        return torch.cat([out[:, :1], mean[:, None].expand(-1, out.shape[1] - 1, -1)], 1)

    with sites.edited(model, {"blocks.0.attn": averaged}), torch.no_grad():
        expected = model(x)
    with torch.no_grad():
        plain = model(x)
    spread = (plain - plain.mean(0)).square().sum().sqrt()
    change = float((expected - plain).square().sum().sqrt() / spread)
    assert global_features.change_if_uniform(model, x, "blocks.0.attn", "patches") == pytest.approx(change, rel=1e-10)


def test_only_a_joint_projection_can_be_made_uniform():
    with pytest.raises(ValueError, match=r"'blocks\.0\.mlp' has no joint projection"):
        global_features.change_if_uniform(tiny.backbone("vit"), tiny.images("vit", 2), "blocks.0.mlp", "patches")


def test_profiles_are_recorded_with_their_control():
    kept = {}
    for network in ("trained", "shuffled"):
        values = global_features.measure_profile({"name": "resnet_micro"}, **TASK, network=network, num_images=8)
        json.dumps(values, allow_nan=False)
        kept[network] = pd.DataFrame(values["sites"])
    trained, shuffled = kept.values()
    assert list(trained["site"]) == sites.list_sites(backbones.load("resnet_micro"))
    assert list(trained["field"]) == list(shuffled["field"])  # the architecture's
    assert (trained["radius"] - shuffled["radius"]).abs().max() > 0.1
    assert trained["attention_distance"].isna().all()


def test_attention_is_recorded_by_block():
    values = global_features.measure_attention({"name": "vit_micro"}, **TASK, network="trained", num_images=6)
    rows = pd.DataFrame(values["layers"])
    assert list(rows["layer"]) == [f"blocks.{index}.attn" for index in range(8)]
    assert (rows["distance_with_class_token"] < rows["distance"]).all()
    assert rows["patches"].iloc[-1] == 0
    # Mean distance of two squares of an 8 x 8 grid, each pair counted.
    place = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    assert float(values["uniform"]) == pytest.approx(float(torch.cdist(place, place).mean()), rel=1e-6)
    assert (rows["entropy"] < math.log(64)).all()


def test_similarity_of_two_backbones_is_recorded():
    other = {"name": "vit_micro"}
    digest = backbones.digest(backbones.load(**other))
    config = {"backbone": other, **TASK, "other": other, "other_size": 64, "num_images": 12}
    values = global_features.measure_similarity(**config, other_digest=digest)
    assert values["sites"] == values["other_sites"] == sites.list_sites(backbones.load(**other))[1:]
    assert list(values["cka"].diagonal()) == pytest.approx([1.0] * 9)
    with pytest.raises(ValueError, match=r"weights of 'vit_micro' are not those of the digest 000"):
        global_features.measure_similarity(**config, other_digest="000")
