"""The one error that bad input raises, everywhere in the library."""


class InputError(ValueError):
    """Input that cannot be used: the message names what was wrong, where, and what to do about it."""
