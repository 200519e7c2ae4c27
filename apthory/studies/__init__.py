"""The measurements behind notebooks, each from its configuration alone: what a record holds."""

from typing import Any

from apthory._tools import moved


def __getattr__(name: str) -> Any:
    return moved.renamed(__name__, name)
