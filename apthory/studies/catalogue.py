"""The studies of all suites by name."""

from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path

import pandas as pd

from apthory.lab import records
from apthory.studies import during_training, layers, pixel_grids, pixels

Study = layers.LayerStudy | pixels.PixelStudy


def known() -> dict[str, Mapping[str, Study]]:
    """All studies, by suite and name."""
    by_module = (layers.LAYER_STUDIES, during_training.STAGE_STUDIES, pixel_grids.PIXEL_STUDIES)
    return {
        suite: {name: study for studies in by_module for name, study in studies.get(suite, {}).items()}
        for suite in records.SUITES
    }


def run_study(study: Study, folder: Path, executor: Executor | None = None) -> pd.DataFrame:
    """All cells of a layer study or a pixel study, computed or read from records, as a table."""
    if isinstance(study, layers.LayerStudy):
        return layers.run_layer_study(study, folder, executor)
    return pixels.run_pixel_study(study, folder, executor)
