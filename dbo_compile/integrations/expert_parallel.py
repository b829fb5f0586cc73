"""Token exchange of expert parallelism in plain PyTorch: rows go to the rank of their expert and come back.

`exchange_exact` moves just the routed rows and reads its split sizes on the host. `exchange_static` moves a capacity
that no routing can exceed and never leaves the device. Both call their collectives as functional ops, so one
`torch.compile` graph holds the whole layer, and both apply routing weights on the rank that sent the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import torch
import torch.distributed as dist

import_module("torch.distributed.tensor")  # for its effect: functional collectives become differentiable

c10d = torch.ops._c10d_functional
Experts = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""This rank's experts: `(rows [N, H], local expert of each row [N], int64) -> rows [N, H']`, in the same order."""


def exchange_exact(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    experts: Experts,
    *,
    num_experts: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Run a mixture of experts whose experts are sharded over `group`, and return [T, H'] in the dtype of `hidden`.

    `hidden` is [T, H]: this rank's own tokens; ranks may have different T, also 0. `top_k_index` is [T, K], int32 or
    int64: experts numbered over the group, where rank r owns `num_experts / W` of them from `r * num_experts / W` on.
    `top_k_weights` is [T, K]. `experts` gets the N rows that all ranks routed to this one, N may be 0.

    Each exchange moves T * K rows in all, the fewest possible. The price is one small copy to the host per layer, for
    the split sizes: it cannot be captured in a CUDA graph, and `torch.compile(fullgraph=True)` is what lets it stay in
    one graph. (Splits from exchanged counts: the all_to_all of transformers' expert parallelism.)

    Raises `ValueError` for arguments that do not fit together, `RuntimeError` for a destroyed group; both come before
    the first collective.
    """
    num_ranks = num_ranks_of(group)
    check_arguments(hidden, top_k_index, top_k_weights, num_experts, num_ranks)
    num_local = num_experts // num_ranks
    routes = top_k_index.reshape(-1).long()
    sent = routes.new_zeros(num_experts).scatter_add(0, routes, torch.ones_like(routes))
    arriving = _start(sent, group, [num_local] * num_ranks, [num_local] * num_ranks)
    # Experts are numbered rank by rank, so sorting by expert sorts by rank. The counts travel meanwhile.
    order = torch.argsort(routes)
    rows = hidden[order // top_k_index.size(1)]
    received = _wait(arriving)
    send_sizes, receive_sizes = _read_sizes(sent, received, num_ranks)
    # `received` counts by (rank, local expert), the order in which rows arrive: no expert numbers need to travel.
    arrived_for = torch.repeat_interleave(received, output_size=sum(receive_sizes)) % num_local
    rows = _wait(_start(rows, group, receive_sizes, send_sizes))
    rows = _wait(_start(experts(rows, arrived_for), group, send_sizes, receive_sizes))
    place = torch.empty_like(order)
    place[order] = torch.arange(order.size(0), device=order.device)
    return combine(rows[place].view(*top_k_index.shape, rows.size(1)), top_k_weights, hidden.dtype)


def exchange_static(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    experts: Experts,
    *,
    num_experts: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Do what `exchange_exact` does with shapes that depend on T alone, so that a CUDA graph can capture it.

    All ranks must pass the same T: a collective of unequal sizes fails or hangs, and only the caller can know. Each
    token has J = min(K, num_experts / W) cells for each rank, so no routing ever drops a token. `experts` gets
    N = T * W * J rows, token-major; the rows of empty cells carry `num_experts / W` as their expert, one past the last:
    skip them or compute anything, nobody reads the result. Each exchange moves W * J / K times the rows that
    `exchange_exact` moves, and nothing is ever read on the host.
    """
    num_ranks = num_ranks_of(group)
    check_arguments(hidden, top_k_index, top_k_weights, num_experts, num_ranks)
    num_local = num_experts // num_ranks
    per_rank, one_each = min(top_k_index.size(1), num_local), [1] * num_ranks
    # The token dim stays a dim of its own beside the exchanged one, and outermost in the rows that the experts see:
    # the exchange of a slice of the tokens is that slice of the exchange.
    cell = _cells(top_k_index.long(), num_local)
    empty = cell.new_full((cell.size(0), num_ranks * per_rank), num_local)
    wanted = empty.scatter(1, cell, top_k_index.long() % num_local).view(-1, num_ranks, per_rank)
    arriving_for = _start(wanted.transpose(0, 1), group, one_each, one_each)
    arriving = _start(hidden.unsqueeze(1).expand(num_ranks, -1, per_rank, -1), group, one_each, one_each)
    arrived_for = _wait(arriving_for).transpose(0, 1).reshape(-1)
    rows = experts(_wait(arriving).transpose(0, 1).reshape(-1, hidden.size(1)), arrived_for)
    rows = rows.view(-1, num_ranks, per_rank, rows.size(1)).transpose(0, 1)
    rows = _wait(_start(rows, group, one_each, one_each)).transpose(0, 1).flatten(1, 2)
    rows = rows.gather(1, cell.unsqueeze(2).expand(-1, -1, rows.size(2)))
    return combine(rows, top_k_weights, hidden.dtype)


def _cells(top_k_index: torch.Tensor, num_local: int) -> torch.Tensor:
    """Return for each route its cell [T, K] among its token's W * J cells, J of them for each rank."""
    top_k = top_k_index.size(1)
    if num_local <= top_k:
        return top_k_index  # a cell for every expert, also where a token names an expert twice
    owner = top_k_index // num_local
    earlier = torch.ones(top_k, top_k, dtype=torch.bool, device=owner.device).tril(-1)
    slot = ((owner.unsqueeze(2) == owner.unsqueeze(1)) & earlier).sum(2)
    return owner * top_k + slot


def combine(rows: torch.Tensor, top_k_weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The result of each token: its rows [T, K, H'], weighted and added up."""
    return (rows * top_k_weights.unsqueeze(-1)).sum(1).to(dtype)


def _read_sizes(sent: torch.Tensor, received: torch.Tensor, num_ranks: int) -> tuple[list[int], list[int]]:
    """Return the rows to send to and to receive from each rank, as numbers: the one wait of the host for the device."""
    sizes = torch.stack([sent, received]).view(2, num_ranks, -1).sum(2)
    # One copy to the host: in a compiled graph, tolist() of a device tensor reads every element on its own.
    send_sizes, receive_sizes = sizes.cpu().tolist()
    return send_sizes, receive_sizes


def _start(
    tensor: torch.Tensor, group: dist.ProcessGroup, receive_sizes: Sequence[int], send_sizes: Sequence[int]
) -> torch.Tensor:
    """Start an all-to-all over dim 0; its result is not there before `_wait`.

    Calls the op itself: torch.distributed's wrapper of it waits at once when traced, and `_wait` would wait again.
    """
    pending: torch.Tensor = c10d.all_to_all_single(tensor.contiguous(), receive_sizes, send_sizes, group.group_name)
    return pending


def _wait(pending: torch.Tensor) -> torch.Tensor:
    arrived: torch.Tensor = c10d.wait_tensor(pending)
    return arrived


def num_ranks_of(group: dist.ProcessGroup) -> int:
    try:
        return len(dist.get_process_group_ranks(group))
    except KeyError as e:
        raise RuntimeError(
            "the group of the experts is none of this rank's process groups: it was destroyed, or this rank is not in "
            "it; make a group that lives as long as the model, and shard the experts over that"
        ) from e


def check_arguments(
    hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int, num_ranks: int
) -> None:
    if num_experts % num_ranks != 0:
        raise ValueError(
            f"{num_experts} experts cannot be shared evenly by {num_ranks} ranks; use a group whose size divides "
            f"{num_experts}"
        )
    if top_k_index.dtype not in {torch.int32, torch.int64}:
        raise ValueError(f"top_k_index is {top_k_index.dtype}; pass expert numbers as torch.int32 or torch.int64")
    if hidden.ndim != 2 or top_k_index.ndim != 2:
        shapes = _shapes(hidden, top_k_index, top_k_weights)
        raise ValueError(f"{shapes}; flatten them to [tokens, hidden size] and [tokens, top_k]")
    if top_k_weights.shape != top_k_index.shape or hidden.size(0) != top_k_index.size(0):
        shapes = _shapes(hidden, top_k_index, top_k_weights)
        raise ValueError(f"{shapes}; each token needs one row in each of them, and each route one weight")


def _shapes(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> str:
    return (
        f"hidden is {list(hidden.shape)}, top_k_index {list(top_k_index.shape)}, "
        f"top_k_weights {list(top_k_weights.shape)}"
    )
