"""The engine of one graph: ranks agree on a step, it is padded, played the fastest way, and un-padded."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dbo_compile.config import Config
from dbo_compile.errors import Disagreement, NotSplit, RankLost
from dbo_compile.log import logger
from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.cuts import Cut, cut_requests
from dbo_compile.runtime.force import InForce, step_in_force
from dbo_compile.runtime.gate import Trial
from dbo_compile.runtime.graphs import Player
from dbo_compile.runtime.padding import Buckets, coarse, is_decode
from dbo_compile.runtime.plan import NOT_SPLIT, BatchPlan, Limits, Wish, check_same
from dbo_compile.runtime.refine import Refiner, synchronize
from dbo_compile.runtime.requests import RequestTable
from dbo_compile.runtime.rows import find_rows
from dbo_compile.runtime.signature import Signature
from dbo_compile.runtime.tune import REFINED, SPLIT, Costs, Decision, Size, Tuner, known_decisions
from dbo_compile.runtime.ways import Programs, Ways, Whole


@dataclass(slots=True)
class Calls:
    """What happened so far, for the report."""

    total: int = 0
    split: int = 0
    declined: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Turn:
    """One call, as agreed: its plan, what it tells of requests, how it is cut, all its rows, why not split, and whether
    the gate is to judge it."""

    plan: BatchPlan
    table: RequestTable | None
    cut: Cut
    num_rows: int
    reason: str
    gates: bool


def limits_of(config: Config) -> Limits:
    """From where on a step is split. A single row is a size that Inductor specialises on."""
    return Limits(config.num_microbatches, *config.least_tokens, least_rows=2 if config.inner == "inductor" else 1)


class Engine:
    """Plays a graph, split or not, as its ranks have agreed for its size.

    `split="auto"` times the ways to play it (see `Ways`); otherwise a step that can be split is. When the gate refutes
    the programs, `recompile` makes others that trust nothing, or None if nothing was on trust. `replan` makes the split
    program again for measured costs, or None if they make no difference.
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
        self.limits = limits_of(config)
        self.buckets = Buckets(config.pad_to)
        self.calls = Calls()
        self.tuner = Tuner(agreement.share, known_decisions(programs.fingerprint))
        self.refuted = ""
        """Why the gate had the graph split no more."""
        self.fingerprint = _hash(programs.fingerprint, str(self.tuner.decisions))
        """What the ranks that play this graph together must have in common."""
        self._config_fingerprint = config.fingerprint
        self._recompile = recompile
        self._refiner = Refiner(self.ways, agreement, replan)
        self._is_gated = config.gate == "never"
        self._rows: dict[tuple[int, ...], tuple[int, ...] | NotSplit] = {}
        self._last: tuple[int, bool] | None = None

    def __call__(self, *args: Any) -> Any:
        self.calls.total += 1
        force, sizes = step_in_force(), self.signature.sizes(args)
        table = self._read(args, sizes, force)
        plan = self._meet(force) if force else self._agree(sizes, args, table)  # what goes wrong there, all hear of
        try:
            return self._call(args, plan, sizes, table, force)
        except (Disagreement, RankLost):
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

    @property
    def decisions(self) -> dict[Size, Decision]:
        """What `split="auto"` found for each size so far."""
        return self.tuner.decisions

    @property
    def wants_gate(self) -> bool:
        return not self.refuted and (self.config.gate == "every-call" or not self._is_gated)

    def agree_ahead(self, num_tokens: int) -> None:
        """Announce the next call, of so many tokens and otherwise like the last one, while this one is played."""
        if self._last is None:
            raise ValueError("agree_ahead announces a call that is like the last one: call the model once before")
        if self.signature.requests:
            raise ValueError("agree_ahead does not know the requests of the next call, and this graph is told of them")
        can_split = self._can_split(num_tokens, self.rows_of)
        self.agreement.agree_ahead(self._wish(num_tokens, *self._last, can_split=can_split))

    def retune(self) -> None:
        """Time every size again; to be called on all ranks at the same place."""
        self.tuner.forget()
        self._refiner.forget()

    def rows_of(self, num_tokens: int, *others: int) -> tuple[int, ...]:
        """How many tokens each microbatch of a step has; raises `NotSplit` with the reason if there is no way.

        `others` are the values of the graph's other symbols, in the order of the signature.
        """
        key = (num_tokens, *others)
        if key not in self._rows:
            guards, limits = self.ways.programs.guards, self.limits
            n, least = limits.num_microbatches, limits.least_rows
            try:
                self._rows[key] = find_rows(num_tokens, others, guards, num_microbatches=n, least_rows=least)
            except NotSplit as why:
                self._rows[key] = why
        if isinstance(rows := self._rows[key], NotSplit):
            raise rows
        return rows

    # -- agreeing -----------------------------------------------------------------------------------------------------

    def _read(self, args: Sequence[Any], sizes: Sequence[int], force: InForce | None) -> RequestTable | None:
        """What a call tells of its requests; if that is wrong, the other ranks hear of it before this raises."""
        if self.signature.requests is None or len(set(sizes)) > 1:
            return None
        try:
            return self.signature.requests.read(args, force.num_tokens if force else sizes[0])
        except ValueError as error:
            if force:
                self.agreement.leave(f"it raised ValueError: {error}")
            else:
                self.agreement.meet(Wish.wrong(self.fingerprint, self._config_fingerprint))
            raise

    def _call(
        self,
        args: Sequence[Any],
        plan: BatchPlan,
        sizes: Sequence[int],
        table: RequestTable | None,
        force: InForce | None,
    ) -> Any:
        if len(set(sizes)) > 1:
            pairs = zip(self.signature.token_inputs, sizes, strict=True)
            listed = ", ".join(f"{t.name}: {size}" for t, size in pairs)
            self._declined(f"its token inputs differ in their number of tokens ({listed}); see token_dims")
            return self.ways.whole.eager(*args)
        turn = self._turn(plan, sizes[0], args, table, force)
        mine = self.signature.padded(args, turn.num_rows)
        results = self._play(turn, mine)
        if force:
            force.note(self.signature, mine, results)
        self.signature.write_back(args, mine)
        return self.signature.unpadded(results, turn.num_rows, sizes[0])

    def _agree(self, sizes: Sequence[int], args: Sequence[Any], table: RequestTable | None) -> BatchPlan:
        num_tokens, first = max(sizes), self.signature.token_inputs[0]
        elements = args[first.index].numel() // max(1, sizes[0])
        is_flat_decode = table is not None and table.is_decode
        decode = is_flat_decode or is_decode((args[t.index], t.dim) for t in self.signature.token_inputs)
        self._last = elements, decode
        ahead = self.agreement.announced
        if ahead is not None and (ahead.num_tokens, ahead.program) == (num_tokens, self.fingerprint):
            return self.agreement.agree(ahead, self.limits)
        try:
            can_split = len(set(sizes)) == 1 and self._can_split(num_tokens, lambda n: self._cut(n, args, table))
            self.signature.check(args)
            wish = self._wish(num_tokens, *self._last, can_split=can_split)
        except Exception:  # more tokens than any bucket has, perhaps: the others must not wait for this rank
            self.agreement.meet(Wish.wrong(self.fingerprint, self._config_fingerprint))
            raise
        return self.agreement.agree(wish, self.limits, patient=self.calls.total == 1)

    def _wish(self, num_tokens: int, elements: int, decode: bool, *, can_split: bool) -> Wish:
        bucket = self.buckets.bucket(num_tokens)
        program, config = self.fingerprint, self._config_fingerprint
        return Wish(num_tokens, bucket, elements * bucket, can_split, self.wants_gate, decode, program, config)

    def _can_split(self, num_tokens: int, cut: Callable[[int], object]) -> bool:
        if self.refuted:
            return False
        try:
            return bool(cut(self.buckets.bucket(num_tokens) if self._pads else num_tokens))
        except (NotSplit, ValueError):
            return False

    def _cut(self, num_rows: int, args: Sequence[Any], table: RequestTable | None) -> Cut:
        """How a step is cut; raises `NotSplit` with the reason if there is no way."""
        others = self.signature.others(args)
        if self.signature.requests is None:
            return Cut(self.rows_of(num_rows, *others))
        guards = self.ways.programs.guards
        even = partial(self.rows_of, num_rows, *others)
        return cut_requests(self.signature, args, table, num_rows, guards=guards, limits=self.limits, even=even)

    def _meet(self, force: InForce) -> BatchPlan:
        """The plan in force; in the first step of all, ranks see that they play the same before they do."""
        if force.is_first:
            found = self.agreement.share([int(self.fingerprint[:15], 16)], patient=True)
            check_same("program", {rank: f"{values[0]:015x}" for rank, values in enumerate(found)})
        force.engines.append(self.fingerprint)
        return force.plan

    @property
    def _pads(self) -> bool:
        return (self.config.pad_to is not None or self.signature.same_size) and not self.signature.unpaddable

    def _turn(
        self,
        plan: BatchPlan,
        num_tokens: int,
        args: Sequence[Any],
        table: RequestTable | None,
        force: InForce | None,
    ) -> _Turn:
        uneven = any(n != plan.padded_tokens for n in plan.num_tokens)
        if uneven and self.signature.unpaddable and (force or self.config.pad_to is not None):
            raise ValueError(f"steps of this model cannot be padded: {self.signature.unpaddable}")
        num_rows = plan.padded_tokens if self._pads and not force else num_tokens
        cut, reason = self._split(plan, num_rows, args, table)
        gates = plan.gate or (force is not None and self.wants_gate)
        if force and self.signature.requests and self.agreement.size > 1:  # a rank may play another graph: of 1 request
            gates = any(wants for wants, in self.agreement.share([gates], patient=True))
        return _Turn(plan, table, cut, num_rows, reason, gates)

    def _split(
        self, plan: BatchPlan, num_rows: int, args: Sequence[Any], table: RequestTable | None
    ) -> tuple[Cut, str]:
        """How the step is cut; not at all, and why, if it is not split on any rank."""
        try:
            cut, reason = self._cut(num_rows, args, table), self.refuted or plan.reason
        except NotSplit as why:
            cut, reason = Cut(), str(why)
        cut = Cut() if reason else cut
        if not plan.reason and self._may_differ and self.agreement.size > 1:
            can = self.agreement.share([bool(cut.rows)])
            if cut.rows and not all(c for c, in can):
                cut, reason = Cut(), "another rank cannot split it"
        return cut, reason

    @property
    def _may_differ(self) -> bool:
        """Whether ranks that agreed to split may still differ in whether they can: by what the guards speak of, or by
        requests, where their wishes did not know them or how far the step is padded."""
        unknown = self.signature.requests is not None and (self._pads or step_in_force() is not None)
        return unknown or self.ways.programs.guards.know_others

    # -- playing ------------------------------------------------------------------------------------------------------

    def _play(self, turn: _Turn, args: Sequence[Any]) -> Sequence[Any]:
        ways = self.ways.fitting(turn.cut.rows, turn.num_rows, args)
        way = next(iter(ways), "")
        if self.config.split == "auto" and ways:
            return self._play_fastest(turn, ways, args)
        self._count(way, turn.reason)
        return self._gated(turn, args) if way == SPLIT and turn.gates else self._played(way, turn, None, args)

    def _play_fastest(self, turn: _Turn, ways: Sequence[str], args: Sequence[Any]) -> Sequence[Any]:
        """Play the way that was fastest for this size, or time the one whose turn it is."""
        size = Size(coarse(turn.plan.padded_tokens), coarse(turn.plan.num_elements))
        if SPLIT in ways and self.config.policy == "list" and self._refiner.programs.get(size, self) is not None:
            ways = [SPLIT, REFINED, *ways[1:]]
        way, is_timed = self.tuner.way(size, ways)
        if way == REFINED and size not in self._refiner.programs and not is_timed:
            self._refiner.make(size, self.decisions[size].costs)
        self._count(way, turn.reason or (f"timing it {way}" if is_timed else f"{way} was timed to be faster"))
        if way == SPLIT and turn.gates:
            return self._gated(turn, args)
        if way == REFINED and size not in self._refiner.programs:
            return self._refiner.measure(size, turn.cut, turn.num_rows, args)
        self.ways.prepare(way)
        if not is_timed:
            return self._played(way, turn, size, args)
        synchronize(args)
        start = time.perf_counter()
        results = self._played(way, turn, size, args)
        synchronize(args)
        self.tuner.took(size, way, time.perf_counter() - start, self._refiner.costs.get(size, {}))
        return results

    def _played(self, way: str, turn: _Turn, size: Size | None, args: Sequence[Any]) -> Sequence[Any]:
        refined = self._refiner.programs[size] if way == REFINED and size else None
        return self.ways.play(way, turn.cut, turn.num_rows, args, refined=refined)

    def _gated(self, turn: _Turn, args: Sequence[Any]) -> Sequence[Any]:
        """Play unsplit and split, and keep splitting only if both give the same on every rank.

        If they do not, and something is taken on trust, programs that do not trust it get a second chance.
        """
        cut = turn.cut
        trial = Trial(self.ways, self.agreement, turn.num_rows, args)
        fault = trial.fault(cut)
        while fault and cut.rows and (other := self._without_trust(fault)):
            self.ways.programs, self._rows = other, {}
            cut, _ = self._split(turn.plan, turn.num_rows, args, turn.table)
            fault = trial.fault(cut) if cut.rows else fault
        trial.close()
        self._is_gated = True
        if fault:
            self.refuted = f"splitting changed {fault}: some op mixes tokens, and its rule does not say so"
            logger.warning("%s. The graph is not split any more; dbo_compile.explain shows its ops", self.refuted)
        return trial.results

    def _without_trust(self, fault: str) -> Programs | None:
        trusts = self.ways.programs.trusts
        with self.agreement.busy():
            programs = self._recompile()
        self.agreement.share([0], patient=True)
        if programs:
            logger.warning("splitting changed %s, so this is not taken on trust any more: %s", fault, "; ".join(trusts))
        return programs

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
        self.limits = limits_of(config)
        self.wish = Wish(1, 1, 1, False, False, False, NOT_SPLIT, config.fingerprint)

    def __call__(self, *args: Any) -> Any:
        force = step_in_force()
        if force is None:
            self.agreement.agree(self.wish, self.limits)
        elif force.is_first:
            self.agreement.share([0], patient=True)
        return self.fn(*args)


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
