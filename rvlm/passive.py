"""To be imported before torch, by a process that only starts others: its children's threads do not spin while they wait."""

import os

from rvlm.processes import PASSIVE

os.environ.update(PASSIVE)
