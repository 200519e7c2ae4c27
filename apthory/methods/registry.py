"""All methods by name: files, studies, the command and the tests find them here."""

from apthory.methods.base import Method

METHODS: dict[str, type[Method]] = {}


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
