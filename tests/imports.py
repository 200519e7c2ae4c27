"""Who imports whom, read off the sources. `python tests/imports.py` prints the rooms of the house and their arrows."""

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "apthory"
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str, module: str) -> list[tuple[str, bool]]:
    """Dotted names that the source imports, wherever it does, and whether that happens while it is loaded."""
    package = ["apthory", *module.split(".")[:-1]]
    found = []

    def visit(node: ast.AST, on_load: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, on_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found.extend((f"{origin}.{alias.name}", on_load) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, on_load and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(ast.parse(source), True)
    return found


def ours(name: str, modules: set[str]) -> str | None:
    """The module of apthory that a dotted import names, ``__init__`` for the package's own names."""
    if name.split(".")[0] != "apthory":
        return None
    parts = name.split(".")[1:]
    candidates = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    for candidate in candidates:
        for known in (candidate, f"{candidate}.__init__"):
            if known in modules:
                return known
    return "__init__"


@functools.cache
def graph() -> dict[str, set[str]]:
    """Which modules of ours each module of ours imports."""
    found = {}
    for module, path in MODULES.items():
        targets = {ours(name, set(MODULES)) for name, _ in imports(path.read_text("utf-8"), module)}
        found[module] = targets - {None, module}
    return found


def rooms() -> dict[str, set[str]]:
    """Which rooms of the house each room imports: modules and packages in apthory/, but for its own list of names."""
    found: dict[str, set[str]] = {}
    for module, targets in graph().items():
        room = module.split(".")[0]
        found.setdefault(room, set()).update({name.split(".")[0] for name in targets} - {room})
    return {room: targets - {"__init__"} for room, targets in found.items() if room != "__init__"}


def floors(house: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by floor: each stands on those below it alone."""
    sorter, found = TopologicalSorter(house), []
    sorter.prepare()  # raises CycleError where rooms import each other in a circle
    while ready := sorter.get_ready():
        found.append(sorted(ready))
        sorter.done(*ready)
    return found


def main() -> None:
    """Print every room with the rooms it imports, from the ground up."""
    house = rooms()
    levels = floors(house)
    for level, names in enumerate(levels):
        for name in names:
            print(f"{level} {name:<12} {' '.join(sorted(house[name]))}")  # noqa: T201 - a command of its own
    arrows = sum(map(len, house.values()))
    print(f"{len(house)} rooms, {arrows} arrows, {len(levels)} floors, no circle")  # noqa: T201


if __name__ == "__main__":
    main()
