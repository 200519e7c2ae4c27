"""What a site is like: its name, the shape of its activation, its channel axis and its depth; and a table of these."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Site:
    """A place in a backbone, and what the activation there looks like."""

    name: str  # canonical, such as "blocks.3:input"
    shape: tuple[int, ...]  # of the activation, without the batch axis
    channel_axis: int | None  # the axis that counts channels (negative, from the end); None where it cannot be told
    depth: float  # 0 at ":input", 1 at the output of the last block; see `depths`


@dataclass(frozen=True, repr=False)
class Tree:
    """Sites in the order in which the backbone computes them. As text they are a table with one line for each site.

    A site inside a block stands under the block's input, and is indented.
    """

    title: str
    sites: list[Site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        rows = [("site", "shape", "channel axis", "depth")]
        entered: list[str] = []  # modules whose input is a line above
        for site in self.sites:
            module, _, edge = site.name.rpartition(":")
            level = sum(module.startswith(f"{name}.") for name in entered)
            axis = "unknown" if site.channel_axis is None else str(site.channel_axis)
            rows.append((f"{'  ' * level}{site.name}", " × ".join(map(str, site.shape)), axis, f"{site.depth:.2f}"))
            if edge == "input" and module:
                entered.append(module)
        name, shape, axis, depth = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = [f"{row[0]:<{name}}  {row[1]:<{shape}}  {row[2]:>{axis}}  {row[3]:>{depth}}" for row in rows]
        return "\n".join([self.title, *lines])

    __repr__ = __str__


@dataclass
class Listing:
    """All that `describe` knows of a backbone, for images of one size."""

    names: dict[str, list[str]]  # by kind: "block", "norm", "all"
    sites: dict[str, Site]  # by name; also those of other sites that were asked for


def depths(order: Sequence[str], places: Sequence[str], blocks: Sequence[str]) -> dict[str, float]:
    """How deep each site lies: 0 at the first block site, 1 at the last, and the other block sites evenly between.

    A norm site lies as far between two block sites as its rank among the norm sites there says. Any other site lies
    halfway between its neighbours among these, so that its depth does not depend on which others are asked for.

    Args:
        order: All sites, as the backbone computes them.
        places: Those of them that are block sites or norm sites.
        blocks: Those of them that are block sites.
    """
    ranks: dict[str, float] = {}
    num_before = 0
    for name in order:
        ranks[name] = num_before if name in places else num_before - 0.5
        num_before += name in places
    bounds = sorted(ranks[name] for name in set(blocks))
    last = max(len(bounds) - 1, 1)
    return {name: float(np.interp(rank, bounds, range(len(bounds)))) / last for name, rank in ranks.items()}
