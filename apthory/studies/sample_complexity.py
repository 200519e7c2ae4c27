"""Measurements behind the theorem on reach, each from its configuration alone: what a record holds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from apthory.lab import records
from apthory.theory import simulation
from apthory.theory.reach import Problem, Rule


@records.versioned(1, name="apthory.theory.study.measure_counts")
def measure_counts(points: Sequence[Sequence[int]], num_repeats: int, num_kept: int, seed: int = 0) -> dict[str, Any]:
    """The counting process at points (P, r, m): mean and deviation of the samples, and the first repetitions."""
    rows = []
    for index, (num_positions, reach, visits) in enumerate(points):
        random = np.random.default_rng([seed, index])
        samples = simulation.count_samples(num_positions, reach, visits, num_repeats, random)
        rows.append(_row(num_positions, reach, visits, samples, num_kept))
    return {"rows": rows}


@records.versioned(1, name="apthory.theory.study.measure_descent")
def measure_descent(
    network: str,
    points: Sequence[Sequence[int]],
    step: float,
    rule: Rule = "sgd",
    batch_size: int = 1,
    background: float = 0.0,
    goal: simulation.Goal = "repaired",
    seed: int = 0,
) -> dict[str, Any]:
    """Training in one pass at points (P, r, repetitions): steps until every window is repaired, or correct."""
    rows = []
    for index, (num_positions, reach, num_repeats) in enumerate(points):
        problem = Problem(num_positions=num_positions, reach=reach)
        net = simulation.build(network, problem, background)
        stream = simulation.one_pass(problem, num_repeats, batch_size, _generator(seed, index))
        steps = simulation.steps_until(net, simulation.train_prompts(net, stream, step=step, rule=rule), goal)
        lift = problem.lift(step, rule, l1=float(net.direction.abs().sum()))
        rows.append(_row(num_positions, reach, problem.visits(lift, batch_size), steps, num_repeats))
    return {"rows": rows}


@records.versioned(1, name="apthory.theory.study.measure_epochs")
def measure_epochs(
    points: Sequence[Mapping[str, Any]], num_positions: int, num_repeats: int, step: float, seed: int = 0
) -> dict[str, Any]:
    """Training on a fixed sample for as many epochs as repair takes: mean test error, its standard error.

    Args:
        points: Mappings of reach, rule, batch_size and num_samples.
        num_positions: P.
        num_repeats: Independent samples and trainings at each point.
        step: eta.
        seed: Of everything random.
    """
    rows = []
    for index, point in enumerate(points):
        problem = Problem(num_positions=num_positions, reach=point["reach"])
        net = simulation.Attention(problem)
        visits = problem.visits(problem.lift(step, point["rule"]), point["batch_size"])
        stream = simulation.epochs(
            problem, num_repeats, point["batch_size"], _generator(seed, index),
            num_samples=point["num_samples"], num_epochs=visits,
        )  # fmt: skip
        *_, prompt = simulation.train_prompts(net, stream, step=step, rule=point["rule"])
        errors = simulation.expected_error(net, prompt)
        rows.append({**point, "error": errors.mean(), "standard_error": errors.std(ddof=1) / np.sqrt(num_repeats)})
    return {"rows": rows}


@records.versioned(1, name="apthory.theory.study.measure_errors")
def measure_errors(
    num_positions: int,
    reaches: Sequence[int],
    departures: Sequence[Mapping[str, float]],
    num_samples: Sequence[int],
    num_repeats: int,
    num_test: int,
    step: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Test error along one pass, on fresh samples, with token noise or varying margins."""
    rows = []
    for index, (reach, departure) in enumerate((r, d) for r in reaches for d in departures):
        problem, generator = Problem(num_positions=num_positions, reach=reach), _generator(seed, index)
        net = simulation.Attention(problem)
        stream = simulation.one_pass(problem, num_repeats, 1, generator, **departure)
        for number, prompt in enumerate(simulation.train_prompts(net, stream, step=step), 1):
            if number in num_samples:
                test = simulation.draw_samples(problem, num_repeats, num_test, generator, **departure)
                errors = simulation.measured_error(net, prompt, test)
                row = {"reach": reach, **departure, "num_samples": number, "error": errors.mean()}
                rows.append({**row, "standard_error": errors.std(ddof=1) / np.sqrt(num_repeats)})
            if number >= max(num_samples):
                break
    return {"rows": rows}


def _row(num_positions: int, reach: int, visits: int, samples: np.ndarray, num_kept: int) -> dict[str, Any]:
    row = {"positions": num_positions, "reach": reach, "visits": visits, "repeats": len(samples)}
    return {**row, "mean": samples.mean(), "deviation": samples.std(ddof=1), "samples": samples[:num_kept]}


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + index)
