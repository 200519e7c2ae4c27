"""Modules that were moved: their old names still import in this version, with a DeprecationWarning.

An old module stands for those that took its place, and looks a name up in each of them. To be removed with version 0.2.
"""

import sys
import warnings
from collections.abc import Sequence
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
    "apthory.sweeps.cells": ("studies.layers", "configurations"),
    "apthory.sweeps.make": ("studies.record_format", "method_of"),
    "apthory.sweeps.make_head": ("studies.record_format", "head_of"),
    "apthory.training.autocast": ("backbones", "autocast"),
    "apthory.studies.Study": ("studies.catalogue", "Study"),
    "apthory.studies.known": ("studies.catalogue", "known"),
}
_MACHINERY = ("apthory", "importlib", "_frozen_importlib", "beartype", "jaxtyping")


class _OldModule(ModuleType):
    """Has every name of the modules that took its place."""

    def __init__(self, name: str) -> None:
        self.places = [f"apthory.{place}" for place in MODULES[name.removeprefix("apthory.")]]
        super().__init__(name, f"Moved to {' and '.join(self.places)}.")

    @property
    def __all__(self) -> list[str]:
        names = {name for place in self.places for name in vars(import_module(place))}
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
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "apthory" and name in MODULES else None

    def create_module(self, spec: ModuleSpec) -> _OldModule:
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert isinstance(module, _OldModule)
        warn_of_old_name(module.__name__, module.places[0])


def renamed(module: str, name: str) -> Any:
    """The value of an old name of a module that is still there, with a warning: for its ``__getattr__``.

    Raises:
        AttributeError: If the module never had the name.
    """
    if (place := RENAMED.get(f"{module}.{name}")) is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warn_of_old_name(f"{module}.{name}", f"apthory.{place[0]}.{place[1]}")
    return getattr(import_module(f"apthory.{place[0]}"), place[1])


def install() -> None:
    """Let the old names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def warn_of_old_name(old: str, new: str) -> None:
    """Warn whoever wrote the old name: past the frames of the import machinery and of this package."""
    frame = sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _MACHINERY:
        frame = frame.f_back
    message = f"{old} is {new} now; the old name goes with version 0.2"
    user, seen = frame.f_globals.get("__name__", ""), frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, DeprecationWarning, frame.f_code.co_filename, frame.f_lineno, user, seen)
