"""Steps of several ranks: whatever sizes each brings, all play the same, and every result is that of one process."""

from __future__ import annotations

import gc
import random

import pytest
import torch
import torch.distributed as dist

import dbo_compile
from dbo_compile import reports
from dbo_compile.integrations.transformers import expert_parallel
from tests.integrations.models import VOCAB, tiny_model
from tests.ranks import Ranks

pytestmark = pytest.mark.ranks
TOLERANCE = 1e-12  # float64, inner="eager"


def many_steps(num_steps, members, implementation, seed):
    """The largest difference to one process, what was played, the number of collectives, and how memory grew."""
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
    return worst, (report.calls, report.calls_split, report.fingerprint), report.engine.agreement.num_steps, live


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
    ("members", "implementation", "num_steps"), [(2, "dbo", 500), (4, "dbo", 60), (2, "dbo_static", 60)]
)
def test_every_step_gives_what_one_process_does(ranks, members, implementation, num_steps):
    answers = ranks.run(many_steps, num_steps, members, implementation, 5, timeout=400.0)[:members]
    worst, played, num_collectives, live = zip(*answers, strict=True)
    assert max(worst) <= TOLERANCE
    assert played == (played[0],) * members
    calls, calls_split, _ = played[0]
    assert 0 < calls_split < calls
    assert len(set(num_collectives)) == 1
    assert all(later == earlier for earlier, later in live)
