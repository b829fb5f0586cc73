"""Every error this package raises. A message says what, on which line of the user's model, and what to do."""

from __future__ import annotations


class DboError(RuntimeError):
    """Base of every error raised by dbo-compile, but for bad options (`ValueError`)."""


class CannotSplit(DboError):
    """A rule found that an op needs all tokens at once: the message completes "cannot split X, because ...".

    Never reaches the user: the analysis catches it and makes the op a barrier with this reason.
    """


class NotSplit(DboError):
    """A graph, or one size of it, is not split; the message is the reason. Never reaches the user but in reports."""


class InvalidSchedule(DboError):
    """A schedule plays a step before the steps it depends on, or not exactly once."""


class InvalidProgram(DboError):
    """A program could race, hang or leak: the message prints it with the place marked."""
