"""The arguments of a program that every microbatch has its own value of, for the request metadata of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dbo_compile.axes import Axis, is_given
from dbo_compile.errors import NotSplit
from dbo_compile.runtime.metadata import read_requests
from dbo_compile.runtime.requests import RequestTable, given_values

Size = int | Literal["rows"] | None
"""A size that the graph was traced with: a number, the rows of the microbatch, or whatever comes."""


@dataclass(frozen=True, slots=True)
class RequestInputs:
    """The inputs of a graph that are said to be something to its tokens or requests.

    `axes` has, by name, where an input stands among the arguments and what it is. `numbers` are the arguments that hold
    a size of such an input: for each, where that one stands, and the dim. `sizes` has, for inputs that are given, those
    that the graph was traced with.
    """

    axes: Mapping[str, tuple[int, Axis]]
    numbers: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    sizes: Mapping[int, tuple[Size, ...]] = field(default_factory=dict)

    def read(self, args: Sequence[Any], num_tokens: int) -> RequestTable | None:
        """The requests of the step; raises `ValueError` if what the arguments say of them cannot be right."""
        return read_requests(self._named(args), self._axes(), num_tokens)

    def given(self, args: Sequence[Any], table: RequestTable | None, rows: Sequence[int]) -> tuple[Any, ...]:
        """What a program for `len(rows)` microbatches takes behind its arguments: for each input that is given, in
        their order, the value of each microbatch. Raises `NotSplit` where the graph was traced for other sizes."""
        made = self.values(args, table, rows)
        return tuple(value for index in sorted(made) for value in made[index])

    def values(
        self, args: Sequence[Any], table: RequestTable | None, rows: Sequence[int]
    ) -> dict[int, tuple[Any, ...]]:
        """For the position of each argument that is given, the value of each microbatch; raises as `given` does."""
        values = given_values(self._named(args), self._axes(), table, rows)
        for name, of_microbatches in values.items():
            self._check_sizes(name, of_microbatches, rows)
        made = {(i := self.axes[name][0]): _laid_out(value, args[i]) for name, value in values.items()}
        for number, (tensor, dim) in self.numbers.items():
            made[number] = tuple(value.shape[dim] for value in made[tensor])
        return made

    def _check_sizes(self, name: str, values: Sequence[Any], rows: Sequence[int]) -> None:
        for m, value in enumerate(values):
            for d, size in enumerate(self.sizes.get(self.axes[name][0], ())):
                fixed = rows[m] if size == "rows" else size
                if fixed is not None and value.shape[d] != fixed:
                    raise NotSplit(
                        f"microbatch {m} would have {value.shape[d]} rows of {name}, and the graph is made for {fixed}"
                    )

    @property
    def positions(self) -> tuple[int, ...]:
        """The arguments that are given, in the order in which their values are."""
        return tuple(sorted([i for i, axis in self.axes.values() if is_given(axis)] + [*self.numbers]))

    def _named(self, args: Sequence[Any]) -> dict[str, Any]:
        return {name: args[index] for name, (index, _) in self.axes.items()}

    def _axes(self) -> dict[str, Axis]:
        return {name: axis for name, (_, axis) in self.axes.items()}


def _laid_out(values: Sequence[Any], like: Any) -> tuple[Any, ...]:
    """Values that lie in memory without gaps, if the argument that they are of does: code has strides in it."""
    is_dense = isinstance(like, torch.Tensor) and like.is_contiguous()
    return tuple(v.contiguous() if is_dense and isinstance(v, torch.Tensor) else v for v in values)
