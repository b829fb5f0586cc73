"""Agreeing: the rules on wishes alone, the exchange on simulated ranks, and what real ranks see when one is lost."""

from __future__ import annotations

import os
import pickle
import random
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dbo_compile.config import Config
from dbo_compile.errors import Disagreement, RankLost
from dbo_compile.runtime import agree, links, rollcall
from dbo_compile.runtime.agree import Agreement, agreement_over
from dbo_compile.runtime.comparison import DIFFERS, Comparison, EngineState, listed, to_int64
from dbo_compile.runtime.plan import NUM_ROWS, BatchPlan, Limits, Pads, Phase, Wish, decide
from dbo_compile.runtime.rollcall import Roll, RollCall
from tests.ranks import Ranks

PROGRAM, OTHER, CONFIG = "8f00000000000001", "00ff0000000000a7", Config().fingerprint
LIMITS = Limits(2, min_decode_tokens=5, min_prefill_tokens=17, least_rows=3)
IDLE = Wish.idle(PROGRAM, CONFIG)


def wish(
    num_tokens, padded=None, *, split=True, gate=False, decode=False, program=PROGRAM, config=CONFIG, pads=Pads.ALWAYS
):
    padded = num_tokens if padded is None else padded
    return Wish(num_tokens, padded, 3 * padded, split, gate, decode, program, config, pads=pads)


# -- the rules --------------------------------------------------------------------------------------------------------


PLANS = [
    ([wish(37, 40), wish(19, 20)], "prefill of [37, 19] tokens padded to 40, 2 microbatches"),
    ([wish(19), wish(37, 40, gate=True)], "prefill of [19, 37] tokens padded to 40, 2 microbatches, with the gate"),
    ([wish(19), IDLE, wish(23)], "prefill of [19, 0, 23] tokens padded to 23, 2 microbatches"),
    ([wish(23, decode=True), wish(5, decode=True)], "decode of [23, 5] tokens padded to 23, 2 microbatches"),
    ([wish(23, decode=True), IDLE], "decode of [23, 0] tokens padded to 23, 2 microbatches"),
    (
        [wish(23, decode=True), wish(4, decode=True, gate=True)],
        "decode of [23, 4] tokens padded to 23, not split: rank 1 has 4 tokens, and a decode is split from 5 on "
        "(min_tokens)",
    ),
    (
        [wish(23), wish(5, decode=True)],
        "prefill of [23, 5] tokens padded to 23, not split: rank 1 has 5 tokens, and a prefill is split from 17 on "
        "(min_tokens)",
    ),
    ([wish(1, 2, decode=True)], "decode of [1] tokens padded to 2, not split: it has 1 token, and a decode is split "
     "from 5 on (min_tokens)"),
    (
        [wish(3, split=False), wish(19, 31), IDLE, wish(29, split=False)],
        "prefill of [3, 19, 0, 29] tokens padded to 31, not split: ranks 0 and 3 declined",
    ),
    ([IDLE, IDLE, IDLE], "nothing is played: no rank has tokens"),
    ([wish(19, 24, pads=Pads.UNEVEN), wish(19, 24)], "prefill of [19, 19] tokens, 2 microbatches"),
    (
        [wish(19, 24, pads=Pads.UNEVEN), wish(29, 32), IDLE],
        "prefill of [19, 29, 0] tokens padded to 32, 2 microbatches",
    ),
    ([wish(19, 24, pads=Pads.NEVER), wish(29, 32)], "prefill of [19, 29] tokens, 2 microbatches"),
]


@pytest.mark.parametrize(("wishes", "plan"), PLANS)
def test_the_plan_of_these_wishes(wishes, plan):
    assert str(decide(wishes, LIMITS)) == plan


def test_a_plan_without_padding_has_the_size_of_the_largest_rank():
    plan = decide([wish(19, 24, pads=Pads.NEVER), wish(29, 32)], LIMITS)
    assert (plan.padded_tokens, plan.num_elements) == (29, 87)


def test_all_idle_says_that_nothing_is_played():
    assert decide([IDLE, IDLE], LIMITS) == BatchPlan((0, 0), 0, 0, 0, False, Phase.IDLE, "no rank has tokens")


def test_rows_that_do_not_fill_the_microbatches_are_not_split():
    limits = replace(LIMITS, min_decode_tokens=1)
    few = [wish(5, decode=True), wish(2, decode=True)]
    assert decide(few, limits).reason == "5 tokens do not make 2 microbatches of at least 3"
    assert decide([wish(5, 6, decode=True), few[1]], limits).num_microbatches == 2


def test_a_microbatch_of_padding_alone_is_played():
    assert decide([wish(97), wish(17)], LIMITS).num_microbatches == 2


def test_one_microbatch_is_no_split():
    assert decide([wish(97)], replace(LIMITS, num_microbatches=1)).reason == "num_microbatches=1"


def test_a_wish_has_room_for_its_tokens():
    with pytest.raises(ValueError, match="13 tokens cannot be padded to 12"):
        wish(13, 12)


def bucket(num_tokens):
    return -(-num_tokens // 8) * 8


@st.composite
def wishes(draw):
    num_tokens = draw(st.one_of(st.just(0), st.integers(1, 40)))
    if num_tokens == 0:
        return IDLE
    mostly = st.integers(0, 7).map(bool)
    padded = bucket(num_tokens)
    pads = draw(st.sampled_from([*Pads, *3 * [Pads.ALWAYS]]))
    return wish(num_tokens, padded, split=draw(mostly), gate=draw(st.booleans()), decode=draw(mostly), pads=pads)


steps = st.lists(wishes(), min_size=1, max_size=8)
limits = st.builds(Limits, st.integers(1, 4), st.integers(1, 20), st.integers(1, 20), st.integers(1, 5))


@given(steps, limits)
def test_all_split_exactly_if_every_rank_wants_it_and_the_smallest_is_large_enough(step, limits):
    plan, busy = decide(step, limits), [w for w in step if w.num_tokens]
    decode = all(w.decode for w in busy)
    splits = (
        bool(busy)
        and limits.num_microbatches > 1
        and all(w.wants_split for w in busy)
        and min(w.num_tokens for w in busy) >= (limits.min_decode_tokens if decode else limits.min_prefill_tokens)
        and plan.padded_tokens // limits.num_microbatches >= limits.least_rows
    )
    assert plan.num_microbatches == (limits.num_microbatches if splits else 1 if busy else 0)
    assert (plan.reason == "") == splits
    assert plan.gate == (splits and any(w.wants_gate for w in busy))
    assert plan.phase is (Phase.DECODE if decode else Phase.PREFILL) if busy else Phase.IDLE


@given(steps, limits)
def test_all_pad_to_the_bucket_of_the_largest_or_none_does(step, limits):
    plan, busy = decide(step, limits), [w for w in step if w.num_tokens]
    assert plan.num_tokens == tuple(w.num_tokens for w in step)
    assert plan.pads == all(w.pads >= (Pads.ALWAYS if plan.is_even else Pads.UNEVEN) for w in busy)
    assert plan.padded_tokens == (bucket(max(plan.num_tokens)) if plan.pads else max(plan.num_tokens))


@given(steps, limits, st.randoms())
def test_no_rank_counts_more_than_another(step, limits, rng):
    order = rng.sample(range(len(step)), len(step))
    plan, turned = decide(step, limits), decide([step[i] for i in order], limits)
    assert turned.num_tokens == tuple(plan.num_tokens[i] for i in order)
    assert replace(turned, num_tokens=(), reason="") == replace(plan, num_tokens=(), reason="")


@given(steps, limits, st.integers(0, 8), st.booleans())
def test_an_idle_rank_has_no_say(step, limits, at, gate):
    step = [replace(w, pads=Pads.ALWAYS) for w in step]  # beside an idle rank, the others differ from it in size
    more = list(step)
    more.insert(at, replace(IDLE, wants_gate=gate))
    plan, joined = decide(step, limits), decide(more, limits)
    assert replace(joined, num_tokens=(), reason="") == replace(plan, num_tokens=(), reason="")


@given(steps, limits)
def test_the_reason_names_the_ranks_that_declined_or_the_smallest(step, limits):
    plan, busy = decide(step, limits), {i: w for i, w in enumerate(step) if w.num_tokens}
    if plan.reason.endswith("declined"):
        declined = [i for i, w in busy.items() if not w.wants_split]
        assert plan.reason == f"{listed(declined)} declined"
    elif found := re.match(r"rank (\d+) has (\d+) tokens", plan.reason):
        rank, num_tokens = map(int, found.groups())
        assert num_tokens == busy[rank].num_tokens == min(w.num_tokens for w in busy.values())


@given(steps, limits, st.data(), st.sampled_from(["program", "config"]))
def test_one_rank_with_another_fingerprint_is_an_error(step, limits, data, what):
    odd = data.draw(st.integers(0, len(step) - 1))
    told = {what: OTHER} if what == "config" else {what: OTHER, "graph": OTHER}
    step = [replace(w, **told) if i == odd else w for i, w in enumerate(step)]
    if len(step) == 1:
        assert decide(step, limits).num_tokens == (step[0].num_tokens,)
        return
    with pytest.raises(Disagreement, match=rf"the same {what}.*rank {odd}: {OTHER}"):
        decide(step, limits)


@given(steps, limits, st.data())
def test_one_rank_with_another_program_for_the_same_graph_makes_all_play_it_whole(step, limits, data):
    odd = data.draw(st.integers(0, len(step) - 1))
    step = [replace(w, program=OTHER) if i == odd else w for i, w in enumerate(step)]
    plan = decide(step, limits)
    if len(step) > 1 and plan.num_microbatches:
        assert (plan.num_microbatches, plan.gate, plan.reason) == (1, False, DIFFERS)
        assert not plan.compared.alike


def state(kind, generation):
    return EngineState(kind, generation).packed()


@pytest.mark.parametrize(
    ("states", "alike", "generation"),
    [
        ([state(5, 3), state(5, 3)], True, 3),
        ([state(5, 3), state(5, 0)], True, 4),  # all begin anew
        ([state(5, 3), state(6, 3)], False, 3),
        ([state(2**31 - 1, 2**32 - 2), state(2**31 - 1, 1)], True, 2**32 - 1),
    ],
)
def test_engines_of_one_kind_that_began_at_other_steps_begin_anew_together(states, alike, generation):
    found = decide([replace(wish(20), state=s) for s in states], LIMITS).compared
    assert (found.alike, found.generation) == (alike, generation)


def test_what_ranks_share_of_their_programs_is_what_they_would_wish():
    told = [(to_int64(PROGRAM), to_int64(PROGRAM), state(1, 2)), (0, 0, 0)]
    assert Comparison.shared(told) == Comparison(followers=(1,), alike=False, generation=2)
    with pytest.raises(Disagreement, match="the same program"):
        Comparison.shared([told[0], (to_int64(OTHER), to_int64(OTHER), 0)])


def test_a_disagreement_names_the_ranks_and_both_programs():
    step = [wish(5), wish(7, program=OTHER), IDLE, wish(9, program=OTHER)]
    found = f"ranks 0 and 2: {PROGRAM}, ranks 1 and 3: {OTHER}"
    with pytest.raises(Disagreement, match=rf"^ranks must play the same program, but do not \({found}\)\. Compile "):
        decide(step, LIMITS)


def test_many_ranks_are_named_by_the_first_of_them():
    assert [listed(range(n)) for n in (1, 2, 3, 9, 40)] == [
        "rank 0",
        "ranks 0 and 1",
        "ranks 0, 1 and 2",
        "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 1 more",
        "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 32 more",
    ]


@given(steps, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_wishes_survive_the_sum_of_all_columns(step, program, config):
    step = [replace(w, program=f"{program:016x}", config=f"{config:016x}") for w in step]
    matrices = torch.zeros(len(step), NUM_ROWS, len(step), dtype=torch.int64)
    for rank, w in enumerate(step):
        matrices[rank, :, rank] = torch.tensor(w.packed(), dtype=torch.int64)
    columns = zip(*matrices.sum(0).tolist(), strict=True)
    assert [Wish.unpacked(column) for column in columns] == step


# -- one rank ---------------------------------------------------------------------------------------------------------


def alone():
    return Agreement(None, timeout_s=1.0)


def test_a_rank_alone_gets_what_it_wishes():
    agreement = alone()
    agreement.agree_ahead(wish(19, 20))
    plans = [agreement.agree(w, LIMITS) for w in (wish(19, 20), wish(16), IDLE)]
    assert plans == [decide([w], LIMITS) for w in (wish(19, 20), wish(16), IDLE)]


def test_a_rank_alone_must_come_with_what_it_announced():
    agreement = alone()
    agreement.agree_ahead(wish(19))
    with pytest.raises(Disagreement, match=r"rank 0 announced .*=19, .* but came with .*=23, "):
        agreement.agree(wish(23), LIMITS)
    assert agreement.agree(wish(23), LIMITS) == decide([wish(23)], LIMITS)  # nobody else was told


def test_a_step_is_announced_once():
    agreement = alone()
    agreement.agree_ahead(wish(19))
    with pytest.raises(Disagreement, match="before it came to play"):
        agreement.agree_ahead(wish(19))


# -- simulated ranks --------------------------------------------------------------------------------------------------


class Group:
    """What an agreement asks of a `torch.distributed.ProcessGroup`."""

    def __init__(self, store, rank, num_ranks):
        self.store, self._rank, self._num_ranks = store, rank, num_ranks

    def size(self):
        return self._num_ranks

    def rank(self):
        return self._rank

    def get_group_store(self):
        return self.store


@pytest.fixture
def simulated():
    def run(num_ranks, play, timeout_s=5.0, device=agree.CPU, groups=Group):
        """What `play(rank, agreement)` returns or raises on each of so many ranks, each a thread."""
        store = dist.HashStore()
        with ThreadPoolExecutor(num_ranks) as pool:
            made = [
                pool.submit(Agreement, groups(store, rank, num_ranks), timeout_s=timeout_s, device=device)
                for rank in range(num_ranks)
            ]
            agreements = [agreement.result() for agreement in made]
            return list(pool.map(guarded, [play] * num_ranks, range(num_ranks), agreements))

    return run


def guarded(play, rank, agreement):
    try:
        return play(rank, agreement)
    except (Disagreement, RankLost) as error:
        return f"{type(error).__name__}: {error}"


def test_every_rank_gets_the_plan_that_follows_from_all_wishes(simulated):
    step = [wish(37, 40), IDLE, wish(19, gate=True)]
    plans = simulated(3, lambda rank, agreement: [agreement.agree(step[rank], LIMITS) for _ in range(3)])
    assert plans == [[decide(step, LIMITS)] * 3] * 3


def test_a_step_in_time_leaves_nothing_in_the_store(simulated):
    def play(rank, agreement):
        agreement.agree(wish(19), LIMITS)
        return [sign for sign in agreement._roll.signs().values() if not sign.startswith("0 ")]  # 0: connecting

    assert simulated(3, play) == [[]] * 3


@pytest.mark.parametrize(
    ("num_ranks", "late_s", "timeout_s"),
    [(2, 0.9, 10.0), (3, 1.1, 0.6)],
    ids=["is slow", "comes while the roll is called"],
)
def test_a_rank_is_waited_for_that(simulated, num_ranks, late_s, timeout_s):
    def play(rank, agreement):
        time.sleep(late_s * (rank == 1))
        return agreement.agree(wish(19 + rank), LIMITS).num_tokens

    assert simulated(num_ranks, play, timeout_s=timeout_s) == [tuple(range(19, 19 + num_ranks))] * num_ranks


def test_a_rank_that_compiles_is_waited_for(simulated):
    def play(rank, agreement):
        if rank == 1:
            with agreement.busy():
                time.sleep(3.1)
        return agreement.agree(wish(19 + rank), LIMITS).num_tokens

    assert simulated(3, play, timeout_s=0.6) == [(19, 20, 21)] * 3


def test_a_rank_that_has_compiled_and_does_not_come_is_named(simulated):
    def play(rank, agreement):
        if rank == 1:
            with agreement.busy():
                time.sleep(2.1)
            return time.monotonic()
        try:
            agreement.agree(wish(19), LIMITS)
        except RankLost as error:
            return str(error), time.monotonic()

    (one, at), compiled, (two, _) = simulated(3, play, timeout_s=0.6)
    assert one == two
    assert one.startswith("rank 1 did not agree on step 1 within ")
    assert at - compiled < 0.6 + 2.0


def test_ranks_that_compile_for_too_long_are_lost_too(simulated, monkeypatch):
    monkeypatch.setattr(rollcall, "BUSY_SECONDS", 1.5)

    def play(rank, agreement):
        with agreement.busy() if rank == 1 else nullcontext():
            time.sleep(4.5 * (rank == 1))
        return rank == 1 or agreement.agree(wish(19), LIMITS)

    assert simulated(2, play, timeout_s=0.6)[0].startswith("RankLost: rank 1 did not agree on step 1 within ")


def test_what_dynamo_compiles_is_told_to_the_others():
    told = []
    agreement = Agreement(None, timeout_s=1.0)
    agreement.busy = lambda: recorded(told)
    group = Group(dist.HashStore(), 0, 1)
    agree._agreements[group] = {(1.0, agree.CPU): agreement}
    agreement_over(group, 1.0)
    compiled = torch.compile(lambda x: x + len(told), backend="eager")
    assert compiled(torch.zeros(3)).tolist() == [1, 1, 1]
    assert told == ["begins", "ended"]
    compiled(torch.zeros(3))
    assert told == ["begins", "ended"] * 2  # the guard on `told` made it compile again


@contextmanager
def recorded(told):
    told.append("begins")
    try:
        yield
    finally:
        told.append("ended")


def test_different_programs_are_the_same_error_on_every_rank(simulated):
    step = [wish(37), wish(19, program=OTHER), wish(23)]
    errors = simulated(3, lambda rank, agreement: agreement.agree(step[rank], LIMITS))
    assert errors == [errors[0]] * 3
    assert f"(ranks 0 and 2: {PROGRAM}, rank 1: {OTHER})" in errors[0]


def test_ranks_may_announce_or_not(simulated):
    def play(rank, agreement):
        found = []
        for i in range(4):
            mine = wish(19 + 7 * rank + i)
            if (rank + i) % 2:
                agreement.agree_ahead(mine)
            found.append(agreement.agree(mine, LIMITS))
        return found

    assert simulated(2, play) == [[decide([wish(19 + i), wish(26 + i)], LIMITS) for i in range(4)]] * 2


def test_a_rank_that_breaks_its_word_is_an_error_on_every_rank(simulated):
    def play(rank, agreement):
        agreement.agree_ahead(wish(19))
        try:
            agreement.agree(wish(19 + 4 * (rank == 1)), LIMITS)
        finally:
            if rank == 1:  # whose error may be caught: it is not let in again
                with pytest.raises(RankLost, match="announced"):
                    agreement.agree(wish(31), LIMITS)
        return agreement.agree(wish(31), LIMITS)

    began = time.monotonic()
    one, broke, two = simulated(3, play, timeout_s=20.0)
    assert re.match(r"Disagreement: rank 1 announced Wish\(num_tokens=19, .*, but came with Wish\(num_tokens=23", broke)
    assert one == two == broke.replace("Disagreement: ", "RankLost: rank 1 left: ")
    assert time.monotonic() - began < 3.0


def test_a_rank_that_announced_a_step_and_finds_its_inputs_wrong_is_not_waited_for(simulated):
    def play(rank, agreement):
        agreement.agree_ahead(wish(19))
        if rank == 1:
            return agreement.meet(Wish.wrong(PROGRAM, CONFIG))
        agreement.agree(wish(19), LIMITS)
        return agreement.share([rank])  # plays what it was told, and waits for the others there

    began = time.monotonic()
    one, wrong, two = simulated(3, play, timeout_s=20.0)
    assert wrong is None
    assert one == two
    assert re.match(r"RankLost: rank 1 left: it announced Wish\(num_tokens=19, .*is_valid=False", one)
    assert time.monotonic() - began < 3.0


def test_a_rank_that_leaves_is_not_waited_for(simulated):
    def play(rank, agreement):
        if rank == 1:
            agreement.leave("300 tokens are too many")
        return agreement.agree(wish(19), LIMITS)

    began = time.monotonic()
    errors = simulated(3, play, timeout_s=20.0)
    assert errors == ["RankLost: rank 1 left: 300 tokens are too many"] * 3
    assert time.monotonic() - began < 3.0


def test_a_rank_that_comes_after_it_was_given_up_raises_what_the_others_did(simulated):
    def play(rank, agreement):
        agreement.agree(wish(19), LIMITS)
        time.sleep(3.0 * (rank == 1))
        return agreement.agree(wish(19), LIMITS)

    errors = simulated(3, play, timeout_s=0.6)
    assert errors == [errors[0]] * 3
    assert re.match(r"RankLost: rank 1 did not agree on step 2 within \d\.\d s$", errors[0])


def test_a_rank_that_came_and_fell_silent_is_named(simulated):
    def play(rank, agreement):
        if rank == 1:
            return agreement._roll.sign(1, 7)
        return agreement.agree(wish(19), LIMITS)

    errors = simulated(3, play, timeout_s=0.6)
    assert errors[0] == errors[2]
    assert errors[0].startswith("RankLost: rank 1 did not agree on step 1 within ")


def test_a_connection_that_breaks_is_blamed_at_once_on_the_only_rank_missing(simulated):
    def play(rank, agreement):
        if rank == 1:
            for connection in agreement._link.sockets.values():
                connection.close()
            return ""
        return agreement.agree(wish(19), LIMITS)

    began = time.monotonic()
    errors = simulated(3, play, timeout_s=20.0)
    assert errors[0] == errors[2]
    assert re.match(r"RankLost: rank 1 did not agree on step 1 .* s \(connection to rank 1: .*\)$", errors[0])
    assert time.monotonic() - began < 3.0


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError("[/gloo/pair.cc:144] Connection closed by peer. Look there"), "Connection closed by peer"),
        (BrokenPipeError(), "BrokenPipeError"),
    ],
)
def test_a_failure_always_has_a_cause(error, cause):
    """Without one a rank would go on waiting for a collective that has failed."""
    assert agree._cause(error) == cause


def test_a_store_that_is_gone_does_not_hold_up_the_error(monkeypatch):
    class Gone(dist.HashStore):
        def set(self, key, value):
            time.sleep(9.0)

    monkeypatch.setattr(rollcall, "GRACE_SECONDS", 0.3)
    began = time.monotonic()
    call = RollCall(Roll(Gone(), 0, 2), 1, "agree on step 1", began, 0.3)
    assert call.verdict().startswith("ranks did not all agree on step 1, nor does their store say who is missing")
    assert time.monotonic() - began < 1.0


class Sums(Group):
    """An all-reduce between threads, as if on an accelerator."""

    came, of_all = threading.Condition(), {}

    def __init__(self, store, rank, num_ranks):
        super().__init__(store, rank, num_ranks)
        self.step = 0
        self.parts = self.of_all.setdefault(id(store), {})

    def allreduce(self, tensors):
        (tensor,), self.step = tensors, self.step + 1
        with self.came:
            parts = self.parts.setdefault(self.step, {})
            parts[self._rank] = tensor.clone()
            self.came.notify_all()
        return Sum(parts, self._num_ranks, tensor)


class Sum:
    def __init__(self, parts, num_ranks, tensor):
        self.parts, self.num_ranks, self.tensor = parts, num_ranks, tensor

    def is_completed(self):
        return len(self.parts) == self.num_ranks

    def wait(self):
        self.tensor.copy_(sum(self.parts.values()))
        return True


DEVICE = torch.device("meta")
"""Not the CPU; its tensors are put on the CPU all the same."""


@pytest.fixture
def on_device(simulated, monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(links.torch, "Stream", lambda _device: nullcontext())
    monkeypatch.setattr(links.torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))
    return partial(simulated, device=DEVICE, groups=Sums)


def test_a_device_is_asked_until_its_all_reduce_is_done(on_device):
    def play(rank, agreement):
        time.sleep(0.7 * (rank == 1))
        return [agreement.agree(wish(19 + rank), LIMITS).num_tokens for _ in range(2)]

    assert on_device(2, play) == [[(19, 20)] * 2] * 2


def test_a_device_that_never_comes_is_named_too(on_device):
    errors = on_device(2, lambda rank, agreement: rank == 1 or agreement.agree(wish(19), LIMITS), timeout_s=0.6)
    assert errors[0].startswith("RankLost: rank 1 did not agree on step 1 within ")


def test_an_agreement_made_in_inference_mode_serves_outside_of_it(on_device):
    def play(rank, agreement):
        agreement.agree_ahead(wish(19))
        return agreement.agree(wish(19), LIMITS).num_tokens

    with torch.inference_mode():
        made = on_device(2, lambda _rank, agreement: agreement)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(play, range(2), made)) == [(19, 19)] * 2


# -- real ranks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as ranks:
        yield ranks


def agreement_of(members, timeout_s):
    return Agreement(dist.new_group(members), timeout_s=timeout_s, connect_timeout_s=20.0)


def random_steps(members, seed):
    """Whether all plans of 100 steps follow from what all ranks wish; some are announced, and ranks dawdle."""
    if dist.get_rank() not in members:
        dist.new_group(members)  # every rank of the world takes part in making a group
        return True
    agreement, me = agreement_of(members, 20.0), members.index(dist.get_rank())
    shared, own = random.Random(seed), random.Random(me)
    right = []
    for _ in range(100):
        step = [random_wish(shared) for _ in members]
        if own.random() < 0.3:
            agreement.agree_ahead(step[me])
            time.sleep(own.choice([0, 0, 0.001]))
        right.append(agreement.agree(step[me], LIMITS) == decide(step, LIMITS))
    return all(right)


def random_wish(rng):
    num_tokens = rng.choice([0, rng.randrange(1, 60), rng.randrange(17, 60)])
    padded = bucket(num_tokens)
    return wish(num_tokens, padded, split=rng.random() < 0.9, gate=rng.random() < 0.2, decode=rng.random() < 0.5)


@pytest.mark.ranks
@pytest.mark.parametrize("members", [[1, 3], [0, 1, 2, 3]])
def test_real_ranks_agree_on_a_hundred_steps(ranks, members):
    assert ranks.run(random_steps, members, 7) == [True] * 4


def different_programs():
    try:
        agreement_of([0, 1, 2, 3], 20.0).agree(wish(19, program=OTHER if dist.get_rank() == 2 else PROGRAM), LIMITS)
    except Disagreement as error:
        return str(error)


@pytest.mark.ranks
def test_real_ranks_raise_the_same_error_for_different_programs(ranks):
    errors = ranks.run(different_programs)
    assert errors == [errors[0]] * 4
    assert f"(ranks 0, 1 and 3: {PROGRAM}, rank 2: {OTHER})" in errors[0]


def one_never_comes(how, timeout_s):
    """What a rank that comes raises, and after how long; rank 1 meets the others once, and then is lost."""
    agreement = agreement_of([0, 1, 2, 3], timeout_s)
    agreement.agree(wish(19), LIMITS)
    if dist.get_rank() == 1 and how == "raises":
        return "RuntimeError: out of memory", 0.0
    if dist.get_rank() == 1:
        os.kill(os.getpid(), getattr(signal, how))
    began = time.monotonic()
    try:
        return str(agreement.agree(wish(19), LIMITS)), 0.0
    except RankLost as error:
        return str(error), time.monotonic() - began


@pytest.mark.ranks
def test_a_rank_that_raises_before_it_agrees_is_named(ranks):
    answers = ranks.run(one_never_comes, "raises", 2.0)
    check_survivors([answers[i] for i in (0, 2, 3)], 2.0)


def check_survivors(answers, timeout_s):
    texts, seconds = zip(*answers, strict=True)
    assert list(texts) == [texts[0]] * 3
    assert re.match(r"rank 1 did not agree on step 2 within \d\.\d s", texts[0])
    assert max(seconds) < timeout_s + 2.0


def survivors(ranks, fn, *args):
    """What ranks 0, 2 and 3 return while rank 1 does not answer; `Ranks.run` would take that as the end of all."""
    connections = [connection for _, connection in ranks._ranks]
    for connection in connections:
        connection.send_bytes(pickle.dumps((fn, args)))
    alive = [connections[i] for i in (0, 2, 3)]
    assert all(connection.poll(20.0) for connection in alive)
    return [pickle.loads(connection.recv_bytes()).value for connection in alive]


@pytest.mark.ranks
def test_a_rank_that_is_stopped_is_named_and_hears_of_it_when_it_goes_on(ranks):
    answers = survivors(ranks, one_never_comes, "SIGSTOP", 2.0)
    check_survivors(answers, 2.0)
    process, connection = ranks._ranks[1]
    os.kill(process.pid, signal.SIGCONT)
    assert connection.poll(20.0)
    assert pickle.loads(connection.recv_bytes()).value[0] == answers[0][0]


@pytest.mark.ranks
def test_a_rank_that_is_killed_is_named_long_before_the_timeout(ranks):
    check_survivors(survivors(ranks, one_never_comes, "SIGKILL", 30.0), 2.0)
    ranks.kill()
