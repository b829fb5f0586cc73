"""Inputs inside of an argument: `metadata.slots` is the field `slots` of a dataclass, or what a dict has under that."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dbo_compile.axes import Axis, CuSeqlens, MaxSeqlen, Requests, SeqLens
from dbo_compile.config import nearest


def opened(inputs: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The arguments, and beside them those of `names` that are members of one; of an argument that is None, None.

    Raises `ValueError` if an argument has no such member.
    """
    members = {name: _member(inputs.get(name.partition(".")[0]), name) for name in names if "." in name}
    return {**inputs, **members}


def closed(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with their members in them again: what held other ones is copied."""
    made = {name: x for name, x in inputs.items() if "." not in name}
    for name, x in inputs.items():
        arg, dot, key = name.partition(".")
        if not dot or _member(made.get(arg), name) is x:
            continue
        if isinstance(made[arg], Mapping):
            made[arg] = {**made[arg], key: x}
        else:
            made[arg] = copy.copy(made[arg])
            object.__setattr__(made[arg], key, x)  # it may be frozen
    return made


def without_requests(inputs: Mapping[str, Any], axes: Mapping[str, Axis]) -> dict[str, Any]:
    """The inputs as a step of no requests has them."""
    return {name: _none(x, axes[name]) if name in axes and x is not None else x for name, x in inputs.items()}


def _member(held: Any, name: str) -> Any:
    arg, _, key = name.partition(".")
    if held is None:
        return None
    if isinstance(held, Mapping) and key in held:
        return held[key]
    if not isinstance(held, Mapping) and hasattr(held, key):
        return getattr(held, key)
    known = [*map(str, held)] if isinstance(held, Mapping) else [n for n in dir(held) if not n.startswith("_")]
    raise ValueError(f"token_dims has {name!r}, but {arg} has no {key!r}{nearest(key, known)} An optional one is None.")


def _none(x: Any, axis: Axis) -> Any:
    match axis:
        case Requests(dim):
            return x.new_empty(x.narrow(dim, 0, 0).shape)
        case CuSeqlens():
            return x.new_zeros(1)
        case SeqLens():
            return x.new_empty(0)
        case MaxSeqlen():
            return torch.zeros_like(x) if isinstance(x, torch.Tensor) else 0
        case _:
            return x
