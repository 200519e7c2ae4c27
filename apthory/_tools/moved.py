"""Old names of modules and of what is in them: they still work in this version, with a DeprecationWarning.

An old module stands for those that took its place, and looks a name up in each of them. A module that is still there
finds its old names in `RENAMED`: the finder below gives every module of the package the ``__getattr__`` that looks
there, so a new row is all that a new name takes. To be removed with version 0.2.
"""

import functools
import sys
import warnings
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {  # old name -> the modules that have its contents now, the first one named in the warning
    "bench": ("benchmarks.prefix_cache",),
    "determinism": ("_tools.determinism",),
    "diversity": ("methods.pixels.augmentation",),
    "efficiency": ("costs", "studies.costs", "_tools.environment"),
    "equivalence.gaps": ("equivalence.tuning",),
    "equivalence_study": ("studies.equivalence",),
    "figures": ("lab.figures",),
    "global_study": ("studies.global_features",),
    "input_study": ("studies.input_limits",),
    "layers": ("studies.site_search",),
    "limits": ("equivalence.tokens", "metrics.universality", "costs"),
    "mask_study": ("studies.masks",),
    "metric_bench": ("benchmarks.metrics",),
    "notebooks": ("lab.notebooks", "lab.claims", "lab.check"),
    "pixel_bench": ("benchmarks.pixels",),
    "pixel_study": ("studies.pixels",),
    "pixel_suites": ("studies.pixel_grids",),
    "pixels": ("methods.pixels", "methods.pixels.overlay"),
    "profiles": ("metrics.profile",),
    "progress": ("_tools.progress",),
    "prompts": ("methods.activation", "methods.files"),
    "ranking": ("selection.scores",),
    "records": ("lab.records", "_tools.files", "_tools.environment"),
    "regions": ("methods.pixels.regions",),
    "stage_study": ("studies.during_training",),
    "statistics": ("lab.intervals", "_tools.estimate"),
    "sweeps": ("studies.cells", "studies.layers"),
    "theory.study": ("studies.sample_complexity",),
    "tracing": ("sites.tracing",),
}
RENAMED = {  # names that are other ones now: old module and name -> module and name
    "apthory.FullFineTuning": ("methods", "FineTuning"),
    "apthory.PromptedBackbone": ("methods", "AdaptedBackbone"),
    "apthory.backbones.stages": ("backbones", "checkpoints"),
    "apthory.clip.load": ("clip", "load_clip"),
    "apthory.methods.files.load": ("methods.files", "load_prompt"),
    "apthory.methods.files.save": ("methods.files", "save_prompt"),
    "apthory.sites.Edit": ("sites", "EditFunction"),
    "apthory.studies.cells.describe": ("studies.cells", "cell_values"),
    "apthory.lab.registry.register": ("lab.registry", "register_function"),
    "apthory.methods.base.Body": ("methods.base", "PreparedBackbone"),
    "apthory.methods.files.PromptedBackbone": ("methods.adapted", "AdaptedBackbone"),
    "apthory.sweeps.cells": ("studies.layers", "layer_cells"),
    "apthory.sweeps.make": ("studies.record_format", "method_of"),
    "apthory.sweeps.make_head": ("studies.record_format", "head_of"),
    "apthory.training.autocast": ("backbones", "autocast"),
    "apthory.methods.Body": ("methods", "PreparedBackbone"),
    "apthory.methods.FullFineTuning": ("methods", "FineTuning"),
    "apthory.methods.PromptedBackbone": ("methods", "AdaptedBackbone"),
    "apthory.studies.Study": ("studies.catalogue", "Study"),
    "apthory.studies.known": ("studies.catalogue", "known"),
    "apthory.benchmarks.metrics.race": ("benchmarks.metrics", "race_metrics"),
    "apthory.benchmarks.metrics.run": ("benchmarks.metrics", "run_metrics"),
    "apthory.benchmarks.metrics.summarize": ("benchmarks.metrics", "summarize_metrics"),
    "apthory.benchmarks.pixels.CLIP": ("benchmarks.pixels", "RANDOM_CLIP"),
    "apthory.benchmarks.pixels.METHODS": ("benchmarks.pixels", "TIMED_METHODS"),
    "apthory.benchmarks.pixels.race": ("benchmarks.pixels", "race_pixels"),
    "apthory.benchmarks.pixels.run": ("benchmarks.pixels", "run_pixels"),
    "apthory.benchmarks.pixels.summarize": ("benchmarks.pixels", "summarize_pixels"),
    "apthory.benchmarks.prefix_cache.RATES": ("benchmarks.prefix_cache", "LEARNING_RATES"),
    "apthory.benchmarks.prefix_cache.race": ("benchmarks.prefix_cache", "race_prefix_cache"),
    "apthory.benchmarks.prefix_cache.run": ("benchmarks.prefix_cache", "run_prefix_cache"),
    "apthory.benchmarks.prefix_cache.summarize": ("benchmarks.prefix_cache", "summarize_prefix_cache"),
    "apthory.equivalence.Gap": ("equivalence", "DistanceToTuning"),
    "apthory.equivalence.Reach": ("equivalence", "InputSpan"),
    "apthory.equivalence.gap": ("equivalence", "distance_to_tuning"),
    "apthory.equivalence.reach": ("equivalence", "input_span"),
    "apthory.equivalence.gaps.Gap": ("equivalence.tuning", "DistanceToTuning"),
    "apthory.equivalence.gaps.gap": ("equivalence.tuning", "distance_to_tuning"),
    "apthory.equivalence.networks.Network": ("equivalence.networks", "PromptedNetwork"),
    "apthory.equivalence.tokens.Reach": ("equivalence.tokens", "InputSpan"),
    "apthory.equivalence.tokens.reach": ("equivalence.tokens", "input_span"),
    "apthory.lab.figures.problems": ("lab.figures", "figure_problems"),
    "apthory.lab.registry.resolve": ("lab.registry", "find_function"),
    "apthory.metrics.gradient_reach": ("metrics", "gradient_spread"),
    "apthory.metrics.batches.Images": ("metrics.batches", "ImageBatches"),
    "apthory.metrics.layout.Layout": ("metrics.layout", "ActivationLayout"),
    "apthory.metrics.layout.channel_axes": ("metrics.layout", "find_channel_axes"),
    "apthory.metrics.receptive.Reach": ("metrics.receptive", "GradientSpread"),
    "apthory.metrics.receptive.gradient_reach": ("metrics.receptive", "gradient_spread"),
    "apthory.pretraining.augmentation.mean_std": ("pretraining.augmentation", "mean_std_on_device"),
    "apthory.pretraining.cards.problems": ("pretraining.cards", "card_problems"),
    "apthory.pretraining.cards.read": ("pretraining.cards", "read_card"),
    "apthory.pretraining.exports.create": ("pretraining.exports", "random_start"),
    "apthory.pretraining.exports.evaluate": ("pretraining.exports", "loss_and_accuracy"),
    "apthory.pretraining.exports.read": ("pretraining.exports", "read_checkpoint"),
    "apthory.studies.catalogue.run": ("studies.catalogue", "run_study"),
    "apthory.studies.cells.fetch": ("studies.cells", "fetch_cell"),
    "apthory.studies.cells.load": ("studies.cells", "load_backbone_and_task"),
    "apthory.studies.during_training.STUDIES": ("studies.during_training", "STAGE_STUDIES"),
    "apthory.studies.global_features.Network": ("studies.global_features", "NetworkKind"),
    "apthory.studies.global_features.SOURCES": ("studies.global_features", "GLOBAL_FEATURE_SOURCES"),
    "apthory.studies.layers.STUDIES": ("studies.layers", "LAYER_STUDIES"),
    "apthory.studies.layers.Study": ("studies.layers", "LayerStudy"),
    "apthory.studies.layers.configurations": ("studies.layers", "layer_cells"),
    "apthory.studies.layers.run_study": ("studies.layers", "run_layer_study"),
    "apthory.studies.pixel_grids.CLIP": ("studies.pixel_grids", "CLIP_BACKBONE"),
    "apthory.studies.pixel_grids.EMBEDDED": ("studies.pixel_grids", "TWO_EMBEDDED_TASKS"),
    "apthory.studies.pixel_grids.METHODS": ("studies.pixel_grids", "METHOD_ARMS"),
    "apthory.studies.pixel_grids.PLACES": ("studies.pixel_grids", "PROMPT_SITES"),
    "apthory.studies.pixel_grids.RATES": ("studies.pixel_grids", "RATES_BY_NORMALIZATION"),
    "apthory.studies.pixel_grids.STUDIES": ("studies.pixel_grids", "PIXEL_STUDIES"),
    "apthory.studies.pixels.Part": ("studies.pixels", "StudyPart"),
    "apthory.studies.pixels.Study": ("studies.pixels", "PixelStudy"),
    "apthory.studies.pixels.configurations": ("studies.pixels", "pixel_cells"),
    "apthory.studies.pixels.run_study": ("studies.pixels", "run_pixel_study"),
    "apthory.studies.record_format.cell": ("studies.record_format", "spell_cell"),
    "apthory.studies.site_search.SOURCES": ("studies.site_search", "SITE_SEARCH_SOURCES"),
    "apthory.studies.site_search.draw": ("studies.site_search", "draw_ranking"),
    "apthory.tasks.decoding.Part": ("tasks.decoding", "EncodedPart"),
    "apthory.tasks.embedded.draw": ("tasks.embedded", "draw_task"),
    "apthory.tasks.readers.load": ("tasks.readers", "load_task"),
    "apthory.tasks.remembered.folder": ("tasks.remembered", "findings_folder"),
    "apthory.theory.growth.Fit": ("theory.growth", "GrowthFit"),
    "apthory.theory.simulation.Network": ("theory.simulation", "ReadoutNetwork"),
    "apthory.theory.simulation.descend": ("theory.simulation", "train_prompts"),
    "apthory.theory.simulation.draw": ("theory.simulation", "draw_samples"),
    "apthory.theory.tangent.Part": ("theory.tangent", "ExampleSet"),
}
FIELDS = {"rate": "lr_scale", "relative": "in_rms_units", "generator_rate": "generator_lr_scale"}  # of methods
_MACHINERY = ("apthory", "importlib", "_frozen_importlib", "beartype", "jaxtyping")


class _OldModule(ModuleType):
    """Has every name of the modules that took its place."""

    def __init__(self, name: str) -> None:
        self.places = [f"apthory.{place}" for place in MODULES[name.removeprefix("apthory.")]]
        super().__init__(name, f"Moved to {' and '.join(self.places)}.")

    @property
    def __all__(self) -> list[str]:
        names = {name for place in self.places for name in vars(import_module(place))}
        old_names = (old.rpartition(".") for old in RENAMED)
        names |= {name for module, _, name in old_names if module in (self.__name__, *self.places)}
        return sorted(name for name in names if not name.startswith("_"))

    def __dir__(self) -> list[str]:
        return self.__all__

    def __getattr__(self, name: str) -> Any:
        if renamed := RENAMED.get(f"{self.__name__}.{name}"):
            return getattr(import_module(f"apthory.{renamed[0]}"), renamed[1])
        for place in () if name.startswith("__") else self.places:
            value = getattr(import_module(place), name, self)
            if value is not self:
                return value
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    """Makes old modules, and lets the other finders find today's, whose old names it adds."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "apthory":
            return None
        if name in MODULES:
            return ModuleSpec(fullname, self)
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        if spec and spec.loader:
            spec.loader.create_module = _with_old_names
        return spec

    def create_module(self, spec: ModuleSpec) -> _OldModule:
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert isinstance(module, _OldModule)
        warn_of_old_name(module.__name__, module.places[0])


def _with_old_names(spec: ModuleSpec) -> ModuleType:
    """An empty module that knows its old names; the loader fills it."""
    module = ModuleType(spec.name)
    module.__getattr__ = partial(renamed, spec.name)
    return module


def renamed(module: str, name: str) -> Any:
    """The value of an old name of a module that is still there, with a warning.

    Raises:
        AttributeError: If the module never had the name.
    """
    if f"{module}.{name}".removeprefix("apthory.") in MODULES:
        return import_module(f"{module}.{name}")
    if (place := RENAMED.get(f"{module}.{name}")) is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warn_of_old_name(f"{module}.{name}", f"apthory.{place[0]}.{place[1]}")
    return getattr(import_module(f"apthory.{place[0]}"), place[1])


def accepts_old_fields(method: type) -> type:
    """A dataclass whose constructor also takes the old names of `FIELDS`, and the head that methods once had.

    A frozen head is refused: the fits that it comes from are an argument of `training.fit`, and without them it would
    be trained.
    """
    construct = method.__init__  # type: ignore[misc]

    @functools.wraps(construct)
    def with_old_fields(self: Any, *args: Any, **given: Any) -> None:
        for old in given.keys() & FIELDS.keys():
            if (new := renamed_field(method, old)) in given:
                raise ValueError(f"{old} of {method.__name__} is {new} now, and both are given; give {new} alone")
            given[new] = given.pop(old)
        if "head" in given:
            if given["head"] != "trained":
                raise ValueError("the head is no field of a method any more; give it to fit: head=FrozenHead(fits)")
            warn_of_old_name(f"head of {method.__name__}", "an argument of fit, where 'trained' is the default,")
            del given["head"]
        construct(self, *args, **given)

    method.__init__ = with_old_fields  # type: ignore[misc]
    return method


def renamed_field(owner: type, name: str) -> str:
    """The new name of an old field, with a warning.

    Raises:
        AttributeError: If there never was such a field.
    """
    if FIELDS.get(name) not in getattr(owner, "__dataclass_fields__", {}):
        raise AttributeError(f"{owner.__name__!r} has no attribute {name!r}")
    warn_of_old_name(f"{name} of {owner.__name__}", FIELDS[name])
    return FIELDS[name]


def install() -> None:
    """Let the old names be found."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def warn_of_old_name(old: str, new: str) -> None:
    """Warn whoever wrote the old name: past the frames of the import machinery and of this package."""
    frame = sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _MACHINERY:
        frame = frame.f_back
    message = f"{old} is {new} now; the old name goes with version 0.2"
    user, seen = frame.f_globals.get("__name__", ""), frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, DeprecationWarning, frame.f_code.co_filename, frame.f_lineno, user, seen)
