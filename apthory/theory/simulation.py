"""The counting process drawn sample by sample, and gradient descent on networks that may or may not obey it.

`count_samples` draws windows and labels and waits, as statement R2 says, without its formula. `descend` trains prompts
by autograd in networks of three kinds, many repetitions at a time: hard attention and a small convolutional network,
for which the model of `reach` is exact, and softmax attention, for which it is not (R6). Samples come as a stream: in
one pass (`one_pass`) or from a fixed sample many times over (`epochs`), with token noise and varying margins if asked.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from apthory.theory.reach import Problem, Rule, num_windows

Goal = Literal["repaired", "correct"]

# ------------------------------------------------------------------------------------ the counting process


def count_samples(
    num_positions: int, reach: int, visits: int, num_repeats: int, random: np.random.Generator
) -> Int[np.ndarray, " repeat"]:
    """Samples drawn until every window had ``visits`` positive ones, for independent repetitions.

    Each sample is one of 2 K equally likely pairs of a window and a label. Drawn in chunks; inside the last one the
    sample that ends the wait is found by its place.
    """
    K = num_windows(num_positions, reach)
    length = max(16, math.ceil(K * (visits + math.log(K)) / 2))  # of a chunk; any length gives the same law
    rows = max(1, 2**21 // length)
    blocks = [min(rows, num_repeats - start) for start in range(0, num_repeats, rows)]
    return np.concatenate([_count_block(K, visits, block, length, random) for block in blocks])


def _count_block(
    K: int, visits: int, num_repeats: int, length: int, random: np.random.Generator
) -> Int[np.ndarray, " repeat"]:
    ends = np.zeros(num_repeats, dtype=np.int64)
    waiting, missing = np.arange(num_repeats), np.full((num_repeats, K), visits)
    drawn = 0
    while len(waiting):
        codes = random.integers(2 * K, size=(len(waiting), length), dtype=np.min_scalar_type(2 * K))
        # A code below K is a positive sample of that window, the others are negative ones.
        flat = codes + 2 * K * np.arange(len(waiting))[:, None]
        seen = np.bincount(flat.ravel(), minlength=2 * K * len(waiting)).reshape(-1, 2 * K)
        is_done = (seen[:, :K] >= missing).all(1)
        for row in np.flatnonzero(is_done):
            places = np.argsort(codes[row], kind="stable")  # of window 0's samples, then of window 1's, ...
            open_windows = np.flatnonzero(missing[row] > 0)
            first = np.cumsum(seen[row]) - seen[row]
            ends[waiting[row]] = drawn + 1 + places[first[open_windows] + missing[row, open_windows] - 1].max()
        missing = np.maximum(missing - seen[:, :K], 0)[~is_done]
        waiting = waiting[~is_done]
        drawn += length
    return ends


# ------------------------------------------------------------------------------------------------- samples


class Samples(NamedTuple):
    """A batch for each repetition: where the token lies, what it says, and what it should say."""

    window: Int[Tensor, "repeat batch"]
    label: Float[Tensor, "repeat batch"]  # -1 or 1
    value: Float[Tensor, "repeat batch"]  # the readout without a prompt and without token noise
    noise: Float[Tensor, "repeat batch position"] | None  # added to every token along the prompted direction


def draw_samples(
    problem: Problem,
    num_repeats: int,
    batch_size: int,
    generator: torch.Generator,
    *,
    token_noise: float = 0.0,
    spread: float = 0.0,
) -> Samples:
    """Draw samples of the model, or of one that departs from it.

    Args:
        problem: Positions, reach and constants.
        num_repeats: Independent repetitions.
        batch_size: Samples of each.
        generator: The only source of randomness.
        token_noise: Standard deviation of what is added to each token.
        spread: The signal of a sample is uniform within this share of kappa on either side.
    """
    shape = (num_repeats, batch_size)
    options = {"generator": generator, "dtype": torch.float64, "device": generator.device}
    window = torch.randint(problem.num_windows, shape, generator=generator, device=generator.device)
    label = torch.randint(2, shape, generator=generator, device=generator.device).double() * 2 - 1
    signal = float(problem.signal) * (1 + spread * (2 * torch.rand(shape, **options) - 1)) if spread else problem.signal
    noise = token_noise * torch.randn((*shape, problem.num_positions), **options) if token_noise else None
    return Samples(window, label, label * signal - float(problem.nuisance), noise)


def one_pass(
    problem: Problem, num_repeats: int, batch_size: int, generator: torch.Generator, **departures: float
) -> Iterator[Samples]:
    """Fresh batches without end."""
    while True:
        yield draw_samples(problem, num_repeats, batch_size, generator, **departures)


def epochs(
    problem: Problem,
    num_repeats: int,
    batch_size: int,
    generator: torch.Generator,
    *,
    num_samples: int,
    num_epochs: int,
    **departures: float,
) -> Iterator[Samples]:
    """Batches of a fixed sample, a different one for each repetition, in a new order in every epoch."""
    sample = draw_samples(problem, num_repeats, num_samples, generator, **departures)
    for _ in range(num_epochs):
        order = torch.rand((num_repeats, num_samples), generator=generator, device=generator.device).argsort(1)
        for chosen in order.split(batch_size, dim=1):
            rows = torch.arange(num_repeats, device=chosen.device)[:, None]
            window, label, value = (part[rows, chosen] for part in sample[:3])
            yield Samples(window, label, value, None if sample.noise is None else sample.noise[rows, chosen])


# ------------------------------------------------------------------------------------------------ networks


class ReadoutNetwork(nn.Module):
    """What follows the prompted site: frozen, and read out to one number.

    Its activations have P positions and some channels; the prompt moves along one unit direction of them. A prompt of
    zero reads out a sample's value.
    """

    direction: Float[Tensor, " channel"]

    def __init__(self, problem: Problem, direction: Sequence[float]) -> None:
        super().__init__()
        self.problem = problem
        vector = torch.tensor(direction, dtype=torch.float64)
        self.register_buffer("direction", vector / vector.norm())

    def tokens(
        self, window: Int[Tensor, "*batch"], value: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch position channel"]:
        """The site's activation for samples of this value in these windows."""
        raise NotImplementedError

    def forward(
        self, z: Float[Tensor, "*batch position channel"], prompt: Float[Tensor, "*#batch position channel"]
    ) -> Float[Tensor, "*batch"]:
        """The logit."""
        raise NotImplementedError

    def lifts(self, prompt: Float[Tensor, "repeat position channel"]) -> Float[Tensor, "repeat window"]:
        """What a prompt adds to the logit of a sample of each window."""
        raise NotImplementedError

    def _is_active(self, window: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch position"]:
        position = torch.arange(self.problem.num_positions, device=window.device)
        return (position // self.problem.reach == window[..., None]).double()


class Attention(ReadoutNetwork):
    """A class token's softmax attention over the positions: keys mark the active window, values carry the number.

    The prompt acts on the values. Softmax weights give each position of the window its share of 1 - q and every
    position q / P, the background; without background the attention is hard.
    """

    def __init__(self, problem: Problem, background: float = 0.0) -> None:
        super().__init__(problem, (0.0, 1.0))  # channels: key, value
        if not 0 <= background < 1:
            raise ValueError(f"the background {background} is a share of the attention, from 0 to below 1")
        self.background = background
        P, r = problem.num_positions, problem.reach
        self.key = math.log((P / background - P + r) / r) if background else 1.0  # hard: any that is larger

    def tokens(self, window, value):
        """Keys are 0 outside the window; a value is what makes the readout exact, given the window's share."""
        share = 1 - self.background + self.background * self.problem.reach / self.problem.num_positions
        active = self._is_active(window)
        return torch.stack([self.key * active, active * value[..., None] / share], dim=-1)

    def forward(self, z, prompt):
        keys, values = z[..., 0], ((z + prompt) * self.direction).sum(-1)
        if self.background:
            return (torch.softmax(keys, dim=-1) * values).sum(-1)
        chosen = (keys == keys.amax(-1, keepdim=True)).double()  # softmax in the limit of large keys
        return (chosen * values).sum(-1) / chosen.sum(-1)

    def lifts(self, prompt):
        along = prompt @ self.direction
        local = along.unflatten(-1, (-1, self.problem.reach)).mean(-1)
        return (1 - self.background) * local + self.background * along.mean(-1, keepdim=True)


class Convolution(ReadoutNetwork):
    """A small CNN: a convolution that tiles the map with square windows, ReLU, a sum over the map, and a bias.

    Its first channel says where the token is and is read together with the value: the prompt moves both. Windows
    without the token stay below the ReLU's kink.
    """

    weight: Float[Tensor, "filter channel width width"]
    scale = 4.0  # how far: more than any lift and value

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, (self.scale, 1.0))  # channels: presence, value
        self.side, self.width = math.isqrt(problem.num_positions), math.isqrt(problem.reach)
        if self.side**2 != problem.num_positions or self.width**2 != problem.reach or self.side % self.width:
            raise ValueError(
                f"{problem.num_positions} positions and a reach of {problem.reach}: square windows tile a "
                "square map only if both are squares and the sides divide"
            )
        taps = (self.direction / problem.reach)[None, :, None, None].expand(1, -1, self.width, self.width)
        self.register_buffer("weight", taps.contiguous())

    def tokens(self, window, value):
        """Along the direction the active window reads value + scale, the others -scale."""
        active = self._is_active(window)
        channels = torch.stack([2 * active - 1, active * value[..., None]], dim=-1)
        return channels * math.hypot(self.scale, 1.0)

    def forward(self, z, prompt):
        maps = self._convolved((z + prompt).flatten(0, -3)).unflatten(0, z.shape[:-2])
        return F.relu(maps).sum(-1) - self.scale

    def lifts(self, prompt):
        return self._convolved(prompt)

    def _convolved(self, z: Float[Tensor, "batch position channel"]) -> Float[Tensor, "batch window"]:
        """Positions are numbered window by window; the map has them in place."""
        tiles, width = self.side // self.width, self.width
        grid = z.view(len(z), tiles, tiles, width, width, -1).permute(0, 5, 1, 3, 2, 4)
        return F.conv2d(grid.reshape(len(z), -1, self.side, self.side), self.weight, stride=width).flatten(1)


def build(kind: str, problem: Problem, background: float = 0.0) -> ReadoutNetwork:
    """A network by name: "attention", soft if there is a background, or "convolution"."""
    if kind == "convolution" and not background:
        return Convolution(problem)
    if kind != "attention":
        raise ValueError(f"no network {kind!r} with a background of {background}; there are attention and convolution")
    return Attention(problem, background)


# ------------------------------------------------------------------------------------------------ training


def train_prompts(
    network: ReadoutNetwork, stream: Iterable[Samples], *, step: float, rule: Rule = "sgd"
) -> Iterator[Float[Tensor, "repeat position channel"]]:
    """Train prompts from zero on the mean hinge loss, by autograd; yields them after each batch.

    Args:
        network: Frozen.
        stream: Batches, as many as there are steps.
        step: As `Problem.lift` takes it.
        rule: How a gradient becomes a step; each repetition has its own.
    """
    problem, prompt = network.problem, None
    if rule == "safe":
        step, rule = 2 * step * problem.reach * float(problem.signal - problem.margin), "sgd"
    for window, label, value, noise in stream:
        z = network.tokens(window, value)
        if noise is not None:
            z = z + noise[..., None] * network.direction
        if prompt is None:
            prompt = torch.zeros_like(z[:, 0])
        prompt.requires_grad_()
        logits = network(z, prompt[:, None])
        loss = F.relu(float(problem.margin) - label * logits).mean(1).sum()  # relu: no gradient at the kink itself
        (gradient,) = torch.autograd.grad(loss, prompt)
        prompt = prompt.detach() - step * _STEP_DIRECTIONS[rule](gradient)
        yield prompt


def _normalized(gradient: Float[Tensor, "repeat position channel"]) -> Float[Tensor, "repeat position channel"]:
    norm = gradient.flatten(1).norm(dim=1)[:, None, None]
    return gradient / norm.where(norm > 0, 1.0)


_STEP_DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sgd": lambda gradient: gradient,
    "normalized": _normalized,
    "sign": torch.sign,
}


def steps_until(
    network: ReadoutNetwork, prompts: Iterable[Tensor], goal: Goal = "repaired", limit: int = 10**6
) -> Int[np.ndarray, " repeat"]:
    """Steps until every window of a repetition is repaired, or merely classified correctly.

    Raises:
        RuntimeError: If that takes more than ``limit`` steps, or the prompts end before.
    """
    problem, steps = network.problem, None
    for number, prompt in enumerate(prompts, 1):
        if steps is None:
            steps = torch.zeros(len(prompt), dtype=torch.int64, device=prompt.device)
        lifts = network.lifts(prompt)
        is_done = lifts >= float(problem.gap) if goal == "repaired" else lifts > float(problem.deficit)
        steps[(steps == 0) & is_done.all(1)] = number
        if steps.all():
            return steps.cpu().numpy()
        if number == limit:
            break
    left = "all" if steps is None else int((steps == 0).sum())
    raise RuntimeError(f"{left} repetitions are not {goal} yet; take more steps, or a step size that lasts")


def measured_error(
    network: ReadoutNetwork, prompt: Float[Tensor, "repeat position channel"], samples: Samples
) -> Float[np.ndarray, " repeat"]:
    """Share of samples on the wrong side, by a forward pass."""
    z = network.tokens(samples.window, samples.value)
    if samples.noise is not None:
        z = z + samples.noise[..., None] * network.direction
    return (samples.label * network(z, prompt[:, None]) <= 0).double().mean(1).cpu().numpy()


def expected_error(
    network: ReadoutNetwork, prompt: Float[Tensor, "repeat position channel"]
) -> Float[np.ndarray, " repeat"]:
    """The error on new samples without departures, exactly: over all windows and both labels."""
    lifts, signal, nuisance = network.lifts(prompt), float(network.problem.signal), float(network.problem.nuisance)
    wrong = (signal - nuisance + lifts <= 0).double() + (-signal - nuisance + lifts >= 0).double()
    return wrong.mean(1).div(2).cpu().numpy()
