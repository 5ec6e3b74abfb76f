"""The policy that an evaluation evaluates, and the environments in which it acts; both are kept from batch to batch."""

import functools
from typing import Any

from rvlm.data.actions import ActionSpec
from rvlm.envs.suites import Suite, method_of
from rvlm.evaluation.rollouts import RandomPolicy
from rvlm.files import commit_on_hub, model_hash
from rvlm.policy.delayed_policy import NO_DELAY, DelayedPolicy


@functools.lru_cache(maxsize=2)
def _envs(suite: Suite, image_size: Any) -> list:
    """Environments of a suite, kept for the next batch."""
    return []


def device_type(device: str | None) -> str:
    """Where a policy computes if `device` is asked for: "cpu" or "cuda", whose sums round differently."""
    import torch

    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type


def _load_evaluated(evaluation: Any) -> Any:
    """The policy to evaluate; None for the expert."""
    policy, spec = evaluation.policy, evaluation.loaded_suite.spec
    if policy in ("random", "expert"):
        return RandomPolicy(spec) if policy == "random" else None
    chunks = (evaluation.n_action_steps, evaluation.temporal_ensemble_coeff)
    loaded = _load(policy, model_hash(policy), *chunks, spec, evaluation.device)
    delay = (evaluation.execution, evaluation.delay_steps)
    return loaded if delay == NO_DELAY else DelayedPolicy(loaded, *delay)


@functools.lru_cache(maxsize=4)
def _load(
    policy: str,
    content: str,
    n_action_steps: int | None,
    temporal_ensemble_coeff: float | None,
    spec: ActionSpec,
    device: str | None,
) -> Any:
    """A trained policy, loaded again only if its content has changed."""
    from rvlm.policy.policy import load_policy

    return load_policy(
        policy,
        revision=commit_on_hub(policy),
        device=device,
        n_action_steps=n_action_steps,
        temporal_ensemble_coeff=temporal_ensemble_coeff,
        spec=spec,
    )


def policy_and_envs(evaluation: Any, n: int) -> tuple[Any, list]:
    """The policy to evaluate, and n environments at its image size.

    Args:
        evaluation: As of `rvlm.evaluation.closed_loop`.
        n: Episodes to run in step.

    Raises:
        SuiteError: The expert is evaluated in an environment without one, or the environment is not as its suite says.
    """
    policy, suite = _load_evaluated(evaluation), evaluation.loaded_suite
    image_size = getattr(policy, "image_size", None)
    envs = _envs(suite, image_size)
    envs += [suite.make(image_size) for _ in range(n - len(envs))]
    if policy is None:
        method_of(envs[0], "expert_action", "the policy 'expert'")
    return policy, envs[:n]
