"""Why is my success 0 %? A ladder from the data to the closed loop; the first rung that breaks names the fault and the mend.

Every rung asks one question that can be answered without the rungs above it: does the data follow its card, do the hand's
moves follow the commands, do the policy's statistics belong to this data, do policy, data and environment speak alike, does
the environment show what was recorded, does it do what was recorded, and is the policy right on frames that it was trained
on? Where the answer is no, the rung tries what people commonly get wrong, and names what would make it yes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation
from torch.utils.data import Subset

from rvlm.data.actions import NormStats, SpecMismatch, StatsAccumulator
from rvlm.data.cards import IMAGE_KEYS
from rvlm.diagnosis.cases import Check, DiagnosisInputs
from rvlm.evaluation.open_loop import policy_windows, predict_chunks

MAX_EPISODES = 100  # training episodes where numbers alone are looked at

IMAGE_ERRORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # what is done to images (..., h, w, 3) by mistake
    "image rotated by 180 degrees": lambda images: images[..., ::-1, ::-1, :],
    "image upside down": lambda images: images[..., ::-1, :, :],
    "image mirrored": lambda images: images[..., ::-1, :],
    "channels reversed": lambda images: images[..., ::-1],
}


def diagnose(case: DiagnosisInputs) -> list[Check]:
    """Climb the ladder up to the first rung that breaks; all rungs hold where no fault was found."""
    rungs: list[Check] = []
    for climb in CHECKS.values():
        rungs.append(climb(case))
        if rungs[-1].fault:
            break
    return rungs


def verdict(rungs: Iterable[Check]) -> str | None:
    """The fault that the ladder names, or None."""
    return next((rung.fault for rung in rungs if rung.fault), None)


# -- the data alone ----------------------------------------------------------------------------------------------------
def check_card(case: DiagnosisInputs) -> Check:
    """Do the demonstrations follow their card: range, rate, rotations?"""
    spec = case.dataset.require_spec()
    told = f"{case.dataset.n_frames} frames at {case.dataset.fps:g} Hz follow card {spec.dataset!r}"
    try:
        spec.check(case.dataset.column("action"))
    except SpecMismatch as error:
        return Check("contract", str(error), "actions outside of the card")
    if abs(case.dataset.fps - spec.rate_hz) > 0.01 * spec.rate_hz:
        return Check("contract", f"data at {case.dataset.fps:g} Hz, card at {spec.rate_hz:g} Hz", "control rate")
    if spec.state_rotation.startswith("quat"):
        return _quaternions(case, told)
    return Check("contract", told)


def _quaternions(case: DiagnosisInputs, told: str) -> Check:
    """Signs and order of the state's quaternions, from turns that are small from one step to the next."""
    spec = case.dataset.require_spec()
    at = next(i for i, name in enumerate(spec.state_names) if name.startswith("q"))
    scalar_last = spec.state_rotation == "quat_xyzw"
    dots, wrong = [], []
    for episode in map(int, case.train()[:MAX_EPISODES]):
        q = case.dataset.column("observation.state")[case.rows(episode)][:, at : at + 4]
        dots.append((q[1:] * q[:-1]).sum(1))
        wrong.append(_residual(q, spec, case.commands(episode), scalar_last))
    if np.concatenate(dots).min() < 0:
        return Check("contract", f"{(np.concatenate(dots) < 0).sum()} times the quaternion's sign jumps", "quaternion sign")
    said, other = np.mean(wrong, axis=0)
    evidence = pd.DataFrame({"candidate": ["as the card says", "the other order"], "turn unexplained [rad]": [said, other]})
    if other < 0.8 * said:
        told = f"commanded turns explain the quaternions in the other order ({other:.3f} rad beside {said:.3f})"
        return Check("contract", told, "quaternion order", evidence)
    return Check("contract", told, evidence=evidence)


def _residual(q: np.ndarray, spec: Any, commands: np.ndarray, scalar_last: bool) -> tuple[float, float]:
    """Mean angle [rad] between the turn that was commanded and the one that was felt, with q read as (x, y, z, w) or not."""
    commanded = Rotation.from_rotvec(spec.to_si(commands[:-1], *spec.names[3:6]))
    errors = []
    for is_last in (scalar_last, not scalar_last):
        felt = Rotation.from_quat(q, scalar_first=not is_last)
        errors.append(float((felt[1:] * felt[:-1].inv() * commanded.inv()).magnitude().mean()))
    return errors[0], errors[1]


def motion(case: DiagnosisInputs) -> Check:
    """Does the hand move as it is told, by the recorded state alone?"""
    spec, state = case.dataset.require_spec(), case.dataset.column("observation.state")
    names = list(spec.state_names)
    if spec.names[:3] != ("dx", "dy", "dz") or not {"x", "y", "z"} <= set(names):
        return Check("motion", "not asked: the state does not hold the hand's position")
    at, told, moved, reached = [names.index(n) for n in "xyz"], [], [], []
    later, changed, opens, opening = [], [], [], []
    for episode in map(int, case.train()[:MAX_EPISODES]):
        felt, command = state[case.rows(episode)], case.commands(episode)
        said = spec.to_si(command[:-1], "dx", "dy", "dz")
        told.append(said)
        moved.append(np.diff(felt[:, at], axis=0))
        reached.append(felt[1:, at] - felt[:, at].mean(0))
        later.append(said[1:])
        changed.append(np.diff(felt[:, at], n=2, axis=0))
        opens.append(spec.is_open(command[:-1]))
        opening.append(felt[1:, -1])
    said, step = np.concatenate(told), np.concatenate(moved)
    is_displacement = _cosine_similarity(said, step)
    candidates = {
        "as displacement": is_displacement,
        "absolute read as delta": _cosine_similarity(said - said.mean(0), np.concatenate(reached)),
        "delta taken twice": _cosine_similarity(np.concatenate(later), np.concatenate(changed)),
    }
    evidence = pd.DataFrame({"candidate": list(candidates), "correlation with the hand's motion [1]": list(candidates.values())})
    best = max(candidates, key=candidates.__getitem__)
    if spec.is_delta and best != "as displacement" and candidates[best] > is_displacement + 0.1:
        measured = f"commands as displacements correlate {is_displacement:.2f} with the hand's, {best} {candidates[best]:.2f}"
        return Check("motion", measured, best, evidence)
    follows = _cosine_similarity(
        np.concatenate(opens)[:, None] - 0.5, np.concatenate(opening)[:, None] - np.mean(np.concatenate(opening))
    )
    if follows < -0.1:
        return Check("motion", f"fingers close where the card says open (correlation {follows:.2f})", "gripper sign", evidence)
    measured = f"the hand follows the commands (correlation {is_displacement:.2f}), fingers too ({follows:.2f})"
    return Check("motion", measured, evidence=evidence)


def _cosine_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine between two sets of vectors (n, m), taken as one: 1 for the same direction everywhere."""
    return float((a * b).sum() / max(np.sqrt((a**2).sum() * (b**2).sum()), 1e-12))


# -- the policy beside the data ----------------------------------------------------------------------------------------
def own_statistics(case: DiagnosisInputs) -> Check:
    """Do the policy's statistics belong to the training episodes of this data?"""
    mine, action, episode = case.policy.robot.stats["action"], case.dataset.column("action"), case.dataset.episode_of_frame
    is_training = np.isin(episode, case.train())
    own = StatsAccumulator().update(action[is_training]).finish(mine.kind, mine.passthrough, mine.floor)
    every = StatsAccumulator().update(action).finish(mine.kind, mine.passthrough, mine.floor)
    away = {"training episodes": _distance(mine, own), "envelopes": _distance(mine, widest_quantiles(own, case))}
    evidence = pd.DataFrame({"candidate": list(away), "difference in scale [1]": list(away.values())})
    if mine.count == every.count and _distance(mine, every) < 1e-6 < _distance(mine, own):
        return Check("statistics", f"made of all {mine.count} frames", "statistics of all episodes", evidence)
    if away["envelopes"] < 0.1 * away["training episodes"]:
        return Check("statistics", "quantiles are the widest of single episodes", "quantiles merged as envelopes", evidence)
    if away["training episodes"] > (0.4 if mine.count != own.count else 1e-3):
        measured = f"scales differ by {away['training episodes']:.0%} from those of this data's training episodes"
        return Check("statistics", measured, "statistics of another dataset", evidence)
    return Check("statistics", f"scales within {away['training episodes']:.0%} of this data's", evidence=evidence)


def widest_quantiles(stats: NormStats, case: DiagnosisInputs) -> NormStats:
    """Statistics whose quantiles are the widest of the training episodes' own, as a careless merge makes them."""
    action = case.dataset.column("action")
    ends = np.array([np.quantile(action[case.rows(e)], (0.01, 0.99), axis=0) for e in map(int, case.train())])
    return dataclasses.replace(stats, q01=ends[:, 0].min(0), q99=ends[:, 1].max(0))


def _distance(a: NormStats, b: NormStats) -> float:
    """Largest relative difference in scale, or in offset by scale, of q01 to q99; which kind is in use is another question."""
    ends = [dataclasses.replace(stats, kind="q01_q99").offset_and_scale() for stats in (a, b)]
    (offset_a, scale_a), (offset_b, scale_b) = ends
    return float((np.maximum(np.abs(scale_a - scale_b), np.abs(offset_a - offset_b) / 2) / np.maximum(scale_a, scale_b)).max())


def interface(case: DiagnosisInputs) -> Check:
    """Do policy, data and environment speak the same conventions, and is the policy run as it was made to be?"""
    policy, model, env = case.policy, case.policy.model, case.env.unwrapped
    for other, what in ((case.dataset.require_spec(), "policy vs data"), (env.action_spec, "policy vs environment")):
        try:
            policy.robot.spec.require_same(other, what)
        except SpecMismatch as error:
            return Check("interface", str(error), "conventions differ")
    made_for = model.config.n_action_steps
    if policy.n_action_steps != made_for:
        measured = f"executes {policy.n_action_steps} of {model.config.chunk_size} actions, made to execute {made_for}"
        return Check("interface", measured, "chunk execution")
    longest = float(np.quantile(case.dataset.episodes["length"].to_numpy(), 0.95))
    limit = getattr(env, "max_steps", None)
    if limit is not None and limit < longest:
        return Check("interface", f"{limit} steps allowed, 95 % of demonstrations took up to {longest:.0f}", "time limit")
    return Check("interface", f"conventions agree; {limit} steps allowed, demonstrations took up to {longest:.0f}")


def check_resets(case: DiagnosisInputs) -> Check:
    """Do episodes with different seeds begin differently, and are instructions those of the data?"""
    first = [case.env.reset(seed=seed)[0] for seed in (1, 2, 3)]
    if all(np.array_equal(first[0]["state"], o["state"]) and np.array_equal(first[0]["image"], o["image"]) for o in first):
        return Check("starts", "three seeds gave one and the same start", "same start")
    for episode in case.episodes():
        observation, recorded = case.start(episode), case.dataset.instruction(episode)
        if observation is None:
            return Check("starts", "seeds give different starts; how the data's episodes began was not recorded")
        if observation["instruction"] != recorded:
            return Check("starts", f"the data says {recorded!r}, the environment {observation['instruction']!r}", "prompt")
    return Check("starts", f"seeds give different starts; {case.n_episodes} instructions are the data's, word for word")


# -- the environment beside the data -----------------------------------------------------------------------------------
def check_images(case: DiagnosisInputs) -> Check:
    """Does the environment show what was recorded?"""
    cameras = case.policy.model.config.cameras
    recorded, seen = [], []
    cache = case.dataset.frames_cache(cameras)
    for episode in case.episodes():
        observation = case.start(episode)
        if observation is None:
            return Check("pictures", "not asked: how the data's episodes began was not recorded")
        recorded.append([cache[c][case.rows(episode).start] for c in cameras])
        seen.append([observation[IMAGE_KEYS[c]] for c in cameras])
    theirs, ours = np.array(recorded, np.float32), np.array(seen, np.float32)  # (n, cameras, h, w, 3)
    for where, images in (("the data", theirs), ("the environment", ours)):
        if images.std(axis=(0, 2, 3, 4)).min() < 1:
            return Check("pictures", f"a camera of {where} shows nothing", "image missing")
    candidates = {"as they are": ours, **{name: turn(ours) for name, turn in IMAGE_ERRORS.items()}}
    if len(cameras) > 1:
        candidates["cameras swapped"] = ours[:, ::-1]
    away = {name: float(np.abs(images - theirs).mean()) for name, images in candidates.items()}
    best = min(away, key=away.__getitem__)
    evidence = pd.DataFrame({"candidate": list(away), "difference [gray levels]": list(away.values())})
    measured = f"{best} they differ by {away[best]:.1f} gray levels, as they are by {away['as they are']:.1f}"
    return Check("pictures", measured, None if best == "as they are" else best, evidence)


def replay(case: DiagnosisInputs) -> Check:
    """Does the environment do what was recorded, when it is given the recorded actions?"""
    if case.start(case.episodes()[0]) is None:
        return Check("replay", "not asked: how the data's episodes began was not recorded")
    away = {"as recorded": _replayed(case, lambda spec, a: a)}
    if away["as recorded"] > 0.01:
        away |= {name: _replayed(case, change) for name, change in MISREADINGS.items()}
    best = min(away, key=away.__getitem__)
    evidence = pd.DataFrame(
        {"candidate": list(away), "distance from the recorded way [spread of the state]": list(away.values())}
    )
    if away["as recorded"] <= 0.01:
        measured = f"recorded actions lead along the recorded way (off by {away['as recorded']:.4f} of the state's spread)"
        return Check("replay", measured, evidence=evidence)
    measured = f"off by {away['as recorded']:.2f} of the state's spread; {best}: {away[best]:.2f}"
    is_explained = best != "as recorded" and away[best] < 0.7 * away["as recorded"]
    return Check("replay", measured, best.split(":")[0] if is_explained else "environment unlike the recording", evidence)


def _turned(spec: Any, actions: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    scale, out = np.asarray(spec.scale[3:6]), actions.copy()
    out[:, 3:6] = change(actions[:, 3:6] * scale) / scale
    return out


def _arm(spec: Any, actions: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([change(actions[:, spec.arm_slice]), actions[:, spec.arm_slice.stop :]], axis=1)


MISREADINGS: dict[str, Callable[[Any, np.ndarray], np.ndarray]] = {  # fault: how -> actions (n, a) as they were meant
    "gripper sign": lambda spec, a: spec.set_gripper(a, ~spec.is_open(a)),
    "rotation layout: stored as euler angles": lambda spec, a: _turned(
        spec, a, lambda euler: Rotation.from_euler("xyz", euler).as_rotvec()
    ),
    "rotation layout: stored as axis angle": lambda spec, a: _turned(
        spec, a, lambda vector: Rotation.from_rotvec(vector).as_euler("xyz")
    ),
    "control rate: too slow": lambda spec, a: _arm(spec, a, lambda arm: 0.5 * arm),
    "control rate: too fast": lambda spec, a: _arm(spec, a, lambda arm: 2 * arm),
    "delta taken twice": lambda spec, a: _arm(spec, a, lambda arm: np.cumsum(arm, axis=0)),
}


def _replayed(case: DiagnosisInputs, change: Callable[[Any, np.ndarray], np.ndarray]) -> float:
    """How far from the recorded states the recorded actions lead: root mean square, in units of each dimension's spread."""
    spec, state = case.dataset.require_spec(), case.dataset.column("observation.state")
    spread, off = np.maximum(state.std(0), 1e-6), []
    for episode in case.episodes():
        case.start(episode)
        for action, felt in zip(change(spec, case.commands(episode))[:-1], state[case.rows(episode)][1:], strict=True):
            observation, _, is_over, is_cut, _ = case.env.step(action)
            off.append((observation["state"] - felt) / spread)
            if is_over or is_cut:
                break
    return float(np.sqrt(np.mean(np.square(off))))


# -- the policy on what it has seen ------------------------------------------------------------------------------------
def on_training_frames(case: DiagnosisInputs) -> Check:
    """Is the policy right on frames that it was trained on, and would it be if something were read otherwise?"""
    spec, stats = case.policy.robot.spec, case.policy.robot.stats["action"]
    every = policy_windows(case.policy, case.dataset, case.episodes())
    windows = Subset(every, range(min(len(every), case.n_frames)))
    spread = np.maximum(case.dataset.column("action").std(0), 1e-6)
    arm = spec.present & (np.arange(spec.n_dims) != spec.gripper_index)

    def off(told: dict[str, np.ndarray], kind: str = stats.kind) -> float:
        predicted = dataclasses.replace(stats, kind=kind).unnormalize(stats.normalize(told["predicted"][:, 0]))
        wrong = np.abs(predicted - told["recorded"][:, 0])[:, arm] / spread[arm]
        return float(wrong.mean())

    plain = predict_chunks(case.policy, windows)
    away = {"as it is": off(plain)}
    away |= {f"statistics kind: {kind}": off(plain, kind) for kind in ("q01_q99", "min_max", "mean_std") if kind != stats.kind}
    for name, turn in IMAGE_ERRORS.items():
        away[name] = off(predict_chunks(case.policy, windows, lambda samples, turn=turn: _with_images(samples, turn)))
    if len(case.policy.model.config.cameras) > 1:
        swapped = predict_chunks(case.policy, windows, lambda samples: _with_images(samples, lambda images: images[:, ::-1]))
        away["cameras swapped"] = off(swapped)
    first = plain["recorded"][:, 0]
    away["always the mean action"] = float((np.abs(first - first.mean(0))[:, arm] / spread[arm]).mean())
    column = "error of the first action [spread of the actions]"
    evidence = pd.DataFrame({"candidate": list(away), column: list(away.values())})
    mean, best = away.pop("always the mean action"), min(away, key=away.__getitem__)
    measured = f"first action off by {away['as it is']:.2f} of the actions' spread, always the mean action by {mean:.2f}"
    if best != "as it is" and away[best] < 0.9 * away["as it is"]:
        return Check("open loop", f"{measured}; {best}: {away[best]:.2f}", best.split(":")[0], evidence)
    return Check("open loop", measured, None if away["as it is"] < 0.9 * mean else "not learned", evidence)


def _with_images(samples: Sequence[dict], turn: Callable[[np.ndarray], np.ndarray]) -> list[dict]:
    return [{**sample, "images": np.ascontiguousarray(turn(sample["images"]))} for sample in samples]


CHECKS: dict[str, Callable[[DiagnosisInputs], Check]] = {
    "contract": check_card,
    "motion": motion,
    "statistics": own_statistics,
    "interface": interface,
    "starts": check_resets,
    "pictures": check_images,
    "replay": replay,
    "open loop": on_training_frames,
}
