"""What an emitted program asks of a device: two lanes, events between them, rows, collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol, Self

import torch
from torch.distributed import Work

from dbo_compile.runtime.collectives import Pending, start

WaitFor = Callable[[Work, str], None]
"""Waits for a collective, and raises if it does not end; the text says which one it is."""


FINISHED = Pending(None, None)


class Lanes(Protocol):
    """Every call of an emitted program that is not a segment. The compute lane is the current one at the start."""

    def rows(self, microbatch: int | None) -> tuple[int, int]: ...
    def slice(self, x: torch.Tensor, dim: int, microbatch: int) -> torch.Tensor: ...
    def view(self, x: torch.Tensor, dim: int, microbatch: int) -> torch.Tensor: ...
    def join(self, pieces: Sequence[torch.Tensor], dim: int) -> torch.Tensor: ...
    def switch_to_comm(self) -> None: ...
    def switch_to_compute(self) -> None: ...
    def record(self, event: str, lane: str) -> None: ...
    def wait(self, event: str, lane: str) -> None: ...
    def issue(self, op: Any, *args: Any, **kwargs: Any) -> Any: ...
    def free(self, *regs: Any) -> None: ...


class RowLanes:
    """The part that every device shares: which rows of the step belong to which microbatch."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.num_rows = tuple(rows)
        self.starts = (0, *accumulate(rows))

    def rows(self, microbatch: int | None) -> tuple[int, int]:
        """How many tokens the microbatch has, and how many lie before it; all of them and 0 for None."""
        return (self.starts[-1], 0) if microbatch is None else (self.num_rows[microbatch], self.starts[microbatch])

    def view(self, x: torch.Tensor, dim: int, microbatch: int) -> torch.Tensor:
        """The rows of the microbatch, in place."""
        block = x.shape[dim] // self.starts[-1] if self.starts[-1] else 0
        return x.narrow(dim, self.starts[microbatch] * block, self.num_rows[microbatch] * block)

    def slice(self, x: torch.Tensor, dim: int, microbatch: int) -> torch.Tensor:
        """The rows of the microbatch: a view where they lie together, else a copy in the same order of dims.

        Code compiled for the rows of one microbatch computes strides from them, so it could not read them spread out.
        """
        piece = self.view(x, dim, microbatch)
        lies_together = all(
            s <= x.stride(dim) or size == 1
            for d, (s, size) in enumerate(zip(x.stride(), x.shape, strict=True))
            if d != dim
        )
        return piece if lies_together else piece.clone()

    def join(self, pieces: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """All rows again, in the order of dims that the pieces have."""
        strides = pieces[0].stride()
        order = sorted(range(len(strides)), key=lambda d: -strides[d])
        if order == list(range(pieces[0].ndim)):
            return torch.cat(list(pieces), dim)
        joined = torch.cat([p.permute(order) for p in pieces], order.index(dim))
        return joined.permute([order.index(d) for d in range(len(order))])

    def free(self, *regs: Any) -> None:
        """The caller drops its references right after; there is nothing else to do where memory is counted."""


class WorkLanes(RowLanes):
    """The comm lane is the process group's own asynchronous work, the compute lane the calling thread.

    Collectives start in the order of the program; waiting for an event finishes all that were started before it was
    recorded, as on a stream. On the way out of `with`, also by an exception, no collective is left half done that the
    other ranks still come to; `wait_for` says how long that is waited for.
    """

    def __init__(self, rows: Sequence[int], wait_for: WaitFor | None = None) -> None:
        super().__init__(rows)
        self.wait_for = wait_for
        self.started: list[Pending] = []
        self.names: list[str] = []
        self.num_finished = 0
        self.events: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            self.finish()
        except RuntimeError:
            if error is None:  # else that one came first, and may have caused this one
                raise

    def switch_to_comm(self) -> None:
        pass

    def switch_to_compute(self) -> None:
        pass

    def record(self, event: str, lane: str) -> None:
        self.events[event] = len(self.started) if lane == "comm" else 0

    def wait(self, event: str, lane: str) -> None:
        if lane == "compute":
            self._finish_until(self.events[event])

    def issue(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Start a collective; a result of another one among its arguments is waited for first."""
        under_way = range(self.num_finished, len(self.started))
        waited_for = [i for i in under_way if any(a is self.started[i].result for a in args)]
        self._finish_until(max(waited_for, default=-1) + 1)
        pending = start(op, *args, **kwargs)
        self.started.append(pending)
        self.names.append(str(op))
        return pending.result

    def finish(self) -> None:
        """Wait for all that was started; if some of it fails, the first error comes after the last wait."""
        errors: list[RuntimeError] = []
        while self.num_finished < len(self.started):
            try:
                self._finish_until(len(self.started))
            except RuntimeError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _finish_until(self, end: int) -> None:
        while self.num_finished < end:
            pending, name = self.started[self.num_finished], self.names[self.num_finished]
            self.started[self.num_finished] = FINISHED  # or its result would stay in memory until the end
            self.num_finished += 1
            if pending.work is not None and self.wait_for is not None:
                self.wait_for(pending.work, name)
            else:
                pending.wait()
