"""What a segment needs played before it: data flow, memory written in place, and the order of collectives."""

from __future__ import annotations

from collections.abc import Mapping

from dbo_compile.ir.schedule import Lane, Segment, Step

Needs = Mapping[str, Mapping[str, str]]
"""For each segment, the segments that must be played before it, each with the reason: a clause like "it reads x"."""


def needs_of(segments: Mapping[str, Segment], num_microbatches: int) -> Needs:
    """Everything that the order of the graph says about the order of the steps; linear in the size of the graph.

    Where nothing is split, collectives of different groups keep their order, too: another rank may play the same step
    as the graph says, and what waits for each other on one stream must be there in one order.
    """
    history = _ValueHistory()
    last_in_group: dict[str, str] = {}
    needs: dict[str, dict[str, str]] = {}
    for s in segments.values():
        needed = history.play(s)
        for name in s.after:
            needed.setdefault(name, "the graph has it first")
        if s.lane is Lane.COMM and (s.group or num_microbatches == 1):
            group = f"group {s.group}" if num_microbatches > 1 else "an unsplit step"
            if last := last_in_group.get(group):
                needed.setdefault(last, f"the collectives of {group} are issued in the order of the graph")
            last_in_group[group] = s.name
        needs[s.name] = needed
    return needs


def steps_of(segment: Segment, num_microbatches: int) -> tuple[Step, ...]:
    return tuple(Step(segment.name, m) for m in (range(num_microbatches) if segment.per_microbatch else [None]))


def needed_steps(needed: Segment, step: Step, num_microbatches: int, reader: Segment) -> tuple[Step, ...]:
    """The steps of segment `needed` that `step` of segment `reader` needs: its own microbatch's, or all; those of
    earlier ones as well if `needed` makes a value of which `reader` reads them."""
    if not needed.per_microbatch or step.microbatch is None or any(value in reader.whole for value in needed.outputs):
        return steps_of(needed, num_microbatches)
    first = 0 if any(value in reader.prefix for value in needed.outputs) else step.microbatch
    return tuple(Step(needed.name, m) for m in range(first, step.microbatch + 1))


class _ValueHistory:
    """Which segment made each value, and which have read and written its memory last."""

    def __init__(self) -> None:
        self.maker: dict[str, str] = {}
        self.root: dict[str, str] = {}
        self.writer: dict[str, str] = {}
        self.readers: dict[str, list[str]] = {}

    def play(self, s: Segment) -> dict[str, str]:
        """Take note of segment `s`, and return what it needs."""
        needed = {self.maker[v]: f"it makes {v}" for v in s.inputs if v in self.maker}
        for v in s.inputs:
            if (writer := self.writer.get(self._root(v))) is not None:
                needed.setdefault(writer, f"it writes {v} in place")
            self.readers.setdefault(self._root(v), []).append(s.name)
        for v in s.writes:
            for reader in self.readers[self._root(v)]:
                if reader != s.name:
                    needed.setdefault(reader, f"it reads {v} before {s.name} overwrites it")
            self.writer[self._root(v)] = s.name
            self.readers[self._root(v)] = []
        for v in s.outputs:
            self.maker[v] = s.name
            self.root[v] = self._root((s.aliases or {}).get(v, v))
        return needed

    def _root(self, value: str) -> str:
        return self.root.get(value, value)
