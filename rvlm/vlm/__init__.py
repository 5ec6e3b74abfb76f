"""Vision-language models of any family: processors, prompts, backbones, adapters, the small one that ships, tiny ones."""
