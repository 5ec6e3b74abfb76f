"""What a user of the installed package does first, run by a Python that has no clone: load what ships, and act.

`python installed.py core` acts on an observation; `python installed.py sim` drives the tabletop too. Where the environment was
made with no more than the package's own dependencies, it shows that they suffice.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() not in (HERE, HERE.parent)]


def main(extras):
    where = Path.cwd()
    beyond = [name for name in ("papermill", "matplotlib", "optuna", "tensorboard") if importlib.util.find_spec(name)]
    beyond += ["mujoco"] if extras == "core" and importlib.util.find_spec("mujoco") else []
    assert not beyond, f"this environment holds more than rvlm[{extras}] wants: {beyond}"
    import numpy as np

    import rvlm
    from rvlm.data.actions import CARDS, ActionSpec
    from rvlm.files import IS_CLONE, artifacts_dir, results_dir
    from rvlm.policy.policy import load_policy
    from rvlm.report.findings import published

    package = Path(rvlm.__file__).parent
    assert not IS_CLONE and package / "data_cards" == CARDS, f"not an installed package: {package}"
    for folder in (artifacts_dir(), results_dir()):
        assert package.parent not in folder.resolve().parents, f"{folder} lies among installed packages"
    spec = ActionSpec.from_card("tabletop_franka7")
    assert len(published("calvin")) > 0 and {"calvin", "libero"} <= {path.stem for path in CARDS.glob("*.md")}

    policy = load_policy(package / "assets" / "policy")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)
    seen = {"images": {"static": image, "wrist": image}, "state": np.zeros(7, np.float32), "instruction": "lift the red cube"}
    (action,) = policy.select_action([seen])
    assert action.shape[-1] == 7 and np.isfinite(action).all() and (action >= spec.low).all() and (action <= spec.high).all()
    result = {"action": np.round(action, 3).ravel().tolist(), "python": sys.version.split()[0], "extras": extras}

    if extras == "sim":
        from rvlm.envs.tabletop.env import Tabletop

        env = Tabletop()
        observation, _ = env.reset(seed=7)
        policy.reset()
        start = observation["state"].copy()
        for _ in range(5):
            observation, *_ = env.step(policy.select_action([observation])[0])
        result["moved [m]"] = float(np.abs(observation["state"] - start)[:3].max())
        assert result["moved [m]"] > 0.005, result
        env.close()
    assert list(where.iterdir()) == [], f"acting wrote {list(where.iterdir())}"
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    sys.stdout.write(f"installed: {json.dumps(result)}\n")


if __name__ == "__main__":
    main(sys.argv[1])
