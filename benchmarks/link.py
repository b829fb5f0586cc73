"""Two ranks with one thread each, joined by a link of a given rate (see `link.sh`) or by loopback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

SCRIPT = Path(__file__).with_name("link.sh")
UNSHAPED = "100gbit"


def why_no_link() -> str:
    """Why there can be no link of a given rate here; "" if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} of iproute2 missing" if missing else ""


def start_ranks(module: str, argv: Sequence[str], *, link: bool) -> int:
    """Run `python -m module argv... --rank R` for ranks 0 and 1, and return the worse of their exit codes."""
    command = [sys.executable, "-m", module, *argv]
    if not link:
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        return _both([([], env), ([], env)], command)
    subprocess.run([SCRIPT, "down"], stderr=subprocess.DEVNULL, check=False)
    subprocess.run([SCRIPT, "up", UNSHAPED], check=True)
    env = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
    try:
        places = [
            (["ip", "netns", "exec", f"dbo{r}"], env | {"GLOO_SOCKET_IFNAME": f"veth-dbo{r}"}) for r in range(2)
        ]
        return _both(places, command)
    finally:
        subprocess.run([SCRIPT, "down"], check=True)


def _both(places: Sequence[tuple[list[str], dict[str, str]]], command: Sequence[str]) -> int:
    ranks = [
        subprocess.Popen([*prefix, *command, "--rank", str(r)], env=os.environ | {"OMP_NUM_THREADS": "1"} | env)
        for r, (prefix, env) in enumerate(places)
    ]
    try:
        return max(rank.wait() for rank in ranks)
    finally:
        for rank in ranks:  # the one that is left waits for one that is gone
            rank.kill()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@contextmanager
def joined(rank: int) -> Generator[None]:
    """The process group of both ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


def set_rate(mbit: float) -> None:
    """Shape both directions of the link; every rank calls this, rank 0 does it."""
    dist.barrier()
    if dist.get_rank() == 0:
        subprocess.run([SCRIPT, "rate", f"{max(1, round(mbit))}mbit"], check=True)
    dist.barrier()


def agreed(value: float) -> float:
    """The mean over the ranks of what each has measured."""
    both = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(both)
    return both.item() / dist.get_world_size()
