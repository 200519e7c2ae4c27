"""apthory: prompt any layer of a frozen vision backbone, and ask which layer to prompt."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "load_backbone", "load_classifier", "load_clip", "load_task",
    "list_sites", "resolve", "capture", "edited", "split", "normalize",
    "ActivationPrompt", "AdaptedBackbone", "save_prompt", "load_prompt",
    "ActivationPrompting", "NormTuning", "LinearProbe", "FineTuning", "FixedPrompt", "VP", "EVP", "AdaViPro",
    "Method", "Edit", "LinearHead", "LabelMapping", "TextHead", "FrozenHead",
    "Recipe", "Configuration", "fit", "tune", "evaluate", "predict",
    "diagnose", "fold", "layer_profile", "rank_sites", "find_site",
]  # fmt: skip

if TYPE_CHECKING:
    from apthory.backbones import classifier as load_classifier
    from apthory.backbones import load_backbone, normalize
    from apthory.clip import load_clip
    from apthory.equivalence import diagnose, fold
    from apthory.heads import LabelMapping, LinearHead, TextHead
    from apthory.methods import (
        EVP,
        VP,
        ActivationPrompt,
        ActivationPrompting,
        AdaptedBackbone,
        AdaViPro,
        Edit,
        FineTuning,
        FixedPrompt,
        LinearProbe,
        Method,
        NormTuning,
    )
    from apthory.methods.files import load_prompt, save_prompt
    from apthory.metrics import layer_profile
    from apthory.selection import find_site, rank_sites
    from apthory.sites import capture, edited, list_sites, resolve, split
    from apthory.tasks import load_task
    from apthory.training import Configuration, FrozenHead, Recipe, evaluate, fit, predict, tune
else:  # the same names, each from its module when it is first used: torch and timm take seconds to import
    from importlib import import_module

    from apthory._tools import moved

    _DEFINED_IN = {
        "backbones": ("load_backbone", "load_classifier", "normalize"),
        "clip": ("load_clip",),
        "equivalence": ("diagnose", "fold"),
        "heads": ("LabelMapping", "LinearHead", "TextHead"),
        "methods": (
            "ActivationPrompt",
            "ActivationPrompting",
            "AdaViPro",
            "AdaptedBackbone",
            "EVP",
            "Edit",
            "FineTuning",
            "FixedPrompt",
            "LinearProbe",
            "Method",
            "NormTuning",
            "VP",
        ),
        "methods.files": ("load_prompt", "save_prompt"),
        "metrics": ("layer_profile",),
        "selection": ("find_site", "rank_sites"),
        "sites": ("capture", "edited", "list_sites", "resolve", "split"),
        "tasks": ("load_task",),
        "training": ("Configuration", "FrozenHead", "Recipe", "evaluate", "fit", "predict", "tune"),
    }
    _DEFINED_AS = {"load_classifier": "classifier"}
    _OTHERS = ("benchmarks", "costs", "lab", "pretraining", "studies", "theory")  # reached by their names alone
    moved.install()

    def __getattr__(name):
        if name in _DEFINED_IN or name in _OTHERS or name in moved.MODULES:
            return import_module(f"{__name__}.{name}")
        for module, names in _DEFINED_IN.items():
            if name in names:
                value = getattr(import_module(f"{__name__}.{module}"), _DEFINED_AS.get(name, name))
                return globals().setdefault(name, value)
        return moved.renamed(__name__, name)

    def __dir__():
        return sorted({*globals(), *__all__, *(name for name in (*_DEFINED_IN, *_OTHERS) if "." not in name)})
