"""The traced graph of a backbone (torch.fx): where each site lies in it, and how it is cut in two there."""

import copy
import difflib
import inspect
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import timm.layers
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

Edit = Callable[[Tensor], Tensor]
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
_PLAIN = (bool, int, float, str, tuple, list)  # kinds of settings
_OUT_OF_PLACE = {operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub}


class UntraceableError(ValueError):
    """torch.fx cannot record the backbone's forward pass."""


def traced(backbone: nn.Module) -> "Trace":
    """The trace of a backbone, made anew only if the backbone was changed; it is kept as long as the backbone is."""
    structure = _structure(backbone)
    known = _TRACES.get(backbone)
    if known is None or known[0] != structure:
        known = _TRACES[backbone] = (structure, Trace(backbone))
    return known[1]


class Trace:
    """A backbone's graph, and where each site lies in it; the backbone itself is not kept alive."""

    def __init__(self, backbone: nn.Module) -> None:
        tracer = _Tracer()
        try:
            self.graph = tracer.trace(backbone, concrete_args=_defaults(backbone))
        except Exception as error:  # torch.fx raises whatever the model's control flow makes of a proxy
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UntraceableError(f"torch.fx cannot trace {type(backbone).__name__} ({reason})") from error
        self._root = weakref.ref(backbone)
        self.modules = [name for name in tracer.modules if tracer.modules.count(name) == 1]
        self.repeated = set(tracer.modules) - set(self.modules)
        self._add_ends()
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target in _OUT_OF_PLACE:
                node.target = _OUT_OF_PLACE[node.target]
            if node.kwargs.get("inplace"):
                node.kwargs = {**node.kwargs, "inplace": False}
        marks = [node for node in self.graph.nodes if node.target is mark]
        self.marks = {node.args[1]: node for node in marks if node.args[1].rsplit(":", 1)[0] not in self.repeated}
        self.blocks = set(blocks_of(backbone, [name for name in self.modules if f"{name}:input" in self.marks]))

    @property
    def root(self) -> nn.Module:
        root = self._root()
        assert root is not None, "a trace is asked for by way of its backbone"
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
            for check in reversed(downstream(extra)):  # torch.fx asserts that these arguments keep their defaults
                self.graph.erase_node(check)
            self.graph.erase_node(extra)
        with self.graph.inserting_before(output):
            end = self.graph.call_function(mark, (output.args[0], ":output"))
        output.args = (end,)

    def known(self, site: str) -> str:
        if site in self.marks:
            return site
        name = site.rsplit(":", 1)[0]
        if name in self.repeated:
            raise ValueError(f"site {site!r}: the backbone calls {name!r} more than once, so the place is not unique")
        hint = nearest(self.marks, site)
        raise ValueError(f"site {site!r}: the backbone never calls {name!r} with a single tensor; {hint}")

    def canonical(self, site: str) -> str:
        """Of all names of a place: a block's input, else a block's output, else the name closest to its source."""
        node = self.marks[self.known(site)]
        while node.args[0].target is mark and len(node.args[0].users) == 1:
            node = node.args[0]
        names = [node.args[1]]
        while len(node.users) == 1 and (after := next(iter(node.users))).target is mark:
            node = after
            names.append(node.args[1])
        for edge in (":input", ":output"):
            for name in names:
                if name == edge or (name.endswith(edge) and name.rsplit(":", 1)[0] in self.blocks):
                    return name
        return names[0]

    def propagate(self, x: Tensor) -> dict[fx.Node, Any]:
        """The value of every node for one batch, as shapes only: nothing is computed."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        module = fx.GraphModule(self.root, self._copy())  # keeps the graph, and the backbone's modules with it
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

    def cut(self, site: str, edits: Mapping[str, Edit], example: Tensor | None) -> tuple[nn.Module, nn.Module]:
        place = self.marks[site]
        after = set(downstream(place))
        early = [name for name in edits if self.marks[name] is not place and self.marks[name] not in after]
        if early:
            raise ValueError(f"edit at {early[0]!r} lies before the cut at {site!r}; cut at the earliest edited site")
        output = next(node for node in self.graph.nodes if node.op == "output")
        if output not in after:
            raise ValueError(f"the backbone's output does not depend on site {site!r}")
        image = next(node for node in self.graph.nodes if node.op == "placeholder")
        varying = {image, *downstream(image)}  # the rest depends on the weights alone and may live on both sides
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
        modules: dict[str, nn.Module] = {}
        for index, node in enumerate(crossing):
            new[node] = suffix.placeholder(f"crossing_{index}")
        batch = suffix.call_function(operator.getitem, (suffix.call_function(getattr, (new[place], "shape")), 0))
        for node, rule in sizes.items():
            new[node] = rule(suffix, batch)
        by_mark = {self.marks[name]: edit for name, edit in edits.items()}
        for node in self.graph.nodes:
            if node in after or (node not in varying and node.op != "output"):
                new[node] = suffix.node_copy(node, new.__getitem__)
            if node in by_mark:
                edit = by_mark[node]
                key = f"edit_{len(modules)}"
                modules[key] = edit if isinstance(edit, nn.Module) else _Edit(edit)
                new[node] = suffix.call_module(key, (new[node],))
        return _module(self.root, prefix, {}), _module(self.root, suffix, modules)


def mark(z: Any, site: str) -> Any:
    """A named place in the graph; does nothing."""
    return z


class _Tracer(fx.Tracer):
    """Records a forward pass with a mark where each module is entered and left."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(timm.layers.get_notrace_functions()))
        self.modules: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A norm with a fused activation is opened, so that the output of its affine map is a site of its own.
        if isinstance(m, NORMS):
            return not hasattr(m, "act")
        return timm.layers.is_notrace_module(type(m)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        name = self.path_of_module(m)
        self.modules.append(name)
        if args and isinstance(args[0], fx.Proxy):
            marked = self.create_proxy("call_function", mark, (args[0], f"{name}:input"), {})
            args, kwargs = replaced(args[0], marked, args, kwargs)
        output = super().call_module(m, forward, args, kwargs)
        if isinstance(output, fx.Proxy):
            output = self.create_proxy("call_function", mark, (output, f"{name}:output"), {})
        return output


_TRACES: "weakref.WeakKeyDictionary[nn.Module, tuple[list[tuple[Any, ...]], Trace]]" = weakref.WeakKeyDictionary()


def _structure(backbone: nn.Module) -> list[tuple[Any, ...]]:
    """What a trace depends on: modules, their settings and hooks, and which parameters they have; not the weights."""
    found: list[tuple[Any, ...]] = []
    for name, module in backbone.named_modules():
        settings = {
            key: value if isinstance(value, bool | int | float | str) else repr(value)
            for key, value in vars(module).items()
            if not key.startswith("_") and (value is None or callable(value) or isinstance(value, _PLAIN))
        }
        held = [key for part in (module._parameters, module._buffers) for key in part if part[key] is not None]
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found.append((name, type(module), settings, held, hooks))
    return found


def _defaults(backbone: nn.Module) -> dict[str, Any]:
    """Optional arguments of forward (masks, flags), held at their defaults while tracing."""
    parameters = list(inspect.signature(backbone.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def replaced(
    old: Any, new: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with one value exchanged wherever it stands: nn.MultiheadAttention is given its input three times."""
    values = tuple(new if value is old else value for value in args)
    return values, {name: new if value is old else value for name, value in kwargs.items()}


def example_batch(backbone: nn.Module, batch: int, example: Tensor | None) -> Tensor:
    """So many images of the size that the backbone takes: copies of the example's first, else black ones.

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
    """Repeated units, the innermost, so that stages are not blocks.

    They are composite modules in a sequence under a number (``blocks.3``), else those under a numbered name (``s1.b1``,
    ``denseblock2``), else the convolutions of the longest plain sequence.

    Args:
        among: The modules that may be blocks; all of them by default.
    """
    named = dict(backbone.named_modules())
    names = list(named if among is None else among)
    composite = [name for name in names if _is_composite(named[name])]
    for is_member in (_is_numbered, _is_in_series):
        members = [name for name in composite if is_member(named, name)]
        if members:
            return [name for name in members if not any(other.startswith(f"{name}.") for other in members)]
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
    """A graph as a module that shares the root's weights but never works in place."""
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
    module.recompile()
    return module


def _size_rule(node: fx.Node, two: Any, three: Any, site_batch: int) -> Callable[[fx.Graph, fx.Node], Any]:
    """How the suffix makes a number that the prefix had taken from the batch: a constant, or so many per example."""

    def one(a: Any, b: Any) -> Callable[[fx.Graph, fx.Node], Any]:
        if a == b:
            return lambda graph, batch: a
        if isinstance(a, int) and 3 * a == 2 * b:
            return lambda graph, batch: graph.call_function(
                operator.floordiv, (graph.call_function(operator.mul, (batch, a)), site_batch)
            )
        raise UntraceableError(f"{node} is {a} for 2 images and {b} for 3: not a size that the suffix can make anew")

    if isinstance(two, tuple | list):
        rules = [one(a, b) for a, b in zip(two, three, strict=True)]
        return lambda graph, batch: graph.call_function(tuple, ([rule(graph, batch) for rule in rules],))
    rule = one(two, three)
    if two == three:  # a constant must still be a node
        return lambda graph, batch: graph.call_function(_constant, (two,))
    return rule


def _constant(value: Any) -> Any:
    return value


class _Edit(nn.Module):
    """Any callable as a module, since torch.fx cannot write down partials and bound methods."""

    def __init__(self, function: Edit) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


def downstream(node: fx.Node) -> list[fx.Node]:
    """All nodes that depend on this one, nearest first."""
    return _reached(node, lambda one: one.users)


def upstream(node: fx.Node) -> list[fx.Node]:
    """All nodes on which this one depends, nearest first."""
    return _reached(node, lambda one: one.all_input_nodes)


def _reached(node: fx.Node, neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    queue = list(neighbours(node))
    while queue:
        one = queue.pop(0)
        if one not in found:
            found[one] = None
            queue.extend(neighbours(one))
    return list(found)


def nearest(names: Mapping[str, Any], name: str) -> str:
    """The end of an error message: names like the one that was not found."""
    near = difflib.get_close_matches(name, [known for known in names if known], n=3, cutoff=0.3)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else "list_sites(backbone) names the usual ones"
