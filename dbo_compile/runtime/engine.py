"""The engine of one graph: ranks agree on a step, it is padded, played the fastest way, and un-padded."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from dbo_compile.config import Config
from dbo_compile.errors import Disagreement, NotSplit, RankLost
from dbo_compile.log import logger
from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.force import InForce, step_in_force
from dbo_compile.runtime.gate import Difference, difference
from dbo_compile.runtime.lanes import WaitFor, WorkLanes
from dbo_compile.runtime.padding import Buckets, coarse, is_decode
from dbo_compile.runtime.plan import NOT_SPLIT, BatchPlan, Limits, Wish, check_same
from dbo_compile.runtime.rows import Guards, find_rows
from dbo_compile.runtime.signature import Signature, State
from dbo_compile.runtime.tune import Decision, Size, Tuner, known_decisions

Player = Callable[[Callable[..., Any], Sequence[int], Sequence[Any]], tuple[Any, ...]]
SPLIT, UNSPLIT, INDUCTOR = "split", "unsplit", "inductor"
YARDSTICK_ROWS = 8
"""How many more rows of padding the yardstick of the gate has."""


@dataclass(frozen=True, slots=True)
class Programs:
    """What there is to play a graph with: an emitted module for each number of microbatches, 1 among them, and what
    tracing and compiling assumed of the number of rows. `trusts` says what splitting takes on trust."""

    modules: Mapping[int, nn.Module]
    guards: Guards
    fingerprint: str
    trusts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Whole:
    """The graph as it was traced: its ops as they are, and a way to have Inductor compile it."""

    eager: Callable[..., Any]
    compile: Callable[[], tuple[Callable[..., Any], Guards]] | None = None


@dataclass(slots=True)
class Calls:
    """What happened so far, for the report."""

    total: int = 0
    split: int = 0
    declined: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Turn:
    """One call, as agreed: its plan, the rows of each microbatch (none: not split), all its rows, why not split."""

    plan: BatchPlan
    rows: tuple[int, ...]
    num_rows: int
    reason: str
    gates: bool


def limits_of(config: Config) -> Limits:
    """From where on a step is split. A row of its own is a size that Inductor specialises on."""
    return Limits(config.num_microbatches, *config.least_tokens, least_rows=2 if config.inner == "inductor" else 1)


def played(
    module: Callable[..., Any], rows: Sequence[int], args: Sequence[Any], wait_for: WaitFor | None = None
) -> tuple[Any, ...]:
    """The results of an emitted program on lanes of its own."""
    with WorkLanes(rows, wait_for) as lanes:
        results: tuple[Any, ...] = module(lanes, *args)
    return results


class Engine:
    """Plays a graph, split or not, as its ranks have agreed for its size.

    There are three ways to play a step: `split`, `unsplit` (the same segments, each on all rows) and `inductor` (the
    whole graph, compiled on first use). `split="auto"` times them; otherwise a step that can be split is. When the gate
    refutes the programs, `recompile` makes others that trust nothing, or None if nothing was on trust.
    """

    def __init__(
        self,
        programs: Programs,
        whole: Whole,
        signature: Signature,
        agreement: Agreement,
        config: Config,
        recompile: Callable[[], Programs | None] = lambda: None,
    ) -> None:
        self.programs = programs
        self.whole = whole
        self.signature = signature
        self.agreement = agreement
        self.config = config
        self.limits = limits_of(config)
        self.buckets = Buckets(config.pad_to)
        self.calls = Calls()
        self.player: Player = partial(played, wait_for=agreement.wait_for)
        self.tuner = Tuner(agreement.share, known_decisions(programs.fingerprint))
        self.refuted = ""
        """Why the gate had the graph split no more."""
        self._recompile = recompile
        self._fingerprint = _hash(programs.fingerprint, str(self.tuner.decisions))
        self._rows: dict[tuple[int, ...], tuple[int, ...] | NotSplit] = {}
        self._inductor: tuple[Callable[..., Any], Guards] | None = None
        self._is_gated = config.gate == "never"
        self._last: tuple[int, bool] | None = None

    def __call__(self, *args: Any) -> Any:
        self.calls.total += 1
        try:
            return self._call(args)
        except (Disagreement, RankLost):
            raise
        except Exception as error:
            self.agreement.leave(f"it raised {type(error).__name__}: {error}")
            raise

    @property
    def fingerprint(self) -> str:
        """What the ranks that play this graph together must have in common."""
        return self._fingerprint

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
        self.agreement.agree_ahead(self._wish(num_tokens, *self._last, can_split=self._can_split(num_tokens, ())))

    def retune(self) -> None:
        """Time every size again; to be called on all ranks at the same place."""
        self.tuner.forget()

    def rows_of(self, num_tokens: int, *others: int) -> tuple[int, ...]:
        """How many tokens each microbatch of a step has; raises `NotSplit` with the reason if there is no way.

        `others` are the values of the graph's other symbols, in the order of the signature.
        """
        key = (num_tokens, *others)
        if key not in self._rows:
            n, least = self.limits.num_microbatches, self.limits.least_rows
            try:
                guards = self.programs.guards
                self._rows[key] = find_rows(num_tokens, others, guards, num_microbatches=n, least_rows=least)
            except NotSplit as why:
                self._rows[key] = why
        if isinstance(rows := self._rows[key], NotSplit):
            raise rows
        return rows

    # -- agreeing -----------------------------------------------------------------------------------------------------

    def _call(self, args: Sequence[Any]) -> Any:
        force = step_in_force()
        sizes = self.signature.sizes(args)
        plan = self._meet(force) if force else self._agree(sizes, args)
        if len(set(sizes)) > 1:
            pairs = zip(self.signature.token_inputs, sizes, strict=True)
            listed = ", ".join(f"{t.name}: {size}" for t, size in pairs)
            self._declined(f"its token inputs differ in their number of tokens ({listed}); see token_dims")
            return self.whole.eager(*args)
        turn = self._turn(plan, sizes[0], args, force)
        mine = self.signature.padded(args, turn.num_rows)
        results = self._play(turn, mine)
        if force:
            force.note(self.signature, mine, results)
        self.signature.write_back(args, mine)
        return self.signature.unpadded(results, turn.num_rows, sizes[0])

    def _agree(self, sizes: Sequence[int], args: Sequence[Any]) -> BatchPlan:
        num_tokens, first = max(sizes), self.signature.token_inputs[0]
        elements = args[first.index].numel() // max(1, sizes[0])
        self._last = elements, is_decode((args[t.index], t.dim) for t in self.signature.token_inputs)
        ahead = self.agreement.announced
        if ahead is not None and (ahead.num_tokens, ahead.program) == (num_tokens, self.fingerprint):
            return self.agreement.agree(ahead, self.limits)
        can_split = len(set(sizes)) == 1 and self._can_split(num_tokens, self.signature.others(args))
        try:
            wish = self._wish(num_tokens, *self._last, can_split=can_split)
        except ValueError:  # more tokens than any bucket has: the others must not wait for this rank
            self.agreement.meet(Wish.wrong(self.fingerprint, self.config.fingerprint))
            raise
        return self.agreement.agree(wish, self.limits)

    def _wish(self, num_tokens: int, elements: int, decode: bool, *, can_split: bool) -> Wish:
        bucket = self.buckets.bucket(num_tokens)
        program, config = self.fingerprint, self.config.fingerprint
        return Wish(num_tokens, bucket, elements * bucket, can_split, self.wants_gate, decode, program, config)

    def _can_split(self, num_tokens: int, others: Sequence[int]) -> bool:
        if self.refuted:
            return False
        try:
            return bool(self.rows_of(self.buckets.bucket(num_tokens) if self._pads else num_tokens, *others))
        except (NotSplit, ValueError):
            return False

    def _meet(self, force: InForce) -> BatchPlan:
        """The plan in force; in the first step of all, ranks see that they play the same before they do."""
        if force.is_first:
            found = self.agreement.share([int(self.fingerprint[:15], 16)])
            check_same("program", {rank: f"{values[0]:015x}" for rank, values in enumerate(found)})
        force.engines.append(self.fingerprint)
        return force.plan

    @property
    def _pads(self) -> bool:
        return (self.config.pad_to is not None or self.signature.same_size) and not self.signature.unpaddable

    def _turn(self, plan: BatchPlan, num_tokens: int, args: Sequence[Any], force: InForce | None) -> _Turn:
        uneven = any(n != plan.padded_tokens for n in plan.num_tokens)
        if uneven and self.signature.unpaddable and (force or self.config.pad_to is not None):
            raise ValueError(f"steps of this model cannot be padded: {self.signature.unpaddable}")
        num_rows = plan.padded_tokens if self._pads and not force else num_tokens
        others = self.signature.others(args)
        rows, reason = self._split(plan, num_rows, others)
        gates = plan.gate or (force is not None and self.wants_gate)
        return _Turn(plan, rows, num_rows, reason, gates)

    def _split(self, plan: BatchPlan, num_rows: int, others: Sequence[int]) -> tuple[tuple[int, ...], str]:
        """The rows of each microbatch; none, and why, if the step is not split on any rank."""
        try:
            rows, reason = self.rows_of(num_rows, *others), self.refuted or plan.reason
        except NotSplit as why:
            rows, reason = (), str(why)
        rows = () if reason else rows
        if not plan.reason and self.programs.guards.know_others and self.agreement.size > 1:
            can = self.agreement.share([bool(rows)])  # ranks may differ in what the guards speak of
            if rows and not all(c for c, in can):
                rows, reason = (), "another rank cannot split it"
        return rows, reason

    # -- playing ------------------------------------------------------------------------------------------------------

    def _play(self, turn: _Turn, args: Sequence[Any]) -> Sequence[Any]:
        fits = self.programs.guards.broken(turn.num_rows, self.signature.others(args)) is None
        ways = [*([SPLIT] if turn.rows else []), *([UNSPLIT] if fits else [])]
        size = Size(coarse(turn.plan.padded_tokens), coarse(turn.plan.num_elements))
        is_timed = False
        way = next(iter(ways), "")
        if self.config.split == "auto" and ways and self.whole.compile:
            way, is_timed = self.tuner.way(size, [*ways, INDUCTOR])
        self._count(way, turn.reason or f"{way} was timed to be faster")
        if way == SPLIT and turn.gates:
            return self._gated(turn, args)
        if not is_timed:
            return self._played(way, turn, args)
        self._prepare(way)
        synchronize(args)
        start = time.perf_counter()
        results = self._played(way, turn, args)
        synchronize(args)
        self.tuner.took(size, way, time.perf_counter() - start)
        return results

    def _played(self, way: str, turn: _Turn, args: Sequence[Any]) -> Sequence[Any]:
        if way == SPLIT:
            return self.player(self.programs.modules[len(turn.rows)], turn.rows, args)
        if way == INDUCTOR:
            fn, guards = self._prepare(way) or (None, None)
            if fn and guards and guards.broken(turn.num_rows, self.signature.others(args)) is None:
                results: Sequence[Any] = fn(*args)
                return results
        return self._unsplit(args, turn.num_rows)

    def _unsplit(self, args: Sequence[Any], num_rows: int) -> Sequence[Any]:
        if self.programs.guards.broken(num_rows, self.signature.others(args)) is None:
            return self.player(self.programs.modules[1], (num_rows,), args)
        results: Sequence[Any] = self.whole.eager(*args)
        return results

    def _prepare(self, way: str) -> tuple[Callable[..., Any], Guards] | None:
        if way == INDUCTOR and self._inductor is None and self.whole.compile:
            with self.agreement.busy():
                self._inductor = self.whole.compile()
        return self._inductor

    def _count(self, way: str, reason: str) -> None:
        if way == SPLIT:
            self.calls.split += 1
        else:
            self._declined(reason)

    def _declined(self, reason: str) -> None:
        if reason not in self.calls.declined:
            logger.info("a call is not split: %s", reason)
        self.calls.declined[reason] += 1

    # -- the gate -----------------------------------------------------------------------------------------------------

    def _gated(self, turn: _Turn, args: Sequence[Any]) -> Sequence[Any]:
        """Play unsplit and split, and keep splitting only if both gave the same on every rank."""
        before = State(self.signature, args)
        want = before.apart(self._unsplit(args, turn.num_rows))
        after = State(self.signature, args)
        dims = [*self.signature.output_dims, *self.signature.written_dims]
        turned = turn.rows
        while True:
            before.restore()
            got = self.player(self.programs.modules[len(turned)], turned, args)
            fault = self._fault([*got, *after.written], [*want, *after.values], dims, turn, args, before)
            if fault is None:
                self._is_gated = True
                return got
            trusts = self.programs.trusts
            with self.agreement.busy():
                other = self._recompile()
            if other is None:
                break
            logger.warning("splitting changed %s, so nothing is taken on trust any more: %s", fault, "; ".join(trusts))
            self.programs, self._rows = other, {}
            try:
                turned = self.rows_of(turn.num_rows, *self.signature.others(args))
            except NotSplit:
                break
        after.restore()
        self.refuted = f"splitting changed {fault}: some op mixes tokens although its rule says that it does not"
        logger.warning("%s. The graph is not split any more; dbo_compile.explain shows its ops", self.refuted)
        return want

    def _fault(
        self,
        got: Sequence[Any],
        want: Sequence[Any],
        dims: Sequence[int | None],
        turn: _Turn,
        args: Sequence[Any],
        before: State,
    ) -> str | None:
        """What splitting changed, on any rank; None if nothing."""
        off = difference(got, want, dims)
        if not self._any_rank(off.first is not None):
            return None
        worst = off.first
        if not self.signature.unpaddable:
            kept = [x.clone() for x in before.written]
            before.restore()
            num_rows = turn.num_rows + YARDSTICK_ROWS
            longer = self.signature.padded(args, num_rows)
            usual = self.signature.unpadded(self._unsplit(longer, num_rows), num_rows, turn.num_rows)
            num_results = len(usual)
            yard = difference(usual, want[:num_results], dims[:num_results])
            rest = (max(yard.bad_rows, default=0),) * (len(want) - num_results)  # state follows from the same routing
            worst = off.beyond(Difference((*yard.bad_rows, *rest)))
            for x, value in zip(before.written, kept, strict=True):
                x.copy_(value)
        if not self._any_rank(worst is not None):
            return None
        if worst is None:
            return "a result on another rank"
        rows = "" if dims[worst] is None else f" in {off.bad_rows[worst]} of its rows"
        num_outputs = len(self.signature.output_dims)
        return f"result {worst} of the graph{rows}" if worst < num_outputs else f"what it writes in place{rows}"

    def _any_rank(self, here: bool) -> bool:
        return any(there for there, in self.agreement.share([here]))


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
            self.agreement.share([0])
        return self.fn(*args)


def synchronize(args: Sequence[Any]) -> None:
    """Wait until the accelerator has done what it was given, if the arguments are on one."""
    if any(isinstance(x, torch.Tensor) and x.device.type != "cpu" for x in args):
        torch.accelerator.synchronize()


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
