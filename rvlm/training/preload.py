"""Imports and other one-time work of the server that training processes are forked from."""

import contextlib
import gc

import rvlm.training.launch  # noqa: F401

with contextlib.suppress(ImportError):
    import torch.utils.tensorboard  # noqa: F401
with contextlib.suppress(ImportError):
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("")  # compiles about a thousand regular expressions
gc.freeze()  # the children's garbage collections pass over all of this
