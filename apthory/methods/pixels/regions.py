"""Where to prompt an image: regions that a small network picks by their edges, and how it is trained (AdaViPro).

References:
    Yang et al. (2024), arXiv:2403.13282.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

_VALUES_AT_ONCE = (
    2**22
)  # gathered values that a processor sees at once: more fall out of its cache, which takes twice the time


def laplacian(grey: Float[Tensor, "batch height width"]) -> Float[Tensor, "batch height width"]:
    """Sum of the four neighbours less four times the pixel.

    The border is repeated outwards. Zeros there, as a convolution pads by default, would draw an edge around every
    image, and the Laplacian of a constant image is zero.
    """
    z = functional.pad(grey, (1, 1, 1, 1), mode="replicate")
    across = z[:, 1:-1, 2:] + z[:, 1:-1, :-2]
    return across + (z[:, 2:, 1:-1] + z[:, :-2, 1:-1]) - 4 * grey


def decide(logits: Float[Tensor, "*batch 2 row column"]) -> Float[Tensor, "*batch row column"]:
    """1 in the regions that have the prompt: where the second logit is the larger."""
    return (logits.argmax(-3) == 1).to(logits.dtype)


def decide_softly(
    logits: Float[Tensor, "*batch 2 row column"], noise: Float[Tensor, "*batch 2 row column"], temperature: float
) -> Float[Tensor, "*batch row column"]:
    """Gumbel-Softmax, straight through: the decision under noise, with the gradient of its softmax.

    Args:
        noise: Independent draws of the Gumbel distribution; the decision is then one from the softmax of the logits.
        temperature: Towards 0 the gradient has less bias and more variance.

    References:
        Jang, Gu and Poole (2017), arXiv:1611.01144.
    """
    soft = ((logits + noise) / temperature).softmax(-3).select(-3, 1)
    return decide(logits + noise).detach() + (soft - soft.detach())


def gumbel(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draws of the standard Gumbel distribution, -log(-log U)."""
    draws = torch.empty(*shape).exponential_(generator=generator)
    return -draws.clamp_min(torch.finfo(draws.dtype).tiny).log()  # of a draw of 0, softmax would make nan


def by_pixel(chosen: Float[Tensor, "*batch row column"], size: int) -> Float[Tensor, "*batch {size} {size}"]:
    """Decisions for regions as a mask on an image of ``size`` pixels."""
    side = size // chosen.shape[-1]
    return chosen.repeat_interleave(side, -2).repeat_interleave(side, -1)


class MaskGenerator(nn.Module):
    """Two logits for each region of an image: do not prompt, prompt. One generator for each configuration.

    One convolution gathers edges from pixel to pixel, one with kernel = stride = region decides. Between them is a
    ReLU, of which the sources of the paper say nothing: without it the logits are linear in the Laplacian, whose
    signs cancel over a texture, so no region could be told by how many edges it has.
    """

    def __init__(self, num: int, dim: int, region: int) -> None:
        super().__init__()
        self.gather_weight = nn.Parameter(torch.zeros(num, dim, 1, 3, 3))
        self.gather_bias = nn.Parameter(torch.zeros(num, dim))
        self.decide_weight = nn.Parameter(torch.zeros(num, 2, dim, region, region))
        self.decide_bias = nn.Parameter(torch.zeros(num, 2))

    @torch.no_grad()
    def start(self, generators: Sequence[torch.Generator]) -> None:
        """Initial weights as torch's convolutions have them, uniform up to 1 / sqrt(fan in)."""
        pairs = ((self.gather_weight, self.gather_bias), (self.decide_weight, self.decide_bias))
        for parameter, weight in ((parameter, pair[0]) for pair in pairs for parameter in pair):
            bound = weight[0, 0].numel() ** -0.5
            for row, generator in zip(parameter, generators, strict=True):
                row.copy_(bound * (2 * torch.rand(row.shape, generator=generator) - 1))

    def forward(self, seen: Float[Tensor, "num batch height width"]) -> Float[Tensor, "num batch 2 row column"]:
        if torch.compiler.is_compiling():  # `torch.export` would take the number of chunks for a bound on the batch
            return self._logits(seen)
        num_images = (
            len(seen[0]) if seen.is_cuda else max(1, _VALUES_AT_ONCE // (self.gather_bias.numel() * seen[0, 0].numel()))
        )
        return torch.cat([self._logits(part) for part in seen.split(num_images, dim=1)], dim=1)

    def _logits(self, seen: Float[Tensor, "num batch height width"]) -> Float[Tensor, "num batch 2 row column"]:
        num, batch, region = *seen.shape[:2], self.decide_weight.shape[-1]
        rows, columns = (size // region for size in seen.shape[2:])
        # Both convolutions as products of matrices, batched over configurations: with one channel, and with kernel =
        # stride, that is what they are, and on a processor in bfloat16 it takes a third of the time.
        near = functional.unfold(seen.flatten(0, 1).unsqueeze(1), 3, padding=1)
        near = near.view(num, batch, 9, rows, region, columns, region).permute(0, 1, 3, 5, 4, 6, 2)
        weight = self.gather_weight.flatten(2).mT
        gathered = torch.baddbmm(self.gather_bias.unsqueeze(1), near.reshape(num, -1, 9), weight).relu()
        inside = gathered.view(num, batch * rows * columns, -1)  # of a region: pixels, then channels
        weight = self.decide_weight.permute(0, 3, 4, 2, 1).flatten(1, 3)
        logits = torch.baddbmm(self.decide_bias.unsqueeze(1), inside, weight)
        return logits.view(num, batch, rows, columns, 2).movedim(-1, 2).to(seen.dtype)
