"""No test changes what outlives it: fingerprints of the values that tests share.

Shared are what functions under `functools.cache` of apthory and of the tests handed out, what fixtures wider than one
test hold, and the names of apthory's modules and of the test's own. A test that changes one fails, and says which.
"""

import functools
import gc
import sys
import types
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

_ATOMS = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type(Path())}
_CACHED = type(functools.cache(lambda: None))
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, _CACHED)
# These keep books of their own: of what they have set up, compiled, traced (_TRACES in apthory), or split into tokens.
_OTHERS = {"_pytest", "hypothesis", "weakref", "re", "open_clip"}

_TRACED = "_tensor_constant"  # torch.fx leaves these on a network that it traces, once
_BACKBONE = "tiny.backbone"
_GONE = object()
_EMPTY = (dict, OrderedDict, set)  # of hooks, for instance
_STORES = {"_TRACES", "MADE", "IN_USE"}  # they grow as tests run; what matters in them is looked at by itself

FIXTURES: dict[Any, Any] = {}  # by their definitions: the values of fixtures wider than one test


def fingerprint(value: Any) -> dict[str, Any]:
    """What a value is made of, by paths inside it: checksums of tensors, flags, hooks, layouts, configurations."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def visit(path: str, one: Any) -> None:
        if type(one) in _ATOMS:
            found[path] = one
            return
        if id(one) in seen:
            return
        seen.add(id(one))
        if isinstance(one, Tensor):
            layout = (one.dtype, one.device, one.shape, one.stride(), one.requires_grad, len(one._backward_hooks or ()))
            found[path] = (*layout, _checksum(one))
            if one.is_leaf and one.grad is not None:
                visit(f"{path}.grad", one.grad)
        elif isinstance(one, np.ndarray):
            content = repr(one.tolist()) if one.dtype.hasobject else zlib.crc32(one.tobytes())
            found[path] = (one.dtype, one.shape, content)
        elif isinstance(one, pd.DataFrame | pd.Series):
            found[path] = repr((one.to_dict(), one.index.tolist(), one.attrs))
        elif isinstance(one, torch.Generator):
            found[path] = _checksum(one.get_state())
        elif isinstance(one, set | frozenset):
            found[path] = sorted(map(repr, one))
        elif isinstance(one, Mapping) and type(one).__module__ != "weakref":
            keys = [repr(key) if type(key) in _ATOMS else index for index, key in enumerate(one)]
            inside(path, type(one), {f"[{key}]": item for key, item in zip(keys, one.values(), strict=True)})
        elif isinstance(one, list | tuple):
            inside(path, type(one), {f"[{index}]": item for index, item in enumerate(one)})
        elif isinstance(one, functools.partial):
            inside(path, one.func, {".args": one.args, ".keywords": one.keywords})
        elif isinstance(one, _OPAQUE) or type(one).__module__.split(".")[0] in _OTHERS or not hasattr(one, "__dict__"):
            found[path] = (type(one), id(one))
        else:
            lazy = _lazy(type(one))
            kept = {name: item for name, item in vars(one).items() if name not in lazy and not name.startswith(_TRACED)}
            inside(path, type(one), {f".{name}": item for name, item in kept.items()})

    def inside(path: str, kind: Any, parts: dict[str, Any]) -> None:
        """All plain parts are one entry, and empty ones none: networks have many modules of many such attributes."""
        plain: dict[str, Any] = {}
        found[path] = kind, plain
        for name, item in parts.items():
            if type(item) in _ATOMS:
                plain[name] = item
            elif type(item) in _OPAQUE:
                plain[name] = id(item)
            elif type(item) not in _EMPTY or item:
                visit(path + name, item)

    visit("", value)
    return found


@functools.cache
def _lazy(kind: type) -> set[str]:
    """Attributes that come into being when they are first read."""
    members = {name: member for base in reversed(kind.__mro__) for name, member in vars(base).items()}
    return {name for name, member in members.items() if isinstance(member, functools.cached_property)}


def _checksum(tensor: Tensor) -> int:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg()
    order = sorted(range(flat.ndim), key=flat.stride, reverse=True)  # as it lies in memory: no copy
    return zlib.crc32(flat.permute(order).reshape(-1).contiguous().view(torch.uint8).numpy())


def shared(module: types.ModuleType | None) -> Iterator[tuple[str, Any]]:
    """Every value that outlives a test of this module, with a name; of tiny backbones, those in use."""
    for name, home in list(sys.modules.items()):
        if name.startswith("apthory") or name in ("tiny", "reference") or home is module:
            values = {key: item for key, item in vars(home).items() if not key.startswith(("__", "@"))}
            values = {key: item for key, item in values.items() if key not in _STORES}
            for function in values.values():
                if type(function) is _CACHED and function.__module__ == name:
                    where = f"{name}.{function.__qualname__}"
                    yield from ((where, item) for item in _handed_out(function))
            yield name, values
    yield from ((f"fixture {one.argname}", item) for one, item in FIXTURES.items())
    if "tiny" in sys.modules:
        in_use = sys.modules["tiny"].IN_USE
        yield from ((f"{_BACKBONE}{key}", model) for key, model in in_use.items())
        in_use.clear()


def _handed_out(function: Any) -> Iterator[Any]:
    """What a cached function keeps: the garbage collector sees it, keys (plain values and tuples of them) included."""
    parts = [part for part in gc.get_referents(function) if part is not vars(function)]
    if function.cache_parameters()["maxsize"] is None:
        parts = [item for part in parts if type(part) is dict for item in part.values()]
    for part in parts:
        is_index = type(part) is dict and any(type(item).__name__ == "_lru_list_elem" for item in part.values())
        if not is_index and type(part) not in _ATOMS and not isinstance(part, (*_OPAQUE, tuple)):
            yield part


class Guard:
    """Compares shared values with what they were when they were last looked at."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, int], tuple[Any, dict[str, Any]]] = {}
        self.module: types.ModuleType | None = None

    def meet(self, module: types.ModuleType) -> None:
        """Note the names of a module of tests before its first one runs."""
        if module is not self.module:
            self.module = module
            self.changes(module)

    def note(self, name: str, value: Any) -> None:
        """From now on a change of this value is seen; the rest is noted when `changes` first meets it."""
        self.known[name, id(value)] = value, fingerprint(value)

    def changes(self, module: types.ModuleType | None) -> list[str]:
        """The names of what changed since the last call; a value that was not there then is only noted."""
        found = []
        kept = {key: one for key, one in self.known.items() if key[0].startswith(_BACKBONE)}
        for name, value in shared(module):
            is_module = type(value) is dict and name in sys.modules  # a new dict each time, which lazy imports extend
            key = name, 0 if is_module else id(value)
            new = fingerprint(value)
            old = self.known[key][1] if key in self.known else new
            if old != new:
                found += [
                    f"{name}{path}" for path in _differing(old, new, is_module and name.startswith("apthory"))[:3]
                ]
            kept[key] = value, new
        self.known = kept
        return found


def _differing(old: dict[str, Any], new: dict[str, Any], may_grow: bool) -> list[str]:
    """Paths; dictionaries that may grow do so when a module is imported that enters itself in a registry."""
    found = []
    for path in sorted(old if may_grow else old | new):
        one, other = old.get(path), new.get(path)
        if one == other:
            continue
        if isinstance(one, tuple) and one[0] is dict and isinstance(other, tuple) and other[0] is dict:
            names = one[1] if may_grow else one[1] | other[1]
            found += sorted(f"{path}{name}" for name in names if one[1].get(name, _GONE) != other[1].get(name, _GONE))
        else:
            found.append(path)
    return found


GUARD = Guard()
