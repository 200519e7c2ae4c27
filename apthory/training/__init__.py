"""One training loop for every method: a cached frozen prefix, and a bundle of configurations trained together.

The configurations of a bundle (learning rate, weight decay, seed) share backbone, task, method and kind of head. The
frozen prefix runs once for every image; after it each step feeds the suffix one batch that stacks a batch of every
configuration. What is random (augmentation of images, Gumbel noise) lies after the cut and is drawn from each
configuration's own generator in training steps alone, so the cache stays exact. Validation data chooses epoch and
configuration; the test part is used by `evaluate` alone.
"""

from apthory.training.bundle import Bundle, losses
from apthory.training.cache import PrefixCache, run_prefix
from apthory.training.config import Configuration, Recipe
from apthory.training.fitting import check_ready, choose, evaluate, fit, tune
from apthory.training.prediction import predict
from apthory.training.results import Evaluation, Fit, FrozenHead, Head

__all__ = [
    "fit", "tune", "choose", "evaluate", "predict", "Fit", "FrozenHead", "Head", "Evaluation", "Recipe",
    "Configuration", "check_ready", "Bundle", "losses", "PrefixCache", "run_prefix",
]  # fmt: skip
