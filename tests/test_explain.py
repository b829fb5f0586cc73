"""Explain, verify and reports: what they say about models that are split, in part, and not at all."""

from __future__ import annotations

import gc
import json
import math
import re
import weakref
from html.parser import HTMLParser

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from expecttest import assert_expected_inline
from torch import nn

import dbo_compile
from dbo_compile import register_rule, reports
from dbo_compile.advice import ANY, advice
from dbo_compile.explanation import Explanation, explain, verify
from dbo_compile.ir.tokens import Split
from dbo_compile.report import MOST_GONE
from tests.schema import faults, report_schema
from tests.tensors import values

ALWAYS = {"split": "always", "inner": "eager"}
EAGER = {"inner": "eager"}
WEIGHT = torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5)


pytestmark = pytest.mark.usefixtures("group")


def sharded(x):
    return funcol.all_reduce(x.exp() @ WEIGHT, "sum", dist.group.WORLD).sin() - x.mean(0)


# -- explain ---------------------------------------------------------------------------------------


def test_explain_shows_every_level_of_a_split_model():
    found = explain(sharded, values(9, 5), options=EAGER)
    assert found.split
    assert [re.sub(r" \(.*\):", ":", reason) for reason in found.reasons] == ["mean: it reduces over the token dim 0"]
    assert 0 < found.hidden_comm <= 1
    text = str(found)
    assert "split in 2 microbatches, 4 segments of which 4 differ, 1 collectives, 1 barriers" in text
    assert "test_explain.py" in text
    titles = ("barriers", "segments", "schedule", "lanes (predicted", "lanes (measured", "program")
    assert [text.count(f"\n{title}") for title in titles] == [1] * len(titles)
    assert found.program.splitlines()[-1].split()[0] == "end"


@pytest.mark.parametrize(
    ("fn", "x", "options", "reason"),
    [
        (torch.exp, values(9, 5), EAGER, 'it has no communication to hide; split="always" splits it all the same'),
        (torch.exp, values(1, 5), ALWAYS, "it has a single token"),
        (sharded, values(9, 5), EAGER | {"split": "never"}, 'split="never"'),
    ],
    ids=["nothing_to_hide", "one_token", "never"],
)
def test_explain_says_why_a_model_is_not_split(fn, x, options, reason):
    found = explain(lambda x: fn(x), x, options=options)
    assert (found.split, found.reasons, found.program, found.hidden_comm) == (False, [reason], "", 0.0)
    assert str(found).splitlines()[0] == f"graph 0: not split: {reason}"
    assert str(found).splitlines()[1].startswith("    what to do: ")


def test_explain_says_why_a_call_is_not_split():
    found = explain(sharded, values(9, 5), options=EAGER | {"min_tokens": 10})
    assert found.split
    assert found.reasons == [reason for reason in found.reports[0].decline_counts] + found.reasons[1:]
    assert f"calls that were not split\n    {found.reasons[0]}: " in str(found)
    assert "-> Lower the option min_tokens" in str(found)


def test_explain_has_every_graph_and_no_other():
    def broken(x):
        y = sharded(x)
        torch._dynamo.graph_break()
        return y + 1

    explain(sharded, values(9, 5), options=EAGER)
    assert [r.split for r in explain(broken, values(9, 5), options=EAGER).reports] == [True, False]


def test_token_dims_name_arguments_as_the_model_does():
    def forward(table, x):
        return sharded(x) + table.sum()

    (report,) = explain(forward, values(4, 5), values(9, 5), options=EAGER | {"token_dims": {"x": 0}}).reports
    assert [t.name for t in report.engine.signature.token_inputs] == ["x"]


def test_a_read_on_the_host_breaks_no_graph():
    def counted(x):
        return sharded(x)[: int((x[:, 0] > 9).sum().item()) + 1]

    (report,) = explain(counted, values(9, 5), options=EAGER).reports
    assert report.captured


def test_an_explanation_of_nothing_says_so():
    found = explain(lambda: None)
    assert (found.split, found.reports) == (False, ())
    assert "nothing to compile" in str(found)
    assert "nothing to compile" in found._repr_html_()


def test_explain_may_be_asked_again_and_about_what_is_compiled_already():
    compiled = torch.compile(sharded, backend="dbo", options=EAGER)
    assert [explain(fn, values(9, 5), options=EAGER).split for fn in (sharded, sharded, compiled)] == [True] * 3


def test_explain_leaves_the_model_and_the_arguments_as_they_were():
    model, x = Counting(), values(9, 5)
    explain(model, x, options=ALWAYS)
    assert torch.equal(x, values(9, 5))
    assert model.calls == 0


def test_explain_is_a_function_of_the_package():
    assert callable(dbo_compile.explain)


def deep(num_layers):
    def forward(x):
        for _ in range(num_layers):
            x = sharded(x)
        return x

    return forward


@pytest.mark.parametrize("num_layers", [1, 32])
def test_an_explanation_fits_a_terminal(num_layers):
    text = str(explain(deep(num_layers), values(9, 5), options=EAGER))
    assert max(map(len, text.splitlines())) <= 100
    assert f"{num_layers} collectives, {num_layers} barriers" in text
    assert text.count("-> A sum or mean over tokens needs them all") == 1
    assert ("more steps" in text) == (num_layers == 32)


def test_the_text_of_an_explanation():
    """EXPECTTEST_ACCEPT=1 writes it anew."""

    def forward(x):
        return funcol.all_reduce(x.exp() @ WEIGHT, "sum", dist.group.WORLD).sin()

    text = str(Explanation(explain(forward, values(9, 5), options=EAGER).reports))
    assert_expected_inline(re.sub(r"program [0-9a-f]{16}", "program FINGERPRINT", text), """\
graph 0: split in 2 microbatches, 3 segments of which 3 differ, 1 collectives, 0 barriers
    communication hidden: 99% predicted

segments
    compute x2         0.010 ms  main
    comm    x2         0.010 ms  all_reduce
    compute x2         0.010 ms  main_2

schedule
    main#0 all_reduce#0 main#1 all_reduce#1 main_2#0 main_2#1

lanes (predicted, 9 tokens)
    compute 0000000000000000000000111111111111111111111100000000000000000000001111111111111111111111
    comm    ......................00000000000000000000001111111111111111111111......................
    0, 1: the microbatch at work, =: all tokens, .: waiting
    0.0404 ms, compute busy 0.0401, comm busy 0.0203, 99% of communication hidden

program FINGERPRINT: 27 instructions, see .program
every level as files, with pictures: with dbo_compile.debug("folder"): ...""")


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in ("meta", "path", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "path", "rect"):
            assert self.open.pop() == tag


def test_a_notebook_shows_the_explanation_with_its_chart():
    tags = Tags()
    tags.feed(explain(sharded, values(9, 5), options=EAGER)._repr_html_())
    assert tags.open == []
    assert {"pre", "svg"} <= tags.seen


@pytest.mark.parametrize("options", [EAGER, EAGER | {"split": "never"}], ids=["split", "not_split"])
def test_an_explanation_is_plain_data_as_its_schema_says(options):
    found = explain(sharded, values(9, 5), options=options).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["split"] == (options is EAGER)
    assert [faults(graph, report_schema()) for graph in found["graphs"]] == [[]]


def test_the_measured_share_is_that_of_calls_that_were_split():
    assert 0 <= explain(sharded, values(9, 5), options=EAGER).hidden_comm_measured <= 1
    assert explain(sharded, values(9, 5), options=EAGER | {"min_tokens": 10}).hidden_comm_measured is None


@pytest.mark.parametrize(
    "reason",
    [
        'split="never"',
        "autograd needs a backward graph, and only inference is split: call it under torch.no_grad()",
        'it has no communication to hide; split="always" splits it all the same',
        "none of its inputs is a tensor that could carry tokens",
        "it has a single token",
        "the model was specialised to the number of tokens that it was first called with, in x (dim 0)",
        "arg3_1 has another dim whose size is traced as the number of tokens: call it first with a number of tokens "
        "that is no other size of the model",
        "the size of the result of aten.nonzero.default depends on its data (model.py:12, x.nonzero())",
        "rank 1 has 9 tokens, and a decode is split from 10 on (min_tokens)",
        "3 tokens do not make 2 microbatches of at least 2",
        "no split of 9 tokens keeps what the graph was compiled for: Eq(Mod(T, 8), 0)",
        "its token inputs differ in their number of tokens (x: 9, y: 7); see token_dims",
        "another rank cannot split it",
        "inductor was timed to be faster",
        "timing it unsplit",
        "num_microbatches=1",
        "rank 1 declined",
        "the graph of ranks 1, 2 is not split",
        "no program can be made of it: add writes h",
        "a nested compile region writes a part of its argument in place (model.py:12, c.add_(1))",
        "microbatch 1 would have 3 rows of lens, and the graph is made for 1",
        "nothing tells which tokens belong to one request, and none may be cut",
        "all ranks must have as many rows, which would cut a request that has to stay whole",
        "splitting changed result 0 of the graph: some op mixes tokens although its rule says that it does not",
    ],
)
def test_there_is_advice_for_a_graph_or_call_that_is_not_split(reason):
    assert advice(reason) != ANY


def test_advice_for_an_op_is_that_of_its_reason():
    told = {
        "it reduces over the token dim 0": "A sum or mean over tokens",
        "it draws random numbers: their order would depend on the split": "Call model.eval()",
        "mylib.op.default has no placement rule; teach it one with dbo_compile.register_rule": "Teach it",
        "it mixes rows in the order of the tokens with rows in an order of their own": ANY,
    }
    for reason, begin in told.items():
        assert advice(reason).startswith(begin)


# -- verify ----------------------------------------------------------------------------------------


@torch.library.custom_op("dbo_test_explain::centred", mutates_args=())
def centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0)


centred.register_fake(torch.empty_like)
# A lie: it needs the mean over all tokens.
register_rule(torch.ops.dbo_test_explain.centred.default)(lambda x: Split(x.dim))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return x.exp() * self.calls


class State:
    def __init__(self):
        self.total = torch.zeros(9, 5, dtype=torch.float64)


def accumulates(x, state):
    state.total.add_(x)
    return state.total * 2


def test_verify_of_an_honest_model_is_equal():
    found = verify(lambda x: {"y": (x.exp() @ WEIGHT).sin(), "n": [x.shape[0], None]}, values(9, 5), options=EAGER)
    assert (found.equal, found.split, found.error) == (True, True, "")
    assert found.max_abs_diff <= 1e-15 >= found.max_abs_diff_eager


def test_verify_through_inductor_compares_with_eager_as_well():
    found = verify(lambda x: (x.exp() @ WEIGHT).sin(), values(9, 5))
    assert (found.equal, found.split) == (True, True)
    assert 0 <= found.max_abs_diff_eager < 1e-12


def returns(x):
    return centred(x.exp()).sin()


def returns_the_imaginary_part(x):
    return torch.complex(x, centred(x))


def returns_nan_for_other_tokens(x):
    return centred(x).sign().log()


def writes_into_an_argument(x, state):
    state.add_(centred(x))


@pytest.mark.parametrize(
    ("fn", "inputs", "differs"),
    [
        (returns, (values(9, 5),), 0.2),
        (returns_the_imaginary_part, (values(9, 5),), 0.4),
        (returns_nan_for_other_tokens, (values(9, 5),), math.inf),
        (writes_into_an_argument, (values(9, 5), values(9, 5, seed=2)), 0.4),
    ],
)
def test_verify_catches_a_rule_that_lies(fn, inputs, differs):
    found = verify(fn, *inputs, options=EAGER)
    assert (found.equal, found.split, found.error) == (False, True, "")
    assert found.max_abs_diff == found.max_abs_diff_eager >= differs


@pytest.mark.parametrize("of", ["buffers", "state", "random", "nan", "nothing"])
def test_every_run_of_verify_starts_from_the_same(of):
    fn, *inputs = {
        "buffers": (Counting(), values(9, 5)),
        "state": (accumulates, values(9, 5), State()),
        "random": (lambda x: nn.functional.dropout(x.exp(), 0.5, training=True), values(9, 5)),
        "nan": (lambda x: x.log(), values(9, 5)),
        "nothing": (lambda x: x[:, :0].exp(), values(9, 5)),
    }[of]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    found = verify(fn, *inputs, options=EAGER)
    assert (found.equal, found.max_abs_diff, found.split) == (True, 0.0, True), found
    assert torch.equal(torch.get_rng_state(), before)
    if of == "buffers":
        assert fn.calls == 0
    if of == "state":
        assert not inputs[1].total.any()


@pytest.mark.parametrize(
    ("fn", "options", "error"),
    [
        (lambda x: x @ torch.ones(3, 3), EAGER, "RuntimeError"),
        (lambda x: x.exp(), EAGER | {"spilt": "always"}, "unknown option 'spilt'; did you mean 'split'"),
    ],
    ids=["model", "options"],
)
def test_verify_raises_nothing(fn, options, error):
    found = verify(fn, values(9, 5), options=options)
    assert (found.equal, found.split) == (False, False)
    assert math.isnan(found.max_abs_diff)
    assert error in found.error


def test_verify_says_that_nothing_was_split():
    found = verify(lambda x: x.exp(), values(1, 5), options=EAGER)
    assert (found.equal, found.split, found.error) == (True, False, "")


def test_verify_may_be_told_how_much_is_equal():
    def fn(x):
        return centred(x) * 1e-6

    x = values(9, 5)
    assert [verify(fn, x, options=EAGER, atol=a, rtol=0.0).equal for a in (1e-5, 1e-9)] == [True, False]


# -- reports ---------------------------------------------------------------------------------------


def test_a_report_counts_what_is_in_the_program():
    explain(nn.Sequential(Layer(), Layer(), Layer()).double(), values(9, 5), options=EAGER)
    report = reports()[-1]
    assert (report.split, report.reason, report.num_microbatches) == (True, "", 2)
    assert (report.num_comm_ops, report.calls, report.calls_split, report.decline_counts) == (3, 2, 2, {})
    assert report.num_unique_segments < report.num_segments == len(report.levels.outline.segments)
    assert re.fullmatch(r"[0-9a-f]{16}", report.fingerprint)


def test_a_report_of_a_graph_that_is_not_split_counts_nothing():
    explain(lambda x: x.exp(), values(9, 5), options=EAGER)
    report = reports()[-1]
    assert (report.split, report.num_microbatches, report.num_segments, report.num_unique_segments) == (False, 1, 0, 0)
    assert (report.num_comm_ops, report.fingerprint, report.barriers, report.obligations) == (0, "", {}, {})
    assert (report.calls, report.calls_split, report.decline_counts) == (0, 0, {})


@pytest.mark.parametrize("split", ["always", "never"])
def test_of_graphs_that_are_gone_the_last_few_are_reported(split):
    def made_and_thrown_away():
        torch.compile(nn.Linear(5, 5).double(), backend="dbo", options=EAGER | {"split": split})(values(9, 5))
        torch._dynamo.reset()
        return weakref.ref(reports()[-1].compilation or reports()[-1].captured)

    with torch.no_grad():
        graphs = [made_and_thrown_away() for _ in range(MOST_GONE + 3)]
    gc.collect()
    assert [graph() is None for graph in graphs[-MOST_GONE - 1 :]] == [True] + [False] * MOST_GONE
    assert len({report.number for report in reports()}) == len(reports())


def test_the_list_of_reports_is_the_callers_own():
    explain(lambda x: x.exp(), values(9, 5), options=EAGER)
    reports().clear()
    assert reports()


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.shared, self.down = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x):
        return self.down(funcol.all_reduce(self.up(x), "sum", dist.group.WORLD)) + self.shared(x)
