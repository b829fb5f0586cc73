"""The only file that meets torch's private APIs. Each function is tried on every supported torch, 2.11 to 2.13."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from inspect import signature
from pathlib import Path
from types import CellType, FunctionType
from typing import Any, NoReturn, cast

import sympy
import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._decomp import get_decompositions
from torch._dynamo import config as dynamo_config
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.source import ConstantSource, GlobalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import CompileContext, TracingContext, tracing
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes.post_grad import decompose_auto_functionalized
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
from torch._inductor.fx_utils import FakeTensorUpdater
from torch._inductor.virtualized import V
from torch._logging import trace_structured  # type: ignore[attr-defined]
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd import profiler
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

aten = torch.ops.aten

Compiled = Callable[..., Any]


# -- Dynamo -----------------------------------------------------------------------------------------------------------


def is_parameter(placeholder: fx.Node, tensor: torch.Tensor) -> bool:
    """Whether an input of a Dynamo graph is a parameter or buffer of the model, by where it comes from.

    A tensor of a fixed address need not be one: static KV caches are marked so, and carry tokens.
    """
    owned = any(part in source_name(placeholder) for part in ("._parameters[", "._buffers["))
    return isinstance(tensor, torch.nn.Parameter) or owned


def is_closed_over(placeholder: fx.Node) -> bool:
    """Whether an input of a Dynamo graph is a global, or a variable of a function around the compiled one."""
    source = getattr(placeholder, "_dynamo_source", None)
    return isinstance(source, GlobalSource) or getattr(source, "is_derefed_cell_contents", False)


def source_name(placeholder: fx.Node) -> str:
    """Where an argument of a Dynamo graph comes from in the user's frame, e.g. `L['input_ids']`."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def is_dynamic(placeholder: fx.Node, dim: int) -> bool:
    """Whether Dynamo traced `dim` of this argument as a symbol, and found no number that it must be."""
    size = placeholder.meta["example_value"].shape[dim]
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def ask_for_dynamic(tensor: torch.Tensor, dim: int) -> bool:
    """Mark a dim of a real tensor so that the next trace makes it a symbol; False if it was asked for before."""
    if dim in getattr(tensor, "_dynamo_weak_dynamic_indices", ()):
        return False
    maybe_mark_dynamic(tensor, dim)
    return True


def trace_again(reason: str) -> NoReturn:
    """Leave the backend so that Dynamo traces the frame once more: one of the few exceptions it lets through.

    It also keeps a record of where it broke the graph, to break it there again. With sizes that are symbols now it
    traces other instructions, and would stop where they do not match that record.
    """
    InstructionTranslator.current_tx().speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason=reason)


def host_reads_in_graph() -> AbstractContextManager[None]:
    """While it lasts, Dynamo keeps `.tolist()` and `.item()` in the graph, as `fullgraph=True` does."""
    context: AbstractContextManager[None] = dynamo_config.patch(capture_scalar_outputs=True)
    return context


def while_dynamo_compiles(begin: Callable[[Any], None], end: Callable[[Any], None]) -> None:
    """Have these called before and after each compilation of this process; once, however often this is asked for.

    `torch._dynamo.reset()` forgets it.
    """
    if begin not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(end)


def compiled_apart(fn: Compiled) -> Compiled:
    """`fn` left to `torch.compile`, which compiles it again where what it assumed does not hold, up to a limit.

    That limit is one for each code object, so `fn` gets one of its own, however often this is asked for.
    """
    own = FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    return torch.compile(own)


# -- FX ---------------------------------------------------------------------------------------------------------------


def lazy_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module whose Python is written when it is first called: for graphs that may only be compiled."""
    return _LazyGraphModule(root, graph)


# -- AOTAutograd and Inductor -----------------------------------------------------------------------------------------


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
    return {
        desc.idx: i for i, p in enumerate(placeholders) if isinstance(desc := p.meta.get("desc"), PlainAOTInput)
    }


def reinplace(gm: fx.GraphModule) -> None:
    """Turn functional updates of graph inputs back into updates in place, on the whole graph, before it is cut."""
    if not any(n.target in (aten.copy_.default, auto_functionalized, auto_functionalized_v2) for n in gm.graph.nodes):
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


def whole_graph_inductor(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    """What the user would have without us: the Dynamo graph, compiled by Inductor."""
    return cast("Compiled", compile_fx(gm, list(example_inputs)))


class SegmentShapes:
    """The private shape environment of one segment: its guards never reach the user's, and can be asked for.

    `backed` symbols have a hint and a least value; `unbacked` ones have neither, and so never a guard.
    """

    def __init__(self, backed: Mapping[sympy.Symbol, int], unbacked: Sequence[sympy.Symbol]) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)
        self._own: dict[sympy.Symbol, sympy.Expr] = {}
        self._hints: dict[sympy.Symbol, sympy.Integer] = {}
        for symbol, hint in backed.items():
            self._own[symbol] = self._new_backed(str(symbol), hint)
            self._hints[self._own[symbol]] = sympy.Integer(hint)
        for symbol in unbacked:
            with self.env.ignore_fresh_unbacked_symbols():  # they come from outside: no op here makes them
                number = self.env.create_unbacked_symint()
            torch._check(number >= 0)
            self._own[symbol] = number.node.expr

    def _new_backed(self, name: str, hint: int) -> sympy.Expr:
        source = ConstantSource(f"dbo_{name}")
        return self.env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)

    def number(self, expr: sympy.Expr) -> int | torch.SymInt:
        """An expression over the symbols given, as a number of this environment."""
        own = sympy.sympify(expr).xreplace(self._own)
        if own.is_Integer:
            return int(own)
        hint = own.xreplace(self._hints)
        return self.env.create_symintnode(own, hint=int(hint) if hint.is_Integer else None)

    def tensor(self, sizes: Sequence[sympy.Expr], strides: Sequence[sympy.Expr], like: torch.Tensor) -> torch.Tensor:
        with self.mode:
            return torch.empty_strided(
                [self.number(s) for s in sizes],
                [self.number(s) for s in strides],
                dtype=like.dtype,
                device=like.device,
            )

    def guards(self) -> list[sympy.Expr]:
        """What compiling assumed of the backed symbols, over the symbols given."""
        back = {own: symbol for symbol, own in self._own.items()}
        ranges = [
            sympy.Ge(own, bounds.lower, evaluate=False)
            for own, bounds in self.env.var_to_range.items()
            if own in self._hints and bounds.lower > 0
        ]
        return [g.xreplace(back) for g in (*(guard.expr for guard in self.env.guards), *ranges)]


def segment_inductor(gm: fx.GraphModule, inputs: Sequence[Any], shapes: SegmentShapes) -> Compiled:
    """Compile one segment; `inputs` are fake values of `shapes`."""
    for node in gm.graph.nodes:
        node.meta.pop("unbacked_bindings", None)  # of another shape environment, whose numbers would be looked up here
    FakeTensorProp(gm, mode=shapes.mode).propagate_dont_convert_inputs(*inputs)
    for placeholder, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        placeholder.meta["val"] = value  # torch 2.11 leaves the value of a symbolic placeholder stale
    with tracing(TracingContext(shapes.mode)):
        return cast("Compiled", compile_fx(gm, list(inputs)))


# -- symbols ----------------------------------------------------------------------------------------------------------


def graph_guards(val: torch.SymInt) -> list[sympy.Expr]:
    """What tracing assumed of the symbols of the shape environment that `val` belongs to.

    Symbols that turned out to be equal are written as one, so what says so is no guard any more.
    """
    env = val.node.shape_env
    return [expr for guard in env.guards if (expr := env.replace(guard.expr)) is not sympy.true]


class _Arithmetic(PythonReferenceAnalysis):
    """On proxies too. PyTorch's own makes sympy expressions of quotients, and has no whole numbers of proxies."""

    @staticmethod
    def int_truediv(a: Any, b: Any) -> Any:
        return a / b

    truediv = int_truediv

    @staticmethod
    def trunc_to_int(x: Any, dtype: torch.dtype) -> Any:
        return torch.sym_int(x)

    @staticmethod
    def floor_to_int(x: Any, dtype: torch.dtype) -> Any:
        return torch.sym_int(x // 1)

    @staticmethod
    def ceil_to_int(x: Any, dtype: torch.dtype) -> Any:
        return -torch.sym_int(-x // 1)


def evaluate(expr: sympy.Expr, values: Mapping[sympy.Symbol, Any]) -> Any:
    """An expression over given values: integers, or proxies of an fx.Graph under construction."""
    return sympy_interp(_Arithmetic, dict(values), expr)


def aten_op_names() -> list[str]:
    """The names of all ATen ops, without their overloads, in alphabetical order."""
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return sorted({op.partition(".")[0] for library, _, op in names if library == "aten"})


# -- accelerators -----------------------------------------------------------------------------------------------------

_data_ptrs_equal = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)  # in builds for CUDA alone


def same_addresses(tensors: list[Any], addresses: list[int | None], indices: list[int]) -> bool:
    """Whether the tensors at `indices` lie at their `addresses`. A model has many weights: no loop, where possible."""
    if _data_ptrs_equal is not None:
        return bool(_data_ptrs_equal(tensors, addresses, indices))
    return all(tensors[i].data_ptr() == addresses[i] for i in indices)


def stop_recording(device: torch.device, pool: Any) -> None:
    """End what a capture that was invalidated leaves behind before torch 2.12: an allocator that goes on recording.

    It would abort the process at the next chance to give memory back.
    """
    with suppress(RuntimeError):  # it is not recording: later versions end it themselves
        torch._C._cuda_endAllocateToPool(device.index, pool)


def gemm_sms_left_free() -> int | None:
    """How many multiprocessors PyTorch's own matrix products leave to others; None: none are asked for."""
    left: int | None = torch._C._get_sm_carveout_experimental()
    return left


def leave_sms_free(num_sms: int | None) -> None:
    torch._C._set_sm_carveout_experimental(num_sms)


class Symmetric:
    """Memory that all ranks of a group have at once, reachable from each other's kernels (NVSHMEM)."""

    def __init__(self, group_name: str, device: torch.device) -> None:
        if not symmetric_memory.is_nvshmem_available():
            raise RuntimeError(f"this PyTorch has no NVSHMEM for {device}, which exchanges of device-side sizes need")
        if symmetric_memory.get_backend(device) != "NVSHMEM":
            symmetric_memory.set_backend("NVSHMEM")  # before the first memory of this kind in the process
        self.group_name = group_name
        self.device = device

    def empty(self, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the same size on every rank; all of them must ask for it at the same place."""
        made = symmetric_memory.empty(*sizes, dtype=dtype, device=self.device)
        symmetric_memory.rendezvous(made, group=cast("Any", self.group_name))
        return made


# -- process groups ---------------------------------------------------------------------------------------------------


def process_group(name: Any) -> Any:
    """The process group that a functional collective names (torch 2.13 also allows the group itself).

    Raises `RuntimeError` for a group that there is no more, before anything is sent.
    """
    if not isinstance(name, str):
        return name
    try:
        return _resolve_process_group(cast("Any", name))
    except (LookupError, ValueError, RuntimeError) as error:
        raise RuntimeError(
            f"the model communicates over process group {name!r}, which was destroyed or never made on this rank; "
            "compile the model after init_process_group, and keep the group as long as the model"
        ) from error


# -- seeing what happens ----------------------------------------------------------------------------------------------


def is_profiling() -> bool:
    """Whether a profiler runs, `torch.profiler` and `emit_nvtx` alike."""
    return profiler._is_profiler_enabled


def compile_id() -> str:
    """What Dynamo and tlparse call the compilation that goes on, e.g. `0/1`; "" for none."""
    return str(CompileContext.current_compile_id() or "")


def without_fake_tensors() -> AbstractContextManager[Any]:
    """While it lasts, real tensors may be used inside of a compilation."""
    return unset_fake_temporarily()


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Hand a text to `TORCH_TRACE`, where tlparse shows it under the compile id. `payload` is called only if it is on.

    `encoding` is "string" or "json". Costs nothing to speak of where tracing is off.
    """
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


TORCH = str(Path(torch.__file__).parent)


def generated_file(compiled: Any) -> str:
    """The file with the code that Inductor generated for a function that it compiled; "" if it cannot be found."""
    seen: set[int] = set()
    todo: list[Any] = [compiled]
    while todo and len(seen) < 2000:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        code = getattr(item, "__code__", None)
        if code is not None and code.co_name == "call" and not code.co_filename.startswith(TORCH):
            return str(code.co_filename)
        todo += _held_by(item)
    return ""


def _held_by(item: Any) -> list[Any]:
    """What a function, or an object of Inductor that can be called, holds that can be called."""
    cells = getattr(item, "__closure__", None) or ()
    held = [c.cell_contents for c in cells if c != CellType()]
    if not isinstance(item, type | FunctionType | fx.GraphModule) and type(item).__module__.startswith("torch._"):
        held += vars(item).values() if hasattr(item, "__dict__") else ()
    held += [getattr(item, name, None) for name in ("__wrapped__", "__func__", "__self__", "func")]
    return [h for h in held if callable(h)]
