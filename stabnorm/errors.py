"""The one error of our own: the state is wrong. Wrong arguments raise ValueError or TypeError."""


class StabNormError(RuntimeError):
    """Something is in a state in which the call makes no sense; the message says what and what to do."""
