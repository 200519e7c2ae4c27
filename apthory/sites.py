"""Places in a backbone: list them, read them, edit them, and cut the backbone in two there.

A *site* is a dotted module name with ``:input`` or ``:output`` (output when left out), such as ``blocks.2:input``,
``layer4.0:input`` or ``layer3.1.bn2``; the image itself is ``:input``, the backbone's result ``:output``. Every
site is an activation whose first axis is the batch. `split` cuts the traced graph (torch.fx), so a frozen prefix
can be computed once and its result kept.
"""

import copy
import difflib
import inspect
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import timm.layers
import torch
from jaxtyping import Float
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
_OUT_OF_PLACE = {operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub}


# ------------------------------------------------------------------------------------------ public verbs


def list_sites(backbone: nn.Module, kind: Literal["block", "norm", "all"] = "block") -> list[str]:
    """Canonical sites in the order in which the backbone computes them.

    Args:
        backbone: Any module that maps one image batch to one tensor.
        kind: ``"block"`` gives ``:input``, the input of every block and the output of the last one. ``"norm"``
            gives the output of the affine map of every normalization layer; where timm fuses an activation into
            the layer, that is the place just before the activation. ``"all"`` gives both.
    """
    try:
        trace = _Trace(backbone)
        called, canonical = trace.modules, trace.canonical
    except UntraceableError:  # modules in the order of their definition, and names as they are
        called, canonical = [name for name, _ in backbone.named_modules()], partial(_named, backbone)
        if kind == "all":
            raise
    found = []
    if kind != "norm":
        units = set(_blocks(backbone))
        blocks = [name for name in called if name in units]
        end = f"{blocks[-1]}:output" if blocks else canonical(":output")
        found += [":input", *(f"{name}:input" for name in blocks), end]
    if kind != "block":
        found += [canonical(affine_output(backbone, name)) for name in called if _is_norm(backbone, name)]
    if kind == "all":
        order = {node: index for index, node in enumerate(trace.graph.nodes)}
        found = sorted(set(found), key=lambda name: order[trace.marks[name]])
    return found


def resolve(backbone: nn.Module, site: str) -> str:
    """The canonical name of a site: aliases such as ``blocks.1`` become ``blocks.2:input``.

    Raises:
        ValueError: If the backbone has no such site; the nearest names are suggested.
    """
    site = _named(backbone, site)
    try:
        return _Trace(backbone).canonical(site)
    except UntraceableError:
        return site


def site_shape(backbone: nn.Module, site: str, example: Tensor | None = None) -> tuple[int, ...]:
    """Shape of the activation at a site, without the batch axis.

    Args:
        example: One image batch, for backbones that do not carry a timm data configuration.
    """
    # One image costs a few milliseconds; propagating shapes through the graph costs a hundred.
    with torch.no_grad(), _evaluating(backbone):
        return tuple(capture(backbone, [site], _example(backbone, 1, example))[site].shape[1:])


def channel_axis(backbone: nn.Module, site: str, example: Tensor | None = None) -> int:
    """Which axis of the activation counts channels (negative, from the end).

    Read off the graph: the layer that makes the activation decides, else the first layer that consumes it (a linear
    layer after pooling does not, as its width tells), else the last one on the way to it.
    """
    return channel_axes(backbone, [site], example)[site]


def channel_axes(backbone: nn.Module, sites: Sequence[str], example: Tensor | None = None) -> dict[str, int]:
    """`channel_axis` of several sites, from one trace and one forward pass."""
    trace = _Trace(backbone)
    nodes = {site: trace.marks[trace.known(_named(backbone, site))] for site in sites}
    with torch.no_grad(), _evaluating(backbone):
        shapes = capture(backbone, sites, _example(backbone, 1, example), lambda z: torch.tensor(z.shape[1:]))
    return {site: _channel_axis(trace, node, site, shapes[site].tolist()) for site, node in nodes.items()}


def norms_between(backbone: nn.Module, site: str, end: Literal["next", "last"] = "next") -> list[str]:
    """Normalization layers from a block site up to the next block site, or to the last layer of all.

    They are where normalization tuning acts: of one block, or from ``:input`` to the end of the whole backbone.
    """
    trace = _Trace(backbone)
    boundaries = list_sites(backbone)
    site = resolve(backbone, site)
    if site not in boundaries:
        raise ValueError(f"{site!r} is not between blocks; those sites are {', '.join(boundaries)}")
    order = {node: index for index, node in enumerate(trace.graph.nodes)}
    position = [order[trace.marks[name]] for name in boundaries] + [len(order)]
    here = boundaries.index(site)
    inside = range(position[here], position[here + 1] if end == "next" else len(order))
    norms = [name for name in trace.modules if _is_norm(backbone, name)]
    return [name for name in norms if order[trace.marks[f"{name}:input"]] in inside]


def affine_output(backbone: nn.Module, norm: str) -> str:
    """The site of a norm layer's affine map: its output, or the place before an activation that timm fuses into it."""
    return f"{norm}.drop:input" if hasattr(backbone.get_submodule(norm), "act") else f"{norm}:output"


def capture(
    backbone: nn.Module, sites: Sequence[str], x: Float[Tensor, "batch *unit"], keep_of: Edit = Tensor.clone
) -> dict[str, Tensor]:
    """Activations at the sites during one forward pass, keyed by the names given.

    Args:
        keep_of: What to keep of each activation, where not all of it is wanted. A copy by default, since a later layer
            may work in place on the tensor that it is given.
    """
    seen: dict[str, Tensor] = {}

    def keep(site: str, z: Any) -> Any:
        if site in seen:
            raise ValueError(f"{site!r}: the backbone calls this module more than once, so the place is not unique")
        if not isinstance(z, Tensor):
            raise ValueError(
                f"{site!r} carries a {type(z).__name__}, not one tensor; choose a site inside or around it"
            )
        seen[site] = keep_of(z)
        return z

    with edited(backbone, {site: partial(keep, site) for site in sites}):
        backbone(x)
    if missing := [site for site in sites if site not in seen]:
        raise ValueError(f"the backbone never calls the module of site {missing[0]!r}; choose one that it calls")
    return {site: seen[site] for site in sites}


@contextmanager
def edited(backbone: nn.Module, edits: Mapping[str, Edit]) -> Iterator[nn.Module]:
    """The backbone with functions applied to the activations at some sites; restored on the way out, always.

    An edit at ``name:input`` changes the tensor that comes first of what that module is given, wherever it is given
    the same tensor again (query, key and value of self-attention); an edit at ``name:output`` what it returns.
    """
    with ExitStack() as stack:
        for site, edit in edits.items():
            name, edge = _named(backbone, site).rsplit(":", 1)
            module = backbone.get_submodule(name)
            if edge == "input":
                handle = module.register_forward_pre_hook(partial(_edit_input, site, edit), with_kwargs=True)
            else:
                handle = module.register_forward_hook(lambda _, args, output, edit=edit: edit(output))
            stack.callback(handle.remove)
        yield backbone


def split(
    backbone: nn.Module,
    site: str,
    edits: Mapping[str, Edit] | None = None,
    example: Tensor | None = None,
) -> tuple[nn.Module, nn.Module]:
    """Cut the backbone at a site: ``suffix(*prefix(x)) == backbone(x)``, bit for bit.

    The prefix returns every tensor that crosses the cut, the site's own first (a norm inside a residual branch
    crosses with its skip). Both halves share the backbone's weights, work for any batch size, and never write
    into the tensors they are given.

    Args:
        edits: Functions to apply to sites at or after the cut, built into the suffix. Modules among them become
            submodules of the suffix.
        example: One image batch, for backbones that do not carry a timm data configuration.

    Raises:
        ValueError: If there is no such site, or an edit lies before the cut.

    Warns:
        UserWarning: If torch.fx cannot trace the backbone. Then the prefix is the identity and the suffix the
            whole backbone with hooks: right, but there is nothing to cache.
    """
    edits = dict(edits or {})
    try:
        trace = _Trace(backbone)
    except UntraceableError as error:
        warnings.warn(f"{error}; the whole backbone runs at every step", stacklevel=2)
        for name in (site, *edits):
            _named(backbone, name)
        return _Identity(), _Hooked(backbone, edits)
    site = trace.known(_named(backbone, site))
    return trace.cut(site, {trace.known(_named(backbone, name)): edit for name, edit in edits.items()}, example)


def is_traceable(backbone: nn.Module) -> bool:
    """Whether torch.fx can cut this backbone, so that frozen prefixes can be cached."""
    try:
        _Trace(backbone)
    except UntraceableError:
        return False
    return True


class UntraceableError(ValueError):
    """torch.fx cannot record the backbone's forward pass."""


# ------------------------------------------------------------------------------------------ the traced graph


def _mark(z: Any, site: str) -> Any:
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
            marked = self.create_proxy("call_function", _mark, (args[0], f"{name}:input"), {})
            args, kwargs = _replaced(args[0], marked, args, kwargs)
        output = super().call_module(m, forward, args, kwargs)
        if isinstance(output, fx.Proxy):
            output = self.create_proxy("call_function", _mark, (output, f"{name}:output"), {})
        return output


class _Trace:
    """A backbone's graph, and where each site lies in it."""

    def __init__(self, backbone: nn.Module) -> None:
        tracer = _Tracer()
        try:
            self.graph = tracer.trace(backbone, concrete_args=_defaults(backbone))
        except Exception as error:  # torch.fx raises whatever the model's control flow makes of a proxy
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UntraceableError(f"torch.fx cannot trace {type(backbone).__name__} ({reason})") from error
        self.root = backbone
        self.modules = [name for name in tracer.modules if tracer.modules.count(name) == 1]
        self.repeated = set(tracer.modules) - set(self.modules)
        self._add_ends()
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target in _OUT_OF_PLACE:
                node.target = _OUT_OF_PLACE[node.target]
            if node.kwargs.get("inplace"):
                node.kwargs = {**node.kwargs, "inplace": False}
        marks = [node for node in self.graph.nodes if node.target is _mark]
        self.marks = {node.args[1]: node for node in marks if node.args[1].rsplit(":", 1)[0] not in self.repeated}
        self.blocks = set(_blocks(backbone))

    def _add_ends(self) -> None:
        image = next(node for node in self.graph.nodes if node.op == "placeholder")
        output = next(node for node in self.graph.nodes if node.op == "output")
        users = list(image.users)
        with self.graph.inserting_after(image):
            start = self.graph.call_function(_mark, (image, ":input"))
        for user in users:
            user.replace_input_with(image, start)
        for extra in [node for node in self.graph.nodes if node.op == "placeholder"][1:]:
            for check in reversed(_downstream(extra)):  # torch.fx asserts that these arguments keep their defaults
                self.graph.erase_node(check)
            self.graph.erase_node(extra)
        with self.graph.inserting_before(output):
            end = self.graph.call_function(_mark, (output.args[0], ":output"))
        output.args = (end,)

    def known(self, site: str) -> str:
        if site in self.marks:
            return site
        name = site.rsplit(":", 1)[0]
        if name in self.repeated:
            raise ValueError(f"site {site!r}: the backbone calls {name!r} more than once, so the place is not unique")
        hint = _nearest(self.marks, site)
        raise ValueError(f"site {site!r}: the backbone never calls {name!r} with a single tensor; {hint}")

    def canonical(self, site: str) -> str:
        """Of all names of a place: a block's input, else a block's output, else the name closest to its source."""
        node = self.marks[self.known(site)]
        while node.args[0].target is _mark and len(node.args[0].users) == 1:
            node = node.args[0]
        names = [node.args[1]]
        while len(node.users) == 1 and (after := next(iter(node.users))).target is _mark:
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
        module = fx.GraphModule(self.root, self.graph)
        with mode:
            fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        copies = dict(zip(module.graph.nodes, self.graph.nodes, strict=True))
        FakeTensorProp(module, mode).propagate_dont_convert_inputs(fake)
        return {copies[node]: node.meta.get("val") for node in module.graph.nodes}

    def cut(self, site: str, edits: Mapping[str, Edit], example: Tensor | None) -> tuple[nn.Module, nn.Module]:
        place = self.marks[site]
        after = set(_downstream(place))
        early = [name for name in edits if self.marks[name] is not place and self.marks[name] not in after]
        if early:
            raise ValueError(f"edit at {early[0]!r} lies before the cut at {site!r}; cut at the earliest edited site")
        output = next(node for node in self.graph.nodes if node.op == "output")
        if output not in after:
            raise ValueError(f"the backbone's output does not depend on site {site!r}")
        image = next(node for node in self.graph.nodes if node.op == "placeholder")
        varying = {image, *_downstream(image)}  # the rest depends on the weights alone and may live on both sides
        crossing = [n for n in self.graph.nodes if n in varying and n not in after and any(u in after for u in n.users)]
        crossing = [place] + [node for node in crossing if node is not place]
        sizes: dict[fx.Node, Callable[[fx.Graph, fx.Node], Any]] = {}
        if len(crossing) > 1:
            two, three = (self.propagate(_example(self.root, batch, example)) for batch in (2, 3))
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


def _module(root: nn.Module, graph: fx.Graph, extra: Mapping[str, nn.Module]) -> nn.Module:
    """A graph as a module that shares the root's weights but never works in place."""
    for node in list(graph.nodes):
        if node.target is _mark:
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


class _Identity(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


class _Hooked(nn.Module):
    """A whole backbone with its edits, for models that cannot be traced."""

    def __init__(self, backbone: nn.Module, edits: Mapping[str, Edit]) -> None:
        super().__init__()
        self.backbone = backbone
        self.edits = dict(edits)
        self.parts = nn.ModuleList(edit for edit in edits.values() if isinstance(edit, nn.Module))

    def forward(self, x: Tensor) -> Tensor:
        with edited(self.backbone, self.edits):
            return self.backbone(x)


# ------------------------------------------------------------------------------------------ helpers


@contextmanager
def _evaluating(backbone: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, so that no running statistic moves and no dropout draws."""
    in_training = [module for module in backbone.modules() if module.training]
    for module in in_training:
        module.training = False
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def _named(backbone: nn.Module, site: str) -> str:
    """The site with its edge written out, after a check that the module exists."""
    name, colon, edge = site.rpartition(":")
    if not colon:
        name, edge = site, "output"
    if edge not in ("input", "output"):
        raise ValueError(f"site {site!r} ends in {edge!r}; write 'module:input' or 'module:output'")
    names = dict(backbone.named_modules())
    if name not in names:
        raise ValueError(f"no module {name!r} in this {type(backbone).__name__}; {_nearest(names, name)}")
    return f"{name}:{edge}"


def _nearest(names: Mapping[str, Any], name: str) -> str:
    near = difflib.get_close_matches(name, [known for known in names if known], n=3, cutoff=0.3)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else "list_sites(backbone) names the usual ones"


def _edit_input(
    site: str, edit: Edit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not args:
        raise ValueError(f"{site!r}: the module is called with keywords only, so its input is no site; use an output")
    return _replaced(args[0], edit(args[0]), args, kwargs)


def _replaced(
    old: Any, new: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with one value exchanged wherever it stands: nn.MultiheadAttention is given its input three times."""
    values = tuple(new if value is old else value for value in args)
    return values, {name: new if value is old else value for name, value in kwargs.items()}


def _defaults(backbone: nn.Module) -> dict[str, Any]:
    """Optional arguments of forward (masks, flags), held at their defaults while tracing."""
    parameters = list(inspect.signature(backbone.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _blocks(backbone: nn.Module) -> list[str]:
    """Repeated units: numbered, composite members of a sequence; the innermost, so stages are not blocks."""
    sequences = (nn.Sequential, nn.ModuleList)
    candidates = []
    for name, module in backbone.named_modules():
        parent, _, last = name.rpartition(".")
        if last.isdigit() and isinstance(backbone.get_submodule(parent), sequences):
            is_composite = next(module.children(), None) is not None and next(module.parameters(), None) is not None
            if is_composite and not isinstance(module, sequences):
                candidates.append(name)
    return [name for name in candidates if not any(other.startswith(f"{name}.") for other in candidates)]


def _is_norm(backbone: nn.Module, name: str) -> bool:
    return isinstance(backbone.get_submodule(name), NORMS)


def _downstream(node: fx.Node) -> list[fx.Node]:
    """All nodes that depend on this one, nearest first."""
    found: dict[fx.Node, None] = {}
    queue = list(node.users)
    while queue:
        user = queue.pop(0)
        if user not in found:
            found[user] = None
            queue.extend(user.users)
    return list(found)


def _upstream(node: fx.Node) -> list[fx.Node]:
    """All nodes on which this one depends, nearest first."""
    found: dict[fx.Node, None] = {}
    queue = list(node.all_input_nodes)
    while queue:
        source = queue.pop(0)
        if source not in found:
            found[source] = None
            queue.extend(source.all_input_nodes)
    return list(found)


def _channel_axis(trace: _Trace, node: fx.Node, site: str, shape: Sequence[int]) -> int:
    source = node
    while source.target is _mark:
        source = source.args[0]

    def is_after_pooling(consumer: fx.Node) -> bool:
        module = trace.root.get_submodule(str(consumer.target)) if consumer.op == "call_module" else None
        return isinstance(module, nn.Linear) and module.in_features != shape[-1]

    consumers = (consumer for consumer in _downstream(node) if not is_after_pooling(consumer))
    for candidate in (source, *consumers, *_upstream(node)):
        match _layout(trace.root, candidate):
            case "first":
                return -len(shape)
            case "last":
                return -1
    raise ValueError(f"cannot tell the channel axis of site {site!r}: no convolution, linear or norm layer near it")


def _layout(root: nn.Module, node: fx.Node) -> Literal["first", "last", ""]:
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if isinstance(module, CHANNELS_FIRST):
            return "first"
        if isinstance(module, CHANNELS_LAST):
            return "last"
    if node.target is nn.functional.batch_norm or node.target is nn.functional.group_norm:
        return "first"
    if node.target is nn.functional.layer_norm:
        return "last"
    return ""


def _example(backbone: nn.Module, batch: int, example: Tensor | None) -> Tensor:
    if example is not None:
        return example[:1].expand(batch, *example.shape[1:])
    config = getattr(backbone, "pretrained_cfg", None)
    if config is None:
        raise ValueError(f"{type(backbone).__name__} carries no timm data configuration; pass example=one image batch")
    embed = getattr(backbone, "patch_embed", None)
    size = getattr(embed, "img_size", None) or config["input_size"][-2:]
    weight = next(backbone.parameters())
    return torch.zeros(batch, config["input_size"][0], *size, dtype=weight.dtype, device=weight.device)
