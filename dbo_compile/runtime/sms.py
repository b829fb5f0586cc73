"""The share of communication in the multiprocessors of a device: `comm_sms` of them, and matrix products the rest.

Kernels of both lanes run side by side. Without a budget a large product fills the chip first and a collective's blocks
wait for its tail; with one, each has its own part from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from dbo_compile.compat import gemm_sms_left_free, leave_sms_free
from dbo_compile.runtime.graphs import Player

SetNumSms = Callable[[int | None], object]


@contextmanager
def sm_budget(num_sms: int, setters: Sequence[SetNumSms]) -> Generator[None]:
    """While it lasts, PyTorch's products leave `num_sms` free, and `setters` have told comm ops to take no more.

    What the products left free before is restored whatever happens, and `setters` get None. NCCL's share is a matter
    of its process group: see `comm_group`.
    """
    before = gemm_sms_left_free()
    told: list[SetNumSms] = []
    try:
        for setter in setters:
            told.append(setter)
            setter(num_sms)
        leave_sms_free(num_sms)
        yield
    finally:
        leave_sms_free(before)
        for setter in reversed(told):
            setter(None)


class BudgetPlayer:
    """Plays, and so captures, within a budget of multiprocessors."""

    def __init__(self, player: Player, num_sms: int, setters: Sequence[SetNumSms]) -> None:
        self.player = player
        self.num_sms = num_sms
        self.setters = tuple(setters)

    def __call__(self, module: Callable[..., Any], rows: Sequence[int], args: Sequence[Any]) -> tuple[Any, ...]:
        with sm_budget(self.num_sms, self.setters):
            return self.player(module, rows, args)


def comm_group(ranks: Sequence[int] | None = None, *, comm_sms: int) -> Any:
    """A process group of NCCL whose collectives take at most `comm_sms` multiprocessors each, of high priority.

    NCCL fixes this when a communicator is made, so it cannot be set around a step. All ranks must call this alike.
    Raises `RuntimeError` where PyTorch has no NCCL.
    """
    nccl: Any = getattr(dist, "ProcessGroupNCCL", None)
    if nccl is None:
        raise RuntimeError("this PyTorch has no NCCL: make the group with dist.new_group, and leave comm_sms out")
    options = nccl.Options()
    options.is_high_priority_stream = True
    options.config.max_ctas = comm_sms
    return dist.new_group(ranks, backend="nccl", pg_options=options)
