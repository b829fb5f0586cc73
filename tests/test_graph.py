"""The questions that we ask of an FX graph: memory, layouts, numbers, names."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._sympy.functions import CeilToInt, FloorToInt, IntTrueDiv, TruncToInt

from dbo_compile import compat, origin, reports
from dbo_compile import graph as g
from dbo_compile.ir.tokens import TOKENS

ALWAYS = {"split": "always", "inner": "eager", "token_dims": {"x": 0}}
aten = torch.ops.aten


def traced(fn, *sizes):
    return make_fx(fn, tracing_mode="fake")(*[torch.empty(s) for s in sizes]).graph


def captured(fn, x):
    """A graph as the backend captures it, with a symbolic number of rows."""
    with torch.no_grad():
        torch.compile(fn, backend="dbo", options=ALWAYS, fullgraph=True)(x)
    return reports()[-1].levels.graph


def named(graph, *names):
    nodes = {n.name: n for n in graph.nodes}
    return [nodes[name] for name in names]


def names(nodes):
    return [n.name for n in nodes]


def test_a_graph_is_inputs_a_body_and_results():
    graph = traced(lambda x, w: (x.sin(), None, w), (7, 3), (3,))
    assert names(g.inputs(graph)) == ["x_1", "w_1"]
    assert names(g.body(graph)) == ["sin"]
    assert [r.name if isinstance(r, fx.Node) else r for r in g.results(graph)] == ["sin", None, "w_1"]


def test_numbers_are_told_from_tensors_and_compared_as_expressions():
    graph = captured(lambda x: x * x.shape[0], torch.randn(7, 3))
    number, x = g.inputs(graph)
    assert [g.is_symbolic_number(n) for n in (number, x)] == [True, False]
    assert g.expression(g.value(x).shape[0]) == g.expression(g.value(number))
    assert g.expression(3) == 3
    assert g.symbol_inputs(graph) == {g.expression(g.value(number)): 0}


def test_the_symbols_of_a_value_are_those_of_its_sizes_and_strides():
    graph = captured(lambda x: (x.T.contiguous(), x.sum(0)), torch.randn(7, 3))
    number, x = g.inputs(graph)
    symbol = g.expression(g.value(number))
    made = next(n for n in g.body(graph) if n.name == "sum_1")
    turned = next(n for n in g.body(graph) if n.name == "clone")
    assert [g.symbols_of(g.value(n)) for n in (number, x, turned, made)] == [{symbol}, {symbol}, {symbol}, set()]
    assert g.symbols_of(5) == set()


def test_symbols_read_out_of_data_are_named_after_their_first_reader():
    def fn(x):
        return x.new_zeros(x[0].item()), x.new_zeros(x[2].item())

    graph = make_fx(fn, tracing_mode="symbolic")(torch.tensor([3, 5, 4]))
    readers = [n for n in g.body(graph.graph) if g.reads_number(n)]
    assert [*g.data_symbols(graph.graph).values()] == readers
    assert [g.expression(g.value(n)) for n in readers] == [*g.data_symbols(graph.graph)]


def test_leaves_of_nested_arguments_come_in_order():
    assert g.flat((1, [2, {"a": 3}], None)) == [1, 2, 3, None]


def test_arguments_that_an_op_writes_are_told_by_its_schema():
    graph = traced(lambda x, y: x.add_(y).mul_(2) + torch.add(x, y), (7, 3), (7, 3))
    assert [names(g.written(n)) for n in g.body(graph)] == [["x_1"], ["add_"], [], []]


def test_a_write_to_an_argument_given_by_name_is_seen():
    graph = fx.Graph()
    x, i = graph.placeholder("x"), graph.placeholder("i")
    node = graph.call_function(aten.index_add_.default, (), {"self": x, "dim": 0, "index": i, "source": x})
    assert names(g.written(node)) == ["x"]


def test_views_are_followed_to_where_memory_begins():
    def fn(x):
        first, _ = x.t().view(3, 7).split(4, 1)
        return first.select(0, 1), x.sin().view(3, 7), x.add_(1)[2]

    graph = traced(fn, (7, 3))
    results = [n for n in g.results(graph) if isinstance(n, fx.Node)]
    assert names(map(g.base, results)) == ["x_1", "sin", "x_1"]


def test_waiting_for_a_collective_hands_on_its_memory():
    c10d = torch.ops._c10d_functional
    graph = traced(lambda x: (c10d.wait_tensor(c10d.all_reduce(x.sin(), "sum", "g")),), (7, 3))
    assert g.base(g.results(graph)[0]).name == "all_reduce"


def test_a_part_of_a_tuple_lies_in_what_the_tuple_was_made_of():
    graph = traced(lambda x: (x.unbind(1)[2],), (7, 3))
    assert g.results(graph)[0].target is operator.getitem
    assert g.base(g.results(graph)[0]).name == "x_1"


def test_what_shares_memory_with_an_argument_that_is_written_is_known_through_any_view():
    graph = traced(lambda x, y: (x.t(), y.t(), x[1].add_(1)), (7, 3), (7, 3))
    assert [g.shares_input(n) for n in g.results(graph)] == [True, False, True]


def test_a_returned_view_is_one_of_an_argument_that_the_graph_returns():
    def fn(x, y):
        y.copy_(y + 1)
        return x.t(), x.sin().t(), x, x.view(3, 7).sin()

    graph = traced(fn, (7, 3), (7, 3))
    assert [g.is_returned_view(n) for n in g.results(graph)] == [True, False, False, False]
    assert not any(g.is_returned_view(n) for n in named(graph, "view", "sin"))


def test_a_view_of_what_becomes_an_argument_is_returned_as_one():
    def fn(x):
        updated = x + 1
        x.copy_(updated)
        return updated.t(), updated

    graph = traced(fn, (7, 3))
    assert [g.is_returned_view(n) for n in g.results(graph)] == [True, False]


@pytest.mark.parametrize(
    ("make", "dense"),
    [
        (lambda x: x, True), (lambda x: x.T, True), (lambda x: x[:, None].transpose(0, 2), True),
        (lambda x: x[:, 1:], False), (lambda x: x[:, None].expand(-1, 4, -1), False), (lambda x: x[::2], False),
        (lambda x: x[1:], True), (lambda x: x[:, :1], False), (lambda x: x[:1, 1:], True),
    ],
)  # fmt: skip
def test_dense_is_without_gaps_and_repeats_in_any_order_of_dims(make, dense):
    assert g.is_dense(make(torch.empty(7, 3))) is dense


def test_dense_holds_for_all_numbers_of_rows():
    graph = captured(lambda x: (x.T.sin(), x[:, 1:].sum()), torch.randn(7, 3))
    dense = {n.name: g.is_dense(g.value(n)) for n in g.body(graph) if isinstance(g.value(n), torch.Tensor)}
    assert dense["permute"]
    assert [is_dense for name, is_dense in dense.items() if name.startswith("slice")][-1] is False


def test_rows_lie_together_in_the_outermost_dim():
    x = torch.empty(7, 3, 5)
    assert [g.lies_together(x, d) for d in range(3)] == [True, False, False]
    assert [g.lies_together(x.permute(2, 0, 1), d) for d in range(3)] == [False, True, False]
    assert g.lies_together(torch.empty(1, 7), 1)


def test_the_path_of_a_module_does_not_depend_on_how_it_was_called():
    graph = fx.Graph()
    node = graph.placeholder("x")
    assert origin.module_path(node) == ""
    for path in ("L['self'].layers.0.mlp", "L['fn']._modules['layers']._modules['0']._modules['mlp']", "layers[0].mlp"):
        node.meta["nn_module_stack"] = {"a": ("L['self']", object), "b": (path, object)}
        assert origin.module_path(node) == "layers.0.mlp", path


def test_the_line_of_an_op_is_the_users_and_not_that_of_torch():
    graph = fx.Graph()
    node = graph.placeholder("x")
    assert origin.source_line(node) == ""
    node.meta["stack_trace"] = (
        '  File "/home/me/model.py", line 12, in forward\n    x = F.pad(x, (0, 1))\n'
        '  File "/env/torch/nn/functional.py", line 5, in pad\n    return torch._C._nn.pad(x)\n'
    )
    assert origin.source_line(node) == "/home/me/model.py:12, x = F.pad(x, (0, 1))"


def test_an_op_on_the_host_is_told_from_a_copy_to_it():
    graph = make_fx(lambda x: x.cpu().sin(), tracing_mode="fake")(torch.empty(7, 3, device="meta")).graph
    copy, sin = g.body(graph)
    assert [g.copies_to_host(n) for n in (copy, sin)] == [True, False]
    assert [g.is_on_host(n) for n in (*g.inputs(graph), copy, sin)] == [False, True, True]


@pytest.mark.parametrize(
    ("expr", "want"),
    [
        (TruncToInt(IntTrueDiv(TOKENS, 3) * 1.7), {8: 4, 9: 5}),
        (FloorToInt(IntTrueDiv(TOKENS, 2) - 4), {7: -1, 9: 0}),
        (CeilToInt(IntTrueDiv(TOKENS, 2) - 4), {7: 0, 9: 1}),
    ],
)
def test_a_size_may_be_a_quotient_in_a_graph_under_construction_too(expr, want):
    graph = fx.Graph()
    proxy = fx.Proxy(graph.placeholder("tokens"), fx.proxy.GraphAppendingTracer(graph))
    graph.output(compat.evaluate(expr, {TOKENS: proxy}).node)
    module = fx.GraphModule({}, graph)
    assert {n: module(n) for n in want} == {n: compat.evaluate(expr, {TOKENS: n}) for n in want} == want
