"""All calls of many samples judged, how often a true split was claimed, and the table that says so."""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from signal import SIGKILL
from typing import Any

import torch

from dbo_compile.rules import RULES, rule_of
from tests.soundness.brute import Trial
from tests.soundness.calls import Call, calls_of, made_up
from tests.soundness.exchanges import exchanges
from tests.soundness.views import View, views

Counts = Counter[str]

MOST_SECONDS = 900
"""How long the samples of one op may take."""
UNCHECKED = frozenset({"aten::_fft_c2c", "aten::_fft_c2r"})
"""Kernels that write anywhere if sizes and dims do not fit, as in a search for splits. They have no rule."""


@dataclass(frozen=True)
class Depth:
    """How much of the samples is tried; `searches` for splits that no rule claims as well."""

    num_samples: int | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.int64, torch.bool)
    most_views: int = 16
    variants: tuple[str, ...] = ("as it is", "shuffled", "negated")
    searches: bool = True


FAST = Depth(1, (torch.float64, torch.int64), 4, ("negated",), searches=False)


@dataclass
class Tally:
    """`verdicts`: for each op how often which verdict. `splits`: for each op, of the ways to split it that are true by
    brute force, how many there are, are claimed by us, are claimed by DTensor."""

    wrong: list[str] = field(default_factory=list)
    verdicts: defaultdict[Any, Counts] = field(default_factory=lambda: defaultdict(Counter))
    splits: defaultdict[Any, Counts] = field(default_factory=lambda: defaultdict(Counter))
    seen: set[str] = field(default_factory=set)
    crashed: list[str] = field(default_factory=list)

    def add(self, call: Call, depth: Depth, also: Callable[[Call, View], bool] | None = None) -> None:
        """Judge a call in every view, unless it was judged before; `also` is asked whether it would split, too."""
        if (key := call.key) in self.seen:
            return
        self.seen.add(key)
        trial = Trial(call, variants=depth.variants)
        if trial.rule is None and not depth.searches:
            return
        for view in views(call, depth.most_views):
            verdict = trial.judge(view)
            self.verdicts[call.op][verdict.kind] += 1
            if verdict.kind == "wrong":
                self.wrong.append(f"{key}\n    {view}\n    {verdict.text}")
            if depth.searches and is_compared(call, view):
                self._compare(call, view, trial, verdict.kind, also)

    def _compare(self, call: Call, view: View, trial: Trial, kind: str, also: Any) -> None:
        if kind == "right" or (kind in ("refused", "no rule") and trial.can_be_split(view)):
            self.splits[call.op]["true"] += 1
            self.splits[call.op]["claimed"] += kind == "right"
            self.splits[call.op]["DTensor"] += also is not None and also(call, view)


def is_compared(call: Call, view: View) -> bool:
    """Whether a missed split counts: AOTAutograd leaves the op in a graph, and nothing is a number but sizes."""
    if call.op._schema.name in UNCHECKED:
        return False
    in_graphs = not call.op._schema.is_mutable and not call.op._schema.name.endswith("_copy")
    return in_graphs and not view.positions and all(type(call.leaves[i]) is int for i in view.numbers)


def tally(
    infos: Iterable[Any], depth: Depth, also: Callable[[Call, View], bool] | None = None, seen: Iterable[str] = ()
) -> Tally:
    """Judge the samples of ops, but for the calls in `seen`."""
    made = Tally(seen={*seen})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for info in infos:
            for call in calls_of(info, depth.dtypes, depth.num_samples):
                made.add(call, depth, also)
    return made


def tally_in_processes(infos: Iterable[Any], depth: Depth, also: Callable[[Call, View], bool] | None = None) -> Tally:
    """Judge the samples of ops, each op in a process of its own: some kernels crash, some may hang."""
    made = Tally()
    for info in infos:
        here, there = Pipe(duplex=False)
        if (child := os.fork()) == 0:
            there.send(_plain(tally([info], depth, also, made.seen)))
            os._exit(0)
        there.close()
        try:
            if not here.poll(MOST_SECONDS):
                os.kill(child, SIGKILL)
            _merge(made, *here.recv())
        except EOFError:
            made.crashed.append(info.name)
        os.waitpid(child, 0)
        here.close()
    return made


def _plain(made: Tally) -> tuple[Any, ...]:
    """Ops cannot be sent, their names can."""
    verdicts, splits = ({str(op): c for op, c in table.items()} for table in (made.verdicts, made.splits))
    return made.wrong, verdicts, splits, made.seen


def _merge(
    made: Tally, wrong: list[str], verdicts: dict[str, Counts], splits: dict[str, Counts], seen: set[str]
) -> None:
    made.wrong += wrong
    made.seen |= seen
    for name in verdicts:
        target = _op(name)
        made.verdicts[target] += verdicts[name]
        made.splits[target] += splits.get(name, Counter())


def _op(name: str) -> Any:
    """The op of this name; the name itself for one that PyTorch registers when it is first called."""
    namespace, op, overload = name.split(".")
    packet = getattr(getattr(torch.ops, namespace), op, None)
    return name if packet is None else getattr(packet, overload)


def tally_of_our_own(made: Tally, depth: Depth) -> None:
    """Judge collectives, and made-up calls for each rule of an op that takes any sizes and was not asked."""
    for op, args in exchanges():
        made.add(Call(op, args, {}), depth)
    for op in [op for op in RULES if op not in made.verdicts and family(op) in ("pointwise", "reduce")]:
        for call in made_up(op):
            made.add(call, depth)


def family(op: Any) -> str:
    rule = rule_of(op)
    return "no rule" if rule is None else rule.__module__.rpartition(".")[2]


def table(made: Tally) -> str:
    """By family: what was asked, and how many of the true splits are claimed, here and by DTensor."""
    rows: list[tuple[Any, ...]] = [
        ("family", "ops", "questions", "wrong claims", "true splits", "claimed", "missed", "share", "DTensor claims")
    ]
    for name in sorted({*map(family, made.verdicts)}, key=lambda name: (name == "no rule", name)):
        rows.append(_row(name, made, [op for op in made.verdicts if family(op) == name]))
    rows.append(_row("with a rule", made, [op for op in made.verdicts if family(op) != "no rule"]))
    rows.append(_row("**all**", made, list(made.verdicts)))
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _row(name: str, made: Tally, ops: Sequence[Any]) -> tuple[Any, ...]:
    verdicts = sum((made.verdicts[op] for op in ops), Counter())
    splits = sum((made.splits[op] for op in ops), Counter())
    true, claimed = splits["true"], splits["claimed"]
    share, its = (f"{100 * n / true:.1f} %" if true else "" for n in (claimed, splits["DTensor"]))
    return name, len(ops), verdicts.total(), verdicts["wrong"], true, claimed, true - claimed, share, its


def most_missed(made: Tally, most: int = 25) -> str:
    """The ops with the most missed splits, and how many of all their true ones DTensor claims."""
    missed = {op: counts["true"] - counts["claimed"] for op, counts in made.splits.items()}
    ops = sorted((op for op, n in missed.items() if n), key=lambda op: (-missed[op], str(op)))[:most]
    rows = [f"| `{op}` | {family(op)} | {missed[op]} | {made.splits[op]['DTensor']} |" for op in ops]
    return "\n".join(["| op | family | missed | of all its true splits, DTensor claims |", "|---|---|---|---|", *rows])


def kinds(made: Tally) -> str:
    """How often which verdict."""
    return ", ".join(f"{kind}: {n}" for kind, n in sum(made.verdicts.values(), Counter()).most_common())
