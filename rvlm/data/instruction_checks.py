"""Validation of instructions."""

from typing import Any


def instruction_error(instruction: Any) -> str:
    """Why an instruction is invalid; empty if it is valid."""
    if not isinstance(instruction, str):
        return f"{type(instruction).__name__} {instruction!r}, which is no text"
    if any("\ud800" <= letter <= "\udfff" for letter in instruction):
        return f"{instruction!r}, which holds half a character (a lone surrogate)"
    if "\0" in instruction:
        return f"{instruction!r}, which holds a zero character"
    if not any(letter.isprintable() and not letter.isspace() for letter in instruction):
        return f"{instruction!r}, which holds no word"
    return ""
