"""Intervals for paired comparisons: a bootstrap over tasks, seeds and test images."""

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
        first: Columns task, seed and correct (a number for each test image, 0 and 1 as a rule), one row for each pair.
        second: Likewise.
    """
    both = first.merge(second, on=["task", "seed"], suffixes=("_first", "_second"), validate="one_to_one")
    if both.empty:
        raise ValueError("the two tables share no task and seed; a paired comparison needs both on the same splits")
    gaps = [
        np.stack(
            [100.0 * (a.astype(float) - b) for a, b in zip(rows["correct_first"], rows["correct_second"], strict=True)]
        )
        for _, rows in both.groupby("task", sort=True)
    ]  # one (seed, image) table for each task
    return _bootstrap([gap[None] for gap in gaps], lambda means: means[:, 0], num_draws, seed)


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
        table: Columns task, site, depth, seed, correct: every seed of a task at every site.
        statistic: Of the depths and of accuracies in percent, one row a draw, such as `spearman`: one value a row.
        minus: Another table on the same tasks, sites and seeds, whose statistic is subtracted.
    """
    tables = [table] if minus is None else [table, minus]
    keys = ["task", "depth", "seed"]
    ordered = [one.sort_values(keys) for one in tables]
    for one in ordered[1:]:
        if one[keys].to_numpy().tolist() != ordered[0][keys].to_numpy().tolist():
            raise ValueError("the two tables differ in tasks, sites or seeds; compare them where both were run")
    depth = np.sort(table["depth"].unique())
    stacks = []
    for task in ordered[0]["task"].unique():
        several = [np.stack(list(one.loc[one["task"] == task, "correct"])) for one in ordered]
        stacks.append(np.concatenate([100.0 * rows.reshape(len(depth), -1, rows.shape[1]) for rows in several]))

    def difference(means: Float[np.ndarray, "draw sites"]) -> Float[np.ndarray, " draw"]:
        values = [np.asarray(statistic(depth, part)) for part in np.split(means, len(tables), axis=-1)]
        return values[0] - sum(values[1:])

    return _bootstrap(stacks, difference, num_draws, seed)


def _bootstrap(
    stacks: Sequence[Float[np.ndarray, "_site _seed _image"]],
    statistic: Callable[[np.ndarray], np.ndarray],
    num_draws: int,
    seed: int,
) -> Estimate:
    """Mean over tasks of a statistic of site means (one row a draw), drawing tasks, then seeds, then test images anew.

    All sites keep the same seeds and images in a draw. With few tasks percentiles are too narrow (with two of them
    they end at the extremes), so the interval is the bootstrap's standard error, made unbiased for the number of
    tasks, times Student's quantile.
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
        means = rows.groupby(["task", "seed"])["correct"].agg(lambda several: np.mean(np.stack(list(several)), axis=0))
        return means.reset_index()

    return pooled(first), pooled(second)


def ratio(above: Sequence[float], below: Sequence[float], *, num_draws: int = 5000, seed: int = 0) -> Estimate:
    """Ratio of the medians of two sets of timings taken in turns, with a bootstrap interval over the turns."""
    pairs = np.stack([np.asarray(above, float), np.asarray(below, float)])
    draws = np.random.default_rng(seed).integers(pairs.shape[1], size=(num_draws, pairs.shape[1]))
    medians = np.median(pairs[:, draws], axis=2)
    low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    value = float(np.median(pairs[0]) / np.median(pairs[1]))
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))


def over_tasks(values: Sequence[float]) -> Estimate:
    """Mean of one value for each task, with Student's interval over tasks: a band for figures."""
    data = np.asarray(values, float)
    if len(data) < 2:
        raise ValueError(f"an interval over tasks needs at least two tasks, not {len(data)}")
    reach = float(stats.sem(data) * stats.t.ppf(0.975, len(data) - 1))
    return Estimate(value=float(data.mean()), low=float(data.mean()) - reach, high=float(data.mean()) + reach)


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
    # Divided as `numpy.corrcoef` does: scipy's own, which takes one pair at a time, gives the same bits.
    freedom = max(x.shape[-1] - 1, 1)
    covariance, *variances = ((a * b).sum(-1) * (1 / freedom) for a, b in ((x, y), (y, y), (x, x)))
    result = np.zeros(y.shape[:-1])
    np.divide(covariance, np.sqrt(variances[0]), out=result, where=variances[0] > 0)
    np.divide(result, np.sqrt(variances[1]), out=result, where=variances[1] > 0)
    return result.clip(-1, 1)[()]


def _to_12_digits(values: Float[np.ndarray, "*draw site"] | pd.Series) -> Float[np.ndarray, "*draw site"]:
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
