"""Dual-batch overlap as vLLM does it: two threads run the model, one microbatch each, and hand over at every exchange.

Our own small re-implementation of the mechanism (`vllm/v1/worker/ubatching.py`), as a baseline. Both threads launch on
one compute stream and one comm stream, and only one of them runs at any time. Before an exchange a thread notes where
its compute stands and hands over; when it is its turn again, it starts the exchange on the comm stream, hands over
again, and then has its compute wait for the exchange. All that is one op, as in vLLM, so that the model may be compiled
as one graph. To capture, both threads run inside one capture.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any

import torch

from benchmarks.host_link import host_link

_here = threading.local()
"""In each of the two threads: `threads` that it is one of, and which (`index`)."""


class TwoThreads:
    """Calls `model(*microbatch, exchange=...)` in two threads, on the halves of dim 0 of all inputs."""

    def __init__(self, model: Callable[..., torch.Tensor], device: torch.device) -> None:
        self.model = model
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.comm = torch.cuda.Stream(device, priority=-1) if self.on_gpu else None
        self.turns = [threading.Event(), threading.Event()]
        self.over = [False, False]

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        compute = torch.cuda.current_stream(self.device) if self.on_gpu else None
        halves = list(zip(*map(_halves, inputs), strict=True))
        outs: list[Any] = [None, None]
        self.over = [False, False]
        for turn in self.turns:  # who ended last has set one: with a second turn, both threads would run at once
            turn.clear()
        threads = [  # in a context of its own a thread would compile with PyTorch's default configuration
            threading.Thread(target=copy_context().run, args=(self._run, i, half, outs, compute))
            for i, half in enumerate(halves)
        ]
        for thread in threads:
            thread.start()
        self.turns[0].set()
        for thread in threads:
            thread.join()
        for out in outs:
            if isinstance(out, BaseException):
                raise out
        return torch.cat(outs)

    def _run(self, index: int, half: Sequence[torch.Tensor], outs: list[Any], compute: Any) -> None:
        _here.threads, _here.index = self, index
        self._wait()
        try:
            with torch.no_grad(), torch.cuda.stream(compute):
                outs[index] = self.model(*half, exchange=exchange_in_turn)
        except BaseException as error:
            outs[index] = error
        finally:
            self.over[index] = True
            self.turns[1 - index].set()

    def _wait(self) -> None:
        turn = self.turns[_here.index]
        turn.wait()
        turn.clear()

    def _hand_over(self) -> None:
        if not self.over[1 - _here.index]:
            self.turns[1 - _here.index].set()
            self._wait()

    def exchange(self, rows: torch.Tensor) -> torch.Tensor:
        if self.comm is None:
            self._hand_over()
            out: torch.Tensor = host_link(rows)
            self._hand_over()
            return out
        compute = torch.cuda.current_stream(self.device)
        computed = compute.record_event()
        self._hand_over()
        with torch.cuda.stream(self.comm):
            self.comm.wait_event(computed)
            out = host_link(rows)
            arrived = self.comm.record_event()
        rows.record_stream(self.comm)
        self._hand_over()
        compute.wait_event(arrived)
        out.record_stream(compute)
        return out


def _halves(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Dynamic where the whole is: else the first size would be compiled by itself, and the second again for all."""
    halves = x.tensor_split(2)
    for half in halves:
        torch._dynamo.maybe_mark_dynamic(half, 0)
    return halves


@torch.library.custom_op("dbo_bench::exchange_in_turn", mutates_args=())
def exchange_in_turn(rows: torch.Tensor) -> torch.Tensor:
    """The exchange of the thread that calls it."""
    threads: TwoThreads = _here.threads
    return threads.exchange(rows)


@exchange_in_turn.register_fake
def _(rows: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(rows)
