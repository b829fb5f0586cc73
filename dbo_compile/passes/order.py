"""Order the steps: segments in, a schedule out. Needs a policy; never changes what a segment is or where it runs.

A policy gets the steps in the order of the graph, and for each the steps it needs. All policies are deterministic:
every rank must issue the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import accumulate, groupby

from dbo_compile.ir.needs import needed_steps, needs_of, steps_of
from dbo_compile.ir.schedule import Lane, Schedule, Segment, Step

Cost = Callable[[Step], float]
PATIENCE = 0.25
"""The share of its own time that a step may be held up by steps that feed the other lane (`_Lanes._feeder`)."""
SCAN = 8
"""How many of the steps that are ready are looked at for one that feeds the other lane: bounds the work."""
HOST_TICKS = 0.05
"""What reading a few counts on the host takes, where a stretch of compute or a collective takes 1."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a policy orders: the steps in the order of the graph, each with the steps that must come before it."""

    segments: Mapping[str, Segment]
    num_microbatches: int
    needs: Mapping[Step, tuple[Step, ...]]
    cost: Cost

    def lane(self, step: Step) -> Lane:
        return self.segments[step.segment].lane


def order(
    segments: Mapping[str, Segment],
    num_microbatches: int,
    policy: str = "list",
    *,
    cost: Cost | None = None,
    threaded: frozenset[str] = frozenset(),
) -> Schedule:
    """The schedule of a policy: `list`, `alternate` or `sequential`.

    `cost` is how long a step takes (default: 1 tick, reads on the host `HOST_TICKS`); it must be the same on every
    rank. The microbatches of `threaded` segments, which share state that they write in place, play in order.
    """
    if policy not in POLICIES:
        raise ValueError(f"no policy {policy!r}; there are {', '.join(POLICIES)}")
    needs = _step_needs(segments, num_microbatches, threaded)
    task = Task(segments, num_microbatches, needs, cost or partial(_ticks, segments))
    return Schedule(segments, tuple(POLICIES[policy](task)), num_microbatches)


def _ticks(segments: Mapping[str, Segment], step: Step) -> float:
    return HOST_TICKS if segments[step.segment].host else 1.0


def _step_needs(segments: Mapping[str, Segment], n: int, threaded: frozenset[str]) -> dict[Step, tuple[Step, ...]]:
    needs: dict[Step, tuple[Step, ...]] = {}
    of_segment = needs_of(segments, n)
    for segment in segments.values():
        for step in steps_of(segment, n):
            found = [needed_steps(segments[name], step, n, segment) for name in of_segment[segment.name]]
            if segment.name in threaded and step.microbatch:
                found.append((Step(segment.name, step.microbatch - 1),))
            needs[step] = tuple(dict.fromkeys(s for steps in found for s in steps))
    return needs


def _sequential(task: Task) -> Iterator[Step]:
    """One microbatch after the other, from barrier to barrier: no overlap, the reference."""
    for names, microbatches in _blocks(task):
        for m in microbatches:
            yield from (Step(name, m) for name in names)


def _alternate(task: Task) -> Iterator[Step]:
    """Play a microbatch until it needs the result of a collective it has just issued, then switch (as vLLM does).

    All collectives in flight have arrived when a microbatch is resumed, so it may take several results in a row.
    """
    for names, microbatches in _blocks(task):
        left = {m: [Step(name, m) for name in reversed(names)] for m in microbatches}
        while left:
            for m in list(left):
                yield from _until_in_flight(task, left[m])
                if not left[m]:
                    del left[m]


def _until_in_flight(task: Task, steps: list[Step]) -> Iterator[Step]:
    in_flight: set[Step] = set()
    while steps:
        step = steps[-1]
        if task.lane(step) is Lane.COMM and not task.segments[step.segment].host:
            in_flight.add(step)
        elif not in_flight.isdisjoint(task.needs[step]):
            return
        yield steps.pop()


def _blocks(task: Task) -> Iterator[tuple[list[str], list[int | None]]]:
    """Neighbouring segments that are played per microbatch, or once, with the microbatches to play them for.

    One that reads rows of all microbatches begins anew: they must all have come that far.
    """
    numbers = accumulate(bool(s.whole) for s in task.segments.values())
    numbered = zip(task.segments.values(), numbers, strict=True)
    for (per_microbatch, _), block in groupby(numbered, key=lambda pair: (pair[0].per_microbatch, pair[1])):
        yield [s.name for s, _ in block], [*range(task.num_microbatches)] if per_microbatch else [None]


def _longest_path_first(task: Task) -> Iterator[Step]:
    """List scheduling on two lanes: what could start first, and of those what has the longest way to the end."""
    lanes = _Lanes(task)
    picked = [lanes.pick() for _ in task.needs]
    return _issue_early(task, sorted(picked, key=lanes.position.__getitem__))


def _issue_early(task: Task, steps: Sequence[Step]) -> Iterator[Step]:
    """`steps` (in the order of their positions) with each collective right after the last step that it needs.

    A read on the host stays where it is: it holds up the thread that issues all the others.
    """
    comm = deque((at, step) for at, step in enumerate(steps) if task.lane(step) is Lane.COMM)
    issued: set[Step] = set()
    for now, step in enumerate(steps):
        if task.lane(step) is Lane.COMPUTE:
            issued.add(step)
            yield step
        while comm and issued.issuperset(task.needs[comm[0][1]]):
            at, early = comm[0]
            if at > now and task.segments[early.segment].host:
                break
            comm.popleft()
            issued.add(early)
            yield early


class _Lanes:
    """Two lanes on a clock. A read on the host takes the time of its lane, as it starts when that has nothing else."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rank = _ranks(task)
        self.missing = {step: len(needed) for step, needed in task.needs.items()}
        self.users: dict[Step, list[Step]] = {step: [] for step in task.needs}
        self.arrival = dict.fromkeys(task.needs, 0.0)
        self.feeds = _feeds(task)
        self.turn: dict[Step, float] = {}
        """When a step was first the one whose turn it is."""
        self.position: dict[Step, float] = {}
        """When a step starts; a read on the host when it ends, as all that starts before must be issued before it."""
        self.free = dict.fromkeys(Lane, 0.0)
        self.ready: dict[Lane, list[tuple[tuple[float, int, int], Step]]] = {lane: [] for lane in Lane}
        self.coming: dict[Lane, list[tuple[float, tuple[float, int, int], Step]]] = {lane: [] for lane in Lane}
        for step, needed in task.needs.items():
            for s in needed:
                self.users[s].append(step)
            if not needed:
                self._come(step)

    def pick(self) -> Step:
        """Take the step that starts next; of two lanes the comm lane, as what it does may feed the other."""
        lane = min(Lane, key=lambda lane: (self._next_start(lane), lane is Lane.COMPUTE))
        start = self._next_start(lane)
        while self.coming[lane] and self.coming[lane][0][0] <= start:
            _, rank, step = heappop(self.coming[lane])
            heappush(self.ready[lane], (rank, step))
        step = self._feeder(lane, start) or heappop(self.ready[lane])[1]
        self._play(step, lane, max(start, self.arrival[step]))
        return step

    def _feeder(self, lane: Lane, start: float) -> Step | None:
        """A step that feeds the other lane so soon that the step whose turn it is hardly waits for it.

        Counting rows and reading the counts holds up an exchange: behind a long stretch of compute of the other
        microbatch it would leave the comm lane idle for as long.
        """
        ready, coming = self.ready[lane], self.coming[lane]
        first = ready[0][1]
        deadline = self.turn.setdefault(first, start) + PATIENCE * self.task.cost(first)
        best = [heappop(ready) for _ in range(min(SCAN, len(ready)))]
        found = next((entry for entry in best[1:] if start + self.feeds[entry[1]] <= deadline), None)
        for entry in best:
            if entry is not found:
                heappush(ready, entry)
        if found:
            return found[1]
        if coming and coming[0][0] + self.feeds[coming[0][2]] <= deadline:
            return heappop(coming)[2]
        return None

    def _next_start(self, lane: Lane) -> float:
        if self.ready[lane]:
            return self.free[lane]
        return max(self.free[lane], self.coming[lane][0][0]) if self.coming[lane] else float("inf")

    def _play(self, step: Step, lane: Lane, start: float) -> None:
        end = start + self.task.cost(step)
        self.free[lane] = end
        self.position[step] = end if self.task.segments[step.segment].host else start
        for user in self.users[step]:
            self.arrival[user] = max(self.arrival[user], end)
            self.missing[user] -= 1
            if not self.missing[user]:
                self._come(user)

    def _come(self, step: Step) -> None:
        heappush(self.coming[self.task.lane(step)], (self.arrival[step], self.rank[step], step))


def _ranks(task: Task) -> dict[Step, tuple[float, int, int]]:
    """Who goes first: the longest way to the end, then the lower microbatch, then the order of the graph."""
    way = dict.fromkeys(task.needs, 0.0)
    for step in reversed(list(task.needs)):
        way[step] += task.cost(step)
        for needed in task.needs[step]:
            way[needed] = max(way[needed], way[step])
    return {step: (-way[step], step.microbatch or 0, i) for i, step in enumerate(task.needs)}


def _feeds(task: Task) -> dict[Step, float]:
    """How long each step and those of its lane behind it take until the other lane gets something to do."""
    rest = dict.fromkeys(task.needs, float("inf"))
    feeds: dict[Step, float] = {}
    for step in reversed(list(task.needs)):
        feeds[step] = task.cost(step) + rest[step]
        for needed in task.needs[step]:
            rest[needed] = min(rest[needed], feeds[step] if task.lane(needed) is task.lane(step) else 0.0)
    return feeds


POLICIES: Mapping[str, Callable[[Task], Iterator[Step]]] = {
    "list": _longest_path_first,
    "alternate": _alternate,
    "sequential": _sequential,
}
