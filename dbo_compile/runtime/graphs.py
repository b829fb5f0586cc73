"""What is captured: graphs of a device, the plays they stand for, and how one is replayed. See `capture`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

import torch

from dbo_compile.compat import same_addresses

Player = Callable[[Callable[..., Any], Sequence[int], Sequence[Any]], tuple[Any, ...]]


class Graph(Protocol):
    """What a device has recorded, as `torch.cuda.CUDAGraph` has it."""

    def replay(self) -> None: ...
    def reset(self) -> None: ...


class GraphDevice(Protocol):
    """What capturing asks of a device. All graphs share one pool of memory until `new_pool`."""

    def is_capturing(self) -> bool: ...
    def capture(self, play: Callable[[], tuple[Any, ...]]) -> tuple[Graph, tuple[Any, ...]]: ...
    def new_pool(self) -> None: ...
    def memory_used(self) -> int: ...


class Play(NamedTuple):
    """What a player is called with: an emitted module, the rows of each microbatch, the arguments of the graph."""

    module: Callable[..., Any]
    rows: Sequence[int]
    args: Sequence[Any]


class Key(NamedTuple):
    """What a graph was captured for. `numbers` are the integers among the arguments: all sizes follow from them."""

    module: Callable[..., Any]
    rows: tuple[int, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, play: Play) -> Self:
        return cls(play.module, tuple(play.rows), tuple(x for x in play.args if isinstance(x, int)))

    def __str__(self) -> str:
        return f"a step of {sum(self.rows)} tokens in {len(self.rows)}"


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, what it reads in place (`pinned`) or after a copy (`copied`), by position, and what it leaves where.

    `returned` are those copies that it writes: they are copied back. `addresses` has, for each argument, where it lies
    if it is pinned. `num_bytes` is what the device had less of after the capture: little, where the pool had room from
    a larger size.
    """

    graph: Graph
    pinned: Mapping[int, torch.Tensor]
    copied: Mapping[int, torch.Tensor]
    returned: Collection[int]
    addresses: list[int | None]
    results: tuple[Any, ...]
    num_bytes: int
    seconds: float

    def is_at_home(self, args: Sequence[Any]) -> bool:
        """Whether every argument that is used in place lies where it was."""
        return same_addresses(list(args), self.addresses, list(self.pinned))

    def moved(self, args: Sequence[Any]) -> list[int]:
        """Which arguments that are used in place lie elsewhere."""
        return [i for i in self.pinned if args[i].data_ptr() != self.addresses[i]]

    def replay(self, args: Sequence[Any], *, clone: bool) -> tuple[Any, ...]:
        for i, buffer in self.copied.items():
            write(buffer, args[i])
        self.graph.replay()
        for i in self.returned:
            write(args[i], self.copied[i])
        callers = {id(x): args[i] for i, x in self.pinned.items()}
        callers |= {id(self.copied[i]): args[i] for i in self.returned}
        return tuple(callers[id(x)] if id(x) in callers else _kept(x, clone=clone) for x in self.results)


def _kept(x: Any, *, clone: bool) -> Any:
    return x.clone() if clone and isinstance(x, torch.Tensor) else x


def write(buffer: torch.Tensor, x: torch.Tensor) -> None:
    """Copy `x` into memory of the same sizes and strides; of an expanded dim there is one row in memory."""
    assert buffer.shape == x.shape, f"a graph for {list(buffer.shape)} is replayed on {list(x.shape)}"
    rows = distinct(buffer)
    rows.copy_(x if rows is buffer else x[tuple(slice(size) for size in rows.shape)])


def distinct(x: torch.Tensor) -> torch.Tensor:
    """`x` without what an expanded dim repeats: each of its elements has a place in memory of its own."""
    for d, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[d] > 1:
            x = x.narrow(d, 0, 1)
    return x


class Room:
    """Memory for arguments that come from elsewhere in each call; those of smaller sizes lie in that of larger ones."""

    def __init__(self) -> None:
        self._rows: dict[int, torch.Tensor] = {}

    def copy(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """A copy of an argument, of the same sizes and strides, in its room."""
        with torch.inference_mode(False):  # no inference tensor: those are not written outside
            if index not in self._rows or self._rows[index].numel() < num_elements(x):
                self._rows[index] = torch.empty(num_elements(x), dtype=x.dtype, device=x.device)
            copy = self._rows[index].as_strided(x.shape, x.stride())
        write(copy, x)
        return copy


@dataclass(frozen=True, slots=True)
class Place:
    """An argument, and where it lay. A tensor that is gone is no other one, whatever its address."""

    tensor: Callable[[], Any]
    address: int

    @classmethod
    def of(cls, x: Any) -> Self:
        return cls(weakref.ref(x), x.data_ptr()) if isinstance(x, torch.Tensor) else cls(lambda: None, 0)

    def has(self, x: Any) -> bool:
        return isinstance(x, torch.Tensor) and self.tensor() is x and x.data_ptr() == self.address


def num_elements(x: torch.Tensor) -> int:
    """How many elements memory has from the first of `x` to the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Which arguments stay where they are: `static` ones (weights), and as a rule those `written` in place. `tokens`
    carry tokens, and lie elsewhere where they are padded. `names` are for messages. `most_bytes` is what all graphs
    may take (None: any number).

    With `clone`, results are the caller's to keep. Without, they are valid until a program is next played for any size:
    graphs share their memory, and another one may write over them.
    """

    static: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()
    tokens: frozenset[int] = frozenset()
    names: Mapping[int, str] = field(default_factory=dict)
    most_bytes: int | None = None
    clone: bool = True

    def name(self, index: int) -> str:
        return self.names.get(index, f"argument {index}")
