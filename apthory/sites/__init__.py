"""Places in a backbone: list them, read them, edit them, and cut the backbone in two there.

A *site* is a dotted module name with ``:input`` or ``:output`` (output when left out), such as ``blocks.2:input``,
``layer4.0:input`` or ``layer3.1.bn2``; the image itself is ``:input``, the backbone's result ``:output``. Every
site is an activation whose first axis is the batch. `split` cuts the traced graph (torch.fx), so a frozen prefix
can be computed once and its result kept.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from apthory.sites.tracing import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    NORMS,
    Edit,
    Trace,
    UntraceableError,
    blocks_of,
    downstream,
    example_batch,
    mark,
    nearest,
    replaced,
    traced,
    upstream,
)


def list_sites(backbone: nn.Module, kind: Literal["block", "norm", "all"] = "block") -> list[str]:
    """Canonical sites in the order in which the backbone computes them.

    Args:
        backbone: Any module that maps one image batch to one tensor.
        kind: ``"block"`` gives ``:input``, the input of every block and the output of the last one. Blocks are the
            repeated units of a network (dense blocks of a DenseNet, whose layers have no single input) or, where it
            has none, its convolutions (VGG). ``"norm"`` gives the output of the affine map of every normalization
            layer; where timm fuses an activation into the layer, that is the place just before the activation.
            ``"all"`` gives both.
    """
    try:
        trace = traced(backbone)
        called, canonical, units = trace.modules, trace.canonical, trace.blocks
    except UntraceableError:  # modules in the order of their definition, and names as they are
        called, canonical = [name for name, _ in backbone.named_modules()], partial(_named, backbone)
        units = set(blocks_of(backbone))
        if kind == "all":
            raise
    found = []
    if kind != "norm":
        blocks = [name for name in called if name in units]
        end = canonical(_end(backbone, blocks[-1])) if blocks else canonical(":output")
        inputs = [name for name in (f"{name}:input" for name in blocks) if canonical(name) != ":input"]  # VGG's first
        found += [":input", *inputs, end]
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
        return traced(backbone).canonical(site)
    except UntraceableError:
        return site


def site_shape(backbone: nn.Module, site: str, example: Tensor | None = None) -> tuple[int, ...]:
    """Shape of the activation at a site, without the batch axis.

    Args:
        example: One image batch, for backbones that do not carry a timm data configuration.
    """
    # One image costs a few milliseconds; propagating shapes through the graph costs a hundred.
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
    """Normalization layers from a block site up to the next block site, or to the last layer of all.

    They are where normalization tuning acts: of one block, or from ``:input`` to the end of the whole backbone.
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
        trace = traced(backbone)
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
        traced(backbone)
    except UntraceableError:
        return False
    return True


class _Identity(nn.Module):
    code = "images as they are"  # tells one cached prefix from another

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
        raise ValueError(f"no module {name!r} in this {type(backbone).__name__}; {nearest(names, name)}")
    return f"{name}:{edge}"


def _edit_input(
    site: str, edit: Edit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not args:
        raise ValueError(f"{site!r}: the module is called with keywords only, so its input is no site; use an output")
    return replaced(args[0], edit(args[0]), args, kwargs)


def _end(backbone: nn.Module, last: str) -> str:
    """The site behind the last block; behind the whole sequence if the blocks are plain layers, followed by others."""
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
