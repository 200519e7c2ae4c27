"""Intervals for paired comparisons: bootstrap over tasks, then seeds, then test images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A statistic with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends of the interval."""
        return self.low, self.high

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def paired_difference(first: pd.DataFrame, second: pd.DataFrame, *, num_draws: int = 2000, seed: int = 0) -> Estimate:
    """Mean accuracy of the first minus that of the second, in points, over the tasks and seeds that both have.

    Both sides of a pair keep their tasks, seeds and test images together in every draw, so what they share
    cancels. The mean weighs tasks equally.

    Args:
        first: Columns task, seed and correct (a boolean for each test image), one row for each pair.
        second: Likewise.
    """
    both = first.merge(second, on=["task", "seed"], suffixes=("_first", "_second"), validate="one_to_one")
    if both.empty:
        raise ValueError("the two tables share no task and seed; a paired comparison needs both on the same splits")
    differences = [
        [100.0 * (a.astype(float) - b) for a, b in zip(rows["correct_first"], rows["correct_second"], strict=True)]
        for _, rows in both.groupby("task", sort=True)
    ]
    value = float(np.mean([np.mean([seed_row.mean() for seed_row in task]) for task in differences]))
    random = np.random.default_rng(seed)
    draws = np.empty(num_draws)
    for index in range(num_draws):
        means = []
        for task in random.integers(len(differences), size=len(differences)):
            images = differences[task]
            picked = random.integers(len(images), size=len(images))
            # The same test images under every seed: they are drawn once for a task.
            sample = random.integers(len(images[0]), size=len(images[0]))
            means.append(np.mean([images[k][sample].mean() for k in picked]))
        draws[index] = np.mean(means)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high))


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


def over_tasks(values: Sequence[float], *, num_draws: int = 5000, seed: int = 0) -> Estimate:
    """Mean of one value for each task, with a bootstrap interval over tasks."""
    data = np.asarray(values, float)
    draws = np.random.default_rng(seed).choice(data, size=(num_draws, len(data))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(value=float(data.mean()), low=float(low), high=float(high))


def by_task(table: pd.DataFrame, statistic: Callable[[np.ndarray, np.ndarray], float]) -> list[float]:
    """A statistic of (depth, accuracy) over the sites of each task, accuracies averaged over seeds first."""
    means = table.groupby(["task", "depth"], as_index=False)["accuracy"].mean()
    return [statistic(rows["depth"].to_numpy(), rows["accuracy"].to_numpy()) for _, rows in means.groupby("task")]


def spearman(depth: Float[np.ndarray, " site"], accuracy: Float[np.ndarray, " site"]) -> float:
    """Rank correlation; 0 where all accuracies are equal."""
    return 0.0 if np.ptp(accuracy) == 0 else float(stats.spearmanr(depth, accuracy).statistic)


def deep_minus_shallow(depth: Float[np.ndarray, " site"], accuracy: Float[np.ndarray, " site"]) -> float:
    """Mean accuracy in the deepest third of the sites minus that in the shallowest third, in points."""
    third = max(1, len(depth) // 3)
    ranked = accuracy[np.argsort(depth)]
    return float(ranked[-third:].mean() - ranked[:third].mean())
