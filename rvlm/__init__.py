"""Robot policies from vision-language models.

`VLA = VLM + action head + history`: any Hugging Face vision-language model becomes a robot policy with
as little change as possible. The modules follow the data, from demonstrations (`rvlm.episodes`) to
closed-loop success (`rvlm.evaluation`); README.md lists them. Importing this package loads none of them.
"""

import logging
import os

__version__ = "0.1.0"

# Libraries read these once, when they are loaded, so import rvlm before torch. Variables that are set already win.
for _name, _value in {
    "OMP_WAIT_POLICY": "PASSIVE",  # OpenMP threads that wait must not spin: beside another process they are 4 to 10 x slower
    "GOMP_SPINCOUNT": "0",  # the same, for GCC's OpenMP
    "TOKENIZERS_PARALLELISM": "false",  # tokenizers warn after a fork otherwise
    "SVT_LOG": "1",  # silences the AV1 encoder's banner
}.items():
    os.environ.setdefault(_name, _value)

# bitsandbytes says that a faster kernel could be had from the Hub, which is not asked here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
