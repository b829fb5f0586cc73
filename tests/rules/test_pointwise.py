from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from dbo_compile.errors import CannotSplit
from dbo_compile.ir.tokens import TOKENS as T
from dbo_compile.ir.tokens import Local, Ruling, Split
from dbo_compile.rules import RULES, pointwise
from tests.rules.truth import Along, Whole, ask, claim, count, local, shared, tokens

aten = torch.ops.aten
prims = torch.ops.prims
int64 = torch.int64

PERM = local(3 * T, dtype=int64, order="sort", position=True)
INVERSE = local(3 * T, dtype=int64, order="sort", inverse=True)
ROWS = local(3 * T, 8, order="sort")
NUMBERS = tokens(T, dtype=int64, position=True)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda: ask(aten.add.Tensor, tokens(T, 8), shared(8)), Split(0)),
        (lambda: ask(aten.add.Tensor, shared(8), tokens(5, T, 8)), Split(1)),
        (lambda: ask(aten.mul.Tensor, tokens(T, 1), tokens(5, T, 8)), Split(1)),
        (lambda: ask(aten.where.self, tokens(3 * T, 1), tokens(2, 3 * T, 8), shared()), Split(1)),
        (lambda: ask(aten.where.self, shared(5, 1, 8), tokens(T, 8), shared(8)), Split(1)),
        (lambda: ask(aten.silu.default, tokens(5, 2 * T)), Split(1)),
        (lambda: ask(aten.frexp.Tensor, tokens(5, 2 * T)), (Split(1), Split(1))),
        (lambda: ask(aten.add_.Tensor, tokens(T, 8), tokens(T, 1)), Split(0)),
        (lambda: ask(aten.copy_.default, tokens(T, 8), shared(8)), Split(0)),
        (lambda: ask(prims.convert_element_type.default, tokens(T, 8), torch.bfloat16), Split(0)),
        # the number of a row is one only while nothing is added to it
        (lambda: ask(aten._to_copy.default, NUMBERS, dtype=torch.int32), Split(0, position=True)),
        (lambda: ask(aten.clone.default, NUMBERS), Split(0, position=True)),
        (lambda: ask(aten._to_copy.default, NUMBERS, dtype=torch.bool), Split(0)),
        (lambda: ask(aten.add.Tensor, NUMBERS, 1), Split(0)),
        (lambda: ask(aten.le.Tensor, NUMBERS, shared(5, 1)), Split(1)),
        # rows in an order of their own
        (lambda: ask(aten.silu.default, ROWS), Local("sort")),
        (lambda: ask(aten.mul.Tensor, ROWS, local(3 * T, 1, order="sort")), Local("sort")),
        (lambda: ask(aten.mul.Tensor, ROWS, local(3 * T, 1, order="other")), Local()),
        (lambda: ask(aten.mul.Tensor, ROWS, local(1, 8)), Local()),
        (lambda: ask(aten.mul.Tensor, ROWS, shared(8)), Local("sort")),
        (lambda: ask(aten.mul.Tensor, local(6, 8, order="sort"), shared(6, 1)), Local()),
        (lambda: ask(aten.add.Tensor, local(6, order="sort"), local(6, 6, order="sort")), Local()),
        (lambda: ask(aten.floor_divide.default, PERM, 3), Local("sort", position=True)),
        (lambda: ask(aten.div.Tensor_mode, PERM, 3, rounding_mode="floor"), Local("sort", position=True)),
        (lambda: ask(aten.div.Tensor_mode, PERM, 3, rounding_mode=None), Local(position=True)),
        (lambda: ask(aten.floor_divide.default, INVERSE, 3), Local()),
        (lambda: ask(aten.remainder.Scalar, PERM, 3), Local(position=True)),
        (lambda: ask(aten._to_copy.default, INVERSE, dtype=torch.int32), Local("sort", inverse=True)),
        (lambda: ask(aten._to_copy.default, INVERSE, dtype=torch.float32), Local()),
        (lambda: ask(aten.mul.Tensor, PERM, local(1)), Local(position=True)),
        (lambda: ask(aten.ge.Scalar, local(3 * T, dtype=int64, order="sort"), 8), Local("sort")),
        (lambda: ask(aten.mul_.Tensor, ROWS, shared(8)), Local("sort")),
    ],
)
def test_tokens_stay_where_they_are(place, expected):
    assert place() == expected


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: ask(aten.add.Tensor, tokens(T, 8), shared(T, 8)), "without tokens has size T in the token dim 0"),
        (lambda: ask(aten.add.Tensor, tokens(T, 1), tokens(T)), r"in different dims \[0, 1\]"),
        (lambda: ask(aten.add.Tensor, tokens(T, 8), tokens(2 * T, 8)), "different numbers of rows for a token"),
        (lambda: ask(aten.add.Tensor, tokens(T, 8), count(T)), "computes with the number of tokens"),
        (lambda: ask(aten.div.Tensor, shared(8), count(2 * T)), "computes with the number of tokens"),
        (lambda: ask(aten.clamp.default, tokens(T, 8), max=count(T)), "computes with the number of tokens"),
        (lambda: ask(aten.add_.Tensor, shared(), count(T)), "computes with the number of tokens"),
        (lambda: ask(aten.copy_.default, shared(T, 8), tokens(T, 8)), "into a buffer that all tokens share"),
        (lambda: ask(aten.add_.Tensor, NUMBERS, 1), r"writes Split\(0\) over Split\(0, position\)"),
        (lambda: ask(aten.mul_.Tensor, ROWS, local(8)), r"writes Local\(\) over Local\(order=sort\)"),
        (lambda: ask(aten.lt.Scalar, PERM, 8), "compares positions or counts of rows"),
        (lambda: ask(aten.lt.Tensor, PERM, local(8, 1, position=True)), "compares positions or counts of rows"),
        (lambda: ask(aten.minimum.default, PERM, PERM), "compares positions or counts of rows"),
        (lambda: ask(aten.lt.Tensor, PERM, shared()), "compares positions or counts of rows"),
        (lambda: ask(aten.lt.Tensor, PERM, local(3 * T)), "compares positions or counts of rows"),
        (lambda: ask(aten.eq.Tensor, shared(5), local(3 * T, 1, position=True)), "positions or counts of rows"),
        (lambda: ask(aten.clamp.default, PERM, None, 4), "compares positions or counts of rows"),
        (lambda: ask(aten.logical_not.default, PERM), "compares positions or counts of rows"),
        (lambda: ask(aten._to_copy.default, PERM, dtype=torch.bool), "compares positions or counts of rows"),
        (lambda: ask(aten.mul.Tensor, ROWS, shared(3 * T, 1)), "mixes a value of all tokens"),
        (lambda: ask(aten.mul.Tensor, tokens(T, 8), local(8)), "mixes what all tokens of a microbatch share"),
        (lambda: ask(aten.mul.Tensor, tokens(T, 8), local(1, 8)), "mixes what all tokens of a microbatch share"),
        (lambda: ask(aten.mul.Tensor, tokens(T, 1), local(T, T)), "mixes what all tokens of a microbatch share"),
        (lambda: ask(aten.add.Tensor, tokens(3 * T), PERM), "mixes positions or counts of a microbatch's rows"),
    ],
)
def test_says_why_not(call, reason):
    with pytest.raises(CannotSplit, match=reason):
        call()


def test_rows_that_are_as_many_as_tokens_are_taken_to_be_theirs():
    ruling = RULES[aten.add.Tensor](tokens(5, T, 8), local(T, 1))
    assert ruling == Ruling(Split(1), assumes="the rows it combines with tokens are in the order of those tokens")


def test_row_numbers_beside_local_rows_are_those_inside_the_microbatch():
    offsets = local(8, 1, dtype=int64, position=True)
    assert RULES[aten.add.Tensor](NUMBERS, offsets) == Ruling(Local(position=True), local_positions=True)
    with pytest.raises(CannotSplit, match="it compares positions or counts of rows"):
        RULES[aten.ge.Tensor](NUMBERS, offsets)


def is_composite(op):
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


def test_every_op_that_pytorch_calls_pointwise_has_a_rule():
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
    packets = {name.removeprefix("aten::").partition(".")[0]: None for name in names}
    ops = [getattr(getattr(aten, p), o) for p in packets if hasattr(aten, p) for o in getattr(aten, p).overloads()]
    tagged = [op for op in ops if torch.Tag.pointwise in op.tags and torch.Tag.nondeterministic_seeded not in op.tags]
    missing = [op for op in tagged if not (op in RULES or op._schema.is_mutable or is_composite(op))]
    assert {str(op) for op in missing} <= {"aten.equal.default", "aten._conj_physical.default"}
    assert aten.equal.default not in RULES


def examples(op, sizes, dtype, number):
    """Arguments by the types of the schema, all that are required and whatever is given by place."""
    sizes = iter(sizes)

    def tensor():
        return (5 * torch.rand(next(sizes), dtype=torch.float64)).to(dtype)

    by_type = {
        "Tensor": tensor,
        "Optional[Tensor]": tensor,
        "int": lambda: 1,
        "Device": lambda: torch.device("cpu"),
        "ScalarType": lambda: torch.float64,
        "Optional[str]": lambda: "floor",
    }
    optional = ("Optional[number]", "Optional[Tensor]")
    asked = [arg for arg in op._schema.arguments if not arg.has_default_value() or str(arg.type) in optional]
    made = {arg.name: by_type.get(str(arg.type), lambda: number)() for arg in asked}
    by_place = [made[arg.name] for arg in asked if not arg.kwarg_only]
    return by_place, {arg.name: made[arg.name] for arg in asked if arg.kwarg_only}


FAMILIES = (pointwise.elementwise, pointwise.comparing, pointwise.pair,
            pointwise.same, pointwise.cast, pointwise.divide)  # fmt: skip
FUNCTIONAL = [op for op, fn in RULES.items() if fn in FAMILIES]
SHAPES = (
    ((2, 14, 3), (14, 1), (1, 1, 3), (3,)),
    ((2, 14, 3), (2, 14, 3), (2, 14, 3)),
    ((2, 14, 3), ()),
    ((2, 14, 3), (14, 1), ()),
)
TYPES = ((torch.float64, 0.5), (torch.int64, 1), (torch.bool, True), (torch.complex128, 1))


@pytest.mark.parametrize("op", FUNCTIONAL, ids=str)
def test_every_pointwise_rule_is_true(op):
    for sizes, (dtype, number) in itertools.product(SHAPES, TYPES):
        torch.manual_seed(0)
        with contextlib.suppress(RuntimeError, NotImplementedError, TypeError, ValueError, StopIteration, IndexError):
            args, kwargs = examples(op, sizes, dtype, number)
            assert claim(op, *args, **kwargs) in (Split(1), (Split(1), Split(1)))
            return
    pytest.fail(f"no arguments found for {op._schema}")


@pytest.mark.parametrize(
    "call",
    [
        (aten.add.Tensor, torch.rand(7, 3), torch.rand(3)),
        (aten.where.self, torch.rand(2, 7, 1) > 0.5, torch.rand(7, 3), torch.rand(2, 1, 3)),
        (aten.lerp.Tensor, torch.rand(7, 1), torch.rand(7, 5), torch.rand(5)),
        (aten._to_copy.default, Along(torch.arange(14), 0, position=True)),
        (aten.add.Tensor, Along(torch.arange(14), 0, position=True), torch.arange(5).view(5, 1)),
        (aten.mul.Tensor, Along(torch.rand(7, 7), 0), Along(torch.rand(7, 1), 0)),
        (aten.mul.Tensor, Along(torch.rand(7, 1), 0), Whole(torch.rand(1, 7))),
        (aten.add_.Tensor, torch.rand(7, 3), torch.rand(7, 1)),
        (aten.copy_.default, torch.rand(2, 7, 3), torch.rand(7, 3)),
    ],
    ids=lambda call: str(call[0]),
)
def test_the_claim_is_true(call):
    assert isinstance(claim(*call), Split)
