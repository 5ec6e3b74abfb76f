"""Memory and FLOPs of forward and backward: on fake tensors, or measured on the device."""

import contextlib
import gc
import itertools
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class _Peak(TorchDispatchMode):
    """Follows how many bytes are alive of all that is made inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._alive:
            self._alive.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, n_bytes: int) -> None:
        self._alive.discard(key)
        self.now -= n_bytes


def profile_forward_backward(model: torch.nn.Module, call: Callable[[], Any], is_mixed: bool) -> tuple[float, float, float]:
    """Bytes saved for backward, peak bytes during forward and backward, and FLOPs; weights are not counted, gradients are."""
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with (
        _Peak() as followed,
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_mixed),
    ):
        out = call()
        if out.requires_grad:
            out.sum().backward()
    return float(sum(kept.values())), float(followed.peak), float(counter.get_total_flops())


def materialise_fake(model: torch.nn.Module, frozen: torch.dtype) -> None:
    """Replace meta weights and buffers by fake tensors; inside a `FakeTensorMode`."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                made = torch.empty(p.shape, dtype=torch.float32 if p.requires_grad else frozen)
                module._parameters[name] = torch.nn.Parameter(made, p.requires_grad)
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = torch.zeros(b.shape, dtype=b.dtype)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Point file descriptor 2 at nothing: the profiler's C++ writes lines of its own there, past Python."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def measure_step(step: Callable[[], Any], held: float) -> dict[str, float]:
    """Peak memory and time of a training step, on the device where it runs.

    Args:
        step: One whole step, optimizer included; it is taken twice before it is measured.
        held: What lies there between steps: weights and optimizer [byte]; counted where only changes can be measured (CPU).

    Returns:
        `peak` [byte] and `seconds`.
    """
    for _ in range(2):
        step()
    gc.collect()
    start = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return {"peak": float(torch.cuda.max_memory_allocated()), "seconds": time.perf_counter() - start}
    step()
    seconds = time.perf_counter() - start
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    results: Any = profiled.profiler
    events = sorted((e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]")
    return {"peak": held + max(itertools.accumulate(n for _, n in events)), "seconds": seconds}
