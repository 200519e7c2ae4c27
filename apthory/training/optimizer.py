"""AdamW and SGD with a learning rate and a weight decay for every configuration of a bundle."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apthory.heads import Heads
from apthory.methods import Body, Method, relative_rate
from apthory.methods.pixels import Overlay
from apthory.training.config import Configuration, Recipe


class Optimizer:
    """AdamW, or SGD with momentum, with a learning rate and a weight decay for each configuration of the bundle.

    The updates are torch.optim's own; those take one learning rate for a whole stacked parameter, hence this class.
    Edits with an update rule of their own follow it instead.
    """

    def __init__(
        self,
        body: Body,
        heads: Heads,
        method: Method,
        configurations: Sequence[Configuration],
        recipe: Recipe,
    ) -> None:
        trained = [*body.edits.parameters(), *heads.parameters()]
        device = trained[0].device if trained else None
        rates = torch.tensor([c.learning_rate for c in configurations], device=device)
        decays = torch.tensor([c.weight_decay for c in configurations], device=device)
        self.recipe = recipe
        self.parameters: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        own_rule = [overlay for overlay in body.overlays if overlay.normalization is not None]
        self.own: list[tuple[Overlay, Tensor]] = [(overlay, rates * method.rate) for overlay in own_rule]
        for name, parameter in body.edits.named_parameters():
            if any(parameter is value for overlay in own_rule for value in overlay.parameters()):
                continue
            if name.startswith("weights."):  # one network for each configuration
                k = int(name.split(".")[1])
                self.parameters.append((parameter, rates[k] * relative_rate(method, name), decays[k]))
            else:
                self._add_stacked(parameter, rates * relative_rate(method, name), decays)
        for parameter in heads.parameters():
            if parameter.requires_grad:
                self._add_stacked(parameter, rates, decays)
        zeros = [torch.zeros_like(parameter) for parameter, _, _ in self.parameters]
        self.first, self.second = zeros, [zero.clone() for zero in zeros]
        self.num_steps = 0
        self.has_work = bool(self.parameters or self.own)  # heads without parameters may be all there is

    def _add_stacked(self, parameter: nn.Parameter, rates: Tensor, decays: Tensor) -> None:
        shape = (-1, *(1 for _ in parameter.shape[1:]))
        self.parameters.append((parameter, rates.view(shape), decays.view(shape)))

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """One update; progress is the share of all steps that are done after it."""
        self.num_steps += 1
        warmup = self.recipe.warmup
        if progress < warmup:
            factor = progress / warmup
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
        for (parameter, rate, decay), first, second in zip(self.parameters, self.first, self.second, strict=True):
            gradient = parameter.grad
            if gradient is None:
                continue
            if self.recipe.optimizer == "sgd":
                first.mul_(self.recipe.momentum).add_(gradient + decay * parameter)
                parameter.sub_(factor * rate * first)
            else:
                first.lerp_(gradient, 1 - 0.9)
                second.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
                scale = second.div(1 - 0.999**self.num_steps).sqrt_().add_(1e-8)
                update = first / (1 - 0.9**self.num_steps) / scale
                parameter.sub_(factor * rate * (update + decay * parameter))
            parameter.grad = None
        for overlay, rate in self.own:
            overlay.descend(rate)
