"""Several ranks in one process: every tensor holds what each rank has, and collectives mix them (`LocalTensorMode`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode

from dbo_compile.runtime.engine import Engine
from dbo_compile.runtime.ways import played

ALONE = SimpleNamespace(
    all_reduce=lambda x, *_: x.clone(),
    all_to_all_single=lambda x, *_: x.clone(),
    all_gather_tensor=lambda x, *_: x.clone(),
    reduce_scatter_tensor=lambda x, *_: x.clone(),
)
"""What collectives do on one rank, without a process group."""


class Stopped(Exception):
    """A call that is not to be played here: its program, its rows, its flat arguments."""

    def __init__(self, module: Any, rows: Sequence[int], args: Sequence[Any]) -> None:
        super().__init__("not played")
        self.module, self.rows, self.args = module, rows, args


def _stop(module: Any, rows: Sequence[int], args: Sequence[Any]) -> Any:
    raise Stopped(module, rows, args)


def stopped(compiled: Callable[..., Any], args: Sequence[Any]) -> Stopped | None:
    """What a call would play; None if it plays no program."""
    try:
        compiled(*args)
    except Stopped as stopped:
        return stopped
    return None


def on_ranks(engine: Engine, compiled: Callable[..., Any], args: Sequence[Sequence[Any]]) -> tuple[Any, Any] | None:
    """What a call with `args[rank]` gives on each rank, results and arguments after it: split, and whole in eager.

    None if it is not split, or is an error in eager.
    """
    engine.player = _stop
    calls = [stopped(compiled, each) for each in args]
    if any(call is None or len(call.rows) < 2 for call in calls):
        return None
    split, num_ranks = calls[0], len(args)
    flat = list(zip(*(call.args for call in calls), strict=True))
    with LocalTensorMode(frozenset(range(num_ranks))):
        mine, its = ([together(values) for values in flat] for _ in range(2))
        try:
            want = (*engine.ways.whole.eager(*its), *its)
        except (RuntimeError, IndexError):  # numbers that count tokens are used where there are fewer places
            return None
        got = (*played(split.module, split.rows, mine), *mine)
    return tuple([[apart(x, rank) for x in values] for rank in range(num_ranks)] for values in (got, want))


def together(values: Sequence[Any]) -> Any:
    if not isinstance(values[0], torch.Tensor):
        return values[0]
    return LocalTensor({rank: x.clone() for rank, x in enumerate(values)})


def apart(x: Any, rank: int) -> Any:
    return x._local_tensors[rank] if isinstance(x, LocalTensor) else x
