"""Placement analysis of small graphs: what is where, what is played once and why, what is remembered beside it."""

from __future__ import annotations

import pytest
import torch

from dbo_compile import graph as g
from dbo_compile import reports
from dbo_compile.errors import NotSplit
from dbo_compile.ir.tokens import Given, Split
from dbo_compile.passes.analyze import analyze
from dbo_compile.passes.code import is_made_dense
from dbo_compile.rules import registry

ALWAYS = {"split": "always", "inner": "eager", "token_dims": {"x": 0, "y": 0, "e": 0}}


def traced(fn, *args):
    """The ATen graph of a function, as the backend captures it; `x`, `y` and `e` have tokens in dim 0."""
    with torch.no_grad():
        torch.compile(fn, backend="dbo", options=ALWAYS, fullgraph=True)(*args)
    return reports()[-1].levels.graph


def analysed(graph, *, num_tokens=7, whole=None, given=None):
    """The analysis of a graph whose inputs carry tokens where they have a symbolic dim 0."""
    tensors = [n for n in g.inputs(graph) if not g.is_symbolic_number(n)]
    token_dims = {n: 0 for n in tensors if not isinstance(g.value(n).shape[0], int)}
    symbols = tuple(dict.fromkeys(g.expression(g.value(n).shape[0]) for n in token_dims))
    return analyze(graph, token_dims, symbols, whole or {}, given or {})


def places(graph, tokens):
    """The placement of each value that is no symbolic number, by what made it."""
    def text(place):
        return f"({', '.join(map(str, place))})" if isinstance(place, tuple) else str(place)

    nodes = [n for n in tokens.places if not g.is_symbolic_number(n) and n.op != "output"]
    return [f"{n.name if n.op == 'call_function' else 'input'}: {text(tokens.places[n])}" for n in nodes]


def barriers(tokens):
    return {n.name: why for n, why in tokens.barriers.items()}


def x_of(num_tokens=7):
    return torch.randn(num_tokens, 3, dtype=torch.double)


def test_every_value_is_placed():
    def fn(x, w):
        return (x @ w).T.sin(), w.cos().exp()

    graph = traced(fn, x_of(), torch.randn(3, 5, dtype=torch.double))
    assert places(graph, analysed(graph)) == [
        "input: Split(0)", "input: Shared", "mm: Split(0)", "permute: Split(1)", "sin: Split(1)",
        "cos: Shared", "exp: Shared",
    ]  # fmt: skip


def test_an_op_that_is_refused_is_a_barrier_and_the_way_on_is_split_again():
    graph = traced(lambda x: (x - x.mean(0)).sin(), x_of())
    tokens = analysed(graph)
    assert barriers(tokens) == {"mean": "it reduces over the token dim 0"}
    assert places(graph, tokens) == ["input: Split(0)", "mean: Shared", "sub: Split(0)", "sin: Split(0)"]


@torch.library.custom_op("dbo_test_analyze::scale", mutates_args=())
def scale(x: torch.Tensor, factor: int, *, shift: int = 0) -> torch.Tensor:
    return x * factor + shift


scale.register_fake(lambda x, factor, *, shift=0: torch.empty_like(x))


def adds_to_a_word(x, factor):
    return x.place if factor + "" else None


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            lambda x: x.place,
            "the rule of dbo_test_analyze.scale.default cannot be called with the op's arguments (sin, 2): too many "
            "positional arguments",
        ),
        (
            lambda x, factor, shift, axis: x.place,
            "the rule of dbo_test_analyze.scale.default cannot be called with the op's arguments (sin, 2): missing a "
            "required argument: 'shift'",
        ),
        (adds_to_a_word, "unsupported operand type(s) for +: 'int' and 'str'"),
    ],
    ids=["too_few", "too_many", "a fault inside"],
)
def test_a_rule_that_does_not_fit_its_op_is_named_with_the_arguments(monkeypatch, rule, message):
    graph = traced(lambda x: scale(x.sin(), 2), x_of())
    monkeypatch.setitem(registry._rules, torch.ops.dbo_test_analyze.scale.default, rule)
    with pytest.raises(TypeError) as error:
        analysed(graph)
    assert str(error.value) == message


def test_the_arguments_that_a_rule_does_not_take_have_their_names(monkeypatch):
    graph = traced(lambda x: scale(x.sin(), 2, shift=3), x_of())
    monkeypatch.setitem(registry._rules, torch.ops.dbo_test_analyze.scale.default, lambda x, factor: x.place)
    with pytest.raises(TypeError, match=r"arguments \(sin, 2, shift=3\): got an unexpected keyword argument 'shift'$"):
        analysed(graph)


def test_an_op_without_a_rule_is_a_barrier_that_says_what_to_do():
    tokens = analysed(traced(lambda x: torch.linalg.qr(x)[0].sin(), x_of()))
    assert barriers(tokens) == {
        "linalg_qr": "aten.linalg_qr.default has no placement rule; teach it one with dbo_compile.register_rule"
    }


def test_an_op_that_draws_random_numbers_is_a_barrier():
    tokens = analysed(traced(lambda x: torch.bernoulli(x.sigmoid()) * x, x_of()))
    assert barriers(tokens) == {"bernoulli": "it draws random numbers: their order would depend on the split"}


def test_what_is_made_without_tokens_is_shared_though_its_rule_would_refuse():
    graph = traced(lambda x, w: x * w.mean(0), x_of(), torch.randn(4, 3, dtype=torch.double))
    tokens = analysed(graph)
    assert barriers(tokens) == {}
    assert "mean: Shared" in places(graph, tokens)


def test_ops_that_are_asked_to_be_whole_are_barriers_whatever_their_rule_says():
    graph = traced(lambda x: x.sin().cos(), x_of())
    sin = next(n for n in g.body(graph) if n.name == "sin")
    tokens = analysed(graph, whole={sin: "somebody said so"})
    assert barriers(tokens) == {"sin": "somebody said so"}
    assert places(graph, tokens) == ["input: Split(0)", "sin: Split(0)", "cos: Split(0)"]


def test_rows_in_an_order_of_their_own_are_named_after_what_arranged_them():
    def fn(x, e):
        order = e.argsort(stable=True)
        return torch.zeros_like(x).index_copy(0, order, x[order].sin())

    graph = traced(fn, x_of(), torch.randint(0, 4, (7,)))
    tokens = analysed(graph)
    assert barriers(tokens) == {}
    (sort,) = [n for n in g.body(graph) if "sort" in str(n.target)]
    assert f"Local(order={sort.name}, position)" in str(tokens.places[sort][1])
    assert [str(tokens.places[n]) for n in g.body(graph) if n.name == "sin"] == [f"Local(order={sort.name})"]


def test_what_arranged_rows_that_are_needed_whole_is_played_once_too():
    def fn(x, e):
        rows = x[e.argsort(stable=True)]
        return x - rows.cumsum(0)

    graph = traced(fn, x_of(), torch.randint(0, 4, (7,)))
    assert barriers(analysed(graph)) == {
        "sort": "cumsum needs its result for all tokens at once, because it adds up values of many tokens that are no "
        "integers",
        "index": "it reads rows of the token dim 0 that may belong to another microbatch",
        "cumsum": "it adds up values of many tokens that are no integers",
    }


def test_a_graph_that_returns_rows_in_an_order_of_their_own_makes_them_whole():
    graph = traced(lambda x, e: x[e.argsort(stable=True)].sin(), x_of(), torch.randint(0, 4, (7,)))
    assert barriers(analysed(graph)) == {
        "sort": "the graph returns rows of many tokens in an order of their own",
        "index": "it reads rows of the token dim 0 that may belong to another microbatch",
    }


def test_what_is_taken_on_trust_is_remembered_with_its_op():
    def fn(x, e):
        order = e.argsort(stable=True)
        rows = torch.cat([x[order], x[order]]).view(2, -1, 3).sum(0)  # nothing is known of their order any more
        return torch.zeros_like(x).index_add(0, order, rows)

    tokens = analysed(traced(fn, x_of(), torch.randint(0, 4, (7,))))
    assert {n.name: why for n, why in tokens.obligations.items()} == {
        "index_add": "the rows it puts back are in the order in which they were taken from their tokens"
    }


def test_rows_that_are_put_back_by_another_order_are_made_whole():
    def fn(x, e):
        rows = x[e.argsort(stable=True)]
        return torch.zeros_like(x).index_add(0, e.argsort(stable=True), rows)

    found = barriers(analysed(traced(fn, x_of(), torch.randint(0, 4, (7,)))))
    reason = "the rows were put in order by sort, but are put back by sort_1"
    assert found["sort"] == found["sort_1"] == f"index_add needs its result for all tokens at once, because {reason}"


def test_row_numbers_that_read_rows_of_tokens_are_those_of_the_microbatch():
    def fn(x):
        rows = torch.arange(x.shape[0])
        return x[rows].sin() + rows[:, None]

    graph = traced(fn, x_of())
    tokens = analysed(graph)
    assert [str(n.target) for n in tokens.localised] == ["aten.index.Tensor"]
    assert [str(tokens.places[n]) for n in g.body(graph) if n.name == "arange"] == ["Split(0, position)"]


def test_a_returned_view_of_an_argument_is_played_once_and_lies_as_the_argument_does():
    """AOTAutograd reads off our result how the view lies in memory; pieces that were joined lie otherwise."""
    graph = traced(lambda x: (x.view(x.shape[0], 3, 1)[:, 1], x.sin()), x_of())
    reason = "{} is part of a result that is a view of an argument"
    found = analysed(graph)
    names = [n.name for n in g.body(graph) if n.name != "sin" and not g.is_symbolic_number(n)]
    assert barriers(found) == {name: reason.format(name) for name in names}
    assert not any(is_made_dense(n) for n in g.body(graph) if not g.is_symbolic_number(n))


RETURNED_VIEWS = [
    lambda x: x.view(x.shape[0], 2, 3)[:, 1],
    lambda x: (x.view(x.shape[0], 2, 3)[:, 1].T, x.sin()),
    lambda x: x[None].expand(4, x.shape[0], 6),
    lambda x: (lambda v: (v[:, 1], v.sum(2)))(x.view(x.shape[0], 2, 3)),
    lambda x: x.view(x.shape[0], 2, 3).unbind(2)[1],
    lambda x: (x.add_(1).view(x.shape[0], 2, 3)[:, 1], x.sin()),
    lambda x: (x.view(x.shape[0], 2, 3)[:, 1], x.add_(1).sin()),
]


@pytest.mark.parametrize("fn", RETURNED_VIEWS)
def test_returned_views_of_arguments_are_what_they_are_in_eager(fn):
    mine, its = torch.arange(42.0).view(7, 6), torch.arange(42.0).view(7, 6)
    want = fn(mine)
    with torch.no_grad():
        got = torch.compile(fn, backend="dbo", options=ALWAYS, fullgraph=True)(its)
    torch.testing.assert_close((got, its), (want, mine), rtol=0, atol=0)
    assert reports()[-1].calls_split == 1


def test_the_analysis_changes_no_graph():
    graph = traced(lambda x: (x - x.mean(0)).sort(0)[0].sin(), x_of())
    before = (str(graph), [dict(n.meta) for n in graph.nodes])
    analysed(graph)
    assert (str(graph), [dict(n.meta) for n in graph.nodes]) == before


def test_what_each_microbatch_is_given_is_read_as_its_own():
    graph = traced(lambda x, w: x.sin() + w.sum(), x_of(), torch.randn(5, dtype=torch.double))
    (given,) = [n for n in g.inputs(graph) if not g.is_symbolic_number(n) and g.value(n).ndim == 1]
    tokens = analysed(graph, given={given: Given("requests")})
    assert str(tokens.places[given]) == "Given(order=requests)"
    assert tokens.places[next(n for n in g.body(graph) if n.name == "sin")] == Split(0)


def test_writing_what_each_microbatch_is_given_is_refused():
    graph = traced(lambda x, w: (x + w.add_(1).sum(), w), x_of(), torch.randn(5, dtype=torch.double))
    (given,) = [n for n in g.inputs(graph) if not g.is_symbolic_number(n) and g.value(n).ndim == 1]
    with pytest.raises(NotSplit, match="in place, of which each microbatch has its own"):
        analysed(graph, given={given: Given()})
