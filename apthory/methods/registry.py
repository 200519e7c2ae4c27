"""All methods by name: files, studies, the command and the tests find them here."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from apthory._tools.moved import warn_of_old_name
from apthory.methods.base import Method

_OLD_NAMES = {"linear": "linear_probe", "random": "random_prompt", "full": "fine_tuning"}


class _Methods(dict[str, type[Method]]):
    def __missing__(self, name: str) -> type[Method]:
        if name not in _OLD_NAMES:
            raise KeyError(name)
        warn_of_old_name(f"the method {name!r}", repr(_OLD_NAMES[name]))
        return self[_OLD_NAMES[name]]


METHODS = _Methods()


def register(method: type[Method]) -> type[Method]:
    """Make a method known by its name; usable as a decorator.

    Raises:
        ValueError: If another method has the name.
    """
    if METHODS.setdefault(method.name, method) is not method:
        raise ValueError(f"the name {method.name!r} belongs to {METHODS[method.name].__name__}; give another one")
    return method


def find_method(name: str) -> type[Method]:
    """The method of a name.

    Raises:
        ValueError: If there is none; the message lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; there are {', '.join(METHODS)}, and what methods.register adds")
    return METHODS[name]


def make(name: str, options: Mapping[str, Any]) -> Method:
    """A method by its name and its fields, which are checked: for what comes from outside, such as a command line.

    Raises:
        ValueError: If there is no such method, it has no such field, a field that it needs is missing, or a value is of
            another kind.
    """
    kind = find_method(name)
    kinds = get_type_hints(kind)
    known = {field.name: kinds[field.name] for field in fields(cast(Any, kind))}
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"the method {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    if missing := [option for option in needed(kind) if option not in options]:
        raise ValueError(f"the method {name!r} needs the option {missing[0]!r}: {_words(known[missing[0]])}")
    given = {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
    for option, value in given.items():
        if not _is_a(value, known[option]):
            raise ValueError(f"{option} of the method {name!r} is {value!r}; expected {_words(known[option])}")
    return kind(**given)


def needed(method: type[Method]) -> list[str]:
    """The fields of a method that have no default."""
    defaults = {field.name: (field.default, field.default_factory) for field in fields(cast(Any, method))}
    return [name for name, pair in defaults.items() if pair == (MISSING, MISSING)]


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of the kind of a field: a class, a Literal, a union of kinds, or a tuple of any length."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(_is_a(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, parts[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(map(_words, parts))
    if origin is tuple:
        return f"a tuple, each entry {_words(parts[0])}"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))
