"""Vision-language models of any family, as a backbone that is read at `<act>`.

Modules:
    processors: a family's own processor, also without its video processor.
    tiling: one tile an image, in families that split images.
    templates: chat templates: the prompt format of a family.
    prompt_batches: prompts as batches of tensors: padded, cut at `<act>`, continued by an observation.
    pixel_lookup: image processors as a table, where each value depends on one pixel.
    processor_shortcut: prompts' vision inputs without the processor, bit for bit.
    prompts: the one prompt builder: images and instructions to tokens, with `<act>`.
    backbones: load a model, find its parts, freeze them, compute its image features.
    hidden_states: of one or several layers, at `<act>` or at every token.
    quantization: device and precision of the computation, and 4 bits by bitsandbytes.
    adapters: LoRA, DoRA and QLoRA by peft.
    question_answering: questions and answers as batches for the next-token loss.
    causality: whether attention over the prompt is causal, by trying it.
    small: the small model that ships, untrained.
    tiny: tiny models of many families, built offline.
    tiny_models: builders of the tiny models, one per family.
    tiny_templates: chat templates of the tiny models.
"""
