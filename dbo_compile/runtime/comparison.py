"""What ranks find out when they compare the programs that they are about to play, by fingerprints and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from dbo_compile.errors import Disagreement

NOT_SPLIT = "0" * 16
"""The program of a rank whose graph is not split. It fits every other: the whole graph is what all of them do."""
DIFFERS = "ranks have other programs for this graph, as Dynamo traced it for other sizes on each"


class EngineState(NamedTuple):
    """What the engines of a step must have in common to time, decide and capture together.

    `kind` tells engines apart that look at other sizes; `generation` those that began at another step, and so have
    timed and judged other ones.
    """

    kind: int
    generation: int

    def packed(self) -> int:
        return self.kind % 2**31 << 32 | self.generation % 2**32

    @classmethod
    def unpacked(cls, number: int) -> Self:
        return cls(number >> 32, number % 2**32)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What ranks found when they compared the programs that they are about to play.

    `followers` play the graph as it is. `differs`: those that have programs have not the same one, and so play theirs
    unsplit, in the order of the graph. `alike`: all have the same program and engines of one kind, which begin anew
    if they are not of this `generation`.
    """

    followers: tuple[int, ...] = ()
    differs: bool = False
    alike: bool = True
    generation: int = 0

    @classmethod
    def of(cls, programs: Sequence[str], graphs: Sequence[str], states: Sequence[int]) -> Self:
        """By rank. Raises `Disagreement` if ranks do not even communicate alike: they play other models."""
        split = {rank: program for rank, program in enumerate(programs) if program != NOT_SPLIT}
        if len({graphs[rank] for rank in split}) > 1:
            check_same("program", split)
        followers = tuple(rank for rank in range(len(programs)) if rank not in split)
        found = [EngineState.unpacked(states[rank]) for rank in split] or [EngineState(0, 0)]
        kinds, generations = {state.kind for state in found}, {state.generation for state in found}
        differs = len({*split.values()}) > 1
        generation = max(generations) + (len(generations) > 1)
        return cls(followers, differs, not (followers or differs or len(kinds) > 1), generation)

    @classmethod
    def shared(cls, found: Sequence[Sequence[int]]) -> Self:
        """By program, graph and state of each rank, as numbers; a rank whose graph is not split has 0 for each."""
        programs, graphs, states = zip(*found, strict=True)
        return cls.of([*map(to_hex, programs)], [*map(to_hex, graphs)], states)

    @property
    def why_whole(self) -> str:
        """Why nothing can be split ("": it can)."""
        if self.followers:
            return f"the graph of {listed(self.followers)} is not split"
        return DIFFERS if self.differs else ""


ALIKE = Comparison()
"""All ranks play the same, and have from the beginning."""


def check_same(what: str, fingerprints: Mapping[int, str]) -> None:
    """Raise `Disagreement` if not all ranks have the same."""
    ranks: dict[str, list[int]] = {}
    for rank, fingerprint in fingerprints.items():
        ranks.setdefault(fingerprint, []).append(rank)
    if len(ranks) > 1:
        found = ", ".join(f"{listed(have)}: {fingerprint}" for fingerprint, have in ranks.items())
        raise Disagreement(
            f"ranks must play the same {what}, but do not ({found}). Compile the same model with the same options on "
            "every rank, and call its graphs in the same order; dbo_compile.reports() has the fingerprints."
        )


def to_int64(fingerprint: str) -> int:
    return int.from_bytes(bytes.fromhex(fingerprint), signed=True)


def to_hex(number: int) -> str:
    return number.to_bytes(8, signed=True).hex()


def listed(ranks: Sequence[int], most: int = 8) -> str:
    """`rank 3`, `ranks 0, 2 and 5`; of a long list its beginning."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = [str(rank) for rank in ranks[:most]]
    last = f"{len(ranks) - most} more" if len(ranks) > most else shown.pop()
    return f"ranks {', '.join(shown)} and {last}"
