"""What a call of a graph is played as: its ranks agree on a plan, and each cuts its own inputs by it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dbo_compile.config import Config
from dbo_compile.errors import NotSplit
from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.comparison import NOT_SPLIT, Comparison, EngineState, to_int64
from dbo_compile.runtime.cuts import Cut, cut_requests
from dbo_compile.runtime.force import InForce, step_in_force
from dbo_compile.runtime.gate import Gate
from dbo_compile.runtime.padding import Buckets, is_decode
from dbo_compile.runtime.plan import BatchPlan, Limits, Pads, Wish, has_to_be_padded
from dbo_compile.runtime.requests import RequestTable
from dbo_compile.runtime.rows import Guards
from dbo_compile.runtime.tune import Decision, Size
from dbo_compile.runtime.ways import Ways


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of a call, how many tokens each token input has, the step it is part of (None: it is one by
    itself), and what it tells of requests."""

    args: Sequence[Any]
    sizes: Sequence[int]
    force: InForce | None
    table: RequestTable | None

    @property
    def is_even(self) -> bool:
        """Whether the token inputs agree on the number of tokens."""
        return len(set(self.sizes)) == 1


@dataclass(frozen=True, slots=True)
class Turn:
    """How a call is played: how it is cut (not at all: for what `reason`), all its rows, and whether the gate judges
    it."""

    plan: BatchPlan
    cut: Cut
    num_rows: int
    reason: str
    gates: bool


class Planner:
    """Plans the calls of one graph."""

    def __init__(self, ways: Ways, gate: Gate, config: Config, decided: Mapping[Size, Decision]) -> None:
        self.signature = ways.signature
        self.agreement: Agreement = ways.agreement
        self._decided = str(decided)
        self._ways = ways
        kind = _hash(ways.signature.kind, str(self._guards.know_others))
        began = self.agreement.num_steps + self.agreement.num_shared
        self.state = EngineState(int(kind[:7], 16), began)
        self._gate = gate
        self._config_fingerprint = config.fingerprint
        self._limits = Limits.of(config)
        self._buckets = Buckets(config.pad_to)
        self._has_buckets = config.pad_to is not None
        self._last: tuple[int, bool] | None = None

    @property
    def fingerprint(self) -> str:
        """That of the program as it is now: the gate may have replaced the first one."""
        return _hash(self._ways.programs.fingerprint, self._decided)

    # -- agreeing: what goes wrong here, the other ranks hear of ----------------------------------------------------

    def read(self, args: Sequence[Any]) -> Call:
        """Look at the arguments of a call; raises `ValueError` if what they tell of requests is wrong."""
        force, sizes = step_in_force(), self.signature.sizes(args)
        if self.signature.requests is None or len(set(sizes)) > 1:
            return Call(args, sizes, force, None)
        try:
            return Call(args, sizes, force, self.signature.requests.read(args, force.num_tokens if force else sizes[0]))
        except ValueError as error:
            if force:
                self.agreement.leave(f"it raised ValueError: {error}")
            else:
                self._come_wrong()
            raise

    def plan(self, call: Call) -> BatchPlan:
        """The plan of the step that a call is part of, or that all ranks make of it."""
        if call.force:
            return call.force.plan.met(self._compared(call))
        try:
            self.signature.check(call.args)
            wish = self._wish(call)
        except Exception:  # more tokens than any bucket has, perhaps
            self._come_wrong()
            raise
        return self.agreement.agree(wish, self._limits)

    def agree_ahead(self, num_tokens: int) -> None:
        """Announce the next call, of so many tokens and otherwise like the last one, while this one is played."""
        if self._last is None:
            raise ValueError("agree_ahead announces a call that is like the last one: call the model once before")
        if self.signature.requests:
            raise ValueError("agree_ahead does not know the requests of the next call, and this graph is told of them")
        can_split = self._can_split(num_tokens, self.rows_of)
        self.agreement.agree_ahead(self._wish_of(num_tokens, *self._last, can_split=can_split))

    def _wish(self, call: Call) -> Wish:
        num_tokens, first = max(call.sizes), self.signature.token_inputs[0]
        elements = call.args[first.index].numel() // max(1, call.sizes[0])
        is_flat_decode = call.table is not None and call.table.is_decode
        decode = is_flat_decode or is_decode((call.args[t.index], t.dim) for t in self.signature.token_inputs)
        self._last = elements, decode
        if not call.is_even:  # played as it was traced, like a graph that is not split
            return replace(self._wish_of(num_tokens, elements, decode, can_split=False), program=NOT_SPLIT)
        can_split = self._can_split(num_tokens, partial(self._cut, call))
        return self._wish_of(num_tokens, elements, decode, can_split=can_split)

    def _wish_of(self, num_tokens: int, elements: int, decode: bool, *, can_split: bool) -> Wish:
        bucket = self._buckets.bucket(num_tokens)
        wants_gate, program, config = self._gate.wants(num_tokens), self.fingerprint, self._config_fingerprint
        pads, graph = Pads.ALWAYS if self._pads else Pads.NEVER, self._ways.programs.graph
        return Wish(num_tokens, bucket, elements * bucket, can_split, wants_gate, decode, program, config, pads=pads,
                    graph=graph, state=self.state.packed())  # fmt: skip

    def _come_wrong(self) -> None:
        self.agreement.meet(Wish.wrong(self.fingerprint, self._config_fingerprint))

    def _can_split(self, num_tokens: int, cut: Callable[[int], object]) -> bool:
        if self._gate.refuted:
            return False
        try:
            return bool(cut(self._buckets.bucket(num_tokens) if self._pads else num_tokens))
        except (NotSplit, ValueError):
            return False

    def _compared(self, call: Call) -> Comparison:
        """Ranks see that they play the same before they do: Dynamo may have made another graph of it on some of them
        since they agreed on the step."""
        told = [to_int64(self.fingerprint), to_int64(self._ways.programs.graph), self.state.packed()]
        return Comparison.shared(self.agreement.share(told if call.is_even else [0, 0, 0]))

    # -- what this rank makes of a plan -----------------------------------------------------------------------------

    def turn(self, plan: BatchPlan, call: Call) -> Turn:
        """How the call of a plan is played on this rank. Raises `Disagreement` if it had to be padded and cannot be,
        and `Unpaddable` if it was before that was known."""
        self._check_rows(plan, call.force)
        num_rows = plan.padded_tokens if plan.pads and not call.force else call.sizes[0]
        cut, reason = self._split(plan, call, num_rows)
        gates = plan.gate or (call.force is not None and self._gate.wants(plan.padded_tokens))
        if call.force and not (plan.compared.alike or plan.compared.why_whole):
            gates = any(wants for wants, in self.agreement.share([gates]))
        return Turn(plan, cut, num_rows, reason, gates)

    def _check_rows(self, plan: BatchPlan, force: InForce | None) -> None:
        if force:
            force.meet(self.signature)
        is_padded = force.pads if force else plan.pads
        if self.signature.same_size and not (plan.is_even or plan.compared.followers or is_padded):
            raise has_to_be_padded(plan, self.signature.unpaddable or "another part of the model must not be")

    def recut(self, turn: Turn, call: Call) -> Cut:
        """How the same call is cut for programs that have been made since."""
        return self._split(turn.plan, call, turn.num_rows)[0]

    def rows_of(self, num_tokens: int, *others: int) -> tuple[int, ...]:
        """How many tokens each microbatch of a step has; raises `NotSplit` with the reason if there is no way.

        `others` are the values of the graph's other symbols, in the order of the signature.
        """
        limits = self._limits
        return self._guards.rows_of(
            num_tokens, others, num_microbatches=limits.num_microbatches, least_rows=limits.least_rows
        )

    @property
    def _guards(self) -> Guards:
        return self._ways.programs.guards

    @property
    def _pads(self) -> bool:
        return (self._has_buckets or self.signature.same_size) and not self.signature.unpaddable

    def _cut(self, call: Call, num_rows: int) -> Cut:
        """How a step of so many rows is cut; raises `NotSplit` with the reason if there is no way."""
        others = self.signature.others(call.args)
        if self.signature.requests is None:
            return Cut(self.rows_of(num_rows, *others))
        even = partial(self.rows_of, num_rows, *others)
        return cut_requests(
            self.signature, call.args, call.table, num_rows, guards=self._guards, limits=self._limits, even=even
        )

    def _split(self, plan: BatchPlan, call: Call, num_rows: int) -> tuple[Cut, str]:
        """How the step is cut; not at all, and why, if it is not split on any rank."""
        try:
            cut, reason = self._cut(call, num_rows), self._gate.refuted or plan.reason
        except NotSplit as why:
            cut, reason = Cut(), str(why)
        cut = Cut() if reason else cut
        if not plan.reason and self.may_differ(plan, call.force):
            can = self.agreement.share([bool(cut.rows)])
            if cut.rows and not all(c for c, in can):
                cut, reason = Cut(), "another rank cannot split it"
        return cut, reason

    def may_differ(self, plan: BatchPlan, force: InForce | None) -> bool:
        """Whether ranks that agreed to split may still differ in whether they can: they have other engines, or it
        depends on what the guards speak of, or on requests or sizes, where their wishes did not know them or how far
        the step is padded."""
        unknown = self.signature.requests is not None and (self._pads or force is not None)
        own_sizes = force is not None and not (force.pads or plan.is_even)
        differ = not plan.compared.alike or unknown or own_sizes or self._guards.know_others
        return differ and self.agreement.size > 1


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
