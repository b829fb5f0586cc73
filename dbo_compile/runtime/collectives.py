"""Functional collectives, started without waiting where the process group works on its own, or played on a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dbo_compile.compat import process_group, tree_map

c10d = torch.ops._c10d_functional
REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}


@dataclass(frozen=True, slots=True)
class Pending:
    """A collective under way: what it will leave in `result`, and what to wait for (None: it is done)."""

    result: Any
    work: dist.Work | None

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()


def start(op: Any, *args: Any, **kwargs: Any) -> Pending:
    """Start the collective that an op stands for; an op that is not known here runs to its end."""
    if starter := STARTERS.get(op):
        return starter(*args, **kwargs)
    result = op(*args, **kwargs)
    if op.namespace == "_c10d_functional":
        result = tree_map(c10d.wait_tensor, result)
    return Pending(result, None)


def play(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The result of the op on the current stream of its device, without waiting for it on the host.

    A process group of streams then launches on that stream and on none of its own (`async_op=False`).
    """
    if starter := STARTERS.get(op):
        return starter(*args, async_op=False, **kwargs).result
    return start(op, *args, **kwargs).result


def _all_to_all(
    x: torch.Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    group: Any,
    *,
    async_op: bool = True,
) -> Pending:
    pg = process_group(group)
    num_rows = sum(output_splits) if output_splits else x.shape[0]
    out = x.new_empty((num_rows, *x.shape[1:]))
    work = dist.all_to_all_single(
        out, x.contiguous(), list(output_splits) or None, list(input_splits) or None, group=pg, async_op=async_op
    )
    return Pending(out, work)


def _all_reduce(x: torch.Tensor, reduce_op: str, group: Any, *, async_op: bool = True) -> Pending:
    out = x.clone(memory_format=torch.contiguous_format)
    return Pending(out, dist.all_reduce(out, REDUCE_OPS[reduce_op.lower()], process_group(group), async_op=async_op))


def _all_reduce_in_place(x: torch.Tensor, reduce_op: str, group: Any, *, async_op: bool = True) -> Pending:
    return Pending(x, dist.all_reduce(x, REDUCE_OPS[reduce_op.lower()], process_group(group), async_op=async_op))


def _all_gather(x: torch.Tensor, group_size: int, group: Any, *, async_op: bool = True) -> Pending:
    out = x.new_empty((x.shape[0] * group_size, *x.shape[1:]))
    work = dist.all_gather_into_tensor(out, x.contiguous(), process_group(group), async_op=async_op)
    return Pending(out, work)


def _reduce_scatter(x: torch.Tensor, reduce_op: str, group_size: int, group: Any, *, async_op: bool = True) -> Pending:
    out = x.new_empty((x.shape[0] // group_size, *x.shape[1:]))
    work = dist.reduce_scatter_tensor(
        out, x.contiguous(), REDUCE_OPS[reduce_op.lower()], process_group(group), async_op=async_op
    )
    return Pending(out, work)


STARTERS: dict[Any, Callable[..., Pending]] = {
    c10d.all_to_all_single.default: _all_to_all,
    c10d.all_reduce.default: _all_reduce,
    c10d.all_reduce_.default: _all_reduce_in_place,
    c10d.all_gather_into_tensor.default: _all_gather,
    c10d.reduce_scatter_tensor.default: _reduce_scatter,
}
