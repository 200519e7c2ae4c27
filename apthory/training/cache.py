"""The frozen prefix: run once for every image, its results kept."""

import math

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from apthory import backbones
from apthory.tasks import Images

_IMAGES_AT_ONCE = 64  # images that the prefix and evaluations see at once; more fall out of the processor's cache


class PrefixCache:
    """Results of a frozen prefix, by training image; exact, since nothing before the cut is trained or random."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.parts: list[Tensor] = []
        self.is_channels_last: list[bool] = []
        self.owner: tuple[object, ...] = ()  # what the results belong to

    @property
    def num_bytes(self) -> int:
        """Memory that the results take."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    def extend(
        self, backbone: nn.Module, prefix: nn.Module, images: Images, indices: Int64[Tensor, " image"], precision: str
    ) -> None:
        """Run the prefix on the images that are not in the cache yet.

        Raises:
            ValueError: If the cache holds results of another prefix, of other images or in another precision.
        """
        # A prefix is known by its code (that of a traced graph, or what its class says), else as the object that it is.
        owner = (backbone, getattr(prefix, "code", prefix), images, precision)
        pairs = zip(self.owner or owner, owner, strict=True)
        if not all(ours is theirs or (isinstance(ours, str) and ours == theirs) for ours, theirs in pairs):
            raise ValueError("the cache holds the results of another prefix, task or precision; start with a new one")
        self.owner = owner
        new = [index for index in indices.unique().tolist() if index not in self.rows]
        if not new:
            return
        chunks = [run_prefix(backbone, prefix, images, precision, c) for c in chunks_of(torch.tensor(new))]
        is_channels_last = [_is_channels_last(z) for z in chunks[0]]
        parts = []
        for index, flag in enumerate(is_channels_last):
            # Channels go last in storage, so that picking rows keeps the layout that convolutions want.
            pieces = [chunk[index].movedim(1, -1) if flag else chunk[index] for chunk in chunks]
            parts.append(torch.cat([self.parts[index], *pieces] if self.rows else pieces))
        # Assigned at the end, all at once: running out of memory on the way leaves the cache as it was.
        self.parts, self.is_channels_last = parts, is_channels_last
        self.rows = self.rows | {index: len(self.rows) + place for place, index in enumerate(new)}

    def get(self, indices: Int64[Tensor, " image"]) -> list[Tensor]:
        """The crossing tensors of some images, in the order asked for."""
        rows = torch.tensor([self.rows[index] for index in indices.tolist()], device=self.parts[0].device)
        picked = [part.index_select(0, rows) for part in self.parts]
        return [z.movedim(-1, 1) if flag else z for z, flag in zip(picked, self.is_channels_last, strict=True)]


def run_prefix(
    backbone: nn.Module, prefix: nn.Module, images: Images, precision: str, indices: Int64[Tensor, " image"]
) -> list[Tensor]:
    """What crosses the cut for these images, without gradients."""
    with torch.no_grad(), backbones.autocast(backbone, precision):
        return list(prefix(backbones.normalize(backbone, images[indices])))


def chunks_of(indices: Int64[Tensor, "*num image"], num: int = 1) -> tuple[Tensor, ...]:
    """Parts of the images that a stack of ``num`` can take at once, as equal as can be: new shapes cost set-up time."""
    return indices.tensor_split(math.ceil(indices.shape[-1] / max(1, _IMAGES_AT_ONCE // num)), dim=-1)


def _is_channels_last(z: Tensor) -> bool:
    return z.ndim == 4 and not z.is_contiguous() and z.is_contiguous(memory_format=torch.channels_last)
