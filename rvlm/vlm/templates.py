"""Chat templates: how a family writes images and an instruction, found by rendering its template, never by splitting the text.

A template may number the images, put them first, trim the text, or begin with a system turn or a date. A prompt is what it
renders of the images and the instruction, up to where the answer begins.
"""

import itertools
import re
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

FIXED_DATE = datetime(2025, 1, 1)  # today's date in every template, so that training and deployment have the same prompt
STRFTIME_CODES = ("-d", "-m", "-H", "-I", "-j", *"aAbBdFHIjmMpSTuUwWyY")
SENTINEL, OTHER_SENTINEL = "\ue123\ue124", "\ue125\ue126"  # example instructions, of private-use characters


def select_chat_template(processor: Any) -> str | None:
    """The chat template of a processor, else of its tokenizer, with the date fixed; None if there is none.

    Raises:
        ValueError: Several, none of which is the default.
    """
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    if isinstance(template, dict) and len(template) > 1 and "default" not in template:
        raise ValueError(
            f"{processor.tokenizer.name_or_path}: expected one chat template, or one named 'default'; got {sorted(template)}; "
            "save one of them as chat_template.jinja in a copy of the folder"
        )
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    return _with_fixed_date(template) if template else None


def _with_fixed_date(template: str) -> str:
    """The template with its own `strftime_now`, which formats `FIXED_DATE`."""
    if "strftime_now" not in template or "macro strftime_now" in template:
        return template
    filters = "".join(f"|replace('%{code}', '{FIXED_DATE.strftime('%' + code)}')" for code in STRFTIME_CODES)
    return "{%- macro strftime_now(format) -%}{{ format" + filters + " }}{%- endmacro -%}" + template


def image_token(processor: Any) -> str:
    """The placeholder token of an image in a family's prompts."""
    return getattr(processor, "image_token", None) or "<image>"


class ChatTemplate:
    """How a family writes images and an instruction as a user's turn, up to where its answer begins.

    Args:
        processor: With a `chat_template`; without one, image tokens come before the instruction.
        n_images: Images at the beginning of a prompt.

    Raises:
        ValueError: The template does not write the images or the instruction; with its output or error.
    """

    def __init__(self, processor: Any, n_images: int) -> None:
        self._processor, self._image_token = processor, image_token(processor)
        self._special_pattern = token_pattern(special_tokens(processor.tokenizer))
        self._content: Any = _as_string
        if getattr(processor, "chat_template", None):
            self._content = self._detect_content_format(n_images)

    def __call__(self, instruction: str, n_images: int) -> str:
        """The turn with this many images, as text."""
        return self._render(self._content(self._image_token, instruction, n_images))

    def image_markup(self, start: int, stop: int) -> list[str]:
        """The text of images start to stop (counted from 0) of a conversation, each as in "Picture 3: <image>".

        Raises:
            ValueError: One more image changes more than the insertion of its text.
        """
        turns = [self(SENTINEL, i) for i in range(start, stop + 1)]
        markup = [self._inserted_text(*pair) for pair in itertools.pairwise(turns)]
        if None in markup:
            raise ValueError(
                f"expected a chat template that inserts one text for one more image, got {turns[markup.index(None) + 1]!r} after "
                f"{turns[markup.index(None)]!r}; take structure 'one_step' or 'policy_head', or give the model another template"
            )
        return [text for text in markup if text is not None]

    def _detect_content_format(self, n_images: int) -> Any:
        errors = []
        for content in (_as_parts, _as_string):
            try:
                one, other = (self._render(content(self._image_token, text, n_images)) for text in (SENTINEL, OTHER_SENTINEL))
            except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
                errors.append(f"{type(error).__name__}: {error}")
                continue
            if one.count(self._image_token) == n_images and one.replace(SENTINEL, OTHER_SENTINEL) == other != one:
                return content
            errors.append(f"it writes {one!r}")
        raise ValueError(
            f"expected a chat template that writes {n_images} image(s) as {self._image_token} and the instruction, got that of "
            f"{type(self._processor).__name__}: {'; '.join(errors)}; give the model another chat template"
        )

    def _render(self, content: Any) -> str:
        if not getattr(self._processor, "chat_template", None):
            return content
        return self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _inserted_text(self, short: str, long: str) -> str | None:
        """What was inserted into `short` to make `long`, without splitting a special token; None if more has changed."""
        inside_token = {i for found in self._special_pattern.finditer(long) for i in range(found.start() + 1, found.end())}
        n, pairs = len(long) - len(short), enumerate(zip(short, long, strict=False))
        prefix_len = next((i for i, (one, other) in pairs if one != other), len(short))
        for start in range(prefix_len, -1, -1):
            if long[:start] + long[start + n :] == short and not inside_token & {start, start + n}:
                return long[start : start + n] if n > 0 else None
        return None


def _as_string(image_token: str, text: str, n: int) -> str:
    """A turn's content as one string."""
    return image_token * n + text


def _as_parts(image_token: str, text: str, n: int) -> list[dict[str, str]]:
    """A turn's content as a list of parts."""
    return [{"type": "image"}] * n + [{"type": "text", "text": text}]


def special_tokens(tokenizer: Any) -> list[str]:
    """The special tokens of a tokenizer, `<act>` among them: an instruction must not contain them."""
    return sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special})


def token_pattern(tokens: list[str]) -> re.Pattern:
    """A pattern that finds any of these tokens in a text, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
