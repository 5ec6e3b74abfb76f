"""Why a policy fails: checks from the data to the closed loop, and faults to try them with."""
