"""Claims about statistics: values against loops and closed forms, intervals that cover what they should."""

import numpy as np
import pandas as pd
import pytest
import reference
from scipy import stats

from apthory._tools.estimate import Estimate
from apthory.lab import intervals


def rows(seed: int, accuracies: dict[tuple[str, int], float], num_images: int = 100) -> pd.DataFrame:
    """One row for each (task, seed), its test images right with the probability given."""
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        [
            {"task": task, "seed": k, "correct": random.random(num_images) < chance}
            for (task, k), chance in accuracies.items()
        ]
    )


PLACES = {(task, seed): 0.6 for task in "abc" for seed in (0, 1)}


def test_paired_difference_is_the_mean_over_tasks_of_the_mean_over_seeds():
    first, second = rows(0, dict.fromkeys(PLACES, 0.8)), rows(1, PLACES)
    estimate = intervals.paired_difference(first, second, num_draws=200)
    assert estimate.value == pytest.approx(reference.paired_difference(first, second))
    assert estimate.low < estimate.value < estimate.high
    assert estimate.interval == (estimate.low, estimate.high)


def test_tasks_count_equally_whatever_their_seeds():
    first = rows(0, {("a", 0): 1.0, ("a", 1): 1.0, ("a", 2): 1.0, ("b", 0): 0.0})
    second = rows(0, {("a", 0): 0.0, ("a", 1): 0.0, ("a", 2): 0.0, ("b", 0): 0.0})
    assert intervals.paired_difference(first, second, num_draws=10).value == pytest.approx(50.0)


def test_only_shared_tasks_and_seeds_are_compared():
    first = rows(0, {("a", 0): 0.9, ("b", 0): 0.5, ("c", 3): 0.1, ("d", 0): 0.2})
    second = rows(1, {("a", 0): 0.4, ("c", 4): 0.9, ("d", 0): 0.6})
    estimate = intervals.paired_difference(first, second, num_draws=10)
    assert estimate.value == pytest.approx(reference.paired_difference(first, second))
    with pytest.raises(ValueError, match="share no task and seed"):
        intervals.paired_difference(first, rows(1, {("e", 0): 0.5}))


def test_what_pairs_share_cancels():
    """The same predictions give an interval of width zero; unpaired ones of the same accuracy do not."""
    first, second = rows(0, PLACES), rows(1, PLACES)
    same = intervals.paired_difference(first, first.copy(), num_draws=50)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    other = intervals.paired_difference(first, second, num_draws=50)
    assert other.high - other.low > 5


def test_the_sign_follows_the_order():
    first, second = rows(0, dict.fromkeys(PLACES, 0.8)), rows(1, PLACES)
    forward = intervals.paired_difference(first, second, num_draws=100)
    backward = intervals.paired_difference(second, first, num_draws=100)
    assert backward.value == pytest.approx(-forward.value)
    assert forward.value > 0


def test_an_interval_over_tasks_needs_two_of_them():
    first, second = rows(0, {("a", 0): 0.8}), rows(1, {("a", 0): 0.6})
    with pytest.raises(ValueError, match="needs at least two tasks, not 1"):
        intervals.paired_difference(first, second)
    with pytest.raises(ValueError, match="needs at least two tasks, not 1"):
        intervals.over_tasks([4.0])


@pytest.mark.parametrize(
    "num_tasks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_intervals_cover_the_truth_about_as_often_as_they_say(num_tasks: int):
    """Tasks whose true differences scatter around 5 points, 200 images each; few tasks must give wide intervals."""
    random, covered, num_studies = np.random.default_rng(0), 0, 150
    for _ in range(num_studies):
        gaps = 0.05 + 0.04 * random.standard_normal(num_tasks)
        pairs = [random.random((2, 200)) < np.array([[0.5 + gap], [0.5]]) for gap in gaps]
        first, second = (
            pd.DataFrame([{"task": k, "seed": 0, "correct": pair[side]} for k, pair in enumerate(pairs)])
            for side in (0, 1)
        )
        estimate = intervals.paired_difference(first, second, num_draws=200)
        covered += estimate.low <= 5.0 <= estimate.high
    assert covered / num_studies > 0.9


def test_the_same_test_images_are_drawn_under_every_seed():
    """Two seeds with equal predictions hold no more information on the images than one."""
    one = rows(0, {("a", 0): 0.7, ("b", 0): 0.7}, 400)
    two = pd.concat([one, one.assign(seed=1)])
    zero = one.assign(correct=[np.zeros(400, bool)] * 2)
    zeros = pd.concat([zero, zero.assign(seed=1)])
    single = intervals.paired_difference(one, zero, num_draws=1000)
    double = intervals.paired_difference(two, zeros, num_draws=1000)
    assert double.high - double.low == pytest.approx(single.high - single.low, rel=0.15)


def test_more_alike_tasks_give_a_narrower_interval():
    base = rows(1, {(task, 0): 0.6 for task in "abcd"}, 1000)
    alike = intervals.paired_difference(rows(0, {(task, 0): 0.8 for task in "abcd"}, 1000), base, num_draws=500)
    chances = {("a", 0): 1.0, ("b", 0): 0.9, ("c", 0): 0.7, ("d", 0): 0.6}
    apart = intervals.paired_difference(rows(0, chances, 1000), base, num_draws=500)
    assert apart.high - apart.low > 2 * (alike.high - alike.low)


def test_draws_depend_on_the_seed_alone():
    first, second = rows(0, dict.fromkeys(PLACES, 0.8)), rows(1, PLACES)
    one, other, third = (intervals.paired_difference(first, second, num_draws=50, seed=s) for s in (0, 0, 1))
    assert one == other
    assert one != third
    assert one.value == third.value


def test_a_place_counted_twice_is_an_error():
    first = rows(0, {("a", 0): 0.5})
    with pytest.raises(ValueError, match=r"not one-to-one|not a one-to-one"):
        intervals.paired_difference(pd.concat([first, first]), first)


def test_matched_tables_keep_shared_sites_and_average_over_them():
    def table(sites: dict[str, list[bool]]) -> pd.DataFrame:
        return pd.DataFrame([{"task": "a", "site": s, "seed": 0, "correct": np.array(c)} for s, c in sites.items()])

    first = table({"one": [True, True], "two": [True, False], "three": [False, False]})
    second = table({"one": [False, True], "two": [False, False]})
    left, right = intervals.matched(first, second)
    np.testing.assert_array_equal(left["correct"][0], [1.0, 0.5])
    np.testing.assert_array_equal(right["correct"][0], [0.0, 0.5])


def test_ratio_is_that_of_the_medians_and_its_interval_holds_it():
    below = np.random.default_rng(0).lognormal(0, 0.1, 40)
    exact = intervals.ratio(list(2 * below), list(below))
    assert (exact.value, exact.low, exact.high) == pytest.approx((2.0, 2.0, 2.0))
    above = np.random.default_rng(1).lognormal(0, 0.1, 40)
    estimate = intervals.ratio(list(above), list(below))
    assert estimate.value == pytest.approx(np.median(above) / np.median(below))
    assert estimate.low < estimate.value < estimate.high


@pytest.mark.parametrize(("num_above", "num_below"), [(1, 1), (0, 0), (3, 4)])
def test_a_ratio_needs_timings_in_turns(num_above: int, num_below: int):
    with pytest.raises(ValueError, match=rf"two at least, not {num_above} and {num_below}"):
        intervals.ratio([1.0] * num_above, [1.0] * num_below)


@pytest.mark.parametrize("value", [0.0, 4.0, 0.1])
def test_equal_values_have_an_interval_of_width_zero(value: float):
    estimate = intervals.over_tasks([value] * 3)
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((value, value, value))


def test_interval_over_tasks_is_student_s():
    values = [1.0, 2.0, 4.0, 5.0]
    estimate = intervals.over_tasks(values)
    half = 3.18244630528 * np.std(values, ddof=1) / 2  # Student's quantile for three degrees of freedom
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((3.0, 3.0 - half, 3.0 + half))


def test_spearman_sees_order_only_and_is_zero_where_all_are_equal():
    depth = np.array([0.0, 0.2, 0.5, 1.0])
    assert intervals.spearman(depth, np.array([1.0, 2.0, 30.0, 31.0])) == pytest.approx(1.0)
    assert intervals.spearman(depth, np.array([9.0, 4.0, 1.0, 0.0])) == pytest.approx(-1.0)
    assert intervals.spearman(depth, np.array([1.0, 3.0, 2.0, 4.0])) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert intervals.spearman(depth, np.full(4, 70.0)) == 0.0


def test_no_rank_depends_on_the_last_bits_of_a_mean():
    """Means of the same accuracies differ in their last bits where another processor sums them in another order."""
    depth, accuracy = np.array([0.0, 0.2, 0.5, 1.0, 1.0]), np.array([41.2, 3e-9, 41.2, 55.0, 0.0])
    moved = accuracy * (1 + 1e-15 * np.array([1, -1, -1, 1, 0]))
    assert (moved != accuracy).any()
    assert intervals.spearman(depth, moved) == intervals.spearman(depth, accuracy)
    assert intervals.spearman(depth, accuracy + np.array([1e-6, 0, 0, 0, 0])) != intervals.spearman(depth, accuracy)


@pytest.mark.parametrize("num_sites", [2, 5, 9, 19])
def test_spearman_of_many_draws_is_scipy_s_of_each_with_the_same_bits(num_sites: int):
    random = np.random.default_rng(0)
    depth = np.round(random.random(num_sites), 1)  # some sites are as deep as others
    accuracy = random.integers(num_sites, size=(300, num_sites)) / 7
    accuracy[7] = 3.0
    correlations = intervals.spearman(depth, accuracy)
    for row, value in zip(accuracy, correlations, strict=True):
        expected = 0.0 if np.ptp(row) == 0 else stats.spearmanr(depth, row).statistic
        assert value == expected
        assert intervals.spearman(depth, row) == value


def test_deep_minus_shallow_of_many_draws_is_that_of_each():
    random = np.random.default_rng(0)
    depth, accuracy = random.permutation(np.linspace(0, 1, 9)), random.random((20, 9))
    found = intervals.deep_minus_shallow(depth, accuracy)
    np.testing.assert_array_equal(found, [intervals.deep_minus_shallow(depth, row) for row in accuracy])


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [([1.0, 2.0, 9.0, 9.0, 6.0, 8.0], 5.5), ([1.0, 5.0, 3.0], 2.0), ([2.0, 7.0], 5.0), ([4.0], 0.0)],
)
def test_deep_minus_shallow_compares_the_outer_thirds(accuracy: list[float], expected: float):
    depth = np.linspace(0, 1, len(accuracy))
    assert intervals.deep_minus_shallow(depth, np.array(accuracy)) == pytest.approx(expected)
    assert intervals.deep_minus_shallow(depth[::-1].copy(), np.array(accuracy[::-1])) == pytest.approx(expected)


def by_depth(slopes: dict[str, float], num_images: int = 400) -> pd.DataFrame:
    """Accuracy 50 % plus the task's slope times depth, the same images right whatever the seed; rows in disorder."""
    threshold = (np.arange(num_images) + 0.5) / num_images
    return pd.DataFrame(
        [
            {"task": task, "depth": depth, "seed": seed, "correct": threshold < 0.5 + slope * depth}
            for task, slope in slopes.items()
            for depth in (1.0, 0.0, 0.5)
            for seed in (0, 1)
        ]
    )


def test_a_statistic_over_sites_is_the_mean_of_those_of_the_tasks():
    table = by_depth({"a": 0.2, "b": -0.1, "c": 0.1})
    steep = intervals.over_sites(table, lambda depth, accuracy: accuracy[..., -1] - accuracy[..., 0], num_draws=50)
    assert steep.value == pytest.approx(100 * (0.2 - 0.1 + 0.1) / 3)
    assert intervals.over_sites(table, intervals.spearman, num_draws=50).value == pytest.approx(1 / 3)


def test_the_same_table_subtracted_leaves_nothing():
    table = by_depth({"a": 0.2, "b": -0.1})
    nothing = intervals.over_sites(table, intervals.spearman, minus=table, num_draws=50)
    assert (nothing.value, nothing.low, nothing.high) == (0.0, 0.0, 0.0)


def test_tables_on_other_sites_are_not_subtracted():
    table = by_depth({"a": 0.2, "b": -0.1})
    with pytest.raises(ValueError, match="differ in tasks, sites or seeds"):
        intervals.over_sites(table, intervals.spearman, minus=table[table["depth"] > 0])


def test_an_estimate_reads_as_value_and_interval():
    assert str(Estimate(value=1.234, low=-0.5, high=3.0)) == "1.23 [-0.50, 3.00]"


def test_a_value_that_is_not_a_number_has_no_rank():
    with pytest.raises(ValueError, match="not a number; leave out the sites that were not measured"):
        intervals.spearman(np.arange(3.0), np.array([1.0, np.nan, 2.0]))
