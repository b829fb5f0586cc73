"""The torch.compile backend. Read this file to know what happens to a model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import fx

from dbo_compile import capture, compat, origin
from dbo_compile import graph as g
from dbo_compile.arguments import as_traced, name_inputs, signature_of
from dbo_compile.compilation import Compilation
from dbo_compile.config import Config
from dbo_compile.dump import publish
from dbo_compile.errors import InvalidSchedule, NotSplit
from dbo_compile.log import logger, setup_from_environment, warn_once
from dbo_compile.passes.capturable import why_not_captured
from dbo_compile.passes.inline import inline_regions
from dbo_compile.report import Report, forget
from dbo_compile.rules.collectives import sms_setters
from dbo_compile.runtime import graphs
from dbo_compile.runtime.agree import CPU, Agreement, agreement_over, check_covers
from dbo_compile.runtime.engine import Engine, Follower
from dbo_compile.runtime.force import unknown
from dbo_compile.runtime.graphs import Player
from dbo_compile.runtime.player import player_for
from dbo_compile.runtime.ways import Whole

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
    _warn_of_other_names(gm, example_inputs, config)
    return compile_with(gm, example_inputs, config=config)


def _warn_of_other_names(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> None:
    """A name that this graph has not may be misspelt, or that of another graph of the model: so it is no error."""
    inputs = capture.input_names(gm, example_inputs)
    dims, values = config.token_dims or {}, config.pad_values
    missing = {
        "token_dims": [] if dims.keys() & {*inputs} else [*dims],
        "pad_values": [name for name in values if name not in inputs],
    }
    for option, names in missing.items():
        if names and inputs:
            wrong, known = ", ".join(map(repr, names)), ", ".join(inputs)
            warn_once(wrong, f"{option} names %s, which this graph has not; its inputs are: %s", wrong, known)


def compile_with(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Config) -> Callable[..., Any]:
    """Compile a Dynamo graph with options that were checked before."""
    fn, report = _compiled(gm, example_inputs, config)
    publish(report, config.dump)
    weakref.finalize(fn, forget, report).atexit = False
    return fn


Compiled = tuple[Callable[..., Any], Report]


def _compiled(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Compiled:
    original = copy.copy(gm)
    groups = capture.comm_groups(gm)
    try:
        _refuse_what_none_splits(gm, example_inputs, config)
    except NotSplit as why:
        return _not_split(original, example_inputs, config, str(why))
    try:
        return _split(gm, example_inputs, config, groups)
    except NotSplit as why:
        fn, report = _not_split(original, example_inputs, config, str(why))
        device = next((x.device for x in example_inputs if isinstance(x, torch.Tensor)), CPU)  # as on the other ranks
        return (Follower(fn, _agreement(groups, config, device), config) if groups else fn), report


def _refuse_what_none_splits(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> None:
    """Raise `NotSplit` for what no rank splits, so that there is nothing to agree on."""
    if config.split == "never":
        raise NotSplit('split="never"')
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        raise NotSplit("autograd needs a backward graph, and only inference is split: call it under torch.no_grad()")
    if config.split == "auto" and not capture.has_communication(gm):
        raise NotSplit('it has no communication to hide; split="always" splits it all the same')


def _not_split(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, why: str) -> Compiled:
    """What the user would have without us."""
    logger.info("a graph is not split: %s", why)
    fn = compat.whole_graph_inductor(gm, example_inputs) if config.inner == "inductor" else gm.forward
    return unknown(fn, why, communicates=capture.has_communication(gm)), Report(why=why, captured=gm.graph)


def _agreement(groups: Sequence[str], config: Config, device: torch.device) -> Agreement:
    """Where the ranks meet that a graph communicates with; of several groups, those of the largest."""
    if config.dp_group is not None:
        group = compat.process_group(config.dp_group)
        check_covers(group, map(compat.process_group, groups))
    else:
        found = [compat.process_group(name) for name in groups]
        group = max(found, key=lambda group: int(group.size()), default=None)
    return agreement_over(group, config.timeout_s, device if config.dp_sync == "device" else CPU)


def _split(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, groups: Sequence[str]) -> Compiled:
    tokens = capture.token_tensors(gm, example_inputs, config.token_dims)
    requests = capture.request_tensors(gm, example_inputs, config.token_dims)
    num_tokens = tokens[0].tensor.shape[tokens[0].dim]
    tokens = capture.make_symbolic(tokens, requests, capture.dims_as_long(gm, example_inputs, num_tokens))
    agreement = _agreement(groups, config, tokens[0].tensor.device)

    static = [i for i, (node, x) in enumerate(zip(g.inputs(gm.graph), example_inputs, strict=True))
              if isinstance(x, torch.Tensor) and compat.is_static(node, x)]
    names = capture.argument_names(gm, example_inputs)
    report = Report(captured=gm.graph)

    def compile_aten(aten_gm: fx.GraphModule, fake_inputs: Sequence[Any]) -> Engine:
        name_inputs(aten_gm.graph, names)
        with agreement.busy():
            try:
                report.compilation, report.engine = compile_graph(aten_gm, tokens, config, agreement, requests, static)
                return report.engine
            except InvalidSchedule as error:  # an op that is played once writes rows that would be joined for it
                raise NotSplit(f"no program can be made of it: {error}") from error

    try:
        return compat.to_aten(gm, example_inputs, compile_aten), report
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
    static: Sequence[int] = (),
) -> tuple[Compilation, Engine]:
    """Every level of an ATen graph, top to bottom, and at the end the engine that plays it.

    `static` are the arguments, in the order of the Dynamo graph, that stay where they are.
    """
    whole = compat.lazy_module(gm, g.copied(gm.graph))
    inline_regions(gm)
    _refuse_sizes_from_data(gm.graph)
    compat.reinplace(gm)
    inputs = g.inputs(gm.graph)
    position = compat.argument_positions(inputs)
    axes = {r.name: (inputs[position[r.index]], r.axis) for r in requests if r.index in position}
    traced = as_traced(gm, {inputs[position[t.index]]: t.dim for t in tokens}, axes)
    tokens = [t for t in tokens if inputs[position[t.index]] in traced.token_dims]
    made = Compilation(traced, whole, config)
    token_inputs = [(position[t.index], t.dim, t.name) for t in tokens]
    engine = Engine(
        made.programs,
        Whole(lambda *args: whole.forward(*args), made.compile_whole if config.inner == "inductor" else None),
        signature_of(gm.graph, made.levels.tokens, token_inputs, traced, config),
        agreement,
        config,
        made.without_trust,
        made.by_costs,
    )
    engine.player = _player(gm.graph, engine, tokens, config, {position[i] for i in static if i in position})
    if config.pad_to is not None and engine.signature.unpaddable:
        logger.info("a graph is not padded: %s", engine.signature.unpaddable)
    return made, engine


def _player(
    graph: fx.Graph, engine: Engine, tokens: Sequence[capture.TokenTensor], config: Config, static: AbstractSet[int]
) -> Player:
    """What plays the programs: streams and captured graphs where the tokens are on an accelerator."""
    signature = engine.signature
    names = {t.index: t.name for t in signature.token_inputs}
    together = engine.agreement.size > 1 and bool(engine.ways.programs.comm_codes)
    differs = signature.may_differ(pads=config.pad_to is not None) if together else ""
    limits = graphs.Limits(
        static=frozenset(static - names.keys() - {*signature.written}),
        written=frozenset(signature.written),
        tokens=frozenset(names),
        names=names,
        clone=config.clone_outputs,
    )
    return player_for(
        tokens[0].tensor.device,
        otherwise=engine.player,
        cuda_graph=config.cuda_graph,
        uncapturable=why_not_captured(graph) or (differs and f"{differs}, and a collective is captured on all or none"),
        limits=limits,
        ranks=engine.agreement if together else None,
        graph_memory_gib=config.graph_memory_gib,
        comm_sms=config.comm_sms,
        sms_setters=sms_setters(n.target for n in graph.nodes),
    )


def _refuse_sizes_from_data(graph: fx.Graph) -> None:
    """Only numbers read by `.item()` or `.tolist()` may become sizes; `nonzero` and its like are not split yet."""
    known = g.symbol_inputs(graph).keys() | g.data_symbols(graph).keys()
    for node in g.body(graph):
        if g.symbols_of(g.value(node)) - known:
            where = origin.source_line(node)
            raise NotSplit(f"the size of the result of {node.target} depends on its data ({where})")
