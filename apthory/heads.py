"""Heads: from the backbone's features to the classes of a task.

A head is trained (`LinearHead`), or chosen among the outputs that the backbone's own classifier has (`LabelMapping`),
or written in words (`TextHead`, for CLIP). Each of these is a specification; ``build`` makes `Heads` of it, a bundle
with one head for each configuration that trains together.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

_PREDICTIONS_AT_ONCE = 4096  # features whose predictions are counted at once
_BEHIND = 1e-3  # how much a class's logit is lowered for each earlier class with the same source


class Heads(nn.Module):
    """A bundle of heads; all state has the configurations as its first axis.

    Features of the configurations lie one after the other in one stack. The training loop calls ``start`` once,
    ``observe`` after each step's forward pass, and ``end_epoch`` after each epoch's validation.
    """

    num_start: int | None = 128  # training images of each configuration that `start` wants; None for all
    starts_unprompted: bool = False  # whether `start` wants their features without any prompt

    def start(self, features: Float[Tensor, "stack width"], labels: Int64[Tensor, "num image"]) -> None:
        """Take from training images, before anything is trained, what the heads need to know of them."""

    def forward(self, features: Float[Tensor, "stack width"]) -> Float[Tensor, "num batch class"]:
        raise NotImplementedError

    def observe(self, features: Float[Tensor, "stack width"], labels: Int64[Tensor, "num batch"]) -> None:
        """See the features of a training step, without gradients."""

    def end_epoch(self) -> None:
        """Act on what was seen since the last epoch."""

    def export(self, index: int) -> nn.Module:
        """One head as an ordinary module on the backbone's own features."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------------ trained heads


@dataclass(frozen=True)
class LinearHead:
    """A linear layer, trained with whatever else is."""

    def build(self, num: int, width: int, num_classes: int, generators: list[torch.Generator]) -> "LinearHeads":
        return LinearHeads(num, width, num_classes, generators)


class LinearHeads(Heads):
    """A bundle of linear heads, one for each configuration, that see features in units of their root mean square.

    Args:
        num: Configurations in the bundle.
        width: Features.
        num_classes: Classes.
        generators: One source of initial weights for each configuration.
    """

    def __init__(self, num: int, width: int, num_classes: int, generators: list[torch.Generator]) -> None:
        super().__init__()
        draws = [torch.randn(width, num_classes, generator=generator) for generator in generators]
        self.weight = nn.Parameter(0.01 * torch.stack(draws))
        self.bias = nn.Parameter(torch.zeros(num, 1, num_classes))
        self.register_buffer("unit", torch.ones(num, 1, 1))

    @torch.no_grad()
    def start(self, features: Float[Tensor, "stack width"], labels: Int64[Tensor, "num image"]) -> None:
        by_configuration = features.float().unflatten(0, (len(self.weight), -1))
        rms = by_configuration.square().flatten(1).mean(1).sqrt().clamp_min(1e-12)
        self.unit.copy_(rms.view(-1, 1, 1))

    def forward(self, features: Float[Tensor, "stack width"]) -> Float[Tensor, "num batch class"]:
        by_configuration = features.float().unflatten(0, (len(self.weight), -1))
        return torch.baddbmm(self.bias, by_configuration / self.unit, self.weight)

    def export(self, index: int) -> nn.Linear:
        return _linear((self.weight[index] / self.unit[index]).T, self.bias[index, 0])


# ------------------------------------------------------------------------------------------ label mapping

How = Literal["random", "frequency", "iterative"]
Assignment = Literal["greedy", "ordered", "mode"]
Counted = Literal["prompt", "images"]


@dataclass(frozen=True, eq=False)
class LabelMapping:
    """Each class of the task is read off one class of the backbone's own classifier; no head is trained.

    Args:
        classifier: The backbone's own, on its features; `backbones.classifier` has it.
        how: ``"random"``: drawn once, one-to-one. ``"frequency"``: once, from what the model predicts on the training
            images before training (Chen et al. 2023, FLM). ``"iterative"``: the same for the first epoch, then each
            epoch anew from the predictions of the last one's training steps (ILM). Chen et al. make an extra pass
            over the training images instead, with the prompt held still.
        assignment: How counts of predictions become a map. ``"greedy"``: the largest count of all first, one-to-one
            (Chen et al. 2023). ``"ordered"``: class after class, each the most frequent prediction that is still free
            (EVP, first version of its code). ``"mode"``: each class its most frequent prediction, which several
            classes may share (EVP, last version); of those the earliest is always predicted, since nothing else
            tells them apart. Ties go to the earlier class of the task, then of the classifier.
        counted: What is predicted before training: images with the method's initial ``"prompt"`` (Chen et al.), or
            ``"images"`` as they are, at the cost of a forward pass (the pre-processing of EVP*). A noisy or dark
            initial frame leaves hardly more than noise to count.

    Raises:
        ValueError: If an argument is not what is said here; from ``build``, if a one-to-one map has fewer classes to
            take from than to fill.
    """

    classifier: nn.Linear
    how: How = "iterative"
    assignment: Assignment = "greedy"
    counted: Counted = "prompt"

    def __post_init__(self) -> None:
        if not isinstance(self.classifier, nn.Linear):
            raise ValueError(
                f"classifier is a {type(self.classifier).__name__}; expected the nn.Linear of backbones.classifier, "
                "which load_backbone leaves out"
            )
        for name, kinds in (("how", How), ("assignment", Assignment), ("counted", Counted)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(kinds))}")

    def build(self, num: int, width: int, num_classes: int, generators: list[torch.Generator]) -> "MappedHeads":
        source, own_width = self.classifier.weight.shape
        if own_width != width:
            raise ValueError(
                f"the classifier takes {own_width} features and the backbone gives {width}; "
                "take backbones.classifier of the same backbone"
            )
        if source < num_classes and (self.how == "random" or self.assignment != "mode"):
            raise ValueError(
                f"the classifier has {source} classes, too few to give each of the task's {num_classes} one of its "
                "own; use assignment='mode' with counted predictions, or train a linear head"
            )
        return MappedHeads(num, num_classes, self, generators)


class MappedHeads(Heads):
    """A bundle of label mappings over one classifier; only the maps are state.

    Args:
        num: Configurations in the bundle.
        num_classes: Classes of the task.
        mapping: Classifier, and the way to the map.
        generators: One source of random maps for each configuration.
    """

    def __init__(self, num: int, num_classes: int, mapping: LabelMapping, generators: list[torch.Generator]) -> None:
        super().__init__()
        self.how, self.assignment = mapping.how, mapping.assignment
        self.starts_unprompted = mapping.counted == "images"
        self.map: Tensor
        self.weight: Tensor
        self.bias: Tensor
        self.counts: Tensor
        source = mapping.classifier.out_features
        bias = torch.zeros(source) if mapping.classifier.bias is None else mapping.classifier.bias
        self.register_buffer("weight", mapping.classifier.weight.detach(), persistent=False)
        self.register_buffer("bias", bias.detach(), persistent=False)
        self.register_buffer("counts", torch.zeros(num, num_classes, source, dtype=torch.long), persistent=False)
        self.register_buffer("map", torch.zeros(num, num_classes, dtype=torch.long))
        if self.how == "random":
            draws = [torch.randperm(source, generator=generator)[:num_classes] for generator in generators]
            self.map.copy_(torch.stack(draws))
        else:
            self.num_start = None

    @torch.no_grad()
    def start(self, features: Float[Tensor, "stack width"], labels: Int64[Tensor, "num image"]) -> None:
        if self.how != "random":
            self._count(features, labels)
            self._take()

    def forward(self, features: Float[Tensor, "stack width"]) -> Float[Tensor, "num batch class"]:
        by_configuration = features.float().unflatten(0, (len(self.map), -1))
        return torch.baddbmm(self._biases().unsqueeze(1), by_configuration, self.weight[self.map].mT)

    @torch.no_grad()
    def observe(self, features: Float[Tensor, "stack width"], labels: Int64[Tensor, "num batch"]) -> None:
        if self.how == "iterative":
            self._count(features, labels)

    @torch.no_grad()
    def end_epoch(self) -> None:
        if self.how == "iterative":
            self._take()

    def export(self, index: int) -> nn.Linear:
        return _linear(self.weight[self.map[index]], self._biases()[index])

    def _biases(self) -> Float[Tensor, "num class"]:
        """Of the mapped classes, lowered for classes whose source has another: rounding would decide between them."""
        is_shared = (self.map.unsqueeze(2) == self.map.unsqueeze(1)).tril(-1)  # with an earlier class
        return self.bias[self.map] - _BEHIND * is_shared.sum(2)

    def _count(self, features: Float[Tensor, "stack width"], labels: Int64[Tensor, "num image"]) -> None:
        """Add up how often each class of the task is predicted as each class of the classifier."""
        chunks = features.float().split(_PREDICTIONS_AT_ONCE)
        predicted = torch.cat([functional.linear(chunk, self.weight, self.bias).argmax(1) for chunk in chunks])
        owner = torch.arange(len(labels), device=predicted.device).repeat_interleave(labels.shape[1])
        self.counts.index_put_((owner, labels.flatten(), predicted), torch.ones_like(predicted), accumulate=True)

    def _take(self) -> None:
        self.map.copy_(assign(self.counts, self.assignment))
        self.counts.zero_()


def assign(counts: Int64[Tensor, "num class source"], assignment: Assignment) -> Int64[Tensor, "num class"]:
    """The source class of each class, from the number of times that it was predicted for the class's images.

    Args:
        assignment: As in `LabelMapping`.
    """
    if assignment == "mode":
        return counts.argmax(2)
    num, num_classes, _ = counts.shape
    counts, configurations = counts.clone(), torch.arange(num, device=counts.device)
    chosen = counts.new_empty(num, num_classes)
    for step in range(num_classes):
        if assignment == "ordered":
            label, source = torch.full_like(configurations, step), counts[:, step].argmax(1)
        else:
            label, source = torch.unravel_index(counts.flatten(1).argmax(1), counts.shape[1:])
        chosen[configurations, label] = source
        counts[configurations, label] = -1  # both are taken
        counts[configurations, :, source] = -1
    return chosen


# ------------------------------------------------------------------------------------------ text


@dataclass(frozen=True, eq=False)
class TextHead:
    """Classes in words: scaled cosines between the image's feature and one text feature a class; nothing is trained.

    Args:
        features: Of the classes' texts; `clip.CLIP.text_head` has them.
        scale: What the cosines are multiplied with: the exponential of CLIP's ``logit_scale``.
    """

    features: Float[Tensor, "class width"]
    scale: float

    def build(self, num: int, width: int, num_classes: int, generators: list[torch.Generator]) -> "TextHeads":
        if self.features.shape != (num_classes, width):
            raise ValueError(
                f"the text features are {self.features.shape[0]} of width {self.features.shape[1]}; the task has "
                f"{num_classes} classes and the backbone features of width {width}: both must come from one CLIP"
            )
        return TextHeads(num, CosineHead(self.features, self.scale))


class CosineHead(nn.Module):
    """``scale`` times the cosine between a feature and each row of ``weight``."""

    def __init__(self, weight: Float[Tensor, "class width"], scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(functional.normalize(weight.detach().float(), dim=1), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(scale), requires_grad=False)

    def forward(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch class"]:
        return self.scale * _class_cosines(features, self.weight)


class TextHeads(Heads):
    """The same text head for every configuration of a bundle; it has no state of its own."""

    def __init__(self, num: int, head: CosineHead) -> None:
        super().__init__()
        self.num = num
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", head.weight.detach(), persistent=False)
        self.register_buffer("scale", head.scale.detach(), persistent=False)

    def forward(self, features: Float[Tensor, "stack width"]) -> Float[Tensor, "num batch class"]:
        return (self.scale * _class_cosines(features, self.weight)).unflatten(0, (self.num, -1))

    def export(self, index: int) -> CosineHead:
        return CosineHead(self.weight, float(self.scale))


HeadSpec = LinearHead | LabelMapping | TextHead


def _class_cosines(
    features: Float[Tensor, "batch width"], directions: Float[Tensor, "class width"]
) -> Float[Tensor, "batch class"]:
    return functional.linear(functional.normalize(features.float(), dim=1), directions)


def _linear(weight: Float[Tensor, "class width"], bias: Float[Tensor, " class"]) -> nn.Linear:
    head = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    head.weight.copy_(weight.detach())
    head.bias.copy_(bias.detach())
    return head
