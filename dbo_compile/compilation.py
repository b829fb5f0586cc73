"""One ATen graph through every pass: its levels, the programs at the end, and others made of it later."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
from torch import fx

from dbo_compile import compat
from dbo_compile import graph as g
from dbo_compile.arguments import Traced
from dbo_compile.config import Config
from dbo_compile.errors import InvalidSchedule, NotSplit
from dbo_compile.ir.program import Program, Run
from dbo_compile.ir.proof import verify_program
from dbo_compile.ir.schedule import Schedule, Segment, Step
from dbo_compile.ir.tokens import TOKENS, TokenMap
from dbo_compile.ir.verify import verify_schedule
from dbo_compile.levels import Levels
from dbo_compile.log import logger
from dbo_compile.passes import inner
from dbo_compile.passes.analyze import analyze
from dbo_compile.passes.cost import CostModel
from dbo_compile.passes.cut import Kind, cut, unsplit_writes
from dbo_compile.passes.emit import emit
from dbo_compile.passes.lower import lower
from dbo_compile.passes.order import order
from dbo_compile.passes.outline import Outline, outline
from dbo_compile.passes.partial import join_costly
from dbo_compile.passes.sync import sync
from dbo_compile.runtime.clock import simulate
from dbo_compile.runtime.rows import Guards
from dbo_compile.runtime.tune import Costs
from dbo_compile.runtime.ways import Programs

REFUTED = "the equality gate found that rows do not come back to their own tokens here, or not only here"


class Compilation:
    """The newest levels and programs of a graph; `whole` is a copy of it that no pass has touched."""

    def __init__(self, traced: Traced, whole: fx.GraphModule, config: Config) -> None:
        self._traced = traced
        self._whole = whole
        self._config = config
        self.levels, self.programs = build(traced, config, whole={})

    def compile_whole(self) -> tuple[Callable[..., Any], Guards]:
        """The graph in one piece by Inductor, and what that assumes."""
        compiled = inner.compile_whole(self._whole, self._traced.symbols, self._traced.hints)
        return compiled.fn, Guards(compiled.guards, self.programs.guards.symbols)

    def without_trust(self) -> Programs | None:
        """Programs that take nothing on trust; None if these do not either, or there are none."""
        refuted: dict[fx.Node, str] = {}
        placed = self.levels.tokens
        try:
            while trusted := placed.obligations:  # what comes of a barrier may be taken on trust elsewhere
                refuted |= dict.fromkeys(trusted, REFUTED)
                placed = place(self._traced, refuted)
            if not refuted:
                return None
            made = build(self._traced, self._config, whole=refuted)
        except (NotSplit, InvalidSchedule) as why:
            logger.info("no program takes nothing on trust: %s", why)
            return None
        self.levels, self.programs = made
        return self.programs

    def by_costs(self, costs: Costs) -> Programs | None:
        """The split program again, by measured costs; None if they change nothing."""
        return refined(self.levels, self.programs, costs)


def place(traced: Traced, whole: Mapping[fx.Node, str]) -> TokenMap:
    """Where the tokens are; `whole` holds ops that are to be barriers, with the reason."""
    return analyze(traced.gm.graph, traced.token_dims, traced.symbols, whole, traced.given)


def build(traced: Traced, config: Config, *, whole: Mapping[fx.Node, str]) -> tuple[Levels, Programs]:
    """The passes, one level after the other; for `whole` see `place`."""
    graph, n = traced.gm.graph, config.num_microbatches
    placed = place(traced, whole)
    segments = outline(traced.gm, cut(graph, placed), placed, traced.symbols)
    model = CostModel(graph)
    costs = {name: model.seconds(segments.groups[name]) for name in segments.codes}

    def cost(step: Step) -> float:
        return costs[segments.segments[step.segment].code]

    schedules = {m: make_schedule(segments, placed, cost, m, config.policy) for m in (1, n)}
    programs = {m: make_program(segments, schedule) for m, schedule in schedules.items()}
    apart = make_apart(segments, placed, cost, programs[n], config.policy)

    parts, once = ({s.code for s in segments.segments.values() if s.per_microbatch is part} for part in (True, False))
    sizes = {True: traced.sizes(n), False: traced.sizes(1)}
    compiled = inner.compile_codes(segments.codes, lambda code: sizes[code in parts], inner=config.inner)
    fns = {name: c.fn for name, c in compiled.items()}
    modules = {m: emit(p, fns, segments.outputs) for m, p in programs.items()}
    expected = _modelled(segments, graph, sizes)
    levels = Levels(graph, placed, segments, schedules[n], programs[n], modules[n], sizes[False][TOKENS], expected)
    return levels, Programs(
        modules,
        _guards(traced, compiled, parts, once),
        programs[n].fingerprint,
        trusts=tuple(dict.fromkeys(placed.obligations.values())),
        codes={name: s.code for name, s in segments.segments.items()},
        comm_codes=tuple(name for name, code in segments.codes.items() if code.kind is Kind.COMM),
        fns=fns,
        apart={n: emit(apart, fns, segments.outputs)} if apart else {},
        graph=programs[n].graph,
    )


def _modelled(
    segments: Outline, graph: fx.Graph, sizes: Mapping[bool, Mapping[sympy.Symbol, int]]
) -> Callable[[Run], float]:
    """How long runs take by the model where symbols have these sizes: those of a microbatch (True) or of a step."""
    models = {part: CostModel(graph, known) for part, known in sizes.items()}

    def seconds(run: Run) -> float:
        return models[run.microbatch is not None].seconds(segments.groups[segments.segments[run.segment].code])

    return seconds


def _guards(
    traced: Traced, compiled: Mapping[str, inner.Compiled], parts: Collection[str], once: Collection[str]
) -> Guards:
    """What the graph and its codes assume of the rows that they are played on, a microbatch's or all of them."""

    def of(codes: Collection[str]) -> list[sympy.Expr]:
        return [guard for name, c in compiled.items() if name in codes for guard in c.guards]

    guards = [*_graph_guards(traced.gm.graph, traced.symbols), *of(parts)]
    others = [s for s in g.symbol_inputs(traced.gm.graph) if s not in traced.symbols]
    return Guards(list(dict.fromkeys(guards)), others, once=list(dict.fromkeys(of(once))))


def refined(levels: Levels, programs: Programs, costs: Costs) -> Programs | None:
    """The split program in the order, and with the segments joined, that measured costs ask for; None if it is the
    same."""
    n, segments = levels.program.num_microbatches, levels.outline

    def cost(step: Step | Run) -> float:
        part, whole = costs[segments.segments[step.segment].code]
        return whole if step.microbatch is None else part

    def make(parts: Mapping[str, Segment]) -> Program:
        made = replace(segments, segments=parts)
        return make_program(made, make_schedule(made, levels.tokens, cost, n, "list"))

    extra = {code: n * part - whole for code, (part, whole) in costs.items()}
    parts = join_costly(segments.segments, segments.places, extra, lambda parts: simulate(make(parts), cost).makespan)
    program = make(parts)
    if str(program) == str(levels.program):
        return None
    apart = make_apart(replace(segments, segments=parts), levels.tokens, cost, program, "list")
    return replace(
        programs,
        modules={**programs.modules, n: emit(program, programs.fns, segments.outputs)},
        apart={n: emit(apart, programs.fns, segments.outputs)} if apart else {},
    )


def make_schedule(
    segments: Outline,
    placed: TokenMap,
    cost: Callable[[Step], float],
    num_microbatches: int,
    policy: str,
    *,
    straddles: bool = True,
) -> Schedule:
    groups = segments.groups.items()
    threaded = frozenset(name for name, group in groups if unsplit_writes(group, placed, straddles=straddles))
    schedule = order(segments.segments, num_microbatches, policy, cost=cost, threaded=threaded)
    verify_schedule(schedule)
    return schedule


def make_program(segments: Outline, schedule: Schedule, *, straddles: bool = True) -> Program:
    """Lower, synchronise and prove."""
    results = [name for name in segments.outputs if isinstance(name, str)]
    instrs = lower(schedule, segments.places, segments.inputs, results)
    program = Program(sync(instrs, segments.segments), segments.segments, schedule.num_microbatches, straddles)
    verify_program(program)
    return program


def make_apart(
    segments: Outline, placed: TokenMap, cost: Callable[[Step], float], program: Program, policy: str
) -> Program | None:
    """What plays steps in which no request has tokens in two microbatches; None if `program` does that as well.

    It communicates in the same order: on another rank a request may have tokens in both.
    """
    if not placed.paged:
        return None
    schedule = make_schedule(segments, placed, cost, program.num_microbatches, policy, straddles=False)
    made = make_program(segments, schedule, straddles=False)
    return made if made.fingerprint == program.fingerprint and str(made) != str(program) else None


def _graph_guards(graph: fx.Graph, symbols: Sequence[sympy.Symbol]) -> list[sympy.Expr]:
    number = next(g.value(n) for n in g.inputs(graph) if g.is_symbolic_number(n))
    renamed = [guard.xreplace(dict.fromkeys(symbols, TOKENS)) for guard in compat.graph_guards(number)]
    return [guard for guard in renamed if guard.has(TOKENS)]
