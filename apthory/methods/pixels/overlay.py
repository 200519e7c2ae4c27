"""Prompts on the image's own pixels: a frame or a patch (VP), a frame around a shrunk image (EVP), regions (AdaViPro).

Lengths are pixels of the backbone's input; those of the papers, at 224 pixels, are `scaled` to it. Images come
normalized. A prompt that is added before normalization, to pixels in [0, 1], is then one in units of 1 / std, since
no paper clamps the sum: x' = (pixels + delta - mean) / std = x + delta / std.

References:
    VP: Bahng et al. (2022), arXiv:2203.17274. EVP: Wu et al. (2022), arXiv:2212.10556. AdaViPro: Yang et al. (2024),
    arXiv:2403.13282.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from apthory import backbones
from apthory.methods.edits import Stack, Trained, check_scale
from apthory.methods.pixels.augmentation import Diversity, flipped_and_cropped, randaugmented
from apthory.methods.pixels.regions import MaskGenerator, by_pixel, decide, decide_softly, gumbel, laplacian

Place = Literal["frame", "patch", "random_patch"]
Normalization = Literal["l2", "l1", "linf", "none"]
_ORDERS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
_PAPERS_SIZE = 224


def scaled(pixels: int, size: int) -> int:
    """A length at 224 pixels as one at ``size``: proportional, rounded half up, at least 1. 30 is 9 at 64."""
    return max(1, math.floor(pixels * size / _PAPERS_SIZE + 0.5))


def scaled_region(pixels: int, size: int) -> int:
    """The divisor of ``size`` nearest in ratio to a region's side at 224: 8, 16, 32, 56 are 2, 4, 8, 16 at 64."""
    wanted = pixels * size / _PAPERS_SIZE
    return min(_divisors(size), key=lambda side: abs(math.log(side / wanted)))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which pixels are prompt, and how it meets the image: all that a saved prompt has to say besides its values.

    Raises:
        ValueError: If there is no such place, the prompt does not fit the image, or regions do not tile it.
    """

    size: int  # side of the backbone's input
    mean: tuple[float, ...]  # of pixels in [0, 1], by channel
    std: tuple[float, ...]
    width: int  # of the frame on each side; or the side of a patch
    place: Place = "frame"  # a patch lies in the upper left corner, a random one elsewhere at each training step
    around: bool = False  # the image is shrunk and the frame lies around it; otherwise the prompt lies on the image
    normalized: bool = True  # added after normalization; otherwise to pixels in [0, 1]
    region: int | None = None  # side of the regions in which an image has the prompt or not; None: it is everywhere
    dim: int = 64  # channels of the mask generator
    edges: bool = True  # it sees edges; otherwise the grey image itself

    def __post_init__(self) -> None:
        if self.place not in get_args(Place):
            raise ValueError(f"place is {self.place!r}; expected one of {', '.join(get_args(Place))}")
        most = self.size if self.place != "frame" else -(-self.size // 2)
        if not (1 <= self.width <= most and self.width == int(self.width)):
            raise ValueError(
                f"a {self.place} of {self.width} pixels does not fit an image of {self.size}; take a whole width of 1 "
                f"to {most}"
            )
        if self.dim < 1:
            raise ValueError(f"dim is {self.dim}; the mask generator wants one channel or more (64 by default)")
        if self.around and (self.place != "frame" or 2 * self.width >= self.size):
            raise ValueError(
                f"a {self.place} of {self.width} pixels around an image leaves nothing of {self.size} pixels for the "
                f"image; take a frame of 1 to {(self.size - 1) // 2}, or around=False to lay it on the image"
            )
        if self.around and self.region is not None:
            raise ValueError("regions lie on the image, not around it; take around=False or region=None")
        if self.region is not None and self.region not in _divisors(self.size):
            fault = "is larger than" if self.region > self.size else "does not tile"
            raise ValueError(
                f"a region of {self.region} pixels {fault} an image of {self.size}; take one of {_divisors(self.size)}"
            )

    @classmethod
    def of(cls, backbone: nn.Module, **fields: Any) -> "Layout":
        """With the backbone's own size, mean and standard deviation."""
        mean, std = (tuple(value.flatten().tolist()) for value in backbones.mean_std(backbone))
        return cls(size=backbones.input_size(backbone), mean=mean, std=std, **fields)

    @property
    def inner(self) -> int:
        """Side of the image that the prompt is given."""
        return self.size - 2 * self.width if self.around else self.size

    @property
    def mask(self) -> Bool[Tensor, "height width"]:
        """Where the prompt lies; of a random patch, when it lies in the upper left corner."""
        position = torch.arange(self.size)
        if self.place != "frame":
            inside = position < self.width
            return inside[:, None] & inside
        outside = (position < self.width) | (position >= self.size - self.width)
        return outside[:, None] | outside


class Shrink(nn.Module):
    """Images in the size that the prompt leaves to them: the frozen prefix of a pixel prompt, so it can be cached."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.code = f"shrink to {layout.inner}"  # tells one cached prefix from another

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> tuple[Tensor]:
        return (shrunk(x, self.layout),)


def shrunk(x: Float[Tensor, "batch channel height width"], layout: Layout) -> Tensor:
    """Bicubic and antialiased; where that overshoots it is cut off at black and white, as image files are."""
    if x.shape[-1] == layout.inner:
        return x
    small = functional.interpolate(x.float(), (layout.inner,) * 2, mode="bicubic", antialias=True).to(x.dtype)
    mean, std = _by_channel(layout, x)
    return small.clamp(-mean / std, (1 - mean) / std)


class Overlay(Stack):
    """Pixel prompts for a bundle of configurations; given shrunk images, it returns prompted ones of full size.

    What is random (augmentation, the place of a random patch, Gumbel noise) is drawn while `generators` is set, that
    is in training steps; otherwise images stay as they are, a random patch lies in the middle, and a region has the
    prompt iff its second logit is the larger.

    Args:
        layout: Where the prompt lies.
        num: Configurations in the bundle.
        init: Standard deviation of the initial prompt.
        diversity: Augmentation of training images: moved first, RandAugment last (see `augmentation`).
        normalization: Descend by plain SGD along the gradient divided by this norm of it (see `descend`); None leaves
            the prompt to the recipe's optimizer.
        temperature: Of Gumbel-Softmax, in the first epoch.
        decay: What the temperature is multiplied by after every epoch.
        floor: The temperature does not fall below it.
        lr_scale: Learning rate of the prompt, relative to that of the head.
        generator_lr_scale: The same of the mask generator.
    """

    constructed_alike = True
    sees_input = False

    def __init__(
        self,
        layout: Layout,
        num: int = 1,
        *,
        init: float = 0.0,
        diversity: Sequence[Diversity] = (),
        normalization: Normalization | None = None,
        temperature: float = 5.0,
        decay: float = 0.98,
        floor: float = 0.1,
        lr_scale: float = 1.0,
        generator_lr_scale: float = 1.0,
    ) -> None:
        nn.Module.__init__(self)
        self.num, self.lr_scale, self.generator_lr_scale = num, lr_scale, generator_lr_scale
        self.layout, self.init, self.diversity, self.normalization = layout, init, tuple(diversity), normalization
        self.first_temperature, self.decay, self.floor = temperature, decay, floor
        self.generators: Sequence[torch.Generator] = ()
        self.is_calibrating = False
        self.place = ":input"
        self.pixels: Tensor
        self.background: Tensor
        self.unit: Tensor
        self.activation_norm: Tensor
        self.whole: Tensor  # gradient on the whole image, from the last backward pass
        pixels = layout.mask.flatten().nonzero().flatten()
        mean, std = _by_channel(layout, torch.zeros(()))
        self.unit_shape = (len(mean), len(pixels))
        self.values = nn.Parameter(torch.zeros(num, *self.unit_shape))
        self.masks = None if layout.region is None else MaskGenerator(num, layout.dim, layout.region)
        black = -mean / std if layout.around and not layout.normalized else torch.zeros_like(mean)
        self.register_buffer("pixels", pixels, persistent=False)  # in a flattened image
        self.register_buffer("background", black * layout.mask, persistent=False)  # of a shrunk image
        unit = torch.ones_like(std) if layout.normalized else 1 / std
        self.register_buffer("unit", unit.view(-1, 1).repeat(num, 1, 1))
        self.register_buffer("activation_norm", torch.ones(num))  # mean Euclidean norm of the images
        self.begin_epoch(0, 1)

    @torch.no_grad()
    def start(self, generators: Sequence[torch.Generator]) -> None:
        """Draw the initial values of every configuration from its own generator."""
        for row, generator in zip(self.values, generators, strict=True):
            row.copy_(self.init * torch.randn(row.shape, generator=generator))
        if self.masks is not None:
            self.masks.start(generators)

    def begin_epoch(self, epoch: int, num_epochs: int) -> None:
        """Lower temperature and step length; epochs count from 0."""
        self.temperature = max(self.floor, self.first_temperature * self.decay**epoch)
        self.cosine = 0.5 * (1 + math.cos(math.pi * epoch / num_epochs))

    def forward(
        self, x: Float[Tensor, "stack channel inner inner"], *inputs: Tensor
    ) -> Float[Tensor, "stack channel height width"]:
        num = len(self.values)
        if self.is_calibrating:
            self.activation_norm.copy_(x.detach().unflatten(0, (num, -1)).float().flatten(2).norm(dim=2).mean(1))
            check_scale(self.activation_norm, self.place)
        if self.generators and self.diversity:
            x = self._diversified(x)
        canvas = self._canvas()
        if canvas.requires_grad and self.normalization is not None:
            canvas.register_hook(self._keep)
        prompt = (self.unit.unsqueeze(-1) * canvas + self.background).unsqueeze(1).to(x.dtype)
        if self.masks is not None:
            prompt = prompt * by_pixel(self.regions(x), self.layout.size).unsqueeze(2)
        margin = (self.layout.size - x.shape[-1]) // 2
        image = functional.pad(x, (margin,) * 4) if margin else x
        return (image.unflatten(0, (num, -1)) + prompt).flatten(0, 1)

    def regions(self, x: Float[Tensor, "stack channel height width"]) -> Float[Tensor, "num batch row column"]:
        """1 in the regions of each image that have the prompt."""
        logits = self.logits(x)
        if not self.generators:
            return decide(logits)
        noise = torch.stack([gumbel(logits.shape[1:], generator) for generator in self.generators])
        return decide_softly(logits, noise.to(logits), self.temperature)

    def logits(self, x: Float[Tensor, "stack channel height width"]) -> Float[Tensor, "num batch 2 row column"]:
        """What the mask generator says of each region, without noise: do not prompt, prompt."""
        if self.masks is None:
            raise ValueError("this prompt is the same on every image; only AdaViPro decides by region")
        grey = x.mean(1)
        seen = laplacian(grey) if self.layout.edges else grey
        return self.masks(seen.unflatten(0, (len(self.values), -1)))

    @torch.no_grad()
    def added_norm(self, x: Float[Tensor, "stack channel inner inner"]) -> Float[Tensor, " num"]:
        """Euclidean norm of what each configuration adds to its images, those regions alone that have it; their mean.

        In the units of normalized images; the black that EVP's frame lies on is no part of it.
        """
        prompt = self.unit.unsqueeze(-1) * self._canvas()
        if self.masks is None:
            return prompt.flatten(1).norm(dim=1)
        shown = by_pixel(self.regions(x), self.layout.size)
        return (prompt.square().sum(1, keepdim=True) * shown).flatten(2).sum(2).sqrt().mean(1)

    @torch.no_grad()
    def descend(self, rates: Float[Tensor, " num"]) -> None:
        """EVP's step: ``values -= rate * n^(1/p) * g / (|whole g|_p + 1e-10)``, and a cosine by epoch on the rate.

        The norm is that of the gradient on all n values of the image, with the middle that has no prompt. With
        n^(1/p) the rate is a pixel's root-mean-square step (l2), mean step (l1) or largest step (linf) whatever the
        image's size: the paper's 70, for l2 at 224 pixels, is 70 / sqrt(150528) = 0.18. No momentum, no decay.
        """
        gradient = self.values.grad
        if gradient is None:
            return
        if self.normalization != "none":
            whole, order = self.whole.flatten(1), _ORDERS[str(self.normalization)]
            norm = torch.linalg.vector_norm(whole, order, dim=1)
            rates = rates * whole.shape[1] ** (1 / order) / (norm + 1e-10)
        self.values.sub_((self.cosine * rates).view(-1, 1, 1) * gradient)
        self.values.grad = None

    @property
    def updates_itself(self) -> bool:
        return self.normalization is not None

    def trained(self) -> Iterator[Trained]:
        yield Trained(self.values, self.lr_scale, None)
        if self.masks is not None:
            for parameter in self.masks.parameters():
                yield Trained(parameter, self.generator_lr_scale, None)

    def state(self, configuration: int) -> dict[str, Tensor]:
        return {name: value[configuration].detach().clone().cpu() for name, value in self.state_dict().items()}

    def load(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        own = self.state_dict()
        self.load_state_dict({name: torch.stack([state[name] for state in states]) for name in own})

    def single(self, configuration: int) -> "Overlay":
        """The prompt of one configuration, as a stack of one."""
        overlay = Overlay(self.layout, init=self.init, normalization=self.normalization).to(self.values.device)
        overlay.load([self.state(configuration)])
        return overlay

    def export(self, configuration: int) -> "PixelPrompt":
        return PixelPrompt(self.single(configuration)).requires_grad_(False)

    def weights(self, configuration: int) -> dict[str, Tensor]:
        return {}

    def prompt_norm(self, configuration: int, activations: Callable[[], Sequence[Tensor]]) -> tuple[float, float]:
        """Where the prompt differs between images (AdaViPro), the mean over the images that cross the cut."""
        overlay = self.single(configuration)
        if overlay.masks is not None:
            norm = float(overlay.added_norm(*activations()))
        else:
            norm = float((overlay.unit[0] * overlay.values[0]).detach().norm())
        return norm, float(overlay.activation_norm)

    def _diversified(self, x: Tensor) -> Tensor:
        flip, crop = "flip" in self.diversity, "crop" in self.diversity
        if flip or crop:
            x = flipped_and_cropped(x, self.generators, flip=flip, crop=crop)
        return randaugmented(x, self.generators, *_by_channel(self.layout, x)) if "randaugment" in self.diversity else x

    def _keep(self, gradient: Float[Tensor, "num channel height width"]) -> None:
        self.whole = gradient.float()

    def _canvas(self) -> Float[Tensor, "num channel height width"]:
        """The prompts on empty images, in their own units."""
        num, size = len(self.values), self.layout.size
        place = self.pixels.expand(num, 1, -1)
        if self.layout.place == "random_patch":
            free = size - self.layout.width
            draws = [torch.randint(free + 1, (2,), generator=generator) for generator in self.generators]
            corner = torch.stack(draws) if draws else torch.full((num, 2), free // 2)
            place = place + (size * corner[:, 0] + corner[:, 1]).view(-1, 1, 1).to(place.device)
        empty = self.values.new_zeros(num, len(self.layout.mean), size * size)
        return empty.scatter(2, place.expand_as(self.values), self.values).unflatten(2, (size, size))


class PixelPrompt(nn.Module):
    """One trained pixel prompt: maps normalized images of the backbone's size to prompted ones, with nothing random.

    It is an edit at the site ``:input``, so that `methods.AdaptedBackbone` makes a model of it.
    """

    site = ":input"

    def __init__(self, overlay: Overlay) -> None:
        super().__init__()
        if len(overlay.values) != 1:
            raise ValueError(f"these are {len(overlay.values)} prompts; a PixelPrompt holds one")
        self.overlay = overlay

    @classmethod
    def restore(cls, layout: Mapping[str, Any], state: Mapping[str, Tensor]) -> "PixelPrompt":
        """From the fields of a layout and a state dict."""
        fields: dict[str, Any] = dict(layout) | {name: tuple(layout[name]) for name in ("mean", "std")}
        overlay = Overlay(Layout(**fields))
        overlay.load_state_dict(dict(state))
        return cls(overlay)

    @property
    def layout(self) -> Layout:
        """Where the prompt lies."""
        return self.overlay.layout

    @property
    def delta(self) -> Float[Tensor, "channel height width"]:
        """The prompt, in the units of normalized images and zero elsewhere; AdaViPro adds it in `regions` only."""
        return (self.overlay.unit.unsqueeze(-1) * self.overlay._canvas())[0].detach()

    @property
    def num_parameters(self) -> int:
        """Trained values, those of a mask generator included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel height width"]:
        if x.shape[-2:] != (self.layout.size,) * 2:
            raise ValueError(
                f"the prompt was trained for images of {self.layout.size} pixels, not {tuple(x.shape[-2:])}"
            )
        return self.overlay(shrunk(x, self.layout))

    def regions(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch row column"]:
        """AdaViPro's decisions: 1 in the regions of each image that have the prompt."""
        return self.overlay.regions(x)[0]

    def probabilities(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch row column"]:
        """How often AdaViPro's noise would let each region have the prompt; decided by `regions` at one half."""
        return self.overlay.logits(x)[0].float().softmax(1)[:, 1]

    def relative_norm(self, x: Float[Tensor, "batch channel height width"]) -> float:
        """Mean norm of what is added to the images divided by their own, shrunk where they are."""
        small = shrunk(x, self.layout).float()
        return float(self.overlay.added_norm(small) / small.flatten(1).norm(dim=1).mean())

    def extra_repr(self) -> str:
        return f"{self.layout}, num_parameters={self.num_parameters}"


def _by_channel(layout: Layout, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(value, device=like.device, dtype=like.dtype).view(-1, 1, 1) for value in (layout.mean, layout.std)
    )
    return mean, std


def _divisors(size: int) -> list[int]:
    return [side for side in range(1, size + 1) if size % side == 0]
