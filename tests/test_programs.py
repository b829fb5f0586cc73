"""Programs of a real model with expert parallelism, on one rank: what is on which lane, what the proof refuses."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

from dbo_compile import reports
from dbo_compile.errors import InvalidProgram, InvalidSchedule
from dbo_compile.integrations.transformers import expert_parallel
from dbo_compile.ir.program import End, Free, Record, Run, Wait
from dbo_compile.ir.proof import verify_program
from dbo_compile.ir.schedule import Lane
from dbo_compile.ir.verify import verify_schedule
from dbo_compile.passes.cost import CostModel
from dbo_compile.passes.cut import Kind
from dbo_compile.report import new_reports
from dbo_compile.runtime.clock import simulate
from tests.integrations.models import VOCAB, tiny_model

ALWAYS = {"split": "always", "inner": "eager"}


def levels_of(num_layers, implementation="dbo", **options):
    """The levels of qwen3_moe with that many layers, after a call that was checked against eager."""
    torch._dynamo.reset()
    ids = torch.randint(0, VOCAB, (6, 7))
    want = tiny_model("qwen3_moe", experts="batched_mm", num_hidden_layers=num_layers)
    model = tiny_model("qwen3_moe", experts="grouped_mm", num_hidden_layers=num_layers)
    expert_parallel(model, ep_implementation=implementation)
    compiled = torch.compile(model, backend="dbo", options=ALWAYS | options, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, want(ids).logits, rtol=0.0, atol=1e-12)
    assert reports()[-1].calls_split == 1, reports()[-1].reason
    return reports()[-1].levels


@pytest.fixture(scope="module")
def levels(group):
    return levels_of(3)


@pytest.fixture(scope="module")
def deep(group):
    return levels_of(5)


@pytest.mark.parametrize("implementation", ["dbo", "dbo_static"])
@pytest.mark.usefixtures("group")
def test_every_all_to_all_is_on_the_comm_lane_and_nothing_is_a_barrier(implementation):
    levels = levels_of(2, implementation)
    comm = [s for s in levels.outline.segments.values() if s.lane is Lane.COMM]
    exchanges = [n for n in levels.graph.nodes if "all_to_all_single" in str(n.target)]
    assert len(comm) == len(exchanges) == 6
    assert all("all_to_all" in s.name and s.group for s in comm)
    assert dict(levels.tokens.barriers) == {}


def test_more_layers_are_no_more_codes(levels, deep):
    assert len(levels.outline.codes) == len(deep.outline.codes)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="this PyTorch has Dynamo trace every call of a region")
@pytest.mark.usefixtures("group")
def test_dynamo_traces_one_of_the_layers_that_are_regions(monkeypatch):
    """It would trace each if one of them changed its experts, as transformers does around an exchange."""
    layer, told = type(tiny_model("qwen3_moe", experts="grouped_mm").model.layers[0]), Mock()
    monkeypatch.setattr(layer, "forward", torch.compiler.nested_compile_region(layer.forward))
    monkeypatch.setattr("torch._dynamo.variables.invoke_subgraph.hc_log", told)
    levels_of(4)
    reused = [call for call in told.debug.call_args_list if "cache hit" in call.args[0]]
    assert len(reused) == 2 * 3  # Dynamo traces twice, as the number of tokens becomes a symbol


def reads_counts(segment, levels):
    """Whether a collective exchanges numbers of rows rather than rows."""
    return not levels.outline.groups[segment.name].nodes[0].meta["val"].is_floating_point()


def test_equal_costs_keep_both_lanes_busy_in_the_steady_state(deep):
    """On the clock: segments with products and exchanges of rows cost 1, the small ones between them nothing."""
    levels = deep
    groups = levels.outline.groups
    heavy = {name for name, group in groups.items() if any("mm" in str(n.target) for n in group.nodes)}
    heavy |= {s.name for s in levels.outline.segments.values() if s.lane is Lane.COMM and not reads_counts(s, levels)}
    timeline = simulate(levels.program, lambda run: float(run.segment in heavy))
    steady = [i for i in timeline.intervals if any(f"layers_{n}_" in i.segment for n in range(1, 4))]
    begin, end = min(i.start for i in steady), max(i.end for i in steady)
    for lane in Lane:
        busy = sum(min(i.end, end) - max(i.start, begin) for i in timeline.on(lane) if i.end > begin and i.start < end)
        assert busy >= 0.9 * (end - begin), f"{lane.value} works {busy} of {end - begin}"


@pytest.mark.usefixtures("group")
def test_the_policies_differ_in_overlap_alone():
    makespan = {}
    for policy in ("sequential", "alternate", "list"):
        levels = levels_of(2, policy=policy)
        model, groups = CostModel(levels.graph), levels.outline.groups  # by which it was ordered
        seconds = {name: model.seconds(groups[s.code]) for name, s in levels.outline.segments.items()}
        makespan[policy] = simulate(levels.program, lambda run, s=seconds: s[run.segment]).makespan
    assert makespan["list"] <= makespan["alternate"] < makespan["sequential"]


def test_the_schedule_is_text_both_ways(levels):
    assert levels.schedule.with_steps(str(levels.schedule)) == levels.schedule


# -- the proof on this program ----------------------------------------------------------------------------------------


def refused(program, instrs):
    with pytest.raises(InvalidProgram, match="<-- HERE"):
        verify_program(replace(program, instrs=tuple(instrs)))


def places(program, kind):
    found = [i for i, instr in enumerate(program.instrs) if isinstance(instr, kind)]
    assert found
    return found


def test_every_dropped_wait_is_refused(levels):
    program = levels.program
    for at in places(program, Wait):
        refused(program, program.instrs[:at] + program.instrs[at + 1 :])


def test_every_record_moved_behind_the_next_segment_of_its_lane_is_refused(levels):
    program = levels.program
    for at in places(program, Record):
        instr = program.instrs[at]
        later = next(
            (i for i in places(program, Run) if i > at and program.instrs[i].lane is instr.lane), len(program.instrs)
        )
        waits = [i for i in places(program, Wait) if program.instrs[i].event == instr.event]
        if later < min(waits):
            moved = (*program.instrs[:at], *program.instrs[at + 1 : later + 1], instr, *program.instrs[later + 1 :])
            refused(program, moved)


def test_every_free_moved_before_the_last_reader_is_refused(levels):
    program = levels.program
    for at in places(program, Free):
        for reg in program.instrs[at].regs:
            readers = [i for i in places(program, Run) if i < at and reg in program.instrs[i].ins]
            if readers:
                instrs = list(program.instrs)
                instrs[at] = Free(tuple(r for r in program.instrs[at].regs if r != reg) or ())
                instrs.insert(readers[-1], Free((reg,)))
                refused(program, instrs)


def test_collectives_swapped_on_one_microbatch_are_refused(levels):
    comm = [s for s in levels.schedule.steps if levels.outline.segments[s.segment].lane is Lane.COMM]
    for microbatch in (0, 1):
        for first, second in pairwise(s for s in comm if s.microbatch == microbatch):
            swap = {first: second, second: first}
            steps = tuple(swap.get(s, s) for s in levels.schedule.steps)
            with pytest.raises(InvalidSchedule):
                verify_schedule(replace(levels.schedule, steps=steps))


def test_a_segment_played_twice_or_not_at_all_is_refused(levels):
    program = levels.program
    for at in places(program, Run):
        refused(program, (*program.instrs[: at + 1], *program.instrs[at:]))
        refused(program, program.instrs[:at] + program.instrs[at + 1 :])


def test_a_result_read_before_it_is_made_is_refused(levels):
    program = levels.program
    end = program.instrs[places(program, End)[0]]
    at = next(i for i, instr in enumerate(program.instrs) if isinstance(instr, Run) and instr.outs)
    refused(program, (*program.instrs[:at], end, *program.instrs[at:-1]))


@pytest.mark.usefixtures("group")
def test_an_all_to_all_by_place_among_the_tokens_is_a_barrier():
    def fn(x):
        return funcol.all_to_all_single(x.exp(), None, None, dist.group.WORLD).sin()

    x = torch.randn(9, 4, dtype=torch.float64)
    with torch.no_grad():
        got = torch.compile(fn, backend="dbo", options=ALWAYS, fullgraph=True)(x)
        torch.testing.assert_close(got, fn(x), rtol=0.0, atol=1e-12)
    assert reports()[-1].calls_split == 1
    assert "place among all tokens" in next(iter(reports()[-1].barriers.values()))


@pytest.mark.usefixtures("group")
def test_a_group_that_is_gone_is_an_error_that_says_what_to_do():
    group = dist.new_group([0])
    compiled = torch.compile(
        lambda x: funcol.all_reduce(x.exp(), "sum", group) + 1, backend="dbo", options={"inner": "eager"}
    )
    with torch.no_grad():
        assert compiled(torch.ones(4, 2)).shape == (4, 2)
        dist.destroy_process_group(group)
        with pytest.raises(RuntimeError, match="keep the group as long as the model"):
            compiled(torch.ones(4, 2))


@pytest.mark.slow
def test_code_that_is_played_once_is_compiled_for_all_rows():
    """Inductor fixes the size that this op averages over: with tokens there it is played once, and right."""

    def fn(x):
        return torch.nn.functional.interpolate(x.sin(), size=3, mode="area") * 2

    before = reports()
    options = {"split": "always", "min_tokens": 2, "token_dims": {"x": 2}}
    compiled = torch.compile(fn, backend="dbo", options=options)
    with torch.no_grad():
        for n in (8, 16, 9, 4):
            x = torch.randn(2, 3, n)
            torch.testing.assert_close(compiled(x), fn(x))
    (report,) = new_reports(before)
    assert (report.calls, report.calls_split) == (4, 1)
    assert any("what is played once was not compiled for 16 tokens" in reason for reason in report.decline_counts)


def test_nothing_reads_a_collective_before_it_is_waited_for(group):
    """Traced for three rows these have strides that nobody can tell to be without gaps: 3 * (6 // 3)."""

    def fn(x):
        return funcol.all_to_all_single(x.T.reshape(-1, 6).sin(), None, None, group).cos()

    before = reports()
    compiled = torch.compile(fn, backend="dbo", options=ALWAYS | {"num_microbatches": 4, "token_dims": {"x": 0}})
    with torch.no_grad():
        for n in (11, 3):
            x = torch.randn(n, 6)
            torch.testing.assert_close(compiled(x), x.T.reshape(-1, 6).sin().cos())
    sent = [c for r in new_reports(before) for c in r.levels.outline.codes.values() if c.kind is Kind.COMM]
    assert {n.op for c in sent for n in c.module.graph.nodes} == {"placeholder", "call_method", "output"}
