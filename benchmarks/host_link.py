"""A comm op for a single GPU: rows go to pinned host memory and back on the copy engines, as if to other ranks.

This is a stand-in. It moves as many bytes as the exchange of one rank among many with evenly routed tokens (as many
come as go), at the speed of PCIe 5 x16, which is about that of one 400 Gb/s network card. It takes no multiprocessors;
NCCL would take some. Registered through the public extension point, and can be captured. On a CPU it is a copy.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from dbo_compile import register_comm_op
from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import Local, Placement, Value

NUM_CHUNKS = 4
"""A chunk is on its way back while the next one goes out: both directions of the link are in use."""


@dataclass(slots=True)
class _Link:
    is_up: bool = True
    pinned: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    back: dict[torch.device, torch.cuda.Stream] = field(default_factory=dict)

    def room(self, rows: torch.Tensor) -> torch.Tensor:
        """Pinned memory for `rows`; exchanges follow each other on one stream, so one piece serves all of them.

        Made for the largest size first: a smaller piece could not be given back, a captured graph has its address.
        """
        num_bytes = rows.numel() * rows.element_size()
        if rows.device not in self.pinned or self.pinned[rows.device].numel() < num_bytes:
            self.pinned[rows.device] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            self.back[rows.device] = torch.cuda.Stream(rows.device, priority=-1)
            _KEPT.append(self.pinned[rows.device])
        return self.pinned[rows.device][:num_bytes].view(rows.dtype).view(rows.shape)


_KEPT: list[torch.Tensor] = []
LINK = _Link()


@contextmanager
def link_down() -> Generator[None]:
    """What a step takes without communication: rows stay where they are."""
    LINK.is_up = False
    try:
        yield
    finally:
        LINK.is_up = True


@torch.library.custom_op("dbo_bench::host_link", mutates_args=())
def host_link(rows: torch.Tensor) -> torch.Tensor:
    """`rows` [N, H], after a way out and back."""
    if not LINK.is_up:
        return rows.clone()
    out = torch.empty_like(rows)
    if rows.device.type == "cpu":
        return out.copy_(rows)
    pinned, here = LINK.room(rows), torch.cuda.current_stream(rows.device)
    back = LINK.back[rows.device]
    back.wait_stream(here)
    for source, host, target in zip(*(t.chunk(NUM_CHUNKS) for t in (rows, pinned, out)), strict=True):
        host.copy_(source, non_blocking=True)
        there = here.record_event()
        back.wait_event(there)
        with torch.cuda.stream(back):
            target.copy_(host, non_blocking=True)
    here.wait_stream(back)
    return out


@host_link.register_fake
def _(rows: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(rows)


def linked(rows: Value) -> Placement:
    """A microbatch's own rows come back in the order in which they left."""
    if not rows.is_local:
        raise CannotSplit("which rank a row goes to depends on its place among all tokens")
    return Local()


register_comm_op(torch.ops.dbo_bench.host_link.default, rule=linked)
