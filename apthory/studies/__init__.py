"""The measurements behind notebooks, each from its configuration alone: what a record holds."""
