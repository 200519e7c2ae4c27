"""Image classification tasks: embedded, from a folder, from Parquet files, from the hub.

The first time that a task is loaded, each of its images is decoded once: that finds those that cannot be read and gives
the task's digest, which is remembered (see `remembered`). Otherwise only images that are used are decoded.
"""

from apthory.tasks.decoding import Decoded, read_images
from apthory.tasks.embedded import EMBEDDED
from apthory.tasks.readers import IMAGE_SUFFIXES, from_folder, from_hub, from_parquet, load_task
from apthory.tasks.readers import load_task as load
from apthory.tasks.task import Images, Split, Task

__all__ = [
    "load_task", "load", "EMBEDDED", "from_folder", "from_parquet", "from_hub", "IMAGE_SUFFIXES",
    "read_images", "Decoded",
    "Task", "Images", "Split",
]  # fmt: skip
