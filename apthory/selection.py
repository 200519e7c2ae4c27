"""Which layer to prompt: scores that rank sites before anything is trained, and a search on a budget.

`rank_sites` fits a linear probe's head and takes one backward pass, which gives the gradients at every site.
`find_site` starts from these scores and spends a budget of FLOPs by successive halving over sites and learning
rates; epochs are the resource, prefixes are cached, and validation images alone decide.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from apthory import backbones, methods, sites, training
from apthory.progress import progress
from apthory.tasks import Task
from apthory.theory import tangent

_CHUNK = 64  # images that are differentiated at once
_DECAYS = (1e-3, 1e-2, 1e-1)  # of the probe's head, for features of root mean square one
_DIRECTIONS = 16  # of the logits in a tangent kernel, at most
_PRODUCTS = 3  # with a Gauss-Newton matrix, at most
_RIDGE = 1.0  # of the second-order gain: half of it, in nats, is what a prompt as large as the activation costs

SCORES: dict[str, Callable[[pd.DataFrame], pd.Series]] = {  # from the columns of `rank_sites`; larger is better
    "coherence": lambda table: table["coherence"],
    "windows": lambda table: -table["windows"],
    "gain": lambda table: table["gain"],
    "newton": lambda table: table["newton"],
    "alignment": lambda table: table["alignment"],
    # Found among products of powers of the columns, on half of the small suite's tasks (notebook 08): many regions
    # that pull apart, and strongly. It is the search's start.
    "found": lambda table: table["windows"] * table["individual"] / table["norm"],
}
SECOND_ORDER = ("newton", "alignment")
DEFAULT = "found"


# ------------------------------------------------------------------------------------------ scores


def rank_sites(
    backbone: nn.Module,
    task: Task,
    places: Sequence[str] | None = None,
    *,
    score: str = DEFAULT,
    num_examples: int = 400,
    num_second_order: int = 0,
    num_validation: int | None = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Score sites by the gradients that a prompt there would get from a converged linear probe; best first.

    The head is fitted on one half of the examples and the gradients are taken on the other, then the halves are
    swapped: a head that interpolates its examples leaves them no gradient. Each statistic is the mean over both.

    Args:
        places: Sites to rank; all block sites but the image by default.
        score: What to rank by, one of `SCORES`.
        num_examples: Images of the train part of `Task.split`, at most 1,000.
        num_second_order: Images among them for the scores newton and alignment, at most 200; 0 leaves both out.
        num_validation: Held out of the train part and not looked at, as in `training.Recipe`.
        seed: Of the split.

    Returns:
        A row for each site: depth (0 the image, 1 the last block site), norm (of the activation, mean), coherence,
        reach, coverage and windows as in `theory.tangent`; in nats and for a prompt as large as the activation, gain
        (negative if it is lost in noise) and individual (the same if each example had a prompt of its own); newton
        (nats) and alignment. ``attrs["cost"]`` has examples, FLOPs and seconds of the first and the second order.
    """
    if score not in SCORES or (score in SECOND_ORDER and not num_second_order):
        raise ValueError(
            f"cannot rank by {score!r}; there are {', '.join(SCORES)}, of which {' and '.join(SECOND_ORDER)} want "
            "num_second_order above 0"
        )
    if not (8 <= num_examples <= 1000 and (num_second_order == 0 or 4 <= num_second_order <= 200)):
        raise ValueError(
            f"num_examples is {num_examples} and num_second_order {num_second_order}; give 8 to 1000 images, and 0 or "
            "4 to 200 of them (halves of halves must not be empty)"
        )
    training.check_ready(backbone, task)
    every = sites.list_sites(backbone)
    places = every[1:] if places is None else [sites.resolve(backbone, site) for site in places]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels: no forward mode
        started = time.perf_counter()
        split = task.split(seed, num_examples, num_validation)
        tangents = _Tangents(backbone, task, places, split.train)
        rows = tangents.first_order()
        flops, seconds = counter.get_total_flops(), time.perf_counter() - started
        first = {"examples": len(split.train), "flops": flops + tangents.head_flops, "seconds": seconds}
        cost = {"first order": first}
        if num_second_order:
            started = time.perf_counter()
            rows = [
                {**one, **two} for one, two in zip(rows, tangents.second_order(num_second_order, seed), strict=True)
            ]
            flops, seconds = counter.get_total_flops() - flops, time.perf_counter() - started
            num = min(num_second_order, len(tangents.halves[0]))
            cost["second order"] = {"examples": num, "flops": flops, "seconds": seconds}
    table = pd.DataFrame(rows)
    table.insert(1, "depth", [every.index(site) / (len(every) - 1) if site in every else math.nan for site in places])
    table = table.sort_values("site", key=lambda _: -SCORES[score](table), kind="stable", ignore_index=True)
    table.attrs["cost"] = cost
    return table


class _Head(NamedTuple):
    weight: Float[Tensor, "width class"]
    bias: Float[Tensor, " class"]

    def __call__(self, features: Float[Tensor, "image width"]) -> Float[Tensor, "image class"]:
        return features.float() @ self.weight + self.bias


class _Tangents:
    """Training images in two halves, each with the head that was fitted on the other."""

    def __init__(
        self, backbone: nn.Module, task: Task, places: Sequence[str], indices: Int64[Tensor, " image"]
    ) -> None:
        self.backbone, self.images, self.places = backbone, task.train, places
        self.device = next(backbone.parameters()).device
        order = task.train.labels[indices].argsort(stable=True)  # so that both halves get every second of a class
        self.halves = [indices[order][start::2] for start in (0, 1)]
        self.units: dict[str, tuple[int, ...]] = {}
        self.norms: dict[str, float] = dict.fromkeys(places, 0.0)
        features = [self._features(half) for half in self.halves]
        self.head_flops = 0  # of fitting the heads, which is no work of torch's
        self.norms = {site: total / len(indices) for site, total in self.norms.items()}
        self.heads = self._cross_fit(features, len(task.classes))

    @torch.no_grad()
    def _features(self, half: Int64[Tensor, " image"]) -> Float[Tensor, "image width"]:
        """Features of the images; norms of the activations are summed up on the way."""

        def note(site: str, z: Tensor) -> Tensor:
            self.units[site] = tuple(z.shape[1:])
            self.norms[site] += float(z.float().flatten(1).norm(dim=1).sum())
            return z

        with sites.edited(self.backbone, {site: partial(note, site) for site in self.places}):
            chunks = [training.normalized(self.backbone, self.images, chunk) for chunk in half.split(_CHUNK)]
            return torch.cat([self.backbone(x).float().cpu() for x in chunks])

    def _cross_fit(self, features: Sequence[Float[Tensor, "image width"]], num_classes: int) -> list[_Head]:
        """A head for each half, fitted on the other, with the decay that gives unseen images the lowest loss."""
        labels = [self.images.labels[half] for half in self.halves]
        tried = []
        for decay in _DECAYS:
            fits = [_fit_head(features[1 - k], labels[1 - k], num_classes, decay) for k in (0, 1)]
            heads = [head for head, _ in fits]
            self.head_flops += sum(flops for _, flops in fits)
            unseen = [functional.cross_entropy(head(x), y) for head, x, y in zip(heads, features, labels, strict=True)]
            tried.append((float(sum(unseen)), heads))
        best = min(tried, key=lambda pair: pair[0])[1]
        return [_Head(*(value.to(self.device) for value in head)) for head in best]

    def _model(self, head: _Head, x: Tensor, shifts: tangent.Shifts) -> Float[Tensor, "image class"]:
        """Logits with a shift for each image at every place."""
        with sites.edited(self.backbone, {site: partial(add, shift) for site, shift in shifts.items()}):
            return head(self.backbone(x))

    def _at(self, chunk: Int64[Tensor, " image"]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Images, labels, and shifts of zero at every place."""
        shifts = {site: torch.zeros(len(chunk), *unit, device=self.device) for site, unit in self.units.items()}
        x = training.normalized(self.backbone, self.images, chunk)
        return x, self.images.labels[chunk].to(self.device), shifts

    def first_order(self) -> list[dict[str, Any]]:
        """T1, T2 and the first-order T3."""
        axes = {site: sites.channel_axis(self.backbone, site) for site in self.places}
        by_half = []
        for half, head in zip(self.halves, self.heads, strict=True):
            parts = []
            for chunk in half.split(_CHUNK):
                x, labels, shifts = self._at(chunk)
                loss = partial(functional.cross_entropy, target=labels, reduction="none")
                g = tangent.example_gradients(partial(self._model, head, x), shifts, loss)
                parts.append({site: tangent.Gradients.of(g[site], axes[site]) for site in self.places})
            by_half.append({site: reduce(add, (part[site] for part in parts)) for site in self.places})
        rows = []
        for site, norm in self.norms.items():
            both = [half[site] for half in by_half]
            names = ("coherence", "reach", "coverage", "windows")
            means = {name: float(np.mean([getattr(one, name) for one in both])) for name in names}
            gradient = tangent.signed_root(float(np.mean([one.mean_square for one in both])))
            individual = float(np.mean([one.individual_norm for one in both]))
            row = {"site": site, "norm": norm, **means, "gain": norm * gradient, "individual": norm * individual}
            rows.append(row)
        return rows

    def second_order(self, num: int, seed: int) -> list[dict[str, float]]:
        """The second-order T3, and T4; all examples from the half with the first head."""
        half, head = self.halves[0], self.heads[0]
        chosen = half[torch.linspace(0, len(half) - 1, min(num, len(half))).long()]  # in proportion to the classes
        x, labels, shifts = self._at(chosen)
        frame = tangent.frame(_DIRECTIONS, len(head.bias), torch.Generator().manual_seed(seed)).to(self.device)
        kernels = tangent.tangent_kernels(partial(self._model, head, x), shifts, frame)
        target = tangent.label_kernel(labels)
        return [
            {"newton": self._newton(site, head, chosen), "alignment": tangent.alignment(kernels[site], target)}
            for site in progress(self.places, desc="second order")
        ]

    def _newton(self, site: str, head: _Head, chosen: Int64[Tensor, " image"]) -> float:
        """The gain of each half's step by the other half's gradient: without the bias of judging its own."""
        prompt, ridge = torch.zeros(self.units[site], device=self.device), _RIDGE / self.norms[site] ** 2
        steps = []
        for part in (chosen[::2], chosen[1::2]):
            x, labels, _ = self._at(part)
            loss = partial(functional.cross_entropy, target=labels)
            model = self._prompted(site, head, x)
            steps.append(tangent.newton(model, prompt, loss, ridge, max_products=_PRODUCTS))
        one, other = steps
        return float((one.step * other.gradient).sum() + (other.step * one.gradient).sum()) / 4

    def _prompted(self, site: str, head: _Head, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Logits with one prompt at the site; what lies before it is computed once."""
        prompts: list[Tensor] = []

        def edit(z: Tensor) -> Tensor:
            return z + prompts[-1]

        prefix, suffix = sites.split(self.backbone, site, {site: edit})
        with torch.no_grad():
            crossing = prefix(x)

        def model(prompt: Tensor) -> Tensor:
            prompts[:] = [prompt]
            return head(suffix(*crossing))

        return model


def _fit_head(
    features: Float[Tensor, "image width"], labels: Int64[Tensor, " image"], num_classes: int, decay: float
) -> tuple[_Head, int]:
    """A converged linear probe, and its FLOPs: cross-entropy with weight decay, features of root mean square one."""
    unit = training.rms(features[None])
    x = np.pad((features / unit).double().numpy(), ((0, 0), (0, 1)), constant_values=1.0)  # the last column: bias
    target = np.eye(num_classes)[labels.numpy()]
    shape = (x.shape[1], num_classes)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        table = flat.reshape(shape)
        logs = log_softmax(x @ table, axis=1)
        loss = -(target * logs).sum() / len(x) + decay / 2 * (table**2).sum()
        return loss, (x.T @ (np.exp(logs) - target) / len(x) + decay * table).ravel()

    options = {"maxiter": 1000, "maxfun": 2000, "gtol": 1e-6, "ftol": 1e-14}
    found = minimize(objective, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B", options=options)
    table = torch.from_numpy(found.x.reshape(shape)).float()
    return _Head(table[:-1] / unit, table[-1]), 4 * found.nfev * x.shape[0] * x.shape[1] * num_classes


# ------------------------------------------------------------------------------------------ cost


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
        return num_configurations * (epochs + min(num_train, training._CALIBRATION) * self.suffix)


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


# ------------------------------------------------------------------------------------------ search


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
    recipe: training.Recipe | None = None,
    *,
    budget: float = 1 / 8,
    learning_rates: Sequence[float] = (4e-3, 1.6e-2, 6.4e-2),
    places: Sequence[str] | None = None,
    score: str = DEFAULT,
    num_second_order: int = 0,
    seed: int = 0,
) -> Search:
    """Choose a site and a learning rate, and train the prompt, on a share of what trying all of them costs.

    Successive halving: the candidates that the scores put first are trained for a ninth of the epochs, the better
    ones for a third, the best in full. Every rung gets an equal part of what the last one, for the costliest candidate,
    leaves; so the number of candidates follows from the budget, and the budget holds whoever wins.

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
    # Both a better score and a rate nearer to the middle of the grid bring a candidate forward.
    middle = (len(learning_rates) - 1) / 2
    distance = {
        _Candidate(site, rate): (rank + abs(index - middle), rank)
        for rank, site in enumerate(scores["site"])
        for index, rate in enumerate(sorted(learning_rates))
    }
    field = sorted(distance, key=lambda candidate: distance[candidate])
    purse = int(budget * exhaustive)
    ladder, fits = _ladder(recipe), []
    for index, rung in enumerate(ladder):
        entrants = race.affordable(field, rung, ladder[index + 1 :], purse)
        if len(entrants) > 1 or rung is ladder[-1]:  # a race of one decides nothing
            fits = race.run(entrants, rung)
            field = [_Candidate(fit.method.site, fit.configuration.learning_rate) for fit in fits]
    if not fits:
        cheapest = min(race.cost([candidate], recipe) for candidate in distance)
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


def _ladder(recipe: training.Recipe) -> list[training.Recipe]:
    """A ninth, a third and all of the epochs, without repetitions."""
    epochs = sorted({max(1, round(recipe.num_epochs / share)) for share in (9, 3, 1)})
    return [replace(recipe, num_epochs=num) for num in epochs]


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
            self.width = backbone(training.normalized(backbone, task.train, torch.arange(1))).shape[1]
        self.caches: dict[str, training.PrefixCache] = {}
        self.trials: list[dict[str, Any]] = []
        self.spent = 0

    def cost(self, candidates: Sequence[_Candidate], recipe: training.Recipe) -> int:
        """FLOPs of training candidates at one site, with its prefix if that is not cached yet."""
        site = candidates[0].site
        images = 0 if site in self.caches else (recipe.num_train or 0) + (recipe.num_validation or 0)
        return self._training(site, len(candidates), recipe) + images * self.costs[site].prefix

    def affordable(
        self, field: Sequence[_Candidate], rung: training.Recipe, later: Sequence[training.Recipe], purse: int
    ) -> dict[str, list[_Candidate]]:
        """By site, the foremost candidates that this rung can pay for; what later rungs need for one is put aside."""
        taken: dict[str, list[_Candidate]] = {}
        used = reserve = 0
        for candidate in field:
            together = [*taken.get(candidate.site, []), candidate]
            own = self.cost(together, rung) - (self.cost(together[:-1], rung) if len(together) > 1 else 0)
            aside = max(reserve, sum(self._training(candidate.site, 1, recipe) for recipe in later))
            if (used + own) * max(1, len(later)) <= purse - self.spent - aside:
                taken[candidate.site] = together
                used, reserve = used + own, aside
        return taken

    def run(self, entrants: Mapping[str, Sequence[_Candidate]], rung: training.Recipe) -> list[training.Fit]:
        """Train the candidates, a bundle for each site; the best on validation images first."""
        fits: list[training.Fit] = []
        for site, candidates in entrants.items():
            self.spent += self.cost(candidates, rung)
            cache = self.caches.setdefault(site, training.PrefixCache())
            bundle = [training.Configuration(learning_rate=c.learning_rate, seed=self.seed) for c in candidates]
            method = methods.ActivationPrompting(site=site)
            fits += training.fit(self.backbone, self.task, method, bundle, rung, cache=cache)
        fits.sort(key=lambda fit: (-fit.validation_accuracy, fit.validation_loss))  # as training.choose has it
        for fit in fits:
            trained = {"site": fit.method.site, "learning_rate": fit.configuration.learning_rate}
            result = {"validation_accuracy": fit.validation_accuracy, "validation_loss": fit.validation_loss}
            self.trials.append({"epochs": rung.num_epochs, **trained, **result})
        return fits

    def _training(self, site: str, num: int, recipe: training.Recipe) -> int:
        return self.costs[site].of_training(num, len(self.task.classes), self.width, recipe)
