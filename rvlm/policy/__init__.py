"""`VLA = VLM + action head + history`: configuration, heads, model, checkpoints, and the policy that acts."""
