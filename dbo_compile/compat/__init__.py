"""The only room that meets torch's private APIs. Each function is tried on every supported torch, 2.11 to 2.13.

Ask the package, `compat.to_aten(...)`: which of its files an answer is in is nobody else's business.
"""

from __future__ import annotations

from torch.distributed import _symmetric_memory as symmetric_memory
from torch.utils._pytree import tree_leaves, tree_map

from dbo_compile.compat.aot import (
    argument_positions,
    is_functionalized,
    lazy_module,
    reinplace,
    retrace_values,
    segment_inductor,
    to_aten,
    updates_inputs,
    whole_graph_inductor,
    whole_inductor,
)
from dbo_compile.compat.devices import (
    Symmetric,
    free_memory,
    gemm_sms_left_free,
    leave_sms_free,
    process_group,
    same_addresses,
    stop_recording,
)
from dbo_compile.compat.dynamo import (
    ask_for_dynamic,
    compiled_apart,
    host_reads_in_graph,
    is_closed_over,
    is_dynamic,
    is_parameter,
    is_static,
    source_name,
    trace_again,
    while_dynamo_compiles,
)
from dbo_compile.compat.seeing import (
    aten_op_names,
    compile_id,
    generated_file,
    is_profiling,
    trace_artifact,
    without_fake_tensors,
)
from dbo_compile.compat.shapes import OtherNumbers, SegmentShapes, evaluate, graph_guards, symbols_in

__all__ = [
    "OtherNumbers",
    "SegmentShapes",
    "Symmetric",
    "argument_positions",
    "ask_for_dynamic",
    "aten_op_names",
    "compile_id",
    "compiled_apart",
    "evaluate",
    "free_memory",
    "gemm_sms_left_free",
    "generated_file",
    "graph_guards",
    "host_reads_in_graph",
    "is_closed_over",
    "is_dynamic",
    "is_functionalized",
    "is_parameter",
    "is_profiling",
    "is_static",
    "lazy_module",
    "leave_sms_free",
    "process_group",
    "reinplace",
    "retrace_values",
    "same_addresses",
    "segment_inductor",
    "source_name",
    "stop_recording",
    "symbols_in",
    "symmetric_memory",
    "to_aten",
    "trace_again",
    "trace_artifact",
    "tree_leaves",
    "tree_map",
    "updates_inputs",
    "while_dynamo_compiles",
    "whole_graph_inductor",
    "whole_inductor",
    "without_fake_tensors",
]
