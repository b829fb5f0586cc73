"""Steps of several ranks: whatever sizes each brings, all play the same, and every result is that of one process."""

from __future__ import annotations

import gc
import os
import random
import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

import dbo_compile
from dbo_compile import load_decisions, log, reports, save_decisions
from dbo_compile.errors import DboError
from dbo_compile.integrations.transformers import expert_parallel
from dbo_compile.report import new_reports
from dbo_compile.runtime.comparison import DIFFERS
from tests.integrations.models import VOCAB, tiny_model
from tests.ranks import Ranks

pytestmark = pytest.mark.ranks
TOLERANCE = 1e-12  # float64, inner="eager"
NUM_STEPS = int(os.environ.get("RANK_STEPS", "30"))
"""`RANK_STEPS=500` has the many that a change of the engine must pass."""


def many_steps(num_steps, members, implementation, seed):
    """The largest difference to one process, what was played, the numbers of agreements and of collectives, and how
    memory grew."""
    group = dist.new_group(list(range(members)))
    if dist.get_rank() >= members:
        return None
    torch.set_num_threads(1)
    torch._dynamo.reset()
    alone = tiny_model("qwen3_moe", experts="batched_mm", dtype=torch.float64)
    model = tiny_model("qwen3_moe", experts="grouped_mm", dtype=torch.float64)
    expert_parallel(model, group, ep_implementation=implementation)
    dbo_compile.dbo(
        model, token_dims={"input_ids": 0}, split="always", inner="eager", dp_group=group, pad_to="auto",
        pad_values={"input_ids": 1}, min_tokens=8,
    )  # fmt: skip
    shared, own = random.Random(seed), torch.Generator().manual_seed(dist.get_rank())
    worst, live = 0.0, []
    with torch.no_grad():
        for step in range(num_steps):
            sizes = [random_size(shared) for _ in range(members)]
            ids = torch.randint(0, VOCAB, (sizes[dist.get_rank()], 3), generator=own)
            if not len(ids) and step:
                model.forward.idle_step()
            elif (got := model(ids)) is not None and len(ids):
                worst = max(worst, (got.logits - alone(ids).logits).abs().max().item())
            ids = got = None
            if step in (num_steps // 2, num_steps - 1):
                live.append(live_bytes())
    report = reports()[-1]
    met = report.engine.agreement.num_steps, group._get_sequence_number_for_group()
    return worst, (report.calls, report.calls_split, report.fingerprint), met, live


def random_size(rng):
    return rng.choice([0, 1, *[rng.randrange(2, 201) for _ in range(4)]])


def live_bytes():
    """The memory of all tensors that are alive, in bytes."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as ranks:
        yield ranks


@pytest.mark.parametrize(
    ("members", "implementation", "num_steps"), [(2, "dbo", NUM_STEPS), (4, "dbo", NUM_STEPS), (2, "dbo_static", 20)]
)
def test_every_step_gives_what_one_process_does(ranks, members, implementation, num_steps):
    answers = ranks.run(many_steps, num_steps, members, implementation, 5, timeout=600.0)[:members]
    worst, played, met, live = zip(*answers, strict=True)
    assert max(worst) <= TOLERANCE
    assert played == (played[0],) * members
    calls, calls_split, _ = played[0]
    assert 0 < calls_split < calls
    num_agreements, num_collectives = met[0]
    assert met == (met[0],) * members
    assert num_collectives > num_agreements == num_steps
    assert all(later == earlier for earlier, later in live)


def centred(x):
    """Padding would be seen; ranks may have as many tokens as they like."""
    return x - funcol.all_reduce(x.mean(0), "sum", dist.group.WORLD)


def summed(x):
    """Padding would be seen, and what is exchanged is as long as the step."""
    return funcol.all_reduce(x, "sum", dist.group.WORLD) - x.mean(0)


def unpaddable_steps(fn, steps, entry):
    """For each step its error, or how far the results are from eager; then how many were split."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    before, options = reports(), {"split": "always", "inner": "eager", "pad_to": "auto", "token_dims": {"x": 0}}
    run = dbo_compile.dbo(fn, **options) if entry == "decorator" else torch.compile(fn, backend="dbo", options=options)
    found = []
    with torch.no_grad():
        for sizes in steps:
            x = torch.randn(sizes[dist.get_rank()], 5, dtype=torch.float64)
            try:
                found.append((run(x) - fn(x)).abs().max().item())
            except DboError as error:
                found.append(f"{type(error).__name__}: {error}")
    return found, sum(r.calls_split for r in new_reports(before))


@pytest.mark.parametrize("entry", ["decorator", "backend"])
@pytest.mark.parametrize("first", [(19, 19), (19, 9)])
def test_ranks_play_their_own_numbers_of_tokens_where_padding_would_be_seen(two, first, entry):
    steps = [first, (7, 18), (5, 5), (2, 33), (17, 18)]
    answers = two.run(unpaddable_steps, centred, steps, entry, timeout=200.0)
    assert max(worst for found, _ in answers for worst in found) <= TOLERANCE
    assert [num_split for _, num_split in answers] == [5, 5]


@pytest.mark.parametrize("entry", ["decorator", "backend"])
@pytest.mark.parametrize("first", [(19, 19), (19, 9)])
def test_ranks_that_differ_and_must_not_are_told_alike_and_go_on(two, first, entry):
    steps = [first, (7, 18), (5, 5), (2, 33), (17, 17)]
    (mine, num_split), (theirs, _) = two.run(unpaddable_steps, summed, steps, entry, timeout=200.0)
    errors = [error for error in mine if isinstance(error, str)]
    assert errors == [error for error in theirs if isinstance(error, str)]
    assert num_split == len(steps) - len(errors) == sum(a == b for a, b in steps)
    assert max(worst for worst in [*mine, *theirs] if worst not in errors) <= TOLERANCE
    assert re.match(
        r"Disagreement: ranks bring 7, 18 tokens, which have to be padded to one number, and cannot be: mean .* sees "
        r"all tokens at once: .*\. Leave out pad_to and give all ranks as many tokens, or take that op out", errors[-2],
    )  # fmt: skip


def warned_steps(steps, fn, want, split):
    """Whether a graph that is not split gives in each step what `want` does, and what was warned of."""
    torch._dynamo.reset()
    warnings = []
    run = dbo_compile.dbo(fn, token_dims={"x": 0}, inner="eager", split=split)
    made = [torch.full((sizes[dist.get_rank()], 2), 4.0) for sizes in steps]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(log.logger, "warning", lambda message, *args: warnings.append(message % args))
        return [run(x).tolist() == want(x).tolist() for x in made], warnings


def mixed(x):
    """No communication, so it is not split; padding would be seen."""
    return x - x.mean(0)


def test_padding_that_nobody_knows_the_effect_of_and_nobody_needs_is_left_out(two):
    for right, warnings in two.run(warned_steps, [(9, 9), (9, 6), (6, 9), (8, 8)], mixed, mixed, "auto", timeout=200.0):
        assert right == [True] * 4
        assert warnings == []


def test_a_first_step_that_was_padded_in_vain_is_warned_of_and_the_next_one_is_not_padded(two):
    (right, warnings), _ = two.run(warned_steps, [(9, 6), (6, 9), (8, 8)], mixed, mixed, "auto", timeout=200.0)
    assert right == [True] * 3  # this rank's own first step had no padding
    (warning,) = warnings
    assert warning.startswith("ranks bring 9, 6 tokens and are padded to 9, but a graph is not split (it has no comm")


def largest(x):
    """What is exchanged is as long as the step, of rows that are alike."""
    return funcol.all_reduce(x, "max", dist.group.WORLD) * 2


def doubled(x):
    return x * 2


def test_ranks_that_may_need_one_size_are_padded_with_a_warning_though_nobody_knows_its_effect(two):
    for right, warnings in two.run(warned_steps, [(9, 9), (9, 6), (9, 6)], largest, doubled, "never", timeout=200.0):
        assert right == [True] * 3
        (warning,) = warnings
        assert warning.startswith('ranks bring 9, 6 tokens and are padded to 9, but a graph is not split (split="ne')


def sometimes(x, talks):
    return doubled(x) if not talks else largest(x)


def steps_that_begin_to_talk(steps):
    torch._dynamo.reset()
    run, found = dbo_compile.dbo(sometimes, token_dims={"x": 0}, inner="eager"), []
    with torch.no_grad():
        for *sizes, talks in steps:
            x = torch.full((sizes[dist.get_rank()], 2), 4.0)
            try:
                found.append(run(x, talks).tolist() == doubled(x).tolist())
            except DboError as error:
                found.append(type(error).__name__)
    return found


def test_a_graph_that_needs_one_size_and_comes_late_is_padded_for_from_the_next_step_on(two):
    steps = [(9, 9, False), (9, 6, True), (6, 9, True), (7, 3, False)]
    for found in two.run(steps_that_begin_to_talk, steps, timeout=200.0):
        assert found == [True, "Disagreement", True, True]


def test_a_rank_with_too_few_tokens_to_play_them_unpadded_is_an_error_on_every_rank(two):
    answers = two.run(unpaddable_steps, centred, [(9, 7), (1, 18), (5, 4)], "decorator", timeout=200.0)
    (first, error, last), other = (found for found, _ in answers)
    assert max(first, last, other[0], other[2]) <= TOLERANCE
    assert error == other[1]
    assert error.startswith("Disagreement: ranks bring 1, 18 tokens, which have to be padded to one number, and cannot")


def without_decorator(implementation, batches, pad_to):
    """The largest difference to one process, and what was declined, of plain `torch.compile`."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    before = reports()
    alone = tiny_model("qwen3_moe", experts="batched_mm", dtype=torch.float64)
    model = tiny_model("qwen3_moe", experts="grouped_mm", dtype=torch.float64)
    expert_parallel(model, ep_implementation=implementation)
    options = {"split": "always", "inner": "eager", "pad_to": pad_to}
    compiled = torch.compile(model, backend="dbo", options=options, fullgraph=True)
    worst = 0.0
    with torch.no_grad():
        for shape in batches[dist.get_rank()]:
            ids = torch.randint(0, VOCAB, shape if isinstance(shape, tuple) else (shape, 7))
            worst = max(worst, (compiled(ids).logits - alone(ids).logits).abs().max().item())
    found = new_reports(before)
    declined = [reason for r in found for reason in (r.decline_counts or [r.reason]) if reason]
    return worst, sum(r.calls_split for r in found), declined


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


@pytest.mark.parametrize(
    ("implementation", "pad_to", "batches", "split"),
    [
        ("dbo_static", None, ((5, 2, 9), (3, 8, 4)), 3),  # what is sent is as long as the step: all pad to the largest
        ("dbo", "auto", ((5, 2, 17), (3, 8, 4)), 3),
        ("dbo", None, ((5, 9, 6), (5, 3, 6)), 3),
    ],
)
def test_ranks_of_different_sizes_need_no_decorator(two, implementation, pad_to, batches, split):
    for worst, calls_split, declined in two.run(without_decorator, implementation, batches, pad_to, timeout=200.0):
        assert worst <= TOLERANCE
        assert calls_split == split, declined


def test_a_rank_with_a_single_sequence_makes_all_play_unsplit(two):
    answers = two.run(without_decorator, "dbo", ((1, 1, 6), (5, 7, 6)), None, timeout=200.0)
    assert max(worst for worst, _, _ in answers) <= TOLERANCE
    assert [(split, declined) for _, split, declined in answers] == [
        (1, ["it has a single token"]),
        (1, ["the graph of rank 0 is not split"]),
    ]


def test_beside_a_rank_whose_graph_is_not_split_nobody_pads(two):
    """Such a graph cannot be padded, and what is exchanged here is as long as the step: 17 x 7 tokens, not 18 x 7."""
    answers = two.run(without_decorator, "dbo_static", (((1, 119), 6), ((17, 7), 6)), "auto", timeout=200.0)
    assert max(worst for worst, _, _ in answers) <= TOLERANCE
    assert [split for _, split, _ in answers] == [1, 1]


def late_and_early(x):
    """The last exchange could be played before the one above it, which waits for the first."""
    rows = x.view(-1, 5)
    first = funcol.all_reduce(rows * 3, "sum", dist.group.WORLD)
    late = funcol.all_reduce(first.tanh() @ torch.eye(5), "max", dist.group.WORLD)
    early = funcol.all_reduce(rows * 2, "min", dist.group.WORLD)
    return (late + early).view(x.shape)


def beside_a_follower(fn, shapes):
    """The results of this rank, in eager and compiled, of one call of it for each shape."""
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="dbo", options={"split": "always", "inner": "eager"})
    made = torch.Generator().manual_seed(dist.get_rank())
    with torch.no_grad():
        xs = [torch.randn(shape, generator=made) for shape in shapes[dist.get_rank()]]
        want = [fn(x) for x in xs]
        return [(compiled(x) - y).abs().max().item() for x, y in zip(xs, want, strict=True)], reports()[-1].reason


def test_beside_a_rank_whose_graph_is_not_split_collectives_are_played_in_the_order_of_the_model(two):
    answers = two.run(beside_a_follower, late_and_early, (((1, 90),), ((6, 15),)), timeout=200.0)
    assert [reason for _, reason in answers] == ["it has a single token", ""]
    assert max(worst for found, _ in answers for worst in found) <= 1e-6


def summed_rows(x):
    return funcol.all_reduce(x.view(-1, 5).tanh() @ torch.ones(5, 5), "sum", dist.group.WORLD).view(x.shape)


def many_beside_a_follower(shapes, num_steps):
    torch._dynamo.reset()
    x, options = torch.ones(shapes[dist.get_rank()]), {"timeout_s": 20.0}
    with torch.no_grad():
        want, compiled = summed_rows(x), torch.compile(summed_rows, backend="dbo", options=options)
        return [(compiled(x) - want).abs().max().item() for _ in range(num_steps)], reports()[-1].decline_counts


def test_beside_a_rank_whose_graph_is_not_split_nothing_is_timed(two):
    """Ranks exchange what they timed, and a rank that follows would not come to that."""
    follower, other = two.run(many_beside_a_follower, ((1, 90), (6, 15)), 20, timeout=200.0)
    assert max(*follower[0], *other[0]) <= 1e-5
    assert other[1] == {"the graph of rank 0 is not split": 20}


def lengths(entry, batch, steps):
    """How far each step is from one process, what was declined, and how many steps the last graph has split."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    alone = tiny_model("qwen3_moe", experts="batched_mm", dtype=torch.float64)
    model = tiny_model("qwen3_moe", experts="grouped_mm", dtype=torch.float64)
    expert_parallel(model, ep_implementation="dbo")
    options = {"inner": "eager"}
    run = dbo_compile.dbo(model, token_dims={"input_ids": 0}, **options) if entry == "decorator" else torch.compile(
        model, backend="dbo", options=options, fullgraph=True
    )  # fmt: skip
    before, worst = reports(), 0.0
    with torch.no_grad():
        for length in steps[dist.get_rank()]:
            ids = torch.randint(0, VOCAB, (batch, length))
            worst = max(worst, (run(ids).logits - alone(ids).logits).abs().max().item())
    found = new_reports(before)
    return worst, {reason for r in found for reason in r.decline_counts}, [r.calls_split for r in found]


@pytest.mark.parametrize("entry", ["decorator", "backend"])
def test_ranks_whose_graphs_were_traced_for_other_sizes_play_unsplit_until_they_have_the_same(two, entry):
    """Dynamo makes the length a symbol when a rank meets a second one: on rank 0 in step 3, on rank 1 in step 6. Their
    programs differ in the order of collectives meanwhile, and their engines in what they have timed."""
    steps = [7, 7, *[9, 11] * 8], [7, 7, 7, 7, 7, *[12, 8] * 6, 9]
    for worst, declined, (first, last) in two.run(lengths, entry, 6, steps, timeout=300.0):
        assert worst <= TOLERANCE
        assert DIFFERS in declined
        assert first > 0
        assert last > 0


class Sharded(torch.nn.Module):
    """A dense layer whose inner dim is shared by the ranks."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16, bias=False)

    def forward(self, x):
        return x + funcol.all_reduce(self.down(self.up(x).relu()), "sum", dist.group.WORLD)


def timed_steps(num_steps, path):
    torch.set_num_threads(1)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Sharded()
    compiled = torch.compile(model, backend="dbo", fullgraph=True)
    made = torch.Generator().manual_seed(dist.get_rank())
    with torch.no_grad():
        for _ in range(num_steps):
            x = torch.randn(12, 16, generator=made)
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)
        decided = reports()[-1].decisions
        dist.barrier()
        if dist.get_rank() == 0:
            save_decisions(path)
        dist.barrier()
        load_decisions(path)
        torch._dynamo.reset()
        again = torch.compile(model, backend="dbo", fullgraph=True)
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-5)
    return decided, reports()[-1].decisions, reports()[-1].fingerprint


def test_ranks_time_and_decide_together_and_a_restart_times_nothing_again(two, tmp_path):
    answers = two.run(timed_steps, 60, str(tmp_path / "decisions.json"), timeout=300.0)
    (decided, loaded, fingerprint), other = answers
    assert (decided, loaded, fingerprint) == other
    assert decided == loaded
    ((size, decision),) = decided.items()
    assert str(size) == "12/192"
    assert [way for way in decision.seconds if way != "refined"] == ["split", "unsplit", "inductor"]
