"""How many samples a prompt needs, by how far it reaches: this project's own theorem, in closed forms.

A site has P positions in K = P / r windows of r, the reach. Each sample activates one window at random and its readout
averages the window's positions; labels y = +-1 are equally likely:

    f(x; d) = y kappa - b + (mean over the window of <a, d_p>),  |a| = 1,  b > kappa > xi >= 0.

The frozen network is wrong on y = +1 by a nuisance b that the prompt d must cancel, from zero, by steps on the hinge
loss max(0, xi - y f). A window is *repaired* once its lift, the mean of <a, d_p>, is at least b - kappa + xi.

R1. Every positive sample of a window lifts it by the same amount until it is repaired, after m visits (`Problem`).
R2. So samples are coupons: all K windows need m, every second sample counts (`expected_samples`, `samples_deviation`).
R3. The mean is of the order K (m + log K), with explicit bounds (`bounds`), and the law is Gumbel's (`limit_law`).
    Many epochs need one visit only (`distinct_samples`), batches count in steps (`expected_steps`).
R4. The error before the end is a binomial tail (`error_left`, `samples_for_error`).
R6. Attention that looks at all positions a little may lose the logarithm (`soft_samples`).
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize, special, stats

Rule = Literal["sgd", "normalized", "sign", "safe"]
Real = int | float | Fraction

# -------------------------------------------------------------------------------- R1: training is counting


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One site and what the frozen network gets wrong there.

    Numbers are taken exactly: visits are counted in rationals, so a tie (a lift that meets the gap after whole
    visits) is decided exactly for what was given. A network in floating point may need one visit more or less there.
    """

    num_positions: int  # P
    reach: int  # r: positions that share a sample's gradient; divides P
    signal: Real = 1.0  # kappa
    nuisance: Real = 1.5  # b
    margin: Real = 0.4  # xi

    def __post_init__(self) -> None:
        num_windows(self.num_positions, self.reach)
        if not 0 <= self.margin < self.signal < self.nuisance:
            raise ValueError(
                f"margin {self.margin}, signal {self.signal}, nuisance {self.nuisance}: the model needs "
                "0 <= margin < signal < nuisance (a network wrong on one label, a margin that can be met)"
            )

    @property
    def num_windows(self) -> int:
        """K."""
        return num_windows(self.num_positions, self.reach)

    @property
    def gap(self) -> Fraction:
        """The lift that repairs a window: b - kappa + xi."""
        return self.deficit + Fraction(self.margin)

    @property
    def deficit(self) -> Fraction:
        """The lift above which a window is classified correctly: b - kappa."""
        return Fraction(self.nuisance) - Fraction(self.signal)

    def lift(self, step: Real, rule: Rule = "sgd", *, l1: Real = 1) -> Real:
        """What one visit adds to its window's lift, for steps on single samples.

        The gradient of a visit is -a / r at each of r positions. Under ``sgd`` the lift is step / r; ``normalized``
        (a step along the gradient divided by its norm) step / sqrt(r); ``sign`` step |a|_1. The ``safe`` rule scales
        the largest sgd step that never undoes a repair, whatever the gap: 2 r (kappa - xi), ``step`` being the share
        of it that is taken, at most 1.

        Args:
            step: The learning rate eta; with ``safe`` a share.
            rule: How a gradient becomes a step.
            l1: |a|_1, which only ``sign`` asks for.
        """
        if not step > 0:
            raise ValueError(f"a step of {step} lifts nothing; it must be positive")
        if rule == "sgd":
            return Fraction(step) / self.reach
        if rule == "normalized":
            return float(step) / math.sqrt(self.reach)
        if rule == "sign":
            return Fraction(step) * Fraction(l1)
        if rule != "safe":
            raise ValueError(f"no rule {rule!r}; there are sgd, normalized, sign and safe")
        if step > 1:
            raise ValueError(f"{step} of the largest safe step is not safe; the share is at most 1")
        return 2 * Fraction(step) * (Fraction(self.signal) - Fraction(self.margin))

    def visits(self, lift: Real, batch_size: int = 1) -> int:
        """m: visits that repair a window; in batches whose loss is a mean, each visit lifts 1 / batch_size as much."""
        _positive(batch_size=batch_size)
        return math.ceil(self.gap * batch_size / Fraction(lift))

    def error_visits(self, lift: Real, batch_size: int = 1) -> int:
        """m_0 <= m: visits after which a window's samples are classified correctly."""
        _positive(batch_size=batch_size)
        return min(math.floor(self.deficit * batch_size / Fraction(lift)) + 1, self.visits(lift, batch_size))

    def is_lasting(self, lift: Real, batch_size: int = 1) -> bool:
        """Whether negative samples never undo a repair: then, and only then, training is counting.

        The largest lift must leave the margin of negatives: be at most b + kappa - xi. It is that of a window one visit
        short of its repair that is visited by a whole batch: ``(m - 1 + batch_size) * lift / batch_size``.
        """
        largest = (self.visits(lift, batch_size) - 1 + batch_size) * Fraction(lift) / batch_size
        return largest <= Fraction(self.nuisance) + Fraction(self.signal) - Fraction(self.margin)


def num_windows(num_positions: int, reach: int) -> int:
    """K = P / r.

    Raises:
        ValueError: If the reach does not divide the positions; the nearest that do are named.
    """
    _positive(num_positions=num_positions, reach=reach)
    if num_positions % reach:
        below = next(r for r in range(min(reach, num_positions), 0, -1) if num_positions % r == 0)
        above = next((r for r in range(reach, num_positions) if num_positions % r == 0), num_positions)
        near = " or ".join(map(str, sorted({below, above})))
        raise ValueError(f"a reach of {reach} does not divide {num_positions} positions; take {near}")
    return num_positions // reach


# ------------------------------------------------------------------------------- R3': distinct samples


def distinct_samples(num_positions: int, reach: int) -> float:
    """Mean number of distinct samples until each window has a positive one: 2 K H_K, whatever the step rule.

    With enough epochs over a fixed sample, exactly the windows with a positive sample are repaired, as long as no
    step is so large that negative samples undo a repair (`Problem.is_lasting`).
    """
    K = num_windows(num_positions, reach)
    return 2.0 * K * float(special.digamma(K + 1) + np.euler_gamma)


def error_left(
    num_samples: Float[np.ndarray, "*shape"] | int | float, num_positions: int, reach: int, visits: int = 1
) -> Any:
    """Expected error after some samples (R4): half the chance that a window had fewer than ``visits`` positives.

    With the ``visits`` that repair a window this is the share of new samples inside the margin after one pass; with
    `Problem.error_visits` the test error. One visit: the test error after many epochs over so many distinct samples,
    ``(1 - 1 / (2 K)) ** num_samples / 2``.
    """
    _positive(visits=visits)
    K = num_windows(num_positions, reach)
    N = np.asarray(num_samples, float)
    if np.any(N < 0):
        raise ValueError(f"{N.min()} samples: their number cannot be negative")
    # The binomial tail as an incomplete beta function, which takes real N as well.
    tail = special.betaincc(visits, np.maximum(N - visits + 1, np.finfo(float).tiny), 0.5 / K)
    return 0.5 * np.where(visits > N, 1.0, tail)[()]


def samples_for_error(error: float, num_positions: int, reach: int, visits: int = 1) -> int:
    """Smallest number of samples with `error_left` at most ``error``, which lies between 0 and 1/2."""
    if not 0 < error < 0.5:
        raise ValueError(f"an error of {error}: give one above 0 and below 0.5, where training starts")
    high = visits
    while error_left(high, num_positions, reach, visits) > error:
        high *= 2
    low = high // 2  # too few, or fewer than the visits of one window
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error_left(middle, num_positions, reach, visits) <= error else (middle, high)
    return high


# ------------------------------------------------------------------------------- R2: one pass, exactly


def expected_samples(num_positions: int, reach: int, visits: int) -> float:
    """Mean number of samples until every window had ``visits`` positives: E N = 2 K E max of K Gamma(m) variables.

    Let samples arrive as a Poisson process. Then windows are visited independently, the j-th visit of each after a
    Gamma(j) time; the number of arrivals is independent of the times between them, so means agree (Newman and Shepp,
    1960; every second sample counts). By quadrature, to about 1e-13 of the value, up to a million positions and more.
    """
    return 2 * num_windows(num_positions, reach) * _longest_wait(num_positions, reach, visits)[0]


def samples_deviation(num_positions: int, reach: int, visits: int) -> float:
    """Standard deviation of that number: with N arrivals until the time T, Var N = Var T - E N."""
    K = num_windows(num_positions, reach)
    mean, variance = _longest_wait(num_positions, reach, visits)
    return math.sqrt((2 * K) ** 2 * variance - 2 * K * mean)


@lru_cache
def _longest_wait(num_positions: int, reach: int, visits: int) -> tuple[float, float]:
    """Mean and variance of the largest of K independent Gamma(m) variables.

    E max = integral of 1 - (1 - Q)^K with Q(t) = P(Poisson(t) < m), from where it is 1 to where it is 0 up to rounding.
    """
    K, m = num_windows(num_positions, reach), visits
    _positive(visits=m)
    if K == 1:
        return float(m), float(m)
    start, end = special.gammaincinv(m, 1e-17 ** (1 / K)), special.gammainccinv(m, 1e-18 / K)
    nodes, weights = _gauss_legendre()
    t, width = start + (end - start) * nodes, (end - start) * weights
    is_waiting = -np.expm1(K * np.log1p(-special.gammaincc(m, t)))
    excess = float(width @ is_waiting)  # E (max - start)
    square = float(2 * width @ ((t - start) * is_waiting))
    return float(start) + excess, square - excess**2


@lru_cache
def _gauss_legendre(num_nodes: int = 256) -> tuple[Float[np.ndarray, " node"], Float[np.ndarray, " node"]]:
    """Nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return (nodes + 1) / 2, weights / 2


# ------------------------------------------------------------------------------- R3: rates, law, batches


class Bounds(NamedTuple):
    """A value lies between these."""

    low: float
    high: float


def log_factor(num_windows: int, visits: int) -> float:
    """The x >= 1 with x - 1 - log x = log(K) / m: what the logarithm adds to m visits of K windows, as a factor."""
    _positive(num_windows=num_windows, visits=visits)
    return float(-special.lambertw(-math.exp(-1 - math.log(num_windows) / visits), -1).real)


def bounds(num_positions: int, reach: int, visits: int) -> Bounds:
    """Explicit bounds of E N: 2 K max(m, H_K) <= E N <= 2 K (m x + x / (x - 1)), with x the `log_factor`.

    Both are of the order K (m + log K), within a factor of 7. E N / (2 K m x) tends to one, from below, as K grows
    with m / log K held. So at one sgd step for all sites, where m = gap r / eta, the order is P + (P / r) log(P / r):
    P log P at reach 1, P at reach P, and already P where r >= log P. Steps that grow with the reach keep m, and
    K log K stays.
    """
    K = num_windows(num_positions, reach)
    _positive(visits=visits)
    if K == 1:
        return Bounds(2.0 * visits, 2.0 * visits)
    x = log_factor(K, visits)
    low = max(2.0 * K * visits, distinct_samples(num_positions, reach))
    return Bounds(low, 2 * K * (visits * x + x / (x - 1)))


def limit_law(num_positions: int, reach: int, visits: int) -> Any:
    """Gumbel's law of the number of samples, from SciPy: P(N <= 2 K (u + s z)) tends to exp(-exp(-z)) as K grows.

    K Q(u) = 1 and s is the inverse of the Gamma(m) law's hazard at u: von Mises' choice. For fixed m it agrees in the
    limit with u = log K + (m - 1) log log K - log (m - 1)!, s = 1 (Erdos and Renyi, 1961), and is far closer before.
    """
    K, m = num_windows(num_positions, reach), visits
    _positive(visits=m)
    if K == 1:
        raise ValueError("one window has no law of the slowest window; N is negative binomial with 2 m in the mean")
    u = special.gammainccinv(m, 1 / K)
    hazard = K * math.exp((m - 1) * math.log(u) - u - special.gammaln(m))
    return stats.gumbel_r(loc=2 * K * u, scale=2 * K / hazard)


def expected_steps(num_positions: int, reach: int, visits: int, batch_size: int) -> Bounds:
    """Bounds of the mean number of batches until every window had ``visits`` positives: less than one step apart.

    A window takes part in a whole batch if it was not repaired before, so the steps are T = ceil(N / B) exactly, and
    E N / B <= E T <= (E N + B - 1) / B. With ``Problem.visits(lift, B)`` a local prompt needs B of the order log P
    to finish in as many steps as positions, up to a factor; a global one does with B = 1.
    """
    _positive(batch_size=batch_size)
    samples = expected_samples(num_positions, reach, visits)
    return Bounds(samples / batch_size, (samples + batch_size - 1) / batch_size)


# ------------------------------------------------------------------------------- R6: soft attention


def soft_samples(problem: Problem, step: Real, background: float) -> float:
    """Samples per window until no window is wrong, as windows get many; infinite where the logarithm stays.

    The readout is (1 - q) times its window's mean and q times the mean of all positions, q being the background. After
    n visits, n_w of them its own, a window's lift is eta ((1 - q)^2 n_w / r + (2 q - q^2) n / P). With many windows
    n / P follows an ordinary differential equation (Kurtz, 1970), solved here in closed form between the levels at
    which repair takes one visit less. If the second term alone gets past b - kappa, windows never visited are right.

    Args:
        problem: Its number of windows does not matter, its reach does.
        step: eta, of steps on single samples.
        background: q, from 0 (hard attention) to 1 (mean pooling).
    """
    if not 0 <= background <= 1:
        raise ValueError(f"the background {background} is a share of the attention, from 0 to 1")
    own, rate = float((1 - background) ** 2 * step / problem.reach), float(step) / problem.reach
    shared, gap, deficit = background * (2 - background), float(problem.gap), float(problem.deficit)
    if not background or not own:
        return 2 * deficit / rate if background else math.inf  # in mean pooling every positive sample counts
    time = lift = 0.0  # positive samples per window; the second term
    for visits in range(math.ceil(gap / own), 0, -1):  # that repair a window now
        target = min(deficit, gap - (visits - 1) * own)
        taken = _taken(visits, time) + (target - lift) / (shared * rate)
        if taken >= visits:
            break
        end = time + 1
        while _taken(visits, end) < taken:
            end *= 2
        time = optimize.brentq(lambda t, visits=visits, taken=taken: _taken(visits, t) - taken, time, end)
        lift = target
        if lift == deficit:
            return 2 * time
    return math.inf


def _taken(visits: int, time: float) -> float:
    """Mean of min(Poisson(time), visits): visits per window if each takes so many at most."""
    return time * special.gammaincc(visits, time) + visits * special.gammainc(visits + 1, time)


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if not (isinstance(number, int | np.integer) and number >= 1):
            raise ValueError(f"{name} is {number!r}; it counts something, so give a whole number from 1")
