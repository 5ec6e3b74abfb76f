"""Control steps per second of the tabletop on one core: physics alone, with one 64 px image, and as used (two at 96 px).

The variants run in turn in one process, and CPU time is measured, so other load disturbs them little and alike.
Prints the median over rounds with its range, and each variant's cost as a multiple of physics alone.
"""

import os
import time

import numpy as np

from rvlm.envs.tabletop.env import Tabletop

N_ROUNDS, N_STEPS = 12, 150


class NoFrame(Tabletop):
    """Physics and state alone."""

    def _observe(self):
        return {"state": self.world.state()}


class OneFrame(Tabletop):
    """One small image per step."""

    def _observe(self):
        return {"images": {"static": self.image("static", 64)}, "state": self.world.state()}


def steps_per_second(env, seed):
    """Control steps per second of CPU time, without resets."""
    env.reset(seed=seed)
    spent = 0.0
    for _ in range(N_STEPS):
        action = env.expert_action()
        started = time.process_time()
        is_over = env.step(action)[2]
        spent += time.process_time() - started
        if is_over:
            env.reset(seed=seed)
    return N_STEPS / spent


def main():
    variants = {"physics alone": NoFrame, "one 64 px frame": OneFrame, "two 96 px frames": Tabletop}
    envs = {name: kind("franka7", max_steps=10_000) for name, kind in variants.items()}
    rounds = [{name: steps_per_second(env, seed) for name, env in envs.items()} for seed in range(N_ROUNDS + 1)][1:]
    rates = {name: [r[name] for r in rounds] for name in envs}
    base = np.array(rates["physics alone"])
    print(f"control steps per second and core, franka7, {N_ROUNDS} rounds of {N_STEPS} steps, {os.cpu_count()} cores")
    for name, values in rates.items():
        low, middle, high = np.percentile(values, [0, 50, 100])
        print(
            f"{name:18s} {middle:6.0f} ({low:.0f} to {high:.0f})   {np.median(base / np.array(values)):.1f} x the time of physics"
        )


if __name__ == "__main__":
    main()
