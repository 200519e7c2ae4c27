"""AdamW and SGD with a learning rate and a weight decay for every configuration of a bundle."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apthory.heads import Heads
from apthory.methods import PreparedBackbone, Stack
from apthory.methods.edits import Trained
from apthory.training.config import Configuration, Recipe


class Optimizer:
    """AdamW, or SGD with momentum, with a learning rate and a weight decay for each configuration of the bundle.

    The updates are torch.optim's own; those take one learning rate for a whole stacked parameter, hence this class.
    Edits with an update rule of their own follow it instead.
    """

    def __init__(
        self, prepared: PreparedBackbone, heads: Heads, configurations: Sequence[Configuration], recipe: Recipe
    ) -> None:
        stacks = list(prepared.stacks.values())
        trained = [parameter for stack in stacks if not stack.updates_itself for parameter in stack.trained()]
        trained += [Trained(parameter, 1.0, None) for parameter in heads.parameters() if parameter.requires_grad]
        device = next((parameter.device for parameter in (*prepared.suffix.parameters(), *heads.parameters())), None)
        rates = torch.tensor([c.learning_rate for c in configurations], device=device)
        decays = torch.tensor([c.weight_decay for c in configurations], device=device)
        self.recipe = recipe
        self.parameters: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self.own: list[tuple[Stack, Tensor]] = []  # what updates itself, with its rates
        for parameter, lr_scale, k in trained:
            if k is None:  # the first axis counts configurations
                shape = (-1, *(1 for _ in parameter.shape[1:]))
                self.parameters.append((parameter, (rates * lr_scale).view(shape), decays.view(shape)))
            else:
                self.parameters.append((parameter, rates[k] * lr_scale, decays[k]))
        for stack in stacks:
            if stack.updates_itself:
                lr_scale, *others = {parameter.lr_scale for parameter in stack.trained()}
                assert not others, "an edit that updates itself has one learning rate"
                self.own.append((stack, rates * lr_scale))
        zeros = [torch.zeros_like(parameter) for parameter, _, _ in self.parameters]
        self.first, self.second = zeros, [zero.clone() for zero in zeros]
        self.num_steps = 0
        self.has_work = bool(self.parameters or self.own)  # heads without parameters may be all there is

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
        for stack, rate in self.own:
            stack.descend(rate)
