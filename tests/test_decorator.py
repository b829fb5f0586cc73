"""The decorator: what it is put on, what stays as it was, sizes, padding, and arguments that are wrong."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import re
import weakref

import pytest
import torch
from torch import nn

import dbo_compile
from dbo_compile import compat, reports
from dbo_compile.report import new_reports

OPTIONS = {"split": "always", "inner": "eager"}
EXACT = {"rtol": 0.0, "atol": 1e-12}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 3).double()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x, positions=None, *, scale=2.0):
        """Doc of forward."""
        y = self.linear(x).tanh() * scale
        return (y, y.sum(1)) if positions is None else (y, (positions * scale).sum(0))


@dbo_compile.dbo(token_dims={"x": 0, "positions": -1}, pad_to="auto", **OPTIONS)
class Decorated(Model):
    def forward(self, x, positions=None, *, scale=2.0):
        """Doc of forward."""
        return super().forward(x, positions, scale=scale)


def on_instance(**options):
    return dbo_compile.dbo(Model(), token_dims={"x": 0, "positions": -1}, **OPTIONS | {"pad_to": "auto"} | options)


def on_function(**options):
    return dbo_compile.dbo(Model().forward, token_dims={"x": 0, "positions": -1}, **OPTIONS | options)


def tokens(n):
    return torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def check(model, *args, **kwargs):
    with torch.no_grad():
        got, want = model(*args, **kwargs), Model()(*args, **kwargs)
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("make", [Decorated, on_instance, on_function])
def test_every_size_is_played_by_one_graph_and_gives_what_it_gave(make):
    model, before = make(), reports()
    for n in (37, 1, 5, 129, 2):
        check(model, tokens(n))
    (report,) = new_reports(before)
    assert (report.calls, report.calls_split) == (5, 4)  # one token is fewer than min_tokens


def test_the_model_is_traced_once(monkeypatch):
    def trace_again(reason):
        pytest.fail(reason)

    monkeypatch.setattr(compat, "trace_again", trace_again)
    model = on_instance()
    for n in (9, 4):
        check(model, tokens(n), torch.arange(3 * n).view(3, n))


def test_arguments_may_be_given_in_any_form():
    model = on_instance()
    check(model, tokens(7), scale=3.0)
    check(model, x=tokens(9))
    check(model, tokens(7), torch.arange(21).reshape(3, 7))
    check(model, tokens(7), positions=torch.arange(14).reshape(2, 7), scale=0.5)


def test_results_of_other_shapes_keep_their_size():
    def fn(x):
        blocks = x.repeat_interleave(3, 0)  # three rows a token
        return {"rows": blocks, "table": x.new_ones(8, 2), "inner": x.T}

    run = dbo_compile.dbo(fn, token_dims={"x": 0}, pad_to=[8, 16], **OPTIONS)
    for n in (7, 5):
        with torch.no_grad():
            got = run(tokens(n))
        torch.testing.assert_close(got, fn(tokens(n)), **EXACT)


def test_an_input_that_is_written_in_place_is_written_without_its_padding():
    def fn(x, cache):
        cache.add_(x.sum(1))
        return cache * 2

    run = dbo_compile.dbo(fn, token_dims={"x": 0, "cache": 0}, pad_to=[16], **OPTIONS)
    mine, eager = torch.ones(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(tokens(7), mine), fn(tokens(7), eager), **EXACT)
            torch.testing.assert_close(mine, eager, **EXACT)


def test_a_step_without_tokens_gives_results_without_tokens():
    model = on_instance()
    with torch.no_grad():
        assert model(tokens(0)) is None  # nothing is known yet of what comes out
        check(model, tokens(7))
        assert [list(y.shape) for y in model(tokens(0))] == [[0, 3], [0]]
        assert model.forward.idle_step() is None


def test_a_step_may_be_announced():
    model = on_instance()
    check(model, tokens(7))
    model.forward.agree_ahead(9)
    check(model, tokens(9))
    model.forward.agree_ahead(9)
    with pytest.raises(dbo_compile.errors.Disagreement, match=r"announced .*num_tokens=9.* but came with .*=11"):
        check(model, tokens(11))


@torch.library.custom_op("dbo_test_decorator::seen", mutates_args=())
def seen(x: torch.Tensor) -> torch.Tensor:
    SEEN.append(x.tolist())
    return x.clone()


seen.register_fake(torch.empty_like)
dbo_compile.register_rule(torch.ops.dbo_test_decorator.seen.default)(lambda x: x.place)
SEEN = []


def test_values_of_padding_are_those_asked_for():
    run = dbo_compile.dbo(lambda x, slots: (x * 2, seen(slots)), token_dims={"x": 0, "slots": 0}, pad_to=[8],
                          pad_values={"slots": -1}, min_tokens=9, **OPTIONS)  # fmt: skip
    SEEN.clear()
    with torch.no_grad():
        for _ in range(2):
            run(tokens(5), torch.arange(5))
    assert SEEN == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, -1, -1, -1]]  # at first nobody knows whether it may be padded


@pytest.mark.parametrize("make", [Decorated, on_instance])
def test_what_is_decorated_looks_as_it_did(make):
    model, plain = make(), Model()
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert model.forward.__doc__ == "Doc of forward."
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]


@pytest.mark.parametrize("make", [Decorated, on_instance])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_decorated_too_and_know_nothing_of_each_other(make, copied):
    model = make()
    check(model, tokens(7))
    other = copied(model)
    with torch.no_grad():
        other.linear.weight.zero_()
        assert torch.equal(other(tokens(3))[0], Model().linear.bias.tanh().mul(2).expand(3, 3))
    check(model, tokens(7))


def test_a_bound_method_keeps_its_model_alive_and_can_be_copied():
    forward = Decorated().forward
    for bound in (forward, copy.deepcopy(forward), pickle.loads(pickle.dumps(forward))):
        check(bound, tokens(7))
    idle_step = Decorated().forward.idle_step
    fails("idle_step has seen no call yet", idle_step)
    assert forward == forward.owner.forward
    assert hash(forward) == hash(forward.owner.forward)
    assert forward != Decorated().forward


def test_a_model_that_nobody_has_any_more_is_gone_though_it_was_compiled():
    model = Decorated()
    check(model, tokens(7))
    check(model.forward, tokens(9))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("make", [Decorated, on_instance])
@pytest.mark.parametrize("strict", [False, True])
def test_what_is_decorated_can_be_exported(make, strict):
    program = torch.export.export(make(), (tokens(7),), strict=strict)
    torch.testing.assert_close(program.module()(tokens(7)), Model()(tokens(7)), **EXACT)


@pytest.mark.parametrize("make", [Decorated, on_instance])
def test_as_part_of_something_compiled_it_is_what_it_was(make):
    model = make()
    run = torch.compile(lambda x: model(x)[0] + 1, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(tokens(7)), Model()(tokens(7))[0] + 1, **EXACT)


def test_no_grad_may_be_inside_or_outside():
    @dbo_compile.dbo(token_dims={"x": 0}, **OPTIONS)
    @torch.no_grad()
    def inside(x):
        return x * 2

    outside = torch.no_grad()(dbo_compile.dbo(lambda x: x * 2, token_dims={"x": 0}, **OPTIONS))
    x = tokens(7).requires_grad_()
    for fn in (inside, outside):
        assert torch.equal(fn(x), x * 2)
        assert not fn(x).requires_grad


def fails(match, call, *args, **kwargs):
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match=match):
        call(*args, **kwargs)


def test_wrong_decorations_are_errors():
    fails("'position' is no argument; did you mean 'positions'?", dbo_compile.dbo, Model(), token_dims={"position": 0})
    fails("'y' is no argument.* The arguments are: x, positions, scale",
          dbo_compile.dbo, Model(), token_dims={"x": 0, "y": 0})  # fmt: skip
    fails(r"pad_values has 'position', .* no input of tokens; did you mean 'positions'\? .* are: positions, x",
          on_instance, pad_values={"position": 1})  # fmt: skip
    fails("pad_values has 'scale', which is no input of tokens", on_instance, pad_values={"scale": 1})
    fails("pad_values has 'b', which is no input of tokens",
          dbo_compile.dbo, lambda x, **more: x, token_dims={"x": 0}, pad_values={"b": 1})  # fmt: skip
    fails("token_dims must name an argument", dbo_compile.dbo, Model(), token_dims={})
    fails("unknown option 'pad'", dbo_compile.dbo, Model(), token_dims={"x": 0}, pad=8)
    fails("decorates a Module, a class of Modules or a function, not int", dbo_compile.dbo, 3, token_dims={"x": 0})


def test_wrong_calls_are_errors_and_the_next_right_one_works():
    model = on_instance(pad_to=[8, 16])
    idle = model.forward.idle_step
    fails("idle_step has seen no call yet", idle)
    check(model, tokens(7))
    fails("17 tokens are more than the largest size in pad_to, 16", model, tokens(17))
    fails(r"one number of tokens \(positions: 6, x: 7\)", model, tokens(7), torch.ones(2, 6))
    fails(r"\(positions is missing, x is a list, not a tensor\)", model, [tokens(7)])
    fails(r"token_dims names dim 0 of x, whose shape is \[\]", model, torch.tensor(3.0))
    fails("missing a required argument: 'x'", model)
    fails("unexpected keyword argument 'y'", model, tokens(7), y=3)
    check(model, tokens(9))


def test_a_value_that_the_dtype_of_its_input_has_not_is_an_error():
    run = dbo_compile.dbo(lambda x, ids: x * ids[:, None], token_dims={"x": 0, "ids": 0}, pad_values={"ids": 0.5},
                          **OPTIONS)  # fmt: skip
    fails(r"pad_values\['ids'\]=0.5 is no value of torch.int64", run, tokens(7), torch.ones(7, dtype=torch.int64))


def both_ways(x):
    q, k, v = x[None, None].expand(3, 1, -1, -1)[:, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)[0, 0]


def in_two_graphs(x):
    y = x.exp()
    torch._dynamo.graph_break()
    return y - y.mean(0)


SEES_PADDING = {
    "a mean": (lambda x: x - x.mean(0), r"mean .* sees all tokens at once: it reduces over the token dim 0"),
    "the last token": (lambda x: x.exp()[-1], "select .* sees all tokens at once: it takes some of the tokens"),
    "attention to all": (both_ways, ".* attends to all tokens, and would to padding"),
    "the number of tokens": (lambda x: (x.exp(), x.shape[0]), "it returns the number of tokens"),
    "two graphs": (in_two_graphs, "mean .* sees all tokens at once"),
}


@pytest.mark.parametrize("what", SEES_PADDING)
def test_a_model_that_would_see_padding_is_not_padded_and_the_reason_is_logged_once(what, caplog):
    fn, reason = SEES_PADDING[what]
    caplog.set_level("INFO", logger="dbo_compile")
    before, run = reports(), dbo_compile.dbo(fn, token_dims={"x": 0}, pad_to=[8, 32], **OPTIONS)
    with torch.no_grad():
        for n in (7, 5, 8, 9):
            torch.testing.assert_close(run(tokens(n)), fn(tokens(n)), **EXACT)
    (found,) = [r.unpaddable for r in new_reports(before) if r.unpaddable]
    assert re.match(reason, found)
    assert [r.getMessage() for r in caplog.records].count(f"a graph is not padded: {found}") == 1


@pytest.mark.parametrize("split", ["auto", "never"])
def test_what_is_not_split_is_not_padded_either(split):
    """Nobody has looked whether padding would change it."""
    run = dbo_compile.dbo(lambda x: x - x.mean(0), token_dims={"x": 0}, pad_to=[8], inner="eager", split=split)
    shape = dbo_compile.dbo(lambda x: x.shape[0], token_dims={"x": 0}, pad_to=[8], inner="eager", split=split)
    with torch.no_grad():
        for n in (7, 1, 5):
            torch.testing.assert_close(run(tokens(n)), tokens(n) - tokens(n).mean(0), **EXACT)
            assert shape(tokens(n)) == n


def test_a_graph_that_must_not_be_padded_may_come_after_ones_that_may_be():
    def fn(x, whole):
        return x - x.mean(0) if whole else x.exp()

    before, run = reports(), dbo_compile.dbo(fn, token_dims={"x": 0}, pad_to=[8], **OPTIONS)
    with torch.no_grad():
        for n, whole in ((7, False), (5, False), (5, True), (7, False), (1, True)):
            torch.testing.assert_close(run(tokens(n), whole), fn(tokens(n), whole), **EXACT)
    assert [r.calls for r in new_reports(before) if r.split] == [3, 1]


def test_where_part_of_a_padded_step_was_played_it_is_an_error_once():
    def fn(x, whole):
        y = x.exp()
        torch._dynamo.graph_break()
        return y - y.mean(0) if whole else y * 2

    run = dbo_compile.dbo(fn, token_dims={"x": 0}, pad_to=[8], **OPTIONS)
    with torch.no_grad():
        for n in (7, 5):
            torch.testing.assert_close(run(tokens(n), False), fn(tokens(n), False), **EXACT)
        with pytest.raises(dbo_compile.errors.Unpaddable, match=r"a graph .* cannot be padded: mean .* not padded"):
            run(tokens(5), True)
        for whole in (True, False):
            torch.testing.assert_close(run(tokens(5), whole), fn(tokens(5), whole), **EXACT)


def test_arguments_without_names_are_refused():
    run = dbo_compile.dbo(lambda x, *more: x, token_dims={"x": 0}, **OPTIONS)
    fails("takes its arguments by name, but more has none", run, tokens(7), 3)


@pytest.mark.parametrize(
    ("name", "advice"), [("m.bais", "m has no 'bais'; did you mean 'bias'?"), ("m.inner.bias", "no 'inner.bias'")]
)
def test_a_member_that_is_not_there_is_an_error_that_names_the_nearest(name, advice):
    fn = dbo_compile.dbo(lambda x, m: x + m["bias"], token_dims={"x": 0, name: 0}, pad_to=[8], inner="eager")
    with pytest.raises(ValueError, match=re.escape(advice)):
        fn(torch.randn(6, 3), {"bias": torch.randn(6, 3)})


def test_a_step_of_one_token_needs_no_padding_where_none_was_asked_for():
    fn = dbo_compile.dbo(lambda x: x - x.mean(0), token_dims={"x": 0}, inner="eager", split="always")
    for n in (5, 1, 2, 1):
        x = torch.randn(n, 3)
        torch.testing.assert_close(fn(x), x - x.mean(0))
