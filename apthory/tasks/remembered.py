"""What one pass over a task's images found out, kept between processes so that the next need not decode them.

One small JSON file a task, in the folder that APTHORY_CACHE names, else in ``apthory`` below XDG_CACHE_HOME or
~/.cache. Its name is the hash of all that decides the pixels: files by path, size and date, options, versions. If the
file cannot be read or written, the pass is made again.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from apthory._tools.files import write_atomically


class Finding(NamedTuple):
    """What a pass over all images of a task found."""

    digest: str  # of the task, see `Task.digest`
    encoding: str  # formats of the images, such as "jpeg/png"


def findings_folder() -> Path:
    """Where findings are kept."""
    if given := os.environ.get("APTHORY_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apthory"


def recall(identity: Mapping[str, Any]) -> Finding | None:
    """The finding about a task of this identity; None where there is none."""
    with suppress(OSError, RuntimeError, ValueError, TypeError):  # no file, no home, no JSON, other fields
        finding = Finding(**json.loads(_path(identity).read_text("utf-8")))
        if all(isinstance(value, str) for value in finding):
            return finding
    return None


def remember(identity: Mapping[str, Any], finding: Finding) -> None:
    """Keep a finding, whole or not at all."""
    with suppress(OSError, RuntimeError):
        write_atomically(_path(identity), json.dumps(finding._asdict()).encode())


def _path(identity: Mapping[str, Any]) -> Path:
    content = json.dumps(identity, sort_keys=True).encode("utf-8", "surrogateescape")  # names of files are bytes
    return findings_folder() / f"task-{hashlib.sha256(content).hexdigest()[:40]}.json"
