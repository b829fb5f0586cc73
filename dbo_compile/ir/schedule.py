"""In which order the segments of a model are played, for which microbatch. Prints and parses as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from dbo_compile.errors import InvalidSchedule

ROWS, START = "rows", "start"
"""The two numbers every segment may ask for: how many tokens its microbatch has, and how many lie before them."""


class Lane(Enum):
    COMPUTE = "compute"
    COMM = "comm"


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the graph that stays on one lane. Played once per microbatch, or once in all.

    `inputs` and `outputs` name values; `ROWS` and `START` may be among the inputs. `writes` are the inputs it changes
    in place, `paged` those of them in which each request has places of its own; `aliases` maps an output to the input
    whose memory it may share. Of the inputs in `prefix` it reads the rows of its own and of all earlier microbatches,
    of those in `whole` the rows of all. `after` names segments that must have been played before this one although it
    reads nothing of theirs (they read what it overwrites): for the same microbatch if both are played per microbatch,
    else all of them. `group` is the process group of a collective and `payload` what it sends, as far as all ranks must
    have that in common; "" elsewhere. `host` segments read device data on the host. Segments with the same `code` are
    the same code.
    """

    name: str
    lane: Lane
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    per_microbatch: bool
    code: str = ""
    group: str = ""
    payload: str = ""
    host: bool = False
    writes: tuple[str, ...] = ()
    paged: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    aliases: Mapping[str, str] | None = None
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """Play one segment: `attn#0` is segment `attn` for microbatch 0, `head` is a segment played once."""

    segment: str
    microbatch: int | None = None

    def __str__(self) -> str:
        return self.segment if self.microbatch is None else f"{self.segment}#{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Step:
        if (m := re.fullmatch(r"(\w+)(?:#(\d+))?", text)) is None:
            raise InvalidSchedule(f"{text!r} is not a step; write `segment` or `segment#microbatch`, e.g. `attn#0`")
        return cls(m[1], None if m[2] is None else int(m[2]))


@dataclass(frozen=True, slots=True)
class Schedule:
    """The segments of a graph in data-flow order (the order of the graph itself), and the steps that play them."""

    segments: Mapping[str, Segment]
    steps: tuple[Step, ...]
    num_microbatches: int

    def __str__(self) -> str:
        return " ".join(map(str, self.steps))

    def with_steps(self, text: str) -> Schedule:
        """The same segments in another order, given as text."""
        return replace(self, steps=tuple(Step.parse(t) for t in text.split()))
