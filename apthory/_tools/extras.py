"""Packages that only some uses need: an error that names the extra to install."""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtraError(ImportError):
    """A package is not installed that an extra brings."""


@contextmanager
def from_extra(extra: str) -> Iterator[None]:
    """Import packages of an extra of ours inside this.

    Raises:
        MissingExtraError: If one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed; the extra {extra!r} brings it: pip install 'apthory[{extra}]'"
        ) from error
