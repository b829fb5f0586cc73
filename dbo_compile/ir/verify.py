"""The verifier of schedules: every step once, and never before what it needs. `proof` is the one for programs."""

from __future__ import annotations

from collections import Counter

from dbo_compile.errors import InvalidSchedule
from dbo_compile.ir.needs import needed_steps, needs_of, steps_of
from dbo_compile.ir.schedule import Schedule, Step


def verify_schedule(schedule: Schedule) -> None:
    """Raise `InvalidSchedule`, with the place marked, unless `schedule` plays every step once and in a right order."""
    _verify_once(schedule)
    n, needs = schedule.num_microbatches, needs_of(schedule.segments, schedule.num_microbatches)
    done: set[Step] = set()
    for at, step in enumerate(schedule.steps):
        for name, why in needs[step.segment].items():
            for needed in needed_steps(schedule.segments[name], step, n, schedule.segments[step.segment]):
                if needed not in done:
                    raise _error(schedule, at, f"{step} must come after {needed}: {why}")
        done.add(step)


def _verify_once(schedule: Schedule) -> None:
    expected = [s for segment in schedule.segments.values() for s in steps_of(segment, schedule.num_microbatches)]
    known = dict.fromkeys(expected)
    for at, step in enumerate(schedule.steps):
        if step not in known:
            raise _error(schedule, at, f"{step} is not a step of this model; expected each of: {_text(expected)}")
    count = Counter(schedule.steps)
    for step in expected:
        if count[step] > 1:
            at = len(schedule.steps) - 1 - schedule.steps[::-1].index(step)
            raise _error(schedule, at, f"{step} is played {count[step]} times, expected once")
        if not count[step]:
            raise _error(schedule, len(schedule.steps), f"{step} is never played, expected once")


def _error(schedule: Schedule, at: int, reason: str) -> InvalidSchedule:
    before, here = schedule.steps[:at], schedule.steps[at : at + 1]
    marked = f"{_text(before)} >>>{_text(here)}<<< {_text(schedule.steps[at + 1 :])}".strip()
    return InvalidSchedule(f"step {at}: {reason}\n{marked}")


def _text(steps: list[Step] | tuple[Step, ...]) -> str:
    return " ".join(map(str, steps))
