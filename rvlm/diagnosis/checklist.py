"""Why is my success 0 %? Checks from the data to the closed loop; the first failing check names the fault and its fix.

Every check asks one question and relies on the checks before it alone: does the data follow its card, does the hand move as
commanded, are the policy's statistics those of this data, do policy, data and environment use the same conventions, does the
environment show what was recorded, does it do what was recorded, and is the policy right on frames that it was trained on? A
failing check tries the common errors, and names the one that explains what was measured.
"""

from collections.abc import Callable, Iterable

from rvlm.diagnosis.data_checks import check_demonstrations, check_motion
from rvlm.diagnosis.env_checks import check_images, check_replay, check_resets
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.policy_checks import check_interface, check_open_loop, check_statistics
from rvlm.diagnosis.results import CheckResult

CHECKS: dict[str, Callable[[DiagnosisInputs], CheckResult]] = {  # in the order in which they run
    "data card": check_demonstrations,
    "motion": check_motion,
    "statistics": check_statistics,
    "interface": check_interface,
    "resets": check_resets,
    "images": check_images,
    "replay": check_replay,
    "open loop": check_open_loop,
}


def diagnose(inputs: DiagnosisInputs) -> list[CheckResult]:
    """Run the checks in order up to the first that fails; all pass where no fault was found.

    Example:
        >>> data, env = rvlm.EpisodeDataset("demonstrations"), rvlm.Tabletop(image_size=48)
        >>> model, processor = rvlm.make_policy("vlm", data.spec, data.stats())
        >>> results = rvlm.diagnose(rvlm.DiagnosisInputs(rvlm.Policy(model, processor), data, env))
        >>> results[-1].fault is None
        False
    """
    results: list[CheckResult] = []
    for check in CHECKS.values():
        results.append(check(inputs))
        if results[-1].fault:
            break
    return results


def first_fault(results: Iterable[CheckResult]) -> str | None:
    """The fault that the first failing check names, or None."""
    return next((result.fault for result in results if result.fault), None)
