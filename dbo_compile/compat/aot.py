"""From a Dynamo graph to ATen ops, and from those to Inductor: AOTAutograd, re-inplacing, and the modules of FX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, cast

import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._decomp import get_decompositions
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext, tracing
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes.post_grad import decompose_auto_functionalized
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
from torch._inductor.fx_utils import FakeTensorUpdater
from torch._inductor.virtualized import V
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from dbo_compile.compat.shapes import SegmentShapes

aten = torch.ops.aten
Compiled = Callable[..., Any]


def lazy_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module whose Python is written when it is first called: for graphs that may only be compiled."""
    return _LazyGraphModule(root, graph)


def to_aten(gm: fx.GraphModule, example_inputs: Sequence[Any], compiler: Callable[..., Compiled]) -> Compiled:
    """Trace a Dynamo graph to functional ATen ops (mutations of inputs as trailing `copy_`) and compile that.

    `compiler(gm, fake_inputs)` returns a function of the flat arguments. Only `index_copy` is decomposed: the
    re-inplacing pass knows its `index_put` form only, and without it a KV cache would be copied whole.
    """

    def boxed(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        made: Compiled = make_boxed_func(compiler(gm, example_inputs))
        return made

    compiled: Compiled = aot_module_simplified(
        gm,
        list(example_inputs),
        fw_compiler=boxed,
        inference_compiler=boxed,
        decompositions=dict(get_decompositions([aten.index_copy])),  # type: ignore[arg-type]
        keep_inference_input_mutations=True,
    )
    return compiled


def argument_positions(placeholders: Sequence[fx.Node]) -> dict[int, int]:
    """Which argument of the ATen graph each argument of the Dynamo graph became."""
    return {desc.idx: i for i, p in enumerate(placeholders) if isinstance(desc := p.meta.get("desc"), PlainAOTInput)}


def is_functionalized(node: fx.Node) -> bool:
    """Whether `node` calls an op that writes its arguments in place, written as one that returns new ones."""
    return node.target in (auto_functionalized, auto_functionalized_v2)


def updates_inputs(gm: fx.GraphModule) -> bool:
    """Whether something in a functional graph may become an update in place."""
    return any(n.target is aten.copy_.default or is_functionalized(n) for n in gm.graph.nodes)


def reinplace(gm: fx.GraphModule) -> None:
    """Turn functional updates of graph inputs back into updates in place, on the whole graph, before it is cut."""
    if not updates_inputs(gm):
        return
    takes_module = "gm" in signature(FakeTensorUpdater).parameters  # torch 2.11 takes the graph
    updater = FakeTensorUpdater(gm if takes_module else gm.graph)  # type: ignore[arg-type]
    with V.set_fake_mode(TracingContext.get().fake_mode):
        reinplace_inplaceable_ops(updater, gm.graph)
    decompose_auto_functionalized(gm.graph)
    for node in gm.graph.find_nodes(op="call_function", target=aten.copy_.default):
        if node.args[0] is node.args[1]:  # what an op of somebody's own wrote in place; else it would be copied whole
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def retrace_values(gm: fx.GraphModule) -> None:
    """Compute the fake values of a graph once more, so that they share memory as the values that they stand for do.

    Numbers read out of data get new symbols.
    """
    for node in gm.graph.nodes:
        node.meta.pop("unbacked_bindings", None)  # or the new symbols would be taken for the old ones
    mode = TracingContext.get().fake_mode
    placeholders = gm.graph.find_nodes(op="placeholder")
    FakeTensorProp(gm, mode=mode).propagate_dont_convert_inputs(*(p.meta["val"] for p in placeholders))


def whole_graph_inductor(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    """What the user would have without us: the Dynamo graph, compiled by Inductor."""
    return cast("Compiled", compile_fx(gm, list(example_inputs)))


def segment_inductor(gm: fx.GraphModule, inputs: Sequence[Any], shapes: SegmentShapes) -> Compiled:
    """Compile one segment; `inputs` are fake values of `shapes`.

    Never as CUDA graphs of Inductor's own, whatever is set: a segment is captured as a part of its program.
    """
    with inductor_config.patch({"triton.cudagraphs": False}):
        return whole_inductor(gm, inputs, shapes)


def whole_inductor(gm: fx.GraphModule, inputs: Sequence[Any], shapes: SegmentShapes) -> Compiled:
    """Compile a graph of ATen ops as Inductor is set to; `inputs` are fake values of `shapes`."""
    for node in gm.graph.nodes:
        for key in ("val", "unbacked_bindings"):  # of another shape environment, whose numbers would be looked up here
            node.meta.pop(key, None)
    for placeholder, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        placeholder.meta["val"] = value  # torch 2.11 leaves the value of a symbolic placeholder stale
    with tracing(TracingContext(shapes.mode)):
        return cast("Compiled", compile_fx(gm, list(inputs)))
