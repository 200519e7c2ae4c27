"""One layer: a prompt before or after it as a shift of its bias (E1 to E5), and the learning rates that match (E6)."""

import copy
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apthory import sites

Edge = Literal["output", "input"]
Border = Literal["refuse", "ignore"]
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def bias_shift(
    layer: nn.Module, prompt: Float[Tensor, "*unit"], *, edge: Edge = "output", border: Border = "refuse"
) -> Float[Tensor, "*channel"]:
    """What a channel prompt at a layer's edge adds to the layer's result, the same at every position (E1 to E5).

    Args:
        layer: Normalization over channels, linear layer or convolution. The output of a normalization is that of
            its affine map: an activation that timm fuses into the layer comes after it.
        prompt: One value a channel; other axes have length one.
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
    if [n for n in prompt.shape if n > 1] != [n for n in shape if n > 1]:
        raise ValueError(
            f"a prompt of shape {tuple(prompt.shape)} is no channel prompt for the {edge} of this {kind}, which has "
            f"{' x '.join(map(str, shape))} channels; one that differs between positions is no bias shift (E7)"
        )
    delta = prompt.detach().to(gain).reshape(shape)
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
    if gain.ndim == 2 and edge == "input":
        prompt = torch.linalg.pinv(gain) @ shift
        missed = gain @ prompt - shift
    else:
        prompt = torch.where(gain == 0, 0, shift / gain)
        missed = gain * prompt - shift
    if missed.abs().max() > 1e-9 * shift.abs().max():
        raise ValueError(
            f"no prompt at the input of this {type(layer).__name__} gives this bias: "
            f"{int((missed.abs() > 1e-9 * shift.abs().max()).sum())} channels are out of its reach"
        )
    return prompt.to(_bias(layer).dtype)


def border_outputs(layer: nn.Module, *size: int) -> tuple[int, int]:
    """Output positions of a convolution whose kernel touches zero padding, and all, for an input of this size.

    Counted by running the layer on ones with a kernel of ones, so padding that depends on the size counts as well.
    """
    ones = copy.deepcopy(layer).double()
    with torch.no_grad():
        for parameter in ones.parameters():
            parameter.fill_(1.0)
        hits = ones(torch.ones(1, layer.in_channels, *size, dtype=torch.float64, device=layer.weight.device))[0, 0]
    taps = layer.weight[0].numel() + (layer.bias is not None)
    return int((hits != taps).sum()), hits.numel()


def matched_rate(
    layer: nn.Module, rate: float, *, edge: Edge = "output", num_positions: int = 1
) -> Float[Tensor, "*channel"]:
    """The learning rate, by channel, at which SGD on a layer's bias copies SGD on a prompt at the layer's edge (E6).

    A channel prompt at a norm output has the same rate; at the input of BatchNorm it is gamma^2 / (var + eps) times
    the prompt's. A full prompt moves, on average over P positions, at 1/P of its rate; a weight decay of its own
    counts P times. Neither holds for Adam, which divides every gradient by its size.
    """
    _, gain = _gain(layer, edge, "refuse")
    if edge == "input" and not isinstance(layer, _BATCH_NORM):
        raise ValueError(f"the rate at the input of a {type(layer).__name__} is a matrix, not one number a channel")
    return rate * gain.square() / num_positions


def _gain(layer: Any, edge: Edge, border: Border) -> tuple[tuple[int, ...], Tensor]:
    """Shape of a channel prompt, and the matrix (or its diagonal) that makes it a shift of the layer's result."""
    kind, is_linear = type(layer).__name__, isinstance(layer, (nn.Linear, *_CONVOLUTIONS))
    if not is_linear and not isinstance(layer, sites.NORMS):
        raise ValueError(f"{kind} is no normalization over channels, linear layer or convolution; nothing can fold")
    weight = layer.weight
    if edge == "output":
        if getattr(layer, "bias", None) is not None:
            return tuple(layer.bias.shape), torch.ones_like(layer.bias, dtype=torch.float64)
        if weight is None:
            raise ValueError(f"this {kind} has no affine parameters; make it with them (affine or elementwise_affine)")
        shape = tuple(weight.shape[:1] if is_linear else weight.shape)
        return shape, torch.ones(shape, dtype=torch.float64, device=weight.device)
    if isinstance(layer, _BATCH_NORM):
        if layer.training or layer.running_var is None:
            raise ValueError(
                f"this {kind} uses batch statistics, which remove a channel prompt at its input (E2); "
                "call eval(), with running statistics"
            )
        scale = (layer.running_var.double() + layer.eps).rsqrt()
        return tuple(scale.shape), scale if weight is None else weight.detach().double() * scale
    if not is_linear:
        raise ValueError(
            f"a prompt at the input of {kind} is a shift only to first order, and one that depends on the position "
            "(E4); prompt its output, or measure the distance with gap"
        )
    matrix = weight.detach().double()
    if isinstance(layer, nn.Linear):
        return (layer.in_features,), matrix
    if border != "ignore":
        extent = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        for size in (extent, [n + 1 for n in extent]):
            touched, total = border_outputs(layer, *size)
            if touched:
                raise ValueError(
                    f"this {kind} pads with zeros: {touched} of {total} outputs of a {'x'.join(map(str, size))} map "
                    "touch the padding, where the shift is smaller (E5); border='ignore' folds for all others"
                )
    groups = matrix.flatten(2).sum(-1).chunk(layer.groups)  # a constant input meets the sum of the taps
    return (layer.in_channels,), torch.block_diag(*groups)


def _bias(layer: nn.Module) -> Tensor:
    bias = getattr(layer, "bias", None)
    if bias is None:
        raise ValueError(
            f"this {type(layer).__name__} has no bias to hold the prompt; what bias_shift gives is a prompt at the "
            "input of the next layer: fold it there, or fold(backbone, prompt), which looks for that layer"
        )
    return bias
