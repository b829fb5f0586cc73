"""What is known before a run of whether it can be captured. `meta` stands for a device."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dbo_compile.passes.capturable import EXCHANGES, why_not_captured


@torch.library.custom_op("dbo_test_capturable::fickle", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def fickle(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


fickle.register_fake(torch.empty_like)


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda x: x.sin() @ x.t(), ""),
        (lambda x: x.sum(0).cpu(), f"aten._to_copy.default reads data of the device on the host; {EXCHANGES}"),
        (fickle, "dbo_test_capturable.fickle.default says of itself that it cannot be captured"),
    ],
    ids=["products", "a copy to the host", "a tag"],
)
def test_the_first_op_that_cannot_be_captured_is_named(fn, why):
    graph = make_fx(fn, tracing_mode="fake")(torch.empty(7, 5, device="meta")).graph
    for node in graph.nodes:
        node.meta.pop("stack_trace", None)
    assert why_not_captured(graph) == why


def test_a_read_of_a_number_is_found_with_its_line():
    graph = make_fx(lambda x: x.sum().item() + 1, tracing_mode="symbolic")(torch.ones(7, 5)).graph
    for node in graph.nodes:
        node.meta["stack_trace"] = '  File "model.py", line 7, in forward\n    n = x.sum().item()\n'
    assert why_not_captured(graph).startswith("aten._local_scalar_dense.default (model.py:7, n = x.sum().item()) reads")
