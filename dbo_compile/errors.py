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


class Disagreement(DboError):
    """Ranks would not play the same thing; raised on every one of them, with the same words, instead of a hang."""


class Unpaddable(DboError):
    """A step was padded before a graph of it was known that must not be; the message is the reason.

    Never reaches the user, but where a part of the step had been played before: then it cannot be played again.
    """


class RankLost(DboError):
    """A rank died, stalled or left, so that no step can be agreed on; the message names it."""
