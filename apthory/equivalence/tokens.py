"""What a prompt at the input of a ViT is to its tokens.

V1. In a ViT whose patches do not overlap and are not normalised, a prompt on the image is a prompt on the first
    block's patch tokens, and each token's share of it lies in the column space of the patch embedding (`input_span`).
V2. A frame of whole patches around a shrunk image is prompt tokens at fixed positions (`frame_tokens`, `as_tokens`).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apthory import backbones, sites


@dataclass(frozen=True, kw_only=True)
class InputSpan:
    """What prompts on the image can do to the tokens before the first block: ``tokens(x) = offset + W patches(x)``.

    A prompt on the image adds W d_t to patch token t, whatever the image, and nothing to the others: exactly a full
    prompt at `site`, in the span iff each patch token's row lies in the column space of W. This holds for a prompt that
    is added to the network's own input: one that is clamped, or added before a resize, can do less. All numbers are
    float64.
    """

    site: str  # the first block's input
    weight: Float[Tensor, "dim pixel"]  # W
    offset: Float[Tensor, "token dim"]  # the tokens of a zero image: bias, positions and, in the first rows, extras
    basis: Float[Tensor, "dim rank"]  # orthonormal; spans the columns of W
    singular_values: Float[Tensor, " value"]  # of W, descending
    tolerance: float  # singular values up to it may be the rounding of zero
    patch: tuple[int, int]  # height and width in pixels
    grid: tuple[int, int]  # patches in a column and in a row

    @property
    def rank(self) -> int:
        """Dimension of the span, for one patch token."""
        return self.basis.shape[1]

    @property
    def num_extra_tokens(self) -> int:
        """Class, distillation and register tokens, which no prompt on the image changes."""
        return len(self.offset) - math.prod(self.grid)

    def shift(self, prompt: Float[Tensor, "*batch channel height width"]) -> Float[Tensor, "*batch token dim"]:
        """What a prompt on the image adds to the tokens."""
        rows, columns = self.grid
        height, width = self.patch
        by_patch = prompt.double().unflatten(-1, (columns, width)).unflatten(-3, (rows, height))
        pixels = by_patch.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)  # patches in raster order
        return nn.functional.pad(pixels @ self.weight.T, (0, 0, self.num_extra_tokens, 0))

    def tokens(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch token dim"]:
        """What the first block is given."""
        return self.offset + self.shift(x)

    def project(self, prompt: Float[Tensor, "#token dim"]) -> Float[Tensor, "token dim"]:
        """The part of a prompt on the tokens that lies in the span."""
        inside = prompt.double().expand(self.offset.shape) @ self.basis @ self.basis.T
        return nn.functional.pad(inside[self.num_extra_tokens :], (0, 0, self.num_extra_tokens, 0))

    def residual(self, prompt: Float[Tensor, "#token dim"]) -> float:
        """Share of a prompt's norm that lies outside the span.

        It is 0 if a prompt on the image does the same, and 1 if no prompt on the image does any part of it.

        The square of a random prompt's share has the mean ``1 - rank / dim * patches / tokens``.
        """
        whole = prompt.double().expand(self.offset.shape)
        if not whole.any():
            raise ValueError("a prompt of norm zero has no share outside the span; train it, or draw it at random")
        return float((whole - self.project(prompt)).norm() / whole.norm())

    def as_image(self, prompt: Float[Tensor, "#token dim"]) -> Float[Tensor, "channel height width"]:
        """The prompt on the image of least norm that adds the part in the span."""
        (rows, columns), (height, width) = self.grid, self.patch
        inverse = torch.linalg.pinv(self.weight, atol=self.tolerance, rtol=0.0)
        pixels = self.project(prompt)[self.num_extra_tokens :] @ inverse.T
        by_patch = pixels.unflatten(-1, (-1, height, width)).unflatten(0, (rows, columns))
        return by_patch.permute(2, 0, 3, 1, 4).flatten(-2).flatten(-3, -2)


def input_span(backbone: nn.Module, example: Float[Tensor, "batch channel height width"] | None = None) -> InputSpan:
    """The patch embedding of a ViT as an affine map, and the column space of its weights.

    The rank is that of W in float64. Rounding W to its own precision moves singular values by at most
    ``eps / 2 * |W|_F`` (Weyl); those up to this, or to the error of the decomposition, count as zero.

    Args:
        example: One image batch, for backbones that do not carry a timm data configuration.

    Raises:
        ValueError: If a prompt on the image is not a fixed shift of the tokens; the reason is named.
    """
    if not sites.is_traceable(backbone):
        raise _not_affine(backbone, "torch.fx cannot trace it, so what lies before its first block is unknown")
    place = sites.list_sites(backbone)[1]
    prefix, _ = sites.split(backbone, place, example=example)
    kernel = _patch_embedding(backbone, prefix).weight.detach()
    weight = kernel.double().flatten(1)
    left, values, _ = torch.linalg.svd(weight, full_matrices=False)
    rounding = torch.finfo(kernel.dtype).eps / 2 * weight.norm()
    tolerance = float(max(rounding, max(weight.shape) * torch.finfo(torch.float64).eps * values[0]))
    image, patch = sites.site_shape(backbone, ":input", example), (kernel.shape[2], kernel.shape[3])
    grid = (image[1] // patch[0], image[2] // patch[1])
    x = torch.randn(1, *image, generator=torch.Generator().manual_seed(0)).to(kernel)
    with torch.no_grad():
        offset, seen = (prefix(images)[0] for images in (torch.zeros_like(x), x))
    if image[1] % patch[0] or image[2] % patch[1]:
        raise _not_affine(backbone, f"its image {image} is not made of whole patches {patch}")
    if offset.ndim != 3 or offset.shape[1] < math.prod(grid):
        raise _not_affine(backbone, f"its first block is given {tuple(offset.shape[1:])}, not a token for each patch")
    span = InputSpan(
        site=place,
        weight=weight,
        offset=offset[0].double(),
        basis=left[:, values > tolerance],
        singular_values=values,
        tolerance=tolerance,
        patch=patch,
        grid=grid,
    )
    error = float((span.tokens(x) - seen).norm() / seen.double().norm())
    if not error < 1e3 * torch.finfo(kernel.dtype).eps:
        raise _not_affine(backbone, f"its tokens differ from an affine map of the patches by {error:.1g} of their norm")
    return span


def _patch_embedding(backbone: nn.Module, prefix: nn.Module) -> nn.Conv2d:
    """The convolution that is all there is before the first block; otherwise an error that says what else there is."""
    called = [str(node.target) for node in prefix.graph.nodes if node.op == "call_module"]
    layers = {name: prefix.get_submodule(name) for name in called}
    layers = {name: layer for name, layer in layers.items() if not isinstance(layer, nn.Identity | nn.Dropout)}
    name, first = next(iter(layers.items()), ("", None))
    if not isinstance(first, nn.Conv2d) or first.groups != 1:
        raise _not_affine(backbone, "it does not begin with a dense convolution over patches")
    if first.kernel_size != first.stride or first.padding not in ((0, 0), "valid") or first.dilation != (1, 1):
        shape = f"kernel {first.kernel_size}, stride {first.stride}, padding {first.padding}"
        raise _not_affine(backbone, f"the patches of {name!r} overlap or leave gaps ({shape})")
    for later, layer in list(layers.items())[1:]:
        if isinstance(layer, sites.NORMS):
            raise _not_affine(backbone, f"the normalization {later!r} follows, so the shift depends on the image")
        raise _not_affine(backbone, f"the layer {later!r} ({type(layer).__name__}) follows: {name!r} begins a stem")
    return first


def _not_affine(backbone: nn.Module, reason: str) -> ValueError:
    name = backbones.architecture(backbone)
    return ValueError(
        f"a prompt at the input of {name!r} is no fixed prompt on tokens: {reason}. It is one in a ViT whose blocks "
        "directly follow a convolution with kernel = stride"
    )


class FrameTokens(NamedTuple):
    """How many patches of a framed image show the frame alone, both, and the image alone."""

    prompt: int
    mixed: int
    image: int


def frame_tokens(size: int, width: int, patch: int) -> FrameTokens:
    """Count the tokens of an image of ``size`` pixels whose outer ``width`` pixels on every side are a prompt (EVP).

    Only with ``mixed == 0`` is the frame a set of prompt tokens; 30 pixels of 224 with patches of 32 give 0, 24, 25.
    """
    if size % patch or not 0 <= 2 * width <= size:
        raise ValueError(
            f"an image of {size} pixels with a frame of {width} and patches of {patch}: the size must be a multiple "
            "of the patch, and the frame at most half of it"
        )
    whole = max(0, (size - width) // patch - -(-width // patch))  # patches in a row that show the image alone
    touched = -(-(size - width) // patch) - width // patch if 2 * width < size else 0
    return FrameTokens((size // patch) ** 2 - touched**2, touched**2 - whole**2, whole**2)


def framed(
    x: Float[Tensor, "batch channel inner inner"], frame: Float[Tensor, "channel size size"]
) -> Float[Tensor, "batch channel size size"]:
    """Shrunk images in the middle of a frame; what the frame's tensor holds there is not seen."""
    margin = frame.shape[-1] - x.shape[-1]
    if margin < 0 or margin % 2:
        raise ValueError(f"images of {x.shape[-1]} pixels do not lie in the middle of a frame of {frame.shape[-1]}")
    inside = slice(margin // 2, frame.shape[-1] - margin // 2)
    canvas = frame.expand(len(x), *frame.shape).clone()
    canvas[:, :, inside, inside] = x
    return canvas


def as_tokens(
    embedding: InputSpan, x: Float[Tensor, "batch channel inner inner"], frame: Float[Tensor, "channel size size"]
) -> tuple[Float[Tensor, "batch token dim"], Float[Tensor, "prompt dim"]]:
    """A framed image as VPT sees it: the image's tokens, and after them prompt tokens that no image changes.

    ``blocks([image tokens, prompt tokens])`` is then what the backbone makes of `framed`, since blocks do not know
    an order, provided that it reads the class token or a pool with the frame's tokens in it. A prompt token is
    ``pos_t + b + W pixels_t``: VPT-shallow, held to an affine set.

    Args:
        embedding: The backbone's, from `input_span`.
        x: Shrunk, normalized images.
        frame: Normalized pixels around them.

    Raises:
        ValueError: If the frame is not made of whole patches.
    """
    (patch, other), size = embedding.patch, frame.shape[-1]
    width = (size - x.shape[-1]) // 2
    if patch != other or embedding.grid != (size // patch, size // patch):
        raise ValueError(
            f"a frame of {size} pixels does not fit patches of {embedding.patch} on a grid {embedding.grid}"
        )
    if mixed := frame_tokens(size, width, patch).mixed:
        raise ValueError(
            f"a frame of {width} pixels is not made of whole patches of {patch}: {mixed} tokens would mix frame and "
            f"image; take a width of {width // patch * patch} or {-(-width // patch) * patch}"
        )
    position = torch.arange(size // patch, device=frame.device)
    inside = (position >= width // patch) & (position < (size - width) // patch)
    is_image = (inside[:, None] & inside).flatten()
    is_image = torch.cat([is_image.new_ones(embedding.num_extra_tokens), is_image])
    tokens = embedding.tokens(framed(x, frame))
    return tokens[:, is_image].to(x.dtype), tokens[0, ~is_image].to(x.dtype)
