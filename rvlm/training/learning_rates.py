"""Learning rates that the library has none of: a schedule in two steps, and one of a part of the weights."""

import math
from collections.abc import Iterable

import torch
from torch.optim.lr_scheduler import MultiStepLR, SequentialLR
from transformers import get_constant_schedule_with_warmup


def set_learning_rate(optimizer: torch.optim.Optimizer, weights: Iterable[torch.nn.Parameter], learning_rate: float) -> None:
    """Move some of an optimizer's weights to groups with this learning rate, behind the others."""
    moved = {id(weight) for weight in weights}
    for group in list(optimizer.param_groups):
        parts: dict[bool, list] = {True: [], False: []}
        for weight in group["params"]:
            parts[id(weight) in moved].append(weight)
        group["params"] = parts[False]
        optimizer.add_param_group({**group, "params": parts[True], "lr": learning_rate})


def step_decay(optimizer: torch.optim.Optimizer, n_warmup: int, n_steps: int) -> SequentialLR:
    """Linear warm-up from 0, then the learning rate, a tenth of it after half of the steps, a hundredth after three quarters."""
    milestones = [math.ceil(n_steps / 2) - n_warmup, math.ceil(3 * n_steps / 4) - n_warmup]
    schedules = [get_constant_schedule_with_warmup(optimizer, n_warmup), MultiStepLR(optimizer, milestones)]
    return SequentialLR(optimizer, schedules, [n_warmup])
