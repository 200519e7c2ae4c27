"""Intervals for paired comparisons: a bootstrap over tasks, seeds and test images."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from apthory._tools.estimate import Estimate


def paired_difference(first: pd.DataFrame, second: pd.DataFrame, *, num_draws: int = 2000, seed: int = 0) -> Estimate:
    """Mean accuracy of the first minus that of the second, in points, over the tasks and seeds that both have.

    Both sides of a pair keep their tasks, seeds and test images together in every draw, so what they share
    cancels. The mean weighs tasks equally.

    Args:
        first: Columns task, seed and correct (a number for each test image, usually 0 or 1), and one row for each task
            and seed.
        second: A table of the same columns.
    """
    shared = first.merge(second, on=["task", "seed"], suffixes=("_first", "_second"), validate="one_to_one")
    if shared.empty:
        raise ValueError("the two tables share no task and seed; a paired comparison needs both on the same splits")
    differences = [
        np.stack(
            [
                100.0 * (of_first.astype(float) - of_second)
                for of_first, of_second in zip(rows["correct_first"], rows["correct_second"], strict=True)
            ]
        )
        for _, rows in shared.groupby("task", sort=True)
    ]  # one (seed, image) table for each task
    return _bootstrap([difference[None] for difference in differences], lambda means: means[:, 0], num_draws, seed)


def over_sites(
    table: pd.DataFrame,
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray | float],
    minus: pd.DataFrame | None = None,
    *,
    num_draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Mean over tasks of a statistic of depth and accuracy over sites.

    Args:
        table: Columns task, site, depth, seed and correct, with every seed of a task at every site.
        statistic: A function such as `spearman`. It takes the depths of the sites and a table of accuracies in percent
            with one row for each draw, and returns one value for each row.
        minus: Another table on the same tasks, sites and seeds, whose statistic is subtracted.
    """
    tables = [table] if minus is None else [table, minus]
    keys = ["task", "depth", "seed"]
    tables = [rows.sort_values(keys) for rows in tables]
    if tables[-1][keys].to_numpy().tolist() != tables[0][keys].to_numpy().tolist():
        raise ValueError("the two tables differ in tasks, sites or seeds; compare them where both were run")
    depth = np.sort(table["depth"].unique())
    stacks = []
    for task in tables[0]["task"].unique():
        correct = [np.stack(list(rows.loc[rows["task"] == task, "correct"])) for rows in tables]
        stacks.append(np.concatenate([100.0 * images.reshape(len(depth), -1, images.shape[1]) for images in correct]))

    def difference(means: Float[np.ndarray, "draw sites"]) -> Float[np.ndarray, " draw"]:
        statistics = [np.asarray(statistic(depth, accuracy)) for accuracy in np.split(means, len(tables), axis=-1)]
        return statistics[0] - sum(statistics[1:])

    return _bootstrap(stacks, difference, num_draws, seed)


def _bootstrap(
    stacks: Sequence[Float[np.ndarray, "_site _seed _image"]],
    statistic: Callable[[np.ndarray], np.ndarray],
    num_draws: int,
    seed: int,
) -> Estimate:
    """Mean over tasks of a statistic of the sites' mean accuracies, with an interval from a nested bootstrap.

    A draw takes tasks anew, then seeds of each task, then test images; all sites keep the same seeds and images in a
    draw. The statistic takes one row of means for each draw. `scipy.stats.bootstrap` draws from one level alone.

    Percentiles of few tasks are too narrow (those of two tasks end at the extremes). So the interval is the bootstrap's
    standard error, made unbiased for the number of tasks, times Student's quantile.
    """
    num_tasks = len(stacks)
    if num_tasks < 2:
        raise ValueError(f"an interval over tasks needs at least two tasks, not {num_tasks}")
    value = float(np.mean(statistic(np.stack([stack.mean((1, 2)) for stack in stacks]))))
    random = np.random.default_rng(seed)
    means = []
    for _ in range(num_draws):
        for stack in (stacks[task] for task in random.integers(num_tasks, size=num_tasks)):
            _, num_seeds, num_images = stack.shape
            seeds = random.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds)) / num_seeds
            images = random.multinomial(num_images, np.full(num_images, 1 / num_images)) / num_images
            means.append(seeds @ (stack @ images).T)
    draws = statistic(np.stack(means)).reshape(num_draws, num_tasks).mean(1)
    reach = draws.std() * np.sqrt(num_tasks / (num_tasks - 1)) * stats.t.ppf(0.975, num_tasks - 1)
    return Estimate(value=value, low=value - float(reach), high=value + float(reach))


def matched(first: pd.DataFrame, second: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables where they share task, site and seed, averaged over sites: ready for `paired_difference`."""
    keys = ["task", "site", "seed"]
    shared = first[keys].merge(second[keys])

    def pooled(table: pd.DataFrame) -> pd.DataFrame:
        rows = table.merge(shared, on=keys)
        means = rows.groupby(["task", "seed"])["correct"].agg(lambda correct: np.mean(np.stack(list(correct)), axis=0))
        return means.reset_index()

    return pooled(first), pooled(second)


def ratio(above: Sequence[float], below: Sequence[float], *, num_draws: int = 5000, seed: int = 0) -> Estimate:
    """Ratio of the medians of two sets of timings taken in turns, with a bootstrap interval over the turns.

    Raises:
        ValueError: If there are fewer than two turns, or not as many of one set as of the other.
    """
    if len(above) != len(below) or len(below) < 2:
        raise ValueError(
            f"an interval over turns needs as many timings of one set as of the other, two at least, not {len(above)} "
            f"and {len(below)}"
        )
    timings = np.asarray(above, float), np.asarray(below, float)
    interval = stats.bootstrap(
        timings,
        _ratio_of_medians,
        paired=True,
        method="percentile",
        n_resamples=num_draws,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    value = float(_ratio_of_medians(*timings))
    return Estimate(value=value, low=min(float(interval.low), value), high=max(float(interval.high), value))


def _ratio_of_medians(
    above: Float[np.ndarray, "*draw turn"], below: Float[np.ndarray, "*draw turn"], axis: int = -1
) -> Float[np.ndarray, "*draw"] | float:
    return np.median(above, axis) / np.median(below, axis)


def over_tasks(values: Sequence[float]) -> Estimate:
    """Mean of one value for each task, with Student's interval over tasks: a band for figures."""
    data = np.asarray(values, float)
    if len(data) < 2:
        raise ValueError(f"an interval over tasks needs at least two tasks, not {len(data)}")
    with warnings.catch_warnings():
        # Equal values have an interval of width zero, which is right, and no t statistic, which is not asked for.
        warnings.filterwarnings("ignore", "Precision loss occurred in moment calculation", RuntimeWarning)
        interval = stats.ttest_1samp(data, 0.0).confidence_interval()
    return Estimate(value=float(data.mean()), low=float(interval.low), high=float(interval.high))


def spearman(
    depth: Float[np.ndarray, " site"] | pd.Series, accuracy: Float[np.ndarray, "*draw site"] | pd.Series
) -> Float[np.ndarray, "*draw"] | float:
    """Rank correlation over the last axis; 0 where all accuracies are equal. Equal values share their mean rank.

    Values count as equal if they agree to 12 digits: means of the same accuracies, summed in another order by another
    processor, differ in their last bits, and no rank may depend on that.

    Raises:
        ValueError: If a value is not a number, and so has no rank.
    """
    if np.isnan(depth).any() or np.isnan(accuracy).any():
        raise ValueError("a value to rank is not a number; leave out the sites that were not measured")
    ranks = (stats.rankdata(_to_12_digits(values), axis=-1) for values in (depth, accuracy))
    x, y = (rank - (rank.shape[-1] + 1) / 2 for rank in ranks)
    # Centered ranks are multiples of a half, so their sums are exact on every processor. `scipy.stats.pearsonr` divides
    # before it sums: its last bits differ, and a correlation of zero becomes 1e-18. `scipy.stats.spearmanr` gives the
    # same bits as this, but takes one pair of samples at a time.
    freedom = max(x.shape[-1] - 1, 1)
    covariance, variance_y, variance_x = ((a * b).sum(-1) * (1 / freedom) for a, b in ((x, y), (y, y), (x, x)))
    correlation = np.zeros(y.shape[:-1])
    np.divide(covariance, np.sqrt(variance_y), out=correlation, where=variance_y > 0)
    np.divide(correlation, np.sqrt(variance_x), out=correlation, where=variance_x > 0)
    return correlation.clip(-1, 1)[()]


def _to_12_digits(values: Float[np.ndarray, "*draw site"] | pd.Series) -> Float[np.ndarray, "*draw site"]:
    """Values rounded to 12 significant digits; NumPy rounds arrays to decimal places alone."""
    x = np.asarray(values, float)
    size = np.abs(x)
    exponent = np.floor(np.log10(size, out=np.zeros_like(x), where=size > 0))
    scale = 10.0 ** (11 - exponent)
    return np.round(x * scale) / scale


def deep_minus_shallow(
    depth: Float[np.ndarray, " site"], accuracy: Float[np.ndarray, "*draw site"]
) -> Float[np.ndarray, "*draw"] | float:
    """Mean accuracy in the deepest third of the sites minus that in the shallowest third, in points."""
    third = max(1, len(depth) // 3)
    ranked = accuracy[..., np.argsort(depth)]
    return ranked[..., -third:].mean(-1) - ranked[..., :third].mean(-1)
