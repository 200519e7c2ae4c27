"""The benchmark of the metrics: both sides compute the same numbers, and ratios are those of the recorded times."""

import math

import pytest
import torch

from apthory import backbones
from apthory.benchmarks import metrics
from apthory.lab import records
from apthory.metrics import attention, similarity

REASON = "torch-cka is not installed (extra bench)"
SECONDS = {
    "end to end, torch-cka", "end to end, ours", "end to end, forward", "CKA part, torch-cka", "CKA part, ours",
    "forward, fused", "profile, fused", "forward, written out", "profile, written out",
    "distances of a layer", "distances of a map, loop", "distances of a map, loop without NumPy",
}  # fmt: skip


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    pytest.importorskip("torch_cka", reason=REASON)
    config = {
        "backbone": {"name": "vit_micro", "device": "cpu"},
        "num_images": 12,
        "batch_size": 6,
        "num_repeats": 2,
        "num_maps": 2,
    }
    return records.fetch(metrics.race_metrics, config, folder=tmp_path_factory.mktemp("records"))


def test_every_piece_of_work_is_timed(record):
    assert set(record["seconds"]) == SECONDS
    assert all(value > 0 for values in record["seconds"].values() for value in values)
    assert record["num_layers"] == 8


def test_both_tools_agree_with_float64_where_features_have_no_mean_and_ours_where_they_have(record):
    errors = record["errors"]
    assert errors["as they are, ours"] <= 1e-6
    assert errors["as they are, torch-cka"] <= 1e-2
    assert errors["mean of 10 spreads, ours"] <= 1e-5
    theirs = errors["mean of 10 spreads, torch-cka"]
    assert theirs is None or theirs > 10 * errors["mean of 10 spreads, ours"]
    assert errors["distance beside loop"] <= 1e-5
    assert errors["distance beside loop without NumPy"] <= 1e-5


def test_ratios_are_those_of_medians(record):
    table = metrics.summarize_metrics(record)
    for kind in ("end to end", "CKA part"):
        ratio = table[f"{kind}, torch-cka (s)"] / table[f"{kind}, ours (s)"]
        assert table[f"{kind}, torch-cka / ours"] == pytest.approx(ratio)
    one = table["distances of a layer (s)"] / 6
    assert table["distances alone, loop / ours"] == pytest.approx(table["distances of a map, loop (s)"] / one)
    assert table["profile / forward, fused"] == pytest.approx(table["profile, fused (s)"] / table["forward, fused (s)"])
    assert not math.isnan(table["largest error, as they are, ours"])


def test_stored_features_give_what_the_network_gives_with_both_tools():
    pytest.importorskip("torch_cka", reason=REASON)
    model = backbones.load("vit_micro", device="cpu")
    blocks = ["blocks.1", "blocks.6"]
    images = torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), 6)
    with torch.no_grad():
        batches = [list(metrics.sites.capture(model, blocks, x).values()) for x in images.split(6)]
    stored = metrics._Stored(batches)
    ours = similarity.layer_similarity(model, None, images, blocks, batch_size=6).to_numpy()
    again = similarity.layer_similarity(stored, None, stored.loader, stored.places).to_numpy()
    assert ours == pytest.approx(again, abs=1e-12)
    for theirs in (
        metrics._peer(model, blocks, loader, images.device),
        metrics._peer(stored, stored.places, stored.loader, images.device),
    ):
        assert theirs.numpy() == pytest.approx(ours, abs=1e-2)
    assert not any(module._forward_hooks for module in model.modules())


def test_loops_over_maps_give_the_fast_distances():
    maps = torch.randn(2, 3, 13, 13, generator=torch.Generator().manual_seed(0)).softmax(-1)
    fast = attention.mean_attention_distance(maps, (3, 4), 1, class_token="drop")
    slow = torch.stack([metrics._loop_distance(one, (3, 4), lambda step: math.hypot(*step)) for one in maps])
    torch.testing.assert_close(fast, slow)


def test_batches_must_be_whole():
    with pytest.raises(ValueError, match="10 images make no whole batches of 4"):
        metrics.race_metrics({"name": "vit_micro"}, 10, 4)
