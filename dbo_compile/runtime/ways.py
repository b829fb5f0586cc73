"""The ways to play a graph: split, unsplit from the same segments, or as Inductor compiles it in one piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.capture import CapturePlayer, uncaptured
from dbo_compile.runtime.cuts import Cut
from dbo_compile.runtime.graphs import Key, Player
from dbo_compile.runtime.lanes import WaitFor, WorkLanes
from dbo_compile.runtime.rows import Guards
from dbo_compile.runtime.signature import Signature
from dbo_compile.runtime.steps import ranged
from dbo_compile.runtime.tune import INDUCTOR, REFINED, SPLIT, UNSPLIT


@dataclass(frozen=True, slots=True)
class Programs:
    """What there is to play a graph with: an emitted module for each number of microbatches, 1 among them, and what
    tracing and compiling assumed of the number of rows. `trusts` says what splitting takes on trust; `codes` has the
    code of each segment, `comm_codes` those that communicate, `fns` what is called for each. `apart` has other modules
    for steps in which no request has tokens in two microbatches, where that leaves more freedom. `graph` is a hash
    of what the graph communicates, whatever the order of a program."""

    modules: Mapping[int, nn.Module]
    guards: Guards
    fingerprint: str
    trusts: tuple[str, ...] = ()
    codes: Mapping[str, str] = field(default_factory=dict)
    comm_codes: tuple[str, ...] = ()
    fns: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    apart: Mapping[int, nn.Module] = field(default_factory=dict)
    graph: str = ""

    def split(self, cut: Cut) -> nn.Module:
        """The module for a step that is cut."""
        n = len(cut.rows)
        return self.modules[n] if cut.straddles else self.apart.get(n, self.modules[n])


@dataclass(frozen=True, slots=True)
class Whole:
    """The graph as it was traced: its ops as they are, and how to have Inductor compile it (None: not wanted)."""

    eager: Callable[..., Any]
    compile: Callable[[], tuple[Callable[..., Any], Guards]] | None = None


def played(
    module: Callable[..., Any], rows: Sequence[int], args: Sequence[Any], wait_for: WaitFor | None = None
) -> tuple[Any, ...]:
    """The results of an emitted program on lanes of its own."""
    with WorkLanes(rows, wait_for) as lanes:
        results: tuple[Any, ...] = ranged(module)(lanes, *args)
    return results


class Ways:
    """Plays a graph in one of the ways that its size allows; `player` plays emitted programs, captured ones if
    `captures`: not where ranks that communicate play other sizes than each other, or one the whole graph as it is."""

    def __init__(self, programs: Programs, whole: Whole, signature: Signature, agreement: Agreement) -> None:
        self.programs = programs
        self.whole = whole
        self.signature = signature
        self.agreement = agreement
        self.player: Player = partial(played, wait_for=agreement.wait_for)
        self.graphs: CapturePlayer | None = None
        self.captures = True
        self._inductor: tuple[Callable[..., Any], Guards] | None = None
        self._is_prepared = False

    def fitting(self, rows: Sequence[int], num_rows: int, args: Sequence[Any]) -> list[str]:
        """The ways to play `num_rows` rows; to split them if there are `rows` for the microbatches."""
        unsplit = [UNSPLIT] if self._fits(self.programs.guards, num_rows, args) else []
        return [*([SPLIT] if rows else []), *unsplit, *([INDUCTOR] if self.whole.compile else [])]

    def prepare(self, way: str) -> None:
        """Have Inductor compile the whole graph, if it is what is to be played; all ranks do at the same place."""
        if way == INDUCTOR and not self._is_prepared and self.whole.compile:
            with self.agreement.compiling():
                self._inductor = self._inductor or self.whole.compile()
            self._is_prepared = True

    def play(
        self,
        way: str,
        cut: Cut,
        num_rows: int,
        args: Sequence[Any],
        *,
        refined: Programs | None = None,
        by: Player | None = None,
    ) -> Sequence[Any]:
        """The results of one way, played `by` another player than usual if need be.

        A size that nothing was compiled for is played as it was traced.
        """
        if way in (SPLIT, REFINED):
            programs = refined if way == REFINED and refined else self.programs
            return (by or self._player)(programs.split(cut), cut.rows, [*args, *cut.given])
        if way == INDUCTOR and self._inductor and self._fits(self._inductor[1], num_rows, args):
            results: Sequence[Any] = self._inductor[0](*args)
            return results
        return self.unsplit(num_rows, args, by=by)

    def unsplit(self, num_rows: int, args: Sequence[Any], *, by: Player | None = None) -> Sequence[Any]:
        if self._fits(self.programs.guards, num_rows, args):
            return (by or self._player)(self.programs.modules[1], (num_rows,), args)
        results: Sequence[Any] = self.whole.eager(*args)
        return results

    def modules(self, way: str, refined: Programs | None) -> list[Callable[..., Any]]:
        """The emitted modules that a way may play."""
        if way == UNSPLIT:
            return [self.programs.modules[1]]
        programs = {SPLIT: self.programs, REFINED: refined}.get(way)
        split = {n: module for n, module in programs.modules.items() if n > 1} if programs else {}
        return [*split.values(), *programs.apart.values()] if programs else []

    @property
    def num_unsteady(self) -> int:
        """How many plays so far were followed by faster ones: they were to be captured, or were being so."""
        return self.graphs.num_unsteady if self.graphs else 0

    def forget(self, is_lost: Callable[[Key], bool]) -> None:
        """Give back the memory of captured graphs that are of no more use; all ranks do at the same place."""
        if self.graphs:
            self.graphs.forget(is_lost)

    def replace(self, programs: Programs) -> None:
        """Play other programs from now on."""
        self.programs = programs
        self.forget(lambda _key: True)

    def restart(self) -> None:
        """Begin as ranks do that have played nothing yet: all do at the same place."""
        self._is_prepared = False
        if self.graphs:
            self.graphs.restart()

    def settle(self) -> None:
        """Forget captured graphs that something has moved from under on any rank; all ranks come here at once."""
        found = self.agreement.share([self.graphs.news if self.graphs else 0])
        if self.graphs:
            self.graphs.settle(news for (news,) in found)

    @property
    def _player(self) -> Player:
        return self.player if self.captures else uncaptured(self.player)

    def _fits(self, guards: Guards, num_rows: int, args: Sequence[Any]) -> bool:
        return guards.broken(num_rows, self.signature.others(args)) is None
