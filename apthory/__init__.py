"""apthory: prompt any layer of a frozen vision backbone, and ask which layer to prompt."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "load_backbone", "load_task",
    "list_sites", "resolve", "capture", "edited", "split",
    "ActivationPrompt", "PromptedBackbone", "save_prompt", "load_prompt",
    "ActivationPrompting", "NormTuning", "LinearProbe", "FullFineTuning", "FixedPrompt", "VP", "EVP", "AdaViPro",
    "Recipe", "Configuration", "fit", "tune", "evaluate",
    "diagnose", "fold",
]  # fmt: skip

if TYPE_CHECKING:
    from apthory.backbones import load as load_backbone
    from apthory.equivalence import diagnose, fold
    from apthory.methods import (
        EVP,
        VP,
        ActivationPrompting,
        AdaViPro,
        FixedPrompt,
        FullFineTuning,
        LinearProbe,
        NormTuning,
    )
    from apthory.prompts import ActivationPrompt, PromptedBackbone
    from apthory.prompts import load as load_prompt
    from apthory.prompts import save as save_prompt
    from apthory.sites import capture, edited, list_sites, resolve, split
    from apthory.tasks import load as load_task
    from apthory.training import Configuration, Recipe, evaluate, fit, tune
else:  # the same names, each from its module when it is first used: torch and timm take seconds to import
    from importlib import import_module

    _DEFINED_IN = {
        "backbones": ("load_backbone",),
        "equivalence": ("diagnose", "fold"),
        "methods": (
            "ActivationPrompting",
            "AdaViPro",
            "EVP",
            "FixedPrompt",
            "FullFineTuning",
            "LinearProbe",
            "NormTuning",
            "VP",
        ),
        "prompts": ("ActivationPrompt", "PromptedBackbone", "load_prompt", "save_prompt"),
        "sites": ("capture", "edited", "list_sites", "resolve", "split"),
        "tasks": ("load_task",),
        "training": ("Configuration", "Recipe", "evaluate", "fit", "tune"),
    }
    _DEFINED_AS = {"load_backbone": "load", "load_prompt": "load", "save_prompt": "save", "load_task": "load"}

    def __getattr__(name):
        if name in _DEFINED_IN:
            return import_module(f"{__name__}.{name}")
        for module, names in _DEFINED_IN.items():
            if name in names:
                value = getattr(import_module(f"{__name__}.{module}"), _DEFINED_AS.get(name, name))
                return globals().setdefault(name, value)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__, *_DEFINED_IN})
