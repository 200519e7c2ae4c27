"""Places in a backbone: list them, describe them, read them, edit them, and cut the backbone in two there.

A *site* is a dotted module name with ``:input`` or ``:output`` behind it (``:output`` if neither is), such as
``blocks.2:input``, ``layer4.0:input`` or ``layer3.1.bn2``. The image itself is ``:input``, and the backbone's result
is ``:output``. The first axis of the activation at a site is the batch. `split` cuts the traced graph (torch.fx), so
that the result of a frozen prefix can be computed once and kept.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from apthory.sites.description import Listing, Site, Tree, depths
from apthory.sites.tracing import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    NORMS,
    EditFunction,
    Trace,
    UntraceableError,
    absent,
    blocks_of,
    downstream,
    example_batch,
    exchanged,
    irreplaceable,
    kept,
    mark,
    traced,
    upstream,
)

SiteKind = Literal["block", "norm", "all"]


def list_sites(backbone: nn.Module, kind: SiteKind = "block") -> list[str]:
    """Canonical sites in the order in which the backbone computes them.

    Args:
        backbone: Any module that maps one image batch to one tensor.
        kind: ``"block"`` gives ``:input``, the input of each block and the output of the last one. Blocks are the
            repeated units of a network (of a DenseNet its dense blocks, since their layers have no single input).
            If there are none, they are the convolutions (VGG). ``"norm"`` gives the output of the affine map of each
            normalization layer. Where timm fuses an activation into the layer, that is the place just before the
            activation. ``"all"`` gives both.
    """
    try:
        trace = traced(backbone)
        called, canonical, units = trace.modules, trace.canonical, trace.blocks
    except UntraceableError:  # then modules are in the order of their definition, and names stay as they are
        called, canonical = [name for name, _ in backbone.named_modules()], partial(_named, backbone)
        units = set(blocks_of(backbone))
        if kind == "all":
            raise
    names = []
    if kind != "norm":
        blocks = [name for name in called if name in units]
        end = canonical(_end(backbone, blocks[-1])) if blocks else canonical(":output")
        inputs = [name for name in (f"{name}:input" for name in blocks) if canonical(name) != ":input"]  # VGG's first
        names += [":input", *inputs, end]
    if kind != "block":
        names += [canonical(affine_output(backbone, name)) for name in called if _is_norm(backbone, name)]
    return trace.ordered(set(names)) if kind == "all" else names


def describe(
    backbone: nn.Module, kind: SiteKind = "block", example: Float[Tensor, "batch *image"] | None = None
) -> list[Site]:
    """The same sites as `list_sites`, each with its shape, channel axis and depth.

    It takes one trace and one forward pass of one image. The result is kept as long as the backbone's structure does
    not change, for all kinds and by the size of the image. If torch.fx cannot trace the backbone, the channel axes are
    unknown (None), the order is that of the forward pass, and modules that are not called exactly once are left out.

    Args:
        backbone: Any module that maps one image batch to one tensor.
        kind: Which sites; see `list_sites`.
        example: One image batch, for backbones that do not carry a timm data configuration.
    """
    listing = _listing(backbone, example)
    return [listing.sites[name] for name in listing.names[kind]]


def site(backbone: nn.Module, name: str, example: Float[Tensor, "batch *image"] | None = None) -> Site:
    """What one site is like, under its canonical name: any site, not only those that `list_sites` gives.

    Raises:
        ValueError: If there is no such site, or if it does not carry one tensor.
    """
    name = resolve(backbone, name)
    listing = _listing(backbone, example)
    if name not in listing.sites:
        shape = site_shape(backbone, name, example)  # says what is wrong with the site, if anything is
        order = [*listing.names["all"], name]
        order = traced(backbone).ordered(order) if is_traceable(backbone) else [*_shapes(backbone, order, example)]
        listing.sites |= _described(backbone, {name: shape}, order, listing.names)
    return listing.sites[name]


def tree(backbone: nn.Module, kind: SiteKind = "block", example: Float[Tensor, "batch *image"] | None = None) -> Tree:
    """The sites of `describe` as a table: ``print(apthory.sites.tree(backbone))``.

    A site inside a block stands under the block's input, and is indented. The result iterates over its ``.sites``.
    """
    described = describe(backbone, kind, example)
    what = {"block": "block sites", "norm": "norm sites", "all": "block and norm sites"}[kind]
    return Tree(f"{type(backbone).__name__}: {len(described)} {what}", described)


def resolve(backbone: nn.Module, site: str) -> str:
    """The canonical name of a site: an alias such as ``blocks.1`` becomes ``blocks.2:input``.

    Raises:
        ValueError: If the backbone has no such site. The message suggests the nearest names.
    """
    site = _named(backbone, site)
    try:
        return traced(backbone).canonical(site)
    except UntraceableError:
        return site


def site_shape(backbone: nn.Module, site: str, example: Tensor | None = None) -> tuple[int, ...]:
    """Shape of the activation at a site, without the batch axis.

    Args:
        example: One image batch, for backbones that do not carry a timm data configuration.
    """
    # A forward pass of one image takes a few milliseconds. To propagate shapes through the graph takes a hundred.
    with torch.no_grad(), _evaluating(backbone):
        return tuple(capture(backbone, [site], example_batch(backbone, 1, example))[site].shape[1:])


def channel_axis(backbone: nn.Module, site: str, example: Tensor | None = None) -> int:
    """Which axis of the activation counts channels (negative, from the end).

    Read off the graph: the layer that makes the activation decides, else the first layer that consumes it (a linear
    layer after pooling does not, as its width tells), else the last one on the way to it.
    """
    return channel_axes(backbone, [site], example)[site]


def channel_axes(backbone: nn.Module, sites: Sequence[str], example: Tensor | None = None) -> dict[str, int]:
    """`channel_axis` of several sites, from one trace and one forward pass."""
    trace = traced(backbone)
    nodes = {site: trace.marks[trace.known(_named(backbone, site))] for site in sites}
    with torch.no_grad(), _evaluating(backbone):
        shapes = capture(backbone, sites, example_batch(backbone, 1, example), lambda z: torch.tensor(z.shape[1:]))
    return {site: _channel_axis(trace, node, site, shapes[site].tolist()) for site, node in nodes.items()}


def norms_between(backbone: nn.Module, site: str, end: Literal["next", "last"] = "next") -> list[str]:
    """Normalization layers from a block site up to the next block site, or up to the last layer of the backbone.

    Normalization tuning acts on these: on one block, or on all from ``:input`` to the end of the backbone.
    """
    trace = traced(backbone)
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
    """The site of a norm layer's affine map: its output, or the place before an activation that timm fused into it."""
    return f"{norm}.drop:input" if hasattr(backbone.get_submodule(norm), "act") else f"{norm}:output"


def capture(
    backbone: nn.Module, sites: Sequence[str], x: Float[Tensor, "batch *unit"], keep_of: EditFunction = Tensor.clone
) -> dict[str, Tensor]:
    """Activations at the sites during one forward pass, keyed by the names given.

    Args:
        keep_of: What to keep of each activation, if not all of it is wanted. By default it is a copy, since a later
            layer may work in place on the tensor that it is given.

    Raises:
        ValueError: If the module of a site is not called exactly once, or a site does not carry one tensor.
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
def edited(
    backbone: nn.Module, edits: Mapping[str, EditFunction], *, replace: Mapping[str, nn.Module] | None = None
) -> Iterator[nn.Module]:
    """The backbone with functions applied at some sites and with some modules replaced; always restored at the end.

    An edit at ``name:input`` changes the first argument of that module, and any other argument that is the same
    tensor (query, key and value of self-attention). An edit at ``name:output`` changes what the module returns.

    Args:
        edits: Functions, by the sites whose activations they are applied to.
        replace: New modules, by the names of those whose calls they take over; see `split`. Here the backbone holds
            the new modules for the time being.

    Raises:
        ValueError: If there is no such site or module. While the context lasts, a forward pass raises it too, if it
            does not call a replaced module exactly once.
    """
    replace = dict(replace or {})
    _check_names(backbone, replace)
    placed = [(_outside(backbone, _named(backbone, name), replace), edit) for name, edit in edits.items()]
    with _swapped(backbone, replace), ExitStack() as stack:
        for name, edit in placed:
            owner, edge = name.rsplit(":", 1)
            module = backbone.get_submodule(owner)
            if owner in replace and _num_places(backbone, module) > 1:
                raise ValueError(
                    f"an edit at {name!r} would act in several places, since the module that replaces {owner!r} has "
                    "more than one; wrap it for this place alone: nn.Sequential(module)"
                )
            if edge == "input":
                handle = module.register_forward_pre_hook(partial(_edit_input, name, edit), with_kwargs=True)
            else:
                handle = module.register_forward_hook(lambda _, args, output, edit=edit: edit(output))
            stack.callback(handle.remove)
        yield backbone


def split(
    backbone: nn.Module,
    site: str,
    edits: Mapping[str, EditFunction] | None = None,
    example: Tensor | None = None,
    *,
    replace: Mapping[str, nn.Module] | None = None,
) -> tuple[nn.Module, nn.Module]:
    """Cut the backbone at a site: ``suffix(*prefix(x)) == backbone(x)``, bit for bit.

    The prefix returns all tensors that cross the cut, the site's own first. (A norm inside a residual branch
    crosses with its skip.) Both halves share the backbone's weights, work for any batch size, and never write
    into the tensors they are given.

    Args:
        edits: Functions to apply to sites at or after the cut, built into the suffix. Modules among them become
            submodules of the suffix.
        example: One image batch, for backbones that do not carry a timm data configuration.
        replace: New modules, by the names of modules that the suffix does not call any more: it calls the new ones
            instead, with the same arguments. ``{"blocks.1.attn.qkv": Adapter(backbone.blocks[1].attn.qkv)}`` lets an
            adapter see the input of the layer that it wraps. The new modules become submodules of the suffix, and the
            backbone stays as it is. Layers can be replaced, and so can whole blocks, if the backbone calls them
            exactly once, after the cut. An edit at ``name:input`` or ``name:output`` of a replaced module acts before
            or after the new one.

    Raises:
        ValueError: If there is no such site or module, or if an edit or a replaced module lies before the cut.

    Warns:
        UserWarning: If torch.fx cannot trace the backbone. Then the prefix is the identity, and the suffix is the
            whole backbone with hooks. The result is right, but there is nothing to cache.
    """
    edits, replace = dict(edits or {}), dict(replace or {})
    try:
        trace = traced(backbone)
        _check_names(backbone, replace)
        trace.check_calls(replace)
        closed = traced(backbone, [name for name in replace if name not in trace.calls])
    except UntraceableError as error:
        warnings.warn(f"{error}; the whole backbone runs at every step", stacklevel=2)
        _check_names(backbone, replace)
        for name in (site, *edits):
            _outside(backbone, _named(backbone, name), replace)
        return _Identity(), _Hooked(backbone, edits, replace)

    def placed(name: str) -> str:
        return closed.known(_outside(backbone, trace.known(_named(backbone, name)), replace))

    return closed.cut(placed(site), [(placed(name), edit) for name, edit in edits.items()], replace, example)


def is_traceable(backbone: nn.Module) -> bool:
    """Whether torch.fx can cut this backbone, so that frozen prefixes can be cached."""
    try:
        traced(backbone)
    except UntraceableError:
        return False
    return True


class _Identity(nn.Module):
    code = "images as they are"  # tells one cached prefix from another

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


class _Hooked(nn.Module):
    """A whole backbone with its edits and replaced modules, for models that cannot be traced."""

    def __init__(
        self, backbone: nn.Module, edits: Mapping[str, EditFunction], replace: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.edits, self.replace = dict(edits), dict(replace)
        self.parts = nn.ModuleList(edit for edit in edits.values() if isinstance(edit, nn.Module))
        self.replacements = nn.ModuleList(replace.values())

    def forward(self, x: Tensor) -> Tensor:
        with edited(self.backbone, self.edits, replace=self.replace):
            return self.backbone(x)


def _check_names(backbone: nn.Module, replace: Mapping[str, nn.Module]) -> None:
    """Raises ValueError unless these are modules of the backbone, each in one place, and none inside another."""
    for name in replace:
        if name.endswith((":input", ":output")):
            raise ValueError(f"cannot replace the site {name!r}; name the module, {name.rpartition(':')[0]!r}")
        if not name:
            raise ValueError("cannot replace '', the whole backbone; name a module inside it")
        module = backbone.get_submodule(_named(backbone, f"{name}:output").rpartition(":")[0])
        around = next((other for other in replace if name.startswith(f"{other}.")), None)
        if around is not None:
            raise ValueError(
                f"cannot replace {name!r} inside {around!r}, which is replaced too; build it into that one"
            )
        if (num_places := _num_places(backbone, module)) > 1:
            raise ValueError(
                f"cannot replace {name!r}: the backbone has this module in {num_places} places; "
                "give each place a copy of its own"
            )


def _num_places(backbone: nn.Module, module: nn.Module) -> int:
    return sum(other is module for _, other in backbone.named_modules(remove_duplicate=False))


def _outside(backbone: nn.Module, site: str, replace: Iterable[str]) -> str:
    """The site, in a name that does not lie inside a replaced module.

    The input of a stage's first block is the stage's input too, so that its place is still there without the block.
    """
    around = next((name for name in replace if site.startswith(f"{name}.")), None)
    if around is None:
        return site
    ends = f"{around}:input", f"{around}:output"
    with suppress(UntraceableError):
        names = traced(backbone).names(site)
        for end in ends:
            if end in names:
                return end
    raise ValueError(
        f"site {site!r} lies inside {around!r}, which is replaced and not called; "
        f"choose {ends[0]!r} or {ends[1]!r}, or build the edit into the new module"
    )


@contextmanager
def _swapped(backbone: nn.Module, replace: Mapping[str, nn.Module]) -> Iterator[None]:
    """The backbone holds the new modules for a while, and checks that each of its forward passes calls them once."""
    calls: Counter[str] = Counter()

    def check(*_: Any) -> None:
        for name, module in replace.items():
            if calls[name] == 1:
                continue
            num_places = _num_places(backbone, module)  # none if another context has replaced the new module
            if num_places and not calls[name]:
                raise ValueError(irreplaceable(name, "never calls it"))
            if calls[name] > num_places:
                raise ValueError(irreplaceable(name, f"calls it {calls[name]} times"))

    with ExitStack() as stack:
        for name, module in replace.items():
            parent_name, _, child = name.rpartition(".")
            children = backbone.get_submodule(parent_name)._modules
            stack.callback(children.__setitem__, child, children[child])
            children[child] = module
            count = module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
            stack.callback(count.remove)
        if replace:
            stack.callback(backbone.register_forward_pre_hook(lambda *_: calls.clear()).remove)
            stack.callback(backbone.register_forward_hook(check).remove)
        yield


def _listing(backbone: nn.Module, example: Tensor | None) -> Listing:
    """What `describe` knows of the backbone; computed when it is first asked for."""
    size = tuple(example_batch(backbone, 1, example).shape[1:])
    listings = kept(backbone).listings
    if size not in listings:
        if is_traceable(backbone):
            listed = {kind: list_sites(backbone, kind) for kind in get_args(SiteKind)}
            shapes = _shapes(backbone, listed["all"], example)
            names = {kind: [name for name in listed[kind] if name in shapes] for kind in listed}
        else:
            blocks, norms = list_sites(backbone, "block"), list_sites(backbone, "norm")
            shapes = _shapes(backbone, blocks + norms, example)
            listed = {"block": blocks, "norm": norms, "all": blocks + norms}
            names = {kind: [name for name in shapes if name in listed[kind]] for kind in listed}
        listings[size] = Listing(names, _described(backbone, shapes, names["all"], names))
    return listings[size]


def _shapes(backbone: nn.Module, sites: Sequence[str], example: Tensor | None) -> dict[str, tuple[int, ...]]:
    """Shapes without the batch axis, in the order of a forward pass, of the sites that it meets once, with a tensor."""
    met: dict[str, list[Any]] = {}

    def note(name: str, z: Any) -> Any:
        met.setdefault(name, []).append(z.shape[1:] if isinstance(z, Tensor) else None)
        return z

    with torch.no_grad(), _evaluating(backbone), edited(backbone, {name: partial(note, name) for name in sites}):
        backbone(example_batch(backbone, 1, example))
    return {name: tuple(shapes[0]) for name, shapes in met.items() if len(shapes) == 1 and shapes[0] is not None}


def _described(
    backbone: nn.Module, shapes: Mapping[str, tuple[int, ...]], order: Sequence[str], names: Mapping[str, Sequence[str]]
) -> dict[str, Site]:
    """Descriptions of the sites with these shapes.

    Args:
        order: These sites and all of `names`, as the backbone computes them.
        names: The sites that `list_sites` gives, by kind.
    """
    axes: dict[str, int | None] = dict.fromkeys(shapes)
    with suppress(UntraceableError):
        trace = traced(backbone)
        for name, shape in shapes.items():
            with suppress(ValueError):  # where the axis cannot be told
                axes[name] = _channel_axis(trace, trace.marks[name], name, shape)
    depth = depths(order, names["all"], names["block"])
    return {name: Site(name, shape, axes[name], depth[name]) for name, shape in shapes.items()}


@contextmanager
def _evaluating(backbone: nn.Module) -> Iterator[None]:
    """The backbone is in evaluation mode for a while, so that running statistics stay and dropout draws nothing."""
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
    if all(name != known for known, _ in backbone.named_modules()):
        raise ValueError(absent(backbone, name))
    return f"{name}:{edge}"


def _edit_input(
    site: str, edit: EditFunction, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not args:
        raise ValueError(f"{site!r}: the module is called with keywords only, so its input is no site; use an output")
    return exchanged(args[0], edit(args[0]), args, kwargs)


def _end(backbone: nn.Module, last: str) -> str:
    """The site behind the last block. If the blocks are plain layers, others follow: then behind the whole sequence."""
    is_plain = isinstance(backbone.get_submodule(last), nn.modules.conv._ConvNd)
    return f"{last.rpartition('.')[0]}:output" if is_plain else f"{last}:output"


def _is_norm(backbone: nn.Module, name: str) -> bool:
    return isinstance(backbone.get_submodule(name), NORMS)


def _channel_axis(trace: Trace, node: fx.Node, site: str, shape: Sequence[int]) -> int:
    source = node
    while source.target is mark:
        source = source.args[0]

    def is_after_pooling(consumer: fx.Node) -> bool:
        module = trace.root.get_submodule(str(consumer.target)) if consumer.op == "call_module" else None
        return isinstance(module, nn.Linear) and module.in_features != shape[-1]

    consumers = (consumer for consumer in downstream(node) if not is_after_pooling(consumer))
    for candidate in (source, *consumers, *upstream(node)):
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
