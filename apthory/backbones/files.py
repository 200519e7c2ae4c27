"""Where files of weights lie: those that ship with the package, and a reader's own."""

import os
from importlib import resources
from pathlib import Path


def weight_file(path: str | Path) -> Path:
    """The path itself, or the file of that name in the folder that APTHORY_WEIGHTS names.

    Raises:
        OSError: If there is neither.
    """
    path = Path(path)
    if not path.is_file():
        path = Path(os.environ.get("APTHORY_WEIGHTS", ".")) / path
    if not path.is_file():
        raise OSError(f"no weight file {path}; pass weights=FILE.safetensors, or set APTHORY_WEIGHTS to its folder")
    return path


def shipped_folder() -> Path:
    """Where the weights that ship lie, each with its model card."""
    return Path(str(resources.files("apthory.backbones") / "weights"))
