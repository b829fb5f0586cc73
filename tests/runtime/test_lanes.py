"""Lanes: which rows a microbatch gets in which layout, and when a collective is started and waited for."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

from dbo_compile import reports
from dbo_compile.ir.tokens import Split
from dbo_compile.rules.registry import rule
from dbo_compile.runtime import lanes as lanes_module
from dbo_compile.runtime.collectives import STARTERS, Pending, c10d, start
from dbo_compile.runtime.lanes import RowLanes, WorkLanes
from dbo_compile.runtime.ways import played


def test_rows_are_counted_from_the_first_of_the_step():
    lanes = RowLanes((4, 2, 3))
    assert [lanes.rows(m) for m in (0, 1, 2, None)] == [(4, 0), (2, 4), (3, 6), (9, 0)]


LAYOUTS = {
    "rows outermost": (torch.arange(9 * 5).view(9, 5), 0),
    "rows of a wider table": (torch.arange(9 * 7).view(9, 7)[:, 2:5], 0),
    "rows innermost": (torch.arange(5 * 9).view(5, 9), 1),
    "rows in the middle": (torch.arange(4 * 9 * 5).view(4, 9, 5), 1),
    "permuted": (torch.arange(3 * 9 * 5).view(5, 3, 9).permute(1, 2, 0), 1),
    "blocks of three": (torch.arange(27 * 2).view(27, 2), 0),
    "blocks of three inside": (torch.arange(2 * 27).view(2, 27), 1),
    "a dim of one before": (torch.arange(9 * 5).view(1, 9, 5), 1),
    "one number each": (torch.arange(9), 0),
    "nothing each": (torch.empty(9, 0), 0),
}


@pytest.mark.parametrize("rows", [(4, 5), (1, 8), (4, 2, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_joined_are_the_value_again_in_the_same_order_of_dims(layout, rows):
    lanes, (x, dim) = RowLanes(rows), LAYOUTS[layout]
    views = [lanes.view(x, dim, m) for m in range(len(rows))]
    slices = [lanes.slice(x, dim, m) for m in range(len(rows))]
    assert [v.shape[dim] for v in views] == [x.shape[dim] // 9 * r for r in rows]
    assert all(v._base is not None for v in views)
    assert all(torch.equal(v, s) for v, s in zip(views, slices, strict=True))
    joined = lanes.join(slices, dim)
    assert torch.equal(joined, x)
    if torch.empty_like(x).stride() == x.stride() and layout != "a dim of one before":
        assert joined.stride() == x.stride()


@pytest.mark.parametrize("layout", ["rows innermost", "rows in the middle", "permuted"])
def test_a_slice_is_laid_out_as_a_value_of_so_many_rows_would_be(layout):
    x, dim = LAYOUTS[layout]
    fewer = torch.empty_like(x.transpose(0, dim)[:4].transpose(0, dim).clone())
    assert RowLanes((4, 5)).slice(x, dim, 0).stride() == fewer.stride() != x.stride()


def test_rows_that_lie_together_are_not_copied():
    x = torch.zeros(9, 5)
    RowLanes((4, 5)).slice(x, 0, 1).fill_(1)
    assert x.sum(1).tolist() == [0] * 4 + [5] * 5


def test_no_tokens_at_all_are_no_rows():
    lanes = RowLanes((0,))
    assert lanes.view(torch.zeros(0, 5), 0, 0).shape == (0, 5)


# -- when collectives start and are waited for -----------------------------------------------------


class Work:
    def __init__(self, log, name, error=None):
        self.log, self.name, self.error = log, name, error

    def wait(self):
        self.log.append(f"wait {self.name}")
        if self.error:
            raise self.error


@pytest.fixture
def log(monkeypatch):
    """What a `WorkLanes` does with collectives that are only names; a `bad` one fails when it is waited for."""
    events = []

    def fake(op, *args):
        events.append(f"start {op}")
        return Pending(f"result of {op}", Work(events, op, RuntimeError("bad") if op == "bad" else None))

    monkeypatch.setattr(lanes_module, "start", fake)
    return events


def test_waiting_finishes_what_was_started_before_the_record(log):
    lanes = WorkLanes((4, 5))
    lanes.issue("a")
    lanes.record("a", "comm")
    lanes.issue("b")
    lanes.record("b", "comm")
    lanes.wait("a", "compute")
    assert log == ["start a", "start b", "wait a"]
    lanes.wait("a", "compute")
    lanes.wait("b", "compute")
    assert log[3:] == ["wait b"]


def test_the_comm_lane_waits_for_nothing(log):
    lanes = WorkLanes((4, 5))
    lanes.issue("a")
    lanes.record("x", "compute")
    lanes.wait("x", "comm")
    lanes.record("a", "comm")
    lanes.wait("a", "comm")
    assert log == ["start a"]


def test_a_collective_on_the_result_of_another_waits_for_that_one(log):
    lanes = WorkLanes((4, 5))
    first = lanes.issue("a")
    lanes.issue("b")
    lanes.issue("c", first)
    assert log == ["start a", "start b", "wait a", "start c"]


def test_finish_leaves_nothing_half_done(log):
    lanes = WorkLanes((4, 5))
    lanes.issue("a")
    lanes.issue("b")
    lanes.finish()
    lanes.finish()
    assert log == ["start a", "start b", "wait a", "wait b"]


def test_one_that_fails_does_not_leave_the_others_under_way(log):
    lanes = WorkLanes((4, 5))
    for name in ("bad", "b"):
        lanes.issue(name)
    with pytest.raises(RuntimeError, match="bad"):
        lanes.finish()
    assert log == ["start bad", "start b", "wait bad", "wait b"]


def test_an_error_of_a_program_is_not_hidden_by_one_of_finishing(log):
    def program(lanes):
        lanes.issue("bad")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        played(program, (4, 5), ())
    assert log == ["start bad", "wait bad"]


# -- real collectives, on one rank -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (c10d.all_to_all_single.default, ([9], [9])),
        (c10d.all_reduce.default, ("sum",)),
        (c10d.all_reduce.default, ("max",)),
        (c10d.all_reduce_.default, ("sum",)),
        (c10d.all_gather_into_tensor.default, (1,)),
        (c10d.reduce_scatter_tensor.default, ("sum", 1)),
        (c10d.broadcast.default, (0,)),
    ],
    ids=str,
)
def test_a_collective_that_is_started_is_the_functional_one(group_name, op, args):
    for x in (torch.arange(45.0).view(9, 5), torch.arange(45.0).view(5, 9).t()):
        whole = x.clone(memory_format=torch.contiguous_format)  # torch 2.11 takes no other
        want = c10d.wait_tensor(op(whole, *args, group_name))
        pending = start(op, x, *args, group_name)
        assert (pending.work is not None) == (op in STARTERS)
        pending.wait()
        assert torch.equal(pending.result, want)


def test_a_collective_writes_what_it_was_given_only_where_that_is_its_purpose(group_name):
    x = torch.ones(9, 5)
    for op in (c10d.all_reduce.default, c10d.all_reduce_.default):
        pending = start(op, x, "sum", group_name)
        pending.wait()
        assert (pending.result is x) == (op is c10d.all_reduce_.default)


fails = {"now": False}


@torch.library.custom_op("dbo_test_lanes::fragile", mutates_args=())
def fragile(x: torch.Tensor) -> torch.Tensor:
    if fails["now"]:
        raise ValueError("fragile broke")
    return x.clone()


fragile.register_fake(torch.empty_like)
rule(torch.ops.dbo_test_lanes.fragile.default)(lambda x: Split(x.dim))


def test_an_op_that_raises_leaves_no_collective_under_way_and_the_next_call_works(group_name, monkeypatch):
    made = []

    class Noted(WorkLanes):
        def __init__(self, rows, wait_for):
            super().__init__(rows, wait_for)
            made.append(self)

    def fn(x):
        return fragile(funcol.all_reduce(x @ x.new_ones(5, 5), "sum", dist.group.WORLD)).sin()

    monkeypatch.setattr("dbo_compile.runtime.ways.WorkLanes", Noted)
    options = {"split": "always", "inner": "eager", "gate": "never"}
    compiled = torch.compile(fn, backend="dbo", options=options, fullgraph=True)
    x = torch.randn(9, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), fn(x))
        monkeypatch.setitem(fails, "now", True)
        with pytest.raises(ValueError, match="fragile broke"):
            compiled(x)
        monkeypatch.setitem(fails, "now", False)
        torch.testing.assert_close(compiled(x[:6]), fn(x[:6]))
    assert [(len(lanes.started), lanes.num_finished) for lanes in made] == [(2, 2)] * 3
    assert (reports()[-1].calls, reports()[-1].calls_split) == (3, 3)


def test_a_residual_is_computed_under_the_collective(group_name):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.shared, self.down = (nn.Linear(5, 5) for _ in range(3))

        def forward(self, x):
            return self.down(funcol.all_reduce(self.up(x), "sum", dist.group.WORLD)) + self.shared(x)

    model = Layer().double()
    compiled = torch.compile(model, backend="dbo", options={"split": "always", "inner": "eager"}, fullgraph=True)
    x = torch.randn(9, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-12)
    steps = str(reports()[-1].levels.schedule).split()
    assert steps.index("all_reduce#0") < steps.index("shared#0") < steps.index("down#0")
