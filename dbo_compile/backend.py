"""The torch.compile backend. Read this file to know what happens to a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from dbo_compile import capture, compat
from dbo_compile import graph as g
from dbo_compile.config import Config
from dbo_compile.dump import publish
from dbo_compile.errors import NotSplit
from dbo_compile.ir.program import Program, Run
from dbo_compile.ir.proof import verify_program
from dbo_compile.ir.schedule import Schedule, Segment, Step
from dbo_compile.ir.tokens import TOKENS, Shared, Split, TokenMap
from dbo_compile.ir.verify import verify_schedule
from dbo_compile.log import logger, setup_from_environment
from dbo_compile.passes import inner
from dbo_compile.passes.analyze import analyze, draws_random_numbers
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
from dbo_compile.rules.collectives import comm_op, sms_setters
from dbo_compile.runtime import graphs
from dbo_compile.runtime.agree import CPU, Agreement, agreement_over, check_covers
from dbo_compile.runtime.clock import simulate
from dbo_compile.runtime.engine import Engine, Follower
from dbo_compile.runtime.graphs import Player
from dbo_compile.runtime.player import player_for
from dbo_compile.runtime.rows import Guards
from dbo_compile.runtime.signature import Signature, TokenInput
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
    capture.make_symbolic(tokens)
    agreement = _agreement(groups, config, tokens[0].tensor.device)

    def compile_aten(aten_gm: fx.GraphModule, fake_inputs: Sequence[Any]) -> Callable[..., Any]:
        with agreement.busy():
            return compile_graph(aten_gm, tokens, config, agreement)

    try:
        return compat.to_aten(gm, example_inputs, compile_aten)
    except NotSplit:
        raise
    except Exception as error:
        agreement.leave(f"compiling raised {type(error).__name__}: {error}")
        raise


@dataclass(frozen=True, slots=True)
class _Traced:
    """An ATen graph as captured: which inputs carry tokens, and in which dim, and which symbols count them."""

    gm: fx.GraphModule
    token_dims: Mapping[fx.Node, int]
    symbols: tuple[sympy.Symbol, ...]
    hints: Mapping[sympy.Symbol, int]


def compile_graph(
    gm: fx.GraphModule, tokens: Sequence[capture.TokenTensor], config: Config, agreement: Agreement
) -> Engine:
    """Every level of an ATen graph, top to bottom, and at the end the engine that plays it."""
    whole = fx.GraphModule(gm, copy.copy(gm.graph))
    _refuse_sizes_from_data(gm.graph)
    compat.reinplace(gm)
    inputs = g.inputs(gm.graph)
    position = compat.argument_positions(inputs)
    traced = _traced(gm, {inputs[position[t.index]]: t.dim for t in tokens})
    levels, programs = build(traced, config, whole={})

    def compile_whole() -> tuple[Callable[..., Any], Guards]:
        compiled = inner.compile_whole(whole, traced.symbols, traced.hints)
        return compiled.fn, Guards(compiled.guards, programs.guards.symbols)

    def recompile() -> Programs | None:
        """Programs that take nothing on trust; None if these do not either."""
        assert report.levels is not None
        if not (trusted := report.levels.tokens.obligations):
            return None
        report.levels, made = build(traced, config, whole=dict.fromkeys(trusted, REFUTED))
        return made

    def replan(costs: Costs) -> Programs | None:
        """The split program again, by measured costs; None if they change nothing."""
        assert report.levels is not None
        return refined(report.levels, engine.ways.programs, costs)

    engine = Engine(
        programs,
        Whole(whole.forward, compile_whole if config.inner == "inductor" else None),
        signature_of(gm.graph, levels.tokens, [(position[t.index], t.dim, t.name) for t in tokens], traced, config),
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


def _traced(gm: fx.GraphModule, token_dims: Mapping[fx.Node, int]) -> _Traced:
    symbols = tuple(dict.fromkeys(g.expression(g.value(n).shape[d]) for n, d in token_dims.items()))
    if not all(symbol.is_Symbol for symbol in symbols):
        raise NotSplit(capture.SPECIALISED)
    for node, dim in token_dims.items():
        others = [s for d, s in enumerate(g.value(node).shape) if d != dim]
        if any(g.expression(s).has(*symbols) for s in others):
            raise NotSplit(f"{node.name} has another dim whose size is traced as the number of tokens: call it first "
                           "with a number of tokens that is no other size of the model")
    numbers = [g.value(n) for n in g.inputs(gm.graph) if g.is_symbolic_number(n)]
    hints = {g.expression(number): int(number.node.hint) for number in numbers}
    num_tokens = max(hints.pop(s) for s in symbols)
    return _Traced(gm, token_dims, symbols, {TOKENS: num_tokens, **hints})


def build(traced: _Traced, config: Config, *, whole: Mapping[fx.Node, str]) -> tuple[Levels, Programs]:
    """The passes, one level after the other; `whole` holds ops that are to be barriers, with the reason."""
    gm, symbols, n = traced.gm, traced.symbols, config.num_microbatches
    placed = analyze(gm.graph, traced.token_dims, symbols, whole)
    segments = outline(gm, cut(gm.graph, placed), placed, symbols)
    model = CostModel(gm.graph)
    costs = {name: model.seconds(segments.groups[name]) for name in segments.codes}

    def cost(step: Step | Run) -> float:
        return costs[segments.segments[step.segment].code]

    schedules = {m: make_schedule(segments, placed, cost, m, config.policy) for m in (1, n)}
    programs = {m: make_program(segments, schedule) for m, schedule in schedules.items()}

    # The tokens of one microbatch, and never 0 or 1, on which a compiler would specialise.
    hints = {**traced.hints, TOKENS: max(2, traced.hints[TOKENS] // n)}
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
    return replace(programs, modules={**programs.modules, n: emit(program, programs.fns, segments.outputs)})


def signature_of(
    graph: fx.Graph, placed: TokenMap, tokens: Sequence[tuple[int, int, str]], traced: _Traced, config: Config
) -> Signature:
    """What the engine knows of arguments and results; `tokens` has position, token dim and name of token inputs."""
    inputs = list(g.inputs(graph))
    written = dict.fromkeys(g.base(n) for m in g.body(graph) for n in g.written(m))
    symbol_inputs = g.symbol_inputs(graph)
    return Signature(
        token_inputs=tuple(TokenInput(*t, config.pad_values.get(t[2], 0)) for t in tokens),
        token_numbers=tuple(i for s, i in symbol_inputs.items() if s in traced.symbols),
        symbol_inputs={s: i for s, i in symbol_inputs.items() if s not in traced.symbols},
        written=tuple(i for i, n in enumerate(inputs) if n in written),
        output_dims=tuple(_token_dim(n, placed) for n in g.results(graph)),
        unpaddable=_why_not_padded(graph, placed, traced.symbols, has_values=bool(config.pad_values)),
        same_size=any(g.symbols_of(v) & {*traced.symbols} for n in g.body(graph) for v in _sent(n)),
        draws_random_numbers=any(map(draws_random_numbers, g.body(graph))),
    )


def _token_dim(result: Any, placed: TokenMap) -> int | None:
    place = placed.places[result] if isinstance(result, fx.Node) else None
    return place.dim if isinstance(place, Split) else None


def _why_not_padded(
    graph: fx.Graph, placed: TokenMap, symbols: Sequence[sympy.Symbol], *, has_values: bool
) -> str:
    """Why rows of padding could change what is computed of the others; "" if they cannot."""
    for node, why in placed.barriers.items():
        return f"{node.name} ({g.source_line(node)}) sees all tokens at once: {why}"
    for node in g.results(graph):
        if isinstance(node, fx.Node) and g.is_symbolic_number(node) and g.symbols_of(g.value(node)) & {*symbols}:
            return "it returns the number of tokens"
    for node in g.body(graph):
        shared = [n for n in g.written(node) if isinstance(placed.places[n], Shared)]
        if shared and not isinstance(placed.places[node], Shared) and not has_values:
            return (f"{node.name} ({g.source_line(node)}) writes a buffer of all tokens; give pad_values that have it "
                    "write where nobody reads")
    return ""


def _sent(node: fx.Node) -> list[Any]:
    """What a collective sends and receives; nothing for other ops."""
    if comm_op(node.target) is None:
        return []
    return [v for v in map(g.value, (node, *node.all_input_nodes)) if isinstance(v, torch.Tensor)]


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
    segments: Outline, placed: TokenMap, cost: Callable[[Step], float], num_microbatches: int, policy: str
) -> Schedule:
    threaded = frozenset(name for name, group in segments.groups.items() if unsplit_writes(group, placed))
    schedule = order(segments.segments, num_microbatches, policy, cost=cost, threaded=threaded)
    verify_schedule(schedule)
    return schedule


def make_program(segments: Outline, schedule: Schedule) -> Program:
    """Lower, synchronise and prove."""
    results = [name for name in segments.outputs if isinstance(name, str)]
    instrs = lower(schedule, segments.places, segments.inputs, results)
    program = Program(sync(instrs, segments.segments), segments.segments, schedule.num_microbatches)
    verify_program(program)
    return program


def _graph_guards(graph: fx.Graph, symbols: Sequence[sympy.Symbol]) -> list[sympy.Expr]:
    number = next(g.value(n) for n in g.inputs(graph) if g.is_symbolic_number(n))
    renamed = [guard.xreplace(dict.fromkeys(symbols, TOKENS)) for guard in compat.graph_guards(number)]
    return [guard for guard in renamed if guard.has(TOKENS)]
