"""Every option of the backend: its type, its default, what it means, and how it is read from the environment."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

from dbo_compile.axes import Axis, is_axis
from dbo_compile.kinds import (
    AMOUNT,
    BOOLEAN,
    FOLDER,
    GROUP,
    NONE,
    PHASES,
    SECONDS,
    SIZES,
    Conversion,
    Kind,
    NamedValues,
    choice,
    either,
    integer,
    is_number,
    named,
)
from dbo_compile.log import warn_once

OTHER_VARIABLES = ("DBO_LOGS",)
"""What is read of the environment and is no option."""


def _option(default: Any, kind: Kind, meaning: str, *, shared: bool = True) -> Any:
    """An option of `Config`; its `meaning` is the "help" of the field's metadata, from where the docs take it.

    All ranks must have the same value of a `shared` option.
    """
    return field(default=default, metadata={"kind": kind, "help": meaning, "shared": shared})


@dataclass(frozen=True, slots=True, repr=False)
class Config:
    """What `torch.compile(model, backend="dbo", options={...})` can be told. A wrong value raises `ValueError`.

    Called by itself it is a dataclass like any other, for which a name that there is not is a `TypeError`; what a user
    says comes in by `from_options`.
    """

    num_microbatches: int = _option(2, integer(1, 8), "How many microbatches the tokens of a step are split into.")
    split: Literal["auto", "always", "never"] = _option(
        "auto",
        choice("auto", "always", "never"),
        "'auto' splits where that was timed to be faster, 'always' even where there is no communication to hide, "
        "'never' turns splitting off.",
    )
    min_tokens: int | Mapping[str, int] = _option(
        2,
        either(integer(1), PHASES),
        "A step is split only if every rank has at least this many tokens; a mapping of 'decode' and 'prefill' has a "
        "number for each.",
    )
    token_dims: Mapping[str, int | Axis] | None = _option(
        None,
        either(NONE, named("their token dims", is_axis)),
        "The inputs that carry tokens, and their token dims; what others tell of requests, as `CuSeqlens()` and its "
        "like. None: every input that is no parameter and whose dim 0 is as long as that of the first one passed.",
    )
    pad_to: tuple[int, ...] | Literal["auto"] | None = _option(
        None,
        either(NONE, choice("auto"), SIZES),
        "The numbers of tokens that steps are padded to, kept in ascending order; 'auto' chooses them. None: a step is "
        "padded only as far as ranks or segments need it.",
    )
    pad_values: Mapping[str, int | float] = _option(
        NamedValues({}),
        named("numbers", is_number),
        "What an input is padded with, where that is not 0. A graph with an op that writes a cache is padded only if "
        "this has every input that says where it writes.",
    )
    dp_group: object | None = _option(
        None,
        either(NONE, GROUP),
        "The process group, or its name, whose ranks decide together whether a step is split. None: the group that the "
        "model communicates over.",
        shared=False,
    )
    dp_sync: Literal["cpu", "device"] = _option(
        "cpu", choice("cpu", "device"), "Where the numbers live that ranks exchange to decide."
    )
    inner: Literal["inductor", "eager"] = _option(
        "inductor", choice("inductor", "eager"), "What compiles a segment; 'eager' plays its ops as they are."
    )
    cuda_graph: bool | Literal["auto"] = _option(
        "auto",
        either(choice("auto"), BOOLEAN),
        "Whether programs are captured as CUDA graphs; 'auto': those that can be, on a device that has them.",
    )
    graph_memory_gib: float | None = _option(
        None,
        either(NONE, AMOUNT),
        "How much memory CUDA graphs may take; over it the least useful size stays uncaptured. None: an eighth of the "
        "device's.",
        shared=False,
    )
    clone_outputs: bool = _option(
        True,
        BOOLEAN,
        "Whether the results of a captured program are copied out of it. False hands out memory of the graph, which "
        "holds until the next step of any size.",
        shared=False,
    )
    comm_sms: int | None = _option(
        None, either(NONE, integer(1)), "How many multiprocessors communication may occupy. None: no limit."
    )
    policy: Literal["list", "alternate", "sequential"] = _option(
        "list",
        choice("list", "alternate", "sequential"),
        "The order of steps: 'list' puts the longest path first, by cost; 'alternate' takes turns between microbatches "
        "at every segment; 'sequential' plays one microbatch after the other and overlaps nothing.",
    )
    gate: Literal["first-call", "never", "every-call"] = _option(
        "first-call",
        choice("first-call", "never", "every-call"),
        "When the split program must prove equal to the unsplit one, on the inputs of the call. first-call: on the "
        "first that is split, and on each that is more than twice as large as any before.",
    )
    dump: str | None = _option(
        None, either(NONE, FOLDER), "The folder that every level is written to. None: nothing is.", shared=False
    )
    timeout_s: float = _option(
        60.0, SECONDS, "The seconds after which a rank that does not answer becomes an error naming it.", shared=False
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
        JSON, `none` for None. An empty one counts as not set; of one that there is not, one warning is logged. Raises
        `ValueError` for a wrong value, and for a name that there is not, with the nearest that there is.
        """
        known = {option.name: option for option in fields(cls)}
        variables = {name: f"DBO_{name.upper()}" for name in known}
        _warn_of_unknown(environ, [*variables.values(), *OTHER_VARIABLES])
        values: dict[str, Any] = {}
        for name, value in (options or {}).items():
            if name not in known:
                raise ValueError(_unknown(name, list(known)))
            values[name] = _checked(known[name], known[name].metadata["kind"].accept, value, source="options")
        for name, option in known.items():
            if text := environ.get(variables[name], "").strip():
                source = f"the environment variable {variables[name]}"
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


def _warn_of_unknown(environ: Mapping[str, str], known: list[str]) -> None:
    for name in environ:
        if name.startswith("DBO_") and name not in known:
            warn_once(name, "%s is ignored: there is no such variable%s", name, nearest(name, known))


def _unknown(name: str, known: list[str]) -> str:
    return f"unknown option {name!r}{nearest(name, known)} The options are: {', '.join(known)}"


def nearest(name: str, known: list[str]) -> str:
    """The end of a sentence about a wrong name: `; did you mean 'pad_to'?`, or a full stop."""
    found = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {found[0]!r}?" if found else "."
