"""Scores that rank the sites of a backbone for a task before any prompt is trained.

`rank_sites` fits a linear probe's head on one half of the examples and takes the gradients at every site from one
backward pass over the other half.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial, reduce
from itertools import groupby
from operator import add, itemgetter
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
from apthory._tools.progress import progress
from apthory.tasks import Task
from apthory.theory import tangent

_CHUNK = 64  # images that are differentiated at once
_DECAYS = (1e-3, 1e-2, 1e-1)  # of the probe's weights, for features of root mean square one
_DIRECTIONS = 16  # of the logits in a tangent kernel, at most
_PRODUCTS = 3  # with a Gauss-Newton matrix, at most
_RIDGE = 1.0  # of the second-order gain: half of it, in nats, is what a prompt as large as the activation costs
SCORES: dict[str, Callable[[pd.DataFrame], pd.Series]] = {  # from the columns of `rank_sites`; larger is better
    "coherence": lambda table: table["coherence"],
    "windows": lambda table: -table["windows"],
    "gain": lambda table: table["gain"],
    "newton": lambda table: table["newton"],  # three steps of conjugate gradients, not the full solve
    "alignment": lambda table: table["alignment"],
    # Found among products of powers of the columns, on half of the small suite's tasks (notebook 08): many regions
    # that pull apart, and strongly. It is the search's start.
    "found": lambda table: table["windows"] * table["individual"] / table["norm"],
}
SECOND_ORDER = ("newton", "alignment")
DEFAULT = "found"


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

    Every image goes forward once. One half of them, of every class, fits the head; the other half goes backward with
    it. (A head that interpolates its images leaves them no gradient, so it must not have seen them; to swap the
    halves would take a second forward pass, since the head is not known in the first one.)

    Args:
        places: Sites to rank; all block sites but the image by default.
        score: What to rank by, one of `SCORES`.
        num_examples: Images of the train part of `Task.split`, at most 1,000.
        num_second_order: Images of the second half for the scores newton and alignment, at most 200, in pairs of one
            class; 0 leaves both out. newton stops after three steps of conjugate gradients.
        num_validation: Held out of the train part and not looked at, as in `training.Recipe`.
        seed: Of the split.

    Returns:
        A row for each site: depth (0 the image, 1 the last block site), norm (of the activation, mean over the first
        half), coherence, reach, coverage and windows as in `theory.tangent`; in nats and for a prompt as large as the
        activation, gain (negative if it is lost in noise) and individual (the same if each example had a prompt of
        its own); newton (nats) and alignment. ``attrs["cost"]`` has examples, FLOPs and seconds of the first and the
        second order.
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
    places = every[1:] if places is None else list(dict.fromkeys(sites.resolve(backbone, site) for site in places))
    if not places:
        raise ValueError("places is empty; give at least one site, or leave it out for all block sites")
    split = task.split(seed, num_examples, num_validation)
    if task.train.labels[split.train].bincount().max() < 4:
        raise ValueError(
            f"none of the {len(task.classes)} classes has four of the {len(split.train)} images, two for the head and "
            "two for the gradients; raise num_examples"
        )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels: no forward mode
        started = time.perf_counter()
        tangents = _Tangents(backbone, task, places, split.train, num_second_order)
        rows = tangents.first_order()
        flops, seconds = counter.get_total_flops(), time.perf_counter() - started
        first = {"examples": len(split.train), "flops": flops + tangents.head_flops, "seconds": seconds}
        cost = {"first order": first}
        if num_second_order:
            started = time.perf_counter()
            rows = [{**one, **two} for one, two in zip(rows, tangents.second_order(seed), strict=True)]
            flops, seconds = counter.get_total_flops() - flops, time.perf_counter() - started
            cost["second order"] = {"examples": tangents.pairs.numel(), "flops": flops, "seconds": seconds}
    table = pd.DataFrame(rows)
    table.insert(1, "depth", [_depth(site, every) for site in table["site"]])
    table = table.sort_values("site", key=lambda _: -SCORES[score](table), kind="stable", ignore_index=True)
    table.attrs["cost"] = cost
    return table


def _depth(site: str, every: Sequence[str]) -> float:
    return every.index(site) / (len(every) - 1) if site in every else math.nan


class _Tangents:
    """Training images in two halves: one fitted the head, the gradients of the other, unseen one are taken."""

    def __init__(
        self,
        backbone: nn.Module,
        task: Task,
        places: Sequence[str],
        indices: Int64[Tensor, " image"],
        num_second_order: int = 0,
    ) -> None:
        self.backbone, self.images, self.places = backbone, task.train, list(places)
        self.device = next(backbone.parameters()).device
        by_class = indices[task.train.labels[indices].argsort(stable=True)]
        self.seen, self.unseen = by_class[::2], by_class[1::2]
        self.pairs = self._pairs(num_second_order)
        self.units: dict[str, tuple[int, ...]] = {}
        self.norms: dict[str, float] = dict.fromkeys(places, 0.0)
        features, labels = self._features(), self.images.labels[self.seen]
        self._check_activations()
        head, self.head_flops = _fit_head(features, labels, len(task.classes))  # the fit is no work of torch's
        self.head = _Head(*(value.to(self.device) for value in head))

    def _pairs(self, num: int) -> Int64[Tensor, "pair 2"]:
        """At most that many unseen images, two by two of one class: the columns are halves with the same classes.

        Drawn without regard to classes, images of a hundred classes make halves that have hardly one in common.
        """
        labels = self.images.labels[self.unseen]
        sizes = labels.unique_consecutive(return_counts=True)[1]
        pairs = torch.cat([own[: len(own) // 2 * 2].view(-1, 2) for own in self.unseen.split(sizes.tolist())])
        kept = min(num // 2, len(pairs))
        chosen = pairs[torch.arange(kept) * len(pairs) // max(kept, 1)]  # in proportion to the classes
        if kept and len(self.images.labels[chosen[:, 0]].unique()) < 2:
            raise ValueError(
                f"all {chosen.numel()} images of the second order are of one class, out of {len(sizes)}; raise "
                "num_second_order or num_examples, or leave the second order out (num_second_order=0)"
            )
        return chosen

    @torch.no_grad()
    def _features(self) -> Float[Tensor, "image width"]:
        """Features of the seen images; the norms of the activations are taken on the way."""

        def note(site: str, z: Tensor) -> Tensor:
            self.units[site] = tuple(z.shape[1:])
            self.norms[site] += float(z.float().flatten(1).norm(dim=1).sum()) / len(self.seen)
            return z

        with sites.edited(self.backbone, {site: partial(note, site) for site in self.places}):
            chunks = [backbones.normalize(self.backbone, self.images[chunk]) for chunk in self.seen.split(_CHUNK)]
            return torch.cat([self.backbone(x).float().cpu() for x in chunks])

    def _check_activations(self) -> None:
        """Refuse sites without a finite activation; leave out, with a warning, those where it is always zero."""
        if uncalled := [site for site in self.places if site not in self.units]:
            raise ValueError(f"the backbone never calls the module of site {uncalled[0]!r}; leave it out of places")
        if lost := [site for site, norm in self.norms.items() if not math.isfinite(norm)]:
            raise ValueError(f"the activation at site {lost[0]!r} is not finite; check the weights and the images")
        if silent := [site for site, norm in self.norms.items() if norm == 0]:
            found = f"the activation is zero for all {len(self.seen)} images at {', '.join(silent)}"
            if len(silent) == len(self.places):
                raise ValueError(f"{found}, so there is no site to rank; choose other places")
            warnings.warn(f"{found}: left out of the ranking", stacklevel=4)
            for site in silent:
                del self.norms[site], self.units[site]
            self.places = list(self.norms)

    def _model(self, x: Tensor, shifts: tangent.Shifts) -> Float[Tensor, "image class"]:
        """Logits with shifts at every place, one for each image or one for all."""
        with sites.edited(self.backbone, {site: partial(add, shift) for site, shift in shifts.items()}):
            return self.head(self.backbone(x))

    def _at(self, chunk: Int64[Tensor, " image"]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Images, labels, and shifts of zero at every place."""
        shifts = {site: torch.zeros(len(chunk), *unit, device=self.device) for site, unit in self.units.items()}
        x = backbones.normalize(self.backbone, self.images[chunk])
        return x, self.images.labels[chunk].to(self.device), shifts

    def first_order(self) -> list[dict[str, Any]]:
        """T1, T2 and the first-order T3."""
        classes = (reduce(_joined, map(itemgetter(1), runs)) for _, runs in groupby(self._gradients(), itemgetter(0)))
        sums = reduce(_joined, ({site: one.as_stratum() for site, one in by_site.items()} for by_site in classes))
        rows = []
        for site, norm in self.norms.items():
            own = sums[site]
            spread = {name: getattr(own, name) for name in ("coherence", "reach", "coverage", "windows")}
            gains = {"gain": norm * own.mean_norm, "individual": norm * own.individual_norm}
            rows.append({"site": site, "norm": norm, **spread, **gains})
        return rows

    def _gradients(self) -> Iterator[tuple[int, dict[str, tangent.Gradients]]]:
        """Class by class (that is how the images are ordered), in pieces: the sums at every site."""
        axes = _channel_axes(self.backbone, self.places, backbones.normalize(self.backbone, self.images[self.seen[:1]]))
        for chunk in self.unseen.split(_CHUNK):
            x, labels, shifts = self._at(chunk)
            loss = partial(functional.cross_entropy, target=labels, reduction="none")
            g = tangent.example_gradients(partial(self._model, x), shifts, loss)
            classes, sizes = labels.unique_consecutive(return_counts=True)
            pieces = {site: g[site].split(sizes.tolist()) for site in self.places}
            for index, label in enumerate(classes.tolist()):
                yield label, {site: tangent.Gradients.of(pieces[site][index], axes[site]) for site in self.places}

    def second_order(self, seed: int) -> list[dict[str, float]]:
        """The second-order T3, and T4."""
        chosen, parts = self.pairs.flatten(), []
        for chunk in chosen.split(_CHUNK):
            x, _, shifts = self._at(chunk)
            parts.append((partial(self._model, x), shifts))
        frame = tangent.frame(_DIRECTIONS, len(self.head.bias), torch.Generator().manual_seed(seed)).to(self.device)
        kernels = tangent.tangent_kernels(parts, frame)
        target = tangent.label_kernel(self.images.labels[chosen].to(self.device))
        others = [self._gradient_without(half) for half in self.pairs.unbind(1)]
        return [
            {
                "newton": sum(map(partial(self._newton, site), self.pairs.unbind(1), others)) / 2,
                "alignment": tangent.alignment(kernels[site], target),
            }
            for site in progress(self.places, desc="second order")
        ]

    def _gradient_without(self, half: Int64[Tensor, " image"]) -> dict[str, Tensor]:
        """A prompt's gradient at every site from the other unseen images, each class with the weight it has with all.

        Judged by the other column alone, a step would be praised for meeting its own choice of classes again.
        """
        rest = self.unseen[~torch.isin(self.unseen, half)]
        sizes, left = (self.images.labels[part].bincount(minlength=len(self.head.bias)) for part in (self.unseen, rest))
        weights = (sizes / left.clamp(min=1) / len(self.unseen)).float().to(self.device)
        prompts = {site: torch.zeros(unit, device=self.device).requires_grad_() for site, unit in self.units.items()}
        total = {site: torch.zeros_like(prompt) for site, prompt in prompts.items()}
        for chunk in rest.split(_CHUNK):
            x, labels, _ = self._at(chunk)
            losses = functional.cross_entropy(self._model(x, prompts), labels, reduction="none")
            gradients = torch.autograd.grad(losses @ weights[labels], list(prompts.values()))
            for site, own in zip(prompts, gradients, strict=True):
                total[site] += own
        return total

    def _newton(self, site: str, half: Int64[Tensor, " image"], others: Mapping[str, Tensor]) -> float:
        """The gain of the step that these images want, by the gradient of others."""
        prompt, ridge = torch.zeros(self.units[site], device=self.device), _RIDGE / self.norms[site] ** 2
        prompts: list[Tensor] = []  # the one that the suffix adds is the last
        prefix, suffix = sites.split(self.backbone, site, {site: lambda z: z + prompts[-1]})

        def part(chunk: Int64[Tensor, " image"]) -> tangent.ExampleSet:
            x, labels, _ = self._at(chunk)
            with torch.no_grad():
                crossing = prefix(x)

            def model(prompt: Tensor) -> Tensor:
                prompts[:] = [prompt]
                return self.head(suffix(*crossing))

            return tangent.ExampleSet(model, lambda y: functional.cross_entropy(y, labels, reduction="sum") / len(half))

        found = tangent.newton(list(map(part, half.split(_CHUNK))), prompt, ridge, max_products=_PRODUCTS)
        return float((found.step * others[site]).sum()) / 2


def _joined(
    first: Mapping[str, tangent.Gradients], second: Mapping[str, tangent.Gradients]
) -> dict[str, tangent.Gradients]:
    return {site: first[site] + second[site] for site in first}


class _Head(NamedTuple):
    weight: Float[Tensor, "width class"]
    bias: Float[Tensor, " class"]

    def __call__(self, features: Float[Tensor, "image width"]) -> Float[Tensor, "image class"]:
        return features.float() @ self.weight + self.bias


def _fit_head(
    features: Float[Tensor, "image width"], labels: Int64[Tensor, " image"], num_classes: int
) -> tuple[_Head, int]:
    """A converged linear probe, and its FLOPs; two folds choose the weight decay. Images come ordered by class."""
    folds = [slice(0, None, 2), slice(1, None, 2)]
    tried, spent = [], 0
    for decay in _DECAYS:
        unseen = 0.0
        for own, other in (folds, folds[::-1]):
            head, flops = _solve_head(features[own], labels[own], num_classes, decay)
            # Whatever the decay, a class that the fold has not met is as unlikely as the solver's patience allows.
            is_met = torch.isin(labels[other], labels[own])
            unseen += float(functional.cross_entropy(head(features[other][is_met]), labels[other][is_met]))
            spent += flops
        tried.append((unseen, decay))
    head, flops = _solve_head(features, labels, num_classes, min(tried)[1])
    return head, spent + flops


def _solve_head(
    features: Float[Tensor, "image width"], labels: Int64[Tensor, " image"], num_classes: int, decay: float
) -> tuple[_Head, int]:
    """Cross-entropy with a decay of the weights, the bias free, for features in units of their root mean square."""
    unit = methods.rms(features[None])
    x = np.pad((features / unit).double().numpy(), ((0, 0), (0, 1)), constant_values=1.0)  # the last column: bias
    target = np.eye(num_classes)[labels.numpy()]
    shape = (x.shape[1], num_classes)
    decays = np.append(np.full(shape[0] - 1, decay), 0.0)[:, None]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        table = flat.reshape(shape)
        logs = log_softmax(x @ table, axis=1)
        loss = -(target * logs).sum() / len(x) + (decays * table**2).sum() / 2
        return loss, (x.T @ (np.exp(logs) - target) / len(x) + decays * table).ravel()

    options = {"maxiter": 1000, "maxfun": 2000, "gtol": 1e-6, "ftol": 1e-14}
    found = minimize(objective, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B", options=options)
    table = torch.from_numpy(found.x.reshape(shape)).float()
    return _Head(table[:-1] / unit, table[-1]), 4 * found.nfev * x.shape[0] * x.shape[1] * num_classes


def _channel_axes(backbone: nn.Module, places: Sequence[str], x: Float[Tensor, "1 *image"]) -> dict[str, int]:
    try:
        return sites.channel_axes(backbone, places)
    except sites.UntraceableError:
        return _called_axes(backbone, places, x)


@torch.no_grad()
def _called_axes(backbone: nn.Module, places: Sequence[str], x: Float[Tensor, "1 *image"]) -> dict[str, int]:
    """Channel axes without a graph: by the next layer that is given such a shape, else by the last that made one."""
    given: dict[str, int] = {}
    made: dict[str, int] = {}
    open_sites: dict[str, torch.Size] = {}
    last: dict[torch.Size, int] = {}

    def note(site: str, z: Tensor) -> Tensor:
        open_sites[site] = z.shape
        if z.shape in last:
            made[site] = last[z.shape]
        return z

    def axis(layer: nn.Module, z: Tensor) -> int:
        return 1 - z.ndim if isinstance(layer, sites.CHANNELS_FIRST) else -1

    def enter(layer: nn.Module, args: tuple[Any, ...]) -> None:
        for site in [site for site, shape in open_sites.items() if args and args[0].shape == shape]:
            given[site] = axis(layer, args[0])
            del open_sites[site]

    def leave(layer: nn.Module, args: tuple[Any, ...], z: Tensor) -> None:
        last[z.shape] = axis(layer, z)

    with ExitStack() as stack, sites.edited(backbone, {site: partial(note, site) for site in places}):
        for layer in backbone.modules():
            if isinstance(layer, sites.CHANNELS_FIRST + sites.CHANNELS_LAST):
                stack.callback(layer.register_forward_pre_hook(enter).remove)
                stack.callback(layer.register_forward_hook(leave).remove)
        backbone(x)
    axes = {**made, **given}
    if lost := [site for site in places if site not in axes]:
        raise ValueError(f"cannot tell the channel axis of site {lost[0]!r}: no layer is given or makes such a shape")
    return axes
