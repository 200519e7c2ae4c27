"""Images in batches, for metrics that run over them."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

IMAGES_AT_ONCE = 32  # in a batch that is cut from a tensor, where the caller does not say
ImageBatches = Tensor | Iterable[Any]
"""A tensor of normalized images, or batches of them, such as a DataLoader, whose items may be ``(images, labels)``."""


def batches(images: ImageBatches, batch_size: int, backbone: nn.Module) -> Iterator[Tensor]:
    """Batches on the backbone's device; those cut from a tensor differ in size by one image at most.

    Args:
        batch_size: The most images in a batch that is cut from a tensor; other batches come as they are.

    Raises:
        ValueError: If there are no images, or the backbone is in training mode.
    """
    if backbone.training:
        raise ValueError("the backbone is in training mode, where images may change each other; call backbone.eval()")
    if isinstance(images, Tensor):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1")
        images = images.tensor_split(-(-len(images) // batch_size)) if len(images) else ()
    weight = next(backbone.parameters(), None)
    is_empty = True
    for batch in images:
        is_empty = False
        x = batch if isinstance(batch, Tensor) else batch[0]
        yield x if weight is None else x.to(weight.device)
    if is_empty:
        raise ValueError("there are no images; give at least one batch")
