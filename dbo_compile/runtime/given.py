"""The arguments of a program that every microbatch has its own value of, for the request metadata of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dbo_compile.axes import Axis, is_given
from dbo_compile.errors import NotSplit
from dbo_compile.runtime.metadata import read_requests
from dbo_compile.runtime.requests import RequestTable, given_values


@dataclass(frozen=True, slots=True)
class RequestInputs:
    """The inputs of a graph that are said to be something to its tokens or requests.

    `axes` has, by name, where an input stands among the arguments and what it is. `numbers` are the arguments that hold
    a size of such an input: for each, where that one stands, and the dim. `sizes` has, for inputs that are given, those
    that the graph was traced with, None for one that may be any.
    """

    axes: Mapping[str, tuple[int, Axis]]
    numbers: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    sizes: Mapping[int, tuple[int | None, ...]] = field(default_factory=dict)

    def read(self, args: Sequence[Any], num_tokens: int) -> RequestTable | None:
        """The requests of the step; raises `ValueError` if what the arguments say of them cannot be right."""
        return read_requests(self._named(args), self._axes(), num_tokens)

    def given(self, args: Sequence[Any], table: RequestTable | None, rows: Sequence[int]) -> tuple[Any, ...]:
        """What a program for `len(rows)` microbatches takes behind its arguments: for each input that is given, in
        their order, the value of each microbatch. Raises `NotSplit` where the graph was traced for other sizes."""
        values = given_values(self._named(args), self._axes(), table, rows)
        made = {self.axes[name][0]: value for name, value in values.items()}
        for name, of_microbatches in values.items():
            self._check_sizes(name, of_microbatches)
        for number, (tensor, dim) in self.numbers.items():
            made[number] = tuple(value.shape[dim] for value in made[tensor])
        return tuple(value for index in sorted(made) for value in made[index])

    def _check_sizes(self, name: str, values: Sequence[Any]) -> None:
        for m, value in enumerate(values):
            for d, fixed in enumerate(self.sizes.get(self.axes[name][0], ())):
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
