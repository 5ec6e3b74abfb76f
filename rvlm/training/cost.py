"""Memory and FLOPs of forward and backward: on fake tensors, or measured on the device.

Peaks are followed here: `torch.distributed._tools.mem_tracker` (torch 2.13) takes no frozen weights ("cannot register a hook").
"""

import contextlib
import gc
import itertools
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class StepCost(NamedTuple):
    """Cost of one forward and backward: bytes saved for backward, peak bytes, and FLOPs."""

    saved: float
    peak: float
    flops: float


class _PeakMemory(TorchDispatchMode):
    """Tracks the bytes of all live storages that operations inside it return.

    Args:
        not_counted: Storages that are there before, such as weights, of which views are returned.
    """

    def __init__(self, not_counted: Iterable[torch.UntypedStorage]) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._live = {storage._cdata for storage in not_counted}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._live:
            self._live.add(storage._cdata)
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, n_bytes: int) -> None:
        self._live.discard(key)
        self.current -= n_bytes


def profile_forward_backward(model: torch.nn.Module, forward: Callable[[], Any], is_mixed: bool) -> StepCost:
    """Cost of a forward and backward, gradients included; the model's own weights and buffers are not counted.

    Args:
        model: Whose weights are used.
        forward: Computes the output, a tensor.
        is_mixed: Whether under bfloat16 autocast.
    """
    own = [tensor.untyped_storage() for tensor in itertools.chain(model.parameters(), model.buffers())]
    weights, saved = {storage._cdata for storage in own}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with (
        _PeakMemory(own) as memory,
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_mixed),
    ):
        out = forward()
        if out.requires_grad:
            out.sum().backward()
    return StepCost(float(sum(saved.values())), float(memory.peak), float(counter.get_total_flops()))


def materialise_fake(model: torch.nn.Module, frozen: torch.dtype) -> None:
    """Replace meta weights and buffers by fake tensors, frozen weights in type `frozen`; inside a `FakeTensorMode`."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                fake = torch.empty(p.shape, dtype=torch.float32 if p.requires_grad else frozen)
                module._parameters[name] = torch.nn.Parameter(fake, p.requires_grad)
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = torch.zeros(b.shape, dtype=b.dtype)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Redirect file descriptor 2 to /dev/null: the profiler's C++ code writes there, bypassing Python."""
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def synchronized_time() -> float:
    """A clock [s], read once the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_step(step: Callable[[], Any], static_bytes: float) -> dict[str, float]:
    """Peak memory and time of a training step, on the device where it runs.

    Args:
        step: One whole step, optimizer included; run twice as a warm-up.
        static_bytes: Weights and optimizer state [byte]; added on a CPU, where the profiler sees changes only.

    Returns:
        `peak` [byte] and `seconds`.
    """
    for _ in range(2):
        step()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = synchronized_time()
    step()
    seconds = synchronized_time() - start
    if torch.cuda.is_available():
        return {"peak": float(torch.cuda.max_memory_allocated()), "seconds": seconds}
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    results: Any = profiled.profiler
    events = sorted((e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]")
    return {"peak": static_bytes + max(itertools.accumulate(n for _, n in events)), "seconds": seconds}
