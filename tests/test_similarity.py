"""Claims about CKA: what it equals, what it is and is not invariant to, the digits of float32, what it refuses."""

import itertools
import math
import statistics

import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from apthory import costs, sites
from apthory.metrics import similarity
from apthory.metrics.similarity import CKA, cka, layer_similarity

VARIANTS = [(kernel, debiased) for kernel in ("linear", "rbf") for debiased in (True, False)]


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ----------------------------------------------------------------------------------- by definition, in loops


def kernel_matrix(x, kernel, bandwidth=1.0):
    rows = x.flatten(1).tolist()
    if kernel == "linear":
        return [[math.fsum(a * b for a, b in zip(u, v, strict=True)) for v in rows] for u in rows]
    distances = [[math.dist(u, v) for v in rows] for u in rows]
    pairs = [distances[i][j] for i, j in itertools.combinations(range(len(rows)), 2)]
    sigma = bandwidth * statistics.median_low(pairs)
    return [[math.exp(-(d**2) / (2 * sigma**2)) for d in row] for row in distances]


def hsic(k, m, debiased):
    """The mean over ordered quadruples of different samples; biased, over all samples with replacement."""
    num = len(k)
    if debiased:
        terms = [k[i][j] * (m[i][j] + m[q][r] - 2 * m[i][q]) for i, j, q, r in itertools.permutations(range(num), 4)]
        return math.fsum(terms) / len(terms)
    every = range(num)
    total = math.fsum(k[i][j] * m[i][j] for i in every for j in every) / num**2
    total += math.fsum(map(math.fsum, k)) * math.fsum(map(math.fsum, m)) / num**4
    total -= 2 * math.fsum(math.fsum(k[i]) * math.fsum(m[i]) for i in every) / num**3
    return total * num**2 / (num - 1) ** 2


def slow_cka(batches, kernel, debiased, bandwidth=1.0):
    sums = [0.0, 0.0, 0.0]
    for x, y in batches:
        k, m = (kernel_matrix(z, kernel, bandwidth) for z in (x, y))
        for index, pair in enumerate([(k, m), (k, k), (m, m)]):
            sums[index] += len(x) * hsic(*pair, debiased)
    return sums[0] / math.sqrt(sums[1] * sums[2])


@pytest.mark.parametrize(("kernel", "debiased"), VARIANTS)
@pytest.mark.parametrize("shape", [(7, 12), (9, 2, 2)])  # fewer and more samples than features
def test_cka_is_what_its_definition_gives(kernel, debiased, shape):
    x, y = rand(*shape) + 1, rand(*shape, seed=1)
    y = y + 0.7 * x
    assert float(cka(x, y, kernel=kernel, debiased=debiased)) == pytest.approx(
        slow_cka([(x, y)], kernel, debiased), rel=1e-11
    )


@pytest.mark.parametrize("bandwidth", [0.3, 2.0])
def test_bandwidth_is_in_units_of_the_median_distance(bandwidth):
    x, y = rand(7, 3), rand(7, 2, seed=1)
    expected = slow_cka([(x, y)], "rbf", True, bandwidth)
    assert float(cka(x, y, kernel="rbf", bandwidth=bandwidth)) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(("kernel", "debiased"), VARIANTS)
def test_minibatches_add_up_their_hsic_each_by_its_size(kernel, debiased):
    x, y = rand(18, 5), rand(18, 6, seed=1)
    y[:, :5] += x
    batches = list(zip(x.split([8, 6, 4]), y.split([8, 6, 4]), strict=True))
    alignment = CKA(kernel=kernel, debiased=debiased)
    for one, other in batches:
        alignment.update({"x": one, "again": 2 * one}, {"y": other})
    table = alignment.compute()
    assert table.loc["x", "y"] == pytest.approx(slow_cka(batches, kernel, debiased), rel=1e-11)
    assert table.loc["again", "y"] == pytest.approx(table.loc["x", "y"], rel=1e-12)


@given(st.integers(4, 12), st.integers(1, 14), st.integers(1, 14), st.booleans(), st.integers(0, 1000))
def test_features_and_gram_matrices_give_the_same(num, width, other, debiased, seed):
    x, y = rand(num, width, seed=seed), rand(num, other, seed=seed + 1)
    wide = torch.nn.functional.pad(x, (0, num))  # as many features as samples: by Gram matrices
    value = float(cka(x, y, debiased=debiased))
    assert value == pytest.approx(float(cka(wide, y, debiased=debiased)), abs=1e-9)
    assert value == pytest.approx(float(cka(y, x, debiased=debiased)), abs=1e-12)
    assert abs(value) <= 1 + 1e-12


@pytest.mark.parametrize(("kernel", "debiased"), VARIANTS)
@pytest.mark.parametrize("shape", [(6, 9), (9, 3)])
def test_gradients_are_those_of_the_value(kernel, debiased, shape):
    pair = [rand(*shape, seed=seed).requires_grad_() for seed in (0, 1)]
    assert torch.autograd.gradcheck(lambda x, y: cka(x, y, kernel=kernel, debiased=debiased), pair)


# ----------------------------------------------------------------------------------- invariances


def rotated(x):
    return x @ torch.linalg.qr(rand(x.shape[1], x.shape[1], seed=5))[0]


INVARIANT = {
    "itself": lambda x: x,
    "rotation": rotated,
    "scale": lambda x: -3 * x,
    "shift": lambda x: x + 100,
    "more zeros": lambda x: torch.nn.functional.pad(x, (0, 30)),
}
NOT_INVARIANT = {
    "another linear map": lambda x: x * torch.linspace(0.1, 4, x.shape[1], dtype=x.dtype),
    "another order of samples": lambda x: x.flip(0),
    "each sample's scale": lambda x: x * torch.linspace(0.2, 3, len(x), dtype=x.dtype)[:, None],
    "a nonlinearity": lambda x: x.relu(),
}


@pytest.mark.parametrize(("kernel", "debiased"), VARIANTS)
@pytest.mark.parametrize("shape", [(20, 30), (40, 10)])
@pytest.mark.parametrize("change", [*INVARIANT, *NOT_INVARIANT])
def test_cka_is_invariant_to_what_it_must_be_and_to_nothing_else(change, kernel, debiased, shape):
    x, y = rand(*shape), rand(shape[0], 8, seed=1)
    y[:, :4] += x[:, :4]
    changed = (INVARIANT | NOT_INVARIANT)[change](x)
    with_itself = float(cka(x, changed, kernel=kernel, debiased=debiased))
    with_other = [float(cka(z, y, kernel=kernel, debiased=debiased)) for z in (x, changed)]
    if change in INVARIANT:
        assert with_itself == pytest.approx(1, abs=1e-10)
        assert with_other[1] == pytest.approx(with_other[0], abs=1e-10)
    else:
        assert with_itself < 0.99
        assert abs(with_other[1] - with_other[0]) > 1e-4


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_debiased_cka_of_independent_features_is_zero_in_the_mean_and_biased_cka_is_not(kernel):
    draws = [[float(cka(rand(12, 40, seed=2 * s), rand(12, 40, seed=2 * s + 1), kernel=kernel, debiased=d))
              for s in range(300)] for d in (True, False)]  # fmt: skip
    error = statistics.stdev(draws[0]) / math.sqrt(300)
    assert abs(statistics.mean(draws[0])) < 3 * error < 0.03
    assert statistics.mean(draws[1]) > 0.5


def test_a_wide_rbf_kernel_is_the_linear_one():
    x, y = rand(10, 6), rand(10, 6, seed=1)
    wide = float(cka(x, y, kernel="rbf", bandwidth=1e3))
    assert wide == pytest.approx(float(cka(x, y)), abs=1e-5)


# ----------------------------------------------------------------------------------- digits


def usual_formula(x, y):
    """Unbiased HSIC as the common tools have it, in the features' own precision."""
    grams = [z @ z.T for z in (x, y)]
    for k in grams:
        k.fill_diagonal_(0)

    def one(k, m):
        n, total = len(k), (k @ m).trace()
        return total + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k @ m).sum() / (n - 2)

    k, m = grams
    return float(one(k, m) / (one(k, k).sqrt() * one(m, m).sqrt()))


@pytest.mark.parametrize(("kernel", "debiased"), VARIANTS)
@pytest.mark.parametrize(("num", "mean"), [(32, 0), (32, 10), (256, 3), (256, 10)])
def test_float32_keeps_the_digits_of_features_with_a_mean(num, mean, kernel, debiased):
    x = mean + rand(num, 2048)
    y = 0.5 * x + rand(num, 2048, seed=1) + mean
    twin = float(cka(x, y, kernel=kernel, debiased=debiased))
    value = float(cka(x.float(), y.float(), kernel=kernel, debiased=debiased))
    assert abs(value - twin) <= 1e-6  # ten times better than asked
    if mean == 10:
        usual = usual_formula(x.float(), y.float())
        assert not abs(usual - usual_formula(x, y)) <= 1e-2  # nan, or two digits at most


def test_float32_keeps_the_digits_with_more_samples_than_features():
    x = 10 + rand(1000, 60)
    y = 10 + 0.3 * x[:, :50] + rand(1000, 50, seed=1)
    for debiased in (True, False):
        twin = float(cka(x, y, debiased=debiased))
        assert abs(float(cka(x.float(), y.float(), debiased=debiased)) - twin) <= 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_neither_large_nor_small_features_overflow(scale):
    x, y = rand(16, 40, dtype=torch.float32), rand(16, 30, seed=1, dtype=torch.float32)
    for kernel in ("linear", "rbf"):
        assert float(cka(scale * x, y, kernel=kernel)) == pytest.approx(float(cka(x, y, kernel=kernel)), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_first(dtype):
    x, y = rand(16, 400).to(dtype), rand(16, 300, seed=1).to(dtype)
    assert float(cka(x, y)) == pytest.approx(float(cka(x.double(), y.double())), abs=1e-6)


def test_reduced_precision_of_products_costs_no_digits():
    x, y = 10 + rand(32, 500), rand(32, 500, seed=1)
    twin = float(cka(x, y))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert abs(float(cka(x.float(), y.float())) - twin) <= 1e-6
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(float(cka(x.float(), y.float())) - twin) <= 1e-6


# ----------------------------------------------------------------------------------- layers of networks


def test_layers_of_two_networks_are_compared_at_their_sites():
    first, second = tiny.backbone("vit"), tiny.backbone("resnet")
    images = tiny.images("vit", 13)
    table = layer_similarity(first, second, images, batch_size=5)
    assert (table.index.name, table.columns.name) == ("layer_a", "layer_b")
    assert list(table.index) == sites.list_sites(first)
    assert list(table.columns) == sites.list_sites(second)
    alignment = CKA()
    for x in images.split([5, 4, 4]):  # as even as can be, so that no batch is too small
        alignment.update(*(sites.capture(model, sites.list_sites(model), x) for model in (first, second)))
    pd.testing.assert_frame_equal(table, alignment.compute(), rtol=1e-9)
    assert table.loc[":input", ":input"] == pytest.approx(1, abs=1e-9)
    assert table.to_numpy().min() < 0.9


def test_a_network_compared_with_itself_runs_once():
    model, images = tiny.backbone("vit"), tiny.images("vit", 12)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    itself = layer_similarity(model, None, images, batch_size=6)
    parts = layer_similarity(model, model, images, ["blocks.1"], ["blocks.0", "blocks.1"], batch_size=6)
    handle.remove()
    assert len(calls) == 4
    torch.testing.assert_close(torch.tensor(itself.to_numpy().diagonal()), torch.ones(len(itself), dtype=torch.float64))
    torch.testing.assert_close(torch.tensor(itself.to_numpy()), torch.tensor(itself.to_numpy().T))
    assert parts.loc["blocks.1", "blocks.0"] == pytest.approx(itself.loc["blocks.2:input", "blocks.1:input"], abs=1e-12)
    twice = layer_similarity(model, model, images, images_b=images, batch_size=6)
    pd.testing.assert_frame_equal(twice, itself, rtol=1e-9)


def test_images_may_come_in_batches_with_labels_and_in_another_form_for_the_second_network():
    first, second = tiny.backbone("vit"), tiny.backbone("swin")
    small, large = tiny.images("vit", 10), tiny.images("swin", 10)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(small, torch.arange(10)), 5)
    table = layer_similarity(first, second, loader, images_b=large.split(5))
    again = layer_similarity(first, second, small, images_b=large, batch_size=5)
    pd.testing.assert_frame_equal(table, again)


def test_the_networks_layers_in_float32_are_those_in_float64():
    tables = []
    for dtype in (torch.float32, torch.float64):
        model, images = tiny.backbone("vit", dtype), tiny.images("vit", 16, dtype=torch.float64).to(dtype)
        tables.append(layer_similarity(model, None, images + 10).to_numpy())
    assert abs(tables[0] - tables[1]).max() <= 1e-5


def test_no_activation_is_kept_and_nothing_of_the_model_is_changed():
    deep = nn.Sequential(*(nn.Linear(300, 300) for _ in range(30))).eval().requires_grad_(False)
    x, places = rand(8, 300, dtype=torch.float32), [f"{index}" for index in range(30)]
    kept = costs.peak_memory(lambda: sites.capture(deep, places, x))
    ours = costs.peak_memory(lambda: layer_similarity(deep, None, [x], places))
    assert kept > 30 * 8 * 300 * 4
    assert ours < kept / 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in deep.modules())


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("shape", [(6, 9), (20, 3)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_named(shape, bad):
    x, y = rand(*shape), rand(*shape, seed=1)
    y[2, 1] = bad
    with pytest.raises(ValueError, match="features of 'y' hold NaN or infinite values"):
        cka(x, y)
    with pytest.raises(ValueError, match="features of 'block' hold NaN or infinite values"):
        CKA().update({"block": y})


@pytest.mark.parametrize("shape", [(6, 9), (20, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_constant_features_are_refused_up_to_rounding(shape, dtype, kernel):
    x, constant = rand(*shape, dtype=dtype), rand(1, *shape[1:], dtype=dtype).expand(shape) * 1e3
    constant[::3] = torch.nextafter(constant[::3], torch.tensor(math.inf, dtype=dtype))
    alignment = CKA(kernel=kernel)
    alignment.update({"dead": constant}, {"alive": x})
    for attempt in (lambda: cka(x, constant, kernel=kernel), alignment.compute):
        with pytest.raises(ValueError, match=r"features of '(y|dead)' are the same for all samples"):
            attempt()
    alignment.update({"dead": x}, {"alive": x})  # alive in another batch
    assert 0 < alignment.compute().loc["dead", "alive"] < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_that_are_all_equally_far_apart_have_no_debiased_similarity(dtype):
    x = rotated(torch.eye(8, dtype=torch.float64)).to(dtype)
    with pytest.raises(ValueError, match="all samples equally far apart"):
        cka(x, rand(8, 3, dtype=dtype))
    assert float(cka(x, x, debiased=False)) == pytest.approx(1)


def test_different_numbers_of_samples_are_refused():
    x, y = rand(6, 4), rand(5, 4)
    with pytest.raises(ValueError, match="x has 6 samples, y has 5"):
        cka(x, y)
    with pytest.raises(ValueError, match="one network gave 6 samples, the other 5"):
        CKA().update({"a": x}, {"b": y})
    with pytest.raises(ValueError, match=r"layers differ in their number of samples: \{'a': 6, 'b': 5\}"):
        CKA().update({"a": x, "b": y})


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("num", [0, 1, 2, 3])
def test_batches_that_are_too_small_are_refused(num, debiased):
    x = rand(num, 2)
    if num == 3 and not debiased:
        assert 0 < float(cka(x, rand(3, 2, seed=1), debiased=False)) <= 1
        return
    for attempt in (lambda: cka(x, x, debiased=debiased), lambda: CKA(debiased=debiased).update({"a": x})):
        with pytest.raises(
            ValueError, match=rf"takes at least {4 if debiased else 3} samples in every batch, not {num}"
        ):
            attempt()


def test_calls_that_make_no_sense_are_refused():
    x = rand(6, 4)
    alignment = CKA()
    with pytest.raises(ValueError, match="there is no batch to compare"):
        alignment.compute()
    with pytest.raises(ValueError, match="there are no layers"):
        alignment.update({})
    alignment.update({"a": x})
    with pytest.raises(ValueError, match="differ from those of the batches before"):
        alignment.update({"b": x})
    with pytest.raises(ValueError, match="no kernel 'cosine'; there are 'linear' and 'rbf'"):
        similarity._check_kernel("cosine", 1.0)
    with pytest.raises(ValueError, match=r"shape \(6, 0\); give at least one value"):
        cka(x, x[:, :0])
    for bandwidth in (0.0, math.nan):
        with pytest.raises(ValueError, match="must be positive"):
            CKA(kernel="rbf", bandwidth=bandwidth)
        with pytest.raises(ValueError, match="must be positive"):
            cka(x, x, bandwidth=bandwidth)
    assert float(cka(x[:, 0], x[:, 1])) == float(cka(x[:, :1], x[:, 1:2]))  # one feature


def test_networks_and_images_that_do_not_fit_are_refused():
    model, images = tiny.backbone("vit"), tiny.images("vit", 8)
    with pytest.raises(ValueError, match=r"no module 'blocks\.9'"):
        layer_similarity(model, None, images, ["blocks.9"])
    with pytest.raises(ValueError, match="one network got more batches than the other"):
        layer_similarity(model, model, images.split(4), images_b=images[:4].split(4))
    with pytest.raises(ValueError, match="one network gave 8 samples, the other 7"):
        layer_similarity(model, model, images, images_b=images[:7])
    with pytest.raises(ValueError, match="takes at least 4 samples in every batch, not 3"):
        layer_similarity(model, None, images.split(3))
    for nothing in (images[:0], []):
        with pytest.raises(ValueError, match="there are no images"):
            layer_similarity(model, None, nothing)
    with pytest.raises(ValueError, match="batch_size is 0"):
        layer_similarity(model, None, images, batch_size=0)
    with pytest.raises(ValueError, match=r"'blocks.0' carries a tuple, not one tensor"):
        layer_similarity(_Tuples().eval(), None, images, ["blocks.0"])
    with pytest.raises(ValueError, match=r"training mode.*call backbone.eval\(\)"):
        layer_similarity(nn.Sequential(nn.Flatten()), None, images, ["0"])


class _Tuples(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([_Pair()])

    def forward(self, x):
        return self.blocks[0](x)[0]


class _Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.gpu
def test_a_gpu_gives_the_same_digits():
    x = 10 + rand(64, 4096)
    y = 10 + x + rand(64, 4096, seed=1)
    for kernel, debiased in VARIANTS:
        twin = float(cka(x, y, kernel=kernel, debiased=debiased))
        value = cka(x.float().cuda(), y.float().cuda(), kernel=kernel, debiased=debiased)
        assert value.is_cuda
        assert abs(float(value) - twin) <= 1e-5
        tall = [z[:, :20].float() for z in (x, y)]  # more samples than features
        value = cka(*(z.cuda() for z in tall), kernel=kernel, debiased=debiased)
        assert abs(float(value) - float(cka(*tall, kernel=kernel, debiased=debiased))) <= 1e-5
    alignment = CKA()
    alignment.update({"x": x.float().cuda()}, {"y": y.float().cuda()})
    assert alignment.compute().loc["x", "y"] == pytest.approx(float(cka(x, y)), abs=1e-5)


def test_an_rbf_kernel_needs_a_median_distance():
    x = torch.zeros(8, 3).index_fill_(0, torch.tensor([7]), 1.0)
    with pytest.raises(ValueError, match="more than half of the pairs of samples are equal"):
        cka(x, torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), kernel="rbf")
