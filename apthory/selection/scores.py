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
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from apthory import backbones, methods, sites, training
from apthory._tools.moved import warn_of_old_name
from apthory._tools.progress import progress
from apthory.tasks import Task
from apthory.theory import tangent

_CHUNK = 64  # How many images are differentiated at once.
_DECAYS = (1e-3, 1e-2, 1e-1)  # The weight decays that a probe tries, for features of root mean square one.
_DIRECTIONS = 16  # A tangent kernel takes at most this many directions of the logits.
_PRODUCTS = 3  # The second-order gain takes at most this many products with a Gauss-Newton matrix.
_RIDGE = 1.0  # In the second-order gain a prompt as large as the activation costs half of this, in nats.
_TOLERANCE = 1e-6  # A probe is at rest when no derivative of its objective is larger.
_MAX_ITERATIONS = 10_000  # The slowest probe of notebook 08 comes to rest after 1,157.
# scikit-learn tells how many iterations L-BFGS took, not how often it evaluated the loss and its gradient. An iteration
# evaluates them once, or more often where its line search has to: the probes of notebook 08 take 1.02 to 1.11
# evaluations an iteration. We count the upper end, so that a budget holds.
_EVALUATIONS_PER_ITERATION = 1.11
# Each score is a function of the columns of `rank_sites`. A larger one is better.
SCORES: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "coherence": lambda table: table["coherence"],
    "windows": lambda table: -table["windows"],
    "gain": lambda table: table["gain"],
    "newton": lambda table: table["newton"],  # This takes three steps of conjugate gradients, not the full solve.
    "alignment": lambda table: table["alignment"],
    # The number of windows times the root mean square of the gradients of single images. It is large where many regions
    # pull apart, and strongly. This product was chosen among products of powers of the columns, on half of the small
    # suite's tasks (notebook 08). The search starts from it.
    "windows_times_gradient": lambda table: table["windows"] * table["individual"] / table["norm"],
}
SECOND_ORDER = ("newton", "alignment")
DEFAULT = "windows_times_gradient"
_RENAMED = {"found": "windows_times_gradient"}  # The old name is accepted until version 0.2.


def current_name(score: str) -> str:
    """The name that a score has now, with a DeprecationWarning if the given one is older.

    Raises:
        ValueError: If there is no such score.
    """
    if score in _RENAMED:
        warn_of_old_name(f"the score {score!r}", repr(_RENAMED[score]))
        return _RENAMED[score]
    if score not in SCORES:
        raise ValueError(f"cannot rank by {score!r}; there are {', '.join(SCORES)}")
    return score


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

    Every image goes forward once. The head is fitted to one half of the images of every class, and the other half goes
    backward with it. The head must not have seen that half: a head that interpolates its images leaves them no
    gradient. To swap the halves would take a second forward pass, since the head is not known in the first one.

    Args:
        places: The sites to rank. By default these are all block sites but the image.
        score: The score to rank by, one of `SCORES`.
        num_examples: How many images to take from the train part of `Task.split`, at most 1,000.
        num_second_order: How many images of the second half the scores newton and alignment take, at most 200, in pairs
            of one class. 0 leaves both scores out. newton stops after three steps of conjugate gradients.
        num_validation: How many images of the train part are held out and not looked at, as in `training.Recipe`.
        seed: The seed of the split.

    Returns:
        A row for each site. Its columns are depth (0 is the image, 1 the last block site), norm (of the activation, in
        the mean over the first half), coherence, reach, coverage and windows as in `theory.tangent`, newton (in nats)
        and alignment. Two more are in nats and for a prompt as large as the activation: gain (negative if it is lost in
        noise) and individual (the gain if each example had a prompt of its own). ``attrs["cost"]`` has the examples,
        FLOPs and seconds of the first and the second order.
    """
    score = current_name(score)
    if score in SECOND_ORDER and not num_second_order:
        raise ValueError(
            f"cannot rank by {score!r} with num_second_order 0; {' and '.join(SECOND_ORDER)} need 4 to 200 images"
        )
    if not (8 <= num_examples <= 1000 and (num_second_order == 0 or 4 <= num_second_order <= 200)):
        raise ValueError(
            f"num_examples is {num_examples} and num_second_order {num_second_order}; give 8 to 1000 images, and 0 or "
            "4 to 200 of them (halves of halves must not be empty)"
        )
    training.check_ready(backbone, task)
    block_sites = sites.list_sites(backbone)
    places = block_sites[1:] if places is None else [sites.resolve(backbone, site) for site in places]
    places = list(dict.fromkeys(places))
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
        cost = {"first order": {"examples": len(split.train), "flops": flops + tangents.head_flops, "seconds": seconds}}
        if num_second_order:
            started = time.perf_counter()
            rows = [first | second for first, second in zip(rows, tangents.second_order(seed), strict=True)]
            flops, seconds = counter.get_total_flops() - flops, time.perf_counter() - started
            cost["second order"] = {"examples": tangents.pairs.numel(), "flops": flops, "seconds": seconds}
    table = pd.DataFrame(rows)
    table.insert(1, "depth", [_depth(site, block_sites) for site in table["site"]])
    table = table.sort_values("site", key=lambda _: -SCORES[score](table), kind="stable", ignore_index=True)
    table.attrs["cost"] = cost
    return table


def _depth(site: str, block_sites: Sequence[str]) -> float:
    return block_sites.index(site) / (len(block_sites) - 1) if site in block_sites else math.nan


class _Tangents:
    """Training images in two halves: a head is fitted to one, and the gradients of the other, unseen one are taken."""

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
        head, self.head_flops = _fit_head(features, labels, len(task.classes))  # torch does not count it
        self.head = _Head(*(value.to(self.device) for value in head))

    def _pairs(self, num: int) -> Int64[Tensor, "pair 2"]:
        """At most ``num`` unseen images, in pairs of one class, so that both columns have the same classes.

        If images of a hundred classes were drawn without regard to their classes, the halves would hardly have a class
        in common.
        """
        labels = self.images.labels[self.unseen]
        sizes = labels.unique_consecutive(return_counts=True)[1]
        pairs = torch.cat([images[: len(images) // 2 * 2].view(-1, 2) for images in self.unseen.split(sizes.tolist())])
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
            problem = f"the activation is zero for all {len(self.seen)} images at {', '.join(silent)}"
            if len(silent) == len(self.places):
                raise ValueError(f"{problem}, so there is no site to rank; choose other places")
            warnings.warn(f"{problem}: left out of the ranking", stacklevel=4)
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
        """Coherence, windows and the first-order gain of every place: T1, T2 and T3 of notebook 08."""
        classes = (reduce(_joined, map(itemgetter(1), runs)) for _, runs in groupby(self._gradients(), itemgetter(0)))
        strata = ({site: sums.as_stratum() for site, sums in by_site.items()} for by_site in classes)
        gradients = reduce(_joined, strata)
        rows = []
        for site, norm in self.norms.items():
            at_site = gradients[site]
            spread = {name: getattr(at_site, name) for name in ("coherence", "reach", "coverage", "windows")}
            gains = {"gain": norm * at_site.mean_norm, "individual": norm * at_site.individual_norm}
            rows.append({"site": site, "norm": norm, **spread, **gains})
        return rows

    def _gradients(self) -> Iterator[tuple[int, dict[str, tangent.Gradients]]]:
        """Sums of gradients at every site, in pieces that come class by class, as the images are ordered."""
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
        """The second-order gain and the alignment of every place: T3 and T4 of notebook 08."""
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
        """A prompt's gradient at every site from the unseen images outside a half.

        Each class keeps the weight that it has among all unseen images. If the other column alone judged a step, the
        step would be praised for meeting its own choice of classes again.
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
            for site, gradient in zip(prompts, gradients, strict=True):
                total[site] += gradient
        return total

    def _newton(self, site: str, half: Int64[Tensor, " image"], others: Mapping[str, Tensor]) -> float:
        """The gain of the step that the images of a half want, judged by the gradient of other images."""
        prompt, ridge = torch.zeros(self.units[site], device=self.device), _RIDGE / self.norms[site] ** 2
        prompts: list[Tensor] = []  # the suffix adds the last of them
        prefix, suffix = sites.split(self.backbone, site, {site: lambda z: z + prompts[-1]})

        def part(chunk: Int64[Tensor, " image"]) -> tangent.ExampleSet:
            x, labels, _ = self._at(chunk)
            with torch.no_grad():
                crossing = prefix(x)

            def model(prompt: Tensor) -> Tensor:
                prompts[:] = [prompt]
                return self.head(suffix(*crossing))

            return tangent.ExampleSet(model, lambda y: functional.cross_entropy(y, labels, reduction="sum") / len(half))

        solution = tangent.newton(list(map(part, half.split(_CHUNK))), prompt, ridge, max_products=_PRODUCTS)
        return float((solution.step * others[site]).sum()) / 2


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
    even, odd = slice(0, None, 2), slice(1, None, 2)
    losses, spent = {}, 0
    for decay in _DECAYS:
        losses[decay] = 0.0
        for fitted, held_out in ((even, odd), (odd, even)):
            head, flops = _solve_head(features[fitted], labels[fitted], num_classes, decay)
            # Whatever the decay, a class that the fold has not met is impossible to the head.
            is_met = torch.isin(labels[held_out], labels[fitted])
            logits = head(features[held_out][is_met])
            losses[decay] += float(functional.cross_entropy(logits, labels[held_out][is_met]))
            spent += flops
    head, flops = _solve_head(features, labels, num_classes, min(_DECAYS, key=losses.__getitem__))
    return head, spent + flops


def _solve_head(
    features: Float[Tensor, "image width"], labels: Int64[Tensor, " image"], num_classes: int, decay: float
) -> tuple[_Head, int]:
    """The head that minimizes the mean cross-entropy plus half the decay times the squared weights; the bias is free.

    Features are measured in units of their root mean square. The objective has no minimum if a class has no image: its
    bias would fall without end. Such a class gets no weights and a bias at which its probability is below the solver's
    tolerance.
    """
    unit = methods.rms(features[None])
    x = (features / unit).double().numpy()
    met = labels.unique()
    # For every image the logits of the classes that were met sum to zero, so the largest of them is at least zero.
    weight = torch.zeros(features.shape[1], num_classes)
    bias = torch.full((num_classes,), math.log(_TOLERANCE))
    if len(met) == 1:
        bias[met] = 0.0
        return _Head(weight, bias), 0
    # For two classes scikit-learn has one column, the difference of our two. Its square is twice the sum of theirs.
    inverse_decay = (2 if len(met) == 2 else 1) / decay
    probe = LogisticRegression(C=inverse_decay / len(x), tol=_TOLERANCE, max_iter=_MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%", UserWarning)
        probe.fit(x, labels.numpy())
    columns = torch.from_numpy(np.column_stack([probe.coef_, probe.intercept_])).float()
    if len(met) == 2:
        columns = torch.cat([-columns, columns]) / 2
    weight[:, met], bias[met] = columns[:, :-1].T / unit, columns[:, -1]
    num_evaluations = 1 + math.ceil(_EVALUATIONS_PER_ITERATION * int(probe.n_iter_[0]))
    # An evaluation multiplies the features by the weights for the loss, and by the residuals for the gradient.
    return _Head(weight, bias), 4 * num_evaluations * len(x) * (probe.coef_.size + probe.intercept_.size)


def _channel_axes(backbone: nn.Module, places: Sequence[str], x: Float[Tensor, "1 *image"]) -> dict[str, int]:
    try:
        return sites.channel_axes(backbone, places)
    except sites.UntraceableError:
        return _called_axes(backbone, places, x)


@torch.no_grad()
def _called_axes(backbone: nn.Module, places: Sequence[str], x: Float[Tensor, "1 *image"]) -> dict[str, int]:
    """Channel axes without a graph.

    The next layer that is given an activation of the site's shape tells the axis; if there is none, the last layer that
    made one does.
    """
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
