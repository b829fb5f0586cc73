"""Two gloo ranks: expert parallelism and tensor parallelism, split, against one process in eager mode."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

from dbo_compile import reports
from dbo_compile.integrations.transformers import expert_parallel
from dbo_compile.ir.schedule import Lane
from tests.integrations.models import VOCAB, tiny_model
from tests.ranks import Ranks

pytestmark = pytest.mark.ranks
# float64 with inner="eager"; models that route in float32 round differently when a product has fewer rows.
TOLERANCE = {"qwen3_moe": 1e-12, "mixtral": 1e-12, "deepseek_v3": 2e-6}


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


def expert_parallel_case(name, implementation, inner, batches):
    """Largest difference to one-process eager over calls of these sizes, and what the report says."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    dtype = torch.float64 if inner == "eager" else torch.float32
    alone = tiny_model(name, experts="batched_mm", dtype=dtype)
    model = tiny_model(name, experts="grouped_mm", dtype=dtype)
    expert_parallel(model, ep_implementation=implementation)
    compiled = torch.compile(model, backend="dbo", options={"split": "always", "inner": inner}, fullgraph=True)
    worst = 0.0
    with torch.no_grad():
        for batch in batches[dist.get_rank()]:
            ids = torch.randint(0, VOCAB, (batch, 7))
            worst = max(worst, (compiled(ids).logits - alone(ids).logits).abs().max().item())
    return worst, summary()


def summary():
    report = reports()[-1]
    lanes = {s.lane for s in report.levels.outline.segments.values() if "all_" in s.name}
    return {
        "calls_split": report.calls_split,
        "declined": report.decline_counts,
        "barriers": report.barriers,
        "on_comm_lane": lanes == {Lane.COMM},
        "num_comm_ops": report.num_comm_ops,
        "fingerprint": report.fingerprint,
    }


SAME = ((5, 2, 8), (5, 2, 8))
UNEVEN = ((5, 2, 8), (7, 3, 2))


@pytest.mark.parametrize("name", sorted(TOLERANCE))
@pytest.mark.parametrize(("implementation", "batches"), [("dbo", UNEVEN), ("dbo_static", SAME)])
def test_expert_parallelism_equals_one_process(ranks, name, implementation, batches):
    answers = ranks.run(expert_parallel_case, name, implementation, "eager", batches)
    for worst, report in answers:
        assert worst <= TOLERANCE[name]
        assert report["calls_split"] == 3, report["declined"]
        assert report["barriers"] == {}
        assert report["on_comm_lane"]
    assert answers[0][1]["fingerprint"] == answers[1][1]["fingerprint"]


def regions_case(name, implementation, batches):
    """The same with layers that are nested compile regions."""
    layer = type(tiny_model(name, experts="grouped_mm", dtype=torch.float64).model.layers[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "forward", torch.compiler.nested_compile_region(layer.forward))
        return expert_parallel_case(name, implementation, "eager", batches)


@pytest.mark.parametrize(("implementation", "batches"), [("dbo", UNEVEN), ("dbo_static", SAME)])
def test_layers_that_are_nested_compile_regions_play_the_same_program(ranks, implementation, batches):
    plain = ranks.run(expert_parallel_case, "qwen3_moe", implementation, "eager", batches)
    marked = ranks.run(regions_case, "qwen3_moe", implementation, batches)
    for (worst, report), (_, same) in zip(marked, plain, strict=True):
        assert worst <= TOLERANCE["qwen3_moe"]
        assert report == same


@pytest.mark.parametrize("implementation", ["dbo", "dbo_static"])
def test_expert_parallelism_through_inductor_equals_one_process(ranks, implementation):
    batches = ((6, 4, 9),) * 2
    case = (expert_parallel_case, "qwen3_moe", implementation, "inductor", batches)
    for worst, report in ranks.run(*case, timeout=300.0):
        assert worst <= 1e-5  # float32, logits of size 4
        assert report["calls_split"] == 3, report["declined"]
        assert report["on_comm_lane"]


class Block(nn.Module):
    """A dense layer sharded over ranks, written as everybody writes it: two all-reduces, nothing of ours."""

    def __init__(self, hidden, inner, group):
        super().__init__()
        self.group = group
        self.norm = nn.LayerNorm(hidden)
        self.up_1, self.down_1 = nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden, bias=False)
        self.up_2, self.down_2 = nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden, bias=False)

    def reduced(self, x):
        return funcol.all_reduce(x, "sum", self.group) if self.group else x

    def forward(self, x):
        x = x + self.reduced(self.down_1(torch.tanh(self.up_1(self.norm(x)))))
        return x + self.reduced(self.down_2(torch.relu(self.up_2(self.norm(x)))))


def tensor_parallel_case():
    torch.set_num_threads(1)
    torch._dynamo.reset()
    torch.manual_seed(0)
    rank, hidden, inner = dist.get_rank(), 6, 8
    alone = nn.Sequential(*[Block(hidden, inner, None) for _ in range(3)]).double()
    sharded = nn.Sequential(*[Block(hidden, inner // 2, dist.group.WORLD) for _ in range(3)]).double()
    mine = slice(rank * inner // 2, (rank + 1) * inner // 2)
    for (key, part), whole in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        part.data = whole[mine].clone() if "up" in key else whole[:, mine].clone() if "down" in key else whole.clone()
    compiled = torch.compile(sharded, backend="dbo", options={"split": "always", "inner": "eager"}, fullgraph=True)
    worst = 0.0
    with torch.no_grad():
        for tokens in (9, 4, 17):
            x = torch.randn(tokens, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))
            worst = max(worst, (compiled(x) - alone(x)).abs().max().item())
    report = reports()[-1]
    return worst, summary(), report.levels.timeline.hidden_comm


def test_a_dense_tensor_parallel_block_splits_and_overlaps_without_code_of_its_own(ranks):
    for worst, report, hidden_comm in ranks.run(tensor_parallel_case):
        assert worst <= 1e-12
        assert report["calls_split"] == 3, report["declined"]
        assert report["num_comm_ops"] == 6
        assert report["on_comm_lane"]
        assert hidden_comm >= 0.5
