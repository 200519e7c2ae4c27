"""Closed forms of the theorem on reach against exact chains, rationals, other quadratures and their own limits."""

import functools
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from apthory.theory import reach
from apthory.theory.reach import Problem

GRID = [(K, m) for K in (1, 2, 3, 10, 100, 10**4, 10**6) for m in (1, 2, 5, 50, 5000, 10**6)]


def chain_moments(K: int, m: int) -> tuple[Fraction, Fraction]:
    """E N and E N^2 by rationals, from the Markov chain of how many windows lack how many visits."""

    @functools.cache
    def moments(missing: tuple[int, ...]) -> tuple[Fraction, Fraction]:  # windows that lack 1, ..., m visits
        open_windows = sum(missing)
        if not open_windows:
            return Fraction(0), Fraction(0)
        first = second = Fraction(0)  # of what follows the next useful sample
        for lacking, count in enumerate(missing):
            if count:
                after = list(missing)
                after[lacking] -= 1
                if lacking:
                    after[lacking - 1] += 1
                mean, square = moments(tuple(after))
                first += Fraction(count, open_windows) * mean
                second += Fraction(count, open_windows) * square
        p = Fraction(open_windows, 2 * K)  # a sample is useful; the wait is geometric
        wait, wait_square = 1 / p, (2 - p) / p**2
        return wait + first, wait_square + 2 * wait * first + second

    return moments((0,) * (m - 1) + (K,))


@pytest.mark.parametrize(("K", "m"), [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (5, 2), (8, 1), (6, 3)])
def test_mean_and_deviation_are_those_of_the_chain_of_visits(K: int, m: int):
    mean, square = chain_moments(K, m)
    assert reach.expected_samples(K, 1, m) == pytest.approx(float(mean), rel=1e-12)
    assert reach.samples_deviation(K, 1, m) == pytest.approx(math.sqrt(square - mean**2), rel=1e-10)


def test_values_at_a_gap_of_two_steps():
    found = [round(reach.expected_samples(P, r, 2 * r), 1) for P in (16, 64) for r in (1, math.isqrt(P), P)]
    assert found == [165.6, 88.4, 64.0, 867.7, 353.9, 256.0]


@pytest.mark.parametrize("K", [2, 7, 1000, 10**6])
def test_one_visit_is_the_coupon_collector(K: int):
    harmonic = math.fsum(1 / k for k in range(1, K + 1))
    assert reach.expected_samples(K, 1, 1) == pytest.approx(2 * K * harmonic, rel=1e-13)
    assert reach.distinct_samples(K, 1) == pytest.approx(2 * K * harmonic, rel=1e-13)
    assert reach.expected_samples(K, 1, 2) > 2 * K * harmonic * 1.1  # and two visits are not


@pytest.mark.parametrize(("K", "m"), [(4, 3), (50, 20), (300, 2)])
def test_quadrature_agrees_with_an_adaptive_one(K: int, m: int):

    def waiting(t: float) -> float:
        return 1 - stats.gamma.cdf(t, m) ** K

    cuts = [0, m, 2 * m + 10, 6 * m + 60]
    parts = [
        integrate.quad(waiting, a, b, epsabs=1e-9, epsrel=1e-10, limit=200)[0] for a, b in itertools.pairwise(cuts)
    ]
    assert reach.expected_samples(K, 1, m) == pytest.approx(2 * K * sum(parts), rel=1e-8)


@pytest.mark.parametrize(("K", "m"), GRID)
def test_quadrature_is_converged_and_within_its_bounds_up_to_a_million(K: int, m: int, monkeypatch: pytest.MonkeyPatch):
    value, deviation = reach.expected_samples(K, 1, m), reach.samples_deviation(K, 1, m)
    finer = reach._gauss_legendre(700)
    monkeypatch.setattr(reach, "_gauss_legendre", lambda: finer)
    reach._longest_wait.cache_clear()
    assert value == pytest.approx(reach.expected_samples(K, 1, m), rel=1e-12)
    assert deviation == pytest.approx(reach.samples_deviation(K, 1, m), rel=1e-6)
    low, high = reach.bounds(K, 1, m)
    assert low * (1 - 1e-12) <= value <= high * (1 + 1e-12)
    order = K * (m + math.log(K))
    assert order * (1 - 1e-12) <= value
    assert high <= 7 * order


def test_the_mean_depends_on_windows_and_visits_alone():
    assert reach.expected_samples(64, 8, 3) == reach.expected_samples(8, 1, 3)


# ------------------------------------------------------------------------------------------------ rates


def test_local_prompts_need_p_log_p_and_global_ones_p():
    """R3 at one step for all sites, here gap / eta = 2, and that the logarithm's coefficient is 2."""
    positions = 2 ** np.arange(8, 21, 4)
    local = np.array([reach.expected_samples(int(P), 1, 2) for P in positions])
    assert np.allclose([reach.expected_samples(int(P), int(P), 2 * int(P)) / P for P in positions], 4.0)
    rest = local / (2 * positions) - np.log(positions) - np.log(np.log(positions))
    assert np.ptp(rest) < 0.3  # O(1), to np.euler_gamma
    assert abs(rest[-1] - np.euler_gamma) < abs(rest[0] - np.euler_gamma) < 0.6
    assert np.ptp(local / (2 * positions)) > 8  # while the mean per position grows


def test_between_the_factor_of_the_logarithm_is_reached():
    """m / log K held: E N / (2 K m x) tends to one, from below: the bounds' first term is too large."""
    ratios = []
    for K in (10**2, 10**4, 10**6):
        m = round(2 * math.log(K))
        ratios.append(reach.expected_samples(K, 1, m) / (2 * K * m * reach.log_factor(K, m)))
    assert 0.8 < ratios[0] < ratios[1] < ratios[2] < 1


@pytest.mark.parametrize(("K", "m"), [(2, 1), (1000, 3), (10**6, 10**6), (7, 7)])
def test_log_factor_solves_its_equation(K: int, m: int):
    x = reach.log_factor(K, m)
    assert x > 1
    assert x - 1 - math.log(x) == pytest.approx(math.log(K) / m, rel=1e-6)


def test_the_step_decides_how_visits_grow_with_reach():
    problems = [Problem(num_positions=1024, reach=r) for r in (1, 4, 16, 64, 256)]
    visits = {
        rule: [problem.visits(problem.lift(step, rule)) for problem in problems]
        for rule, step in {"sgd": 0.52, "normalized": 0.52, "sign": 0.52, "safe": 1}.items()
    }
    assert visits["sgd"] == [math.ceil(0.9 / 0.52 * r) for r in (1, 4, 16, 64, 256)]
    assert visits["normalized"] == [math.ceil(0.9 / 0.52 * r) for r in (1, 2, 4, 8, 16)]
    assert visits["sign"] == [2] * 5
    assert visits["safe"] == [1] * 5
    assert problems[0].visits(problems[0].lift(0.52, "sign", l1=2)) == 1


# ---------------------------------------------------------------------------------------- the limit law


@pytest.mark.parametrize("m", [1, 2, 5])
def test_the_law_tends_to_gumbels(m: int):
    """The exact law of the Poissonised wait, (1 - Q)^K, approaches it as windows become many."""

    def distance(K: int) -> float:
        law = reach.limit_law(K, 1, m)
        n = law.ppf(np.linspace(0.001, 0.999, 500))
        return float(np.abs(stats.gamma.cdf(n / (2 * K), m) ** K - law.cdf(n)).max())

    distances = [distance(K) for K in (10, 10**3, 10**6)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.01 * m
    K = 10**6
    scale = abs(reach.limit_law(K, 1, m).mean() - reach.expected_samples(K, 1, m)) / reach.samples_deviation(K, 1, m)
    assert scale < 0.02 * m


def test_the_law_tends_to_the_classical_constants():
    K, m = 10**6, 3
    gaps = []
    for K in (10**3, 10**6, 10**12):
        u = reach.limit_law(K, 1, m).kwds["loc"] / (2 * K)
        gaps.append(abs(u - math.log(K) - (m - 1) * math.log(math.log(K)) + math.lgamma(m)))
    assert gaps[0] > gaps[1] > gaps[2]
    with pytest.raises(ValueError, match="negative binomial"):
        reach.limit_law(16, 16, 3)


# -------------------------------------------------------------------------------- errors before the end


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.integers(1, 6), st.floats(0.001, 0.499))
def test_samples_for_error_is_the_smallest_number(K: int, m: int, error: float):
    enough = reach.samples_for_error(error, K, 1, m)
    assert reach.error_left(enough, K, 1, m) <= error < reach.error_left(enough - 1, K, 1, m)


def test_error_left_is_a_binomial_tail():
    K, N, m = 5, 23, 3
    p = Fraction(1, 2 * K)
    exact = sum(math.comb(N, j) * p**j * (1 - p) ** (N - j) for j in range(m)) / 2
    assert reach.error_left(N, 5 * 7, 7, m) == pytest.approx(float(exact), rel=1e-12)
    assert reach.error_left(N, 5, 1) == pytest.approx(0.5 * (1 - 1 / (2 * K)) ** N, rel=1e-12)
    assert reach.error_left(23, 5, 1, 3) > reach.error_left(23.5, 5, 1, 3) > reach.error_left(24, 5, 1, 3)
    assert reach.error_left(np.array([0.0, 1.0, 2.0]), 5, 1, 3).tolist() == [0.5, 0.5, 0.5]


def test_local_prompts_lead_before_global_ones_repair_and_trail_after():
    """R4: the global prompt turns at about 2 P (b - kappa) / eta samples."""
    P, turn = 256, 2 * 256 * 0.5 / 0.52
    local, wide = (Problem(num_positions=P, reach=r) for r in (1, P))
    early, late = (
        [float(reach.error_left(int(N), P, p.reach, p.error_visits(p.lift(0.52)))) for p in (local, wide)]
        for N in (turn / 2, 1.5 * turn)
    )
    assert early[0] < early[1] > 0.49
    assert late[0] > late[1] < 1e-6


def test_batches_count_in_steps():
    low, high = reach.expected_steps(64, 1, 14, 8)
    assert low == reach.expected_samples(64, 1, 14) / 8
    assert high - low == pytest.approx(7 / 8)
    assert reach.expected_steps(64, 1, 14, 1) == (8 * low, 8 * low)


def test_batches_of_the_order_of_the_logarithm_let_local_prompts_finish_in_about_p_steps():
    """R3'': steps per position stay at about 2 gap / eta for large batches, and grow with the logarithm for B = 1."""
    steps = {}
    for P in (2**10, 2**18):
        local = Problem(num_positions=P, reach=1)
        for B in (1, 4 * round(math.log(P))):
            steps[P, B] = reach.expected_steps(P, 1, local.visits(local.lift(0.52), B), B).high / P
    assert steps[2**18, 1] / steps[2**10, 1] > 1.6
    assert steps[2**18, 48] / steps[2**10, 28] < 1.1


# ------------------------------------------------------------------------------------- soft attention


def test_soft_attention_loses_the_logarithm_beyond_a_share():
    problem = Problem(num_positions=64, reach=1)
    assert [math.isinf(reach.soft_samples(problem, 0.52, q)) for q in (0.0, 0.1, 0.25, 0.26, 0.5)] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert reach.soft_samples(problem, 0.52, 1.0) == pytest.approx(2 * 0.5 / 0.52)  # mean pooling: each positive counts


@pytest.mark.parametrize(("r", "q"), [(1, 0.3), (1, 0.5), (4, 0.3), (4, 0.9)])
def test_soft_samples_solve_the_differential_equation(r: int, q: float):
    """Small steps of Euler's method, instead of the closed form between levels."""
    problem, eta = Problem(num_positions=64, reach=r), 0.52
    own, shared = (1 - q) ** 2 * eta / r, 2 * q - q**2
    level, time, dt = 0.0, 0.0, 1e-3
    while shared * level <= 0.5 and time < 20:
        needed = math.ceil((0.9 - shared * level) / own)
        level += dt * eta / r * stats.poisson.cdf(needed - 1, time)
        time += dt
    assert reach.soft_samples(problem, eta, q) == pytest.approx(2 * time, rel=5e-3)


# ------------------------------------------------------------------------------------------- validation


def test_ties_are_exact_in_rationals():
    tenth = Fraction(1, 10)
    problem = Problem(num_positions=9, reach=3, signal=1, nuisance=15 * tenth, margin=4 * tenth)
    assert problem.gap == Fraction(9, 10)
    assert problem.visits(problem.lift(9 * tenth)) == 3
    assert problem.visits(problem.lift(9 * tenth - Fraction(1, 10**9))) == 4
    assert problem.error_visits(problem.lift(15 * tenth)) == 2  # one visit lifts by exactly b - kappa: a tie is wrong


def test_a_step_lasts_while_negatives_keep_their_margin():
    problem = Problem(num_positions=4, reach=1)
    assert problem.is_lasting(problem.lift(1, "safe"))
    assert problem.is_lasting(problem.lift(2 * 0.599))
    assert not problem.is_lasting(problem.lift(2.2))


def test_a_batch_may_overshoot_where_single_samples_do_not():
    """Two positions, a step of 2: one visit repairs; after one of four, a whole batch of that window lifts by 2.5."""
    problem = Problem(num_positions=2, reach=1)
    lift = problem.lift(2)
    assert problem.is_lasting(lift)
    assert problem.visits(lift, 4) == 2
    limit = problem.nuisance + problem.signal - problem.margin
    assert lift / 4 + 4 * lift / 4 > limit
    assert not problem.is_lasting(lift, 4)
    assert problem.is_lasting(problem.lift(1), 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reach.expected_samples(16, 5, 1), "take 4 or 8"),
        (lambda: reach.expected_samples(16, 17, 1), "positions; take 16$"),
        (lambda: reach.expected_samples(16, 0, 1), "reach is 0"),
        (lambda: reach.expected_samples(16, 4, 0), "visits is 0"),
        (lambda: reach.samples_for_error(0.5, 16, 4), "below 0.5"),
        (lambda: reach.error_left(-1, 16, 4), "negative"),
        (lambda: reach.expected_steps(16, 4, 1, 0), "batch_size is 0"),
        (lambda: Problem(num_positions=4, reach=1, nuisance=0.5), "nuisance 0.5"),
        (lambda: Problem(num_positions=4, reach=1).lift(1.1, "safe"), "at most 1"),
        (lambda: Problem(num_positions=4, reach=1).lift(0), "positive"),
        (lambda: reach.soft_samples(Problem(num_positions=4, reach=1), 0.5, 1.5), "share"),
    ],
)
def test_errors_name_the_value_and_the_way_out(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
