"""Capture, through the backend: which inputs carry tokens, what later calls find, what a graph may take and return."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dbo_compile import log, reports
from dbo_compile.report import new_reports

ALWAYS = {"split": "always", "inner": "eager"}
INDUCTOR = {"split": "always"}
EXACT = {"rtol": 0.0, "atol": 1e-12}


def values(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check(fn, *calls, options=ALWAYS, fullgraph=True, mark=()):
    """Compile `fn`, play every call of `calls`, compare with eager what it returns and what it writes; the new reports.

    `mark` are dims of the arguments, one each, that the caller marks as dynamic.
    """
    before = reports()
    compiled = torch.compile(fn, backend="dbo", options=options, fullgraph=fullgraph)
    with torch.no_grad():
        for make in calls:
            mine, eager = make(), make()
            for x, dim in zip(mine, mark, strict=bool(mark)):
                torch._dynamo.mark_dynamic(x, dim)
            torch.testing.assert_close(compiled(*mine), fn(*eager), **EXACT)
            torch.testing.assert_close(mine, eager, **EXACT)
    return new_reports(before)


def rows(*sizes, width=5):
    return [lambda n=n: (values(n, width),) for n in sizes]


def calls_of(found):
    return [(r.calls, r.calls_split) for r in found]


# -- sizes --


def test_later_sizes_reuse_one_compilation():
    assert calls_of(check(lambda x: x.exp().sin(), *rows(9, 4, 17, 2))) == [(4, 4)]


def test_a_second_dim_may_be_dynamic_as_well():
    def fn(x):
        n, length, _ = x.shape
        return (x.exp().view(n * length, 3) * 2).view(n, length, 3).cumsum(1)

    sizes = [(9, 5), (4, 6), (5, 7), (6, 6)]
    calls = [lambda s=s: (torch.ones(*s, 3, dtype=torch.float64),) for s in sizes]
    assert calls_of(check(fn, *calls, mark=(1,))) == [(4, 4)]


def two(x, y):
    return x.exp(), y.sin()


def listed(xs):
    return xs[0].exp(), xs[1].sin()


def test_two_symbols_that_disagree_at_a_later_call_are_played_as_traced():
    sizes = [(6, 6), (6, 9), (9, 9)]
    calls = [lambda s=s: (values(s[0], 3), values(s[1], 4)) for s in sizes]
    (report,) = check(two, *calls, mark=(0, 0))
    assert (report.calls, report.calls_split) == (3, 2)
    assert report.decline_counts == {"its inputs differ in their number of tokens (x: 6, y: 9); see token_dims": 1}


def test_inputs_of_the_same_name_are_told_apart():
    compiled = torch.compile(listed, backend="dbo", options=ALWAYS, fullgraph=True)
    with torch.no_grad():
        for sizes in [(6, 6), (6, 9), (9, 4)]:
            xs = [values(n, 3) for n in sizes]
            for x in xs:
                torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(xs), listed(xs), **EXACT)
    assert reports()[-1].decline_counts == {
        f"its inputs differ in their number of tokens (xs: {a}, xs: {b}); see token_dims": 1
        for a, b in [(6, 9), (9, 4)]
    }


# -- token dims --


def test_arguments_are_called_as_the_user_calls_them():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(5, 5, dtype=torch.float64)])
            self.register_buffer("bias", values(5))

        def forward(self, x, *more, **named):
            return self.layers[0](x) * more[0] + named["offset"] + self.bias

    model = Scaled()
    compiled = torch.compile(model, backend="dbo", options=ALWAYS, fullgraph=True)
    with torch.no_grad():
        compiled(values(6, 5), values(6, 5), offset=values(6, 5))
    inputs = reports()[-1].levels.outline.inputs
    owned = {"layers_0_weight", "layers_0_bias", "bias"}
    assert {*inputs} - owned == {"x", "more", "offset", *(n for n in inputs if n[0] == "s" and n[1:].isdigit())}
    assert owned < {*inputs}
    assert any("x#0" in str(i) for i in reports()[-1].levels.program.instrs)


@pytest.mark.parametrize("options", [ALWAYS, INDUCTOR], ids=["eager", "inductor"])
def test_no_name_of_an_argument_is_taken_for_one_of_ours(options):
    def fn(self, rows, start, lanes, x, x_0, add, buf0, torch_):
        numbered = rows + torch.arange(rows.shape[0]).unsqueeze(1)  # reads the number of rows, and those before
        return (self + numbered * start - lanes).cumsum(1), x * x_0 + add - buf0 / torch_.sum(0)

    def call(n):
        return lambda: tuple(values(n, 5, seed=i) for i in range(9))

    assert calls_of(check(fn, call(8), call(5), options=options)) == [(2, 2)]


def test_parameters_and_buffers_are_never_taken_for_tokens():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(values(7, 5))
            self.register_buffer("shift", values(7, 5, seed=2))

        def forward(self, x):
            return x @ (self.weight + self.shift).T

    (report,) = check(Table(), *rows(7, 9))
    assert [t.name for t in report.engine.signature.token_inputs] == ["x"]


WIDTHS = {
    "a global": lambda x: (x @ SQUARE).sin(),
    "an argument": lambda x, w: (x @ w).sin(),
    "an argument before the tokens": lambda w, x: (x @ w).sin(),
    "a factor for each column": lambda x, s: x * s,
    "a table as well": lambda x: x + TABLE[(x @ SQUARE).argmax(-1)],
}
SQUARE, TABLE = values(8, 4, seed=2), values(64, 8, seed=3)


@pytest.mark.parametrize("what", WIDTHS)
@pytest.mark.parametrize("options", [ALWAYS, INDUCTOR], ids=["eager", "inductor"])
def test_what_is_as_long_as_the_tokens_of_the_first_call_need_not_carry_any(what, options):
    """The first call has as many tokens as a token is wide."""
    of_columns = {
        "an argument": [SQUARE],
        "an argument before the tokens": [SQUARE],
        "a factor for each column": [TABLE[0]],
    }
    others = of_columns.get(what, [])
    order = -1 if "before" in what else 1
    calls = [lambda n=n: tuple([values(n, 8), *[w.clone() for w in others]][::order]) for n in (8, 60, 61, 9)]
    (report, *_) = check(WIDTHS[what], *calls, options=options)
    assert (report.calls, report.calls_split) == (4, 4)


@pytest.mark.parametrize("dim", [1, -1])
def test_token_dims_name_a_dim(dim):
    (report,) = check(lambda x: x.exp(), *[lambda n=n: (values(3, n),) for n in (7, 9)],
                      options=ALWAYS | {"token_dims": {"x": dim}})  # fmt: skip
    assert [(t.name, t.dim) for t in report.engine.signature.token_inputs] == [("x", 1)]
    assert report.calls_split == 2


@pytest.fixture
def warned(caplog):
    """The warnings of a test, as if there had been none before."""
    log._warned.clear()
    return lambda: [r.getMessage() for r in caplog.records if r.name == "dbo_compile" and r.levelname == "WARNING"]


def test_token_dims_that_name_nothing_leave_the_guess_and_say_so_once(warned):
    (report,) = check(lambda x: x.exp(), *rows(9), options=ALWAYS | {"token_dims": {"ids": 1}})
    assert [(t.name, t.dim) for t in report.engine.signature.token_inputs] == [("x", 0)]
    assert warned() == ["token_dims names 'ids', which this graph has not; its inputs are: x"]


def test_names_of_pad_values_that_a_graph_has_not_are_said_once(warned):
    options = ALWAYS | {"token_dims": {"x": 0, "y": 0}, "pad_values": {"y": 1, "z": 2, "xs": 3}, "pad_to": [16]}
    check(two, *[lambda n=n: (values(n, 7), values(n, 5)) for n in (9, 4)], options=options)
    assert warned() == ["pad_values names 'xs', 'z', which this graph has not; its inputs are: x, y"]


def test_a_name_is_not_missing_where_the_graph_has_another_one(warned):
    check(two, lambda: (values(9, 7), values(9, 5)), options=ALWAYS | {"token_dims": {"x": 0, "z": 0}})
    assert warned() == []


@pytest.mark.parametrize(
    ("fn", "inputs", "token_dims", "message"),
    [
        (two, (values(3, 7), values(4, 5)), {"x": -1, "y": 0}, r"x \(dim 1\): 7, y \(dim 0\): 4"),
        (listed, ([values(3, 7), values(4, 5)],), {"xs": -1}, r"xs \(dim 1\): 7, xs \(dim 1\): 5"),
        (two, (values(3, 7), values(3, 5)), {"y": 2}, r"dim 2 of y, whose shape is \[3, 5\]"),
        (two, (values(3, 7), values(3, 5)), {"y": -3}, r"dim -3 of y, whose shape is \[3, 5\]"),
    ],
    ids=["sizes", "one_name", "above", "below"],
)
def test_wrong_token_dims_are_an_error(fn, inputs, token_dims, message):
    compiled = torch.compile(fn, backend="dbo", options=ALWAYS | {"token_dims": token_dims}, fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match=message):
        compiled(*inputs)


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(values(50, 6))

    def forward(self, x, positions):
        return x + self.table[positions].sum(0), positions + 1


@pytest.mark.parametrize(
    ("width", "options"),
    [(0, ALWAYS), (20, ALWAYS), (20, INDUCTOR)],
    ids=["dense", "cut_from_a_buffer", "cut_from_a_buffer_inductor"],
)
def test_positions_with_tokens_in_dim_1_are_sliced_to_the_layout_that_the_code_expects(options, width):
    def make(n):
        return values(n, 6), torch.arange(3 * (width or n)).view(3, -1)[:, :n] % 50

    options = options | {"token_dims": {"x": 0, "positions": 1}}
    calls = [lambda n=n: make(n) for n in (9, 4, 20)]
    assert calls_of(check(Rotary(), *calls, options=options)) == [(3, 3)]


STRIDED = {
    "columns of a wider table": lambda n: (values(n, 11)[:, 2:7],),
    "every other row": lambda n: (values(2 * n, 5)[::2],),
    "one row repeated": lambda n: (values(1, 5).expand(n, 5),),
    "transposed": lambda n: (values(5, n).t(),),
    "all alike": lambda n: (values(1, 1).expand(n, 5),),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_inputs_may_lie_in_memory_in_any_way(layout):
    calls = [lambda n=n: STRIDED[layout](n) for n in (9, 4, 12)]
    assert calls_of(check(lambda x: x.exp().sum(1), *calls)) == [(3, 3)]


def test_inputs_of_every_layout_go_through_inductor():
    def fn(*xs):
        return [x.exp().sum(1) for x in xs]

    calls = [lambda n=n: tuple(x for make in STRIDED.values() for x in make(n)) for n in (9, 4, 12)]
    assert calls_of(check(fn, *calls, options=INDUCTOR)) == [(3, 3)]


# -- graphs of a frame --


def test_every_graph_of_a_frame_with_breaks_is_split():
    def fn(x):
        y = x.exp()
        torch._dynamo.graph_break()
        z = y.sin()
        torch._dynamo.graph_break()
        return z.cos() * 2

    assert calls_of(check(fn, *rows(9, 4, 12), fullgraph=False)) == [(3, 3)] * 3


def shapes_first(x):
    n, h = x.shape
    y = x.view(n, h, 1).exp()
    return (y.sin().cos() * 1).view(n * h)


def number_over_a_break(x):
    y, n = x.exp(), x.shape[0]
    torch._dynamo.graph_break()
    return y.cos() * 1, n, None


@pytest.mark.parametrize("fn", [shapes_first, number_over_a_break])
def test_a_model_that_asks_for_shapes_need_not_be_one_graph(fn):
    found = check(fn, *rows(9, 4, 12), fullgraph=False)
    assert calls_of(found) == [(3, 3)] * len(found)


# -- results --

RESULTS = {
    "the input": lambda x: x,
    "its size": lambda x: (x.exp(), x.shape[0], x.shape[1]),
    "a number of its size": lambda x: (x.exp(), x.shape[0] * 2, x.shape[0] // 2 + 1),
    "such a number alone": lambda x: x.exp() * 0 + 1 if x.dim() == 3 else (x.shape[0] * 3, x.sin()),
    "a number that is a size as well": lambda x: (x.exp().view(x.shape[0] * 5), x.shape[0] * 5),
    "nothing and literals": lambda x: (None, x.exp(), 3.5, None),
    "the same twice": lambda x: (y := x.exp(), y, [y]),
    "constants": lambda x: (x.exp(), torch.arange(4), torch.tensor([3.0, 1.0]), torch.full((2,), 7)),
    "views of the input": lambda x: (x.t(), x[:, 2:4], x.view(-1), x.exp()),
    "an expanded result": lambda x: x.exp()[:, None].expand(-1, 3, -1),
    "only a barrier": lambda x: x.mean(0),
    "types": lambda x: (x > 0, x.half(), x.bfloat16(), x.long(), torch.complex(x, x), x.to(torch.complex64)),
    "no elements": lambda x: x[:, :0].exp(),
}


@pytest.mark.parametrize("what", RESULTS)
def test_a_graph_may_return(what):
    (report,) = check(RESULTS[what], *rows(9, 4, 12))
    assert (report.calls, report.calls_split) == (3, 3), report.decline_counts


def test_numbers_and_constants_are_returned_through_inductor():
    def fn(x):
        return x.exp()[:, torch.tensor([1, 3])], x.shape[0] * 2, torch.arange(4)

    assert calls_of(check(fn, *rows(9, 4), options=INDUCTOR)) == [(2, 2)]


@pytest.mark.parametrize("options", [ALWAYS, INDUCTOR])
def test_weights_may_be_taken_apart(options):
    weight = torch.randn(6, 5, dtype=torch.float64)

    def fn(x):
        gate, up = weight.chunk(2)
        total = (x @ up.t()).sum()  # a barrier: what comes after it is another segment
        return (x @ gate.t()) * total @ up, weight.split(4)[1]

    assert calls_of(check(fn, *rows(9, 4, 12), options=options)) == [(3, 3)]


BLOCKS = {
    "every expert for every token": lambda x: (x.repeat(3, 1).view(3, -1, 5) * THREE).view(-1, 5).view(3, -1, 5).sum(0),
    "blocks in another order": lambda x: (
        x.repeat(4, 1).view(2, 2, -1, 5).transpose(0, 1).reshape(-1, 5).view(4, -1, 5)[3]
    ),
    "a dim outside": lambda x: x.expand(3, -1, -1).reshape(-1, 5).sin().unflatten(0, (3, -1)).sum(0),
}
NO_BLOCKS = {
    "their sum": lambda x: x + x.repeat(3, 1).sum(0),
    "other blocks": lambda x: x.repeat(4, 1).view(2, -1, 5).sum(0).view(2, -1, 5).sum(0),
    "one of them": lambda x: x.repeat(2, 1)[x.shape[0] :],
    "returned": lambda x: x.repeat(2, 1).sin(),
    "with rows of their own": lambda x: x.repeat_interleave(2, 0) + x.repeat(2, 1),
    "row numbers": lambda x: x + torch.arange(x.shape[0]).repeat(2).view(2, -1)[1][:, None],
}
THREE = torch.arange(1.0, 4.0, dtype=torch.float64)[:, None, None]


@pytest.mark.parametrize("what", BLOCKS)
def test_blocks_of_all_tokens_are_split_without_a_barrier(what):
    (report,) = check(BLOCKS[what], *rows(9, 4, 12))
    assert (report.calls_split, report.barriers) == (3, {})


@pytest.mark.parametrize("what", NO_BLOCKS)
def test_blocks_that_are_needed_whole_are_made_of_all_tokens(what):
    (report,) = check(NO_BLOCKS[what], *rows(9, 4, 12))
    assert report.calls_split == 3
    assert report.barriers


def test_a_result_that_is_a_view_of_the_input_can_be_written_through():
    def fn(x):
        return x.t(), x[:, 2:4], x[2:], x.view(-1), x

    compiled = torch.compile(fn, backend="dbo", options=ALWAYS, fullgraph=True)
    for n in (9, 4, 12):
        mine, eager = values(n, 5), values(n, 5)
        with torch.no_grad():
            for got, want in zip(compiled(mine), fn(eager), strict=True):
                got.add_(1), want.add_(1)
        assert torch.equal(mine, eager)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.int32, torch.bool])
def test_tokens_may_be_of_any_type(dtype):
    x = values(9, 5).to(dtype)
    (report,) = check(lambda x: (x.clone(), x == x, x.unsqueeze(1), x.flip(1)), lambda: (x.clone(),))
    assert report.calls_split == 1


def test_parts_of_an_op_with_several_results_may_be_used():
    def fn(x):
        y = x.exp()
        return torch.topk(x, 2, -1)[1], x.frexp()[1], y.split([1, 2, 2], 1)[1], x.max(1).indices, y.unbind(1)[3]

    (report,) = check(fn, *rows(9, 4, 12))
    assert (report.calls_split, report.barriers) == (3, {})


# -- state --

WEIGHT = values(5, 5, seed=3)


def put_in_rows(x, cache, at):
    cache.index_put_((torch.arange(x.shape[0]), at), x.exp())
    return (cache.sum(1) @ WEIGHT).sin()


def put_in_layers(x, cache, at):
    for layer in range(2):
        cache[layer].index_put_((torch.arange(x.shape[0]), at), x.exp() * (layer + 1))
    return (cache.sum((0, 2)) @ WEIGHT).sin()


def copy_into_rows(x, cache, at):
    cache[:, 3].copy_(x.exp())
    cache[:, 4:6].add_(1)
    return (cache.sum(1) @ WEIGHT).sin() + at[:, None]


def copy_into_layers(x, cache, at):
    cache[1, :, 3].copy_(x.exp())
    cache[0].add_(x[:, None])
    return (cache.sum((0, 2)) @ WEIGHT).sin() + at[:, None]


@pytest.mark.parametrize(
    ("fn", "layers", "options"),
    [
        (put_in_rows, (), ALWAYS),
        (put_in_layers, (2,), ALWAYS),
        (copy_into_rows, (), ALWAYS),
        (copy_into_layers, (2,), ALWAYS),
        (put_in_layers, (2,), INDUCTOR),
    ],
    ids=["put_dim_0", "put_dim_1", "copy_dim_0", "copy_dim_1", "put_dim_1_inductor"],
)
def test_a_cache_is_written_in_place_wherever_its_tokens_are(fn, layers, options):
    def make(n):
        return values(n, 5), values(*layers, n, 8, 5, seed=2), torch.arange(n) * 3 % 8

    options = options | {"token_dims": {"x": 0, "cache": len(layers), "at": 0}}
    (report,) = check(fn, *[lambda n=n: make(n) for n in (9, 4, 12)], options=options)
    assert (report.calls_split, report.barriers) == (3, {})


def counted(x, counter, state):
    counter.add_(1)
    state.add_(x.exp() @ WEIGHT)
    return x * state.mean(0) + counter, state[:, 1] * 2


def read_before_written(x, counter, state):
    old = state.exp()
    new = (x + x.mean(0)) @ WEIGHT
    state.copy_(new)
    return old.sin() + state, counter * 2


def written_through_aliases(x, counter, state):
    some, flipped = state[:, 1:3], state.t()
    some.add_(x[:, 1:3])
    before = flipped.exp().t() @ WEIGHT
    flipped[0].mul_(2)
    return before + some.sum(1, keepdim=True) + state + counter


def written_after_a_barrier_read_it(x, counter, state):
    mean = state.mean(0)
    state.mul_(2)
    return (state - mean) @ WEIGHT, counter + state.sum(0)


@pytest.mark.parametrize("fn", [counted, read_before_written, written_through_aliases, written_after_a_barrier_read_it])
def test_state_is_read_and_written_in_the_order_of_the_model(fn):
    calls = [lambda n=n: (values(n, 5), torch.tensor([3.0]), values(n, 5, seed=4)) for n in (9, 4, 12)]
    assert calls_of(check(fn, *calls, options=ALWAYS | {"token_dims": {"x": 0, "state": 0}})) == [(3, 3)]


def test_buffers_of_a_module_are_written_once():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(20, 5, dtype=torch.float64))

        def forward(self, x):
            self.calls.add_(1)
            self.last[: x.shape[0]].copy_(x)
            return x.exp() * self.calls + self.last[: x.shape[0]]

    model, eager = Counting(), Counting()
    compiled = torch.compile(model, backend="dbo", options=ALWAYS, fullgraph=True)
    with torch.no_grad():
        for n in (9, 4, 12):
            torch.testing.assert_close(compiled(values(n, 5)), eager(values(n, 5)), **EXACT)
            assert torch.equal(model.calls, eager.calls)
            assert torch.equal(model.last, eager.last)
    assert reports()[-1].calls_split == 3


def test_an_intermediate_value_may_be_updated_in_rows_that_all_tokens_share():
    def fn(x, idx):
        y = x.exp() @ WEIGHT
        return y.index_put((idx,), torch.zeros(5, dtype=x.dtype)).sin()

    calls = [lambda n=n: (values(n, 5), torch.tensor([1, 0])) for n in (9, 4, 12)]
    assert calls_of(check(fn, *calls)) == [(3, 3)]


def test_random_numbers_are_those_of_eager():
    def fn(x):
        noise = torch.rand_like(x)
        y = (x.exp() + noise) @ WEIGHT
        more, same = torch.randn(x.shape[0], 5, dtype=x.dtype), torch.rand(5, dtype=x.dtype)
        return nn.functional.dropout(y, 0.3, training=True) * more + same

    compiled = torch.compile(fn, backend="dbo", options=ALWAYS, fullgraph=True)
    with torch.no_grad():
        for n in (9, 5, 12):
            torch.manual_seed(n)
            want = fn(values(n, 5))
            torch.manual_seed(n)
            torch.testing.assert_close(compiled(values(n, 5)), want, **EXACT)
    assert reports()[-1].calls_split == 3


# -- values between segments --


def views_of_the_input(x):
    first = x[:, :, 0]
    return (first * 1).sum(0) + (first - first.mean(1, keepdim=True)).sum(0)


def transposed(x):
    y = x.exp().permute(2, 1, 0)
    return (y - y.mean(1, keepdim=True)).permute(1, 2, 0).sin()


def strided_and_expanded(x):
    y = x[0].exp()
    some, many = y.t()[1:4], y[:, None].expand(-1, 3, -1)
    return (some - some.mean(1)[:, None]).t().sin() + (many - many.mean(0))[:, 0, 1:4].contiguous().view(-1, 3)


def inner_rows(x):
    y = torch.einsum("ath,h->at", x.exp(), x.new_ones(5))
    return (y - y.mean(1, keepdim=True)).sin()


LAYOUTS = [views_of_the_input, transposed, strided_and_expanded, inner_rows]


@pytest.mark.parametrize("fn", LAYOUTS)
def test_values_of_any_layout_pass_from_microbatches_to_a_barrier_and_back(fn):
    calls = [lambda n=n: (values(3, n, 5),) for n in (9, 4, 12)]
    (report,) = check(fn, *calls, options=ALWAYS | {"token_dims": {"x": 1}})
    assert (report.calls, report.calls_split) == (3, 3), report.decline_counts
    assert report.barriers


def test_values_of_any_layout_pass_through_inductor():
    calls = [lambda n=n: (values(3, n, 5),) for n in (9, 4, 12)]
    found = check(lambda x: [fn(x) for fn in LAYOUTS], *calls, options=INDUCTOR | {"token_dims": {"x": 1}})
    assert calls_of(found) == [(3, 3)]


# -- numbers of microbatches and of rows --


@pytest.mark.parametrize(("num_microbatches", "split"), [(3, [9, 4, 3, 13]), (4, [9, 4, 13])])
def test_there_may_be_more_than_two_microbatches(num_microbatches, split):
    (report,) = check(
        lambda x: x.exp() - x.exp().mean(0),
        *rows(9, 4, 3, 2, 13),
        options=ALWAYS | {"num_microbatches": num_microbatches},
    )
    assert report.calls_split == len(split)
    assert sum(report.decline_counts.values()) == 5 - len(split)
    assert all(f"do not make {num_microbatches} microbatches" in why for why in report.decline_counts)


def test_blocks_of_tokens_are_never_cut():
    def fn(x):
        return x.view(x.shape[0] // 4, 4, 5).softmax(1).view(x.shape[0], 5).exp()

    report = check(fn, *rows(16, 12, 8, 20))[0]
    assert (report.calls, report.calls_split) == (4, 2)
    assert report.engine.planner.rows_of(16) == (8, 8)
    assert report.engine.planner.rows_of(20) == (8, 12)
    assert all("no split of" in why and "T//4" in why for why in report.decline_counts)
