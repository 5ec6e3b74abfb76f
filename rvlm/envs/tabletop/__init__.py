"""A MuJoCo tabletop with scripted experts, several arms and domain switches.

Importing this chooses how MuJoCo draws without a screen, before anything imports MuJoCo.
"""

import os

from rvlm.envs.gl import choose_gl

choose_gl()
os.environ.setdefault("LP_NUM_THREADS", "0")  # the software renderer's own threads would fight with ours
