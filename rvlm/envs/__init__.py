"""Environments: each a `gymnasium.Env` that declares its actions by an `ActionSpec`. Importing this registers them."""

import gymnasium

gymnasium.register("rvlm/Tabletop-v0", entry_point="rvlm.envs.tabletop.env:Tabletop")
