"""Why a policy fails: checks from the data to the closed loop, and injected faults that test them."""
