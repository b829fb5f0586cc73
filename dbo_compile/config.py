"""Every option of the backend: its type, its default, what it means, and how it is read from the environment."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, TypeVar

from dbo_compile.axes import Axis, is_axis

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


def _kind(
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


def _is_number(value: Any) -> bool:
    return (isinstance(value, float) and not math.isnan(value)) or _is_integer(value)


def _integer(low: int, high: float = math.inf) -> Kind:
    expected = f"an integer of at least {low}" if high == math.inf else f"an integer from {low} to {high}"
    return _kind(expected, lambda v: _is_integer(v) and low <= v <= high, parse=int)


def _choice(*words: str) -> Kind:
    return _kind(" or ".join(map(repr, words)), lambda v: isinstance(v, str) and v in words)


def _named(what: str, is_valid: Callable[[Any], bool]) -> Kind:
    def valid(value: Any) -> bool:
        return isinstance(value, Mapping) and all(isinstance(k, str) and is_valid(v) for k, v in value.items())

    return _kind(f"a mapping from the names of inputs to {what}", valid, keep=NamedValues, parse=json.loads)


def _either(*kinds: Kind) -> Kind:
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
_NONE = _kind("None", lambda v: v is None, parse=lambda text: None if text.lower() == "none" else text)
_BOOLEAN = _kind("True or False", lambda v: isinstance(v, bool), parse=lambda text: _TRUTH.get(text.lower()))
_SECONDS = _kind("a number of seconds above 0", lambda v: _is_number(v) and 0 < v < math.inf, keep=float, parse=float)
_AMOUNT = _kind("a number above 0", lambda v: _is_number(v) and 0 < v < math.inf, keep=float, parse=float)
_SIZES = _kind(
    "a list of positive integers",
    _are_sizes,
    keep=lambda sizes: tuple(sorted(set(sizes))),
    parse=lambda text: [int(size) for size in text.split(",")],
)
_PHASES = _kind(
    "a mapping of 'decode' and 'prefill' to integers of at least 1",
    lambda v: isinstance(v, Mapping) and set(v) == {"decode", "prefill"} and all(map(_is_count, v.values())),
    keep=NamedValues,
    parse=json.loads,
)
_FOLDER = _kind("a path", lambda v: isinstance(v, str | os.PathLike) and v != "", keep=os.fspath)
_GROUP = _kind("a process group or its name", _is_group)


def _option(default: Any, kind: Kind, meaning: str, *, shared: bool = True) -> Any:
    """An option of `Config`; its `meaning` is the "help" of the field's metadata, from where the docs take it.

    All ranks must have the same value of a `shared` option.
    """
    return field(default=default, metadata={"kind": kind, "help": meaning, "shared": shared})


@dataclass(frozen=True, slots=True, repr=False)
class Config:
    """What `torch.compile(model, backend="dbo", options={...})` can be told. A wrong value raises `ValueError`."""

    num_microbatches: int = _option(2, _integer(1, 8), "How many microbatches the tokens of a step are split into.")
    split: Literal["auto", "always", "never"] = _option(
        "auto",
        _choice("auto", "always", "never"),
        "'auto' splits where that was timed to be faster, 'always' even where there is no communication to hide, "
        "'never' turns splitting off.",
    )
    min_tokens: int | Mapping[str, int] = _option(
        2,
        _either(_integer(1), _PHASES),
        "A step is split only if every rank has at least this many tokens; a mapping of 'decode' and 'prefill' has a "
        "number for each.",
    )
    token_dims: Mapping[str, int | Axis] | None = _option(
        None,
        _either(_NONE, _named("their token dims", is_axis)),
        "The inputs that carry tokens, and their token dims; what others tell of requests, as `CuSeqlens()` and its "
        "like. None: every input that is no parameter and whose dim 0 is as long as that of the first one.",
    )
    pad_to: tuple[int, ...] | Literal["auto"] | None = _option(
        None,
        _either(_NONE, _choice("auto"), _SIZES),
        "The numbers of tokens that steps are padded to, kept in ascending order; 'auto' chooses them. None: a step is "
        "padded only as far as ranks or segments need it.",
    )
    pad_values: Mapping[str, int | float] = _option(
        NamedValues({}), _named("numbers", _is_number), "What an input is padded with, where that is not 0."
    )
    dp_group: object | None = _option(
        None,
        _either(_NONE, _GROUP),
        "The process group, or its name, whose ranks decide together whether a step is split. None: the group that the "
        "model communicates over.",
        shared=False,
    )
    dp_sync: Literal["cpu", "device"] = _option(
        "cpu", _choice("cpu", "device"), "Where the numbers live that ranks exchange to decide."
    )
    inner: Literal["inductor", "eager"] = _option(
        "inductor", _choice("inductor", "eager"), "What compiles a segment; 'eager' plays its ops as they are."
    )
    cuda_graph: bool | Literal["auto"] = _option(
        "auto",
        _either(_choice("auto"), _BOOLEAN),
        "Whether programs are captured as CUDA graphs; 'auto': those that can be, on a device that has them.",
    )
    graph_memory_gib: float | None = _option(
        None,
        _either(_NONE, _AMOUNT),
        "How much memory CUDA graphs may take; over it the least useful size stays uncaptured. None: no bound.",
        shared=False,
    )
    clone_outputs: bool = _option(
        True,
        _BOOLEAN,
        "Whether the results of a captured program are copied out of it. False hands out memory of the graph, which "
        "holds until the next step of that size.",
        shared=False,
    )
    comm_sms: int | None = _option(
        None, _either(_NONE, _integer(1)), "How many multiprocessors communication may occupy. None: no limit."
    )
    policy: Literal["list", "alternate", "sequential"] = _option(
        "list",
        _choice("list", "alternate", "sequential"),
        "The order of steps: 'list' puts the longest path first, by cost; 'alternate' takes turns between microbatches "
        "at every segment; 'sequential' plays one microbatch after the other and overlaps nothing.",
    )
    gate: Literal["first-call", "never", "every-call"] = _option(
        "first-call",
        _choice("first-call", "never", "every-call"),
        "When the split program must prove equal to the unsplit one, on the inputs of the call.",
    )
    dump: str | None = _option(
        None, _either(_NONE, _FOLDER), "The folder that every level is written to. None: nothing is.", shared=False
    )
    timeout_s: float = _option(
        60.0, _SECONDS, "The seconds after which a rank that does not answer becomes an error naming it.", shared=False
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = _checked(option, option.metadata["kind"].accept, getattr(self, option.name), source="Config")
            object.__setattr__(self, option.name, value)

    @classmethod
    def from_options(
        cls, options: Mapping[str, object] | None = None, environ: Mapping[str, str] = os.environ
    ) -> Config:
        """The options that a user gave, each overridden by the environment variable `DBO_<NAME>`.

        A variable is text: numbers, words and names as they are, `true` or `false`, sizes as `64,256`, mappings as
        JSON, `none` for None. An empty one counts as not set.
        """
        known = {option.name: option for option in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in (options or {}).items():
            if name not in known:
                raise ValueError(_unknown(name, list(known)))
            values[name] = _checked(known[name], known[name].metadata["kind"].accept, value, source="options")
        for name, option in known.items():
            variable = f"DBO_{name.upper()}"
            if text := environ.get(variable, "").strip():
                source = f"the environment variable {variable}"
                values[name] = _checked(option, option.metadata["kind"].read, text, source=source)
        return cls(**values)

    def __repr__(self) -> str:
        """One line with what differs from the defaults: `Config(split='always', pad_to=(64, 256))`."""
        values = [(option, getattr(self, option.name)) for option in fields(self)]
        return f"Config({', '.join(f'{option.name}={value!r}' for option, value in values if value != option.default)})"

    @property
    def least_tokens(self) -> tuple[int, int]:
        """`min_tokens` of a decode and of a prefill."""
        least = self.min_tokens
        return (least["decode"], least["prefill"]) if isinstance(least, Mapping) else (least, least)

    @property
    def fingerprint(self) -> str:
        """A hash of all that ranks must share, the same in every process."""
        values = [(option.name, getattr(self, option.name)) for option in fields(self) if option.metadata["shared"]]
        return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _checked(option: Field[Any], make: Conversion, given: Any, *, source: str) -> Any:
    try:
        return make(given)
    except ValueError:
        expected = option.metadata["kind"].expected
        raise ValueError(f"{option.name}={given!r} (from {source}): expected {expected}") from None


def _unknown(name: str, known: list[str]) -> str:
    return f"unknown option {name!r}{nearest(name, known)} The options are: {', '.join(known)}"


def nearest(name: str, known: list[str]) -> str:
    """The end of a sentence about a wrong name: `; did you mean 'pad_to'?`, or a full stop."""
    found = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {found[0]!r}?" if found else "."
