"""Which layer to prompt: a search on a budget, which starts from `rank_sites`.

`find_site` spends a budget of FLOPs by successive halving over sites and learning rates; epochs are the resource,
prefixes are cached, and validation images alone decide.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apthory import backbones, methods, sites, training
from apthory.selection.scores import DEFAULT, SCORES, SECOND_ORDER, rank_sites
from apthory.tasks import Task
from apthory.training import bundle

__all__ = ["DEFAULT", "SCORES", "SECOND_ORDER", "Cost", "Search", "find_site", "rank_sites", "site_costs"]


class Cost(NamedTuple):
    """FLOPs for one image, by where a site cuts the backbone."""

    prefix: int  # forward, up to the site
    suffix: int  # forward, after it
    backward: int  # from the features to the site; weights frozen

    def of_training(self, num_configurations: int, num_classes: int, width: int, recipe: training.Recipe) -> int:
        """What `training.fit` spends on a bundle, without the prefix."""
        head = 2 * width * num_classes
        num_train, num_validation = recipe.num_train or 0, recipe.num_validation or 0
        step, look = self.suffix + self.backward + 3 * head, self.suffix + head
        epochs = recipe.num_epochs * (num_train * step + num_validation * look)
        return num_configurations * (epochs + min(num_train, bundle.NUM_CALIBRATION) * self.suffix)


def site_costs(backbone: nn.Module, places: Sequence[str]) -> dict[str, Cost]:
    """FLOPs before and after each place, from one forward and one backward pass of one image."""
    forward: dict[str, int] = {}
    backward: dict[str, int] = {}
    side = backbones.input_size(backbone)
    weight = next(backbone.parameters())
    x = torch.zeros(1, 3, side, side, dtype=weight.dtype, device=weight.device)
    with FlopCounterMode(display=False) as counter:

        def edit(site: str, z: Tensor) -> Tensor:
            forward[site] = counter.get_total_flops()
            shift = torch.zeros_like(z, requires_grad=True)
            shift.register_hook(lambda _: backward.update({site: counter.get_total_flops()}))
            return z + shift

        with sites.edited(backbone, {site: partial(edit, site) for site in places}):
            features = backbone(x)
        whole = counter.get_total_flops()
        features.sum().backward()
    return {site: Cost(forward[site], whole - forward[site], backward[site] - whole) for site in places}


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search on a budget found, and what it spent."""

    fits: tuple[training.Fit, ...]  # trained in full; the chosen one first
    trials: pd.DataFrame  # every training: epochs, site, learning_rate, validation_accuracy, validation_loss
    scores: pd.DataFrame  # what it started from, see `rank_sites`
    flops: int  # of scores, prefixes, training and validation
    exhaustive_flops: int  # of all sites with all learning rates, prefixes cached as well

    @property
    def fit(self) -> training.Fit:
        """The chosen prompt and head."""
        return self.fits[0]

    @property
    def site(self) -> str:
        """The site to prompt."""
        return self.fit.method.site

    @property
    def share(self) -> float:
        """FLOPs in units of the exhaustive sweep's."""
        return self.flops / self.exhaustive_flops


class _Candidate(NamedTuple):
    site: str
    learning_rate: float


def find_site(
    backbone: nn.Module,
    task: Task,
    *,
    recipe: training.Recipe | None = None,
    budget: float = 1 / 8,
    learning_rates: Sequence[float] = (4e-3, 1.6e-2, 6.4e-2),
    places: Sequence[str] | None = None,
    score: str = DEFAULT,
    num_second_order: int = 0,
    seed: int = 0,
) -> Search:
    """Choose a site and a learning rate, and train the prompt, on a share of what trying all of them costs.

    Successive halving in two rungs: the foremost candidates are trained for a third of the epochs, the better ones in
    full. (After fewer epochs, what looks best is what learns fast: late sites and small steps.) Sites enter in the
    order of their scores with the middle learning rate, then with the others. They differ in cost, which is known: a
    full training at the costliest site in the race is put aside, the rest of the budget goes to whatever it still
    pays for in this order, and so to cheap late sites where the next in line is an early one with its long suffix.
    The number of candidates follows from the budget, which holds whoever wins.

    Args:
        recipe: Of a full training.
        budget: Share of the FLOPs of training every site with every learning rate, prefixes cached.
        learning_rates: Ascending grid.
        places: Sites to choose from; all block sites but the image by default.
        score: Which one to start from, see `rank_sites`.
        num_second_order: As in `rank_sites`.
        seed: Of split, initial head and order of examples.

    Raises:
        ValueError: If the budget does not buy the scores and one whole training.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"a budget of {budget:g}: give a share of the exhaustive sweep's FLOPs, above 0 and at most 1")
    if not learning_rates:
        raise ValueError("learning_rates is empty; give at least one")
    recipe = recipe or training.Recipe()
    split = task.split(seed, recipe.num_train, recipe.num_validation, recipe.num_test)
    recipe = replace(recipe, num_train=len(split.train), num_validation=len(split.validation))
    scores = rank_sites(
        backbone,
        task,
        places,
        score=score,
        num_examples=min(len(split.train), 1000),
        num_second_order=num_second_order,
        num_validation=recipe.num_validation,
        seed=seed,
    )
    race = _Race(backbone, task, recipe, list(scores["site"]), seed)
    race.spent = sum(cost["flops"] for cost in scores.attrs["cost"].values())
    exhaustive = sum(race.cost([_Candidate(site, rate) for rate in learning_rates], recipe) for site in scores["site"])
    purse = int(budget * exhaustive)
    field = _queue(list(scores["site"]), learning_rates)
    *early, full = _ladder(recipe)
    for rung in early:
        entrants = race.affordable(field, rung, purse, aside=full)
        if sum(map(len, entrants.values())) > 1:  # a race of one decides nothing
            fits = race.run(entrants, rung)
            field = [_Candidate(fit.method.site, fit.configuration.learning_rate) for fit in fits]
    fits = race.run(race.affordable(field, full, purse), full)
    if not fits:
        cheapest = min(race.cost([candidate], recipe) for candidate in field)
        least = math.ceil(1000 * (race.spent + cheapest) / exhaustive) / 1000
        raise ValueError(
            f"a budget of {budget:g} of the exhaustive sweep buys no whole training; at least {least:.3f} does"
        )
    if not fits[0].epoch:
        raise ValueError(f"no prompt ever had a finite loss at the rates {learning_rates}; choose lower rates")
    return Search(
        fits=tuple(fits),
        trials=pd.DataFrame(race.trials),
        scores=scores,
        flops=race.spent,
        exhaustive_flops=exhaustive,
    )


def _queue(places: Sequence[str], learning_rates: Sequence[float]) -> list[_Candidate]:
    """Candidates in the order in which they enter: places, best first, with the middle rate, then with the others."""
    rates = sorted(learning_rates)
    middle = rates.pop((len(rates) - 1) // 2)
    first = [_Candidate(site, middle) for site in places]
    return first + [_Candidate(site, rate) for site in places for rate in rates]


def _ladder(recipe: training.Recipe) -> list[training.Recipe]:
    """A third and all of the epochs; only all if that is one."""
    return [
        replace(recipe, num_epochs=num) for num in sorted({max(1, round(recipe.num_epochs / 3)), recipe.num_epochs})
    ]


class _Race:
    """Trainings at many sites, with their caches, results and costs."""

    def __init__(
        self, backbone: nn.Module, task: Task, recipe: training.Recipe, places: Sequence[str], seed: int
    ) -> None:
        self.backbone, self.task, self.seed = backbone, task, seed
        self.costs = site_costs(backbone, places)
        if not (recipe.cache and sites.is_traceable(backbone)):  # the prefix runs with the suffix, every time
            self.costs = {site: Cost(0, c.prefix + c.suffix, c.backward) for site, c in self.costs.items()}
        with torch.no_grad():
            self.width = backbone(backbones.normalize(backbone, task.train[torch.arange(1)])).shape[1]
        self.caches: dict[str, training.PrefixCache] = {}
        self.trials: list[dict[str, Any]] = []
        self.spent = 0

    def cost(self, candidates: Sequence[_Candidate], recipe: training.Recipe) -> int:
        """FLOPs of training candidates at one site, with its prefix if that is not cached yet."""
        site = candidates[0].site
        images = 0 if site in self.caches else (recipe.num_train or 0) + (recipe.num_validation or 0)
        return self._training(site, len(candidates), recipe) + images * self.costs[site].prefix

    def affordable(
        self, field: Sequence[_Candidate], rung: training.Recipe, purse: int, *, aside: training.Recipe | None = None
    ) -> dict[str, list[_Candidate]]:
        """By site, the foremost candidates that a rung can pay for.

        Args:
            purse: FLOPs that all may spend, with what is spent already.
            aside: A training that is kept affordable for each of them.
        """
        taken: dict[str, list[_Candidate]] = {}
        used = reserve = 0
        for candidate in field:
            together = [*taken.get(candidate.site, []), candidate]
            own = self.cost(together, rung) - (self.cost(together[:-1], rung) if len(together) > 1 else 0)
            reserved = max(reserve, self._training(candidate.site, 1, aside)) if aside else 0
            if self.spent + used + own + reserved <= purse:
                taken[candidate.site] = together
                used, reserve = used + own, reserved
        return taken

    def run(self, entrants: Mapping[str, Sequence[_Candidate]], rung: training.Recipe) -> list[training.Fit]:
        """Train the candidates, a bundle for each site; the best on validation images first."""
        fits: list[training.Fit] = []
        for site, candidates in entrants.items():
            self.spent += self.cost(candidates, rung)
            cache = self.caches.setdefault(site, training.PrefixCache())
            bundle = [training.Configuration(learning_rate=c.learning_rate, seed=self.seed) for c in candidates]
            method = methods.ActivationPrompting(site=site)
            fits += training.fit(self.backbone, self.task, method, bundle, recipe=rung, cache=cache)
        fits.sort(key=lambda fit: (-fit.validation_accuracy, fit.validation_loss))  # as training.choose has it
        for fit in fits:
            trained = {"site": fit.method.site, "learning_rate": fit.configuration.learning_rate}
            result = {"validation_accuracy": fit.validation_accuracy, "validation_loss": fit.validation_loss}
            self.trials.append({"epochs": rung.num_epochs, **trained, **result})
        return fits

    def _training(self, site: str, num: int, recipe: training.Recipe) -> int:
        return self.costs[site].of_training(num, len(self.task.classes), self.width, recipe)
