"""The kinds of values that options have: what is accepted, how it is kept, and how it is read from text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dbo_compile.axes import Axis

V = TypeVar("V", bound=float | Axis)
Conversion = Callable[[Any], Any]


class NamedValues(Mapping[str, V]):
    """An immutable mapping in the order of its names. It hashes and pickles, which `MappingProxyType` does not."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, V]) -> None:
        self._values = dict(sorted(values.items()))

    def __getitem__(self, name: str) -> V:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        """The same in every process: functions by their names."""
        return repr({name: _Named(v) if callable(v) else v for name, v in self._values.items()})


class _Named:
    def __init__(self, function: Any) -> None:
        self.name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Kind:
    """The values that an option may have. `accept` and `read` raise `ValueError` for any other value."""

    expected: str
    """A noun that completes "expected ..."."""
    accept: Conversion
    """Takes a Python value and returns it as it is kept."""
    read: Callable[[str], Any]
    """Does so for the text of an environment variable."""


def kind(
    expected: str, valid: Callable[[Any], bool], *, keep: Conversion = lambda v: v, parse: Conversion = str
) -> Kind:
    def accept(value: Any) -> Any:
        if not valid(value):
            raise ValueError(value)
        return keep(value)

    return Kind(expected, accept, lambda text: accept(parse(text)))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value > 0


def is_number(value: Any) -> bool:
    return (isinstance(value, float) and not math.isnan(value)) or _is_integer(value)


def integer(low: int, high: float = math.inf) -> Kind:
    expected = f"an integer of at least {low}" if high == math.inf else f"an integer from {low} to {high}"
    return kind(expected, lambda v: _is_integer(v) and low <= v <= high, parse=int)


def choice(*words: str) -> Kind:
    return kind(" or ".join(map(repr, words)), lambda v: isinstance(v, str) and v in words)


def named(what: str, is_valid: Callable[[Any], bool]) -> Kind:
    def valid(value: Any) -> bool:
        return isinstance(value, Mapping) and all(isinstance(k, str) and is_valid(v) for k, v in value.items())

    return kind(f"a mapping from the names of inputs to {what}", valid, keep=NamedValues, parse=json.loads)


def either(*kinds: Kind) -> Kind:
    def first(attempts: Iterable[Conversion], value: Any) -> Any:
        for attempt in attempts:
            try:
                return attempt(value)
            except ValueError:
                continue
        raise ValueError(value)

    return Kind(
        " or ".join(kind.expected for kind in kinds),
        lambda value: first([kind.accept for kind in kinds], value),
        lambda text: first([kind.read for kind in kinds], text),
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_count, value))


def _is_group(value: Any) -> bool:
    """A process group is known by its name, so that options are checked without torch.distributed."""
    return value != "" if isinstance(value, str) else hasattr(type(value), "group_name")


_TRUTH = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
NONE = kind("None", lambda v: v is None, parse=lambda text: None if text.lower() == "none" else text)
BOOLEAN = kind("True or False", lambda v: isinstance(v, bool), parse=lambda text: _TRUTH.get(text.lower()))
SECONDS = kind("a number of seconds above 0", lambda v: is_number(v) and 0 < v < math.inf, keep=float, parse=float)
AMOUNT = kind("a number above 0", lambda v: is_number(v) and 0 < v < math.inf, keep=float, parse=float)
SIZES = kind(
    "a list of positive integers",
    _are_sizes,
    keep=lambda sizes: tuple(sorted(set(sizes))),
    parse=lambda text: [int(size) for size in text.split(",")],
)
PHASES = kind(
    "a mapping of 'decode' and 'prefill' to integers of at least 1",
    lambda v: isinstance(v, Mapping) and set(v) == {"decode", "prefill"} and all(map(_is_count, v.values())),
    keep=NamedValues,
    parse=json.loads,
)
FOLDER = kind("a path", lambda v: isinstance(v, str | os.PathLike) and v != "", keep=os.fspath)
GROUP = kind("a process group or its name", _is_group)
