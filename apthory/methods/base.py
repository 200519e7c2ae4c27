"""What a method is: where the frozen prefix ends, and the edits of the suffix; and what it makes of a backbone."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apthory import sites
from apthory._tools.determinism import random_stream
from apthory._tools.moved import renamed_field
from apthory.methods.edits import Edit, Stack, WithInput, copy_alike


class Method:
    """A way to adapt a frozen backbone. Subclasses are frozen dataclasses, and most define `edits` alone.

    Each has a ``name`` (a class variable), and a ``site`` (a field or a class variable): the place where the frozen
    prefix ends. A ``label`` and a ``color`` are for figures. `register` makes it known to saved files, studies and the
    command; a process that loads its files must have imported it::

        @methods.register
        @dataclass(frozen=True, kw_only=True)
        class AdapterTuning(ap.Method):
            name: ClassVar[str] = "adapter"
            site: str
            dim: int = 4

            def edits(self, backbone):
                return {self.site: Adapter(ap.sites.site_shape(backbone, self.site)[-1], self.dim)}  # an ap.Edit

    The edit at ``module:output`` of a kind that sees the layer's input gets it; all others see the activation at
    their place. What comes before `site` is frozen and can be cached, so no edit may lie before it.
    """

    name: ClassVar[str]  # of the method in `METHODS`, in files and in tables
    label: ClassVar[str]  # the same in words, for figures
    color: ClassVar[str] = "#999933"  # in figures

    def edits(self, backbone: nn.Module) -> Mapping[str, Edit]:
        """New edits for one configuration, by the place where they act."""
        raise NotImplementedError(f"{type(self).__name__} has neither edits() nor build() of its own")

    def build(self, backbone: nn.Module, num: int) -> "PreparedBackbone":
        """The backbone with the edits of so many configurations."""
        # Made once, since that may take a forward pass; where constructors draw, `start` makes the others anew.
        with random_stream(0, 0):  # the process's own generator stays where it is
            first = self.edits(backbone)
        if not isinstance(first, Mapping) or not all(isinstance(edit, Edit) for edit in first.values()):
            raise ValueError(
                f"edits of {type(self).__name__} gave {first!r}; expected a dict of ap.Edit by their places"
            )
        rows = [first, *(copy.deepcopy(dict(first)) for _ in range(num - 1))]
        if bare := [place for place in rows[0] if ":" not in place]:
            raise ValueError(
                f"the place {bare[0]!r} of an edit has no edge; write '{bare[0]}:input' or '{bare[0]}:output'"
            )
        stacks = {place: edit.stack([row[place] for row in rows]) for place, edit in rows[0].items()}
        return prepared(backbone, self.site, stacks, partial(self.edits, backbone))

    def num_parameters(self, backbone: nn.Module) -> int:
        """Trained values of one configuration, without the head."""
        return self.build(backbone, 1).num_parameters

    def __getattr__(self, name: str) -> Any:
        return getattr(self, renamed_field(type(self), name))


@dataclass
class PreparedBackbone:
    """A backbone prepared for a bundle: ``suffix(*prefix(images))`` gives features, with the bundle's edits inside."""

    prefix: nn.Module  # frozen; images -> tensors that cross the cut
    suffix: nn.Module  # tensors for the stacked configurations -> features
    stacks: Mapping[str, Stack] = field(default_factory=dict)  # what is trained, by place
    new_edits: Callable[[], Mapping[str, Edit]] | None = None  # of one configuration, as their constructor draws them
    held: Mapping[str, nn.Module] = field(default_factory=dict)  # edits in the prefix, by place; they are not trained
    reads_prefix: bool = False  # whether what crosses the cut is the feature itself
    generators: list[torch.Generator] = field(default_factory=list)  # what is random is drawn from, one each

    def start(self, seeds: Sequence[int]) -> None:
        """Draw what edits begin with, each configuration by its own seed, and keep its generator for later draws."""
        if self.new_edits is not None and not all(stack.constructed_alike for stack in self.stacks.values()):
            for k, seed in enumerate(seeds):
                with random_stream(seed, 0):
                    for place, edit in self.new_edits().items():
                        self.stacks[place].put(k, edit)
        self.generators = [torch.Generator().manual_seed(7_000_003 * (seed + 1)) for seed in seeds]
        for stack in self.stacks.values():
            stack.start(self.generators)

    def begin_epoch(self, epoch: int, num_epochs: int) -> None:
        """Move schedules by epoch on; epochs count from 0."""
        for stack in self.stacks.values():
            stack.begin_epoch(epoch, num_epochs)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While this lasts (a training step), edits that draw at random do; otherwise nothing is random."""
        for stack in self.stacks.values():
            stack.generators = self.generators
        try:
            yield
        finally:
            for stack in self.stacks.values():
                stack.generators = ()

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """While this lasts, edits take note of the activations that they see."""
        for stack in self.stacks.values():
            stack.is_calibrating = True
        try:
            yield
        finally:
            for stack in self.stacks.values():
                stack.is_calibrating = False

    def state(self, configuration: int) -> dict[str, Tensor]:
        """A copy of the trained values of one configuration, and of all that goes with them; named ``place.name``."""
        trained = {place: stack.state(configuration) for place, stack in self.stacks.items()}
        held = {place: _values_of(edit) for place, edit in self.held.items()}
        parts = (trained | held).items()
        return {f"{place}.{name}": value for place, part in parts for name, value in part.items()}

    def load(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Take over the states of as many configurations as there are.

        Raises:
            ValueError: If a state has not just the names that it should have, or a value of another shape.
        """
        expected = self.state(0).keys()
        for state in states:
            if differing := sorted(expected ^ state.keys()):
                fault = "is missing" if differing[0] in expected else "belongs nowhere"
                raise ValueError(f"the state is of another method or site: {differing[0]} {fault}")
        parts = [by_place(state) for state in states]
        for place, stack in self.stacks.items():
            stack.load([part[place] for part in parts])
        for place, edit in self.held.items():
            for name, value in edit.named_parameters():
                copy_alike(f"{place}.{name}", value.data, parts[0][place][name])

    def prompt_norm(self, configuration: int, activations: Callable[[], Sequence[Tensor]]) -> tuple[float, float]:
        """Norm of a configuration's prompt and mean norm of what it is added to.

        Without a prompt these are 0 and 1; with several, at different places, there is no one norm: nan.
        """
        norms = [stack.prompt_norm(configuration, activations) for stack in self.stacks.values()]
        pairs = [pair for pair in norms if pair is not None]
        return pairs[0] if len(pairs) == 1 else (0.0, 1.0) if not pairs else (math.nan, 1.0)

    @property
    def num_parameters(self) -> int:
        """Trained values of one configuration, without the head."""
        return sum(stack.num_parameters for stack in self.stacks.values())


def _values_of(edit: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone().cpu() for name, value in edit.named_parameters()}


def by_place(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A state's values by place and name: ``blocks.2:input.values`` is ``values`` at ``blocks.2:input``."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        module, colon, rest = key.partition(":")
        edge, _, name = rest.partition(".")
        parts.setdefault(f"{module}{colon}{edge}", {})[name] = value
    return parts


def prepared(
    backbone: nn.Module,
    site: str,
    stacks: Mapping[str, Stack],
    new_edits: Callable[[], Mapping[str, Edit]] | None = None,
) -> PreparedBackbone:
    """A backbone cut at a site, with stacks of edits after it."""
    for place, stack in stacks.items():
        stack.place = place
    prefix, suffix = sites.split(backbone, site, **placed(backbone, stacks))
    return PreparedBackbone(prefix, suffix, stacks, new_edits)


def placed(backbone: nn.Module, edits: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Edits by place as arguments of `sites.split` and `sites.edited`: what sees a layer's input takes its place."""
    arguments: dict[str, Any] = {"edits": {}, "replace": {}}
    for place, edit in edits.items():
        if not getattr(edit, "sees_input", False):
            arguments["edits"][place] = edit
            continue
        layer, _, edge = place.rpartition(":")
        if edge != "output" or not layer:
            raise ValueError(
                f"an edit that sees its layer's input acts on an output; {place!r} is none: give MODULE:output"
            )
        arguments["replace"][layer] = WithInput(backbone.get_submodule(layer), edit)
    return arguments
