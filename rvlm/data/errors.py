"""Errors of data: conventions, data cards and episodes."""


class CardError(ValueError):
    """A data card cannot be read, or describes an unsupported layout."""


class EpisodeError(ValueError):
    """Recorded data is invalid or inconsistent; the message has what was expected, what was found, and the fix."""


class SpecMismatch(ValueError):
    """Two conventions disagree, or actions do not follow the one they claim."""
