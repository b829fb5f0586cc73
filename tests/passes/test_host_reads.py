"""What the host plays: copies of device tensors to it, and what is done with them there. `meta` stands for a device."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dbo_compile import graph as g
from dbo_compile.ir.tokens import Local, TokenMap
from dbo_compile.passes.cut import cut


def groups_of(fn, device):
    """`kind: ops` of each group of a graph whose values are all a microbatch's own."""
    graph = make_fx(fn, tracing_mode="fake")(torch.empty(7, 5, device=device)).graph
    places = {n: Local() for n in graph.nodes}
    groups = cut(graph, TokenMap(places, {}, {}, {})).groups
    return [f"{group.mode.kind.value}: {' '.join(n.name for n in group.nodes)}" for group in groups]


def reads_sizes(x):
    counts = (x > 3).sum(0)
    first, *_, last = counts.cpu().unbind()
    return x.mul(2), first.add(last)


def test_a_copy_to_the_host_and_what_follows_there_are_played_by_the_host():
    assert groups_of(reads_sizes, "meta") == [
        "compute: gt sum_1 mul",
        "host: _to_copy unbind getitem getitem_1 getitem_2 getitem_3 getitem_4 add",
    ]


def test_on_the_cpu_nothing_is_a_copy_to_the_host():
    assert not any(group.startswith("host") for group in groups_of(reads_sizes, "cpu"))


def test_what_comes_back_from_the_host_is_compute_again():
    def fn(x):
        return x.add(x.sum(0).cpu().mul(2).to("meta"))

    assert [group.partition(":")[0] for group in groups_of(fn, "meta")] == ["compute", "host", "compute"]


@pytest.mark.parametrize(
    ("fn", "copies"),
    [
        (lambda x: x.cpu(), [True]),
        (lambda x: x.to("cpu", torch.float64, non_blocking=True), [True]),
        (lambda x: x.sin(), [False]),
        (lambda x: x.to(torch.float64), [False]),
    ],
)
def test_only_a_copy_from_a_device_to_the_cpu_is_one(fn, copies):
    graph = make_fx(fn, tracing_mode="fake")(torch.empty(7, 5, device="meta")).graph
    assert [g.copies_to_host(n) for n in g.body(graph)] == copies
