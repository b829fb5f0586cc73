"""Token exchange of expert parallelism whose sizes never leave the device: exact, and can be captured.

Built on `symm_mem.all_to_all_vdev_2d`: kernels read the numbers of rows and fetch the rows from peers by NVSHMEM. The
two ops here are functional. They keep the memory that peers reach to themselves, so microbatches do not order each
other by writing to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.distributed as dist

from dbo_compile import compat
from dbo_compile.errors import CannotSplit
from dbo_compile.integrations.expert_parallel import Experts, check_arguments, combine, num_ranks_of
from dbo_compile.ir.tokens import Local, Number, Placement, Value
from dbo_compile.rules.collectives import register_comm_op
from dbo_compile.runtime.cuda import is_capturing

symm_mem = torch.ops.symm_mem
MOST_RANKS = MOST_LOCAL_EXPERTS = 16
"""Limits of PyTorch's kernels: a block has 16 warps, of which each adds up the rows of one expert on their way there,
and of one rank on their way back."""


def exchange_device(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    experts: Experts,
    *,
    num_experts: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Do what `exchange_exact` does without reading anything on the host, so that a CUDA graph can capture it.

    Only the routed rows travel. Shapes must still not depend on them: `experts` gets room for every routing,
    N = T * K * W + num_experts / W rows; those that nobody sent carry `num_experts / W` as their expert, one past the
    last. This room is copied out of the memory that peers reach: little for the few tokens of a decode step, for which
    it is made, more than the exchange itself for the many of a prefill. All ranks must pass the same T. Rows arrive
    sorted by local expert.

    Each size must be called once before it is captured: memory that peers reach is made by all ranks together, when
    a larger size comes for the first time. Needs NVSHMEM, and at most 16 ranks, equally far apart, with at most 16
    experts each. One rank needs neither: its rows only change their order.

    Raises `ValueError` for arguments that do not fit together, `RuntimeError` for a destroyed group or where there is
    no NVSHMEM.
    """
    num_ranks = num_ranks_of(group)
    check_arguments(hidden, top_k_index, top_k_weights, num_experts, num_ranks)
    if num_ranks > 1:
        _check_kernels(dist.get_process_group_ranks(group), num_experts // num_ranks)
    routes = top_k_index.reshape(-1).long()
    sent = routes.new_zeros(num_experts).scatter_add(0, routes, torch.ones_like(routes))
    order = torch.argsort(routes)
    rows, arrived_for, where = dispatch_rows(hidden[order // top_k_index.size(1)], sent, num_ranks, group.group_name)
    rows = combine_rows(experts(rows, arrived_for), where, order.size(0), group.group_name)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.size(0), device=order.device)
    return combine(rows[place].view(*top_k_index.shape, rows.size(1)), top_k_weights, hidden.dtype)


def _check_kernels(ranks: Sequence[int], num_local: int) -> None:
    if len(ranks) > MOST_RANKS or num_local > MOST_LOCAL_EXPERTS:
        raise ValueError(
            f"{len(ranks)} ranks with {num_local} experts each: the kernels take {MOST_RANKS} and {MOST_LOCAL_EXPERTS} "
            "at most; use exchange_static"
        )
    if len({after - rank for rank, after in pairwise(ranks)}) > 1:
        raise ValueError(f"ranks {list(ranks)} are not equally far apart, which NVSHMEM needs; use exchange_static")


# -- the two ops ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("dbo_compile::dispatch_rows", mutates_args=())
def dispatch_rows(
    rows: torch.Tensor, sent: torch.Tensor, num_ranks: int, group_name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bring `rows` [N, H], sorted by expert, `sent[e]` of them for expert e, to the ranks of their experts.

    Returns room for all rows that could arrive [N * W + E / W, H], the local expert of each (E / W for no row), and
    where the kernels have put them [2, E]: numbers of rows and offsets by (local expert, rank).
    """
    num_local = sent.numel() // num_ranks
    room = rows.size(0) * num_ranks + num_local
    if num_ranks == 1:
        where = torch.stack([sent, sent.cumsum(0) - sent])
        experts = _expert_of_each_row(where, room, num_local, num_ranks)
        return torch.cat([rows, rows.new_zeros(num_local, rows.size(1))]), experts, where
    buffers = _buffers(group_name, rows, rows.size(0), room, sent.numel())
    source, out, where = buffers.next_source(), buffers.arrived, buffers.next_where()
    source[: rows.size(0)].copy_(rows)
    buffers.sizes.copy_(sent)
    symm_mem.all_to_all_vdev_2d(source, out, buffers.sizes, where, group_name)
    where = where.clone()
    return out[:room].clone(), _expert_of_each_row(where, room, num_local, num_ranks), where


@dispatch_rows.register_fake
def _(
    rows: torch.Tensor, sent: torch.Tensor, num_ranks: int, group_name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    room = rows.size(0) * num_ranks + sent.size(0) // num_ranks
    return rows.new_empty(room, rows.size(1)), sent.new_empty(room), sent.new_empty(2, sent.size(0))


@torch.library.custom_op("dbo_compile::combine_rows", mutates_args=())
def combine_rows(rows: torch.Tensor, where: torch.Tensor, num_rows: int, group_name: str) -> torch.Tensor:
    """Bring rows back to the ranks they came from, in the order in which those sent them [num_rows, H']."""
    if compat.process_group(group_name).size() == 1:
        return rows[:num_rows].clone()
    buffers = _buffers(group_name, rows, num_rows, rows.size(0), where.size(1))
    source = buffers.next_back()
    source[: rows.size(0)].copy_(rows)
    buffers.sizes_back.copy_(where)
    symm_mem.all_to_all_vdev_2d_offset(source, buffers.returned, buffers.sizes_back, buffers.next_where(), group_name)
    return buffers.returned[:num_rows].clone()


@combine_rows.register_fake
def _(rows: torch.Tensor, where: torch.Tensor, num_rows: int, group_name: str) -> torch.Tensor:
    return rows.new_empty(num_rows, rows.size(1))


def _expert_of_each_row(where: torch.Tensor, room: int, num_local: int, num_ranks: int) -> torch.Tensor:
    """The local expert of each row that arrived; `num_local` for a gap, which the kernels leave where none came."""
    sizes = where[0].view(num_local, num_ranks).sum(1)
    starts = where[1].view(num_local, num_ranks)[:, 0].contiguous()
    row = torch.arange(room, device=where.device)
    expert = torch.searchsorted(starts, row, right=True) - 1
    return torch.where(row < starts[expert] + sizes[expert], expert, num_local)


# -- where the tokens are ---------------------------------------------------------------------------------------------


def dispatched(rows: Value, sent: Value, _num_ranks: int, _group: str) -> tuple[Placement, ...]:
    """Each rank sends a microbatch's own rows to where they say."""
    if not (rows.is_local and sent.is_local):
        raise CannotSplit("which rank a row goes to depends on its place among all tokens")
    return Local(), Local(), Local(position=True)


def combined(rows: Value, where: Value, _num_rows: int | Number, _group: str) -> Placement:
    if not (rows.is_local and where.is_local):
        raise CannotSplit("which rank a row goes back to depends on its place among all tokens")
    return Local()


register_comm_op(torch.ops.dbo_compile.dispatch_rows.default, rule=dispatched, group_arg=3)
register_comm_op(torch.ops.dbo_compile.combine_rows.default, rule=combined, group_arg=3)


# -- memory that peers reach ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Buffers:
    """Symmetric memory for one group and kind of rows.

    Peers fetch from `sources` and `backs` and write to `wheres`, and the kernels do not wait at their end: a slow
    peer may still fetch for one exchange when the next begins. But each begins with a barrier, so nobody is still in
    the one before that: two of each, used in turn, are enough.
    """

    memory: compat.Symmetric
    num_rows: int
    room: int
    num_experts: int
    width: int
    dtype: torch.dtype
    turn: dict[str, int] = field(default_factory=dict)
    arrived: torch.Tensor = field(init=False)
    returned: torch.Tensor = field(init=False)
    sizes: torch.Tensor = field(init=False)
    sizes_back: torch.Tensor = field(init=False)
    sources: list[torch.Tensor] = field(init=False)
    backs: list[torch.Tensor] = field(init=False)
    wheres: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        empty, width = self.memory.empty, self.width
        self.sources = [empty((self.num_rows, width), self.dtype) for _ in range(2)]
        self.backs = [empty((self.room, width), self.dtype) for _ in range(2)]
        self.wheres = [empty((2, self.num_experts), torch.int64) for _ in range(2)]
        self.arrived = empty((self.room, width), self.dtype)
        self.returned = empty((self.num_rows, width), self.dtype)
        self.sizes = empty((self.num_experts,), torch.int64)
        self.sizes_back = empty((2, self.num_experts), torch.int64)

    def next_source(self) -> torch.Tensor:
        return self._next("sources", self.sources)

    def next_back(self) -> torch.Tensor:
        return self._next("backs", self.backs)

    def next_where(self) -> torch.Tensor:
        return self._next("wheres", self.wheres)

    def _next(self, name: str, of: list[torch.Tensor]) -> torch.Tensor:
        self.turn[name] = 1 - self.turn.get(name, 1)
        return of[self.turn[name]]


_all_buffers: dict[tuple[str, torch.dtype, int, int], list[_Buffers]] = {}
"""By group, dtype, width and experts, the largest last. Smaller ones stay: captured graphs have their addresses."""


def _buffers(group: str, rows: torch.Tensor, num_rows: int, room: int, num_experts: int) -> _Buffers:
    made = _all_buffers.setdefault((group, rows.dtype, rows.size(1), num_experts), [])
    if not made or made[-1].num_rows < num_rows or made[-1].room < room:
        if is_capturing():
            raise RuntimeError(
                f"an exchange of {num_rows} rows needs more memory that peers reach than there is, and a capture "
                "cannot make it: play the largest size once before"
            )
        memory = compat.Symmetric(group, rows.device)
        made.append(_Buffers(memory, num_rows, room, num_experts, rows.size(1), rows.dtype))
    return made[-1]
