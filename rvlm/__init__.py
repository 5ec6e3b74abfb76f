"""Robot policies from vision-language models.

`VLA = VLM + action head + history`: any Hugging Face vision-language model becomes a robot policy with
as little change as possible. The modules follow the data, from demonstrations (`rvlm.data.windows`) to
closed-loop success (`rvlm.evaluation.closed_loop`); docs/layout.md lists them. Importing this package loads none of them.
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Libraries read these once, when they are loaded, so import rvlm before torch. Variables that are already set are kept.
for _name, _value in {
    "OMP_WAIT_POLICY": "PASSIVE",  # idle OpenMP threads must not spin: beside another process they are 4 to 10 x slower
    "GOMP_SPINCOUNT": "0",  # the same, for GCC's OpenMP
    "TOKENIZERS_PARALLELISM": "false",  # tokenizers warn after a fork otherwise
    "SVT_LOG": "1",  # silences the AV1 encoder's banner
}.items():
    os.environ.setdefault(_name, _value)

# bitsandbytes logs that the Hub has a faster kernel, which is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Public name -> module or subpackage; each is imported on first access.
_OFFERED = {
    "ActionSpec": "data.actions",
    "EpisodeDataset": "data.dataset",
    "EpisodeWriter": "data.writer",
    "split": "data.windows",
    "make_policy": "policy.factory",
    "load_policy": "policy.policy",
    "Policy": "policy.policy",
    "Stage": "training.stages",
    "train": "training.launch",
    "train_parallel": "training.launch",
    "plan_memory": "training.memory_plan",
    "Evaluation": "evaluation.closed_loop",
    "evaluate": "evaluation.closed_loop",
    "inspect_vlm": "policy.inspection",
    "open_loop": "evaluation",
    "diagnose": "diagnosis.checklist",
    "DiagnosisInputs": "diagnosis.inputs",
    "Tabletop": "envs.tabletop.env",
    "Suite": "envs.suites",
    "load_suite": "envs.suites",
    "recipes": "experiments",
    "plots": "report",
}

if TYPE_CHECKING:
    from rvlm.data.actions import ActionSpec as ActionSpec
    from rvlm.data.dataset import EpisodeDataset as EpisodeDataset
    from rvlm.data.windows import split as split
    from rvlm.data.writer import EpisodeWriter as EpisodeWriter
    from rvlm.diagnosis.checklist import diagnose as diagnose
    from rvlm.diagnosis.inputs import DiagnosisInputs as DiagnosisInputs
    from rvlm.envs.suites import Suite as Suite
    from rvlm.envs.suites import load_suite as load_suite
    from rvlm.envs.tabletop.env import Tabletop as Tabletop
    from rvlm.evaluation import open_loop as open_loop
    from rvlm.evaluation.closed_loop import Evaluation as Evaluation
    from rvlm.evaluation.closed_loop import evaluate as evaluate
    from rvlm.experiments import recipes as recipes
    from rvlm.policy.factory import make_policy as make_policy
    from rvlm.policy.inspection import inspect_vlm as inspect_vlm
    from rvlm.policy.policy import Policy as Policy
    from rvlm.policy.policy import load_policy as load_policy
    from rvlm.report import plots as plots
    from rvlm.training.launch import train as train
    from rvlm.training.launch import train_parallel as train_parallel
    from rvlm.training.memory_plan import plan_memory as plan_memory
    from rvlm.training.stages import Stage as Stage


def __getattr__(name: str) -> Any:
    """Import a public name on first access."""
    if name in _OFFERED:
        module = importlib.import_module(f"rvlm.{_OFFERED[name]}")
        return getattr(module, name) if hasattr(module, name) else importlib.import_module(f"{module.__name__}.{name}")
    raise AttributeError(f"module 'rvlm' has no {name!r}; it offers {', '.join(sorted(_OFFERED))}, and its subpackages")


def __dir__() -> list[str]:
    return sorted([*globals(), *_OFFERED])
