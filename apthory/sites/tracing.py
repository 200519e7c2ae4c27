"""The traced graph of a backbone (torch.fx): where each site lies in the graph, and how the graph is cut there."""

import copy
import difflib
import inspect
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import timm.layers
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from apthory.sites.description import Listing

EditFunction = Callable[[Tensor], Tensor]
NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    timm.layers.RmsNorm,
    timm.layers.RmsNorm2d,
)
CHANNELS_FIRST = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.modules.conv._ConvNd,
    timm.layers.LayerNorm2d,
    timm.layers.RmsNorm2d,
)
CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, timm.layers.RmsNorm)
_SEQUENCES = (nn.Sequential, nn.ModuleList)
_PLAIN = (bool, int, float, str, tuple, list)  # types of a module's settings
_MOST_CHILDREN = 10  # so many children, or ranges of them, an error message names at most
_OUT_OF_PLACE = {operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub}


class UntraceableError(ValueError):
    """torch.fx cannot record the backbone's forward pass."""


@dataclass
class Kept:
    """What is known of a backbone while its structure stays the same. Nothing here keeps the backbone alive."""

    structure: list[tuple[Any, ...]]  # as `_structure` gives it
    traces: dict[frozenset[str], "Trace | str"] = field(default_factory=dict)  # by leaves; or the reason for none
    listings: dict[tuple[int, ...], Listing] = field(default_factory=dict)  # by the shape of one image


def kept(backbone: nn.Module) -> Kept:
    """What is known of a backbone. It is forgotten when the backbone changes or is deleted."""
    structure = _structure(backbone)
    known = _TRACES.get(backbone)
    if known is None or known.structure != structure:
        known = _TRACES[backbone] = Kept(structure)
    return known


def traced(backbone: nn.Module, leaves: Collection[str] = ()) -> "Trace":
    """The trace of a backbone, made anew only if the backbone has changed.

    Args:
        leaves: Modules that the graph calls as a whole, instead of what is inside them.

    Raises:
        UntraceableError: If torch.fx cannot trace the backbone. It tries once, and the reason is kept like a trace.
    """
    traces = kept(backbone).traces
    leaves = frozenset(leaves)
    if leaves not in traces:
        try:
            traces[leaves] = Trace(backbone, leaves)
        except UntraceableError as error:
            traces[leaves] = str(error)  # the error itself would keep the backbone alive
            raise
    trace = traces[leaves]
    if isinstance(trace, str):
        raise UntraceableError(trace)
    return trace


class Trace:
    """A backbone's graph, and where each site lies in it. The trace does not keep the backbone alive."""

    def __init__(self, backbone: nn.Module, leaves: Collection[str] = ()) -> None:
        tracer = _Tracer(leaves)
        try:
            self.graph = tracer.trace(backbone, concrete_args=_defaults(backbone))
        except Exception as error:  # the model's control flow may raise anything when it meets a proxy
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            whole = f" with {', '.join(map(repr, sorted(leaves)))} as a whole" if leaves else ""
            raise UntraceableError(f"torch.fx cannot trace {type(backbone).__name__}{whole} ({reason})") from error
        self._root = weakref.ref(backbone)
        self.modules = [name for name in tracer.modules if tracer.modules.count(name) == 1]
        self.repeated = set(tracer.modules) - set(self.modules)
        self._add_ends()
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target in _OUT_OF_PLACE:
                node.target = _OUT_OF_PLACE[node.target]
            if node.kwargs.get("inplace"):
                node.kwargs = {**node.kwargs, "inplace": False}
        self.calls = {str(node.target): node for node in self.graph.nodes if node.op == "call_module"}
        marks = [node for node in self.graph.nodes if node.target is mark]
        self.marks = {node.args[1]: node for node in marks if node.args[1].rsplit(":", 1)[0] not in self.repeated}
        self.blocks = set(blocks_of(backbone, [name for name in self.modules if f"{name}:input" in self.marks]))

    @property
    def root(self) -> nn.Module:
        root = self._root()
        assert root is not None, "whoever asks for a trace holds its backbone"
        return root

    def _add_ends(self) -> None:
        image = next(node for node in self.graph.nodes if node.op == "placeholder")
        output = next(node for node in self.graph.nodes if node.op == "output")
        users = list(image.users)
        with self.graph.inserting_after(image):
            start = self.graph.call_function(mark, (image, ":input"))
        for user in users:
            user.replace_input_with(image, start)
        for extra in [node for node in self.graph.nodes if node.op == "placeholder"][1:]:
            for check in reversed(downstream(extra)):  # where torch.fx asserts that an argument has its default
                self.graph.erase_node(check)
            self.graph.erase_node(extra)
        with self.graph.inserting_before(output):
            end = self.graph.call_function(mark, (output.args[0], ":output"))
        output.args = (end,)

    def known(self, site: str) -> str:
        """The site itself, after a check that it is one place in the graph."""
        if site in self.marks:
            return site
        name = site.rsplit(":", 1)[0]
        if name in self.repeated:
            raise ValueError(f"site {site!r}: the backbone calls {name!r} more than once, so the place is not unique")
        hint = nearest(self.marks, site)
        raise ValueError(f"site {site!r}: the backbone never calls {name!r} with a single tensor; {hint}")

    def names(self, site: str) -> list[str]:
        """All names of the place of a site, in the order in which the tensor passes them."""
        node = self.marks[self.known(site)]
        while node.args[0].target is mark and len(node.args[0].users) == 1:
            node = node.args[0]
        names = [node.args[1]]
        while len(node.users) == 1 and (after := next(iter(node.users))).target is mark:
            node = after
            names.append(node.args[1])
        return names

    def canonical(self, site: str) -> str:
        """Of all names of a place: a block's input, else a block's output, else the name closest to its source."""
        names = self.names(site)
        for edge in (":input", ":output"):
            for name in names:
                if name == edge or (name.endswith(edge) and name.rsplit(":", 1)[0] in self.blocks):
                    return name
        return names[0]

    def ordered(self, sites: Iterable[str]) -> list[str]:
        """The sites in the order in which the backbone computes them."""
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        return sorted(sites, key=lambda site: order[self.marks[site]])

    def check_calls(self, names: Iterable[str]) -> None:
        """Raises ValueError unless the backbone calls each of these modules exactly once."""
        for name in names:
            if name in self.repeated:
                raise ValueError(irreplaceable(name, "calls it more than once"))
            if name not in self.modules:
                raise ValueError(irreplaceable(name, "never calls it"))

    def propagate(self, x: Tensor) -> dict[fx.Node, Any]:
        """The value of each node for one batch. Tensors carry their shapes alone, and nothing is computed."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        module = fx.GraphModule(self.root, self._copy())  # it holds the backbone's modules and the graph it is given
        with mode:
            fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        copies = dict(zip(module.graph.nodes, self.graph.nodes, strict=True))
        FakeTensorProp(module, mode).propagate_dont_convert_inputs(fake)
        return {copies[node]: node.meta.get("val") for node in module.graph.nodes}

    def _copy(self) -> fx.Graph:
        graph, new = fx.Graph(), dict[fx.Node, Any]()
        for node in self.graph.nodes:
            new[node] = graph.node_copy(node, new.__getitem__)
        return graph

    def cut(
        self,
        site: str,
        edits: Sequence[tuple[str, EditFunction]],
        replace: Mapping[str, nn.Module],
        example: Tensor | None,
    ) -> tuple[nn.Module, nn.Module]:
        """Prefix and suffix of a cut at a site; `apthory.sites.split` says what they are.

        Args:
            edits: Sites and what is done there. Several edits of one site act in the order given.
            replace: New modules, by the names of those whose calls they take over. These must be calls of the graph.
            example: One image batch, for backbones that do not carry a timm data configuration.
        """
        place = self.marks[site]
        after = set(downstream(place))
        early = [name for name, _ in edits if self.marks[name] is not place and self.marks[name] not in after]
        if early:
            raise ValueError(f"edit at {early[0]!r} lies before the cut at {site!r}; cut at the earliest edited site")
        output = next(node for node in self.graph.nodes if node.op == "output")
        if output not in after:
            raise ValueError(f"the backbone's output does not depend on site {site!r}")
        image = next(node for node in self.graph.nodes if node.op == "placeholder")
        varying = {image, *downstream(image)}  # the other nodes depend on the weights alone; either side may have them
        for name in replace:
            call = self.calls[name]
            only_after = call not in varying and all(user in after for user in downstream(call) if user in varying)
            if call not in after and not only_after:
                hint = f"cut at '{name}:input' or earlier" if call in varying else "cut before its result is used"
                raise ValueError(
                    f"the backbone does not call {name!r}, which is to be replaced, after the cut at {site!r}; {hint}"
                )
        crossing = [n for n in self.graph.nodes if n in varying and n not in after and any(u in after for u in n.users)]
        crossing = [place] + [node for node in crossing if node is not place]
        sizes: dict[fx.Node, Callable[[fx.Graph, fx.Node], Any]] = {}
        if len(crossing) > 1:
            two, three = (self.propagate(example_batch(self.root, batch, example)) for batch in (2, 3))
            for node in crossing[1:]:
                if not isinstance(two[node], Tensor):
                    sizes[node] = _size_rule(node, two[node], three[node], two[place].shape[0])
        crossing = [node for node in crossing if node not in sizes]

        prefix = fx.Graph()
        new: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node not in after and node.op != "output":
                new[node] = prefix.node_copy(node, new.__getitem__)
        prefix.output(tuple(new[node] for node in crossing))

        suffix, new = fx.Graph(), {}
        for index, node in enumerate(crossing):
            new[node] = suffix.placeholder(f"crossing_{index}")
        batch = suffix.call_function(operator.getitem, (suffix.call_function(getattr, (new[place], "shape")), 0))
        for node, rule in sizes.items():
            new[node] = rule(suffix, batch)
        by_mark: dict[fx.Node, list[EditFunction]] = {}
        for name, edit in edits:
            by_mark.setdefault(self.marks[name], []).append(edit)
        replaced = {self.calls[name]: name for name in replace}
        modules: dict[str, nn.Module] = {}
        num_edits = 0
        for node in self.graph.nodes:
            if node in after or (node not in varying and node.op != "output"):
                new[node] = suffix.node_copy(node, new.__getitem__)
            if node in replaced:
                new[node].target = key = self._key(replaced[node])
                modules[key] = replace[replaced[node]]
                _protect_input(new[node], modules[key])
            for edit in by_mark.get(node, ()):
                key = f"edit_{num_edits}"
                num_edits += 1
                modules[key] = edit if isinstance(edit, nn.Module) else _Edit(edit)
                new[node] = suffix.call_module(key, (new[node],))
        return _module(self.root, prefix, {}), _module(self.root, suffix, modules)

    def _key(self, name: str) -> str:
        """Where the suffix holds a new module: under the old name, if nothing else inside the old one is used."""
        targets = [str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr")]
        is_shared = any(target.startswith(f"{name}.") for target in targets)
        return f"replacement_of_{name.replace('.', '_')}" if is_shared else name


def mark(z: Any, site: str) -> Any:
    """A named place in the graph; does nothing."""
    return z


class _Tracer(fx.Tracer):
    """Records a forward pass with a mark where each module is entered and left."""

    def __init__(self, leaves: Collection[str] = ()) -> None:
        super().__init__(autowrap_functions=tuple(timm.layers.get_notrace_functions()))
        self.leaves = frozenset(leaves)
        self.modules: list[str] = []  # a name for each call, in the order of the calls

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves:
            return True
        # A norm with a fused activation is no leaf, so that the output of its affine map is a site of its own.
        if isinstance(m, NORMS):
            return not hasattr(m, "act")
        return timm.layers.is_notrace_module(type(m)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        name = self.path_of_module(m)
        self.modules.append(name)
        if args and isinstance(args[0], fx.Proxy):
            marked = self.create_proxy("call_function", mark, (args[0], f"{name}:input"), {})
            args, kwargs = exchanged(args[0], marked, args, kwargs)
        output = super().call_module(m, forward, args, kwargs)
        if isinstance(output, fx.Proxy):
            output = self.create_proxy("call_function", mark, (output, f"{name}:output"), {})
        return output


_TRACES: "weakref.WeakKeyDictionary[nn.Module, Kept]" = weakref.WeakKeyDictionary()


def _structure(backbone: nn.Module) -> list[tuple[Any, ...]]:
    """What a trace depends on: the modules, their settings, and which parameters and hooks they have; no weights."""
    structure: list[tuple[Any, ...]] = []
    for name, module in backbone.named_modules():
        settings = {
            key: value if isinstance(value, bool | int | float | str) else repr(value)
            for key, value in vars(module).items()
            if not key.startswith("_") and (value is None or callable(value) or isinstance(value, _PLAIN))
        }
        held = [key for part in (module._parameters, module._buffers) for key in part if part[key] is not None]
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        structure.append((name, type(module), settings, held, hooks))
    return structure


def _defaults(backbone: nn.Module) -> dict[str, Any]:
    """The defaults of the optional arguments of forward (masks, flags). A trace holds for these."""
    parameters = list(inspect.signature(backbone.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def exchanged(
    old: Any, new: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with one value exchanged in all its places: nn.MultiheadAttention is given its input three times."""
    values = tuple(new if value is old else value for value in args)
    return values, {name: new if value is old else value for name, value in kwargs.items()}


def example_batch(backbone: nn.Module, batch: int, example: Tensor | None) -> Tensor:
    """A batch of images of the size that the backbone takes: copies of the first example, else all zeros.

    Args:
        batch: How many images.
        example: One image batch, for backbones that do not carry a timm data configuration.

    Raises:
        ValueError: If there is no example, and the backbone carries no timm data configuration.
    """
    if example is not None:
        return example[:1].expand(batch, *example.shape[1:])
    config = getattr(backbone, "pretrained_cfg", None)
    if config is None:
        raise ValueError(f"{type(backbone).__name__} carries no timm data configuration; pass example=one image batch")
    embed = getattr(backbone, "patch_embed", None)
    size = getattr(embed, "img_size", None) or config["input_size"][-2:]
    weight = next(backbone.parameters())
    return torch.zeros(batch, config["input_size"][0], *size, dtype=weight.dtype, device=weight.device)


def blocks_of(backbone: nn.Module, among: Sequence[str] | None = None) -> list[str]:
    """The repeated units of a backbone. Of nested ones these are the innermost, so that stages are not blocks.

    They are the composite modules that stand in a sequence under a number (``blocks.3``). Where there are none, they
    are those under a numbered name (``s1.b1``, ``denseblock2``). Where there are none either, they are the
    convolutions of the longest plain sequence.

    Args:
        among: The modules that may be blocks; all of them by default.
    """
    named = dict(backbone.named_modules())
    names = list(named if among is None else among)
    composite = [name for name in names if _is_composite(named[name])]
    for is_member in (_is_numbered, _is_in_series):
        members = [name for name in composite if is_member(named, name)]
        if members:
            return [name for name in members if not any(inner.startswith(f"{name}.") for inner in members)]
    plain = [name for name in names if isinstance(named[name], nn.modules.conv._ConvNd) and _is_numbered(named, name)]
    rows = Counter(name.rpartition(".")[0] for name in plain)
    longest = max(rows, key=rows.__getitem__, default="")
    return [name for name in plain if name.rpartition(".")[0] == longest and rows[longest] > 1]


def _is_composite(module: nn.Module) -> bool:
    has_parts = next(module.children(), None) is not None and next(module.parameters(), None) is not None
    return has_parts and not isinstance(module, (*_SEQUENCES, *NORMS))


def _is_numbered(named: Mapping[str, nn.Module], name: str) -> bool:
    parent, _, last = name.rpartition(".")
    return last.isdigit() and isinstance(named[parent], _SEQUENCES)


def _is_in_series(named: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a module is numbered and stands in a sequence, or among modules of the same name (``s1.b1``)."""
    parent, _, last = name.rpartition(".")
    series = last.rstrip("0123456789")
    alike = all(child.rstrip("0123456789") == series for child, _ in named[parent].named_children())
    return last != series and (isinstance(named[parent], _SEQUENCES) or (bool(parent) and alike))


def _module(root: nn.Module, graph: fx.Graph, extra: Mapping[str, nn.Module]) -> nn.Module:
    """A graph as a module that shares the root's weights but never works in place.

    Args:
        extra: Modules that the graph calls and the root does not have. They are used as they are.
    """
    for node in list(graph.nodes):
        if node.target is mark:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    attributes: dict[str, Any] = dict(extra)
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in extra:
            module = root.get_submodule(node.target)
            if getattr(module, "inplace", False):
                module = copy.copy(module)
                module.inplace = False
            attributes[node.target] = module
        elif node.op == "get_attr":
            attributes[node.target] = operator.attrgetter(node.target)(root)
    module = fx.GraphModule(attributes, graph, class_name=f"{type(root).__name__}Part")
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    used = {node.target for node in module.graph.nodes}
    for name in attributes.keys() - used - extra.keys():  # parameters of the other half that the graph no longer reads
        parent, _, attribute = name.rpartition(".")
        with suppress(AttributeError):  # gone with its module
            delattr(module.get_submodule(parent), attribute)
    module.recompile()
    return module


def _size_rule(node: fx.Node, two: Any, three: Any, site_batch: int) -> Callable[[fx.Graph, fx.Node], Any]:
    """How the suffix makes a number that the prefix took from the batch: as a constant, or as so many per example.

    Args:
        two: The number, or numbers, for two images.
        three: The same for three images.
        site_batch: The first axis of the site's activation for two images.
    """

    def rule_of(a: Any, b: Any) -> Callable[[fx.Graph, fx.Node], Any]:
        if a == b:
            return lambda graph, batch: a
        if isinstance(a, int) and 3 * a == 2 * b:
            return lambda graph, batch: graph.call_function(
                operator.floordiv, (graph.call_function(operator.mul, (batch, a)), site_batch)
            )
        raise UntraceableError(f"{node} is {a} for 2 images and {b} for 3: not a size that the suffix can make anew")

    if isinstance(two, tuple | list):
        rules = [rule_of(a, b) for a, b in zip(two, three, strict=True)]
        return lambda graph, batch: graph.call_function(tuple, ([rule(graph, batch) for rule in rules],))
    rule = rule_of(two, three)
    if two == three:  # the suffix needs a node, and a constant is none
        return lambda graph, batch: graph.call_function(_constant, (two,))
    return rule


def _constant(value: Any) -> Any:
    return value


def _protect_input(call: fx.Node, module: nn.Module) -> None:
    """Gives a module that may work in place a copy of its input, since a suffix never writes into what it is given."""
    works_in_place = any(getattr(part, "inplace", False) for part in module.modules())
    if works_in_place and call.args and isinstance(call.args[0], fx.Node):
        with call.graph.inserting_before(call):
            copied = call.graph.call_function(_copied, (call.args[0],))
        call.args, call.kwargs = exchanged(call.args[0], copied, call.args, call.kwargs)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class _Edit(nn.Module):
    """Any callable as a module, since the code that torch.fx writes cannot name partials and bound methods."""

    def __init__(self, function: EditFunction) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


def downstream(node: fx.Node) -> list[fx.Node]:
    """All nodes that depend on this one, nearest first."""
    return _reached(node, lambda reached: reached.users)


def upstream(node: fx.Node) -> list[fx.Node]:
    """All nodes on which this one depends, nearest first."""
    return _reached(node, lambda reached: reached.all_input_nodes)


def _reached(node: fx.Node, neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> list[fx.Node]:
    reached: dict[fx.Node, None] = {}  # a set that keeps its order
    queue = list(neighbours(node))
    while queue:
        current = queue.pop(0)
        if current not in reached:
            reached[current] = None
            queue.extend(neighbours(current))
    return list(reached)


def nearest(names: Iterable[str], name: str) -> str:
    """The end of an error message: names that are like the one that does not exist."""
    near = difflib.get_close_matches(name, [known for known in names if known], n=3, cutoff=0.3)
    return f"did you mean {_either(near)}?" if near else "list_sites(backbone) names the usual ones"


def absent(backbone: nn.Module, name: str) -> str:
    """The message of an error: there is no such module, but others that may be meant."""
    start = f"no module {name!r} in this {type(backbone).__name__}"
    names = {known for known, _ in backbone.named_modules() if known}
    parent, module, rest = "", backbone, name.split(".")
    while rest and isinstance(module._modules.get(rest[0]), nn.Module):
        module = module._modules[rest[0]]
        parent = _dotted(parent, rest.pop(0))
    if not rest:
        known = next(known for known, same in backbone.named_modules() if same is module)
        return f"{start} of its own: that is another name of {known!r}"
    children = [child for child, _ in module.named_children()]
    near: list[str] = []  # children of the last module on the way that exists
    if not (rest[0].isdigit() and all(child.isdigit() for child in children)):
        near = difflib.get_close_matches(rest[0], children, n=3, cutoff=0.6)
    meant = [path for child in near if (path := _dotted(parent, child, *rest[1:])) in names]
    meant = meant or [_dotted(parent, child) for child in near]
    if near:
        children = near + [child for child in children if child not in near]
    listed = f"{parent!r} has the children {_spoken(children)}" if children else f"{parent!r} has no children"
    if meant:
        return f"{start}; did you mean {_either(meant)}?" + (f" {listed}" if parent else "")
    if parent:
        return f"{start}; {listed}"
    hint = nearest(names, name)
    return f"{start}; {hint}" if hint.startswith("did") else f"{start}; its children are {_spoken(children)}; {hint}"


def _either(names: Iterable[str]) -> str:
    return " or ".join(map(repr, names))


def _dotted(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _spoken(children: Sequence[str]) -> str:
    """Names of children, numbers in a row as a range; the first of them, where they are many."""
    rows: list[list[str]] = []
    for child in children:
        if rows and child.isdigit() and rows[-1][-1].isdigit() and int(child) == int(rows[-1][-1]) + 1:
            rows[-1].append(child)
        else:
            rows.append([child])
    words = [word for row in rows for word in ([f"{row[0]} to {row[-1]}"] if len(row) > 2 else row)]
    return ", ".join([*words[:_MOST_CHILDREN], *(["..."] if len(words) > _MOST_CHILDREN else [])])


def irreplaceable(name: str, reason: str) -> str:
    """The message of an error: a module cannot be replaced, since the backbone does not call it exactly once."""
    return f"cannot replace {name!r}: the backbone {reason}; replace a module that it calls once, such as one around it"
