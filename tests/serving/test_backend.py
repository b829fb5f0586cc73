"""The serving shape through the backend and the decorator: what a user writes, on steps of many requests."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import dbo_compile
from dbo_compile import compilation, reports
from dbo_compile.axes import CuSeqlens, Tokens
from dbo_compile.config import Config
from dbo_compile.ir.program import Program
from dbo_compile.report import new_reports
from dbo_compile.runtime.engine import Engine
from dbo_compile.runtime.given import RequestInputs
from dbo_compile.runtime.plan import BatchPlan, Phase
from dbo_compile.runtime.rows import Guards
from dbo_compile.runtime.signature import Signature, TokenInput
from dbo_compile.runtime.tune import INDUCTOR, SPLIT, UNSPLIT, WAYS
from dbo_compile.runtime.ways import Programs, Whole
from tests.serving.model import AXES, BLOCK, NUM_BLOCKS, Model, Pages, caches, step_of
from tests.serving.test_serving import mixed, random_steps, twin

OPTIONS = {"token_dims": AXES, "split": "always", "inner": "eager", "min_tokens": 2}
MEMBERS = {name if name in ("input_ids", "positions") else f"metadata.{name}": axis for name, axis in AXES.items()}
NOBODYS = NUM_BLOCKS * BLOCK - 1
"""The slot that padding is written to."""


def compiled(model, **options):
    return torch.compile(model, backend="dbo", options=OPTIONS | options, fullgraph=True)


def straddling():
    """A step of requests of 2, 7 and 4 tokens; cut in the middle, the second has tokens in both microbatches."""
    pages = Pages()
    first, second, third = (pages.request(list(range(n))) for n in (2, 11, 4))
    second.cached = 4
    return step_of([(first, 2), (second, 7), (third, 4)])


@pytest.mark.parametrize(("inner", "num_steps"), [("eager", 60), ("inductor", 3)])
def test_random_steps_are_what_one_request_at_a_time_gives(group, inner, num_steps):
    before, model = reports(), Model(group, num_layers=2 if inner == "eager" else 1).double()
    plain, run = Model(group, num_layers=len(model.layers)).double(), compiled(model, inner=inner)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for work in random_steps(random.Random(5), num_steps):
            want = torch.cat([plain(*step_of([one])) for one in work])
            torch.testing.assert_close(run(*step_of(work)), want, rtol=0, atol=1e-12)
            torch.testing.assert_close(caches(model), caches(plain), rtol=0, atol=1e-12)
    graphs = new_reports(before)
    assert all(r.split or r.reason == "it has a single token" for r in graphs)
    assert sum(r.calls_split for r in graphs) >= num_steps // 3
    assert not any(r.barriers for r in graphs)


def test_the_decorator_takes_metadata_in_a_dataclass_and_pads_around_it(group):
    """Of 13, 13 and 0 tokens: all are played by the graphs of 16."""
    before, model = reports(), Model(group).double()
    plain = twin(model, group)
    options = OPTIONS | {"token_dims": MEMBERS, "pad_to": [16], "pad_values": {"metadata.slots": NOBODYS}}
    run = dbo_compile.dbo(model, **options)
    with torch.no_grad():
        for step in (straddling(), step_of(mixed())):
            slots = step[2].slots
            torch.testing.assert_close(run(*step), plain(*step), rtol=0, atol=1e-12)
            assert step[2].slots is slots
        run.forward.idle_step()
    for mine, theirs in zip(caches(model), caches(plain), strict=True):
        torch.testing.assert_close(mine.flatten(0, 1)[:NOBODYS], theirs.flatten(0, 1)[:NOBODYS], rtol=0, atol=1e-12)
    assert [r.calls_split for r in new_reports(before) if r.calls] == [2]


@torch.library.custom_op("dbo_test::written", mutates_args=("cache",))
def written(cache: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
    """The place is `slots`, or `slots` and `at`."""
    cache[slots if at is None else slots + at] = k
    return k.clone()


@torch.library.custom_op("dbo_test::written_for_nothing", mutates_args=("cache",))
def written_for_nothing(cache: torch.Tensor, slots: torch.Tensor, k: torch.Tensor) -> None:
    cache[slots] = k


written.register_fake(lambda cache, slots, k, at=None: torch.empty_like(k))
dbo_compile.register_attention_op(torch.ops.dbo_test.written.default, tokens=["slots", "k", "at"], caches=["cache"])
dbo_compile.register_attention_op(
    torch.ops.dbo_test.written_for_nothing.default, tokens=["slots", "k"], caches=["cache"]
)


class Cached(torch.nn.Module):
    """Writes each row of x to the place that the model is said to write to."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.register_buffer("cache", torch.zeros(32, 4))

    def forward(self, x, slots, positions):
        written = self.write(self.cache, slots, x, positions)
        return x * 2 if written is None else written * 2


WRITES = {
    "slots": lambda cache, slots, x, positions: written(cache, slots, x + positions[:, None]),
    "slots without a result": lambda cache, slots, x, positions: written_for_nothing(cache, slots.long(), x),
    "a view of slots": lambda cache, slots, x, positions: written(cache, slots.view(-1, 1)[:, 0], x),
    "slots and positions": lambda cache, slots, x, positions: written(cache, slots - positions + positions, x),
    "positions beside": lambda cache, slots, x, positions: written(cache, slots, x, positions * 0),
    "row numbers": lambda cache, slots, x, positions: written(cache, torch.arange(len(x)), x),
}
NO_VALUES = "writes a buffer of all tokens; give pad_values for {} that have it write where nobody reads"


@pytest.mark.parametrize("entry", ["backend", "decorator"])
@pytest.mark.parametrize(
    ("writes", "values", "missing"),
    [
        ("slots", {}, "slots"),
        ("slots", {"slots": 31}, ""),
        ("slots", {"positions": 7}, "slots"),
        ("slots", {"x": 1, "positions": 7}, "slots"),
        ("slots without a result", {"positions": 7}, "slots"),
        ("slots without a result", {"slots": 31}, ""),
        ("a view of slots", {"positions": 7}, "slots"),
        ("a view of slots", {"slots": 31}, ""),
        ("slots and positions", {"slots": 31}, "positions"),
        ("slots and positions", {"positions": 0}, "slots"),
        ("slots and positions", {}, "slots, positions"),
        ("slots and positions", {"slots": 31, "positions": 0}, ""),
        ("positions beside", {"slots": 31}, "positions"),
        ("positions beside", {"slots": 31, "positions": 0}, ""),
        ("row numbers", {"slots": 31, "positions": 0}, None),
    ],
)
def test_padding_overwrites_nothing_in_a_cache(entry, writes, values, missing):
    """Whatever values are given, and for what: rows that are not directed elsewhere are not played."""
    model, before = Cached(WRITES[writes]), reports()
    options = {"split": "always", "inner": "eager", "pad_to": [16], "pad_values": values,
               "token_dims": {"x": 0, "slots": 0, "positions": 0}}  # fmt: skip
    decorated = entry == "decorator"
    run = dbo_compile.dbo(model, **options) if decorated else torch.compile(model, backend="dbo", options=options)
    with torch.no_grad():
        for _ in range(2):
            run(torch.ones(13, 4), torch.arange(13), torch.zeros(13, dtype=torch.int64))
    assert model.cache[:13].eq(1).all()
    assert not model.cache[13:31].any()
    (report,) = new_reports(before)
    assert report.calls_split == 2
    if missing is None:
        assert report.unpaddable.endswith("writes a buffer of all tokens, and no input of tokens says where")
    else:
        assert report.unpaddable.endswith(NO_VALUES.format(missing) if missing else "")
        assert bool(report.unpaddable) == bool(missing)


def test_a_dict_of_metadata_works_as_well():
    def fn(x, meta):
        return x * 2 + meta["bias"]

    run = dbo_compile.dbo(fn, token_dims={"x": 0, "meta.bias": Tokens(0)}, split="always", inner="eager", pad_to=[8])
    x, bias = torch.randn(5, 3), torch.randn(5, 3)
    with torch.no_grad():
        assert torch.equal(run(x, {"bias": bias}), x * 2 + bias)


def ends_early(m):
    m.cu_seqlens[-1] = 12


def goes_down(m):
    m.cu_seqlens[1] = 11


def attends_to_too_little(m):
    m.seq_lens[1] = 3


def has_more_requests_than_tokens(m):
    m.cu_seqlens = torch.cat([m.cu_seqlens[:1].repeat(12), m.cu_seqlens])
    m.seq_lens = torch.cat([m.seq_lens[:1].repeat(12), m.seq_lens])
    m.block_table = torch.cat([m.block_table[:1].repeat(12, 1), m.block_table])


def is_of_another_step(m):
    m.block_table = m.block_table[:2]


@pytest.mark.parametrize("entry", ["backend", "decorator"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (ends_early, "cu_seqlens ends at 12, but the step has 13 tokens"),
        (goes_down, "cu_seqlens goes down from 11 to 9: request 1 would have -2 tokens"),
        (attends_to_too_little, "says that request 1 attends to 3 tokens, fewer than its 7"),
        (has_more_requests_than_tokens, "there are 15 requests, more than the 13 tokens"),
        (is_of_another_step, "inputs of one step must tell of as many requests"),
    ],
)
def test_wrong_metadata_is_an_error_before_anything_is_written(group, entry, spoil, message):
    model = Model(group, num_layers=1).double()
    run = compiled(model) if entry == "backend" else dbo_compile.dbo(model, **OPTIONS | {"token_dims": MEMBERS})
    ids, positions, metadata = straddling()
    metadata = replace(metadata, cu_seqlens=metadata.cu_seqlens.clone(), seq_lens=metadata.seq_lens.clone())
    spoil(metadata)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        run(ids, positions, metadata)
    assert not any(cache.any() for cache in caches(model))


class OtherRank:
    """An agreement with a rank that says of every step whether it can split it."""

    rank, size, wait_for = 0, 2, None
    num_steps = num_shared = 0

    def __init__(self, *, can_split: bool) -> None:
        self.can_split, self.asked = can_split, []

    def share(self, values):
        self.asked.append(tuple(values))
        return [tuple(values), (self.can_split,)]


@pytest.mark.parametrize(("mine", "other", "rows"), [(True, True, (2, 4)), (True, False, ()), (False, True, ())])
def test_a_padded_step_is_split_only_if_every_rank_can(mine, other, rows):
    """Requests that are not to be cut: two of them can be parted, one cannot."""
    bounds = torch.tensor([0, 2, 5] if mine else [0, 5])
    requests = RequestInputs({"bounds": (1, CuSeqlens())})
    signature = Signature((TokenInput(0, 0, "x"),), output_dims=(0,), requests=requests, whole_requests=True)
    programs = Programs({}, Guards((), ()), "5" * 16)
    agreement = OtherRank(can_split=other)
    engine = Engine(programs, Whole(lambda *_: ()), signature, agreement, Config(pad_to=[6], inner="eager"))
    call = engine.planner.read([torch.zeros(5, 3), bounds])
    assert engine.planner._wish(call).wants_split is mine
    plan = BatchPlan((5, 5), 6, 18, 2, gate=False, phase=Phase.PREFILL, reason="")
    turn = engine.planner.turn(plan, call)
    assert (turn.cut.rows, bool(turn.reason), turn.num_rows) == (rows, not rows, 6)
    assert agreement.asked == [(mine,)]


@pytest.mark.parametrize(
    ("mine", "theirs", "common"),
    [
        ((SPLIT, True, 3, 3), (SPLIT, True, 3, 3), (SPLIT, True)),
        ((SPLIT, False, 0, 3), (SPLIT, False, 0, 3), (SPLIT, False)),
        ((SPLIT, True, 3, 3), (SPLIT, True, 4, 3), (UNSPLIT, False)),
        ((SPLIT, True, 3, 3), (UNSPLIT, True, 3, 3), (UNSPLIT, False)),
        ((INDUCTOR, True, 5, 3), (SPLIT, False, 0, 3), (SPLIT, False)),
        ((SPLIT, True, 0, 3), (INDUCTOR, False, 0, 3), (UNSPLIT, False)),
    ],
)
def test_ranks_that_may_play_other_graphs_time_in_step_or_not_at_all(mine, theirs, common):
    """A step of one request is a graph of its own, with decisions of its own: a rank that would time alone waits
    forever for the others' figures."""
    agreement = OtherRank(can_split=True)
    agreement.share = lambda values: [tuple(values), (WAYS.index(theirs[0]), *theirs[1:])]
    programs = Programs({}, Guards((), ()), "5" * 16)
    engine = Engine(programs, Whole(lambda *_: ()), Signature((TokenInput(0, 0, "x"),)), agreement, Config())
    assert engine._common_way(*mine) == common


def test_the_gate_finds_that_microbatches_write_and_attend_in_the_wrong_order(group, monkeypatch):
    """A missing edge, and a proof that does not look for it."""
    order = compilation.order

    def wrong(segments, n, *args, **options):
        schedule = order(segments, n, *args, **options)
        swap = {0: n - 1, n - 1: 0, None: None}
        return replace(schedule, steps=tuple(replace(s, microbatch=swap[s.microbatch]) for s in schedule.steps))

    monkeypatch.setattr(compilation, "order", wrong)
    monkeypatch.setattr(compilation, "Program", lambda *args: Program(*args[:3], straddles=False))
    model, before = Model(group).double(), reports()
    plain, step = twin(model, group), straddling()
    with torch.no_grad():
        assert torch.equal(compiled(model)(*step), plain(*step))
    assert all(map(torch.equal, caches(model), caches(plain)))
    (report,) = new_reports(before)
    assert report.reason.startswith("splitting changed result 0 of the graph")
