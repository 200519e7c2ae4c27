"""Claims about costs: what is counted is what a hand count gives, and the race's bounds follow from the shares."""

import pandas as pd
import pytest
import tiny
import torch
from torch import nn

from apthory import backbones, costs, sites
from apthory.benchmarks import prefix_cache
from apthory.lab import records
from apthory.studies import costs as cost_study


def test_flops_of_a_linear_layer_are_two_for_a_multiply_add():
    layer, x = nn.Linear(7, 5, bias=False), torch.zeros(3, 7)
    assert costs.count_flops(lambda: layer(x)) == 2 * 3 * 7 * 5


def test_peak_memory_is_the_most_that_is_alive_at_once():
    x = torch.zeros(1000)  # given, so it does not count

    def work():
        a = x + 1  # 4,000 bytes
        b = a + 1  # 8,000
        del a
        c = b + 1  # 8,000 again: a is gone
        return c.sum()  # and 4 bytes for the result

    assert costs.peak_memory(work) == 8004
    assert costs.peak_memory(lambda: x.view(10, 100)) == 0
    assert costs.peak_memory(lambda: [x + 1 for _ in range(3)]) == 12000


def test_backward_keeps_what_forward_saved():
    weight = torch.zeros(1000, requires_grad=True)
    with torch.no_grad():
        without = costs.peak_memory(lambda: weight.exp().exp().exp().sum())
    saved = costs.peak_memory(lambda: weight.exp().exp().exp().sum().backward())
    assert without < 3 * 4000 <= saved


def test_timings_are_taken_in_turns():
    order = []
    times = costs.interleaved_seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4  # once to warm up
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def measured(request):
    precision = request.param
    config = {"backbone": {"name": "resnet_micro"}, "batch_size": 2, "num_repeats": 1, "precision": precision}
    return cost_study.measure_sites(**config)


def test_a_cached_step_costs_what_the_suffix_costs(measured):
    rows, forward = pd.DataFrame(measured["sites"]), measured["forward_flops"]
    assert rows["suffix_flops"].iloc[0] == forward
    assert rows["suffix_flops"].is_monotonic_decreasing
    assert rows["cached_step_flops"].is_monotonic_decreasing
    # A step adds the prefix's forward pass to a cached step, and nothing else.
    assert (rows["step_flops"] - rows["cached_step_flops"] == forward - rows["suffix_flops"]).all()
    # Forward and backward of the suffix and the head; the first layer after the prompt needs both, weights none.
    head = 3 * 2 * 256 * 10
    assert rows["cached_step_flops"].iloc[0] == 2 * forward + head


def test_a_full_prompt_has_a_parameter_for_every_unit(measured):
    rows = pd.DataFrame(measured["sites"]).set_index("site")
    assert rows.loc[":input", "parameters"] == 3 * 64 * 64
    assert rows.loc["layer4.1:input", "parameters"] == 256 * 2 * 2
    assert (rows["head_parameters"] == 256 * 10 + 10).all()
    assert rows["step_bytes"].iloc[0] > rows["step_bytes"].iloc[-2]


def test_each_method_has_its_parameters_and_flops():
    config = {"backbone": {"name": "resnet_micro"}, "batch_size": 2, "site": "layer3.1:input", "num_repeats": 1}
    rows = pd.DataFrame(cost_study.measure_methods(**config, precision="float32")["methods"]).set_index("method")
    model = backbones.load("resnet_micro", device="cpu")
    gammas = sum(2 * m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    weights = sum(p.numel() for p in model.parameters())
    image = torch.zeros(2, 3, 64, 64)
    forward, head = costs.count_flops(lambda: model(image)) // 2, 3 * 2 * 256 * 10
    expected = {"linear": 0, "vp": 3 * 64 * 64, "ap": 128 * 4 * 4, "norm": gammas, "full": weights}
    assert rows["parameters"].to_dict() == expected
    assert (rows["head_parameters"] == 2570).all()
    # A probe runs the backbone forward and the head's two products; a visual prompt the backbone both ways.
    assert rows.loc["linear", "step_flops"] == forward + head - 2 * 256 * 10
    assert rows.loc["vp", "step_flops"] == 2 * forward + head
    assert rows.loc["vp", "step_flops"] > rows.loc["norm", "step_flops"] > rows.loc["ap", "step_flops"]
    assert rows.loc["full", "step_flops"] > rows.loc["vp", "step_flops"]


def test_suffix_shares_fall_from_one():
    backbone = tiny.backbone("vit")
    shares = [prefix_cache._suffix_share(backbone, site) for site in sites.list_sites(backbone)]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.1


def test_the_race_gives_both_loops_the_same_accuracy_and_bounds_by_hand(tmp_path):
    recipe = {"num_epochs": 1, "num_train": 48, "num_validation": 16, "num_test": 16, "precision": "float32"}
    config = {"backbone": {"name": "resnet_micro"}, "recipe": recipe, "learning_rates": [4e-3]}
    record = records.fetch(prefix_cache.race_prefix_cache, config, folder=tmp_path)
    rows = pd.DataFrame(record["sites"])
    assert (rows["cached_accuracy"] == rows["frozen_accuracy"]).all()
    assert (rows["cache_bytes"] > 0).all()
    table = prefix_cache.summarize_prefix_cache(record)["resnet_micro", "last quarter"]
    last = rows["suffix_share"].tail(3)
    assert table["bound, steps alone"] == pytest.approx((3 + last.sum()) / (2 * last.sum()))
    frozen = (48 * (1 + last) + 16).sum()
    cached = (48 * 2 * last + 16 * last + 64 * (1 - last)).sum()
    assert table["bound, whole schedule"] == pytest.approx(frozen / cached)
    assert table["gain"] == pytest.approx(rows["frozen_seconds"].tail(3).sum() / rows["cached_seconds"].tail(3).sum())
