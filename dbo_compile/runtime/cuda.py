"""CUDA graphs. The only file that knows CUDA; streams and events are PyTorch's device-agnostic ones elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from dbo_compile import compat


def is_capturing() -> bool:
    """Whether what is launched now is recorded and not run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class CudaGraphs:
    """Captures on one stream, into one pool of memory: graphs that share a pool must be captured on one stream.

    Graphs may share memory because they are replayed one after the other, and in the order of one stream. With
    `keep_graph` the nodes of a graph can be looked at.
    """

    def __init__(self, device: torch.device, *, keep_graph: bool = False) -> None:
        self.device = device
        self.keep_graph = keep_graph
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []
        with compat.without_fake_tensors(), torch.inference_mode(False), torch.no_grad():  # it is made while compiling
            self._one = torch.ones(1, 1, device=device)
            self._warm_up()

    def is_capturing(self) -> bool:
        return is_capturing()

    def _warm_up(self) -> None:
        """Have cuBLAS and cuBLASLt make their workspaces for this stream now, so that they lie in no graph's memory."""
        with torch.cuda.stream(self.stream):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.ones(16, 16, dtype=dtype, device=self.device)
                torch.addmm(x[0], x @ x, x)

    def capture(self, play: Callable[[], tuple[Any, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Any, ...]]:
        """Record what `play` launches; nothing of it runs.

        `thread_local`: other threads, that of NCCL's watchdog among them, may do meanwhile what they always do.
        """
        graph = torch.cuda.CUDAGraph(keep_graph=self.keep_graph)
        before = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(before)
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                results = play()
        except BaseException:
            torch.cuda.set_stream(before)
            compat.stop_recording(self.device, self.pool)
            self.pool = torch.cuda.graph_pool_handle()  # before torch 2.12 pinned memory goes on recording to this one
            self._failed.append(graph)  # whose end would meddle with the pool
            self._capture_something()
            raise
        return graph, results

    def _capture_something(self) -> None:
        """After a capture that failed the random number generator believes that it is captured, until one succeeds."""
        with suppress(RuntimeError):
            self._one.add_(1)
            torch.cuda.synchronize(self.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local"):
                self._one.add_(1)

    def new_pool(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        self.pool = torch.cuda.graph_pool_handle()

    def memory_size(self) -> int:
        """All memory that the device has."""
        _, total = torch.cuda.mem_get_info(self.device)
        return total

    def memory_used(self) -> int:
        """All memory of the device that is in use, that of the driver for graphs included."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # what PyTorch keeps for later is not in use
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free
