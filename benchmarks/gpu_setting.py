"""Where the GPU benchmark runs: its model and inputs, how it times, until when it may go on, and what went wrong."""

from __future__ import annotations

import gc
import math
import random
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu_model import TINY, Sizes, Stack, inputs, make_stack
from benchmarks.results import Timing

PREFILL, DECODE = (1024, 2048, 4096, 8192, 16384), (32, 64, 128, 256, 512)
REPEATS = 7
WARM_UPS = 3
"""Calls before anything is timed: `CapturePlayer` captures in the second one."""

Call = Callable[[], Any]


class Setting:
    """The model, where it is, and which sizes are measured."""

    def __init__(self, device: str, *, tiny: bool) -> None:
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.sizes = TINY if tiny else Sizes()
        self.length = 4 if tiny else 256
        self.num_tokens = {"prefill": (16, 24) if tiny else PREFILL, "decode": (6, 10) if tiny else DECODE}
        self.stack: Stack = make_stack(self.sizes, device)
        self.options = {"inner": "eager"} if tiny else {}
        self.inductor = "eager" if tiny else "inductor"
        self.deadline = math.inf
        """After this moment of `time.monotonic` no further size is begun."""
        self.notes: list[str] = []
        """What a reader of the figures must know; those that make the run fail are `faults` as well."""
        self.faults: list[str] = []

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def inputs(self, phase: str, num_tokens: int) -> tuple[torch.Tensor, ...]:
        made = inputs(self.sizes, phase, num_tokens, str(self.device), self.length)
        for x in made:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return made

    def sizes_in_time(self, phase: str) -> Iterator[int]:
        """Largest first, so that pinned memory and pools are made once; the largest in any case."""
        left = sorted(self.num_tokens[phase])
        while left:
            yield left.pop()
            self.free()
            if left and time.monotonic() > self.deadline:
                self.notes.append(f"Out of time: {phase} of {', '.join(map(str, left))} tokens was left out.")
                return

    # -- what went wrong ----------------------------------------------------------------------------------------------

    def fault(self, what: str) -> None:
        self.faults.append(what)
        self.notes.append(f"**{what}**")

    @contextmanager
    def going_on(self, doing: str) -> Generator[None]:
        """An error ends what is inside, is noted, and no more: what else was measured is worth having."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            first = next(iter(str(error).splitlines()), "")
            self.fault(f"{doing} failed: {type(error).__name__}: {first}")

    def free(self) -> None:
        """Give back the memory of graphs and tensors that are gone."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    # -- timing -------------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def warm_up(self, call: Call) -> Any:
        for _ in range(WARM_UPS):
            result = call()
        self.synchronize()
        return result

    def timings(self, calls: Mapping[str, Call]) -> dict[str, Timing]:
        """Seconds of each, taken in turn and in an order of its own each round, so that a drift hits all alike."""
        repeats = {name: max(1, min(20, int(0.02 / max(1e-6, self._seconds(call))))) for name, call in calls.items()}
        taken: dict[str, list[float]] = {name: [] for name in calls}
        orders = random.Random(0)
        for _ in range(REPEATS):
            for name in orders.sample(list(calls), len(calls)):
                taken[name].append(self._seconds(calls[name], repeats[name]))
        return {name: Timing.of(seconds) for name, seconds in taken.items()}

    def host_timing(self, call: Call) -> Timing:
        """How long the host is busy with one call, while the device has nothing else to do."""
        taken = []
        for _ in range(REPEATS):
            self.synchronize()
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        self.synchronize()
        return Timing.of(taken)

    def _seconds(self, call: Call, repeats: int = 1) -> float:
        """Of one call: on the GPU between two events, elsewhere by the clock."""
        self.synchronize()
        if not self.on_gpu:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) / repeats
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
