"""Which law a mean number of samples follows as positions grow: P, P log P or P^a."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import optimize

LAWS = ("P", "P log P", "P^a")


@dataclass(frozen=True, kw_only=True)
class GrowthFit:
    """A law fitted to means with known standard errors."""

    law: str
    aic: float  # sum of squared distances in standard errors, and 2 for each parameter
    shape: float  # what tells the law from P: the coefficient of P log P, the exponent a; 0 for P itself
    values: Float[np.ndarray, " point"]


def fit_law(
    law: str, positions: Float[np.ndarray, " point"], means: Float[np.ndarray, " point"],
    errors: Float[np.ndarray, " point"],
) -> GrowthFit:  # fmt: skip
    """Weighted least squares: ``alpha P``, ``alpha P log P + beta P`` (the O(P) belongs to it), or ``alpha P^a``."""

    def linear(columns: Sequence[np.ndarray]) -> tuple[float, np.ndarray, np.ndarray]:
        design = np.stack(columns, axis=1)
        coefficients = np.linalg.lstsq(design / errors[:, None], means / errors, rcond=None)[0]
        values = design @ coefficients
        return float(np.sum(((means - values) / errors) ** 2)), coefficients, values

    if law == "P":
        distance, _, values = linear([positions])
        return GrowthFit(law=law, aic=distance + 2, shape=0.0, values=values)
    if law == "P log P":
        distance, coefficients, values = linear([positions * np.log(positions), positions])
        return GrowthFit(law=law, aic=distance + 4, shape=float(coefficients[0]), values=values)
    if law != "P^a":
        raise ValueError(f"no law {law!r}; there are {', '.join(LAWS)}")
    minimum = optimize.minimize_scalar(
        lambda a: linear([positions**a])[0], bounds=(0.0, 3.0), method="bounded", options={"xatol": 1e-7}
    )
    distance, _, values = linear([positions**minimum.x])
    return GrowthFit(law=law, aic=distance + 4, shape=float(minimum.x), values=values)


def compare_laws(
    positions: Sequence[int],
    samples: Sequence[Sequence[int] | np.ndarray],
    random: np.random.Generator,
    num_draws: int = 200,
) -> tuple[dict[str, GrowthFit], dict[str, list[GrowthFit]]]:
    """All laws fitted to the means of repetitions, and again to those of repetitions drawn anew (bootstrap).

    Args:
        positions: P of each point.
        samples: Its repetitions.
        random: For the bootstrap.
        num_draws: Of the bootstrap.
    """
    P = np.asarray(positions, float)
    repetitions = [np.asarray(counts, float) for counts in samples]
    errors = np.array([counts.std(ddof=1) / np.sqrt(len(counts)) for counts in repetitions])
    fits = {law: fit_law(law, P, np.array([counts.mean() for counts in repetitions]), errors) for law in LAWS}
    drawn: dict[str, list[GrowthFit]] = {law: [] for law in LAWS}
    for _ in range(num_draws):
        means = np.array([random.choice(counts, len(counts)).mean() for counts in repetitions])
        for law in LAWS:
            drawn[law].append(fit_law(law, P, means, errors))
    return fits, drawn
