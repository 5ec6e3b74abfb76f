"""Import before torch in a process that only starts others: idle OpenMP threads of its children then do not spin."""

import os

from rvlm.processes import PASSIVE

os.environ.update(PASSIVE)
