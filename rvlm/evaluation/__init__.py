"""How good a policy is: rollouts, closed loop, open loop, chains, protocols, questions about scenes."""
