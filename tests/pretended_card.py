"""A device that is not there, for tests of where tensors stand.

Tensors on it say that their device is `CARD`, and compute on the CPU. As on a GPU, an operation on tensors of both devices is an
error, and so is `.numpy()`. PyTorch's name for it is "meta", the one device of a build for CPUs that needs no driver.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("meta:0")
MOVES = ("_to_copy", "to", "copy_", "lift_fresh")  # operations that take tensors of two devices
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")  # by indices that may be on the CPU


class OnCard(torch.Tensor):
    """A tensor on the pretended device; `value` holds its numbers."""

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> "OnCard":
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        with torch.inference_mode(False):  # else a view of a weight would have no version
            made = torch.Tensor._make_wrapper_subclass(cls, value.shape, device=CARD, requires_grad=value.requires_grad, **layout)
        made.value = value
        return made

    def tolist(self) -> Any:
        return self.value.tolist()

    def item(self) -> Any:
        return self.value.item()

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, leaves = func.overloadpacket.__name__, tree_leaves((args, kwargs))
    device = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    is_on_card = any(isinstance(tensor, OnCard) for tensor in tensors)
    if is_on_card and name not in MOVES:
        judged = tensors[:1] if name in INDEXING and isinstance(tensors[0], OnCard) else tensors
        elsewhere = [tensor for tensor in judged if not isinstance(tensor, OnCard) and tensor.ndim]
        if elsewhere:
            shapes = [tuple(tensor.shape) for tensor in elsewhere]
            raise RuntimeError(f"expected all tensors of {name} on {CARD}, got some on the CPU, of shapes {shapes}")
    if name == "copy_":
        is_on_card = isinstance(args[0], OnCard)
    if device is not None:
        is_on_card = device.type == CARD.type
    args, kwargs = tree_map(_on_cpu, (args, kwargs))
    out = func(*args, **kwargs)
    return tree_map(lambda leaf: OnCard(leaf) if is_on_card and isinstance(leaf, torch.Tensor) else leaf, out)


def _on_cpu(leaf: Any) -> Any:
    """What the CPU computes with, of an argument."""
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.value if isinstance(leaf, OnCard) else leaf


class PretendedCard(TorchDispatchMode):
    """Inside it, `CARD` is a device that computes."""

    def __enter__(self) -> "PretendedCard":
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=...)` then moves by an operation, which is seen
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})
