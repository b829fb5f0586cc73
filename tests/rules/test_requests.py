from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import REQUESTS, Number, Ruling, Shared, Split
from dbo_compile.ir.tokens import TOKENS as T
from dbo_compile.rules.registry import RULES
from dbo_compile.rules.requests import register_attention_op
from tests.rules.truth import count, local, shared, tokens

INT = torch.int32
VARLEN = "torch_attn._varlen_attn.default"
VARLEN_OUT = "torch_attn._varlen_attn_out.default"
Q, KV = tokens(T, 6, 8), tokens(T, 2, 8)
PAGES = shared(300, 4, 2, 8)


def of_requests(*sizes):
    return local(*sizes, dtype=INT, order=REQUESTS, position=True)


BOUNDS, LENS, TABLE = of_requests("s + 1"), of_requests("s"), of_requests("s", 9)
LONGEST = Number(sympy.Symbol("longest"), Shared())
LIB = torch.library.Library("dbo_rules_test", "DEF")
LIB.define("attend(Tensor q, Tensor k, Tensor(a!) cache, Tensor cu, Tensor? lens, float scale) -> Tensor")
LIB.define("write(Tensor k, Tensor(a!) cache, Tensor slots) -> ()")
LIB.define("attend_with_sums(Tensor q, Tensor k, Tensor cu) -> (Tensor, Tensor, Tensor)")
LIB.define("attend_longest(Tensor q, Tensor cu, SymInt longest) -> Tensor")
OPS = torch.ops.dbo_rules_test
register_attention_op(OPS.attend.default, tokens=["q", "k"], requests=["cu", "lens"], caches=["cache"])
register_attention_op(OPS.write.default, tokens={"k": 0, "slots": -1}, caches=["cache"])
register_attention_op(OPS.attend_longest.default, tokens=["q"], requests=["cu", "longest"])
register_attention_op(OPS.attend_with_sums.default, tokens=["q", "k"], requests=["cu"], results=[0, 1, None])


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        (OPS.attend.default, (Q, KV, PAGES, BOUNDS, LENS, 0.5), Ruling(Split(0), paged=True)),
        (OPS.attend.default, (Q, KV, PAGES, BOUNDS, None, 0.5), Ruling(Split(0), paged=True)),
        (OPS.attend.default, (Q, KV, PAGES, replace(local(), is_given=True), None, 0.5), Ruling(Split(0), paged=True)),
        (OPS.attend_longest.default, (Q, BOUNDS, 9), Ruling(Split(0), whole_requests=True)),
        (OPS.attend_longest.default, (Q, BOUNDS, LONGEST), Ruling(Split(0), whole_requests=True)),
        (OPS.write.default, (KV, PAGES, tokens(1, T, dtype=INT)), Ruling(Shared(), paged=True)),
        (OPS.attend_with_sums.default, (Q, KV, BOUNDS), Ruling((Split(0), Split(1), Shared()), whole_requests=True)),
        (VARLEN, (Q, KV, KV, BOUNDS, BOUNDS, 7, 7), Ruling((Split(0), Split(1), Shared()), whole_requests=True)),
        (VARLEN_OUT, (Q, Q, KV, KV, BOUNDS, BOUNDS, 7, 7), Ruling(Split(1), whole_requests=True)),
        (
            VARLEN,
            (Q, PAGES, PAGES, BOUNDS, None, 7, 9, True, None, [-1, 0], True, LENS, TABLE),
            Ruling((Split(0), Split(1), Shared())),
        ),
        (
            VARLEN,
            (Q, PAGES, PAGES, BOUNDS, None, 7, 9, False, None, [5, 0], True, LENS, TABLE),
            Ruling((Split(0), Split(1), Shared())),
        ),
        (
            VARLEN,
            (Q, PAGES, PAGES, BOUNDS, None, 7, 9, False, None, [-1, -1], True, LENS, TABLE),
            Ruling((Split(0), Split(1), Shared()), whole_requests=True),
        ),
    ],
)  # fmt: skip
def test_tokens_follow(op, args, expected):
    assert RULES[op](*args) == expected


@pytest.mark.parametrize(
    ("op", "args", "reason"),
    [
        (OPS.attend.default, (Q, KV, PAGES, shared(5, dtype=INT), LENS, 0.5), "its cu is not known to be of"),
        (OPS.attend.default, (Q, KV, PAGES, BOUNDS, local("s", order="sort"), 0.5), "its lens is not known to be"),
        (OPS.attend_longest.default, (Q, BOUNDS, count(T)), "it computes with the number of tokens"),
        (OPS.attend.default, (Q, shared(9, 2, 8), PAGES, BOUNDS, LENS, 0.5), "its k has no rows of tokens in dim 0"),
        (OPS.attend.default, (tokens(6, T, 8), KV, PAGES, BOUNDS, LENS, 0.5), "its q has no rows of tokens in dim 0"),
        (OPS.attend.default, (Q, KV, KV, BOUNDS, LENS, 0.5), "its cache is not the same for all microbatches"),
        (OPS.attend.default, (Q, KV, PAGES, BOUNDS, LENS, count(T)), "it computes with the number of tokens"),
        (VARLEN, (Q, KV, KV, BOUNDS, shared(5, dtype=INT), 7, 7), "its cu_seq_k is not known to be of the requests"),
        (VARLEN_OUT, (shared(9, 6, 8), Q, KV, KV, BOUNDS, BOUNDS, 7, 7), "its out has no rows of tokens in dim 0"),
        (VARLEN, (Q, PAGES, PAGES, BOUNDS, None, 7, 7), "its key has no rows of tokens in dim 0"),
        (VARLEN, (Q, KV, KV, BOUNDS, None, 7, 7, True, None, None, False, LENS, TABLE), "its key is not the same"),
    ],
)  # fmt: skip
def test_says_why_not(op, args, reason):
    with pytest.raises(CannotSplit, match=reason):
        RULES[op](*args)


def test_a_name_that_the_op_does_not_have_is_an_error():
    with pytest.raises(ValueError, match=r"write.default has no argument 'query'; its arguments are k, cache, slots"):
        register_attention_op(OPS.write.default, tokens=["query"])


def test_an_op_is_registered_once():
    with pytest.raises(ValueError, match="already has a rule"):
        register_attention_op(OPS.write.default, tokens=["k"])
