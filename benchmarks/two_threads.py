"""Dual-batch overlap as vLLM does it: two threads run the model, one microbatch each, and hand over at every exchange.

Our own small re-implementation of the mechanism (`vllm/v1/worker/ubatching.py`), as a baseline. Both threads launch on
one compute stream and one comm stream, and only one of them runs at any time. Before an exchange a thread notes where
its compute stands and hands over; when it is its turn again, it starts the exchange on the comm stream, hands over
again, and then has its compute wait for the exchange. The parts between exchanges may be compiled. To capture, both
threads run inside one capture.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.host_link import host_link


class TwoThreads:
    """Calls `model(*microbatch, exchange=...)` in two threads, on the halves of dim 0 of all inputs."""

    def __init__(self, model: Callable[..., torch.Tensor], device: torch.device) -> None:
        self.model = model
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.comm = torch.cuda.Stream(device, priority=-1) if self.on_gpu else None
        self.turns = [threading.Event(), threading.Event()]
        self.over = [False, False]
        self.me = threading.local()

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        compute = torch.cuda.current_stream(self.device) if self.on_gpu else None
        halves = list(zip(*(x.tensor_split(2) for x in inputs), strict=True))
        outs: list[Any] = [None, None]
        self.over = [False, False]
        threads = [threading.Thread(target=self._run, args=(i, half, outs, compute)) for i, half in enumerate(halves)]
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
        self.me.index = index
        self._wait()
        try:
            with torch.no_grad(), torch.cuda.stream(compute):
                outs[index] = self.model(*half, exchange=self.exchange)
        except BaseException as error:
            outs[index] = error
        finally:
            self.over[index] = True
            self.turns[1 - index].set()

    def _wait(self) -> None:
        turn = self.turns[self.me.index]
        turn.wait()
        turn.clear()

    def _hand_over(self) -> None:
        if not self.over[1 - self.me.index]:
            self.turns[1 - self.me.index].set()
            self._wait()

    @torch.compiler.disable
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
