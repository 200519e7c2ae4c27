"""Files that are whole or absent."""

import os
import uuid
from pathlib import Path


def check_output(path: str | Path, suffix: str = "", overwrite: bool = True) -> Path:
    """Raise an error if `write_atomically` could not write a file, and leave nothing behind: to call before long work.

    Args:
        path: Of the file. Its folder need not exist.
        suffix: What its name has to end with.
        overwrite: Whether a file that is there may be replaced.

    Raises:
        ValueError: If the name ends otherwise.
        OSError: If the path is a folder, the file is there, or its folder can neither be written nor made.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file, such as {path / f'NAME{suffix}'}")
    if not path.name.endswith(suffix):
        raise ValueError(f"{path} should end in {suffix}; name it {path.with_name(f'{path.stem}{suffix}')}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; name another file, or say that it may be replaced (--force)")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {folder} is a file, not a folder; name another folder")
    partial = _partial(folder / path.name)
    try:
        partial.touch(exist_ok=False)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror} ({folder}); name another file or folder") from error
    partial.unlink()
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is whole or absent, whenever the process dies and whoever writes beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """Where a file is written before it is whole: a name that nobody else has."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
