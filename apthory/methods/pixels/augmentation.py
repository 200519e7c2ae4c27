"""Input diversity: random flips, crops and RandAugment of normalized images, drawn from explicit generators.

EVP resizes the shorter side and crops a square at random: the crop slides along the longer side, at one scale. Images
here are square already and leave no room for that, so a crop slides over the image's own reflection, by up to an
eighth of its side either way (a 4:3 photograph gives a sixth). That keeps the scale of test images, as a crop out of
a larger resize would not.

References:
    Wu et al. (2022), arXiv:2212.10556. RandAugment: Cubuk et al. (2020), arXiv:1909.13719.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Diversity = Literal["flip", "crop", "randaugment"]
Generators = Sequence[torch.Generator]  # one for each configuration of a stack, on the CPU: draws are the same anywhere


def flipped_and_cropped(
    x: Float[Tensor, "stack channel side side"], generators: Generators, *, flip: bool = True, crop: bool = True
) -> Float[Tensor, "stack channel side side"]:
    """Mirror half of the images and slide all. Both only move pixels, so each new pixel is one of the old."""
    num, side = len(x) // len(generators), x.shape[-1]
    most, place = side // 8, torch.arange(side)
    rows, columns = [], []
    for generator in generators:
        shift = torch.randint(-most, most + 1, (2, num, 1), generator=generator) * crop
        down, right = reflected(place + shift)
        mirrored = (torch.rand(num, 1, generator=generator) < 0.5) & flip
        rows.append(down)
        columns.append(torch.where(mirrored, right.flip(1), right))
    row, column = torch.cat(rows).unsqueeze(2), torch.cat(columns).unsqueeze(1)
    source = ((torch.arange(len(x)).view(-1, 1, 1) * side + row) * side + column).to(x.device)
    pixels = x.movedim(1, -1).reshape(-1, x.shape[1])
    return pixels.index_select(0, source.flatten()).view(*source.shape, -1).movedim(-1, 1)


def reflected(place: Int64[Tensor, "*batch side"]) -> Int64[Tensor, "*batch side"]:
    """Places up to a side outside of an image, as places of the image mirrored at its outermost pixels."""
    last = place.shape[-1] - 1
    return last - (last - place.abs()).abs()


def randaugmented(
    x: Float[Tensor, "stack channel height width"],
    generators: Generators,
    mean: Float[Tensor, "channel 1 1"],
    std: Float[Tensor, "channel 1 1"],
) -> Float[Tensor, "stack channel height width"]:
    """Two of RandAugment's operations on each image, in 256 levels of each channel, at torchvision's magnitude."""
    from torchvision.transforms import v2

    pixels = (255 * (x * std + mean)).round().clamp(0, 255).to(torch.uint8)
    transform = v2.RandAugment(fill=(255 * mean).flatten().tolist())
    images = []
    for part, generator in zip(pixels.chunk(len(generators)), generators, strict=True):
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the process's own generator
            torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            images += [transform(image) for image in part]
    return (torch.stack(images).to(x.dtype) / 255 - mean) / std
