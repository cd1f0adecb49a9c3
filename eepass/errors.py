"""Errors meant for the person who made the mistake."""


class InputError(ValueError):
    """Bad input from outside: what it is, where, and what to do about it, in one line."""
