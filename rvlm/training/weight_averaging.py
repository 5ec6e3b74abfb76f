"""An exponential moving average (EMA) of the trained weights, which is saved instead of the last step's.

Source: Polyak and Juditsky 1992; for policies, Diffusion Policy (Chi et al. 2023, arXiv 2303.04137); warm-up of the decay, as of
TensorFlow's `ExponentialMovingAverage`.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

AVERAGE = "ema.safetensors"  # in a checkpoint


class EMACallback(TrainerCallback):
    """Averages the trained weights after every update of a `transformers.Trainer`; frozen weights are not copied.

    Args:
        decay: Weight of the average so far, against the newest weights; of the n-th update at most (1 + n) / (10 + n).
        checkpoint: That the training resumes from; its average is continued.
    """

    def __init__(self, decay: float, checkpoint: str | None) -> None:
        self.decay, self.checkpoint = decay, checkpoint
        self._trained: Any = None
        self._average: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Begin with the weights of the first update, or go on where the checkpoint was."""
        self._trained = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
        self._average = AveragedModel(self._trained, multi_avg_fn=self._update)
        if self.checkpoint is not None:
            self._average.load_state_dict(load_file(Path(self.checkpoint) / AVERAGE))

    def _update(self, average: Any, newest: Any, n: Any) -> None:
        """The average after its n-th update; at first its decay is smaller, or it would stay at the first weights."""
        decay = min(self.decay, (1 + int(n)) / (10 + int(n)))
        get_ema_multi_avg_fn(decay)(average, newest, n)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Update the average."""
        self._average.update_parameters(self._trained)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the average to this step's checkpoint."""
        if args.should_save:
            save_file(self._average.state_dict(), Path(args.output_dir) / f"checkpoint-{state.global_step}" / AVERAGE)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Replace the trained weights of the model by their average."""
        for weight, average in zip(self._trained.parameters(), self._average.parameters(), strict=True):
            weight.copy_(average)
