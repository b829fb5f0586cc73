"""What the ranks of a step wish for, and the one plan that follows from it: every rule of agreeing, and nothing else.

`decide` is a pure function of all wishes, so that no rank can come to a plan of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import Self

from dbo_compile.config import Config
from dbo_compile.errors import Disagreement
from dbo_compile.runtime.comparison import ALIKE, Comparison, check_same, listed, to_hex, to_int64


class Phase(Enum):
    """What a step does; one rank that prefills makes it a prefill."""

    IDLE = "idle"
    DECODE = "decode"
    PREFILL = "prefill"


class Pads(IntEnum):
    """Which steps are padded as far as one rank knows: none, those in which ranks differ in size, or all."""

    NEVER = 0
    UNEVEN = 1
    ALWAYS = 2


@dataclass(frozen=True, slots=True)
class Wish:
    """What one rank brings to a step, and wants of it. A rank without tokens is idle: it has no say, but joins.

    `padded_tokens` is the bucket of `num_tokens`; `num_elements` is the size of its first token input, padded: what
    tells sequences of 4,000 tokens from as many of 4. `program` and `config` are fingerprints, 16 hexadecimal digits
    each; a rank whose graph is not split has the program `NOT_SPLIT`. `decode` says that the rank's requests bring one
    token each. A rank whose inputs are wrong comes all the same, with a wish that is not valid. `pads` says when rows
    of padding are known to do no harm, or cannot be done without. `graph` is a fingerprint of what the graph
    communicates in its own order, the same for all programs of it ("": that of the program); `state` is an
    `EngineState`, packed.
    """

    num_tokens: int
    padded_tokens: int
    num_elements: int
    wants_split: bool
    wants_gate: bool
    decode: bool
    program: str
    config: str
    is_valid: bool = True
    pads: Pads = Pads.ALWAYS
    graph: str = ""
    state: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "graph", self.graph or self.program)
        if not 0 <= self.num_tokens <= self.padded_tokens:
            raise ValueError(f"{self.num_tokens} tokens cannot be padded to {self.padded_tokens}")

    def unpadded(self) -> Self:
        """The same wish for a step in which no rank pads."""
        elements = self.num_elements * self.num_tokens // self.padded_tokens
        return replace(self, padded_tokens=self.num_tokens, num_elements=elements)

    def stands_for(self, wish: Wish) -> bool:
        """Whether ranks that were told this one may play the other: what they act on is the same in both."""
        told = (self.num_tokens, self.program, self.config, self.is_valid)
        return told == (wish.num_tokens, wish.program, wish.config, wish.is_valid)

    @classmethod
    def idle(cls, program: str, config: str) -> Self:
        return cls(0, 0, 0, False, False, False, program, config)

    @classmethod
    def wrong(cls, program: str, config: str) -> Self:
        return replace(cls.idle(program, config), is_valid=False)

    def packed(self) -> tuple[int, ...]:
        *numbers, program, config, is_valid, pads, graph, state = (getattr(self, name) for name in self.__slots__)
        fingerprints = map(to_int64, (program, config, graph))
        return (*numbers, *fingerprints, is_valid, pads, state)

    @classmethod
    def unpacked(cls, column: Sequence[int]) -> Self:
        tokens, padded, elements, *wants, program, config, graph, is_valid, pads, state = column
        split, gate, decode = map(bool, wants)
        fingerprints, is_valid = (to_hex(program), to_hex(config)), bool(is_valid)
        told = tokens, padded, elements, split, gate, decode, *fingerprints
        return cls(*told, is_valid, Pads(pads), to_hex(graph), state)


NUM_ROWS = len(Wish.__slots__)


@dataclass(frozen=True, slots=True)
class Limits:
    """From where on a step is split; the same on all ranks, since they are part of the config or of the program.

    The smallest rank that is not idle needs `min_decode_tokens` or `min_prefill_tokens`; each microbatch gets at least
    `least_rows`, padding included.
    """

    num_microbatches: int
    min_decode_tokens: int
    min_prefill_tokens: int
    least_rows: int = 1

    @classmethod
    def of(cls, config: Config) -> Self:
        """Those of the options; a single row is a size that Inductor specialises on."""
        return cls(config.num_microbatches, *config.least_tokens, least_rows=2 if config.inner == "inductor" else 1)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a step is played, the same on every rank: it has nothing in it that only one rank knows.

    Every rank plays `padded_tokens` in `num_microbatches` (1: unsplit, `reason` says why; 0: nothing is played),
    whatever its own number in `num_tokens`; or its own number, if the step is none that ranks `pads`. With `gate`, both
    programs are played and compared. Beside a rank whose graph is not split nobody `pads`, since such a graph cannot be
    padded. `has_news`: some rank has asked for an exchange (`Agreement.tell`). `compared` is what ranks
    know of each other's programs.
    """

    num_tokens: tuple[int, ...]
    padded_tokens: int
    num_elements: int
    num_microbatches: int
    gate: bool
    phase: Phase
    reason: str
    pads: bool = True
    has_news: bool = False
    compared: Comparison = ALIKE

    def met(self, found: Comparison) -> Self:
        """The same plan for ranks that have compared their programs since they made it."""
        plan = replace(self, compared=found)
        why = found.why_whole
        return replace(plan, num_microbatches=1, gate=False, reason=self.reason or why) if why else plan

    @property
    def is_even(self) -> bool:
        """Whether all ranks have as many tokens."""
        return len({*self.num_tokens}) == 1

    def __str__(self) -> str:
        if not self.num_microbatches:
            return f"nothing is played: {self.reason}"
        how = f"not split: {self.reason}" if self.reason else f"{self.num_microbatches} microbatches"
        gate = ", with the gate" if self.gate else ""
        padded = f" padded to {self.padded_tokens}" if self.pads else ""
        return f"{self.phase.value} of {list(self.num_tokens)} tokens{padded}, {how}{gate}"


def decide(wishes: Sequence[Wish], limits: Limits) -> BatchPlan:
    """The plan that follows from the wishes of all ranks. Raises `Disagreement` if ranks would play different things.

    * All ranks split or none, and every rank that is not idle must want it. The smallest of them must reach the
      threshold; it is that of decode only where all of them decode.
    * All pad to the largest, or none pads. Buckets grow with the number of tokens, so the largest bucket is that of the
      largest rank. Ranks with as many tokens as each other pad only where all know that it does no harm.
    * A microbatch that has padding alone is legal, as in vLLM's second runner (its first one gave up the split). It
      is played like any other, since a program knows rows and not requests, and an idle rank has only such microbatches
      anyway: what is right for 0 tokens cannot be wrong for 3. Whether that pays off is what the thresholds are for.
    * One rank that wants the gate is enough: gates are about safety, a rank that was idle at the first real step has
      still to see one, and waiting until all want it at once could mean never. No gate without a split to judge.
    """
    if wrong := [rank for rank, wish in enumerate(wishes) if not wish.is_valid]:
        raise Disagreement(f"{listed(wrong)} came to this step with wrong inputs; the error there says what is wrong")
    programs, graphs, states = zip(*((w.program, w.graph, w.state) for w in wishes), strict=True)
    found = Comparison.of(programs, graphs, states)
    check_same("config", {rank: wish.config for rank, wish in enumerate(wishes)})
    num_tokens = tuple(wish.num_tokens for wish in wishes)
    busy = {rank: wish for rank, wish in enumerate(wishes) if wish.num_tokens}
    if not busy:
        return BatchPlan(num_tokens, 0, 0, 0, gate=False, phase=Phase.IDLE, reason="no rank has tokens")
    enough = Pads.ALWAYS if len({*num_tokens}) == 1 else Pads.UNEVEN
    pads = not found.followers and all(wish.pads >= enough for wish in busy.values())
    if not pads:
        busy = {rank: wish.unpadded() for rank, wish in busy.items()}
    padded = max(wish.padded_tokens for wish in busy.values())
    phase = Phase.DECODE if all(wish.decode for wish in busy.values()) else Phase.PREFILL
    reason = found.why_whole or _why_not_split(busy, padded, phase, limits)
    num_microbatches = 1 if reason else limits.num_microbatches
    gate = not reason and any(wish.wants_gate for wish in busy.values())
    num_elements = max(wish.num_elements for wish in busy.values())
    return BatchPlan(
        num_tokens, padded, num_elements, num_microbatches, gate, phase, reason, pads=pads, compared=found
    )


def _why_not_split(busy: Mapping[int, Wish], padded: int, phase: Phase, limits: Limits) -> str:
    n, least = limits.num_microbatches, limits.least_rows
    if n == 1:
        return "num_microbatches=1"
    if unwilling := [rank for rank, wish in busy.items() if not wish.wants_split]:
        return f"{listed(unwilling)} declined"
    threshold = limits.min_decode_tokens if phase is Phase.DECODE else limits.min_prefill_tokens
    smallest = min(busy, key=lambda rank: busy[rank].num_tokens)
    if (fewest := busy[smallest].num_tokens) < threshold:
        whose = f"rank {smallest}" if len(busy) > 1 else "it"
        tokens = "1 token" if fewest == 1 else f"{fewest} tokens"
        return f"{whose} has {tokens}, and a {phase.value} is split from {threshold} on (min_tokens)"
    if padded < n * least:
        return f"{padded} tokens do not make {n} microbatches of at least {least}"
    return ""


def has_to_be_padded(plan: BatchPlan, why: str) -> Disagreement:
    """The same error on every rank: what ranks bring has to be padded, and must not be for the reason `why`."""
    return Disagreement(
        f"ranks bring {', '.join(map(str, plan.num_tokens))} tokens, which have to be padded to one number, and cannot "
        f"be: {why}. Leave out pad_to and give all ranks as many tokens, or take that op out of the compiled part of "
        "the model."
    )
