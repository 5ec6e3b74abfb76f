"""Environments: each a `gymnasium.Env` that declares its actions by an `ActionSpec`. Importing this registers them."""

import gymnasium

FIRST_HELD_OUT_SEED = 900_000  # scenes with seeds from here on are never in a demonstration

gymnasium.register("rvlm/Tabletop-v0", entry_point="rvlm.envs.tabletop.env:Tabletop")
