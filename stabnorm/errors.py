"""The one error of our own: the state is wrong. Wrong arguments raise ValueError or TypeError."""


class StabNormError(RuntimeError):
    """The object is in the wrong state for this call; the message says what is wrong and what to do."""
