"""Image classification tasks: embedded, from a folder, from Parquet files, from the hub."""

from apthory.tasks.readers import (
    EMBEDDED,
    IMAGE_SUFFIXES,
    Images,
    Split,
    Task,
    from_folder,
    from_hub,
    from_parquet,
    load,
)

__all__ = [
    "load", "EMBEDDED", "from_folder", "from_parquet", "from_hub", "IMAGE_SUFFIXES",
    "Task", "Images", "Split",
]  # fmt: skip
