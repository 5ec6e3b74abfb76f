"""Policies of several threads over one model: what changes the backbone for a forward pass must not reach another's pass."""

import threading
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")
# Backbone -> its own; a model is copied without.
_LOCKS: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()


def one_at_a_time(method: Callable[..., T]) -> Callable[..., T]:
    """A method of an object with a `model`, which waits while such a method runs over the same backbone in another thread.

    Hooks that add to the embedding of `<act>`, and the positions that some families keep, belong to one forward pass.
    """

    @wraps(method)
    def waiting(self: Any, *args: Any) -> T:
        with _LOCKS.setdefault(self.model.backbone, threading.Lock()):
            return method(self, *args)

    return waiting
