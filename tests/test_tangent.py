"""Scores from the tangent of a network: exact where it is linear, against loops and matrices written out."""

import itertools
import math
from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from apthory.theory import tangent

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def two_places(x, weights):
    """A network of two layers, as logits for shifts before the first and before the second."""
    first, second = weights
    return lambda shifts: torch.tanh((x + shifts["early"]) @ first + shifts["late"]) @ second


@pytest.fixture
def network():
    x, weights = rand(7, 5), (rand(5, 4, seed=1), rand(4, 3, seed=2))
    shifts = {"early": torch.zeros(7, 5, dtype=torch.float64), "late": torch.zeros(7, 4, dtype=torch.float64)}
    return x, weights, shifts, torch.arange(7) % 3


# --------------------------------------------------------------------------------- gradients: T1, T2, T3


def test_gradients_of_all_places_are_those_of_one_example_and_one_place_at_a_time(network):
    x, weights, shifts, labels = network
    g = tangent.example_gradients(
        two_places(x, weights), shifts, lambda y: functional.cross_entropy(y, labels, reduction="none")
    )
    for index in range(7):
        for place, zero in shifts.items():
            shift = zero[index : index + 1].clone().requires_grad_()
            others = {name: value[index : index + 1] for name, value in shifts.items()}
            logits = two_places(x[index : index + 1], weights)({**others, place: shift})
            functional.cross_entropy(logits, labels[index : index + 1]).backward()
            torch.testing.assert_close(g[place][index], shift.grad[0], **EXACT)


def test_sums_over_parts_are_those_of_the_whole():
    g = rand(12, 3, 4, 5)
    whole = tangent.Gradients.of(g, -3)
    parts = tangent.Gradients.of(g[:5], -3) + tangent.Gradients.of(g[5:], -3)
    for name in ("mean_square", "mean_norm", "individual_norm", "coherence", "reach", "coverage", "windows"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_the_mean_square_is_the_mean_of_products_of_different_examples():
    g = rand(9, 6) + 0.3
    pairs = [float(g[i] @ g[j]) for i in range(9) for j in range(9) if i != j]
    sums = tangent.Gradients.of(g)
    assert sums.mean_square == pytest.approx(np.mean(pairs), rel=1e-12)
    assert sums.coherence == pytest.approx(np.mean(pairs) / float(g.square().sum(1).mean()), rel=1e-12)


def test_the_mean_square_is_without_bias_where_the_plain_one_is_not():
    draws = rand(4000, 8, 20)  # 4000 times 8 examples of mean 0.1 in every one of 20 values
    g = draws + 0.1
    values = np.array([tangent.Gradients.of(one).mean_square for one in g])
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - 20 * 0.1**2) < 3 * error
    plain = g.mean(1).square().sum(1)
    assert float(plain.mean()) - 20 * 0.1**2 > 100 * error


@pytest.mark.parametrize(("g", "coherence"), [(torch.ones(6, 4), 1.0), (torch.zeros(6, 4), 0.0)])
def test_coherence_of_equal_gradients_is_one_and_without_gradient_zero(g, coherence):
    assert tangent.Gradients.of(g).coherence == pytest.approx(coherence, abs=1e-12)


def test_coherence_of_opposite_gradients_is_below_zero():
    g = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    sums = tangent.Gradients.of(g)
    assert sums.coherence == pytest.approx(-1.0)
    assert sums.mean_norm == pytest.approx(-1.0)
    with pytest.raises(ValueError, match=r"what 1 gradients share .* give at least two of one"):
        _ = tangent.Gradients.of(g[:1]).mean_square


def stratified(g, labels):
    """Sums of a stratified sample, from images in the order of their classes, in uneven pieces."""
    classes = []
    for label in labels.unique():
        own = g[labels == label]
        pieces = [tangent.Gradients.of(own[:1]), *([tangent.Gradients.of(own[1:])] if len(own) > 1 else [])]
        classes.append(reduce(add, pieces).as_stratum())
    return reduce(add, classes)


def test_the_mean_square_of_a_stratified_sample_is_without_bias_where_that_of_independent_draws_is_not():
    """Twelve examples, three of each class: how many does not vary, so what classes differ in is no noise."""
    labels = torch.arange(12) // 3
    means = 2.0 * rand(4, 10, seed=1) + 0.1
    draws = means[labels] + rand(1500, 12, 10)
    truth = float(means.mean(0).square().sum())
    found = np.array([[s.mean_square for s in (stratified(g, labels), tangent.Gradients.of(g))] for g in draws])
    error = found.std(0) / len(found) ** 0.5
    assert abs(found[:, 0].mean() - truth) < 3 * error[0]
    between = float((means - means.mean(0)).square().sum()) / 4  # low by the classes' variance over n - 1
    assert abs(found[:, 1].mean() - (truth - between / 11)) < 3 * error[1]
    assert between / 11 > 15 * error[1]


def test_the_mean_square_of_a_stratified_sample_is_made_of_products_of_different_examples():
    g, labels = rand(9, 6) + 0.3, torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    sizes = labels.bincount()
    total = 0.0
    for i, j in itertools.permutations(range(9), 2):
        n = int(sizes[labels[i]])
        weight = n / (n - 1) if labels[i] == labels[j] else 1.0  # pairs of a class stand in for its squares as well
        total += weight * float(g[i] @ g[j])
    sums = stratified(g, labels)
    assert sums.mean_square == pytest.approx(total / 81, rel=1e-12)
    assert sums.coherence == pytest.approx(total / 81 / float(g.square().sum(1).mean()), rel=1e-12)
    for name in ("count", "reach", "coverage", "windows", "individual_norm"):  # the classes do not matter to these
        assert getattr(sums, name) == pytest.approx(getattr(tangent.Gradients.of(g), name), rel=1e-12)


def test_a_class_with_one_example_takes_the_variance_within_the_others():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    means = 3.0 * rand(3, 10, seed=2)
    draws = means[labels] + rand(1500, 7, 10)  # the same variance in all classes: then it is without bias as well
    truth = float((means[labels].mean(0)).square().sum())
    found = np.array([stratified(g, labels).mean_square for g in draws])
    assert abs(found.mean() - truth) < 3 * found.std() / len(found) ** 0.5
    with pytest.raises(ValueError, match="no two are of the same class"):
        _ = stratified(draws[0, ::3], labels[::3]).mean_square


def test_closed_classes_join_closed_classes_only():
    g = rand(4, 3)
    closed = tangent.Gradients.of(g).as_stratum()
    with pytest.raises(ValueError, match="cannot join a stratified sample"):
        _ = closed + tangent.Gradients.of(g)
    with pytest.raises(ValueError, match="these are 1 closed ones already"):
        closed.as_stratum()


@pytest.mark.parametrize(("num_windows", "reach"), [(1, 16), (4, 4), (16, 1)])
def test_in_the_model_of_coverage_coherence_and_windows_tell_the_number_of_windows(num_windows, reach):
    """Each wrong positive moves its own window of r positions along one vector; negatives are right, and silent."""
    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)
    num = 200 * num_windows
    g = torch.zeros(2 * num, num_windows * reach, 2, dtype=torch.float64)
    for index in range(num):
        start = index % num_windows * reach
        g[index, start : start + reach] = -direction / reach
    sums = tangent.Gradients.of(g)
    assert sums.coherence == pytest.approx(1 / (2 * num_windows), abs=2 / num)  # 1/(2K), and the pairs left out
    assert sums.reach == pytest.approx(reach, rel=1e-12)
    assert sums.coverage == pytest.approx(num_windows * reach, rel=1e-12)
    assert sums.windows == pytest.approx(num_windows, rel=1e-12)


def test_positions_are_all_axes_but_the_channels():
    g = torch.zeros(3, 2, 4, 4)
    g[:, :, 1, 2] = 1.0  # one position, two channels
    assert tangent.Gradients.of(g, -3).reach == pytest.approx(1.0)
    assert tangent.Gradients.of(g, -1).reach == pytest.approx(2.0)  # with the wrong axis, channels count


def test_first_order_gain_bounds_what_a_prompt_gains_for_a_convex_loss():
    """These examples are the whole population: each twice, as a class without scatter, so that `mean_norm` is exact."""
    x, weight, labels = rand(64, 5), rand(5, 3, seed=1), torch.arange(64) % 3

    def losses(logits):
        return functional.cross_entropy(logits, labels, reduction="none")

    def loss(prompt):
        return float(losses((x + prompt) @ weight).mean())

    zeros = {"here": torch.zeros(64, 5, dtype=torch.float64)}
    g = tangent.example_gradients(lambda shifts: (x + shifts["here"]) @ weight, zeros, losses)["here"]
    sums = stratified(g.repeat_interleave(2, 0), torch.arange(64).repeat_interleave(2))
    start = loss(torch.zeros(5, dtype=torch.float64))
    for seed in range(50):
        direction = rand(5, seed=seed)
        for size in (0.01, 0.3, 3.0):
            assert start - loss(size * direction / direction.norm()) <= size * sums.mean_norm + 1e-12
    best = -1e-4 * sums.total / sums.total.norm()
    assert start - loss(best) == pytest.approx(1e-4 * sums.mean_norm, rel=1e-3)  # and tight


# ----------------------------------------------------------------------------------- second order: T3


@pytest.fixture
def linear():
    """Logits that are linear in a prompt, and targets."""
    jacobian, start, target = rand(6, 3, 8), rand(6, 3, seed=1), rand(6, 3, seed=2)
    return jacobian, start, target, lambda prompt: start + torch.einsum("ecp,p->ec", jacobian, prompt)


def squared(target):
    return lambda y: (y - target).square().sum(1).mean() / 2


def test_newton_solves_a_linear_model_with_squared_loss(linear):
    jacobian, start, target, model = linear
    prompt, ridge = torch.zeros(8, dtype=torch.float64), 0.3
    found = tangent.newton([tangent.ExampleSet(model, squared(target))], prompt, ridge, tolerance=1e-14)
    rows = jacobian.flatten(0, 1) / 6**0.5
    hessian = rows.T @ rows + ridge * torch.eye(8, dtype=torch.float64)
    gradient = rows.T @ (start - target).flatten() / 6**0.5
    torch.testing.assert_close(found.gradient, gradient, **EXACT)
    torch.testing.assert_close(found.step, torch.linalg.solve(hessian, gradient), rtol=1e-10, atol=1e-12)

    def regularised(prompt):
        return float(squared(target)(model(prompt)) + ridge / 2 * prompt.square().sum())

    fall = regularised(prompt) - regularised(-found.step)
    assert found.gain == pytest.approx(fall, rel=1e-12)
    for seed in range(20):  # nothing does better
        assert regularised(-found.step + 0.1 * rand(8, seed=seed)) > regularised(-found.step)


def test_a_solve_that_stops_early_states_what_its_own_step_gains(linear):
    _, _, target, model = linear
    prompt, ridge = torch.zeros(8, dtype=torch.float64), 1e-3

    def regularised(prompt):
        return float(squared(target)(model(prompt)) + ridge / 2 * prompt.square().sum())

    gains = []
    for num in (1, 2, 4, 20):
        found = tangent.newton([tangent.ExampleSet(model, squared(target))], prompt, ridge, max_products=num)
        assert found.num_products <= num
        assert found.gain == pytest.approx(regularised(prompt) - regularised(-found.step), rel=1e-9)
        gains.append(found.gain)
    assert gains == sorted(gains)
    assert gains[0] < gains[-1]


def test_parts_of_the_examples_give_what_all_of_them_give():
    x, weight, out, labels = rand(7, 4), rand(4, 5, seed=1), rand(5, 3, seed=2), torch.arange(7) % 3
    prompt, classes = torch.zeros(4, dtype=torch.float64), rand(2, 3, seed=3)

    def part(some):
        def loss(y):
            return functional.cross_entropy(y, labels[some], reduction="sum") / 7

        return tangent.ExampleSet(lambda prompt: torch.tanh((x[some] + prompt) @ weight) @ out, loss)

    def shifted(some):
        own = x[some]
        return lambda shifts: torch.tanh((own + shifts["here"]) @ weight) @ out, {"here": torch.zeros_like(own)}

    slices = [slice(0, 3), slice(3, 4), slice(4, 7)]
    whole = tangent.newton([part(slice(None))], prompt, 0.1, max_products=2)
    apart = tangent.newton([part(some) for some in slices], prompt, 0.1, max_products=2)
    assert (apart.gain, apart.num_products) == (pytest.approx(whole.gain, rel=1e-12), whole.num_products)
    torch.testing.assert_close(apart.step, whole.step, **EXACT)
    torch.testing.assert_close(
        tangent.tangent_kernels([shifted(some) for some in slices], classes)["here"],
        tangent.tangent_kernels([shifted(slice(None))], classes)["here"],
        **EXACT,
    )


def test_products_are_those_of_the_gauss_newton_matrix_and_not_of_the_hessian():
    x, weight, out, labels = rand(6, 4), rand(4, 5, seed=1), rand(5, 3, seed=2), torch.arange(6) % 3

    def model(prompt):
        return torch.tanh((x + prompt) @ weight) @ out

    def loss(y):
        return functional.cross_entropy(y, labels)

    prompt = torch.zeros(4, dtype=torch.float64)
    gradient, product = tangent.gauss_newton([tangent.ExampleSet(model, loss)], prompt)
    jacobian = torch.autograd.functional.jacobian(model, prompt)  # (example, class, prompt)
    p = model(prompt).softmax(1)
    curvature = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / 6
    matrix = torch.einsum("ecp,ecd,edq->pq", jacobian, curvature, jacobian)
    hessian = torch.autograd.functional.hessian(lambda d: loss(model(d)), prompt)
    for seed in range(3):
        direction = rand(4, seed=seed)
        torch.testing.assert_close(product(direction), matrix @ direction, **EXACT)
        assert not torch.allclose(product(direction), hessian @ direction, rtol=1e-3)
    torch.testing.assert_close(gradient, torch.autograd.functional.jacobian(lambda d: loss(model(d)), prompt), **EXACT)


def test_newton_wants_a_ridge(linear):
    _, _, target, model = linear
    with pytest.raises(ValueError, match=r"ridge is 0\.0; the step needs a positive one"):
        tangent.newton([tangent.ExampleSet(model, squared(target))], torch.zeros(8, dtype=torch.float64), 0.0)


def test_a_prompt_that_the_network_does_not_feel_gains_nothing():
    norm = nn.LayerNorm(5).double()  # blind to the direction 1
    x, labels = rand(6, 5), torch.arange(6) % 5
    ones = torch.ones(5, dtype=torch.float64)
    part = tangent.ExampleSet(lambda prompt: norm(x + prompt * ones), lambda y: functional.cross_entropy(y, labels))
    found = tangent.newton([part], torch.zeros(1, dtype=torch.float64), 1.0)
    assert abs(found.gain) < 1e-20


# ----------------------------------------------------------------------------------------- kernels: T4


def test_kernels_are_traces_of_products_of_jacobians(network):
    x, weights, shifts, _ = network
    model = two_places(x, weights)
    kernels = tangent.tangent_kernels([(model, shifts)])
    for place, zero in shifts.items():
        jacobian = torch.autograd.functional.jacobian(lambda s, place=place: model({**shifts, place: s}), zero)
        own = torch.stack([jacobian[i, :, i] for i in range(7)])  # an example's logits and its own shift
        torch.testing.assert_close(kernels[place], torch.einsum("icp,jcp->ij", own, own), **EXACT)


def test_a_linear_network_has_a_constant_kernel_whose_alignment_is_zero():
    x, weight = rand(6, 4), rand(4, 3, seed=1)
    zeros = {"here": torch.zeros(6, 4, dtype=torch.float64)}
    kernel = tangent.tangent_kernels([(lambda shifts: (x + shifts["here"]) @ weight, zeros)])["here"]
    torch.testing.assert_close(kernel, torch.full((6, 6), float(weight.square().sum()), dtype=torch.float64), **EXACT)
    assert tangent.alignment(kernel, tangent.label_kernel(torch.arange(6) % 2)) == pytest.approx(0.0, abs=1e-9)


def test_random_directions_give_the_kernel_in_the_mean(network):
    x, weights, shifts, _ = network
    model = two_places(x, weights)
    exact = tangent.tangent_kernels([(model, shifts)])["late"]
    generator = torch.Generator().manual_seed(0)
    frames = [tangent.frame(2, 3, generator).double() for _ in range(300)]
    draws = torch.stack([tangent.tangent_kernels([(model, shifts)], one)["late"] for one in frames])
    error = draws.std(0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - exact).abs() < 4.5 * error).all())
    for one in frames[:3]:
        torch.testing.assert_close(one @ one.T, 1.5 * torch.eye(2, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert torch.equal(tangent.frame(5, 3, generator), torch.eye(3))


@pytest.mark.parametrize("change", ["scale", "shift", "order"])
def test_alignment_knows_no_scale_no_constant_and_no_order(change):
    kernel, labels = tangent.label_kernel(torch.arange(10) // 3) + 0.1 * rand(10, 10), torch.arange(10) % 4
    kernel, target = kernel @ kernel.T, tangent.label_kernel(labels)
    before = tangent.alignment(kernel, target)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    after = {
        "scale": lambda: tangent.alignment(3 * kernel, target),
        "shift": lambda: tangent.alignment(kernel + 7, target),
        "order": lambda: tangent.alignment(kernel[order][:, order], target[order][:, order]),
    }[change]()
    assert after == pytest.approx(before, rel=1e-9)
    assert tangent.alignment(kernel[order][:, order], target) != pytest.approx(before, rel=1e-3)


def test_alignment_of_a_kernel_with_itself_is_one_and_with_a_constant_zero():
    kernel = tangent.label_kernel(torch.arange(6) % 2)
    assert tangent.alignment(kernel, kernel) == pytest.approx(1.0, rel=1e-12)
    assert tangent.alignment(kernel, torch.ones(6, 6)) == 0.0
    assert tangent.alignment(kernel, 1 - kernel) == pytest.approx(-1.0, rel=1e-12)


def test_alignment_is_that_of_pairs_of_different_examples():
    """Against a least-squares fit of row and column effects to the entries off the diagonal."""
    kernel, labels = rand(7, 7), torch.arange(7) % 3
    kernel, target = kernel @ kernel.T, tangent.label_kernel(labels)
    off = [(i, j) for i in range(7) for j in range(7) if i != j]
    effects = torch.zeros(len(off), 7, dtype=torch.float64)
    for row, (i, j) in enumerate(off):
        effects[row, i] += 1
        effects[row, j] += 1
    one, two = (
        values - effects @ torch.linalg.lstsq(effects, values).solution
        for values in (torch.stack([matrix[pair] for pair in off])[:, None] for matrix in (kernel, target))
    )
    expected = float((one * two).sum() / (one.norm() * two.norm()))
    assert tangent.alignment(kernel, target) == pytest.approx(expected, rel=1e-9)
    assert tangent.alignment(kernel + torch.diag(rand(7, seed=3)), target) == pytest.approx(expected, rel=1e-9)


def test_labels_that_have_nothing_to_do_with_a_kernel_do_not_align_with_it():
    features = rand(12, 5)
    kernel, generator = features @ features.T + 3 * torch.eye(12), torch.Generator().manual_seed(0)
    labels = torch.arange(12) // 2
    draws = [
        tangent.alignment(kernel, tangent.label_kernel(labels[torch.randperm(12, generator=generator)]))
        for _ in range(600)
    ]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / len(draws) ** 0.5
    with pytest.raises(ValueError, match="alignment of kernels of 3 examples; give at least four"):
        tangent.alignment(kernel[:3, :3], kernel[:3, :3])


def test_signed_root_keeps_the_sign():
    assert tangent.signed_root(4.0) == 2.0
    assert tangent.signed_root(-9.0) == -3.0
    assert math.copysign(1, tangent.signed_root(0.0)) == 1
