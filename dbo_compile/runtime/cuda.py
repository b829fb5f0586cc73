"""CUDA graphs. The only file that knows CUDA; streams and events are PyTorch's device-agnostic ones elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def is_capturing() -> bool:
    """Whether what is launched now is recorded and not run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class CudaGraphs:
    """Captures on one stream, into one pool of memory: graphs that share a pool must be captured on one stream.

    Graphs may share memory because they are replayed one after the other, and in the order of one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def is_capturing(self) -> bool:
        return is_capturing()

    def capture(self, play: Callable[[], tuple[Any, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Any, ...]]:
        """Record what `play` launches; nothing of it runs.

        `thread_local`: other threads, that of NCCL's watchdog among them, may do meanwhile what they always do.
        """
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            results = play()
        return graph, results

    def new_pool(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        self.pool = torch.cuda.graph_pool_handle()

    def memory_used(self) -> int:
        """All memory of the device that is in use, that of the driver for graphs included."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # what PyTorch keeps for later is not in use
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free
