"""Training images on the device: moved, distorted, normalized; with draws that are the same for every device."""

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torchvision.transforms import v2

from apthory import backbones
from apthory.methods.pixels.augmentation import reflected

_GROUP = 8  # neighbours in a (shuffled) batch that share one draw of RandAugment


def crop_and_flip(
    pixels: UInt8[Tensor, "image channel height width"],
    index: Int64[Tensor, " batch"],
    padding: int,
    generator: torch.Generator,
) -> UInt8[Tensor, "batch channel height width"]:
    """Pick images, pad them by reflection, crop at random to the old size, mirror half of them.

    All of this only moves pixels, so it is a single gather: each image has its own rows and columns.

    Args:
        pixels: All images, on any device.
        index: Which of them, on the same device.
        padding: Pixels on every side, fewer than height and width.
        generator: On the CPU, so that the draws are the same for every device.
    """
    height, width = pixels.shape[-2:]
    down, right = torch.randint(-padding, padding + 1, (2, len(index), 1), generator=generator)
    mirrored = torch.randint(2, (len(index), 1), generator=generator).bool()
    rows, columns = reflected(torch.arange(height) + down), reflected(torch.arange(width) + right)
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = (axis.to(pixels.device, non_blocking=True) for axis in (rows, columns))
    channels = torch.arange(pixels.shape[1], device=pixels.device)[:, None, None]
    return pixels[index[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]]


def randaugment(
    images: UInt8[Tensor, "batch channel height width"], magnitude: int, mean: Float[Tensor, "channel 1 1"]
) -> UInt8[Tensor, "batch channel height width"]:
    """Two operations of RandAugment (Cubuk et al. 2020, arXiv:1909.13719), drawn anew for every few images.

    Args:
        images: Any.
        magnitude: Of the operations, 0 to 30.
        mean: Colour of what moves in from outside.
    """
    transform = v2.RandAugment(num_ops=2, magnitude=magnitude, fill=(255 * mean).flatten().tolist())
    return torch.cat([transform(group) for group in images.split(_GROUP)])


def mean_std_on_device(model: nn.Module) -> tuple[Float[Tensor, "channel 1 1"], Float[Tensor, "channel 1 1"]]:
    """`backbones.mean_std` on the device of the model."""
    device = next(model.parameters()).device
    mean, std = backbones.mean_std(model)
    return mean.to(device), std.to(device)


def normalized(
    images: UInt8[Tensor, "batch channel height width"],
    mean: Float[Tensor, "channel 1 1"],
    std: Float[Tensor, "channel 1 1"],
) -> Float[Tensor, "batch channel height width"]:
    """What the model sees of an image."""
    return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
