"""Why a policy fails: checks from the data to the closed loop, and faults to test them with.

Modules:
    results: result of a check, and the fix for each fault.
    inputs: what is diagnosed: a policy, its training data, and the environment.
    misreadings: common errors in reading images and actions.
    motion: commanded and observed motion of any robot, by dimension.
    motion_faults: what explains a motion that does not follow its commands.
    data_checks: does the data follow its card, does the robot move as commanded.
    policy_checks: statistics, conventions, and predictions on training frames.
    env_checks: initial states, images, and the effect of recorded actions.
    checklist: the checks in order; the first that fails names the fault.
    perturbed: demonstrations and environments with changes in them.
    faults: faults to inject, which the checks must name.
    naming: how many faults are named, alone and in pairs, and how often where there is none.
"""
