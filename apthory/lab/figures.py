"""Figures that carry the numbers behind them.

Each figure is three files: a picture to look at (PNG), one to print (PDF), and the numbers drawn (CSV). The
records behind them and the CSV's digest are written inside both pictures. There are no dates and no versions:
equal data give equal bytes.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from apthory._tools.files import write_atomically
from apthory.lab import records

COLUMN = 5.5  # inches, the text width of a NeurIPS page
_THEME: dict[Any, Any] = {
    "font.family": "STIXGeneral",  # ships with matplotlib and looks like Times
    "mathtext.fontset": "stix",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 3,
    "legend.frameon": False,
    "legend.handlelength": 1.5,
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,  # what a notebook shows is what is saved
}
_SAVING: dict[Any, Any] = {
    "savefig.dpi": 200,
    "savefig.bbox": None,
    "pdf.fonttype": 42,
    "svg.hashsalt": "apthory",
}


@contextmanager
def theme(width: float = 0.5, rows: int | float = 1) -> Iterator[None]:
    """Style and size for figures created inside: a share of the text width, and rows of panels.

    Half width is 2.75 inches, full width 5.5; a row is 1.75 inches high.
    """
    with mpl.rc_context({**_THEME, **_SAVING, "figure.figsize": (COLUMN * width, 1.75 * rows)}):
        yield


def save(
    figure: Figure,
    name: str,
    made_from: Iterable[records.Record | str],
    table: pd.DataFrame,
    *,
    suite: str,
) -> dict[str, Path]:
    """Write a figure as figures/<suite>/<name>.png, .pdf and .csv; return their paths by ending.

    Args:
        figure: What is seen.
        name: Starts with its notebook's number: "03_accuracy_by_site".
        made_from: Records, or their keys, that the figure shows; empty for a closed form.
        table: The numbers drawn, tidy, in columns; the index is not written, floats have 6 digits.
        suite: "embedded", "small" or "paper".
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"figure name {name!r} must be letters, digits, '_' and '-', without an ending")
    if table.empty:
        raise ValueError(f"figure {name!r} needs the table of the numbers that it draws")
    csv = table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
    content = {
        "figure": name,
        "suite": suite,
        "csv_sha256": hashlib.sha256(csv).hexdigest(),
        "records": records.citation(made_from),
    }
    note = json.dumps(content, separators=(",", ":"))
    stamps: dict[str, dict[str, str | None]] = {
        "png": {"Software": None, "Description": note},
        "pdf": {"Creator": None, "Producer": None, "CreationDate": None, "Subject": note},
    }
    paths = {ending: records.suite_folder(suite) / f"{name}.{ending}" for ending in ("csv", "pdf", "png")}
    write_atomically(paths["csv"], csv)
    with mpl.rc_context(_SAVING):
        for ending, stamp in stamps.items():
            picture = io.BytesIO()
            figure.savefig(picture, format=ending, metadata=stamp)
            write_atomically(paths[ending], picture.getvalue())
    return paths


def provenance(path: Path) -> dict[str, Any]:
    """Read what `save` wrote inside a PNG or PDF: figure, suite, csv_sha256, records.

    Raises:
        ValueError: If the file carries none.
    """
    note = _png_note(path) if path.suffix == ".png" else _pdf_note(path)
    try:
        return json.loads(note)
    except ValueError:
        raise ValueError(f"{path} carries no provenance; figures.save did not write it") from None


def figure_problems(path: Path) -> list[str]:
    """Say how a figure disagrees with the CSV beside it and the records behind it; empty if it is current."""
    try:
        note = provenance(path)
    except (ValueError, OSError) as error:
        return [str(error)]
    csv = path.with_suffix(".csv")
    problems = []
    if not csv.exists():
        problems.append(f"{path}: {csv.name} is missing")
    elif hashlib.sha256(csv.read_bytes()).hexdigest() != note["csv_sha256"]:
        problems.append(f"{path}: {csv.name} is not the table that was drawn")
    return problems + [f"{path}: {problem}" for problem in record_problems(note["records"], note["suite"])]


def record_problems(cited: Iterable[str], suite: str) -> list[str]:
    """Cited records that are missing, broken or superseded by a newer version of their function."""
    problems = []
    for key in cited:
        record = records.find(key, records.folder(suite))
        if record is None:
            problems.append(f"record {key} is missing")
            continue
        try:
            reason = records.superseded(records.read(record))
        except ValueError as error:
            reason = str(error)
        if reason:
            problems.append(f"record {key}: {reason}")
    return problems


def _png_note(path: Path) -> str:
    with Image.open(path) as picture:
        return str(picture.info.get("Description", ""))


def _pdf_note(path: Path) -> str:
    """The Subject of the document; matplotlib writes it as a plain string with escaped brackets."""
    subject = re.search(rb"/Subject \(((?:[^\\)]|\\.)*)\)", path.read_bytes(), re.DOTALL)
    return re.sub(r"\\(.)", r"\1", subject[1].decode("latin-1")) if subject else ""
