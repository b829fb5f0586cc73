"""The demo: Qwen3-MoE, its experts on two ranks of this machine, compiled by the `dbo` backend, shown and checked.

Every promise is checked on both ranks; the exit status is not 0 if one does not hold.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD_SIZE = 2
BATCH, LENGTH = 8, 64
REPEATS = 7
CONFIG: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "use_cache": False,
}


def demo(folder: Path) -> int:
    """Run the demo on two gloo ranks and leave the rewritten graph and the lane chart in `folder`."""
    print(f"Qwen3-MoE ({CONFIG['num_hidden_layers']} layers, {CONFIG['num_experts']} experts, random weights), experts")
    print(f"shared by {WORLD_SIZE} gloo ranks on this machine, {BATCH} x {LENGTH} tokens a rank, compiled by backend dbo.")
    print("Compiling takes most of a minute the first time ...", flush=True)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = str(_free_port())
    try:
        mp.spawn(_rank, args=(folder,), nprocs=WORLD_SIZE)  # type: ignore[no-untyped-call]
    except mp.ProcessException as error:
        print(f"\nthe demo failed: {error}")
        return 1
    print(f"\nEvery level, the rewritten graph (5_graph.py) and the lane chart (lanes.svg): {folder.resolve()}/rank0")
    return 0
