"""The arguments of a program that every microbatch has its own value of, for the request metadata of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dbo_compile.axes import Axis, is_given
from dbo_compile.runtime.metadata import read_requests
from dbo_compile.runtime.requests import RequestTable, given_values


@dataclass(frozen=True, slots=True)
class RequestInputs:
    """The inputs of a graph that are said to be something to its tokens or requests.

    `axes` has, by name, where an input stands among the arguments and what it is. `numbers` are the arguments that hold
    a size of such an input: for each, where that one stands, and the dim.
    """

    axes: Mapping[str, tuple[int, Axis]]
    numbers: Mapping[int, tuple[int, int]]

    def read(self, args: Sequence[Any], num_tokens: int) -> RequestTable | None:
        """The requests of the step; raises `ValueError` if what the arguments say of them cannot be right."""
        return read_requests(self._named(args), self._axes(), num_tokens)

    def given(self, args: Sequence[Any], table: RequestTable | None, rows: Sequence[int]) -> tuple[Any, ...]:
        """What a program for `len(rows)` microbatches takes behind its arguments: for each input that is given, in
        their order, the value of each microbatch."""
        values = given_values(self._named(args), self._axes(), table, rows)
        made = {self.axes[name][0]: value for name, value in values.items()}
        for number, (tensor, dim) in self.numbers.items():
            made[number] = tuple(value.shape[dim] for value in made[tensor])
        return tuple(value for index in sorted(made) for value in made[index])

    @property
    def positions(self) -> tuple[int, ...]:
        """The arguments that are given, in the order in which their values are."""
        return tuple(sorted([i for i, axis in self.axes.values() if is_given(axis)] + [*self.numbers]))

    def _named(self, args: Sequence[Any]) -> dict[str, Any]:
        return {name: args[index] for name, (index, _) in self.axes.items()}

    def _axes(self) -> dict[str, Axis]:
        return {name: axis for name, (_, axis) in self.axes.items()}
