"""The counting process against closed forms, and trained prompts against the counting process."""

import itertools

import numpy as np
import pytest
import torch

from apthory.studies import sample_complexity
from apthory.theory import growth, reach, simulation
from apthory.theory.reach import Problem

STEP = 0.52


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_count(K: int, visits: int, random: np.random.Generator) -> int:
    """One sample after another."""
    missing, number = [visits] * K, 0
    while max(missing) > 0:
        number += 1
        window, is_positive = random.integers(K), random.integers(2)
        missing[window] -= is_positive
    return number


def distance(samples: np.ndarray, num_positions: int, width: int, visits: int) -> float:
    """Of the mean from the closed form, in standard errors."""
    deviation = reach.samples_deviation(num_positions, width, visits)
    return abs(samples.mean() - reach.expected_samples(num_positions, width, visits)) / deviation * len(samples) ** 0.5


# ------------------------------------------------------------------------------------ the counting process


@pytest.mark.parametrize(("P", "r", "m"), [(1, 1, 1), (16, 1, 2), (16, 4, 7), (16, 16, 28), (200, 2, 4)])
def test_counts_agree_with_the_closed_form_and_with_a_slow_loop(P: int, r: int, m: int):
    """Five points, four standard errors each: fewer than 4 of 10,000 seeds fail."""
    samples = simulation.count_samples(P, r, m, 4000, np.random.default_rng(1))
    assert samples.shape == (4000,)
    assert samples.min() >= P // r * m
    assert distance(samples, P, r, m) < 4
    assert samples.std() == pytest.approx(reach.samples_deviation(P, r, m), rel=0.12)
    random = np.random.default_rng(2)
    slow = np.array([slow_count(P // r, m, random) for _ in range(60)])
    assert distance(slow, P, r, m) < 4
    assert distance(samples, P, r, m + 1) > 8  # and nobody else's mean would do


def test_the_law_of_counts_is_gumbels_in_large_sites_only():
    quantiles = np.linspace(0.1, 0.9, 9)
    gaps = []
    for P in (4, 512):
        samples = simulation.count_samples(P, 1, 1, 3000, np.random.default_rng(0))
        seen = [np.mean(samples <= n) for n in reach.limit_law(P, 1, 1).ppf(quantiles)]
        gaps.append(np.abs(seen - quantiles).max())
    assert gaps[1] < 0.03 < gaps[0]


def test_ten_thousand_repetitions_do_not_depend_on_the_length_of_chunks():
    for length in (3, 1000):
        samples = simulation._count_block(4, 2, 3000, length, np.random.default_rng(0))
        assert distance(samples, 4, 1, 2) < 4


# ------------------------------------------------------------------------------------------------ networks


def networks(problem: Problem) -> list[simulation.ReadoutNetwork]:
    return [
        simulation.Attention(problem), simulation.Attention(problem, 0.3), simulation.Convolution(problem),
    ]  # fmt: skip


@pytest.mark.parametrize("r", [1, 4, 16])
def test_a_zero_prompt_reads_out_the_value_and_lifts_are_what_a_prompt_adds(r: int):
    problem = Problem(num_positions=16, reach=r)
    window = torch.arange(problem.num_windows).expand(3, -1)
    value = torch.randn(window.shape, generator=generator(), dtype=torch.float64)
    prompt = 0.3 * torch.randn((3, 16, 2), generator=generator(1), dtype=torch.float64)
    for network in networks(problem):
        z = network.tokens(window, value)
        plain = network(z, torch.zeros_like(prompt)[:, None])
        torch.testing.assert_close(plain, value, rtol=0, atol=1e-12)
        torch.testing.assert_close(network(z, prompt[:, None]) - plain, network.lifts(prompt), rtol=0, atol=1e-12)


@pytest.mark.parametrize("r", [1, 4, 16])
def test_only_the_active_window_sees_a_gradient_unless_attention_is_soft(r: int):
    problem = Problem(num_positions=16, reach=r)
    for network in networks(problem):
        prompt = torch.zeros((1, 16, 2), dtype=torch.float64, requires_grad=True)
        window = torch.zeros((1, 1), dtype=torch.int64)
        network(network.tokens(window, window.double()), prompt[:, None]).sum().backward()
        along = prompt.grad[0] @ network.direction
        torch.testing.assert_close(prompt.grad[0], along[:, None] * network.direction)  # along one direction
        outside = along[r:]
        if getattr(network, "background", 0.0):
            torch.testing.assert_close(outside, torch.full_like(outside, 0.3 / 16))
        else:
            torch.testing.assert_close(along[:r], torch.full_like(along[:r], 1 / r))
            assert not outside.any()


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("kind", ["attention", "convolution"])
@pytest.mark.parametrize(
    ("r", "rule", "step"),
    [
        (1, "sgd", STEP),
        (4, "sgd", STEP),
        (16, "sgd", STEP),
        (4, "normalized", STEP),
        (4, "sign", 0.3),
        (4, "safe", 0.9),
    ],
)
def test_training_is_counting_step_by_step(kind: str, r: int, rule: str, step: float):
    """R1, exactly: windows are repaired when they had m positive samples, and lifts are whole visits."""
    problem = Problem(num_positions=16, reach=r)
    network = simulation.build(kind, problem)
    lift = problem.lift(step, rule, l1=float(network.direction.abs().sum()))
    m, K = problem.visits(lift), problem.num_windows
    assert problem.is_lasting(lift)
    stream = list(itertools.islice(simulation.one_pass(problem, 5, 1, generator(3)), 150))
    counts = torch.zeros(5, K, dtype=torch.float64)
    for samples, prompt in zip(stream, simulation.train_prompts(network, stream, step=step, rule=rule), strict=True):
        counts += torch.nn.functional.one_hot(samples.window[:, 0], K) * (samples.label == 1)
        expected = counts.clamp(max=m) * float(lift)
        torch.testing.assert_close(network.lifts(prompt), expected, rtol=0, atol=1e-12)
    assert (counts >= m).any()


def test_a_step_that_does_not_last_is_undone_by_negatives():
    """The condition of R1 is needed: beyond it a repaired window is pushed back."""
    problem = Problem(num_positions=2, reach=1)
    assert not problem.is_lasting(problem.lift(2.5))
    network = simulation.Attention(problem)
    lifts = [
        network.lifts(prompt)
        for prompt in itertools.islice(
            simulation.train_prompts(network, simulation.one_pass(problem, 8, 1, generator()), step=2.5), 60
        )
    ]
    moves = torch.stack(lifts).diff(dim=0)
    assert (moves < 0).any()
    prompts = simulation.train_prompts(network, simulation.one_pass(problem, 2, 1, generator()), step=1e-3)
    with pytest.raises(RuntimeError, match="not repaired yet"):
        simulation.steps_until(network, prompts, limit=20)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("r", [1, 16])
def test_sgd_agrees_with_the_closed_form(batch_size: int, r: int):
    point = sample_complexity.measure_descent("attention", [[16, r, 150]], STEP, batch_size=batch_size, seed=5)["rows"][
        0
    ]
    low, high = reach.expected_steps(16, r, point["visits"], batch_size)
    error = point["deviation"] / point["repeats"] ** 0.5
    assert low - 4 * error <= point["mean"] <= high + 4 * error
    assert point["mean"] < reach.expected_steps(16, r, 2 * point["visits"], batch_size).low


def test_batches_take_the_counted_number_of_steps_exactly():
    """R3'': T = ceil(N / B) on the same samples, with visits that lift 1 / B as much."""
    problem, B = Problem(num_positions=8, reach=2), 4
    network, m = simulation.Attention(problem), problem.visits(problem.lift(STEP), B)
    stream = list(itertools.islice(simulation.one_pass(problem, 6, B, generator(7)), 200))
    steps = simulation.steps_until(network, simulation.train_prompts(network, stream, step=STEP))
    windows = torch.cat([samples.window for samples in stream], 1)
    positive = torch.cat([samples.label for samples in stream], 1) == 1
    visits = (torch.nn.functional.one_hot(windows, 4) * positive[..., None]).cumsum(1)
    first = (visits >= m).all(2).double().argmax(1) + 1
    assert steps.tolist() == [-(-int(n) // B) for n in first]


@pytest.mark.parametrize(("r", "rule"), [(1, "sgd"), (4, "normalized"), (4, "sign")])
def test_after_many_epochs_only_windows_without_a_positive_sample_are_wrong(r: int, rule: str):
    problem, n = Problem(num_positions=16, reach=r), 20
    network = simulation.Attention(problem)
    stream = list(
        simulation.epochs(problem, 30, 1, generator(2), num_samples=n,
                          num_epochs=problem.visits(problem.lift(STEP, rule)))
    )  # fmt: skip
    *_, prompt = simulation.train_prompts(network, stream, step=STEP, rule=rule)
    first = stream[:n]  # the first epoch shows every sample once
    seen = torch.zeros(30, problem.num_windows, dtype=torch.bool)
    for samples in first:
        rows = torch.arange(30)[samples.label[:, 0] == 1]
        seen[rows, samples.window[rows, 0]] = True
    unseen = (~seen).double().mean(1) / 2
    np.testing.assert_allclose(simulation.expected_error(network, prompt), unseen, atol=1e-12)
    assert 0 < unseen.mean() < 0.5


def test_epochs_show_a_fixed_sample_in_new_orders():
    problem = Problem(num_positions=64, reach=1)
    batches = list(simulation.epochs(problem, 2, 4, generator(), num_samples=10, num_epochs=2))
    assert [batch.window.shape[1] for batch in batches] == [4, 4, 2] * 2
    passes = [torch.cat([batch.window for batch in part], 1) for part in (batches[:3], batches[3:])]
    assert torch.equal(passes[0].sort(1).values, passes[1].sort(1).values)
    assert not torch.equal(*passes)


def test_measured_error_is_the_expected_one():
    problem = Problem(num_positions=8, reach=1)
    network = simulation.Attention(problem)
    prompt = torch.zeros((2, 8, 2), dtype=torch.float64)
    prompt[0, :4, 1], prompt[1, :, 1] = 1.0, 3.0  # half of the windows repaired; all lifted so far that negatives fail
    assert simulation.expected_error(network, prompt).tolist() == [0.25, 0.5]
    samples = simulation.draw_samples(problem, 2, 4000, generator())
    np.testing.assert_allclose(simulation.measured_error(network, prompt, samples), [0.25, 0.5], atol=0.035)


def test_departures_are_departures():
    problem = Problem(num_positions=16, reach=4)
    plain = simulation.draw_samples(problem, 2, 500, generator())
    assert set((plain.value + 1.5).unique().tolist()) == {-1.0, 1.0}
    assert plain.noise is None
    varied = simulation.draw_samples(problem, 2, 500, generator(), token_noise=0.5, spread=0.4)
    strength = (varied.value + 1.5) * varied.label
    assert 0.6 <= strength.min() < 0.65
    assert 1.35 < strength.max() <= 1.4
    assert varied.noise.std() == pytest.approx(0.5, rel=0.05)


def test_equal_generators_give_equal_trainings():
    first, second, other = (
        sample_complexity.measure_descent("attention", [[16, 4, 20]], STEP, seed=s)["rows"] for s in (0, 0, 1)
    )
    assert first[0]["samples"].tolist() == second[0]["samples"].tolist() != other[0]["samples"].tolist()


def test_a_map_that_square_windows_do_not_tile_is_refused():
    for P, r in ((8, 1), (16, 2), (64, 32)):
        with pytest.raises(ValueError, match="square"):
            simulation.Convolution(Problem(num_positions=P, reach=r))


# ------------------------------------------------------------------------------------------------ the law


@pytest.mark.parametrize(
    ("law", "values"),
    [
        ("P", lambda P: 4.0 * P),
        ("P log P", lambda P: 2.0 * P * np.log(P) + 3.0 * P),
        ("P^a", lambda P: 3.0 * P**1.3),
    ],
)
def test_the_law_that_made_the_means_is_chosen(law: str, values):
    P = np.array([16.0, 64.0, 256.0, 1024.0, 4096.0])
    means = values(P)
    fits = {name: growth.fit_law(name, P, means, 0.003 * means) for name in growth.LAWS}
    assert min(fits, key=lambda name: fits[name].aic) == law
    np.testing.assert_allclose(fits[law].values, means, rtol=1e-5)
    assert fits["P^a"].shape == pytest.approx(1.3, abs=1e-5) or law != "P^a"
    assert fits["P log P"].shape == pytest.approx(2.0, abs=1e-9) or law != "P log P"


def test_growth_at_reach_one_is_p_log_p():
    sizes, random = [16, 64, 256, 512], np.random.default_rng(0)
    samples = [simulation.count_samples(P, 1, 2, 300, random) for P in sizes]
    fits, drawn = growth.compare_laws(sizes, samples, random, num_draws=30)
    assert fits["P log P"].aic < min(fits["P"].aic, fits["P^a"].aic)
    assert all(draw.shape > 1 for draw in drawn["P log P"])
    with pytest.raises(ValueError, match="no law"):
        growth.fit_law("P^2", *np.ones((3, 2)))
