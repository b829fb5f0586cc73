from __future__ import annotations

import pytest
import sympy
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS as T
from dbo_compile.ir.tokens import Local, Number, Ruling, Shared, Split
from dbo_compile.rules import RULES
from dbo_compile.rules.collectives import CommOp, comm_op, is_wait, register_comm_op
from dbo_compile.rules.comm import FROM_GATHERED
from tests.rules.truth import ask, count, local, shared, tokens

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
autograd = torch.ops._c10d_functional_autograd

U = sympy.Symbol("u", integer=True, nonnegative=True)
OWN = Number(U, Local(position=True))
NUMBERED = Local(position=True)
GATHERED = "the 2 ranks of ep"
ROWS = local(3 * T, 4, order="by_expert")
INVERSE = local(3 * T, order="by_expert", position=True, inverse=True)
DEALS = "which rank a row goes to depends on its place among all tokens"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda: ask(c10d.all_to_all_single.default, ROWS, [OWN, OWN], [OWN, OWN], "ep"), Local()),
        (lambda: ask(c10d.all_to_all_single.default, local(10, position=True), [5, 5], [5, 5], "ep"), NUMBERED),
        (lambda: ask(c10d.all_to_all_single.default, tokens(2, T, 4), [1, 1], [1, 1], "ep"), Split(1)),
        (lambda: ask(autograd.all_to_all_single.default, tokens(3, 4, T), [1, 2], [2, 1], "ep"), Split(2)),
        (lambda: ask(c10d.all_reduce.default, tokens(T, 4), "sum", "tp"), Split(0)),
        (lambda: ask(c10d.all_reduce_.default, tokens(5, T), "avg", "tp"), Split(1)),
        (lambda: ask(c10d.all_reduce.default, ROWS, "sum", "tp"), Local("by_expert")),
        (lambda: ask(c10d.all_reduce.default, INVERSE, "sum", "tp"), NUMBERED),
        (lambda: ask(c10d.all_reduce.default, tokens(T, position=True), "sum", "tp"), Split(0)),
        (lambda: ask(c10d.all_reduce_coalesced.default, [tokens(T), shared(5)], "sum", "tp"), (Split(0), Shared())),
        (lambda: ask(c10d.broadcast.default, tokens(T, 4), 0, "tp"), Split(0)),
        (lambda: ask(c10d.all_gather_into_tensor.default, tokens(4, T), 2, "ep"), Split(1)),
        (lambda: ask(c10d.all_gather_into_tensor.default, tokens(T, 4), 2, "ep"), Local(GATHERED)),
        (lambda: ask(c10d.all_gather_into_tensor.default, ROWS, 2, "ep"), Local()),
        (lambda: ask(c10d.all_gather_into_tensor.default, INVERSE, 2, "ep"), NUMBERED),
        (
            lambda: ask(c10d.all_gather_into_tensor_coalesced.default, [tokens(T), shared(5), ROWS], 2, "ep"),
            (Local(GATHERED), Shared(), Local()),
        ),
        (lambda: ask(c10d.reduce_scatter_tensor.default, tokens(4, T), "sum", 2, "ep"), Split(1)),
        (lambda: ask(c10d.reduce_scatter_tensor.default, local(U, 4), "sum", 2, "ep"), Local()),
        (lambda: ask(c10d.reduce_scatter_tensor.default, local(2 * T, position=True), "sum", 2, "ep"), NUMBERED),
        (lambda: ask(c10d.reduce_scatter_tensor.default, local(3 * T), "sum", 2, "ep"), Local()),
        (lambda: ask(c10d.wait_tensor.default, tokens(4, T, position=True)), Split(1, position=True)),
        (lambda: ask(c10d.wait_tensor.default, INVERSE), INVERSE.place),
    ],
)
def test_tokens_follow_a_collective(place, expected):
    assert place() == expected


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: ask(c10d.all_to_all_single.default, tokens(2 * T, 4), [1, 1], [1, 1], "ep"), DEALS),
        (lambda: ask(c10d.all_to_all_single.default, tokens(T, 4), [count(T)], [count(T)], "ep"), DEALS),
        (
            lambda: ask(c10d.all_to_all_single.default, tokens(4, T), [OWN], [4], "ep"),
            "it sends another number of rows",
        ),
        (lambda: ask(c10d.all_to_all_single.default, shared(U, 4), [count(T)], [U], "ep"), "the same rows for all"),
        (lambda: ask(c10d.all_to_all_single.default, shared(8, 4), [OWN], [8], "ep"), "the same rows for all"),
        (lambda: ask(c10d.reduce_scatter_tensor.default, tokens(2 * T, 4), "sum", 2, "ep"), DEALS),
        (
            lambda: ask(c10d.reduce_scatter_tensor.default, local(2 * T, order=GATHERED), "sum", 2, "dp"),
            "its rows are in the order of the 2 ranks of ep, not in that of the 2 ranks of dp",
        ),
    ],
)
def test_dealing_out_rows_of_tokens_is_refused(call, reason):
    with pytest.raises(CannotSplit, match=reason):
        call()


@pytest.mark.parametrize(
    ("order", "expected"),
    [(GATHERED, Ruling(Split(0))), ("", Ruling(Split(0), FROM_GATHERED))],
)
def test_rows_of_all_ranks_are_scattered_back_to_tokens(order, expected):
    rows = local(6 * T, 4, order=order)
    assert RULES[c10d.reduce_scatter_tensor.default](rows, "sum", 2, "ep") == expected
    assert RULES[c10d.reduce_scatter_tensor_coalesced.default]([rows, shared(4)], "sum", 2, "ep") == Ruling(
        (Split(0), Shared()), expected.assumes
    )


def test_row_numbers_gathered_from_all_ranks_are_those_inside_their_microbatches():
    numbers = tokens(T, position=True)
    assert RULES[c10d.all_gather_into_tensor.default](numbers, 2, "ep") == Ruling(NUMBERED, local_positions=True)


def test_collectives_name_their_group_and_waits_are_none():
    assert {op: comm_op(op) for op in (c10d.all_to_all_single.default, c10d.all_reduce.default, aten.mm.default)} == {
        c10d.all_to_all_single.default: CommOp(3),
        c10d.all_reduce.default: CommOp(2),
        aten.mm.default: None,
    }
    assert (is_wait(c10d.wait_tensor.default), comm_op(c10d.wait_tensor.default)) == (True, None)
    assert not is_wait(c10d.all_reduce.default)


def test_the_group_is_where_the_schema_has_it():
    for op in RULES:  # tests register ops of their own
        is_own = getattr(op, "namespace", "") == "_c10d_functional"
        if is_own and (known := comm_op(op)) and known.group_arg is not None:
            assert op._schema.arguments[known.group_arg].name == "group_name", op


def test_an_op_of_ones_own_is_played_as_communication():
    with torch.library._scoped_library("dbo_test_comm", "DEF") as lib:
        lib.define("dispatch(Tensor rows, str group) -> Tensor")
        op = torch.ops.dbo_test_comm.dispatch
        with pytest.raises(ValueError, match=r"has the overloads \['default'\]; register each by itself"):
            register_comm_op(op, rule=lambda rows, group: Local())
        register_comm_op(op.default, rule=lambda rows, group: Local(), group_arg=1)
        assert (comm_op(op.default), ask(op.default, ROWS, "ep")) == (CommOp(1), Local())
        with pytest.raises(ValueError, match="already has a rule"):
            register_comm_op(op.default, rule=lambda rows, group: Local())
