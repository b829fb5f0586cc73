"""Advice: every reason that the code gives finds the advice that is meant for it, whatever the names in it are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbo_compile.advice import _ADVICE, ANY, advice
from dbo_compile.runtime.comparison import DIFFERS

PACKAGE = Path(__file__).parent.parent / "dbo_compile"
TREES = [ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]
NODES = [node for tree in TREES for node in ast.walk(tree)]
CALLS = [node for node in NODES if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args]
HOSTILE = "autograd::view_mask_declined_sums_over_many_tokens"
"""A name with the words of many reasons in it."""


def named_texts() -> dict[str, ast.expr]:
    """The strings that modules give names to, as constants or as what a function returns."""
    found: dict[str, ast.expr] = {}
    for statement in (s for tree in TREES for s in tree.body):
        match statement:
            case ast.Assign(targets=[ast.Name(name)], value=ast.Constant(str()) as text): found[name] = text
            case ast.FunctionDef(name, body=[ast.Return(ast.JoinedStr() as text)]): found[name] = text
    return found


NAMED = named_texts()


def texts(node: ast.expr, filler: str) -> Iterator[str]:
    """What an expression may be as text, as far as the source tells; every value in it is `filler`."""
    match node:
        case ast.Constant(str(text)): yield text
        case ast.JoinedStr(parts): yield "".join(next(texts(part, filler), filler) for part in parts)
        case ast.FormattedValue(ast.Name(name)) if name in NAMED: yield from texts(NAMED[name], filler)
        case ast.Name(name) | ast.Call(ast.Name(name)) if name in NAMED: yield from texts(NAMED[name], filler)
        case ast.IfExp(_, one, other): yield from (*texts(one, filler), *texts(other, filler))
        case ast.BoolOp(_, values): yield from (text for value in values for text in texts(value, filler))


def raised(error: str, filler: str = "x_1") -> list[str]:
    """The reasons of all places that raise `error`."""
    return [text for call in CALLS if call.func.id == error for text in texts(call.args[0], filler)]


OF_CALLS = [
    "rank 1 has 9 tokens, and a decode is split from 10 on (min_tokens)",
    "it has 9 tokens, and a prefill is split from 10 on (min_tokens)",
    "its inputs differ in their number of tokens (x: 9, y: 7); see token_dims",
    "another rank cannot split it",
    "inductor was timed to be faster",
    "timing it unsplit",
    "num_microbatches=1",
    "rank 1 declined",
    "ranks 1, 2 declined",
    "the graph of ranks 1, 2 is not split",
    "no rank has tokens",
    DIFFERS,
    "splitting changed result 0 of the graph: some op mixes tokens, and its rule does not say so",
]
"""Reasons that nothing raises."""
OF_OPS = [
    "mul is part of a result that is a view of an argument",
    "the equality gate found that rows do not come back to their own tokens here, or not only here",
]


def test_the_reasons_of_the_code_are_found():
    assert len(raised("CannotSplit")) > 100
    assert len(raised("NotSplit")) > 12
    for reason in ("it reduces over rows of many tokens", "it reads rows of the token dim x_1 that may belong to "
                   "another microbatch", "its numbers are those of single tokens"):  # fmt: skip
        assert reason in raised("CannotSplit")
    specialised = "the model was specialised to the number of tokens that it was first called with, in x_1"
    assert specialised in raised("NotSplit")


@pytest.mark.parametrize("reason", [*raised("NotSplit"), *OF_CALLS])
def test_there_is_advice_for_a_graph_or_call_that_is_not_split(reason):
    assert advice(reason) != ANY


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in _ADVICE])
def test_every_pattern_fits_a_reason_of_the_code(pattern):
    reasons = [*raised("NotSplit"), *raised("CannotSplit"), *OF_CALLS, *OF_OPS]
    assert [reason for reason in reasons if re.match(pattern, reason)]


@pytest.mark.parametrize("error", ["CannotSplit", "NotSplit"])
def test_the_names_in_a_reason_do_not_choose_its_advice(error):
    plain, hostile = raised(error), raised(error, HOSTILE)
    chosen = [(reason, advice(reason)) for reason in hostile]
    assert chosen == [(reason, advice(other)) for reason, other in zip(hostile, plain, strict=True)]


TOLD = [
    ("it reduces over the token dim 0", "A sum or mean over tokens"),
    ("it normalises over the token dim 0", "A sum or mean over tokens"),
    ("it sums over the tokens (k of mk,kn->mn)", "A sum or mean over tokens"),
    ("it draws random numbers: their order would depend on the split", "Call model.eval()"),
    ("it drops elements by a mask", "Call model.eval()"),
    ("it returns a mask for debugging", ANY),
    ("it picks by a mask rows that may belong to another microbatch", ANY),
    ("its mask carries tokens, but its queries, keys and values do not", ANY),
    ("its mask [2, 1, s0, s0] has a size that counts the tokens of all microbatches", "Give the mask the token dim"),
    ("its mask has size 3 in the token dim 0, but no tokens", "Give the mask the token dim"),
    ("its block mask has no row for each sequence, nor one for all", "Give the mask the token dim"),
    ("it reads view_3, whose size counts the tokens of all microbatches", ANY),
    ("the view [T, 5] -> [5*T] merges or cuts the token dim 0", "Keep the token dim a dim of its own"),
    ("mul is part of a result that is a view of an argument", "Return a copy of it"),
    ("it reads a row of what all tokens share for each token, by its place among all tokens", "Read by numbers"),
    ("which rank a row goes back to depends on its place among all tokens", "Exchange rows that were sorted"),
    ("it takes the largest among many tokens", "Route without a capacity"),
    ("mylib.op.default has no placement rule; teach it one with dbo_compile.register_rule", "A rule takes"),
    ("mylib.autograd.default has no placement rule; teach it one with dbo_compile.register_rule", "A rule takes"),
    ("it mixes rows in the order of the tokens with rows in an order of their own", ANY),
    ("sort needs its result for all tokens at once, because it reduces over the token dim 0", "A sum or mean"),
    ("a needs its result for all tokens at once, because b needs its result for all tokens at once, because it draws "
     "random numbers: their order would depend on the split", "Call model.eval()"),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "begin"), TOLD)
def test_advice_for_an_op_is_that_of_its_reason(reason, begin):
    assert advice(reason).startswith(begin)


def test_advice_does_not_say_again_what_the_reason_says():
    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[\w.]+", text.lower())
        return {tuple(words[i : i + 4]) for i in range(len(words) - 3)}

    reasons = [*raised("NotSplit"), *raised("CannotSplit"), *OF_CALLS, *OF_OPS]
    repeated = [(reason, shared) for reason in reasons if (shared := runs(reason) & runs(advice(reason)))]
    assert repeated == []
