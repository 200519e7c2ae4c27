"""Train a backbone on an image classification task, resumable to the bit.

One run is one folder: a checkpoint after every epoch, and at the end the averaged weights in half precision
with a model card. Every random draw of an epoch comes from a stream seeded by (seed, epoch), so a checkpoint
holds no generator state, and a run that was killed and resumed ends in the bits of one that was not (on the
same hardware, with the same versions and number of threads).
"""

from apthory.pretraining.augmentation import crop_and_flip
from apthory.pretraining.cards import ship
from apthory.pretraining.config import Config
from apthory.pretraining.exports import export
from apthory.pretraining.run import pretrain

__all__ = ["Config", "pretrain", "export", "ship", "crop_and_flip"]
