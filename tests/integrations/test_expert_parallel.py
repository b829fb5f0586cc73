"""Both exchanges on real processes: what comes back is what one process computes, in whatever way rows are routed."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dbo_compile.integrations.expert_parallel import exchange_exact, exchange_static
from tests.ranks import RankFailed, Ranks

pytestmark = pytest.mark.ranks

EXCHANGES = {"exact": exchange_exact, "static": exchange_static}
HIDDEN, OUT = 6, 5


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


# -- what runs on each rank -------------------------------------------------------------------------------------------


class Layer:
    """A mixture of experts over all ranks. Every expert is a matrix and a non-linearity."""

    def __init__(self, num_experts: int) -> None:
        self.weights = torch.randn(
            num_experts, HIDDEN, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
        ).requires_grad_()
        self.num_experts = num_experts
        self.received: list[int] = []

    def whole(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = torch.einsum("th,tkho->tko", hidden, self.weights[index.long()]).tanh()
        return (rows * weights[..., None]).sum(1)

    def shard(self, rows: torch.Tensor, local_experts: torch.Tensor) -> torch.Tensor:
        mine = self.weights.chunk(dist.get_world_size())[dist.get_rank()]
        self.received.append(int((local_experts < len(mine)).sum()))
        return torch.einsum("nh,nho->no", rows, mine[local_experts.clamp(max=len(mine) - 1)]).tanh()

    def exchanged(self, how: str, *tokens: torch.Tensor) -> torch.Tensor:
        return EXCHANGES[how](*tokens, self.shard, num_experts=self.num_experts, group=dist.group.WORLD)


def some_tokens(num_tokens: int, num_experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`hidden`, `top_k_index`, `top_k_weights` of this rank, other ones on each rank."""
    torch.manual_seed(dist.get_rank())
    scores = torch.rand(num_tokens, num_experts, dtype=torch.float64)
    weights, index = scores.topk(top_k, dim=1, sorted=False)
    return torch.randn(num_tokens, HIDDEN, dtype=torch.float64), index, weights


def matches_whole(how: str, num_tokens: list[int], num_experts: int, top_k: int) -> bool:
    layer = Layer(num_experts)
    tokens = some_tokens(num_tokens[dist.get_rank()], num_experts, top_k)
    return close(layer.exchanged(how, *tokens), layer.whole(*tokens))


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return got.shape == want.shape and got.dtype == want.dtype and torch.allclose(got, want, rtol=1e-12, atol=1e-14)


def all_to_one(how: str, owner: int) -> tuple[bool, list[int]]:
    layer = Layer(8)
    hidden, index, weights = some_tokens(7, 4, 3)
    tokens = (hidden, index + 4 * owner, weights)
    return close(layer.exchanged(how, *tokens), layer.whole(*tokens)), layer.received


def same_expert_twice(how: str, num_experts: int) -> bool:
    layer = Layer(num_experts)
    hidden, _, weights = some_tokens(5, num_experts, 3)
    tokens = (hidden, torch.tensor([[0, 3, 3], [1, 1, 1], [3, 0, 3], [2, 2, 0], [0, 1, 2]]), weights)
    return close(layer.exchanged(how, *tokens), layer.whole(*tokens))


def lower_precision(how: str) -> tuple[torch.dtype, bool]:
    layer = Layer(8)
    layer.weights = layer.weights.detach().bfloat16()
    hidden, index, weights = some_tokens(7, 8, 3)
    tokens = (hidden.bfloat16(), index.int(), weights.float())
    got, want = layer.exchanged(how, *tokens), layer.whole(*tokens)
    return got.dtype, torch.equal(got, want.bfloat16())


def gradients(how: str) -> list[bool]:
    layer, alone = Layer(8), Layer(8)
    tokens, tokens_alone = some_tokens(7, 8, 3), some_tokens(7, 8, 3)
    for tensor in (tokens[0], tokens[2], tokens_alone[0], tokens_alone[2]):
        tensor.requires_grad_()
    layer.exchanged(how, *tokens).square().sum().backward()
    alone.whole(*tokens_alone).square().sum().backward()
    # a rank's experts serve all ranks, the whole layer of one process only its own tokens
    for weights in (layer.weights, alone.weights):
        dist.all_reduce(weights.grad)
    return [
        close(tokens[0].grad, tokens_alone[0].grad),
        close(tokens[2].grad, tokens_alone[2].grad),
        close(layer.weights.grad, alone.weights.grad),
    ]


def halves_differ(how: str) -> float:
    layer = Layer(8)
    tokens = some_tokens(9, 8, 3)
    halves = [layer.exchanged(how, *(t[part] for t in tokens)) for part in (slice(0, 4), slice(4, 9))]
    return (torch.cat(halves) - layer.exchanged(how, *tokens)).abs().max().item()


def refusal(how: str, changes: dict[str, Any]) -> str:
    """What the call says on rank 0; the other rank calls nothing, so a collective would never end."""
    if dist.get_rank() != 0:
        return ""
    tokens = {"hidden": torch.zeros(7, HIDDEN), "index": torch.zeros(7, 3).long(), "weights": torch.zeros(7, 3)}
    layer = Layer(changes.pop("num_experts", 8))
    try:
        layer.exchanged(how, *(tokens | changes).values())
    except ValueError as e:
        return str(e)
    return "nothing"


def destroyed_group(how: str) -> str:
    group = dist.new_group([0, 1])
    dist.destroy_process_group(group)
    tokens = some_tokens(7, 8, 3)
    with pytest.raises(RuntimeError) as error:
        EXCHANGES[how](*tokens, Layer(8).shard, num_experts=8, group=group)
    return str(error.value)


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", EXCHANGES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 3), (8, 1), (4, 3), (6, 3), (2, 2)])
def test_an_exchange_equals_the_layer_on_one_process(ranks, how, num_experts, top_k):
    assert ranks.run(matches_whole, how, [7, 7], num_experts, top_k) == [True, True]


@pytest.mark.parametrize("num_tokens", [[7, 3], [0, 5], [5, 0], [1, 9], [0, 0]])
def test_the_exact_exchange_takes_any_number_of_tokens_on_each_rank(ranks, num_tokens):
    assert ranks.run(matches_whole, "exact", num_tokens, 8, 3) == [True, True]


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_the_static_exchange_takes_few_tokens(ranks, num_tokens):
    assert ranks.run(matches_whole, "static", [num_tokens, num_tokens], 8, 3) == [True, True]


@pytest.mark.parametrize("how", EXCHANGES)
@pytest.mark.parametrize("owner", [0, 1])
def test_all_rows_may_go_to_one_rank(ranks, how, owner):
    received = [[0], [0]]
    received[owner] = [2 * 7 * 3]
    assert ranks.run(all_to_one, how, owner) == [(True, received[0]), (True, received[1])]


@pytest.mark.parametrize("how", EXCHANGES)
@pytest.mark.parametrize("num_experts", [4, 6, 8, 12])
def test_a_token_may_name_an_expert_twice(ranks, how, num_experts):
    assert ranks.run(same_expert_twice, how, num_experts) == [True, True]


@pytest.mark.parametrize("how", EXCHANGES)
def test_the_result_has_the_dtype_of_the_tokens_and_is_summed_in_that_of_the_weights(ranks, how):
    assert ranks.run(lower_precision, how) == [(torch.bfloat16, True)] * 2


@pytest.mark.parametrize("how", EXCHANGES)
def test_gradients_reach_tokens_routing_weights_and_experts(ranks, how):
    assert ranks.run(gradients, how) == [[True] * 3] * 2


@pytest.mark.parametrize("how", EXCHANGES)
def test_parts_of_the_tokens_give_the_parts_of_the_result_bit_for_bit(ranks, how):
    assert ranks.run(halves_differ, how) == [0.0, 0.0]


REFUSED = [
    ({"num_experts": 7}, "7 experts cannot be shared evenly by 2 ranks; use a group whose size divides 7"),
    (
        {"index": torch.zeros(7, 3)},
        "top_k_index is torch.float32; pass expert numbers as torch.int32 or torch.int64",
    ),
    (
        {"hidden": torch.zeros(1, 7, 6)},
        "hidden is [1, 7, 6], top_k_index [7, 3], top_k_weights [7, 3]; flatten them to [tokens, hidden size] and "
        "[tokens, top_k]",
    ),
    (
        {"weights": torch.zeros(7, 2)},
        "hidden is [7, 6], top_k_index [7, 3], top_k_weights [7, 2]; each token needs one row in each of them, and "
        "each route one weight",
    ),
    (
        {"hidden": torch.zeros(5, 6)},
        "hidden is [5, 6], top_k_index [7, 3], top_k_weights [7, 3]; each token needs one row in each of them, and "
        "each route one weight",
    ),
]


@pytest.mark.parametrize("how", EXCHANGES)
@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_bad_arguments_are_refused_before_any_collective(ranks, how, changes, reason):
    assert ranks.run(refusal, how, changes) == [reason, ""]


@pytest.mark.parametrize("how", EXCHANGES)
def test_a_destroyed_group_is_refused(ranks, how):
    for message in ranks.run(destroyed_group, how):
        assert message.startswith("the group of the experts is none of this rank's process groups: it was destroyed")


# -- the processes themselves -----------------------------------------------------------------------------------------


def fail_and_die() -> None:
    if dist.get_rank() == 0:
        raise ZeroDivisionError("on purpose")
    os.kill(os.getpid(), signal.SIGKILL)


def test_ranks_that_fail_die_or_stall_end_the_run_and_the_next_run_starts_anew():
    with Ranks(2) as ranks:
        with pytest.raises(RankFailed, match=r"(?s)^rank 0: Traceback.*ZeroDivisionError: on purpose\nrank 1: died$"):
            ranks.run(fail_and_die)
        with pytest.raises(RankFailed, match=r"^rank 0: no answer in 0.3 s\nrank 1: no answer in 0.3 s$"):
            ranks.run(time.sleep, 60, timeout=0.3)
