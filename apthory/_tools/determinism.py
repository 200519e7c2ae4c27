"""Random numbers that depend on a seed alone, and kernels that give the same bits in every run."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from scipy import special
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def random_stream(seed: int, index: int, device: torch.device | str = "cpu") -> Iterator[torch.Generator]:
    """A generator for one part of a run; torch's own, used by libraries and dropout, is seeded too and restored.

    Args:
        seed: Of the run.
        index: Of the part, such as an epoch; parts are independent of each other.
        device: A CUDA device's own generator is seeded as well.
    """
    device = torch.device(device)
    words = np.random.SeedSequence((seed, index)).generate_state(2, np.uint64)
    ours, own = (int(word) >> 1 for word in words)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(own)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(own)
        yield torch.Generator().manual_seed(ours)


@contextmanager
def same_bits(device: torch.device) -> Iterator[None]:
    """The same bits in every run, on CUDA too; torch warns of an operation that has no such kernel."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    before = torch.are_deterministic_algorithms_enabled()
    before_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=before_warn)


class _SameErfinv(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.erfinv_.default:
            return func(*args, **(kwargs or {}))
        (values,) = args
        exact = special.erfinv(values.detach().cpu().double().numpy())
        return values.copy_(torch.from_numpy(exact))


def same_erfinv() -> AbstractContextManager:
    """The same bits of ``Tensor.erfinv_``, and so of truncated normal weights, on every processor.

    The library that torch calls for it has other code for each kind of processor, and their last bits differ. Computed
    in float64 and rounded once, the result is the same everywhere.
    """
    return _SameErfinv()
