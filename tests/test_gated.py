"""The gate from end to end: ops that mix tokens although nothing says so never change an answer."""

from __future__ import annotations

import logging

import pytest
import torch

import dbo_compile
from dbo_compile import reports
from dbo_compile.ir.tokens import Local

lib = torch.library.Library("gated", "DEF")
lib.define("average(Tensor x) -> Tensor")
lib.define("exchange(Tensor x) -> Tensor")
lib.define("first_nine(Tensor x) -> Tensor")


@torch.library.impl(lib, "average", "CPU")
def average(x):
    return x.mean(0, keepdim=True).expand_as(x).clone()


@torch.library.impl(lib, "exchange", "CPU")
def exchange(x):
    return x.roll(1, 0)  # rows do not come back to where they went from


@torch.library.impl(lib, "first_nine", "CPU")
def first_nine(x):
    return x * (torch.arange(len(x)) < 9)[:, None]


@torch.library.register_fake("gated::first_nine")
@torch.library.register_fake("gated::average")
@torch.library.register_fake("gated::exchange")
def empty_like(x):
    return torch.empty_like(x)


dbo_compile.register_rule(torch.ops.gated.average.default)(lambda x: x.place)  # a lie
dbo_compile.register_rule(torch.ops.gated.first_nine.default)(lambda x: x.place)  # one that small steps do not show
dbo_compile.register_comm_op(torch.ops.gated.exchange.default, rule=lambda x: Local())


def mixed(x, _key):
    return torch.ops.gated.average(x.exp()) * 2, x + 1


def routed(x, key):
    order = key.argsort()
    rows = torch.ops.gated.exchange(x[order].exp())
    return rows[order.argsort()].sin(), x + 1


def vouched(x, key):
    order = key.argsort()
    rows = torch.ops.gated.exchange(x[order].exp())
    with dbo_compile.token_local():
        back = rows[order.argsort()].sin()
    return back, x + 1


def written(x, state):
    state.add_(torch.ops.gated.average(x).sum(0))
    return x * state


def inputs(num_tokens):
    made = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 5, dtype=torch.float64, generator=made)
    return x, torch.randint(0, 4, (num_tokens,), generator=made)


def compiled(fn, **options):
    return torch.compile(fn, backend="dbo", options={"split": "always", "inner": "eager", **options}, fullgraph=True)


def check(run, fn, num_tokens):
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs(num_tokens)), fn(*inputs(num_tokens)), rtol=0, atol=1e-12)


def test_a_rule_that_lies_is_found_out_and_the_answers_are_right(caplog):
    run = compiled(mixed)
    with caplog.at_level(logging.WARNING, "dbo_compile"):
        for num_tokens in (9, 6, 9):
            check(run, mixed, num_tokens)
    report = reports()[-1]
    assert report.reason.startswith("splitting changed result 0 of the graph, in 9 of 9 rows: some op mixes tokens")
    assert not report.split
    assert [record.message for record in caplog.records] == [
        f"{report.reason}. The graph is not split any more; dbo_compile.explain shows its ops"
    ]


def test_a_lie_that_small_steps_do_not_show_is_found_out_in_the_first_large_one():
    def capped(x, _key):
        return (torch.ops.gated.first_nine(x.exp()),)

    run = compiled(capped)
    for num_tokens in (6, 9, 40, 60):
        check(run, capped, num_tokens)
    report = reports()[-1]
    assert "in 9 of 40 rows" in report.reason
    assert (report.calls, report.calls_split) == (4, 3)


def test_a_step_that_is_not_padded_is_judged_by_the_tokens_it_has():
    """Its bucket has more than twice as many: judged by that, it would be judged in every call."""
    run = compiled(lambda x, _key: (x.exp(), x.mean(0)), pad_to=(64,))
    for _ in range(2):
        check(run, lambda x, _key: (x.exp(), x.mean(0)), 20)
    engine = reports()[-1].engine
    assert engine.signature.unpaddable
    assert not engine.gate.wants(20)
    played, player = [], engine.player
    engine.player = lambda module, rows, args: played.append(rows) or player(module, rows, args)
    check(run, lambda x, _key: (x.exp(), x.mean(0)), 20)
    assert len(played) == 1


def test_without_the_gate_the_lie_would_be_believed():
    run = compiled(mixed, gate="never")
    with torch.no_grad():
        got, want = run(*inputs(9)), mixed(*inputs(9))
    assert not torch.allclose(got[0], want[0], atol=0.1)


def test_what_was_taken_on_trust_becomes_a_barrier_once_it_is_refuted(caplog):
    run = compiled(routed)
    with caplog.at_level(logging.WARNING, "dbo_compile"):
        for num_tokens in (9, 6, 9):
            check(run, routed, num_tokens)
    report = reports()[-1]
    assert report.split
    assert report.obligations == {}
    assert any("equality gate" in reason for reason in report.barriers.values())
    assert report.calls_split == 3
    assert len(caplog.records) == 1
    assert "is not taken on trust any more" in caplog.records[0].message


def test_what_the_user_vouches_for_is_not_on_trust_and_a_wrong_word_is_found_out():
    """Nothing is left that could be made a barrier, so all of it is played unsplit."""
    x, key = inputs(10)
    with torch.no_grad():
        torch.testing.assert_close(compiled(vouched)(x, key), vouched(x, key))
    report = reports()[-1]
    assert report.obligations == {}
    assert not report.split
    assert "splitting changed" in report.reason


def test_state_that_is_written_in_place_is_written_once_whatever_the_gate_finds():
    run = compiled(written)
    mine, eager = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        for num_tokens in (9, 6, 9):
            x = inputs(num_tokens)[0]
            torch.testing.assert_close(run(x, mine), written(x, eager), rtol=0, atol=1e-12)
            torch.testing.assert_close(mine, eager, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("gate", "plays"), [("never", 3), ("first-call", 4), ("every-call", 6)])
def test_the_gate_plays_unsplit_as_often_as_it_was_asked_to(gate, plays):
    run = compiled(lambda x, _key: x.exp(), gate=gate)
    check(run, lambda x, _key: x.exp(), 9)
    engine = reports()[-1].engine
    played, player = [], engine.player

    def counted(module, rows, args):
        played.append(rows)
        return player(module, rows, args)

    engine.player = counted
    for _ in range(2):
        check(run, lambda x, _key: x.exp(), 9)
    assert len(played) == {"never": 2, "first-call": 2, "every-call": 4}[gate]
    assert plays - len(played) in (1, 2)
