"""Nested compile regions: what PyTorch traced once is split as if each call had been traced."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.compiler import nested_compile_region
from torch.nn.attention.flex_attention import flex_attention

from dbo_compile import compilation, example, reports
from dbo_compile import graph as g
from dbo_compile.passes.inline import CALL

ALWAYS = {"split": "always", "inner": "eager", "gate": "never"}
pytestmark = pytest.mark.usefixtures("group")


def rows(*sizes):
    return torch.randn(*sizes, dtype=torch.float64)


W = rows(8, 8)
MOST_CALLS = 60
"""After so many, every way to play a size has been timed."""


def run(fn, *args, options=ALWAYS):
    """`fn` does, compiled, what it does in eager mode, to its arguments as well; the report of its graph."""
    mine = [a.clone() for a in args]
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        got = torch.compile(fn, backend="dbo", options=options, fullgraph=True)(*args)
        torch.testing.assert_close((got, list(args)), (fn(*mine), mine), rtol=0, atol=1e-12)
    return reports()[-1]


def layers(num_layers, monkeypatch, *, regions):
    if regions:
        monkeypatch.setattr(example.Layer, "forward", nested_compile_region(example.Layer.forward))
    torch._dynamo.reset()
    model, args = example.moe(num_layers)
    return run(model.double(), *[a.double() for a in args])


def test_layers_that_are_regions_are_split_like_any(monkeypatch):
    plain = layers(3, monkeypatch, regions=False)
    marked = layers(3, monkeypatch, regions=True)
    assert len(set(marked.captured.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph))) == 3
    assert marked.barriers == plain.barriers == {}
    assert marked.fingerprint == plain.fingerprint
    # By the layer that calls them, not by the one that was traced.
    assert marked.levels.paths == plain.levels.paths
    assert list(marked.levels.outline.segments) == list(plain.levels.outline.segments)


def test_regions_inside_of_regions_and_constants_in_them():
    @nested_compile_region
    def inner(x):
        return funcol.all_reduce(x @ W, "sum", dist.group.WORLD).sin()

    @nested_compile_region
    def outer(x):
        return inner(inner(x) + 1) + torch.arange(8, dtype=torch.float64) * torch.tensor([2.0] * 8, dtype=torch.float64)

    report = run(lambda x: outer(outer(x)).exp(), rows(9, 8))
    assert report.barriers == {}
    assert report.num_comm_ops == 4


def test_functions_that_an_op_is_given_come_along():
    def offset(score, batch, head, q, k):
        return score + q - k

    @nested_compile_region
    def attend(x):
        heads = x.view(-1, 1, 4, 8)
        return x + flex_attention(heads, heads, heads, score_mod=offset).reshape(-1, 32)

    report = run(lambda x: attend(attend(x)), rows(9, 32))
    assert report.calls_split == 1


def exchanged(x):
    """All rows to where they are, by sizes that are read out of data."""
    sent = torch.full((1,), 0) + len(x)
    received = funcol.all_to_all_single(sent, None, None, dist.group.WORLD)
    there = funcol.all_to_all_single(x, received.tolist(), sent.tolist(), dist.group.WORLD)
    return x + funcol.all_to_all_single(there @ W, sent.tolist(), received.tolist(), dist.group.WORLD)


def test_each_call_has_numbers_of_its_own():
    region = nested_compile_region(exchanged)
    graph = run(lambda x: region(region(x)), rows(9, 8)).levels.graph
    reads = [g.expression(g.value(node)) for node in graph.nodes if g.reads_number(node)]
    assert len(set(reads)) == len(reads) > 0
    products = [g.expression(g.value(node).shape[0]) for node in graph.nodes if "mm" in node.name]
    assert len(set(products)) == 2


def test_numbers_that_are_no_integers():
    @nested_compile_region
    def scaled(x):
        return funcol.all_reduce(x @ W, "sum", dist.group.WORLD) * W.max().item() + int(W.argmax())

    graph = run(lambda x: scaled(scaled(x).tanh()), rows(9, 8)).levels.graph
    reads = [g.expression(g.value(node)) for node in graph.nodes if g.reads_number(node)]
    assert sorted(bool(symbol.is_integer) for symbol in set(reads)) == [False, False, True, True]


def cached(x, cache, position):
    cache.index_copy_(0, position, x)
    return x @ W + cache[: len(x)]


@pytest.mark.parametrize("options", [ALWAYS, ALWAYS | {"token_dims": {"x": 0, "position": 0}}], ids=["guess", "named"])
def test_a_cache_that_a_region_fills_is_filled_in_place(options):
    region = nested_compile_region(cached)

    def fn(x, one, two, position):
        return region(region(x, one, position), two, position)

    one, two = rows(12, 8), rows(12, 8)
    report = run(fn, rows(9, 8), one, two, torch.arange(9), options=options)
    assert report.levels is not None, report.reason
    copies = [n for n in report.levels.graph.nodes if "clone" in n.name or "copy" in str(n.target)]
    assert copies == []


def test_values_share_memory_with_what_they_are_views_of():
    """What may be updated in place is decided by it."""

    @nested_compile_region
    def region(x, cache, position):
        before = cache[1:]
        filled = cache.index_copy(0, position, x)
        read = before[: len(x)] + filled[: len(x)]
        cache.copy_(filled)
        return x @ W + read

    def fn(x, one, two, position):
        return region(region(x, one, position), two, position)

    graph = run(fn, rows(9, 8), rows(12, 8), rows(12, 8), torch.arange(9)).levels.graph
    views = [n for n in graph.nodes if "slice" in n.name and n.args[0].op == "placeholder"]
    assert len(views) == 2
    for view in views:
        assert torch._C._is_alias_of(g.value(view), g.value(view.args[0]))


def test_a_part_of_an_argument_that_is_written_is_a_reason_with_a_line():
    @nested_compile_region
    def fill(x, part):
        part.add_(1)
        return x @ W + part.sum()

    report = run(lambda x, cache: fill(fill(x, cache[0]), cache[1]), rows(9, 8), torch.zeros(2, 5, 8).double())
    assert re.search(r"writes a part of its argument in place \(.*test_inline.py", report.reason)


def test_sizes_that_leave_a_region_are_a_reason():
    @nested_compile_region
    def some(x):
        return x[: int((x[:, 0] > 0).sum())] * 2

    report = run(lambda x: x * some(x).sum() + some(x + 1).sum(), rows(9, 8))
    assert "depends on its data" in report.reason


def layers_that_are_regions(monkeypatch):
    monkeypatch.setattr(example.Layer, "forward", nested_compile_region(example.Layer.forward))
    model, args = example.moe(2)
    return model.double(), [a.double() for a in args]


def regions_that_fill_caches(_):
    @nested_compile_region
    def region(x, cache, position):
        return funcol.all_reduce(cached(x, cache, position), "sum", dist.group.WORLD)

    position = torch.arange(9)
    return lambda x, one, two: region(region(x, one, position), two, position), [rows(9, 8), rows(12, 8), rows(12, 8)]


def regions_that_exchange_rows(_):
    region = nested_compile_region(exchanged)
    return lambda x: region(region(x)), [rows(9, 8)]


@pytest.mark.parametrize(
    "make",
    [layers_that_are_regions, regions_that_fill_caches, regions_that_exchange_rows],
    ids=lambda make: make.__name__,
)
def test_what_inductor_compiles_in_one_piece_keeps_its_regions(make, monkeypatch):
    """Of these, too, it compiles one; and that is one of the ways that are timed."""
    whole = []
    compile_whole = compilation.inner.compile_whole
    monkeypatch.setattr(compilation.inner, "compile_whole", lambda gm, *a: [whole.append(gm), compile_whole(gm, *a)][1])
    fn, args = make(monkeypatch)
    compiled = torch.compile(fn, backend="dbo", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        for _ in range(MOST_CALLS):
            theirs, mine = ([a.clone() for a in args] for _ in range(2))
            torch.testing.assert_close((compiled(*theirs), theirs), (fn(*mine), mine), rtol=0, atol=1e-12)
            if decisions := reports()[-1].decisions:
                break
    ((_, decision),) = decisions.items()
    assert "inductor" in decision.seconds
    (gm,) = whole
    assert sum(CALL in (n.target, *n.args) for n in gm.graph.nodes) == 2
