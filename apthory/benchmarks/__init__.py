"""Timings against bounds and against the usual tools, side by side in one run."""
