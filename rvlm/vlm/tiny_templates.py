"""Chat templates of the tiny families, with the turns, image tokens and BOS tokens of their published counterparts.

Written anew after those on the Hub, without tools, videos and answers. Among them are templates that number images or put them
first, trim the text, begin with a system turn or a date, require a certain order of turns, and write a BOS token that their
tokenizer adds too.
"""

from typing import Any

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' or 'image' in part %}IMAGE{%- elif 'text' in part %}{{- part.text }}{%- endif %}
{%- endfor %}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

_VISION = "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
_COUNTED = "{%- set n.images = n.images + 1 %}{%- if add_vision_id %}{{- 'Picture ' ~ n.images ~ ': ' }}{%- endif %}" + _VISION
_HELPFUL = "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"

_QWEN2 = "{%- set n = namespace(images=0) %}" + _HELPFUL + _CHATML.replace("IMAGE", _COUNTED)
_QWEN3 = _CHATML.replace("IMAGE", _VISION)
_THINKING = _QWEN3.replace("assistant\\n", "assistant\\n<think>\\n")

_ROLE_NAMES = (  # SmolVLM, Idefics2 and 3: images in place, a space before a turn that begins with text
    "{% for message in messages %}{{ message['role'].capitalize() }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

_IMAGES_FIRST = (
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
)

_LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    + _IMAGES_FIRST
    + "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    + _IMAGES_FIRST
    + "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    + _IMAGES_FIRST
    + "{{ ' [/INST]' }}{% else %}{{ raise_exception('only user turns are supported') }}{% endif %}{% endfor %}"
)

_GEMMA = """\
{{ bos_token }}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{{ '<start_of_turn>' + message['role'] + '\\n' }}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<start_of_image>' }}
{%- elif part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}
{%- endfor -%}
{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

_LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n<|eot_id|>" }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '<|image|>' }}{%- elif part['type'] == 'text' %}{{- part['text'] | trim }}{%- endif %}
{%- endfor %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

_IM = ("<|im_start|>", "<|im_end|>")
_HEADER = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

CHAT_FORMATS: dict[str, dict[str, Any]] = {  # family -> chat template, its special tokens, whether the tokenizer adds BOS
    "smolvlm": {"template": "<|im_start|>" + _ROLE_NAMES, "special_tokens": _IM[:1]},
    "idefics2": {"template": _ROLE_NAMES, "adds_bos": True},
    "idefics3": {"template": "{{ bos_token }}" + _ROLE_NAMES, "adds_bos": True},
    "qwen2_vl": {"template": _QWEN2, "special_tokens": _IM},
    "qwen2_5_vl": {"template": _QWEN2.replace("add_vision_id", "true"), "special_tokens": _IM},
    "qwen3_vl": {"template": _QWEN3, "special_tokens": _IM},
    "qwen3_5": {"template": _THINKING, "special_tokens": (*_IM, "<think>", "</think>")},
    "llava": {"template": _LLAVA, "adds_bos": True},
    "llava_next": {"template": _MISTRAL, "adds_bos": True},
    "llava_onevision": {"template": _ONEVISION, "special_tokens": _IM},
    "internvl": {"template": _CHATML.replace("IMAGE", "{{- '<IMG_CONTEXT>\\n' }}"), "special_tokens": _IM},
    "gemma3": {"template": _GEMMA, "special_tokens": ("<start_of_turn>", "<end_of_turn>"), "adds_bos": True},
    "mllama": {"template": _LLAMA, "special_tokens": _HEADER, "adds_bos": True},
}
