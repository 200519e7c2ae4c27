"""What every method builds: a cut backbone with the trainable edits of a whole bundle after the cut."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from apthory.methods.edits import Shift
from apthory.methods.pixels.overlay import Overlay


@dataclass
class Body:
    """A backbone prepared for a bundle: ``suffix(*prefix(images))`` gives features, with the bundle's edits inside."""

    prefix: nn.Module  # frozen; images -> tensors that cross the cut
    suffix: nn.Module  # tensors for the stacked configurations -> features
    edits: nn.ModuleDict  # the trainable parts, by name; their parameters are stacked by configuration
    generators: list[torch.Generator] = field(default_factory=list)  # what is random is drawn from, one each

    @property
    def overlays(self) -> list[Overlay]:
        """Edits that draw at random in training, have a schedule of their own, or both."""
        return [edit for edit in self.edits.values() if isinstance(edit, Overlay)]

    def start(self, seeds: Sequence[int]) -> None:
        """Draw what edits begin with, each configuration by its own seed, and keep its generator for later draws."""
        self.generators = [torch.Generator().manual_seed(7_000_003 * (seed + 1)) for seed in seeds]
        for overlay in self.overlays:
            overlay.start(self.generators)

    def begin_epoch(self, epoch: int, num_epochs: int) -> None:
        """Move schedules by epoch on; epochs count from 0."""
        for overlay in self.overlays:
            overlay.begin_epoch(epoch, num_epochs)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While this lasts (a training step), edits that draw at random do; otherwise nothing is random."""
        for overlay in self.overlays:
            overlay.generators = self.generators
        try:
            yield
        finally:
            for overlay in self.overlays:
                overlay.generators = ()

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """While this lasts, prompts note how large the activations are that they see."""
        shifts = [edit for edit in self.edits.values() if isinstance(edit, Shift | Overlay)]
        for shift in shifts:
            shift.is_calibrating = True
        try:
            yield
        finally:
            for shift in shifts:
                shift.is_calibrating = False
