"""Progress bars that reach the person who waits: in a terminal, a notebook, or the terminal behind it."""

import os
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import tqdm
import tqdm.auto

_bars: WeakSet = WeakSet()  # the bars of this process, in order to stack nested ones


def progress(iterable: Iterable | None = None, **options: Any) -> tqdm.tqdm:
    """Wrap an iterable in a progress bar that vanishes when done; options are tqdm's.

    Alone, the bar is tqdm's own choice for a terminal or a notebook. In a kernel started by `apthory run`
    (``APTHORY_PROGRESS`` says so) it is plain text on stderr, which the runner forwards to its own terminal,
    below its bar over notebooks, or now and then to a log file. It is never stored in the executed notebook.
    """
    options = {"leave": False, **options}
    target = os.environ.get("APTHORY_PROGRESS")
    if not target:
        return tqdm.auto.tqdm(iterable, **options)
    if target == "terminal":
        options.setdefault("position", 1 + sum(not bar.disable for bar in _bars))
    else:
        options.setdefault("mininterval", 30)  # seconds; a log keeps every line it is sent
    bar = tqdm.tqdm(iterable, **options)
    _bars.add(bar)
    return bar
