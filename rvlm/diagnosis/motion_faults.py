"""Does a robot move as its actions command, dimension by dimension? If not, which common error explains its motion?"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from rvlm.data.actions import ActionSpec, Group
from rvlm.diagnosis.motion import Motion, motion_of

CLEARLY = 0.1  # by how much another reading's correlation must be better to be named
HARDLY_MOVES = 0.05  # of the largest motion of the dimensions of the same unit
OTHER_LAYOUT = {  # layout -> the one of as many numbers for which it may be mistaken
    "axis_angle": "euler_xyz",
    "euler_xyz": "axis_angle",
    "quat_xyzw": "quat_wxyz",
    "quat_wxyz": "quat_xyzw",
}
Episodes = Sequence[tuple[np.ndarray, np.ndarray]]


class Explanation(NamedTuple):
    """What explains the motion.

    Attributes:
        fault: Key of `rvlm.diagnosis.results.FIXES`, or None.
        measured: In words.
        evidence: Ways to read the numbers (`candidate`), and how well each explains the motion.
    """

    fault: str | None
    measured: str
    evidence: pd.DataFrame


def explain_motion(spec: ActionSpec, episodes: Episodes) -> Explanation | None:
    """Compare raw actions (n, a) with the states (n + 1, s) around them; None where the state shows no effect of the actions."""
    motion = motion_of(spec, episodes)
    if motion is None or len(motion.commanded) < 2:
        return None
    errors = _rotation_errors(spec, episodes, motion)
    if still := _still(motion):
        return still
    found = _other_layout(errors, 0.5) or _misread(motion, 0.8) or _swapped(motion) or _opposite(motion)
    found = found or _misread(motion, 0.3) or _of_other_units(motion) or _of_other_zero(motion) or _other_layout(errors, 0.8)
    if found is not None:
        return found
    own = [f"{name} {value:.2f}" for name, value in zip(motion.names, np.diag(_correlations(motion)), strict=True)]
    evidence = pd.DataFrame({"candidate": motion.names, "correlation with its command [1]": np.diag(_correlations(motion))})
    return Explanation(None, f"the robot follows its actions (correlation {', '.join(own)})", evidence)


def explain_predictions(
    spec: ActionSpec, predicted: Float[np.ndarray, "n a"], recorded: Float[np.ndarray, "n a"]
) -> Explanation | None:
    """Compare predicted with recorded raw actions: swapped dimensions, signs, units; None where none of these explains them."""
    predicted, recorded = (values[:, spec.present] - values[:, spec.present].mean(0) for values in (predicted, recorded))
    names = tuple(name for name, is_present in zip(spec.names, spec.present, strict=True) if is_present)
    units = tuple("opening" if i in spec.gripper_indices else spec.units[i] for i in np.flatnonzero(spec.present))
    ones, first = np.ones(len(names), bool), np.arange(len(predicted)) == 0
    motion = Motion(names, units, np.full(len(names), np.inf), ones, ~ones, predicted, recorded, recorded, recorded, first)
    return _swapped(motion) or _opposite(motion) or _of_other_units(motion)


def gain(spec: ActionSpec, episodes: Episodes) -> float:
    """How far displacements move the robot, as a share of what they command: 1 where it obeys; NaN where there are none."""
    motion = motion_of(spec, episodes)
    motion = None if motion is None else motion.of(motion.is_delta & ~motion.is_rotation)
    if motion is None or not motion.names:
        return float("nan")
    return float((motion.commanded * motion.moved).sum() / max((motion.commanded**2).sum(), 1e-12))


def _correlations(motion: Motion) -> Float[np.ndarray, "d d"]:
    """Correlation of each dimension's commands (rows) with each dimension's motion: displacements, or positions to reach."""
    with_moved = _cosines(motion.commanded, motion.moved)
    with_position = _cosines(_centred(motion.commanded, motion), _centred(motion.after, motion))
    return np.where(motion.is_delta, with_moved, with_position)


def _cosines(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "d e"]:
    """Cosine of the angle between each column of one array and each of another; 0 for a column of zeros."""
    lengths = np.sqrt((a**2).sum(0))[:, None] * np.sqrt((b**2).sum(0))
    return a.T @ b / np.maximum(lengths, 1e-12)


def _alike(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine between two arrays of the same shape, each flattened to one vector: 1 where all rows point the same way."""
    return float(_cosines(a.reshape(-1, 1), b.reshape(-1, 1))[0, 0])


def _centred(values: np.ndarray, motion: Motion) -> np.ndarray:
    """Less the mean of each episode."""
    return values - pd.DataFrame(values).groupby(motion.episode).transform("mean").to_numpy()


def _moves(motion: Motion) -> np.ndarray:
    """(2, d) bool: whether each dimension's commands, and its motion, are more than noise."""
    out = []
    for values in (motion.commanded, motion.effect):
        size = np.sqrt((np.where(motion.is_delta, values, _centred(values, motion)) ** 2).mean(0))
        largest = np.array([size[[other == unit for other in motion.units]].max() for unit in motion.units])
        out.append(size > np.maximum(HARDLY_MOVES * largest, 1e-9))
    return np.array(out)


def _still(motion: Motion) -> Explanation | None:
    """Dimensions whose state is constant though they are commanded to move; or all, where nothing is commanded either."""
    moved = np.ptp(motion.after, axis=0) + np.abs(motion.moved).max(0)
    is_still = moved < 1e-6
    is_dead = is_still if is_still.all() else is_still & _moves(motion)[0]
    if not is_dead.any():
        return None
    evidence = pd.DataFrame({"candidate": motion.names, "largest motion": moved})
    how = "though their commands change" if _moves(motion)[0][is_dead].any() else "and their commands too"
    return Explanation("state does not move", f"constant in all frames, {how}: {', '.join(motion.of(is_dead).names)}", evidence)


def _swapped(motion: Motion) -> Explanation | None:
    """Dimensions whose commands move another dimension."""
    chosen = motion.of(_moves(motion).any(0))
    found, n = np.abs(_correlations(chosen)), len(chosen.names)
    best = linear_sum_assignment(-found)[1]
    changed = np.flatnonzero(best != np.arange(n))
    if not len(changed) or (found[changed, best[changed]] - found[changed, changed]).mean() < 0.25:
        return None
    i = changed[np.argmax(found[changed, best[changed]])]
    if found[i, best[i]] < 0.7:
        return None
    pairs = ", ".join(f"{chosen.names[k]} moves {chosen.names[best[k]]} ({found[k, best[k]]:.2f})" for k in changed)
    own = ", ".join(f"{found[k, k]:.2f}" for k in changed)
    evidence = pd.DataFrame({"candidate": chosen.names, f"correlation with {chosen.names[i]} [1]": found[i]})
    return Explanation("dimensions swapped", f"{pairs}; correlation with their own motion {own}", evidence)


def _opposite(motion: Motion) -> Explanation | None:
    """Dimensions that move against their commands."""
    chosen = motion.of(_moves(motion).all(0))
    own = np.diag(_correlations(chosen))
    against = own < np.where(chosen.is_gripper, -CLEARLY, -0.4)
    if not against.any():
        return None
    evidence = pd.DataFrame({"candidate": chosen.names, "correlation with its command [1]": own})
    names = ", ".join(f"{name} ({value:.2f})" for name, value in zip(chosen.of(against).names, own[against], strict=True))
    if chosen.is_gripper[against].all():
        return Explanation("gripper sign", f"fingers close where the card says open: {names}", evidence)
    return Explanation("sign of a dimension", f"moves against its commands: {names}", evidence)


def _misread(motion: Motion, at_least: float) -> Explanation | None:
    """Commands that correlate better, and at least so much, with the motion if read in another way."""
    is_straight = ~motion.is_rotation & ~motion.is_gripper
    delta, target = (motion.of(is_straight & (motion.is_delta == is_delta)) for is_delta in (True, False))
    if not is_straight.any():
        return None
    readings = _of_displacements(delta) if len(delta.names) >= len(target.names) else _of_targets(target)
    own, *others = readings
    best = max(others, key=readings.__getitem__)
    if readings[best] < max(readings[own] + CLEARLY, at_least):
        return None
    evidence = pd.DataFrame({"candidate": list(readings), "correlation with the motion [1]": list(readings.values())})
    measured = f"correlation of actions and motion {readings[own]:.2f} {own}, {readings[best]:.2f}: {best}"
    return Explanation(best, measured, evidence)


def _of_displacements(motion: Motion) -> dict[str, float]:
    later = ~motion.is_first[1:]
    commanded, moved = motion.commanded, motion.moved
    return {
        "as displacement": _alike(commanded, moved),
        "absolute read as delta": _alike(_centred(commanded, motion), motion.after),
        "delta taken twice": _alike(commanded[1:][later], (moved[1:] - moved[:-1])[later]),
        "actions shifted by a step": _alike(commanded[1:][later], moved[:-1][later]),
    }


def _of_targets(motion: Motion) -> dict[str, float]:
    """Positions of neighbouring steps are alike: a target that is nearer to the position before its step belongs to that one."""
    target, before, after = (_centred(values, motion) for values in (motion.commanded, motion.before, motion.after))
    is_late = np.abs(target - before).mean() < 0.95 * np.abs(target - after).mean()
    as_target = _alike(target, after)
    return {
        "as target": as_target,
        "delta read as absolute": _alike(target, _centred(motion.moved, motion)),
        "actions shifted by a step": as_target + CLEARLY if is_late else 0.0,
    }


def _of_other_units(motion: Motion) -> Explanation | None:
    """Commands that are ten times the motion or more, or a tenth of it or less."""
    centred = [np.where(motion.is_delta, values, _centred(values, motion)) for values in (motion.commanded, motion.effect)]
    for unit in dict.fromkeys(unit for unit in motion.units if unit != "opening"):
        commanded, effect = (values[:, [other == unit for other in motion.units]] for values in centred)
        factor = (commanded * effect).sum() / max((effect**2).sum(), 1e-12)
        if _alike(commanded, effect) > 0.5 and not 0.1 < factor < 10:
            sizes = [np.abs(commanded).mean(), np.abs(effect).mean()]
            evidence = pd.DataFrame({"candidate": ["commands", "motion"], f"mean size [{unit}]": sizes})
            return Explanation("units", f"commands in {unit} are {factor:.3g} times the motion", evidence)
    return None


def _of_other_zero(motion: Motion) -> Explanation | None:
    """Targets at a distance from which the robot does not come nearer: a tenth of its largest motion, or of its range.

    A robot that follows its targets late is far from them while it moves, and reaches them where it stands: what is left at
    speed 0 of a line through distance and displacement.
    """
    chosen = motion.of(~motion.is_delta & ~motion.is_rotation & ~motion.is_gripper)
    if not chosen.names:
        return None
    distance, speed = chosen.commanded - chosen.after, chosen.moved - chosen.moved.mean(0)
    slope = (distance * speed).sum(0) / np.maximum((speed**2).sum(0), 1e-12)
    off = np.abs(distance.mean(0) - slope * chosen.moved.mean(0))
    reach = np.ptp(chosen.after, axis=0)
    reach = np.array([reach[[other == unit for other in chosen.units]].max() for unit in chosen.units])
    share = off / np.maximum(0.1 * np.minimum(reach, chosen.spans), 1e-9)
    if share.max() < 1:
        return None
    i, column = share.argmax(), "distance from its target [motion of the robot]"
    evidence = pd.DataFrame({"candidate": chosen.names, column: off / np.maximum(reach, 1e-9)})
    measured = f"{chosen.names[i]} stays {off[i]:.3g} {chosen.units[i]} from its targets, of {reach[i]:.3g} that the robot moves"
    return Explanation("zero of a dimension", measured, evidence)


def _rotation_errors(spec: ActionSpec, episodes: Episodes, motion: Motion) -> dict[str, float]:
    """Mean difference of commanded and observed rotation [rad] in the card's layouts, and in others."""
    errors = {"as in the card": _rotation_error(motion)}
    if not motion.is_rotation.any():
        return errors
    for side, groups in (("action", spec.action), ("state", spec.state)):
        for i, group in enumerate(groups):
            if layout := OTHER_LAYOUT.get(group.rotation or ""):
                read = (*groups[:i], _read_as(group, layout), *groups[i + 1 :])
                other = motion_of(dataclasses.replace(spec, **{side: read}), episodes)
                errors[f"{side} as {layout}"] = np.inf if other is None else _rotation_error(other)
    return errors


def _read_as(group: Group, layout: str) -> Group:
    """The group with the numbers of its rotation in another layout; names of a quaternion in that one's order."""
    straight, turned = group.names[: group.n_position], group.names[group.n_position :]
    if layout.startswith("quat"):
        turned = (*turned[-1:], *turned[:-1]) if layout == "quat_wxyz" else (*turned[1:], *turned[:1])
    return dataclasses.replace(group, rotation=layout, names=straight + turned)


def _rotation_error(motion: Motion) -> float:
    off = (motion.commanded - motion.effect)[:, motion.is_rotation]
    return float(np.linalg.norm(off.reshape(len(off), -1, 3), axis=-1).mean()) if off.size else 0.0


def _other_layout(errors: dict[str, float], share: float) -> Explanation | None:
    """Rotations that agree better when read in another layout: less than a share of the error that they have in the card's."""
    best, own = min(errors, key=errors.__getitem__), errors["as in the card"]
    if errors[best] >= share * own:
        return None
    evidence = pd.DataFrame({"candidate": list(errors), "rotation error [rad]": list(errors.values())})
    fault = "quaternion order" if "quat" in best else "rotation layout"
    return Explanation(fault, f"rotations are off by {own:.3f} rad; {best}, by {errors[best]:.3f} rad", evidence)
