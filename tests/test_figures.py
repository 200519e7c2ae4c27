"""Figures carry their numbers and the records behind them, and equal data give equal bytes."""

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pypdf
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from apthory.lab import figures, records
from apthory.methods import METHODS
from apthory.studies import looks

TABLE = pd.DataFrame({"site": ["a", "b"], "accuracy": [1 / 3, 2e-9]})


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("APTHORY_ROOT", str(tmp_path))
    yield tmp_path
    plt.close("all")


@records.versioned(1, name="tests.fact")
def fact(x):
    return {"y": x}


def draw(made_from=(), table=TABLE, name="03_example"):
    with figures.theme(width=0.5):
        figure, ax = plt.subplots()
        ax.plot(table["accuracy"], label="$\\delta$ (AP)")
        ax.legend()
        return figures.save(figure, name, made_from, table, suite="small")


@pytest.mark.parametrize("ending", ["png", "pdf"])
def test_provenance_survives_the_round_trip(project, ending):
    record = records.fetch(fact, {"x": 1}, folder=records.folder("small"))
    paths = draw([record, "f" * 64])
    assert figures.provenance(paths[ending]) == {
        "figure": "03_example",
        "suite": "small",
        "csv_sha256": hashlib.sha256(paths["csv"].read_bytes()).hexdigest(),
        "records": sorted([record.key[:12], "f" * 12]),
    }


def test_other_readers_find_the_provenance_where_it_belongs():
    paths = draw(["a" * 64])
    with Image.open(paths["png"]) as picture:
        note = picture.text["Description"]
    assert '"aaaaaaaaaaaa"' in note
    assert pypdf.PdfReader(paths["pdf"]).metadata.subject == note
    assert pypdf.PdfReader(paths["pdf"]).metadata.creation_date is None


def test_a_thousand_records_can_be_cited():
    keys = [hashlib.sha256(bytes([n % 256, n // 256])).hexdigest() for n in range(1000)]
    paths = draw(keys)
    assert figures.provenance(paths["pdf"])["records"] == sorted(key[:12] for key in keys)
    assert paths["png"].stat().st_size < 100_000


def test_equal_data_give_equal_bytes_in_another_process(project):
    here = {ending: path.read_bytes() for ending, path in draw(["a" * 64]).items()}
    script = "import test_figures as t; t.draw(['a' * 64])"
    paths = [str(Path(__file__).parent), str(Path(figures.__file__).parents[1])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "7", "MPLBACKEND": "agg"}
    environment["SOURCE_DATE_EPOCH"] = "0"  # what others set for reproducible builds changes nothing
    subprocess.run([sys.executable, "-c", script], env=os.environ | environment, check=True)
    for ending, content in here.items():
        assert (project / "figures" / "small" / f"03_example.{ending}").read_bytes() == content, ending


def test_other_data_give_other_bytes():
    before = {ending: path.read_bytes() for ending, path in draw().items()}
    after = {ending: path.read_bytes() for ending, path in draw(table=TABLE * 2).items()}
    assert all(before[ending] != after[ending] for ending in ("png", "pdf", "csv"))


def test_numbers_have_six_digits_and_come_back(project):
    path = draw()["csv"]
    assert path == project / "figures" / "small" / "03_example.csv"
    assert path.read_bytes() == b"site,accuracy\na,0.333333\nb,2e-09\n"
    pd.testing.assert_frame_equal(pd.read_csv(path), TABLE, rtol=1e-5)


def test_problems_name_what_is_not_current_any_more(project):
    record = records.fetch(fact, {"x": 1}, folder=records.folder("small"))
    paths = draw([record])
    kept = records.find(record.key[:12], records.folder("small"))
    for ending in ("png", "pdf"):
        assert figures.figure_problems(paths[ending]) == []
    fact.version = 2
    assert "record " + record.key[:12] in figures.figure_problems(paths["png"])[0]
    fact.version = 1
    paths["csv"].write_bytes(paths["csv"].read_bytes() + b"c,1\n")
    assert ["not the table" in problem for problem in figures.figure_problems(paths["pdf"])] == [True]
    paths["csv"].unlink()
    kept.unlink()
    first, second = figures.figure_problems(paths["png"])
    assert "03_example.csv is missing" in first
    assert f"record {record.key[:12]} is missing" in second
    Image.new("RGB", (2, 2)).save(paths["png"])
    assert "carries no provenance" in figures.figure_problems(paths["png"])[0]
    paths["png"].write_bytes(b"")
    assert len(figures.figure_problems(paths["png"])) == 1


def test_a_figure_without_numbers_or_with_a_path_for_a_name_is_refused(project):
    figure = plt.figure()
    with pytest.raises(ValueError, match="needs the table"):
        figures.save(figure, "03_a", [], TABLE[:0], suite="small")
    with pytest.raises(ValueError, match=r"'a/b\.png' must be letters"):
        figures.save(figure, "a/b.png", [], TABLE, suite="small")
    with pytest.raises(ValueError, match="no suite 'tiny'"):
        figures.save(figure, "03_a", [], TABLE, suite="tiny")
    assert list(project.rglob("*.*")) == []


@pytest.mark.parametrize(("width", "rows"), [(0.5, 1), (1.0, 2)])
def test_figures_are_as_wide_as_their_column_and_readable_there(width, rows):
    before = dict(mpl.rcParams)
    with figures.theme(width=width, rows=rows):
        figure, _ = plt.subplots()
        sizes = [value for name, value in mpl.rcParams.items() if name.endswith(("font.size", "labelsize"))]
        points = [size for size in sizes if isinstance(size, int | float)]
        assert len(points) >= 4
        assert min(points) >= 7
        assert mpl.font_manager.findfont("STIXGeneral", fallback_to_default=False)
    assert figure.get_size_inches() == pytest.approx([5.5 * width, 1.75 * rows])
    assert dict(mpl.rcParams) == before
    paths = figures.save(figure, "03_size", [], TABLE, suite="small")
    with Image.open(paths["png"]) as picture:
        assert picture.size == (round(1100 * width), 350 * rows)
    box = pypdf.PdfReader(paths["pdf"]).pages[0].mediabox
    assert float(box.width) == pytest.approx(72 * 5.5 * width)


def test_methods_have_a_colour_and_a_label():
    assert METHODS.keys() < looks.COLORS.keys() == looks.LABELS.keys()
    assert looks.COLORS["fine_tuning"] == looks.COLORS["full"]  # which is fine-tuning of everything
    assert len(set(looks.COLORS.values())) == len(looks.COLORS) - 1
    assert len(set(looks.LABELS.values())) == len(looks.LABELS)


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
DEFICIENCY = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


def seen(color, deficiency):
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(DEFICIENCY[deficiency] @ linear, 0, 1)
    return rgb2lab(np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055))


@pytest.mark.parametrize("deficiency", DEFICIENCY)
def test_the_layer_studies_colours_stay_apart_for_dichromats(deficiency):
    """By CIEDE2000, where matplotlib's own red and green, at 72 for others, fall to 5 for deuteranopes."""
    study = ["ap", "input_prompt", "norm", "linear_probe", "full", "random_prompt", "frozen_head", "site_probe"]
    colors = {name: seen(looks.COLORS[name], deficiency) for name in study}
    distances = {pair: deltaE_ciede2000(*map(colors.get, pair)) for pair in itertools.combinations(study, 2)}
    nearest = min(distances, key=distances.get)
    assert distances[nearest] > 10, (nearest, distances[nearest])
