"""What training costs: FLOPs, memory and time, counted; and the FLOPs of a step by formula (V3)."""

import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from apthory._tools.environment import environment
from apthory._tools.progress import progress


class StepFlops(NamedTuple):
    """FLOPs of a training step by where its prompt acts."""

    visual: int  # at the input
    activation: int  # at a site
    cached: int  # at a site, with the prefix's result kept


def step_flops(
    *, forward: int, suffix: int, attention: int, suffix_attention: int, head: int, fused: bool = False
) -> StepFlops:
    """What a step costs with weights frozen: VP = 2 F + A, AP = F + S + A_S, cached AP = 2 S + A_S, and the head.

    A layer with frozen weights costs its forward FLOPs once more in the backward pass, for its input's gradient. A
    product inside attention needs both factors' gradients, hence A once more; a fused kernel computes the scores
    anew, hence 1.5 A. The head, a trained linear layer, needs its forward pass and two gradients.

    Args:
        forward: F, a forward pass of the backbone without the head.
        suffix: S, the part of it after the site.
        attention: A, the part of it in `attention_flops`.
        suffix_attention: A_S, the same after the site.
        head: A forward pass of the head.
        fused: Attention runs in one kernel.
    """
    scale = 3 if fused else 2  # halves of A: two products are 2, and the scores once more make 3
    both, late = scale * attention // 2, scale * suffix_attention // 2
    return StepFlops(2 * forward + both + 3 * head, forward + suffix + late + 3 * head, 2 * suffix + late + 3 * head)


def attention_flops(work: Callable[[], Any]) -> int:
    """FLOPs of products of two activations (queries by keys, weights by values) in a forward pass."""
    with FlopCounterMode(display=False) as counter:
        work()
    products = ("aten.bmm", "aten.baddbmm", "aten._scaled_dot_product")
    by_operation = counter.get_flop_counts().get("Global", {})  # absent if nothing was counted
    return sum(flops for operation, flops in by_operation.items() if str(operation).startswith(products))


def count_flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, convolutions and attention (two for a multiply-add)."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_memory(work: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Largest number of bytes held at once by tensors that the work makes; weights and inputs do not count."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveStorages() as live:
        work()
    return live.peak


def interleaved_seconds(
    works: Mapping[Any, Callable[[], Any]], num_repeats: int = 7, device: torch.device | str = "cpu"
) -> dict[Any, list[float]]:
    """Wall times of several pieces of work, taken in turns so that a drifting machine favours none.

    Every piece is run once more, beforehand, to warm up.
    """
    is_cuda = torch.device(device).type == "cuda"
    times: dict[Any, list[float]] = {name: [] for name in works}
    for repeat in progress(range(num_repeats + 1), desc="timings"):
        for name, work in works.items():
            if is_cuda:
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            work()
            if is_cuda:
                torch.cuda.synchronize(device)
            if repeat:
                times[name].append(time.perf_counter() - start)
    return times


def device_name(device: torch.device | str) -> str:
    """The hardware behind a timing, in words."""
    machine = environment()
    if torch.device(device).type == "cuda":
        return str(machine["gpu"])
    return f"{machine['processor']}, {machine['threads']} threads"


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of tensors made inside and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.known:
                    self._enter(storage)
        return output

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
