"""Robot policies from vision-language models.

`VLA = VLM + action head + history`: any Hugging Face vision-language model becomes a robot policy with
as little change as possible. The modules follow the data, from demonstrations (`rvlm.episodes`) to
closed-loop success (`rvlm.evaluation`); README.md lists them. Importing this package loads none of them.
"""

import logging

__version__ = "0.1.0"

# bitsandbytes says that a faster kernel could be had from the Hub, which is not asked here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
