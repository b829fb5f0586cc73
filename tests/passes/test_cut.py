"""Where segments end: at collectives, at barriers; what may slide, what comes first, what keeps its order."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dbo_compile import graph as g
from dbo_compile.ir.tokens import Local, Shared, Split, TokenMap
from dbo_compile.passes.cut import cut, is_heavy, unsplit_writes

c10d = torch.ops._c10d_functional


def exchange(x):
    """A collective as AOTAutograd has it: the op, and waiting for it."""
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", "g"))


def traced(fn, *sizes):
    return make_fx(fn, tracing_mode="fake")(*[torch.empty(s) for s in sizes]).graph


def token_map(graph, *, shared=(), barriers=()):
    """All values are rows of tokens, but for those named; of inputs, the second and later ones are shared."""
    first, *others = g.inputs(graph)
    places = {n: Split(0) for n in graph.nodes} | dict.fromkeys(others, Shared()) | {first: Split(0)}
    named = {n.name: n for n in graph.nodes}
    places |= {named[name]: Shared() for name in shared}
    return TokenMap(places, {named[name]: "it is one" for name in barriers}, {}, {})


def groups_of(fn, *sizes, **marks):
    """`kind [once]: ops` of each group."""
    graph = traced(fn, *sizes)
    made = cut(graph, token_map(graph, **marks))
    once = {True: "", False: " once"}
    return [
        f"{x.mode.kind.value}{once[x.mode.per_microbatch]}: {' '.join(n.name for n in x.nodes)}" for x in made.groups
    ]


def test_without_borders_all_is_one_group():
    assert groups_of(lambda x: x.sin().cos().exp(), (7, 3)) == ["compute: sin cos exp"]


def test_a_collective_is_a_group_with_its_wait_between_what_it_needs_and_what_needs_it():
    assert groups_of(lambda x: exchange(x.sin()).cos(), (7, 3)) == [
        "compute: sin", "comm: all_reduce wait_tensor", "compute: cos",
    ]  # fmt: skip


def test_collectives_are_groups_of_their_own_even_side_by_side():
    assert groups_of(lambda x: exchange(x.sin()) + exchange(x.cos()), (7, 3)) == [
        "compute: sin cos", "comm: all_reduce wait_tensor", "comm: all_reduce_1 wait_tensor_1", "compute: add",
    ]  # fmt: skip


def test_collectives_keep_the_order_of_the_graph_though_a_later_one_waits_for_less():
    def fn(x):
        late = exchange(exchange(x.sin()).cos())
        return late + exchange(x.exp())

    assert groups_of(fn, (7, 3)) == [
        "compute: sin exp", "comm: all_reduce wait_tensor", "compute: cos", "comm: all_reduce_1 wait_tensor_1",
        "comm: all_reduce_2 wait_tensor_2", "compute: add",
    ]  # fmt: skip


def test_what_neither_feeds_a_collective_nor_waits_for_it_is_a_filler_group():
    def fn(x, w):
        return exchange(x.sin()) + x @ w

    assert groups_of(fn, (7, 3), (3, 3)) == [
        "compute: sin", "compute: mm", "comm: all_reduce wait_tensor", "compute: add",
    ]  # fmt: skip


def test_what_is_cheap_moves_to_where_it_is_needed_and_what_is_heavy_does_not():
    def fn(x, w):
        cheap, heavy = x.cos().exp(), x @ w
        return exchange(x.sin()) + cheap + heavy

    assert groups_of(fn, (7, 3), (3, 3)) == [
        "compute: sin", "compute: mm", "comm: all_reduce wait_tensor", "compute: cos exp add add_1",
    ]  # fmt: skip


def test_a_barrier_is_played_once_between_groups_that_are_played_per_microbatch():
    assert groups_of(lambda x: x.sin().flip(0).cos(), (7, 3), barriers=["flip"]) == [
        "compute: sin", "compute once: flip", "compute: cos",
    ]  # fmt: skip


def test_barriers_side_by_side_are_one_group():
    assert groups_of(lambda x: x.sin().flip(0).roll(1).cos(), (7, 3), barriers=["flip", "roll"]) == [
        "compute: sin", "compute once: flip roll", "compute: cos",
    ]  # fmt: skip


def test_what_needs_no_tokens_comes_first_and_is_played_once():
    def fn(x, w):
        return exchange(x.sin()) @ (w @ w)

    assert groups_of(fn, (7, 3), (3, 3), shared=["mm"])[0] == "compute once: mm"


def test_a_view_of_a_weight_is_made_again_in_every_group_that_reads_it():
    def fn(x, w):
        return exchange(x @ w.t()) @ w.t()

    graph = traced(fn, (7, 3), (3, 3))
    names = [n.name for n in g.body(graph) if n.name.startswith("t")]
    made = cut(graph, token_map(graph, shared=names))
    assert sorted(n.name for n in made.constants) == names
    assert not {n.name for x in made.groups for n in x.nodes} & {*names}


def test_parts_of_a_weight_are_made_again_too_unless_they_are_returned():
    def fn(x, w):
        left, right = w.split(3, 1)
        return exchange(x @ left) @ right

    def returned(x, w):
        return fn(x, w), w.split(2)[1]

    graph = traced(fn, (7, 3), (3, 6))
    made = cut(graph, token_map(graph, shared=["split", "getitem", "getitem_1"]))
    assert sorted(n.name for n in made.constants) == ["getitem", "getitem_1", "split"]

    graph = traced(returned, (7, 3), (3, 6))
    shared = [n.name for n in g.body(graph) if n.name.startswith(("split", "getitem"))]
    made = cut(graph, token_map(graph, shared=shared))
    assert sorted(n.name for n in made.constants) == ["getitem", "getitem_1", "split"]
    assert [n.name for n in made.groups[0].nodes] == ["split_1", "getitem_2", "getitem_3"]


def test_a_view_of_a_weight_that_is_written_is_no_constant():
    def fn(x, w):
        view = w.t()
        w.add_(1)
        return x @ view

    graph = traced(fn, (7, 3), (3, 3))
    assert cut(graph, token_map(graph, shared=["t", "add_"])).constants == frozenset()


def test_parts_of_a_result_stay_with_the_op_that_made_them():
    def fn(x):
        first, second = x.sin().split(2)
        return exchange(first) + second.sum(), second

    first = groups_of(fn, (4, 3))[0]
    assert first.startswith("compute: sin split getitem getitem_1")


def test_a_write_comes_after_the_groups_that_read_what_it_overwrites():
    def fn(x, w):
        read = exchange((x + w).sin())
        w.add_(1)
        return read

    graph = traced(fn, (7, 3), (7, 3))
    made = cut(graph, token_map(graph, shared=["add_"], barriers=["add_"]))
    (write,) = [x for x in made.groups if any(n.name == "add_" for n in x.nodes)]
    assert [n.name for n in write.after] == ["add"]


def test_random_numbers_are_drawn_in_the_order_of_the_graph():
    def fn(x):
        first = torch.bernoulli(exchange(x))
        return first, torch.bernoulli(x.sin())

    graph = traced(fn, (7, 3))
    made = cut(graph, token_map(graph, barriers=["bernoulli", "bernoulli_1"]))
    drawn = [n.name for x in made.groups for n in x.nodes if "bernoulli" in n.name]
    assert drawn == ["bernoulli", "bernoulli_1"]


KINDS = (
    lambda a, _: exchange(a), lambda a, b: a + b, lambda a, b: a @ b, lambda a, _: a.sin(), lambda a, _: a.flip(0),
)  # fmt: skip


def random_graph(seed):
    """Twenty ops on what was made before, a fifth of them collectives; and which of them are barriers."""
    random = torch.Generator().manual_seed(seed)

    def pick(n):
        return int(torch.randint(0, n, (), generator=random))

    choices = [(pick(5), pick(1000), pick(1000)) for _ in range(20)]

    def fn(x, w):
        values = [x, w]
        for kind, i, j in choices:
            a, b = values[i % len(values)], values[j % len(values)]
            values.append(KINDS[kind](a, b))
        return values[-1], values[-3]

    return traced(fn, (3, 3), (3, 3))


@pytest.mark.parametrize("seed", range(12))
def test_every_played_node_is_in_one_group_and_groups_respect_the_flow_of_data(seed):
    graph = random_graph(seed)
    flips = [n.name for n in g.body(graph) if n.name.startswith("flip")]
    made = cut(graph, token_map(graph, barriers=flips))
    nodes = [n for x in made.groups for n in x.nodes]
    assert sorted(n.name for n in nodes) == sorted(n.name for n in g.body(graph) if n not in made.constants)
    at = {n: i for i, x in enumerate(made.groups) for n in x.nodes}
    for node in nodes:
        assert all(at[n] <= at[node] for n in node.all_input_nodes if n in at)
    for x in made.groups:
        assert sum("all_reduce" in n.name for n in x.nodes) <= 1
        assert [*x.nodes] == sorted(x.nodes, key=[*graph.nodes].index)


def test_the_cut_is_the_same_every_time():
    graph = random_graph(3)
    assert cut(graph, token_map(graph)) == cut(graph, token_map(graph))


def test_products_sorts_and_ops_of_others_are_heavy_and_the_rest_is_not():
    graph = traced(lambda x, w: (x @ w).sort(0)[0].sin().softmax(1), (7, 3), (3, 3))
    assert [n.name for n in g.body(graph) if is_heavy(n)] == ["mm", "sort"]


def test_writing_what_all_tokens_share_is_told_from_writing_rows_of_tokens():
    def fn(x, w):
        x.add_(1)
        return w.add_(x.sum(0))

    graph = traced(fn, (7, 3), (3,))
    tokens = token_map(graph)
    (group,) = cut(graph, tokens).groups
    assert unsplit_writes(group, tokens)
    all_split = TokenMap(dict.fromkeys(tokens.places, Split(0)), {}, {}, {})
    assert not unsplit_writes(group, all_split)


def test_a_write_to_places_of_its_own_requests_keeps_no_order_unless_a_request_straddles():
    graph = traced(lambda x, w: w.add_(x.sum(0)), (7, 3), (3,))
    places = token_map(graph).places
    writers = {n: None for n in g.body(graph) if n.name == "add_"}
    tokens = TokenMap(places, {}, {}, {}, paged=writers)
    (group,) = cut(graph, tokens).groups
    assert unsplit_writes(group, tokens)
    assert not unsplit_writes(group, tokens, straddles=False)


def test_local_rows_are_played_per_microbatch():
    graph = traced(lambda x: x.sin(), (7, 3))
    tokens = TokenMap({n: Local() for n in graph.nodes}, {}, {}, {})
    assert [x.mode.per_microbatch for x in cut(graph, tokens).groups] == [True]
