"""Streams of an accelerator, on one that takes notes: what is issued is the program that was proven, and races not."""

from __future__ import annotations

import pytest
import torch
import torch.distributed._functional_collectives as funcol
from torch import nn

from dbo_compile import reports
from dbo_compile.ir.program import Free, Record, Run, Wait
from dbo_compile.runtime.collectives import c10d, play
from dbo_compile.runtime.streams import FORK, JOIN, StreamPlayer
from tests.ir.moe import moe_program
from tests.runtime.fake_device import FakeDevice, Memory
from tests.runtime.test_conformance import PROGRAMS, play_on_fake

BEGIN, BEGIN_COMM = ("record", FORK, "compute"), ("wait", FORK, "comm")


def notes_of(device, player):
    """What a device noted, with the events by name; switching is left out."""
    name_of = {event: name for name, event in player.events.items()}
    return [(what, name_of.get(x, x), *rest) for what, x, *rest in device.notes if what != "switch"]


def expected(program):
    """What a device should note, by the program alone."""
    for instr in program.instrs:
        match instr:
            case Run(): yield "run", instr.segment, instr.lane.value
            case Record(): yield "record", instr.event, instr.lane.value
            case Wait(): yield "wait", instr.event, instr.lane.value
            case Free(): yield "free", len(instr.regs)


def test_a_program_that_does_not_communicate_leaves_the_comm_lane_alone():
    """Else a capture of it would end with a stream that was never joined."""
    device = FakeDevice()
    player = StreamPlayer(device)
    player(lambda lanes, x: (x,), (3,), [torch.ones(3)])
    assert notes_of(device, player) == [BEGIN]


def test_an_error_while_lanes_are_joined_does_not_hide_what_went_wrong_before():
    device = FakeDevice()

    def broken(lanes, *_args):
        lanes.switch_to_comm()
        device.new_event = lambda: 1 / 0
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as raised:
        StreamPlayer(device)(broken, (3,), [])
    assert raised.value.__notes__ == ["and then the lanes could not be joined: division by zero"]


@pytest.mark.parametrize(("policy", "n"), PROGRAMS)
def test_what_is_issued_is_the_proven_program(policy, n, monkeypatch):
    program = moe_program(3, n, policy)
    device, player = play_on_fake(program, monkeypatch)
    notes, want = notes_of(device, player), [BEGIN, *expected(program)]
    want.insert(next(i for i, note in enumerate(want) if note[-1] == "comm"), BEGIN_COMM)
    assert notes[: len(want)] == want
    assert [what for what, *_ in notes[len(want) :]] in ([], ["free"])  # the end drops what the program keeps
    assert device.now is device.caller


def test_a_stream_is_switched_only_where_the_lane_changes(monkeypatch):
    program = moe_program(3)
    device, _ = play_on_fake(program, monkeypatch)
    switches = [stream for what, stream, *_ in device.notes if what == "switch"]
    assert switches == ["comm", "compute"] * (len(switches) // 2)
    assert len(switches) <= 2 * sum(run.lane.value == "comm" for run in program.instrs if isinstance(run, Run))


# -- real tensors, real programs, a fake device ----------------------------------------------------


class Layer(nn.Module):
    """Attention-like, a state written in place, an all-to-all-like and an all-reduce, a shared expert."""

    def __init__(self, group):
        super().__init__()
        self.group = group
        self.up, self.shared, self.down = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x, cache):
        cache.copy_(x * 2)
        sent = funcol.all_reduce(self.up(x), "sum", self.group)
        other = self.shared(x) + cache
        rows = self.down(sent).relu()
        return funcol.all_reduce(rows, "sum", self.group) + other, rows.sin()


class Stack(nn.Module):
    def __init__(self, group):
        super().__init__()
        self.layers = nn.ModuleList(Layer(group) for _ in range(3))

    def forward(self, x, caches):
        outs = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, extra = layer(x, cache)
            outs.append(extra)
        return x, outs[-1]


def as_played(fn, *inputs, **options):
    """`(module, rows, arguments)` of a call, as a player gets them."""
    compiled = torch.compile(fn, backend="dbo", options={"inner": "eager"} | options, fullgraph=True)
    seen = []
    with torch.no_grad():
        compiled(*inputs)
        engine = reports()[-1].engine
        usual = engine.player

        def spy(*played):
            seen.append(played)
            return usual(*played)

        engine.player = spy
        compiled(*inputs)
    return seen[-1]


def compiled_stack(group, **options):
    """As `as_played`, and what eager says."""
    model, x = Stack(group).double(), torch.randn(9, 5, dtype=torch.float64)
    caches = [torch.zeros(9, 5, dtype=torch.float64) for _ in range(3)]
    with torch.no_grad():
        want = model(x, caches)
    return *as_played(model, x, caches, **options), want


@pytest.mark.parametrize(("policy", "n"), [("list", 2), ("alternate", 2), ("sequential", 2), ("list", 3)])
def test_nothing_races_and_the_answer_is_right(group, policy, n):
    module, rows, args, want = compiled_stack(group, policy=policy, num_microbatches=n)
    device = FakeDevice()
    player = StreamPlayer(device)
    with torch.no_grad(), Memory(device) as memory:
        results = [player(module, rows, args) for _ in range(3)]
    assert memory.races == []
    assert memory.num_reused > 20
    for result in results:
        torch.testing.assert_close(tuple(r for r in result if r.shape == (9, 5))[-2:], want, rtol=0, atol=1e-12)
    assert device.num_streams == 1


@pytest.mark.parametrize("how", ["wait", "switch_to_comm"])
def test_a_broken_device_is_found_out(group, how, monkeypatch):
    module, rows, args, _ = compiled_stack(group)
    device = FakeDevice()
    player = StreamPlayer(device)
    monkeypatch.setattr(f"dbo_compile.runtime.streams.StreamLanes.{how}", lambda *_: None)
    with torch.no_grad(), Memory(device) as memory:
        player(module, rows, args)
        player(module, rows, args)
    assert bool(memory.races) == (how != "switch_to_comm")  # one stream alone is slow, and right


@pytest.mark.parametrize("has_fork", [True, False])
def test_a_collective_waits_for_the_callers_arguments(group, has_fork, monkeypatch):
    def fn(x):
        return funcol.all_reduce(x, "sum", group) * 2

    module, rows, args = as_played(fn, torch.randn(9, 5), num_microbatches=1)
    device = FakeDevice()
    player = StreamPlayer(device)
    if not has_fork:
        monkeypatch.setattr("dbo_compile.runtime.streams.StreamLanes._fork", lambda lanes: None)
    with torch.no_grad(), Memory(device) as memory:
        player(module, rows, [x.sin() if isinstance(x, torch.Tensor) else x for x in args])
    assert (memory.races == []) == has_fork


def test_an_error_half_way_leaves_the_callers_stream_current_and_behind_the_other(group):
    module, rows, args, _ = compiled_stack(group)
    device = FakeDevice()
    player = StreamPlayer(device)

    def broken(lanes, *_args):
        lanes.switch_to_comm()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        player(broken, rows, args)
    assert notes_of(device, player)[-2:] == [("record", JOIN, "comm"), ("wait", JOIN, "compute")]
    assert device.now is device.caller
    with torch.no_grad(), Memory(device) as memory:
        player(module, rows, args)
    assert memory.races == []


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (c10d.all_to_all_single.default, ([9], [9])),
        (c10d.all_reduce.default, ("sum",)),
        (c10d.all_reduce_.default, ("max",)),
        (c10d.all_gather_into_tensor.default, (1,)),
        (c10d.reduce_scatter_tensor.default, ("sum", 1)),
        (c10d.broadcast.default, (0,)),
        (torch.ops.aten.sin.default, None),
    ],
    ids=str,
)
def test_a_collective_that_is_played_is_the_functional_one(group, op, args):
    for x in (torch.arange(45.0).view(9, 5), torch.arange(45.0).view(5, 9).t()):
        rest = () if args is None else (*args, group.group_name)
        want = op(x.clone(memory_format=torch.contiguous_format), *rest)
        assert torch.equal(play(op, x, *rest), c10d.wait_tensor(want))
