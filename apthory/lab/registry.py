"""Where the functions behind records live: the name that a record carries for ever, and today's place in the code.

A name enters the key of every record made under it, so it is never changed or used again, wherever the function moves.
Records are resolved through this table and the functions that a process has loaded, never by importing what a record
names: a record is data, and may come from anywhere.
"""

from collections.abc import Callable
from importlib import import_module

PLACES = {  # name in records -> "module:function"
    "apthory.bench.race": "apthory.benchmarks.prefix_cache:race_prefix_cache",
    "apthory.efficiency.measure_methods": "apthory.studies.costs:measure_methods",
    "apthory.efficiency.measure_sites": "apthory.studies.costs:measure_sites",
    "apthory.equivalence_study.measure_diagnoses": "apthory.studies.equivalence:measure_diagnoses",
    "apthory.equivalence_study.measure_gap": "apthory.studies.equivalence:measure_gap",
    "apthory.equivalence_study.measure_layers": "apthory.studies.equivalence:measure_layers",
    "apthory.equivalence_study.measure_trained": "apthory.studies.equivalence:measure_trained",
    "apthory.equivalence_study.measure_trajectories": "apthory.studies.equivalence:measure_trajectories",
    "apthory.global_study.measure_attention": "apthory.studies.global_features:measure_attention",
    "apthory.global_study.measure_profile": "apthory.studies.global_features:measure_profile",
    "apthory.global_study.measure_similarity": "apthory.studies.global_features:measure_similarity",
    "apthory.input_study.measure_frame": "apthory.studies.input_limits:measure_frame",
    "apthory.input_study.measure_rank": "apthory.studies.input_limits:measure_rank",
    "apthory.input_study.measure_residuals": "apthory.studies.input_limits:measure_residuals",
    "apthory.input_study.measure_universality": "apthory.studies.input_limits:measure_universality",
    "apthory.layers.score": "apthory.studies.site_search:score",
    "apthory.layers.search": "apthory.studies.site_search:search",
    "apthory.mask_study.draw_prompt": "apthory.studies.masks:draw_prompt",
    "apthory.mask_study.measure_masks": "apthory.studies.masks:measure_masks",
    "apthory.metric_bench.race": "apthory.benchmarks.metrics:race_metrics",
    "apthory.pixel_bench.race": "apthory.benchmarks.pixels:race_pixels",
    "apthory.pixel_bench.race_words": "apthory.benchmarks.pixels:race_words",
    "apthory.pixel_study.run_shifted": "apthory.studies.pixels:run_shifted",
    "apthory.sweeps.run_cell": "apthory.studies.cells:run_cell",
    "apthory.theory.study.measure_counts": "apthory.studies.sample_complexity:measure_counts",
    "apthory.theory.study.measure_descent": "apthory.studies.sample_complexity:measure_descent",
    "apthory.theory.study.measure_epochs": "apthory.studies.sample_complexity:measure_epochs",
    "apthory.theory.study.measure_errors": "apthory.studies.sample_complexity:measure_errors",
}
_loaded: dict[str, Callable] = {}


def register_function(name: str, function: Callable) -> None:
    """Let records of this name be those of the function.

    Raises:
        ValueError: If another function has the name.
    """
    other = _loaded.get(name, function)
    if _place(other) != _place(function):
        raise ValueError(
            f"two functions record as {name!r}: {_place(other)} and {_place(function)}; rename the new one"
        )
    if PLACES.get(name, _place(function)) != _place(function):
        raise ValueError(f"the table of names has {name!r} at {PLACES[name]}, not at {_place(function)}; correct it")
    _loaded[name] = function


def find_function(name: str) -> Callable:
    """The function that records under a name.

    Raises:
        LookupError: If no function has the name; nothing is imported then.
    """
    if name not in _loaded and name in PLACES:
        import_module(PLACES[name].partition(":")[0])  # its decorator registers it
    if name not in _loaded:
        raise LookupError(
            f"no function records as {name!r}; remove the record, or load the module that has it under this name"
        )
    return _loaded[name]


def _place(function: Callable) -> str:
    return f"{function.__module__}:{function.__qualname__}"
