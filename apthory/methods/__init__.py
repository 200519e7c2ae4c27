"""Ways to adapt a frozen backbone: each is a class that says where to cut and what is trained after the cut.

A new one is a subclass of `Method` with `edits`, and one line here: `register` makes it known by its name to saved
files, studies, the command and the tests.
"""

from apthory.methods.activation import ActivationPrompt, ActivationPrompting, FixedPrompt, Shape, prompt_shape
from apthory.methods.adapted import AdaptedBackbone
from apthory.methods.base import Method, PreparedBackbone
from apthory.methods.edits import Affine, Edit, Shift, Stack, rms
from apthory.methods.fine_tuning import FineTuning
from apthory.methods.norm import NormTuning
from apthory.methods.pixels.methods import EVP, VP, AdaViPro
from apthory.methods.pixels.overlay import PixelPrompt
from apthory.methods.probe import LinearProbe
from apthory.methods.registry import METHODS, register

for _method in (ActivationPrompting, NormTuning, LinearProbe, FixedPrompt, FineTuning, VP, EVP, AdaViPro):
    register(_method)

__all__ = [
    "ActivationPrompting", "NormTuning", "LinearProbe", "FineTuning", "FixedPrompt", "VP", "EVP", "AdaViPro",
    "Method", "Edit", "Stack", "METHODS", "register", "PreparedBackbone", "AdaptedBackbone",
    "ActivationPrompt", "PixelPrompt", "prompt_shape", "Shape", "Shift", "Affine", "rms",
]  # fmt: skip
