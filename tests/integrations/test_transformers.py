"""Unmodified Hugging Face models with sharded experts equal one process, in eager and as one compiled graph."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import init_device_mesh

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.distributed.expert_parallel import EPImplementationInterface

from dbo_compile.integrations.transformers import ExactEP, expert_parallel
from tests.integrations.models import MODELS, VOCAB, tiny_model
from tests.ranks import Ranks

pytestmark = pytest.mark.ranks

NAMES = ["dbo", "dbo_static"]
NUM_MOE_LAYERS = {"qwen3_moe": 2, "mixtral": 2, "glm4_moe": 1, "deepseek_v3": 1}
COMPILED = [("qwen3_moe", [0, 1]), ("mixtral", [0]), ("glm4_moe", [0]), ("deepseek_v3", [1])]
"""Compiling takes seconds, so most models are compiled on one rank: one in eager must understand it all the same."""

SEQUENCE = 7
c10d, aten = torch.ops._c10d_functional, torch.ops.aten


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


# -- what runs on each rank -------------------------------------------------------------------------------------------


def some_ids(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * batch + dist.get_rank())
    return torch.randint(VOCAB, (batch, SEQUENCE), generator=generator)


@torch.no_grad()
def error(model: PreTrainedModel, alone: PreTrainedModel, ids: torch.Tensor) -> float:
    """How far `model` is from `alone`, relative to the largest logit."""
    want = alone(ids).logits
    return ((model(ids).logits - want).abs().max() / want.abs().max()).item()


def sharded_error(name: str, implementation: str, batches: list[int]) -> float:
    model = expert_parallel(tiny_model(name, experts="batched_mm"), ep_implementation=implementation)
    return error(model, tiny_model(name, experts="eager"), some_ids(batches[dist.get_rank()]))


def skewed_error(name: str, implementation: str) -> tuple[float, int]:
    """The error where all tokens go to the first half of the experts, and the last expert that any token chose."""
    alone, model = tiny_model(name, experts="eager"), tiny_model(name, experts="batched_mm")
    chosen: list[int] = []
    for m in (alone, model):
        for path, gate in m.named_modules():
            if path.endswith(".gate"):
                skew(gate.weight)
                gate.register_forward_hook(lambda _gate, _args, output: chosen.append(output[-1].max().item()))
    expert_parallel(model, ep_implementation=implementation)
    return error(model, alone, some_ids(3)), max(chosen)


@torch.no_grad()
def skew(gate: torch.Tensor) -> None:
    """Scores along one direction: experts 0 and 1 win on one side of it, 2 and 3 on the other."""
    gate.copy_(torch.tensor([4, 3, -4, -3, 0, 0, 0, 0])[:, None] * gate[0])


class Compiled(NamedTuple):
    errors: list[float]
    exchanges: list[list[tuple[int, int]]]  # of each graph; for each exchange: its users, its waits
    host_reads: list[int]
    unbacked: list[bool]


def compiled(name: str, implementation: str, batches: list[int], on: list[int]) -> Compiled:
    """Compile the model on the ranks `on`; the others run it in eager."""
    torch._dynamo.reset()
    torch._dynamo.config.capture_scalar_outputs = True
    graphs: list[fx.Graph] = []

    def keep(gm: fx.GraphModule, _: object) -> fx.GraphModule:
        graphs.append(gm.graph)
        return gm

    alone = tiny_model(name, experts="eager")
    model = tiny_model(name, experts="grouped_mm" if dist.get_rank() in on else "batched_mm")
    expert_parallel(model, ep_implementation=implementation)
    if dist.get_rank() in on:
        model = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep, inference_compiler=keep))
    errors = []
    for batch in batches:
        ids = some_ids(batch)
        torch._dynamo.mark_dynamic(ids, 0)
        errors.append(error(model, alone, ids))
    return Compiled(
        errors,
        [[num_users_and_waits(node) for node in g.nodes if is_exchange(node)] for g in graphs],
        [sum(node.target is aten._local_scalar_dense.default for node in g.nodes) for g in graphs],
        [any(has_unbacked(node) for node in g.nodes) for g in graphs],
    )


def is_exchange(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "_c10d_functional" and node.target != c10d.wait_tensor.default


def num_users_and_waits(node: fx.Node) -> tuple[int, int]:
    waits = [user for user in node.users if user.target == c10d.wait_tensor.default]
    again = [user for wait in waits for user in wait.users if user.target == c10d.wait_tensor.default]
    return len(node.users), len(waits) + len(again)


def has_unbacked(node: fx.Node) -> bool:
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, torch.Tensor) else [value]
    symbols = {s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}
    return any(str(symbol).startswith("u") for symbol in symbols)


def shards_over(kind: str) -> float:
    group = {"mesh": init_device_mesh("cpu", (2,)), "group": dist.group.WORLD}[kind]
    model = expert_parallel(tiny_model("qwen3_moe", experts="batched_mm"), group)
    return error(model, tiny_model("qwen3_moe", experts="eager"), some_ids(3))


def weights_of_experts() -> list[tuple[type, list[int], bool]]:
    """The type, the shape and whether it is this rank's part of the whole, of each weight of a layer's experts."""
    path = "model.layers.1.mlp.experts"
    whole = tiny_model("qwen3_moe", experts="batched_mm").get_submodule(path)
    mine = expert_parallel(tiny_model("qwen3_moe", experts="batched_mm")).get_submodule(path)
    return [
        (type(weight), list(weight.shape), torch.equal(weight, part.chunk(2)[dist.get_rank()]))
        for weight, part in zip(mine.parameters(), whole.parameters(), strict=True)
    ]


def refusals() -> list[str]:
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    once = expert_parallel(tiny_model("qwen3_moe", experts="batched_mm"))
    square = init_device_mesh("cpu", (2, 1), mesh_dim_names=("ep", "tp"))
    moe = tiny_model("qwen3_moe", experts="batched_mm")
    odd = tiny_model("qwen3_moe", experts="batched_mm", num_experts=7)
    both = init_device_mesh("cpu", (2,))
    return [
        refusal(lambda: expert_parallel(dense)),
        refusal(lambda: expert_parallel(once)),
        refusal(lambda: expert_parallel(moe, square)),
        refusal(lambda: expert_parallel(odd)),
        refusal(lambda: expert_parallel(moe, ep_implementation="dob")),
        refusal(lambda: ExactEP(moe.model.layers[0].mlp.experts, both, both)),
    ]


def refusal(call) -> str:
    try:
        call()
    except ValueError as e:
        return str(e)
    return "nothing"


# -- tests ------------------------------------------------------------------------------------------------------------


def test_importing_the_integration_registers_both_implementations():
    assert set(NAMES) <= set(EPImplementationInterface())


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("name", MODELS)
def test_sharded_experts_equal_one_process(ranks, name, implementation):
    assert max(ranks.run(sharded_error, name, implementation, [3, 3])) <= 1e-12


@pytest.mark.parametrize("name", NUM_MOE_LAYERS)
def test_exact_splits_allow_another_batch_size_on_each_rank(ranks, name):
    assert max(ranks.run(sharded_error, name, "dbo", [5, 2])) <= 1e-12


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("name", NUM_MOE_LAYERS)
def test_a_rank_may_receive_no_rows_at_all(ranks, name, implementation):
    for error, last_expert in ranks.run(skewed_error, name, implementation):
        assert error <= 1e-12
        assert last_expert == 3


@pytest.mark.parametrize(("name", "on"), COMPILED)
def test_exact_splits_compile_to_one_graph_with_three_exchanges_a_layer(ranks, name, on):
    answers = ranks.run(compiled, name, "dbo", [3, 5], on)
    assert max(answers[0].errors + answers[1].errors) <= 1e-12
    for graphs in (answers[rank] for rank in on):
        assert graphs.exchanges == [[(1, 1)] * 3 * NUM_MOE_LAYERS[name]]
        assert graphs.host_reads == [4 * NUM_MOE_LAYERS[name]]


@pytest.mark.parametrize(("name", "on"), COMPILED)
def test_static_splits_compile_to_one_graph_that_knows_all_sizes(ranks, name, on):
    answers = ranks.run(compiled, name, "dbo_static", [3, 5], on)
    assert max(answers[0].errors + answers[1].errors) <= 1e-12
    for graphs in (answers[rank] for rank in on):
        assert graphs.exchanges == [[(1, 1)] * 3 * NUM_MOE_LAYERS[name]]
        assert graphs.host_reads == [0]
        assert graphs.unbacked == [False]


@pytest.mark.parametrize("kind", ["mesh", "group"])
def test_experts_are_sharded_over_a_mesh_or_a_process_group(ranks, kind):
    assert max(ranks.run(shards_over, kind)) <= 1e-12


def test_each_rank_keeps_its_own_experts_as_plain_tensors(ranks):
    own = [(torch.nn.Parameter, [4, 48, 32], True), (torch.nn.Parameter, [4, 32, 24], True)]
    assert ranks.run(weights_of_experts) == [own, own]


def test_what_cannot_be_sharded_is_refused_with_what_to_do(ranks):
    starts = [
        "LlamaForCausalLM has no ep_plan",
        "the experts of Qwen3MoeForCausalLM are sharded already",
        "the mesh ",
        "Cannot evenly shard 7 experts",
        "`ep_implementation='dob'` names no registered implementation",
        "ExactEP exchanges the tokens of ranks that each hold their own; with tp_size=2",
    ]
    for said in ranks.run(refusals):
        assert [text[: len(start)] for text, start in zip(said, starts, strict=True)] == starts
