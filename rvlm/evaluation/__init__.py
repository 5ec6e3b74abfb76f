"""How good a policy is: closed loop, open loop, chains, protocols, visual question answering.

Modules:
    rollouts: batched rollouts, and input ablations of the policy.
    acting: the policy that is evaluated, and the environments in which it acts.
    closed_loop: closed-loop evaluation with fixed, distinct seeds.
    replay: an evaluated episode again, with its frames.
    success: success rates and their differences, with intervals.
    open_loop: distance between predicted and recorded actions.
    chains: tasks in sequence: CALVIN's chains of five.
    protocols: settings and the generalisation gap, shortcut probes, leaks.
    vqa: visual question answering, against majority and blank-image baselines.
"""
