"""Chat templates: what a family writes around images and an instruction, found by rendering them, never by cutting words.

A template may number images, set them first, trim the text, begin with a system turn or a date: a prompt is what it renders of
the images and the instruction themselves, up to where the answer begins.
"""

import itertools
import re
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

DAY = datetime(2025, 1, 1)  # that every template is told, so that a policy is trained and acts on the same prompt
CODES = ("-d", "-m", "-H", "-I", "-j", *"aAbBdFHIjmMpSTuUwWyY")  # of `strftime`
ONE, OTHER = "\ue123\ue124", "\ue125\ue126"  # stand for an instruction; private use, so that nobody else writes them


def choose(processor: Any) -> str | None:
    """The chat template of a processor or, where it has none, of its tokenizer, with the day fixed; None where there is none.

    Raises:
        ValueError: Several, none of which is the default.
    """
    kept = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    if isinstance(kept, dict) and len(kept) > 1 and "default" not in kept:
        raise ValueError(
            f"{processor.tokenizer.name_or_path}: expected one chat template, or one named 'default'; got {sorted(kept)}; "
            "save one of them as chat_template.jinja in a copy of the folder"
        )
    if isinstance(kept, dict):
        kept = kept.get("default") or next(iter(kept.values()), None)
    return _on_one_day(kept) if kept else None


def _on_one_day(template: str) -> str:
    """The template with its own `strftime_now`, which says `DAY` whenever it is asked."""
    if "strftime_now" not in template or "macro strftime_now" in template:
        return template
    said = "".join(f"|replace('%{code}', '{DAY.strftime('%' + code)}')" for code in CODES)
    return "{%- macro strftime_now(format) -%}{{ format" + said + " }}{%- endmacro -%}" + template


def mark_of(processor: Any) -> str:
    """The word that stands for an image in a family's prompts."""
    return getattr(processor, "image_token", None) or "<image>"


class Chat:
    """How a family writes images and an instruction as the turn of a user, up to where its answer begins.

    Args:
        processor: Its `chat_template` says how; without one, image words stand before the instruction.
        n_images: That a prompt begins with.

    Raises:
        ValueError: The template does not write the images or the instruction, with what it said.
    """

    def __init__(self, processor: Any, n_images: int) -> None:
        self._processor, self._mark = processor, mark_of(processor)
        self._special = any_of(special_words(processor.tokenizer))
        self._content = self._contents()[0]
        if getattr(processor, "chat_template", None):
            self._content = self._understood(n_images)

    def __call__(self, instruction: str, n_images: int) -> str:
        """The turn with this many images, as text."""
        return self._render(self._content(instruction, n_images))

    def images(self, start: int, stop: int) -> list[str]:
        """The words of images start to stop (counted from 0) of a conversation that begins with others, as "Picture 3: <image>".

        Raises:
            ValueError: The template does not write one image more as one word more.
        """
        turns = [self(ONE, i) for i in range(start, stop + 1)]
        words = [self._inserted(*pair) for pair in itertools.pairwise(turns)]
        if None in words:
            raise ValueError(
                f"expected a chat template that writes an image more as a word more, got {turns[words.index(None) + 1]!r} after "
                f"{turns[words.index(None)]!r}; take structure 'one_step' or 'policy_head', or give the model another template"
            )
        return [word for word in words if word is not None]

    def _contents(self) -> list[Any]:
        """Ways to tell a template of images and text: by parts, or as one string."""
        return [
            lambda text, n: self._mark * n + text,
            lambda text, n: [{"type": "image"}] * n + [{"type": "text", "text": text}],
        ]

    def _understood(self, n_images: int) -> Any:
        said = []
        for content in reversed(self._contents()):
            try:
                one, other = (self._render(content(text, n_images)) for text in (ONE, OTHER))
            except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
                said.append(f"{type(error).__name__}: {error}")
                continue
            if one.count(self._mark) == n_images and one.replace(ONE, OTHER) == other != one:
                return content
            said.append(f"it writes {one!r}")
        raise ValueError(
            f"expected a chat template that writes {n_images} image(s) as {self._mark} and the instruction, got that of "
            f"{type(self._processor).__name__}: {'; '.join(said)}; give the model another chat template"
        )

    def _render(self, content: Any) -> str:
        if not getattr(self._processor, "chat_template", None):
            return content
        return self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _inserted(self, short: str, long: str) -> str | None:
        """What was written into `short` to make `long`, no special word cut; None where more has changed."""
        inner = {i for found in self._special.finditer(long) for i in range(found.start() + 1, found.end())}
        n, pairs = len(long) - len(short), enumerate(zip(short, long, strict=False))
        n_alike = next((i for i, (one, other) in pairs if one != other), len(short))
        for start in range(n_alike, -1, -1):
            if long[:start] + long[start + n :] == short and not inner & {start, start + n}:
                return long[start : start + n] if n > 0 else None
        return None


def special_words(tokenizer: Any) -> list[str]:
    """The special tokens of a tokenizer, `<act>` among them: what an instruction must not hold."""
    return sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special})


def any_of(words: list[str]) -> re.Pattern:
    """Finds words in a text, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")
