"""What every test starts from: one thread, an empty Dynamo cache, no options from the environment."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each process, and each rank, starts its own pool
torch.manual_seed(0)  # for cases made at import: every process that collects the tests must find the same
settings.register_profile("ci", derandomize=True)  # the same examples in every run: a change is judged by what it does
if "CI" in os.environ:
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _clean_slate(monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.reset()
    for name in [n for n in os.environ if n.startswith("DBO_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def group():
    """The process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def group_name(group):
    return group.group_name
