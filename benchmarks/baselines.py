"""What users would pick instead: the same model and exchange, overlapped by hand or by two threads.

* `pipelined`: asynchronous collectives by hand. The tokens of an MoE layer go in two chunks, and the exchange of one
  is under way while the experts work on the other (as in Tutel or FasterMoE). Nothing else of the model can be moved
  under an exchange without splitting the whole model. It is plain functional code: one graph, compiled as a whole.
* `TwoThreads`: dual-batch overlap as vLLM does it, a small re-implementation of `vllm/v1/worker/ubatching.py`. Two
  threads run the whole model, on half of the batch each; one runs at a time, and hands over while its exchange is under
  way. Handing over is part of an op, as in vLLM, so the model is one graph, compiled as a whole.
* `OVERLAP_SCHEDULING`: Inductor with its own overlap scheduling on.

Each is tuned as a user would: code is warm, halves are equal, and where there is a choice (`at_counts`) both are run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._inductor.fx_passes import overlap_scheduling
from torch.fx.experimental import symbolic_shapes
from transformers.distributed.expert_parallel import EPImplementationInterface

from dbo_compile.integrations import expert_parallel as exact
from dbo_compile.integrations.transformers import ExactEP

optimization_hint = getattr(symbolic_shapes, "optimization_hint", None) or symbolic_shapes.size_hint  # until 2.11
Model = Callable[[torch.Tensor], torch.Tensor]


def runtime_ms(node: torch.fx.Node, _: int | None = None) -> float:
    """Guess what a node takes on one core and on a link of 1 Gbit/s: Inductor's own guesses need a GPU to look at."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0.0
    num_bytes = usual(value.numel()) * value.element_size()
    if "all_to_all" in str(node.target):
        return num_bytes / 125e6 * 1e3
    if "mm" in str(node.target) and isinstance(left := node.args[0], torch.fx.Node):
        return 2 * usual(value.numel()) * usual(left.meta["val"].size(-1)) / 30e9 * 1e3
    return num_bytes / 10e9 * 1e3


def usual(size: torch.SymInt | int) -> int:
    """A number that depends on data counts as what it is in the benchmarks, about."""
    return int(optimization_hint(size, fallback=2048))


OVERLAP_SCHEDULING: dict[str, Any] = {
    "reorder_for_compute_comm_overlap": True,
    "aten_distributed_optimizations.enable_overlap_scheduling": True,
    "aten_distributed_optimizations.insert_overlap_deps": True,
    "aten_distributed_optimizations.enable_fusion_regions": False,
    "aten_distributed_optimizations.compute_estimator": "analytical",
    "aten_distributed_optimizations.custom_runtime_estimation": runtime_ms,
}
"""`torch.compile(model, options=...)`: Inductor's own answer. Fusion regions and its estimates need a GPU."""

# It cannot run without a GPU otherwise: before it asks for custom estimates, it looks up the bandwidth of the GPU.
overlap_scheduling.estimate_roofline_runtime_ms = runtime_ms


# -- by hand ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Chunk:
    """The rows of some tokens on their way: what they need to come back."""

    order: torch.Tensor
    send_sizes: list[int]
    receive_sizes: list[int]
    received: torch.Tensor
    rows: torch.Tensor


def pipelined(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    experts: exact.Experts,
    *,
    num_experts: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Do what `exchange_exact` does, in two chunks: each exchange is started before the experts of the other chunk."""
    num_local = num_experts // dist.get_world_size(group)
    half = hidden.size(0) // 2
    cuts = (slice(0, half), slice(half, None))
    chunks = [_dispatched(hidden[cut], top_k_index[cut], num_experts, group) for cut in cuts]
    coming = []
    for chunk in chunks:
        arrived_for = torch.repeat_interleave(chunk.received, output_size=sum(chunk.receive_sizes)) % num_local
        done = experts(exact._wait(chunk.rows), arrived_for)
        coming.append(exact._start(done, group, chunk.send_sizes, chunk.receive_sizes))
    back = [_home(exact._wait(rows), chunk.order) for rows, chunk in zip(coming, chunks, strict=True)]
    rows = torch.cat(back).view(*top_k_index.shape, hidden.size(1))
    return exact.combine(rows, top_k_weights, hidden.dtype)


def _dispatched(
    hidden: torch.Tensor, top_k_index: torch.Tensor, num_experts: int, group: dist.ProcessGroup
) -> _Chunk:
    num_ranks = dist.get_world_size(group)
    routes = top_k_index.reshape(-1)
    sent = routes.new_zeros(num_experts).scatter_add(0, routes, torch.ones_like(routes))
    each = [num_experts // num_ranks] * num_ranks
    arriving = exact._start(sent, group, each, each)
    order = torch.argsort(routes)
    rows = hidden[order // top_k_index.size(1)]
    received = exact._wait(arriving)
    send_sizes, receive_sizes = exact._read_sizes(sent, received, num_ranks)
    going = exact._start(rows, group, receive_sizes, send_sizes)
    return _Chunk(order, send_sizes, receive_sizes, received, going)


def _home(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    place = torch.empty_like(order)
    place[order] = torch.arange(order.size(0), device=order.device)
    return rows[place]


class PipelinedEP(ExactEP):
    """`ep_implementation="by_hand"`: see `pipelined`."""

    exchange = staticmethod(pipelined)


EPImplementationInterface.register("by_hand", PipelinedEP)


# -- two threads ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Turns:
    """Whose turn it is: one of two threads runs at a time. Outside of a split step, handing over does nothing."""

    at_counts: bool = False
    events: list[threading.Event] = field(default_factory=lambda: [threading.Event(), threading.Event()])
    over: list[bool] = field(default_factory=lambda: [True, True])
    mine: threading.local = field(default_factory=threading.local)

    def wait(self, me: int) -> None:
        self.events[me].wait()
        self.events[me].clear()

    def hand_over(self) -> None:
        me = getattr(self.mine, "index", None)
        if me is not None and not self.over[1 - me]:
            self.events[1 - me].set()
            self.wait(me)


_turns = _Turns()


class TwoThreads:
    """Calls `model` in two threads, on half of the sequences each. With `at_counts` they hand over there as well.

    A thread starts an exchange, hands over, and waits for the exchange when it is its turn again. Both threads hand
    over at the same places on every rank, so the collectives of all ranks come in one order.
    """

    def __init__(self, model: Model, *, at_counts: bool = False) -> None:
        self.model = model
        self.at_counts = at_counts

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        _turns.at_counts, _turns.over = self.at_counts, [False, False]
        outs: list[Any] = [None, None]
        threads = [
            # In a context of its own a thread would compile with PyTorch's default configuration.
            threading.Thread(target=copy_context().run, args=(self._run, me, half, outs))
            for me, half in enumerate(ids.tensor_split(2))
        ]
        for thread in threads:
            thread.start()
        _turns.events[0].set()
        for thread in threads:
            thread.join()
        for event in _turns.events:
            event.clear()
        for out in outs:
            if isinstance(out, BaseException):
                raise out
        return torch.cat(outs)

    def _run(self, me: int, half: torch.Tensor, outs: list[Any]) -> None:
        _turns.mine.index = me
        _turns.wait(me)
        try:
            with torch.no_grad():
                outs[me] = self.model(half)
        except BaseException as error:
            outs[me] = error
        finally:
            _turns.over[me] = True
            _turns.events[1 - me].set()


def yielding(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    experts: exact.Experts,
    *,
    num_experts: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Do what `exchange_exact` does, handing over to the other thread while rows are on their way."""
    num_ranks = dist.get_world_size(group)
    num_local = num_experts // num_ranks
    routes = top_k_index.reshape(-1)
    sent = routes.new_zeros(num_experts).scatter_add(0, routes, torch.ones_like(routes))
    arriving = exact._start(sent, group, [num_local] * num_ranks, [num_local] * num_ranks)
    order = torch.argsort(routes)
    rows = hidden[order // top_k_index.size(1)]
    received = counts_in_turn(arriving)
    send_sizes, receive_sizes = exact._read_sizes(sent, received, num_ranks)
    arrived_for = torch.repeat_interleave(received, output_size=sum(receive_sizes)) % num_local
    rows = rows_in_turn(rows, receive_sizes, send_sizes, group.group_name)
    rows = rows_in_turn(experts(rows, arrived_for), send_sizes, receive_sizes, group.group_name)
    rows = _home(rows, order).view(*top_k_index.shape, hidden.size(1))
    return exact.combine(rows, top_k_weights, hidden.dtype)


@torch.library.custom_op("dbo_bench::counts_in_turn", mutates_args=())
def counts_in_turn(pending: torch.Tensor) -> torch.Tensor:
    """The counts that were asked for, perhaps after the other thread's turn; a copy of these few, as an op must."""
    if _turns.at_counts:
        _turns.hand_over()
    return exact._wait(pending).clone()


@torch.library.custom_op("dbo_bench::rows_in_turn", mutates_args=())
def rows_in_turn(rows: torch.Tensor, receive_sizes: list[int], send_sizes: list[int], group: str) -> torch.Tensor:
    """All-to-all over dim 0 that hands over while it is under way: an op, so that it breaks no graph (as in vLLM)."""
    pending = exact.c10d.all_to_all_single(rows.contiguous(), receive_sizes, send_sizes, group)
    _turns.hand_over()
    return exact._wait(pending)


@counts_in_turn.register_fake
def _(pending: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(pending)


@rows_in_turn.register_fake
def _(rows: torch.Tensor, receive_sizes: list[int], _send_sizes: list[int], _group: str) -> torch.Tensor:
    return rows.new_empty(sum(receive_sizes), *rows.shape[1:])


class YieldingEP(ExactEP):
    """`ep_implementation="two_threads"`: see `yielding`."""

    exchange = staticmethod(yielding)


EPImplementationInterface.register("two_threads", YieldingEP)
