"""Lanes of an accelerator: the compute lane is the caller's stream, the comm lane a stream of high priority.

Everything is issued by one host thread, in the order of the program, and nothing here ever waits on the host. Memory
belongs to the stream that was current when it was made, and goes back to it when the program drops it: `free` stands
where that stream has waited for the last reader on the other one, so no `record_stream` is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import torch

from dbo_compile.runtime.collectives import play
from dbo_compile.runtime.lanes import RowLanes
from dbo_compile.runtime.steps import ranged

FORK, JOIN = "fork:", "join:"
"""Events that no program has: steps are identifiers."""


class Event(Protocol):
    """A place on a stream, as `torch.Event` has it; it may be recorded again."""

    def record(self, stream: Any) -> None: ...
    def wait(self, stream: Any) -> None: ...


class StreamDevice(Protocol):
    """What lanes ask of a device: streams, and which one is current. A fake one makes all of this testable."""

    def current(self) -> Any: ...
    def switch(self, stream: Any) -> None: ...
    def new_stream(self) -> Any: ...
    def new_event(self) -> Event: ...


class Accelerator:
    """The device of some tensors, through PyTorch's device-agnostic streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def current(self) -> torch.Stream:
        return torch.accelerator.current_stream(self.device)

    def switch(self, stream: torch.Stream) -> None:
        torch.accelerator.set_stream(stream)

    def new_stream(self) -> torch.Stream:
        """A stream whose kernels go first: a collective is short of multiprocessors beside a large product."""
        return torch.Stream(self.device, priority=-1)

    def new_event(self) -> Event:
        return torch.Event(self.device)


class StreamLanes(RowLanes):
    """Two streams from `with` on. The comm lane begins after what the caller has issued: it reads his arguments. Where
    nothing is ever issued on it, it waits for nothing: a capture would not end before it is joined.

    At the end of a program the compute lane has waited for the comm lane, as the program says. Where an exception
    ended it half way, leaving `with` makes it wait. Events are kept in `events` by name, for the next step.
    """

    def __init__(self, rows: Sequence[int], device: StreamDevice, comm: Any, events: dict[str, Event]) -> None:
        super().__init__(rows)
        self.device = device
        self.events = events
        self.streams = {"compute": device.current(), "comm": comm}
        self._is_forked = False

    def __enter__(self) -> Self:
        self.record(FORK, "compute")
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            self.switch_to_compute()
            if error is not None and self._is_forked:
                self.record(JOIN, "comm")
                self.wait(JOIN, "compute")
        except Exception as another:
            if error is None:
                raise
            error.add_note(f"and then the lanes could not be joined: {another}")  # a consequence, perhaps

    def switch_to_comm(self) -> None:
        self._fork()
        self.device.switch(self.streams["comm"])

    def switch_to_compute(self) -> None:
        self.device.switch(self.streams["compute"])

    def record(self, event: str, lane: str) -> None:
        if event not in self.events:
            self.events[event] = self.device.new_event()
        self.events[event].record(self.streams[lane])

    def wait(self, event: str, lane: str) -> None:
        if lane == "comm":
            self._fork()
        self.events[event].wait(self.streams[lane])

    def _fork(self) -> None:
        if not self._is_forked:
            self._is_forked = True
            self.wait(FORK, "comm")

    def issue(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Communicate on the current stream, which the program has made the comm lane."""
        return play(op, *args, **kwargs)


class StreamPlayer:
    """Plays programs on a device, one step at a time; the comm lane is one stream for as long as it lives."""

    def __init__(self, device: StreamDevice) -> None:
        self.device = device
        self.comm = device.new_stream()
        self.events: dict[str, Event] = {}

    def __call__(self, module: Callable[..., Any], rows: Sequence[int], args: Sequence[Any]) -> tuple[Any, ...]:
        with StreamLanes(rows, self.device, self.comm, self.events) as lanes:
            results: tuple[Any, ...] = ranged(module)(lanes, *args)
        return results
