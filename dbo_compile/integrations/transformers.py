"""Expert parallelism for any Hugging Face MoE model: importing this module registers "dbo", "dbo_static", "dbo_device".

They are values of transformers' `ep_implementation`. Unlike its own ones they trace into one graph
(`torch.compile(fullgraph=True)`), which is what a backend needs to play one microbatch's exchange under the compute of
another. `expert_parallel` shards an unmodified model in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.expert_parallel import (
    EPImplementation,
    EPImplementationInterface,
    apply_expert_parallelism,
)

from dbo_compile.integrations.device_exchange import exchange_device
from dbo_compile.integrations.expert_parallel import exchange_exact, exchange_static


def expert_parallel(
    model: PreTrainedModel, group: DeviceMesh | dist.ProcessGroup | None = None, *, ep_implementation: str = "dbo"
) -> PreTrainedModel:
    """Shard the experts of `model` over `group` in place, and return the model. The dense part stays on every rank.

    Every rank calls this with the same weights, and afterwards runs the model on its own batch. `group` is a mesh of
    one dim or a process group, by default all ranks. `ep_implementation` is any name that transformers knows: "dbo" is
    `exchange_exact` (ranks may hold different numbers of tokens), "dbo_static" `exchange_static` (no host reads; the
    same number of tokens on all ranks), "dbo_device" `exchange_device` (likewise, and no more rows than routed travel;
    needs NVSHMEM). The weights of the experts become plain tensors, this rank's own: a compiled
    graph then has no DTensor to unwrap, and a checkpoint of the model is one of this rank.

    To compile the model as one graph, its `experts_implementation` must be "grouped_mm" (transformers' default) or
    "batched_mm", and for "dbo" `torch.compile` needs `fullgraph=True` or `torch._dynamo.config.capture_scalar_outputs`.

    Raises `ValueError` if the model has no plan for expert parallelism, is sharded already, or its experts cannot be
    shared evenly.
    """
    name = type(model).__name__
    if not model.ep_plan:
        raise ValueError(
            f"{name} has no ep_plan: its experts cannot be told from its other weights; call exchange_exact or "
            "exchange_static in its MoE layer instead"
        )
    if any(getattr(module, "_is_expert_parallel", False) for module in model.modules()):
        raise ValueError(f"the experts of {name} are sharded already; call expert_parallel once per model")
    mesh = _mesh(group, model.device.type)
    plan = model._expand_parallel_plan(model.ep_plan)
    apply_expert_parallelism(model, mesh, _mesh_of_one(mesh), plan, ep_implementation=ep_implementation)
    _make_local(model)
    _call_directly(model)
    return model


class _ExchangeEP(EPImplementation):
    """Brings transformers' experts modules, whose weights and number of experts are local ones here, to an exchange."""

    exchange: Callable[..., torch.Tensor]

    def __init__(self, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        if tp_mesh.size() > 1:
            raise ValueError(
                f"{type(self).__name__} exchanges the tokens of ranks that each hold their own; with tp_size="
                f'{tp_mesh.size()} ranks share them: use tp_size=1, or ep_implementation="all_to_all"'
            )
        super().__init__(experts, ep_mesh, tp_mesh)
        experts.exchange_ep = self
        self.group = ep_mesh.get_group()
        self.num_experts: int = experts.num_experts * ep_mesh.size()

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return self.exchange(
            hidden_states,
            top_k_index,
            top_k_weights,
            self._run_experts,
            num_experts=self.num_experts,
            group=self.group,
        )

    def _run_experts(self, rows: torch.Tensor, local_experts: torch.Tensor) -> torch.Tensor:
        """Run the module's own experts as top-1 with weight 1; one past the last expert is its mark for "skip" too."""
        top_1 = local_experts.unsqueeze(1)
        done: torch.Tensor = self.experts_forward(rows, top_1, torch.ones_like(top_1, dtype=rows.dtype))
        return done


class ExactEP(_ExchangeEP):
    """`ep_implementation="dbo"`: see `exchange_exact`."""

    exchange = staticmethod(exchange_exact)


class StaticEP(_ExchangeEP):
    """`ep_implementation="dbo_static"`: see `exchange_static`."""

    exchange = staticmethod(exchange_static)


class DeviceEP(_ExchangeEP):
    """`ep_implementation="dbo_device"`: see `exchange_device`."""

    exchange = staticmethod(exchange_device)


EPImplementationInterface.register("dbo", ExactEP)
EPImplementationInterface.register("dbo_static", StaticEP)
EPImplementationInterface.register("dbo_device", DeviceEP)


def _mesh(group: DeviceMesh | dist.ProcessGroup | None, device_type: str) -> DeviceMesh:
    match group:
        case None:
            return init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=("ep",))
        case DeviceMesh():
            if group.ndim != 1:
                raise ValueError(f'the mesh {group} has {group.ndim} dims; pass one of them, e.g. mesh["ep"]')
            return group
        case _:
            return DeviceMesh.from_group(group, device_type)


def _mesh_of_one(mesh: DeviceMesh) -> DeviceMesh:
    """Return the mesh of this rank alone: in transformers' terms, nobody else holds this rank's batch."""
    alone: Any = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return DeviceMesh.from_group(alone, mesh.device_type)


def _make_local(model: nn.Module) -> None:
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, DTensor):
                own = nn.Parameter(weight.to_local().detach(), requires_grad=weight.requires_grad)
                module.register_parameter(name, own)


def _call_directly(model: nn.Module) -> None:
    """Leave out what transformers does around an exchange: it swaps the weights of the module for local ones.

    They are local already, and Dynamo traces each layer anew if one of them changes its module.
    """
    for module in model.modules():
        if exchange := getattr(module, "exchange_ep", None):
            module.forward = exchange.__call__
