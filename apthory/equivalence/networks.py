"""A backbone: the bias that a prompt at a site folds into, and a diagnosis of any site; tried, not looked up."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from apthory import sites
from apthory.equivalence.layers import BATCH_NORM, Edge, statement, statistics_owner, uses_batch_statistics
from apthory.methods import ActivationPrompt, AdaptedBackbone, Shape

TOLERANCE = 1e-12  # relative, in float64: what "exact" means here
Kind = Literal["exact", "no bias", "null", "absorbed", "border", "varying", "not found"]


def fold(
    backbone: nn.Module,
    prompt: ActivationPrompt | None = None,
    *,
    images: Float[Tensor, "batch *image"] | None = None,
) -> nn.Module:
    """A copy of the backbone with the prompt inside one bias: the same features, at no cost.

    The layers next to the site are tried, on the backbone itself: the prompt folds into a bias if any prompt of its
    shape reaches the layer's result as one and the same shift, if nothing else changes, and if so it is for this one.

    Args:
        backbone: Any backbone; or, without a prompt, an adapted one (`training.Fit.model`, `load_prompt`). Then tuned
            weights and each prompt go into a copy of its backbone, and its head follows.
        prompt: What to fold.
        images: Normalized images to decide on; random ones by default.

    Raises:
        ValueError: If no bias near the site equals this prompt, or a BatchNorm uses batch statistics.
    """
    if isinstance(backbone, AdaptedBackbone) and prompt is None:
        return _fold_model(backbone, images)
    if prompt is None:
        raise ValueError(f"no prompt to fold into this {type(backbone).__name__}; call fold(backbone, prompt)")
    if uses_batch_statistics(backbone):
        raise ValueError(
            "a BatchNorm of this backbone uses batch statistics, which remove prompts (E2); fold a backbone that is "
            "used as it was trained: call eval(), with running statistics"
        )
    network = PromptedNetwork(backbone, prompt.site, images)
    prompt(prompt.delta.new_zeros(1, *network.unit))  # refuses a prompt that does not fit
    delta = prompt.delta.detach().to(network.device, torch.float64)
    bias_near = network.closest(network.scale * network.draw(*delta.shape))
    shift = network.shift(bias_near.layer, bias_near.is_before, delta) if bias_near else None
    if bias_near and bias_near.difference <= TOLERANCE and shift is not None:
        bias_near = replace(bias_near, difference=network.missed(bias_near.layer, shift, network(delta)))
    if bias_near is None or shift is None or bias_near.difference > TOLERANCE:
        raise ValueError(
            f"no bias near {prompt.site!r} equals this prompt"
            + (
                f": {bias_near.layer}.bias leaves a relative difference of {bias_near.difference:.1g}"
                if bias_near
                else ""
            )
            + "; diagnose(backbone, site) says what holds there"
        )
    folded = copy.deepcopy(backbone)
    bias = folded.get_parameter(bias_near.parameter)
    with torch.no_grad():
        bias.copy_((bias + shift).to(bias.dtype))
    return folded


def _fold_model(model: AdaptedBackbone, images: Float[Tensor, "batch *image"] | None) -> nn.Module:
    if model.reader is not None:
        raise ValueError("a probe at a site does not run the whole backbone, so there is nothing to fold; use merged()")
    body, head = AdaptedBackbone(model.backbone, head=model.head, weights=model.weights).merged().children()
    for place, edit in zip(model.places, model.edits, strict=True):
        if not isinstance(edit, ActivationPrompt):
            raise ValueError(
                f"the {type(edit).__name__} at {place!r} is no prompt that a bias could hold; use merged()"
            )
        body = fold(body, edit, images=images)
    return nn.Sequential(body, head)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What prompts can do at a site, as measured on the backbone."""

    site: str
    statement: str  # "E1" to "E8", or empty where none was shown to hold
    kind: Kind  # of a channel prompt
    sentence: str
    target: str  # of the biases near the site, the one whose shift comes closest to a channel prompt; or empty
    relative_difference: float  # largest, of features, between the prompt and that shift (of no shift, without one)
    is_absorbed: bool  # a channel prompt shifts the features of all images alike: a linear head's bias does as well
    is_larger: bool  # full prompts can do more than channel prompts: there are several positions, and they matter
    num_channels: int
    num_positions: int
    null_dimension: int  # of the channel prompts that change nothing
    null_directions: tuple[str, ...]  # what they are
    null_positions: int  # positions at which a full prompt changes nothing


def diagnose(
    backbone: nn.Module, site: str, *, images: Float[Tensor, "batch *image"] | None = None, seed: int = 0
) -> Diagnosis:
    """Which statement holds for prompts at a site, tried on the backbone itself in float64.

    The prompts are as large as the activations. Null directions are the kernel of the features' Jacobian at several
    images and prompts, then tried with prompts ten times as large; this takes about as many backward passes of one
    image as the site has channels. A BatchNorm in train mode is diagnosed with its batch statistics.

    Args:
        images: A few normalized images; random ones by default.
        seed: Of the random prompts (and images).
    """
    network = PromptedNetwork(backbone, site, images, seed)
    basis, null_positions = network.null_space()
    with torch.no_grad():
        probe, full = network.random_prompt(), network.random_prompt("full")
        plain, prompted = network(), network(probe)
        change, effect = prompted - plain, difference(prompted, plain)
        is_absorbed = difference(change, change.mean(0), scale=plain) <= TOLERANCE
        is_larger = difference(network(full), network(network.mean_over_positions(full))) > TOLERANCE
    closest = network.closest(probe) or _Bias("", False, effect)
    target, distance = closest.parameter, closest.difference
    holds: str
    kind: Kind
    if len(basis) == network.num_channels:
        target, distance = "", effect
        holds, kind, sentence = "E8", "null", "A channel prompt changes nothing."
        if network.uses_batch_statistics:
            holds, sentence = "E2", "Batch statistics remove a channel prompt; in eval mode it is a shift."
    elif distance <= TOLERANCE:
        holds, kind = statement(backbone.get_submodule(closest.layer), closest.edge), "exact"
        sentence = f"A channel prompt is a shift of {target}."
    elif is_absorbed:
        target, distance = "", effect
        holds, kind, sentence = "E8", "absorbed", "A channel prompt shifts the features of all images alike."
    elif border := network.border(closest, probe):
        holds, kind = "E5", "border"
        sentence = f"A channel prompt is a shift of {target}, but for zero padding: {border} positions differ."
    elif (norm := network.norm_fed()) and isinstance(backbone.get_submodule(norm), BATCH_NORM):
        target, distance = "", effect
        holds, kind = "E2", "no bias"
        sentence = f"A channel prompt is a shift after {norm}, which has no bias to hold it."
    elif norm:
        holds, kind = "E4", "varying"
        owner = statistics_owner(backbone.get_submodule(norm))
        sentence = f"Behind {norm} a channel prompt is another shift for each {owner}, even to first order."
    else:
        holds, kind = "", "not found"
        sentence = f"No bias tried equals a channel prompt; {target or 'none'} comes closest."
    return Diagnosis(
        site=network.site,
        statement=holds,
        kind=kind,
        sentence=sentence,
        target=target,
        relative_difference=distance,
        is_absorbed=is_absorbed,
        is_larger=is_larger,
        num_channels=network.num_channels,
        num_positions=network.num_positions,
        null_dimension=len(basis),
        null_directions=network.name_directions(basis),
        null_positions=null_positions,
    )


def difference(a: Tensor, b: Tensor, scale: Tensor | None = None) -> float:
    """Largest difference of two tensors, relative to the largest entry of the second (or of ``scale``)."""
    return float(((a - b).abs().max() / (b if scale is None else scale).abs().max()).detach())


def spread(values: Tensor, rank: int, axis: int) -> Tensor:
    """Values by channel (the last axis) for units of so many axes, broadcasting over positions."""
    return values.reshape(*values.shape[:-1], *(values.shape[-1] if i - rank == axis else 1 for i in range(rank)))


@dataclass(frozen=True)
class _Bias:
    """A bias near a site, and how far shifting it is from a prompt there."""

    layer: str
    is_before: bool
    difference: float

    @property
    def parameter(self) -> str:
        return f"{self.layer}.bias" if self.layer else ""

    @property
    def edge(self) -> Edge:
        """The edge of the layer on which the site lies."""
        return "output" if self.is_before else "input"


class PromptedNetwork:
    """A float64 copy of a backbone on some images, with prompts at one site."""

    def __init__(self, backbone: nn.Module, site: str, images: Tensor | None = None, seed: int = 0) -> None:
        self.site = sites.resolve(backbone, site)
        self.generator = torch.Generator().manual_seed(seed)
        self.model = copy.deepcopy(backbone).double().requires_grad_(False)
        self.still = copy.deepcopy(self.model).eval()  # for shapes, which do not depend on the mode
        for module in self.model.modules():
            if isinstance(module, BATCH_NORM) and module.training:  # what runs along has no effect
                module.running_mean = module.running_var = module.num_batches_tracked = None
        self.uses_batch_statistics = uses_batch_statistics(self.model)
        self.device = next(self.model.parameters()).device
        if images is None:
            images = torch.randn(8, *sites.site_shape(self.still, ":input"), generator=self.generator)
        self.images = images.to(self.device, torch.float64)
        self.axis = self.axis_at(self.site)
        with torch.no_grad():
            z = self.read(self.site)
            if not torch.equal(self(), self()):
                raise ValueError("the backbone is random: call eval(), or eval() on its dropout layers alone")
        self.scale = float(z.square().mean().sqrt()) or 1.0  # an activation that is zero has no size
        self.unit = tuple(z.shape[1:])
        self.num_channels = self.unit[self.axis]
        self.num_positions = z[0].numel() // self.num_channels

    def __call__(
        self,
        delta: Tensor | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        edits: Mapping[str, sites.EditFunction] | None = None,
    ) -> Tensor:
        """Features with a prompt, with some parameters replaced, and with edits after the prompt."""
        prompt = {} if delta is None else {self.site: lambda z: z + delta}
        with sites.edited(self.model, prompt), sites.edited(self.model, edits or {}):
            return functional_call(self.model, dict(parameters or {}), (self.images,))

    def read(self, place: str, delta: Tensor | None = None, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The activation at another site; no derivative is followed beyond it."""
        seen: list[Tensor] = []

        def keep(z: Tensor) -> Tensor:
            seen.append(z.clone())
            return z.detach()

        self(delta, parameters, {place: keep})
        return seen[0]

    def axis_at(self, place: str) -> int:
        """Which axis counts channels there, from the end."""
        return sites.channel_axis(self.still, place, self.images)

    def draw(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator).to(self.device)

    def random_prompt(self, shape: Shape = "channel") -> Tensor:
        """A prompt as large as the activations."""
        return self.scale * (self.draw(*self.unit) if shape == "full" else self.spread(self.draw(self.num_channels)))

    def spread(self, values: Tensor) -> Tensor:
        """Values by channel, in the shape that broadcasts over positions."""
        return spread(values, len(self.unit), self.axis)

    def by_channel(self, z: Tensor) -> Tensor:
        """Channels last, positions in one axis before them."""
        lead = z.shape[: z.ndim - len(self.unit)]
        return z.movedim(self.axis, -1).reshape(*lead, -1, self.num_channels)

    def mean_over_positions(self, delta: Tensor) -> Tensor:
        """The channel prompt in the middle of a full one."""
        return self.spread(self.by_channel(delta.expand(self.unit)).mean(0))

    # ------------------------------------------------------------------------------------ biases near the site

    @cached_property
    def order(self) -> list[str]:
        """Layers with a bias, and normalization layers, as they are called; the site is the empty name."""
        called: list[str] = []

        def note(name: str) -> sites.EditFunction:
            def edit(z: Tensor) -> Tensor:
                called.append(name)
                return z

            return edit

        modules = dict(self.model.named_modules())
        names = [n for n, m in modules.items() if isinstance(m, sites.NORMS) or "bias" in m._parameters]
        layers = {self.place(name): note(name) for name in names}
        with sites.edited(self.model, layers), sites.edited(self.model, {self.site: note("")}), torch.no_grad():
            self()
        return [name for name in called if called.count(name) == 1]

    def place(self, layer: str) -> str:
        is_norm = isinstance(self.model.get_submodule(layer), sites.NORMS)
        return sites.affine_output(self.model, layer) if is_norm else f"{layer}:output"

    @torch.no_grad()
    def closest(self, delta: Tensor) -> _Bias | None:
        """Of two biases before the site and two after it, the first that is exact, else the closest."""
        here = self.order.index("")
        with_bias = [
            n if n and getattr(self.model.get_submodule(n), "bias", None) is not None else "" for n in self.order
        ]
        before = [name for name in with_bias[:here][::-1] if name][:2]
        after = [name for name in with_bias[here + 1 :] if name][:2]
        prompted = self(delta)
        tried = []
        for name, is_before in [(name, True) for name in before] + [(name, False) for name in after]:
            shift = self.shift(name, is_before, delta)
            if shift is not None:
                tried.append(_Bias(name, is_before, self.missed(name, shift, prompted)))
                if tried[-1].difference <= TOLERANCE:
                    return tried[-1]
        return min(tried, key=lambda bias: bias.difference, default=None)

    def missed(self, layer: str, shift: Tensor, prompted: Tensor) -> float:
        """How far the features with a shifted bias are from those with a prompt."""
        name = f"{layer}.bias"
        return difference(self(None, {name: self.model.get_parameter(name) + shift}), prompted)

    def shift(self, layer: str, is_before: bool, delta: Tensor) -> Tensor | None:
        """The shift of a bias that comes closest to the prompt, at the site or at the layer's result."""
        bias = self.model.get_parameter(f"{layer}.bias")
        place = self.site if is_before else self.place(layer)
        start = self.read(place)
        if is_before:  # how strongly the bias arrives at the site
            if bias.numel() != self.num_channels:
                return None
            gain = self.by_channel(self.read(place, None, {f"{layer}.bias": bias + 1}) - start).mean((0, 1))
            wanted = self.by_channel(delta.expand(self.unit)).mean(0)
            return None if gain.abs().min() == 0 else (wanted / gain).view_as(bias)
        change = self.read(place, delta) - start
        with torch.enable_grad():  # the mean of the change, over whatever axes the layer spreads its bias
            bias = bias.clone().requires_grad_()
            total = (self.read(place, None, {f"{layer}.bias": bias}) * change).sum()
            return torch.autograd.grad(total, bias)[0] * (bias.numel() / change.numel())

    @torch.no_grad()
    def border(self, bias: _Bias, delta: Tensor) -> str:
        """How many positions of a layer's result see another shift than the middle: "k of P".

        Empty if none does, or if it does not arrive as the same for all images: then it is not the padding's doing.
        """
        if not bias.layer or bias.is_before:
            return ""
        place = self.place(bias.layer)
        start = self.read(place)
        change = (self.read(place, delta) - start).movedim(self.axis_at(place), 1)
        if difference(change, change.mean(0), scale=start) > TOLERANCE:
            return ""
        middle = change[(0, slice(None), *(n // 2 for n in change.shape[2:]))].view(-1, *(1 for _ in change.shape[2:]))
        differs = ((change[0] - middle).abs() > TOLERANCE * start.abs().max()).any(0)
        return f"{int(differs.sum())} of {differs.numel()}" if differs.any() else ""

    def norm_fed(self) -> str:
        """The normalization layer that takes this site's activation, if nothing else does."""
        for name in self.order[self.order.index("") + 1 :]:
            if isinstance(self.model.get_submodule(name), sites.NORMS):
                return name if sites.resolve(self.model, f"{name}:input") == self.site else ""
        return ""

    # ------------------------------------------------------------------------------------ prompts without effect

    def null_space(self) -> tuple[Tensor, int]:
        """Channel prompts that change nothing, as orthonormal rows, and the number of positions without effect."""
        num = len(self.images)
        sizes = torch.tensor([0.0, 1.0, 3.0, 10.0]).repeat(num)[:num] * self.scale  # wakes what a ReLU keeps asleep
        start = self.spread(self.draw(num, self.num_channels) * sizes.to(self.device)[:, None])
        start = (start[1:2] if self.uses_batch_statistics else start).expand(num, *self.unit)
        delta = start.clone().requires_grad_()
        features = self(delta)
        rows: list[Tensor] = []
        sensitivity = torch.zeros(self.unit, dtype=torch.float64, device=self.device)
        while not rows or len(rows) * len(rows[0]) < self.num_channels + num:
            (gradient,) = torch.autograd.grad(features, delta, self.draw(*features.shape), retain_graph=True)
            sensitivity += gradient.abs().sum(0)
            by_channel = self.by_channel(gradient)
            if self.uses_batch_statistics:  # images meet in batch statistics
                by_channel = by_channel.flatten(0, 1)[None]
            # Relative to what would be there if nothing cancelled, so that rounding is told from a small effect.
            largest = by_channel.abs().sum(1).amax(1, keepdim=True).clamp_min(1e-300)
            rows.append(by_channel.sum(1) / largest)
        _, values, directions = torch.linalg.svd(torch.cat(rows))
        basis = directions[int((values > TOLERANCE * len(values) ** 0.5).sum()) :]
        by_position = sensitivity.sum(self.axis, keepdim=True)
        dead = by_position <= 1e-15 * by_position.sum()
        nothing = self.random_prompt("full") * dead
        with torch.no_grad():
            plain = self(start)
            size = 10 * self.scale * (self.num_channels / max(1, len(basis))) ** 0.5
            random = size * self.draw(len(basis)) @ basis
            if difference(self(start + self.spread(random)), plain) > TOLERANCE:
                basis = basis[:0]  # no effect at first order only
            if difference(self(start + nothing), plain) > TOLERANCE:
                dead &= False
        return basis, int(dead.sum())

    def name_directions(self, basis: Tensor) -> tuple[str, ...]:
        """What is known of a null space: whole channels, the direction 1, and how much is left."""
        names, left = [], len(basis)
        channels = (basis.norm(dim=0) > 1 - 1e-9).nonzero().flatten().tolist()
        if len(channels) == self.num_channels:
            return ("every channel",)
        if channels:
            third = self.num_channels // 3
            is_keys = self.site.endswith("qkv:output") and channels == list(range(third, 2 * third))
            names.append("attention keys" if is_keys else f"{len(channels)} whole channels")
            left -= len(channels)
        constant = torch.ones_like(basis[:1]) / self.num_channels**0.5 if left else None
        if constant is not None and (constant @ basis.T).norm() > 1 - 1e-9:
            names.append("the same value in every channel")
            left -= 1
        if left:
            names.append(f"{left} more that later linear maps remove")
        return tuple(names)
