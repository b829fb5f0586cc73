"""Measured costs: what is timed, what counts of several ranks, and the program that is made of it."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

from dbo_compile import register_rule, reports
from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.refine import CALLS, Refiner, synchronize
from dbo_compile.runtime.rows import Guards
from dbo_compile.runtime.signature import Signature, TokenInput
from dbo_compile.runtime.tune import REFINED, Size
from dbo_compile.runtime.ways import Programs, Ways, Whole

SIZE = Size(8, 8)


class Two(Agreement):
    """A second rank whose figures are given."""

    def __init__(self, theirs):
        super().__init__(None, timeout_s=1.0)
        self.theirs = theirs

    def share(self, values):
        return [tuple(values), tuple(self.theirs) if len(values) > 1 else tuple(values)]


def ways(agreement, **options):
    programs = Programs({}, Guards((), ()), "5" * 16, codes={"a": "a", "b": "a", "send": "send"}, comm_codes=("send",))
    return Ways(programs, Whole(lambda *_: ()), Signature((TokenInput(0, 0, "x"),)), agreement, **options)


def test_the_slowest_rank_counts_for_compute_and_the_fastest_for_a_collective():
    theirs = [3_000_000, 5_000_000, 9_000_000, 7_000_000]  # of a part: a, send; of the whole: a, send
    made = []
    refiner = Refiner(ways(Two(theirs)), Two(theirs), made.append)
    mine = [{"a": 0.004, "send": 0.004}, {"a": 0.008, "send": 0.008}] * CALLS
    costs = refiner._agreed([{"a": 9.0, "send": 9.0}, {"a": 9.0, "send": 9.0}, *mine[2:]])
    assert costs == {"a": (0.004, 0.009), "send": (0.004, 0.007)}


def test_each_code_is_timed_on_rows_of_a_microbatch_and_on_all_of_them():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        report = tuned(40)
    finally:
        dist.destroy_process_group()
    ((size, decision),) = report.decisions.items()
    codes = report.levels.outline.codes
    assert decision.costs.keys() == codes.keys()
    ((part, whole),) = [decision.costs[name] for name, code in codes.items() if "dbo_test_refine" in code.module.code]
    assert part > SLOW_SECONDS < whole
    assert REFINED in decision.seconds
    refined = report.engine._refiner.programs[size]
    assert "slow_0" not in refined.modules[2].code  # its parts cost as much as the whole: it is played once


def test_the_device_of_the_arguments_is_waited_for(monkeypatch):
    waited_for = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited_for.append)
    synchronize([torch.ones(3), 7, torch.ones(3, device="meta"), torch.ones(5, device="meta")])
    assert waited_for == [torch.device("meta")]


SLOW_SECONDS = 0.015
"""So much more than all else takes that no noise makes up for it."""


@torch.library.custom_op("dbo_test_refine::slow", mutates_args=())
def slow(x: torch.Tensor) -> torch.Tensor:
    time.sleep(SLOW_SECONDS)  # whatever the number of rows, as if it read many weights
    return x.clone()


slow.register_fake(torch.empty_like)
register_rule(torch.ops.dbo_test_refine.slow.default)(lambda x: x.place)


def tuned(num_calls):
    def fn(x):
        y = funcol.all_reduce(x.exp(), "sum", dist.group.WORLD)
        return slow(y) + 1

    compiled = torch.compile(fn, backend="dbo", options={"inner": "eager"}, fullgraph=True)
    x = torch.randn(12, 5)
    with torch.no_grad():
        for _ in range(num_calls):
            torch.testing.assert_close(compiled(x), fn(x))
    return reports()[-1]
