"""Explain, verify, reports, dump and measure: what they say about models that are split, in part, and not at all."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

import dbo_compile
from dbo_compile import register_rule, reports
from dbo_compile.chart import svg
from dbo_compile.dump import dump
from dbo_compile.explanation import explain, verify
from dbo_compile.ir.schedule import Lane
from dbo_compile.ir.tokens import Split
from dbo_compile.measure import measured
from dbo_compile.runtime.clock import Interval, Timeline

ALWAYS = {"split": "always", "inner": "eager"}
EAGER = {"inner": "eager"}
WEIGHT = torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5)


def values(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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
    for title in ("barriers", "segments", "schedule", "lanes (predicted)", "program"):
        assert f"\n{title}" in text
    assert found.program in text
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
    assert str(found) == f"graph 0: not split: {reason}"


def test_explain_says_why_a_call_is_not_split():
    found = explain(sharded, values(9, 5), options=EAGER | {"min_tokens": 10})
    assert found.split
    assert found.reasons[0] == "9 tokens are fewer than min_tokens=10"
    assert "calls that were not split\n  9 tokens are fewer than min_tokens=10: 1" in str(found)


def test_explain_has_every_graph_and_no_other():
    def broken(x):
        y = sharded(x)
        torch._dynamo.graph_break()
        return y + 1

    explain(sharded, values(9, 5), options=EAGER)
    assert [r.split for r in explain(broken, values(9, 5), options=EAGER).reports] == [True, False]


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
    assert (report.num_comm_ops, report.calls, report.calls_split, report.decline_counts) == (3, 1, 1, {})
    assert report.num_unique_segments < report.num_segments == len(report.levels.outline.segments)
    assert re.fullmatch(r"[0-9a-f]{16}", report.fingerprint)


def test_a_report_of_a_graph_that_is_not_split_counts_nothing():
    explain(lambda x: x.exp(), values(9, 5), options=EAGER)
    report = reports()[-1]
    assert (report.split, report.num_microbatches, report.num_segments, report.num_unique_segments) == (False, 1, 0, 0)
    assert (report.num_comm_ops, report.fingerprint, report.barriers, report.obligations) == (0, "", {}, {})
    assert (report.calls, report.calls_split, report.decline_counts) == (0, 0, {})


def test_the_list_of_reports_is_the_callers_own():
    explain(lambda x: x.exp(), values(9, 5), options=EAGER)
    reports().clear()
    assert reports()


# -- measure, dump, chart --------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.shared, self.down = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x):
        return self.down(funcol.all_reduce(self.up(x), "sum", dist.group.WORLD)) + self.shared(x)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    model = torch.compile(nn.Sequential(Layer(), Layer()).double(), backend="dbo", options=EAGER, fullgraph=True)
    with torch.no_grad():
        model(values(9, 5))
        yield model


def test_measured_has_a_timeline_for_each_call_with_every_step_in_order(compiled):
    with measured() as timelines:
        for n in (9, 4):
            torch.testing.assert_close(compiled(values(n, 5)), compiled._orig_mod(values(n, 5)), rtol=0, atol=1e-12)
    compiled(values(9, 5))
    assert len(timelines) == 2
    steps = [str(s) for s in reports()[-1].levels.schedule.steps]
    for timeline in timelines:
        played = [f"{i.segment}#{i.microbatch}" for i in timeline.intervals]
        assert sorted(played) == sorted(steps)
        for lane in Lane:
            on = timeline.on(lane)
            assert all(i.start <= i.end for i in on)
            assert all(a.end <= b.start for a, b in pairwise(on))


def test_measured_calls_are_those_of_the_block_also_when_one_fails(compiled):
    with pytest.raises(ZeroDivisionError), measured() as timelines:  # ruff: ignore[pytest-raises-with-multiple-statements]
        compiled(values(7, 5))
        raise ZeroDivisionError
    compiled(values(9, 5))
    assert len(timelines) == 1


def test_a_call_that_is_not_split_is_measured_as_well(compiled):
    reports()[-1].engine.min_tokens = 8
    with measured() as timelines:
        compiled(values(7, 5))
    assert {i.microbatch for i in timelines[0].intervals} == {None}


def test_a_dump_is_files_that_can_be_read_on_their_own(compiled, tmp_path):
    levels = reports()[-1].levels
    with measured() as timelines:
        compiled(values(9, 5))
    files = dump(levels, tmp_path / "deep" / "dump", timelines)
    names = [f.name for f in files]
    codes = [f"6_code_{name}.py" for name in levels.outline.codes]
    assert names == [
        "1_placements.txt",
        "2_segments.txt",
        "3_schedule.txt",
        "4_program.txt",
        "5_graph.py",
        *codes,
        "lanes.svg",
    ]
    text = {f.name: f.read_text() for f in files}
    assert text["3_schedule.txt"] == f"{levels.schedule}\n"
    assert text["4_program.txt"] == f"{levels.program}\n"
    assert len(text["1_placements.txt"].splitlines()) == len(levels.graph.nodes) - 1
    assert len(text["2_segments.txt"].splitlines()) == len(levels.outline.segments)
    for name in ("5_graph.py", *codes):
        compile(text[name], name, "exec")


def test_a_dump_marks_barriers_with_their_lines(tmp_path):
    explain(sharded, values(9, 5), options=EAGER)
    placements = dump(reports()[-1].levels, tmp_path)[0].read_text()
    (line,) = [line for line in placements.splitlines() if "barrier:" in line]
    assert line.startswith("mean ")
    assert "it reduces over the token dim 0; " in line
    assert "test_explain.py" in line


def test_the_option_dumps_every_graph(tmp_path):
    explain(sharded, values(9, 5), options=EAGER | {"dump": str(tmp_path)})
    assert [p.name for p in tmp_path.rglob("*.svg")] == ["lanes.svg"]


SVG = "{http://www.w3.org/2000/svg}"


def test_the_chart_is_well_formed_and_has_a_bar_for_each_step(compiled):
    levels = reports()[-1].levels
    root = ElementTree.fromstring(svg([("predicted <b> & more", levels.timeline), ("again", levels.timeline)]))
    titles = [t.text.split(":")[0] for t in root.iter(f"{SVG}title")]
    assert titles == [f"{i.segment}#{i.microbatch}" for lane in Lane for i in levels.timeline.on(lane)] * 2
    assert any(t.text.startswith("predicted <b> & more: ") for t in root.iter(f"{SVG}text"))
    width = float(root.get("viewBox").split()[2])
    for bar in [r for r in root.iter(f"{SVG}rect") if "step" in r.get("class", "")]:
        assert 0 <= float(bar.get("x")) <= float(bar.get("x")) + float(bar.get("width")) <= width


@pytest.mark.parametrize(
    "intervals",
    [
        (),
        (Interval(Lane.COMM, "a", None, 0.0, 0.0),),
        tuple(Interval(Lane.COMPUTE, "a", m, m, m + 1.0) for m in range(11)),
    ],
    ids=["empty", "no_time", "many_microbatches"],
)
def test_the_chart_of_any_timeline_is_well_formed(intervals):
    ElementTree.fromstring(svg([("a chart", Timeline(intervals))]))
    ElementTree.fromstring(svg([]))
