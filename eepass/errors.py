"""Errors meant for the person who made the mistake."""


class InputError(ValueError):
    """Bad input from outside: what it is, where, and what to do about it, in one line."""


class RunsSlower(UserWarning):
    """Something is missing here without which eepass is right, but slow; says what helps."""


class PassError(ValueError):
    """A decoder that a pass cannot rewrite; the message says why."""


class EngineError(ValueError):
    """A request the engine cannot serve; the message says what to change."""
