"""What the inputs of a step say about its requests, read on the host and checked: `RequestTable`.

Metadata that cannot be right is a `ValueError` before anything is played, and so before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from dbo_compile.axes import Axis, CuSeqlens, MaxSeqlen, Requests, SeqLens, Tokens
from dbo_compile.runtime.requests import RequestTable


def read_requests(inputs: Mapping[str, Any], axes: Mapping[str, Axis], num_tokens: int) -> RequestTable | None:
    """What the inputs of a step of `num_tokens` say about its requests, found consistent; None if nothing.

    `axes` says what the inputs are, by name. Without bounds (`CuSeqlens`) every request has one token, as in decode.
    """
    named = [(name, axis, inputs[name]) for name, axis in axes.items() if inputs.get(name) is not None]
    for name, axis, value in named:
        _check_form(name, axis, value, num_tokens)
    counted = {name: n for name, axis, value in named if (n := _num_requests(axis, value)) is not None}
    if not counted:
        return None
    if len(set(counted.values())) > 1:
        listed = ", ".join(f"{name}: {n}" for name, n in counted.items())
        raise ValueError(f"inputs of one step must tell of as many requests ({listed}); is one of another step?")
    starts = _starts(named, num_tokens, next(iter(counted.values())))
    table = RequestTable(starts, _keys(named, starts))
    for name, axis, value in named:
        _check_longest(name, axis, value, table)
    return table


def _check_form(name: str, axis: Axis, value: Any, num_tokens: int) -> None:
    if isinstance(axis, MaxSeqlen):
        if not (isinstance(value, int) or (isinstance(value, torch.Tensor) and value.numel() == 1)):
            raise ValueError(f"{name} is the length of the longest request: expected one number, got {_seen(value)}")
        return
    if not isinstance(axis, Tokens | Requests | CuSeqlens | SeqLens):
        return
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is {axis}: expected a tensor, got {_seen(value)}")
    if isinstance(axis, CuSeqlens | SeqLens):
        if value.ndim != 1 or value.dtype not in _INTEGERS:
            raise ValueError(f"{name} is {axis}: expected one dim of integers, got {_seen(value)}")
        if isinstance(axis, CuSeqlens) and not len(value):
            raise ValueError(f"{name} is {axis}: expected at least its first number, 0, got no number at all")
        return
    if not -value.ndim <= axis.dim < value.ndim:
        raise ValueError(f"{name} is {axis}, but has shape {list(value.shape)}")
    if isinstance(axis, Tokens) and value.shape[axis.dim] != num_tokens:
        raise ValueError(f"{name} has {value.shape[axis.dim]} rows in dim {axis.dim}, but the step {num_tokens} tokens")


_INTEGERS = (torch.int32, torch.int64)


def _seen(value: Any) -> str:
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def _num_requests(axis: Axis, value: Any) -> int | None:
    match axis:
        case Requests(dim):
            return int(value.shape[dim])
        case CuSeqlens():
            return len(value) - 1
        case SeqLens():
            return len(value)
        case _:
            return None


Named = Sequence[tuple[str, Axis, Any]]


def _starts(named: Named, num_tokens: int, num_requests: int) -> tuple[int, ...]:
    found: tuple[int, ...] | None = None
    may_end_before = all(axis.padded for _, axis, _ in named if isinstance(axis, CuSeqlens))
    for name, axis, value in named:
        if not (isinstance(axis, CuSeqlens) and axis.of == "queries"):
            continue
        starts = _rising(name, value)
        if starts[-1] > num_tokens or (starts[-1] < num_tokens and not axis.padded):
            raise ValueError(
                f"{name} ends at {starts[-1]}, but the step has {num_tokens} tokens; is it of another step? "
                "(Say CuSeqlens(padded=True) if the last tokens are padding.)"
            )
        if found is not None and starts != found:
            raise ValueError(f"{name} has other bounds than the first input of its kind: {starts} and {found}")
        found = starts
    if found is None:
        if num_requests != num_tokens:
            raise ValueError(f"{num_requests} requests share {num_tokens} tokens, and no input is CuSeqlens()")
        return tuple(range(num_tokens + 1))
    if num_requests > num_tokens and not may_end_before:
        raise ValueError(f"there are {num_requests} requests, more than the {num_tokens} tokens of the step")
    return found


def _rising(name: str, value: torch.Tensor) -> tuple[int, ...]:
    bounds = tuple(map(int, value.tolist()))
    if bounds[0] != 0:
        raise ValueError(f"{name} begins with {bounds[0]}, expected 0: the first request begins at the first token")
    for r, (a, b) in enumerate(pairwise(bounds)):
        if b < a:
            raise ValueError(f"{name} goes down from {a} to {b}: request {r} would have {b - a} tokens")
    return bounds


def _keys(named: Named, starts: tuple[int, ...]) -> tuple[int, ...]:
    """How many tokens each request attends to: its own, if no input says more."""
    lengths = tuple(b - a for a, b in pairwise(starts))
    found = lengths
    said_by = ""
    for name, axis, value in named:
        if isinstance(axis, SeqLens):
            keys = tuple(map(int, value.tolist()))
        elif isinstance(axis, CuSeqlens) and axis.of == "keys":
            keys = tuple(b - a for a, b in pairwise(_rising(name, value)))
        else:
            continue
        for r, (length, key) in enumerate(zip(lengths, keys, strict=True)):
            if key < length:
                raise ValueError(
                    f"{name} says that request {r} attends to {key} tokens, fewer than its {length} in this step"
                )
        if said_by and keys != found:
            raise ValueError(f"{said_by} and {name} differ in how many tokens requests attend to: {found} and {keys}")
        found, said_by = keys, name
    return found


def _check_longest(name: str, axis: Axis, value: Any, table: RequestTable) -> None:
    if not isinstance(axis, MaxSeqlen):
        return
    longest = max(table.lengths if axis.of == "queries" else table.keys, default=0)
    if int(value) < longest:
        raise ValueError(f"{name} is {int(value)}, but the longest request has {longest} tokens; of another step?")
