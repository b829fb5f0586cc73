"""What an input of a step is to its tokens and its requests: the values of `token_dims`.

A serving engine hands over one flat row of tokens from many requests, and beside it metadata about the requests. A
plain integer in `token_dims` says `Tokens(dim)`; everything else is said with these types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Of = Literal["queries", "keys"]
"""Whether a length counts the tokens of a request in this step, or all that its queries attend to, cached ones too."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Rows of `dim` belong to tokens: `input_ids`, positions (`Tokens(1)` for those of `[3, T]`), slot mappings."""

    dim: int


@dataclass(frozen=True, slots=True)
class Requests:
    """Rows of `dim` belong to requests: block tables, adapters. A request that straddles has its row in both halves."""

    dim: int = 0


@dataclass(frozen=True, slots=True)
class CuSeqlens:
    """Where each request begins, and at last where they end: `[0, 3, 8]` for requests of 3 and 5 tokens.

    `padded`: they may end before the tokens do, with requests of no tokens; the tokens behind them are padding.
    """

    of: Of = "queries"
    padded: bool = False


@dataclass(frozen=True, slots=True)
class SeqLens:
    """How many tokens each request has to attend to, those of this step included."""


@dataclass(frozen=True, slots=True)
class MaxSeqlen:
    """The length of the longest request, a number or a tensor with one."""

    of: Of = "queries"


@dataclass(frozen=True, slots=True)
class Shared:
    """The same for every microbatch: a cache, a table."""


Custom = Callable[[Any, range], Any]
"""Makes what a microbatch has of an input, from the input and from the tokens of the microbatch."""

Axis = Tokens | Requests | CuSeqlens | SeqLens | MaxSeqlen | Shared | Custom


def axis_of(value: int | Axis) -> Axis:
    """A value of `token_dims`, an integer among them, as an axis."""
    return Tokens(value) if isinstance(value, int) else value


def is_axis(value: Any) -> bool:
    """Whether a value may stand in `token_dims`; a class of axes, which somebody forgot to call, may not."""
    if isinstance(value, bool | type):
        return False
    return isinstance(value, int | Tokens | Requests | CuSeqlens | SeqLens | MaxSeqlen | Shared) or callable(value)


def dims_of_tokens(values: Mapping[str, int | Axis]) -> dict[str, int]:
    """The inputs among `token_dims` that carry tokens, and their token dims."""
    axes = {name: axis_of(value) for name, value in values.items()}
    return {name: axis.dim for name, axis in axes.items() if isinstance(axis, Tokens)}


def checked_dim(name: str, dim: int, shape: Sequence[int]) -> int:
    """The token dim of an input of this shape, counted from the first. Raises `ValueError` if it has no such dim."""
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"token_dims names dim {dim} of {name}, whose shape is {list(shape)}")
    return dim % len(shape)


def request_axes(values: Mapping[str, int | Axis]) -> dict[str, Axis]:
    """The inputs among `token_dims` that are anything else than rows of tokens."""
    axes = {name: axis_of(value) for name, value in values.items()}
    return {name: axis for name, axis in axes.items() if not isinstance(axis, Tokens)}


def request_dim(axis: Axis) -> int | None:
    """The dim of an input whose size counts requests, None if there is none: it must be a symbol of the trace."""
    match axis:
        case Requests(dim):
            return dim
        case CuSeqlens() | SeqLens():
            return 0
        case _:
            return None


def is_given(axis: Axis) -> bool:
    """Whether a microbatch has a value of its own of such an input, which is made before the step."""
    return not isinstance(axis, Tokens | Shared)
