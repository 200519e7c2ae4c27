"""One layer: a prompt before or after it as a shift of its bias (E1 to E5), and the learning rates that match (E6)."""

import copy
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apthory import sites

Edge = Literal["output", "input"]
Border = Literal["refuse", "ignore"]
Statement = Literal["E1", "E2", "E3", "E4", "E5"]
BATCH_NORM = nn.modules.batchnorm._BatchNorm
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def bias_shift(
    layer: nn.Module, prompt: Float[Tensor, "*unit"], *, edge: Edge = "output", border: Border = "refuse"
) -> Float[Tensor, "*channel"]:
    """What a channel prompt at a layer's edge adds to the layer's result, the same at every position (E1 to E5).

    Args:
        layer: Normalization over channels, linear layer or convolution. The output of a normalization is that of
            its affine map: an activation that timm fuses into the layer comes after it.
        prompt: One value a channel, on the axis where the layer has its channels; other axes have length one, or are
            left out.
        edge: The prompt is added to what the layer returns, or to what it is given.
        border: A convolution with zero padding adds less where its kernel touches the padding; ``"ignore"`` gives
            the shift of all other outputs.

    Raises:
        ValueError: If the prompt is no such shift, with the reason.
    """
    kind = type(layer).__name__
    if edge not in ("output", "input"):
        raise ValueError(f"edge {edge!r} is not 'output' or 'input'")
    shape, gain = _gain(layer, edge, border)
    is_first = has_channels_first(layer)
    if _without_ones(prompt.shape, at_end=is_first) != _without_ones(shape, at_end=is_first):
        raise ValueError(
            f"a prompt of shape {tuple(prompt.shape)} is no channel prompt for the {edge} of this {kind}, which has "
            f"{' x '.join(map(str, shape))} channels on its {'first' if is_first else 'last'} axis; "
            "one that differs between positions is no bias shift (E7)"
        )
    delta = prompt.to(gain).reshape(shape)
    return gain * delta if gain.shape == delta.shape else gain @ delta


def fold_prompt(
    layer: nn.Module, prompt: Float[Tensor, "*unit"], *, edge: Edge = "output", border: Border = "refuse"
) -> nn.Module:
    """A copy of the layer whose bias holds the prompt: ``folded(x) == layer(x) + prompt``, or ``layer(x + prompt)``.

    Arguments and errors are those of `bias_shift`; a layer without bias is refused as well.
    """
    shift = bias_shift(layer, prompt, edge=edge, border=border)
    bias = _bias(layer)
    folded = copy.deepcopy(layer)
    with torch.no_grad():
        folded.bias.copy_((bias + shift).to(bias.dtype))
    return folded


def unfold_prompt(
    layer: nn.Module, tuned: nn.Module, *, edge: Edge = "output", border: Border = "refuse"
) -> Float[Tensor, "*channel"]:
    """The channel prompt that turns a layer into one whose bias was tuned: the inverse of `fold_prompt`.

    Before a linear map the smallest such prompt is given.

    Raises:
        ValueError: If more than the bias was tuned (gamma tuning is no prompt, E7), or no prompt at the layer's
            input gives this shift.
    """
    if type(layer) is not type(tuned):
        raise ValueError(f"a {type(layer).__name__} and a {type(tuned).__name__} differ in more than a bias")
    before, after = layer.state_dict(), tuned.state_dict()
    changed = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
    if before.keys() != after.keys() or set(changed) - {"bias"}:
        raise ValueError(f"the layers differ in {', '.join(changed)}; a prompt changes the bias alone (E7)")
    _, gain = _gain(layer, edge, border)
    shift = (_bias(tuned).double() - _bias(layer).double()).detach()
    rounding = torch.finfo(_bias(tuned).dtype).eps * _bias(tuned).detach().double().norm()  # of the stored bias
    if gain.ndim == 2 and edge == "input":
        prompt = torch.linalg.pinv(gain) @ shift
        missed = gain @ prompt - shift
    else:
        prompt = torch.where(gain == 0, 0, shift / gain)
        missed = gain * prompt - shift
    is_out_of_reach = missed.abs() > 1e-9 * shift.abs().max() + rounding
    if is_out_of_reach.any():
        raise ValueError(
            f"no prompt at the input of this {type(layer).__name__} gives this bias: "
            f"{int(is_out_of_reach.sum())} channels are out of its reach"
        )
    return prompt.to(_bias(layer).dtype)


def border_outputs(layer: nn.Module, *size: int) -> tuple[int, int]:
    """Output positions of a convolution that zero padding gives another shift, and all, for an input of this size.

    Tried on a constant map, so padding that depends on the size counts as well.
    """
    still = copy.deepcopy(layer).double()
    differs = _differs(still, _matrix(still), size)
    return int(differs.sum()), differs.numel()


def matched_rate(
    layer: nn.Module, rate: float, *, edge: Edge = "output", num_positions: int = 1
) -> Float[Tensor, "*channel"]:
    """The learning rate, by channel, at which SGD on a layer's bias copies SGD on a prompt at the layer's edge (E6).

    A channel prompt at a norm output has the same rate; at the input of BatchNorm it is gamma^2 / (var + eps) times
    the prompt's. A full prompt moves, on average over P positions, at 1/P of its rate; a weight decay of its own
    counts P times. Neither holds for Adam, which divides every gradient by its size.
    """
    _, gain = _gain(layer, edge, "refuse")
    if edge == "input" and not isinstance(layer, BATCH_NORM):
        raise ValueError(f"the rate at the input of a {type(layer).__name__} is a matrix, not one number a channel")
    return rate * gain.square() / num_positions


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether a BatchNorm in here normalizes by its batch: one example then changes what the others become."""
    norms = (part for part in module.modules() if isinstance(part, BATCH_NORM))
    return any(norm.training or norm.running_var is None for norm in norms)


def has_channels_first(layer: nn.Module) -> bool:
    """Whether the layer has its channels right after the batch axis, not on the last one."""
    return isinstance(layer, sites.CHANNELS_FIRST)


def statistics_owner(layer: nn.Module) -> Literal["image", "position"]:
    """Whose statistics a normalization layer divides by: those of each image, or of each position."""
    return "image" if isinstance(layer, nn.GroupNorm) else "position"


def statement(layer: nn.Module, edge: Edge) -> Statement:
    """What is known of a channel prompt at the layer's edge."""
    if isinstance(layer, BATCH_NORM):
        return "E1" if edge == "output" else "E2"
    if isinstance(layer, sites.NORMS):
        return "E3" if edge == "output" else "E4"
    return "E5"


def _gain(layer: Any, edge: Edge, border: Border) -> tuple[tuple[int, ...], Tensor]:
    """Shape of a channel prompt, and the matrix (or its diagonal) that makes it a shift of the layer's result."""
    kind, is_linear = type(layer).__name__, isinstance(layer, (nn.Linear, *_CONVOLUTIONS))
    if not is_linear and not isinstance(layer, sites.NORMS):
        raise ValueError(f"{kind} is no normalization over channels, linear layer or convolution; nothing can fold")
    weight = layer.weight
    if edge == "output":
        if getattr(layer, "bias", None) is not None:
            return tuple(layer.bias.shape), torch.ones_like(layer.bias, dtype=torch.float64, requires_grad=False)
        if weight is None:
            raise ValueError(f"this {kind} has no affine parameters; make it with them (affine or elementwise_affine)")
        shape = tuple(weight.shape[:1] if is_linear else weight.shape)
        return shape, torch.ones(shape, dtype=torch.float64, device=weight.device)
    if isinstance(layer, BATCH_NORM):
        if uses_batch_statistics(layer):
            raise ValueError(
                f"this {kind} uses batch statistics, which remove a channel prompt at its input (E2); "
                "call eval(), with running statistics"
            )
        scale = (layer.running_var.double() + layer.eps).rsqrt()
        return tuple(scale.shape), scale if weight is None else weight.detach().double() * scale
    if not is_linear:
        owner = statistics_owner(layer)
        raise ValueError(
            f"{kind} normalizes by the statistics of each {owner}: a prompt at its input is a shift only to first "
            f"order, and another one for each {owner} (E4); prompt its output, or measure the distance with gap"
        )
    matrix = _matrix(copy.deepcopy(layer).double())
    if isinstance(layer, _CONVOLUTIONS) and border != "ignore":
        extent = _extent(layer)
        for size in (extent, [n + 1 for n in extent]):
            touched, total = border_outputs(layer, *size)
            if touched:
                raise ValueError(
                    f"this {kind} pads with zeros: {touched} of {total} outputs of a {'x'.join(map(str, size))} map "
                    "touch the padding, where the shift is smaller (E5); border='ignore' folds for all others"
                )
    return tuple(matrix.shape[1:]), matrix


def _matrix(layer: Any) -> Tensor:
    """What a linear layer makes of a constant, away from padding: the sum of its taps; tried on the layer."""
    taps = layer.weight.detach().reshape(*layer.weight.shape[:2], -1).sum(-1)
    matrix = torch.block_diag(*taps.chunk(getattr(layer, "groups", 1)))
    is_convolution = isinstance(layer, _CONVOLUTIONS)
    size = [n + 2 * s + 2 for n, s in zip(_extent(layer), layer.stride, strict=True)] if is_convolution else []
    differs = _differs(layer, matrix, size)
    if differs[tuple(n // 2 for n in differs.shape)]:  # in the middle, where no kernel meets the padding
        raise ValueError(
            f"this {type(layer).__name__} does not apply its weight as it is (it transforms it, or does more than a "
            "linear map), so its shift cannot be read off; fold(backbone, prompt) tries the layer in its backbone"
        )
    return matrix


def _extent(layer: Any) -> list[int]:
    """How far a convolution's kernel reaches, along each axis."""
    return [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]


@torch.no_grad()
def _differs(layer: nn.Module, matrix: Tensor, size: Sequence[int]) -> Tensor:
    """Positions at which a constant input of this size shifts the layer's result by something else than the matrix."""
    values = torch.randn(matrix.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(matrix)
    x = values.view(1, -1, *(1 for _ in size)).expand(1, -1, *size)
    wanted = (matrix @ values).view(-1, *(1 for _ in size))
    return ((layer(x) - layer(torch.zeros_like(x)))[0] - wanted).abs().amax(0) > 1e-9 * wanted.abs().max()


def _without_ones(shape: Sequence[int], at_end: bool) -> list[int]:
    """A shape without the ones at its end, or at its beginning."""
    ordered = list(shape)[:: -1 if at_end else 1]
    return list(itertools.dropwhile(lambda n: n == 1, ordered))


def _bias(layer: nn.Module) -> Tensor:
    bias = getattr(layer, "bias", None)
    if bias is None:
        raise ValueError(
            f"this {type(layer).__name__} has no bias to hold the prompt; what bias_shift gives is a prompt at the "
            "input of the next layer: fold it there, or fold(backbone, prompt), which looks for that layer"
        )
    return bias
