"""The torch.compile backend. Read this file to know what happens to a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.distributed as dist
from torch import fx

from dbo_compile import capture, compat
from dbo_compile import graph as g
from dbo_compile.config import Config
from dbo_compile.dump import dump
from dbo_compile.errors import NotSplit
from dbo_compile.ir.program import Program, Run
from dbo_compile.ir.proof import verify_program
from dbo_compile.ir.schedule import Schedule, Step
from dbo_compile.ir.tokens import TOKENS, TokenMap
from dbo_compile.ir.verify import verify_schedule
from dbo_compile.log import logger, setup_from_environment
from dbo_compile.passes.analyze import analyze
from dbo_compile.passes.cost import CostModel
from dbo_compile.passes.cut import cut, unsplit_writes
from dbo_compile.passes.emit import emit
from dbo_compile.passes.inner import compile_codes
from dbo_compile.passes.lower import lower
from dbo_compile.passes.order import order
from dbo_compile.passes.outline import Outline, outline
from dbo_compile.passes.sync import sync
from dbo_compile.report import Levels, Report, add_report, reports
from dbo_compile.runtime.engine import Engine, TokenInput

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
    config = Config.from_options(options)
    _refuse_what_is_not_there(config)
    original = copy.copy(gm)
    try:
        return _split(gm, example_inputs, config)
    except NotSplit as why:
        logger.info("a graph is not split: %s", why)
        add_report(Report(reason=str(why)))
        return compat.whole_graph_inductor(original, example_inputs) if config.inner == "inductor" else original.forward


NOT_THERE = ("pad_to", "pad_values", "dp_group", "dp_sync", "cuda_graph", "comm_sms", "gate", "timeout_s")
"""Options of the design that this version does not have. Asking for one is an error, never silence."""


def _refuse_what_is_not_there(config: Config) -> None:
    for name in NOT_THERE:
        if getattr(config, name) != getattr(Config(), name):
            raise ValueError(f"option {name!r} is not available in this version of dbo-compile; leave it out")


def _split(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    if config.split == "never":
        raise NotSplit('split="never"')
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        raise NotSplit("autograd needs a backward graph, and only inference is split: call it under torch.no_grad()")
    if config.split == "auto" and not capture.has_communication(gm):
        raise NotSplit('it has no communication to hide; split="always" splits it all the same')
    tokens = capture.token_tensors(gm, example_inputs, config.token_dims)
    capture.make_symbolic(tokens)

    def compile_aten(aten_gm: fx.GraphModule, fake_inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_graph(aten_gm, tokens, config)

    return compat.to_aten(gm, example_inputs, compile_aten)


def compile_graph(gm: fx.GraphModule, tokens: Sequence[capture.TokenTensor], config: Config) -> Engine:
    """Every level of an ATen graph, top to bottom, and at the end the engine that plays it."""
    whole = fx.GraphModule(gm, copy.copy(gm.graph))
    _refuse_sizes_from_data(gm.graph)
    compat.reinplace(gm)
    inputs = g.inputs(gm.graph)
    position = compat.argument_positions(inputs)
    token_dims = {inputs[position[t.index]]: t.dim for t in tokens}
    symbols = tuple(dict.fromkeys(g.expression(g.value(n).shape[d]) for n, d in token_dims.items()))
    if not all(symbol.is_Symbol for symbol in symbols):
        raise NotSplit(capture.SPECIALISED)
    for node, dim in token_dims.items():
        others = [s for d, s in enumerate(g.value(node).shape) if d != dim]
        if any(g.expression(s).has(*symbols) for s in others):
            raise NotSplit(f"{node.name} has another dim whose size is traced as the number of tokens: call it first "
                           "with a number of tokens that is no other size of the model")

    placed = analyze(gm.graph, token_dims, symbols, whole={})
    segments = outline(gm, cut(gm.graph, placed), placed, symbols)
    model = CostModel(gm.graph)
    costs = {name: model.seconds(segments.groups[name]) for name in segments.codes}

    def cost(step: Step | Run) -> float:
        return costs[segments.segments[step.segment].code]

    schedules = {n: make_schedule(segments, placed, cost, n, config.policy) for n in (1, config.num_microbatches)}
    programs = {n: make_program(segments, schedule) for n, schedule in schedules.items()}

    compiled = compile_codes(segments.codes, _hints(gm.graph, symbols, config.num_microbatches), inner=config.inner)
    fns = {name: c.fn for name, c in compiled.items()}
    modules = {n: emit(p, fns, segments.outputs) for n, p in programs.items()}
    guards = [*_graph_guards(gm.graph, symbols), *(guard for c in compiled.values() for guard in c.guards)]
    engine = Engine(
        modules,
        list(dict.fromkeys(guards)),
        [TokenInput(position[t.index], t.dim, t.name) for t in tokens],
        {s: i for s, i in g.symbol_inputs(gm.graph).items() if s not in symbols},
        whole.forward,
        num_microbatches=config.num_microbatches,
        min_tokens=config.min_tokens,
        least_rows=2 if config.inner == "inductor" else 1,
    )
    n = config.num_microbatches
    levels = Levels(gm.graph, placed, segments, schedules[n], programs[n], modules[n], cost)
    add_report(Report(levels=levels, engine=engine))
    if config.dump:
        _dump(levels, Path(config.dump))
    return engine


def _refuse_sizes_from_data(graph: fx.Graph) -> None:
    """Only numbers read by `.item()` or `.tolist()` may become sizes; `nonzero` and its like are not split yet."""
    known = g.symbol_inputs(graph).keys() | g.data_symbols(graph).keys()
    for node in g.body(graph):
        vals = g.value(node) if isinstance(g.value(node), tuple | list) else [g.value(node)]
        if any(g.symbols_of(v) - known for v in vals):
            where = g.source_line(node)
            raise NotSplit(f"the size of the result of {node.target} depends on its data ({where})")


def _dump(levels: Levels, folder: Path) -> None:
    """Leave the levels in a folder of this rank and graph; a full disk is no reason not to run."""
    rank = f"rank{dist.get_rank()}" if dist.is_initialized() else ""
    try:
        dump(levels, folder / rank / f"graph{len(reports())}")
    except OSError as error:
        logger.warning("cannot dump to %s: %s", folder, error)


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


def _hints(graph: fx.Graph, symbols: Sequence[sympy.Symbol], num_microbatches: int) -> dict[sympy.Symbol, int]:
    """The value that each symbol had in the traced call; for tokens, those of one microbatch, and never 0 or 1."""
    hints = {
        g.expression(g.value(n)): int(g.value(n).node.hint) for n in g.inputs(graph) if g.is_symbolic_number(n)
    }
    num_tokens = max(hints.pop(s) for s in symbols)
    return {TOKENS: max(2, num_tokens // num_microbatches), **hints}
