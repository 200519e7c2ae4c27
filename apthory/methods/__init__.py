"""Ways to adapt a frozen backbone, each as a cut and the edits after it.

A method says where the frozen prefix ends (its result can be cached) and which trainable edits the suffix carries.
Edits hold their parameters for a whole bundle: the first axis counts configurations, and the batch that they are
given stacks the configurations' examples one after the other.
"""

from apthory.methods.activation import ActivationPrompt, ActivationPrompting, FixedPrompt, Shape, prompt_shape
from apthory.methods.base import Body
from apthory.methods.edits import Affine, Shift, rms
from apthory.methods.files import PromptedBackbone
from apthory.methods.norm import NormTuning
from apthory.methods.pixels.methods import EVP, VP, AdaViPro
from apthory.methods.probe import LinearProbe
from apthory.methods.weights import FullFineTuning

__all__ = [
    "ActivationPrompting", "NormTuning", "LinearProbe", "FullFineTuning", "FixedPrompt", "VP", "EVP", "AdaViPro",
    "Method", "METHODS", "relative_rate", "Body", "Shift", "Affine", "rms",
    "ActivationPrompt", "PromptedBackbone", "prompt_shape", "Shape",
]  # fmt: skip

Method = ActivationPrompting | NormTuning | LinearProbe | FixedPrompt | FullFineTuning | VP | EVP | AdaViPro
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (ActivationPrompting, NormTuning, LinearProbe, FixedPrompt, FullFineTuning, VP, EVP, AdaViPro)
}


def relative_rate(method: Method, parameter: str) -> float:
    """Learning rate of one of the edits' parameters, relative to that of the head."""
    if isinstance(method, AdaViPro) and ".masks." in parameter:
        return method.generator_rate
    return method.rate
