"""Accelerators and process groups: multiprocessors, addresses, memory that all ranks have."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

_data_ptrs_equal = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)  # in builds for CUDA alone


def same_addresses(tensors: list[Any], addresses: list[int | None], indices: list[int]) -> bool:
    """Whether the tensors at `indices` lie at their `addresses`. A model has many weights: no loop, where possible."""
    if _data_ptrs_equal is not None:
        return bool(_data_ptrs_equal(tensors, addresses, indices))
    return all(tensors[i].data_ptr() == addresses[i] for i in indices)


def free_memory(device: torch.device) -> int | None:
    """The bytes that can be allocated on an accelerator, with those that PyTorch keeps for later; None on others."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != device.type:
        return None
    free, _ = torch.accelerator.get_memory_info(device)
    return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)


def stop_recording(device: torch.device, pool: Any) -> None:
    """End what a capture that was invalidated leaves behind before torch 2.12: an allocator that goes on recording.

    It would abort the process at the next chance to give memory back.
    """
    with suppress(RuntimeError):  # it is not recording: later versions end it themselves
        torch._C._cuda_endAllocateToPool(device.index, pool)


def gemm_sms_left_free() -> int | None:
    """How many multiprocessors PyTorch's own matrix products leave to others; None: none are asked for."""
    left: int | None = torch._C._get_sm_carveout_experimental()
    return left


def leave_sms_free(num_sms: int | None) -> None:
    torch._C._set_sm_carveout_experimental(num_sms)


class Symmetric:
    """Memory that all ranks of a group have at once, reachable from each other's kernels (NVSHMEM)."""

    def __init__(self, group_name: str, device: torch.device) -> None:
        if not symmetric_memory.is_nvshmem_available():
            raise RuntimeError(f"this PyTorch has no NVSHMEM for {device}, which exchanges of device-side sizes need")
        if symmetric_memory.get_backend(device) != "NVSHMEM":
            symmetric_memory.set_backend("NVSHMEM")  # before the first memory of this kind in the process
        self.group_name = group_name
        self.device = device

    def empty(self, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the same size on every rank; all of them must ask for it at the same place."""
        made = symmetric_memory.empty(*sizes, dtype=dtype, device=self.device)
        symmetric_memory.rendezvous(made, group=cast("Any", self.group_name))
        return made


def process_group(name: Any) -> Any:
    """The process group that a functional collective names (torch 2.13 also allows the group itself).

    Raises `RuntimeError` for a group that there is no more, before anything is sent.
    """
    if not isinstance(name, str):
        return name
    try:
        return _resolve_process_group(cast("Any", name))
    except (LookupError, ValueError, RuntimeError) as error:
        raise RuntimeError(
            f"the model communicates over process group {name!r}, which was destroyed or never made on this rank; "
            "compile the model after init_process_group, and keep the group as long as the model"
        ) from error
