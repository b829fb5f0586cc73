"""A wrong rule in any family is found: tokens said to stay where they are, where they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dbo_compile.ir.tokens import Local, Ruling, Split, Value
from dbo_compile.rules import RULES, registry
from tests.soundness.calls import Call, all_ops, calls_of
from tests.soundness.coverage import Depth, Tally, family
from tests.soundness.exchanges import exchanges
from tests.soundness.views import View

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
DEPTH = Depth(None, (torch.float64,), 12, ("as it is", "negated"), searches=False)


def first_dim(args, kwargs):
    return next(v.dim for v in tree_leaves((args, kwargs)) if isinstance(v, Value) and v.dim is not None)


def stays(*args, **kwargs):
    return Split(first_dim(args, kwargs))


def both_stay(*args, **kwargs):
    return (stays(*args, **kwargs),) * 2


def own_rows(*_args, **_kwargs):
    return Local()


def numbers(*args, **kwargs):
    return Split(first_dim(args, kwargs), position=True)


PLANTS = [
    ("attention", "softmax", aten._softmax.default, stays),
    ("comm", "", c10d.all_to_all_single.default, stays),
    ("comm", "", c10d.reduce_scatter_tensor.default, stays),
    ("contract", "mm", aten.mm.default, stays),
    ("contract", "bmm", aten.bmm.default, stays),
    ("create", "tril", aten.tril.default, stays),
    ("index", "index_select", aten.index_select.default, stays),
    ("index", "gather", aten.gather.default, stays),
    ("pieces", "flip", aten.flip.default, stays),
    ("pieces", "roll", aten.roll.default, stays),
    ("pointwise", "add", aten.add.Tensor, stays),
    ("pointwise", "clone", aten.clone.default, numbers),
    ("reduce", "mean", aten.mean.dim, stays),
    ("reduce", "sum", aten.sum.dim_IntList, own_rows),
    ("scatter", "index_add", aten.index_add.default, stays),
    ("sort", "sort", aten.sort.stable, both_stay),
    ("view", "transpose", aten.transpose.int, stays),
    ("view", "unsqueeze", aten.unsqueeze.default, stays),
]


def calls(name, op):
    if not name:
        return [Call(o, args, {}) for o, args in exchanges() if o is op]
    (info,) = [i for i in all_ops() if i.name == name and not i.variant_test_name]
    return [c for c in calls_of(info, DEPTH.dtypes, DEPTH.num_samples) if c.op is op]


def wrong_claims(name, op):
    made = Tally()
    for call in calls(name, op):
        made.add(call, DEPTH)
    assert sum(made.verdicts[op].values()) > 2, f"{name} asks {op} nothing"
    return made.wrong


@pytest.mark.parametrize(("family_of", "name", "op", "rule"), PLANTS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_wrong_rule_is_found_and_the_right_one_is_not(monkeypatch, family_of, name, op, rule):
    assert family(op) == family_of
    assert wrong_claims(name, op) == []
    monkeypatch.setitem(registry._rules, op, rule)
    assert wrong_claims(name, op)


def test_a_rule_that_reads_row_numbers_as_those_of_the_microbatch_is_found(monkeypatch):
    def local(*args, **kwargs):
        ruling = right(*args, **kwargs)
        return replace(ruling if isinstance(ruling, Ruling) else Ruling(ruling), local_positions=True)

    right = RULES[aten.sin.default]
    monkeypatch.setitem(registry._rules, aten.sin.default, local)
    made = Tally()
    made.add(Call(aten.sin.default, (torch.arange(7),), {}), DEPTH)
    assert made.wrong


def test_a_rule_is_planted_in_every_family_that_has_rules_of_pytorch_ops():
    """Rules of attention over requests are those of ops that are registered, or need an accelerator."""
    own = [op for op in RULES if getattr(op, "namespace", "") in ("aten", "prims", "_c10d_functional")]
    assert {f for f, *_ in PLANTS} == {family(op) for op in own}


def test_samples_are_cut_into_rows_of_tokens():
    x = torch.arange(12.0).view(6, 2)
    view = View(3, {0: 0})
    assert view.leaves([x])[0] is x
    (seen,) = view.seen([x])
    assert [str(s) for s in seen.sizes] == ["2*T", "2"]
    assert seen.place == Split(0)
