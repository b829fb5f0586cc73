"""The torch.compile backend. Read this file to know what happens to a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from dbo_compile import capture, compat
from dbo_compile import graph as g
from dbo_compile.arguments import Traced, as_traced, signature_of
from dbo_compile.config import Config
from dbo_compile.dump import publish
from dbo_compile.errors import InvalidSchedule, NotSplit
from dbo_compile.ir.program import Program, Run
from dbo_compile.ir.proof import verify_program
from dbo_compile.ir.schedule import Schedule, Segment, Step
from dbo_compile.ir.tokens import TOKENS, TokenMap
from dbo_compile.ir.verify import verify_schedule
from dbo_compile.log import logger, setup_from_environment
from dbo_compile.passes import inner
from dbo_compile.passes.analyze import analyze
from dbo_compile.passes.capturable import why_not_captured
from dbo_compile.passes.cost import CostModel
from dbo_compile.passes.cut import Kind, cut, unsplit_writes
from dbo_compile.passes.emit import emit
from dbo_compile.passes.lower import lower
from dbo_compile.passes.order import order
from dbo_compile.passes.outline import Outline, outline
from dbo_compile.passes.partial import join_costly
from dbo_compile.passes.sync import sync
from dbo_compile.report import Levels, Report
from dbo_compile.rules.collectives import sms_setters
from dbo_compile.runtime import graphs
from dbo_compile.runtime.agree import CPU, Agreement, agreement_over, check_covers
from dbo_compile.runtime.clock import simulate
from dbo_compile.runtime.engine import Engine, Follower
from dbo_compile.runtime.graphs import Player
from dbo_compile.runtime.player import player_for
from dbo_compile.runtime.rows import Guards
from dbo_compile.runtime.tune import Costs
from dbo_compile.runtime.ways import Programs, Whole

setup_from_environment()


def dbo(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: str | None = None
) -> Callable[..., Any]:
    """The backend that `torch.compile(model, backend="dbo", options={...})` finds by its entry point.

    `gm` is a Dynamo graph, `example_inputs` the real arguments of its first call, among them the numbers that Dynamo
    made symbols. `options` are the fields of `Config`. Raises `ValueError` for a wrong option, and for any `mode`.
    """
    if mode is not None:
        raise ValueError(f"backend dbo has no modes, got mode={mode!r}; use options={{...}}, see dbo_compile.Config")
    return compile_with(gm, example_inputs, config=Config.from_options(options))


def compile_with(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Config) -> Callable[..., Any]:
    """Compile a Dynamo graph with options that were checked before."""
    original = copy.copy(gm)
    groups = capture.comm_groups(gm)
    try:
        _refuse_what_none_splits(gm, example_inputs, config)
    except NotSplit as why:
        return _not_split(original, example_inputs, config, str(why))
    try:
        return _split(gm, example_inputs, config, groups)
    except NotSplit as why:
        fn = _not_split(original, example_inputs, config, str(why))
        return Follower(fn, _agreement(groups, config), config) if groups else fn


def _refuse_what_none_splits(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> None:
    """Raise `NotSplit` for what no rank splits, so that there is nothing to agree on."""
    if config.split == "never":
        raise NotSplit('split="never"')
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        raise NotSplit("autograd needs a backward graph, and only inference is split: call it under torch.no_grad()")
    if config.split == "auto" and not capture.has_communication(gm):
        raise NotSplit('it has no communication to hide; split="always" splits it all the same')


def _not_split(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, why: str
) -> Callable[..., Any]:
    """What the user would have without us."""
    logger.info("a graph is not split: %s", why)
    publish(Report(why=why, captured=gm.graph), config.dump)
    return compat.whole_graph_inductor(gm, example_inputs) if config.inner == "inductor" else gm.forward


def _agreement(groups: Sequence[str], config: Config, device: torch.device = CPU) -> Agreement:
    """Where the ranks meet that a graph communicates with; of several groups, those of the largest."""
    if config.dp_group is not None:
        group = compat.process_group(config.dp_group)
        check_covers(group, map(compat.process_group, groups))
    else:
        found = [compat.process_group(name) for name in groups]
        group = max(found, key=lambda group: int(group.size()), default=None)
    return agreement_over(group, config.timeout_s, device if config.dp_sync == "device" else CPU)


def _split(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, groups: Sequence[str]
) -> Callable[..., Any]:
    tokens = capture.token_tensors(gm, example_inputs, config.token_dims)
    requests = capture.request_tensors(gm, example_inputs, config.token_dims)
    capture.make_symbolic(tokens, requests)
    agreement = _agreement(groups, config, tokens[0].tensor.device)

    def compile_aten(aten_gm: fx.GraphModule, fake_inputs: Sequence[Any]) -> Callable[..., Any]:
        with agreement.busy():
            try:
                return compile_graph(aten_gm, tokens, config, agreement, requests)
            except InvalidSchedule as error:  # an op that is played once writes rows that would be joined for it
                raise NotSplit(f"no program can be made of it: {error}") from error

    try:
        return compat.to_aten(gm, example_inputs, compile_aten)
    except NotSplit:
        raise
    except Exception as error:
        agreement.leave(f"compiling raised {type(error).__name__}: {error}")
        raise


def compile_graph(
    gm: fx.GraphModule,
    tokens: Sequence[capture.TokenTensor],
    config: Config,
    agreement: Agreement,
    requests: Sequence[capture.RequestTensor] = (),
) -> Engine:
    """Every level of an ATen graph, top to bottom, and at the end the engine that plays it."""
    whole = fx.GraphModule(gm, copy.copy(gm.graph))
    _refuse_sizes_from_data(gm.graph)
    compat.reinplace(gm)
    inputs = g.inputs(gm.graph)
    position = compat.argument_positions(inputs)
    axes = {r.name: (inputs[position[r.index]], r.axis) for r in requests if r.index in position}
    graph = as_traced(gm, {inputs[position[t.index]]: t.dim for t in tokens}, axes)
    levels, programs = build(graph, config, whole={})

    def compile_whole() -> tuple[Callable[..., Any], Guards]:
        compiled = inner.compile_whole(whole, graph.symbols, graph.hints)
        return compiled.fn, Guards(compiled.guards, programs.guards.symbols)

    def recompile() -> Programs | None:
        """Programs that take nothing on trust; None if these do not either."""
        assert report.levels is not None
        if not (trusted := report.levels.tokens.obligations):
            return None
        try:
            report.levels, made = build(graph, config, whole=dict.fromkeys(trusted, REFUTED))
        except (NotSplit, InvalidSchedule) as why:
            logger.info("no program takes nothing on trust: %s", why)
            return None
        return made

    def replan(costs: Costs) -> Programs | None:
        """The split program again, by measured costs; None if they change nothing."""
        assert report.levels is not None
        return refined(report.levels, engine.ways.programs, costs)

    engine = Engine(
        programs,
        Whole(whole.forward, compile_whole if config.inner == "inductor" else None),
        signature_of(gm.graph, levels.tokens, [(position[t.index], t.dim, t.name) for t in tokens], graph, config),
        agreement,
        config,
        recompile,
        replan,
    )
    engine.player = _player(gm.graph, engine, tokens, config)
    report = Report(levels=levels, engine=engine, captured=tokens[0].placeholder.graph)
    publish(report, config.dump)
    return engine


REFUTED = "the equality gate found that rows do not come back to their own tokens here, or not only here"


def build(traced: Traced, config: Config, *, whole: Mapping[fx.Node, str]) -> tuple[Levels, Programs]:
    """The passes, one level after the other; `whole` holds ops that are to be barriers, with the reason."""
    gm, symbols, n = traced.gm, traced.symbols, config.num_microbatches
    placed = analyze(gm.graph, traced.token_dims, symbols, whole, traced.given)
    segments = outline(gm, cut(gm.graph, placed), placed, symbols)
    model = CostModel(gm.graph)
    costs = {name: model.seconds(segments.groups[name]) for name in segments.codes}

    def cost(step: Step | Run) -> float:
        return costs[segments.segments[step.segment].code]

    schedules = {m: make_schedule(segments, placed, cost, m, config.policy) for m in (1, n)}
    programs = {m: make_program(segments, schedule) for m, schedule in schedules.items()}

    apart = make_apart(segments, placed, cost, programs[n], config.policy)

    # The tokens of one microbatch, and never 0 or 1, on which a compiler would specialise. Numbers of requests have no
    # hint: a microbatch may have one, or none.
    own = {g.expression(g.value(node)) for node in traced.own}
    known = {symbol: hint for symbol, hint in traced.hints.items() if symbol not in own}
    hints = {**known, TOKENS: max(2, known[TOKENS] // n)}
    compiled = inner.compile_codes(segments.codes, hints, inner=config.inner)
    fns = {name: c.fn for name, c in compiled.items()}
    modules = {m: emit(p, fns, segments.outputs) for m, p in programs.items()}
    guards = [*_graph_guards(gm.graph, symbols), *(guard for c in compiled.values() for guard in c.guards)]
    others = [s for s in g.symbol_inputs(gm.graph) if s not in symbols]
    levels = Levels(gm.graph, placed, segments, schedules[n], programs[n], modules[n], cost)
    return levels, Programs(
        modules,
        Guards(list(dict.fromkeys(guards)), others),
        programs[n].fingerprint,
        trusts=tuple(dict.fromkeys(placed.obligations.values())),
        codes={name: s.code for name, s in segments.segments.items()},
        comm_codes=tuple(name for name, code in segments.codes.items() if code.kind is Kind.COMM),
        fns=fns,
        apart={n: emit(apart, fns, segments.outputs)} if apart else {},
    )


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


def _player(
    graph: fx.Graph, engine: Engine, tokens: Sequence[capture.TokenTensor], config: Config
) -> Player:
    """What plays the programs: streams and captured graphs where the tokens are on an accelerator."""
    names = {t.index: t.name for t in engine.signature.token_inputs}
    return player_for(
        tokens[0].tensor.device,
        otherwise=engine.player,
        cuda_graph=config.cuda_graph,
        uncapturable=why_not_captured(graph),
        limits=graphs.Limits(frozenset(engine.signature.written), names=names, clone=config.clone_outputs),
        graph_memory_gib=config.graph_memory_gib,
        comm_sms=config.comm_sms,
        sms_setters=sms_setters(n.target for n in graph.nodes),
    )


def _refuse_sizes_from_data(graph: fx.Graph) -> None:
    """Only numbers read by `.item()` or `.tolist()` may become sizes; `nonzero` and its like are not split yet."""
    known = g.symbol_inputs(graph).keys() | g.data_symbols(graph).keys()
    for node in g.body(graph):
        vals = g.value(node) if isinstance(g.value(node), tuple | list) else [g.value(node)]
        if any(g.symbols_of(v) - known for v in vals):
            where = g.source_line(node)
            raise NotSplit(f"the size of the result of {node.target} depends on its data ({where})")


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
