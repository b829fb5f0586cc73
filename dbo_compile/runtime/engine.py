"""The engine of one graph: ranks agree on a step, it is padded, played the fastest way, and un-padded."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dbo_compile.config import Config
from dbo_compile.errors import Disagreement, RankLost, Unpaddable
from dbo_compile.log import logger
from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.capture import CapturePlayer
from dbo_compile.runtime.comparison import NOT_SPLIT
from dbo_compile.runtime.cuts import CutSteps
from dbo_compile.runtime.force import step_in_force
from dbo_compile.runtime.gate import Gate
from dbo_compile.runtime.graphs import Player
from dbo_compile.runtime.padding import coarse
from dbo_compile.runtime.plan import BatchPlan, Limits, Wish
from dbo_compile.runtime.planner import Call, Planner, Turn
from dbo_compile.runtime.refine import Refiner, synchronize
from dbo_compile.runtime.signature import Signature
from dbo_compile.runtime.tune import REFINED, SPLIT, UNSPLIT, WAYS, Costs, Decision, Size, Tuner, known_decisions
from dbo_compile.runtime.ways import Programs, Ways, Whole


@dataclass(slots=True)
class Calls:
    """What happened so far, for the report."""

    total: int = 0
    split: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    cuts: CutSteps = field(default_factory=CutSteps)


class Engine:
    """Plays a graph, split or not, as its ranks have agreed for its size.

    `split="auto"` times the ways to play it (see `Ways`); otherwise a step that can be split is. `recompile` is what
    the gate asks for (see `Gate`). `replan` makes the split program again for measured costs, or None if they make no
    difference.
    """

    def __init__(
        self,
        programs: Programs,
        whole: Whole,
        signature: Signature,
        agreement: Agreement,
        config: Config,
        recompile: Callable[[], Programs | None] = lambda: None,
        replan: Callable[[Costs], Programs | None] = lambda _costs: None,
    ) -> None:
        self.ways = Ways(programs, whole, signature, agreement)
        self.signature = signature
        self.agreement = agreement
        self.config = config
        self.calls = Calls()
        self.gate = Gate(self.ways, config.gate, recompile)
        self.tuner = Tuner(agreement.share, known_decisions(programs.fingerprint))
        self.planner = Planner(self.ways, self.gate, config, self.tuner.decisions)
        self._refiner = Refiner(self.ways, agreement, replan)

    def __call__(self, *args: Any) -> Any:
        call = self.planner.read(args)
        plan = self.planner.plan(call)  # what goes wrong until here, the other ranks have heard of
        self.calls.total += 1
        try:
            return self._call(plan, call)
        except Unpaddable:  # on every rank: the call comes again, without padding
            self.calls.total -= 1
            raise
        except (Disagreement, RankLost):  # which every rank raises alike
            raise
        except Exception as error:
            self.agreement.leave(f"it raised {type(error).__name__}: {error}")
            raise

    @property
    def player(self) -> Player:
        """What plays emitted programs; `dbo_compile.measure` puts one there that times them."""
        return self.ways.player

    @player.setter
    def player(self, player: Player) -> None:
        self.ways.player = player
        if isinstance(player, CapturePlayer):
            self.ways.graphs = player

    @property
    def fingerprint(self) -> str:
        return self.planner.fingerprint

    @property
    def decisions(self) -> dict[Size, Decision]:
        """What `split="auto"` found for each size so far."""
        return self.tuner.decisions

    def agree_ahead(self, num_tokens: int) -> None:
        """Announce the next call, of so many tokens and otherwise like the last one, while this one is played."""
        self.planner.agree_ahead(num_tokens)

    def retune(self) -> None:
        """Time every size again; to be called on all ranks at the same place."""
        self.tuner.forget()
        self._refiner.forget()
        self.ways.forget(lambda _key: True)

    # -- one call -----------------------------------------------------------------------------------------------------

    def _call(self, plan: BatchPlan, call: Call) -> Any:
        self.ways.captures = self._may_replay(plan, call)
        if plan.compared.alike and plan.compared.generation != self.planner.state.generation:
            self._restart(plan.compared.generation)
        if plan.has_news:
            self.ways.settle()
        if not call.is_even:
            listed = self.signature.listed(call.sizes)
            self._declined(f"its inputs differ in their number of tokens ({listed}); see token_dims")
            return self.ways.whole.eager(*call.args)
        turn = self.planner.turn(plan, call)
        self.calls.cuts.note(call.table, turn.cut)
        args = self.signature.padded(call.args, turn.num_rows)
        results = self._play(turn, call, args)
        if call.force:
            call.force.note(self.signature, args, results)
        self.signature.write_back(call.args, args)
        return self.signature.unpadded(results, turn.num_rows, call.sizes[0])

    def _may_replay(self, plan: BatchPlan, call: Call) -> bool:
        """Whether the ranks that communicate here play the same, and so may replay graphs of it."""
        is_padded = call.force.pads if call.force else plan.pads
        is_alone = not self.ways.programs.comm_codes
        return plan.compared.alike and (plan.is_even or is_padded or is_alone)

    def _restart(self, generation: int) -> None:
        """Time, judge and capture from the beginning, as an engine of another rank does that is new."""
        self.planner.state = self.planner.state._replace(generation=generation)
        self.tuner.forget()
        self._refiner.forget()
        self.gate.restart()
        self.ways.restart()

    def _play(self, turn: Turn, call: Call, args: Sequence[Any]) -> Sequence[Any]:
        ways = self.ways.fitting(turn.cut.rows, turn.num_rows, args)
        if self.config.split == "auto" and not turn.plan.compared.why_whole:  # who follows takes part in no timing
            if turn.plan.compared.alike and self.planner.may_differ(turn.plan, call.force):
                ways = self._ways_of_all(ways)
            return self._play_fastest(turn, call, ways or [UNSPLIT], args)
        way = next(iter(ways), "")
        self._count(way, turn.reason)
        return self._played(way, turn, call, None, args)

    def _play_fastest(self, turn: Turn, call: Call, ways: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """Play the way that was fastest for this size, or time the one whose turn it is."""
        size = Size(coarse(turn.plan.padded_tokens), coarse(turn.plan.num_elements))
        alone = not turn.plan.compared.alike
        is_refined = self.config.policy == "list" and not alone and self._refiner.programs.get(size, self) is not None
        if {SPLIT, UNSPLIT} <= {*ways} and is_refined:  # what is joined was compiled for all rows, too
            ways = [SPLIT, REFINED, *ways[1:]]
        way, is_timed = self.tuner.way(size, ways)
        if alone:
            way, is_timed = self._common_way(way, is_timed, self.tuner.num_trials(size), len(ways))
        if way == REFINED and size not in self._refiner.programs and not is_timed:
            self._refiner.make(size, self.decisions[size].costs)
        self._count(way, turn.reason or (f"timing it {way}" if is_timed else f"{way} was timed to be faster"))
        if way == REFINED and size not in self._refiner.programs:
            return self._refiner.measure(size, turn.cut, turn.num_rows, args)
        self.ways.prepare(way)
        if not is_timed or (way == SPLIT and turn.gates):
            return self._played(way, turn, call, size, args)
        synchronize(args)
        start, num_unsteady = time.perf_counter(), self.ways.num_unsteady
        results = self._played(way, turn, call, size, args)
        synchronize(args)
        seconds, is_steady = time.perf_counter() - start, self.ways.num_unsteady == num_unsteady
        self.tuner.took(size, way, seconds, self._refiner.costs.get(size, {}), is_steady=is_steady)
        if size in self.decisions:
            chosen = self.ways.modules(self.decisions[size].chosen, self._refiner.programs.get(size))
            self.ways.forget(lambda key: coarse(sum(key.rows)) == size.tokens and key.module not in chosen)
        return results

    def _ways_of_all(self, ways: Sequence[str]) -> list[str]:
        """Those that every rank can play: the sizes of this one may be what others were not compiled for."""
        found = self.agreement.share([way in ways for way in WAYS])
        return [way for way, *can in zip(WAYS, *found, strict=True) if all(can)]

    def _common_way(self, way: str, is_timed: bool, *trials: int) -> tuple[str, bool]:
        """The way of all ranks where they may play other graphs, each with `trials` and decisions of its own: theirs,
        if all have come as far; else one that every graph has, as the first rank that has decided would have it."""
        found = self.agreement.share([WAYS.index(way), is_timed, *trials])
        if len(set(found)) == 1:
            return way, is_timed
        decided = next((WAYS[index] for index, timed, *_ in found if not timed), UNSPLIT)
        return (SPLIT if decided == SPLIT else UNSPLIT), False

    def _played(self, way: str, turn: Turn, call: Call, size: Size | None, args: Sequence[Any]) -> Sequence[Any]:
        if way == SPLIT and turn.gates:
            recut = partial(self.planner.recut, turn, call)
            return self.gate.play(turn.cut, turn.num_rows, args, recut, num_tokens=turn.plan.padded_tokens)
        refined = self._refiner.programs[size] if way == REFINED and size else None
        return self.ways.play(way, turn.cut, turn.num_rows, args, refined=refined)

    def _count(self, way: str, reason: str) -> None:
        if way in (SPLIT, REFINED):
            self.calls.split += 1
        else:
            self._declined(reason)

    def _declined(self, reason: str) -> None:
        if reason not in self.calls.declined:
            logger.info("a call is not split: %s", reason)
        self.calls.declined[reason] += 1


class Follower:
    """A graph that is not split, among ranks that may split theirs: it comes to each step and declines."""

    def __init__(self, fn: Callable[..., Any], agreement: Agreement, config: Config) -> None:
        self.fn = fn
        self.agreement = agreement
        self.limits = Limits.of(config)
        self.wish = Wish(1, 1, 1, False, False, False, NOT_SPLIT, config.fingerprint)

    def __call__(self, *args: Any) -> Any:
        force = step_in_force()
        plan = force.plan if force else self.agreement.agree(self.wish, self.limits)
        if force:
            self.agreement.share([0, 0, 0])  # as `Comparison.shared` has it
        if plan.has_news:
            self.agreement.share([0])
        return self.fn(*args)
