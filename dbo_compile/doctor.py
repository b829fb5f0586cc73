"""Doctor: what is installed here, and what of dbo-compile works with it."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import torch
import torch.distributed as dist

SUPPORTED = ((2, 11), (2, 13))
"""The oldest and the newest PyTorch that this is tested with."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether something works here; if not, `needs` says what it takes. What is `required`, nothing works without."""

    name: str
    works: bool
    what: str
    needs: str = ""
    required: bool = False

    def __str__(self) -> str:
        mark = "ok" if self.works else ("MISSING" if self.required else "-")
        return f"{mark:8}{self.name:28}{self.what if self.works or not self.needs else self.needs}"


def findings() -> list[Finding]:
    return [*_installed(), *_devices(), *_groups(), *_optional()]


def is_well(found: list[Finding]) -> bool:
    """Whether everything works that nothing works without."""
    return all(f.works for f in found if f.required)


def as_data(found: list[Finding]) -> dict[str, Any]:
    return {"well": is_well(found), "findings": [asdict(f) for f in found]}


def _installed() -> Iterator[Finding]:
    yield Finding("python", True, platform.python_version())
    yield Finding("dbo-compile", True, _version("dbo-compile") or "a checkout that is not installed")
    oldest, newest = (".".join(map(str, v)) for v in SUPPORTED)
    found = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    supported = SUPPORTED[0] <= found <= SUPPORTED[1]
    yield Finding("torch", supported, torch.__version__, f"{torch.__version__}: needs {oldest} to {newest}", True)
    registered = any(p.name == "dbo" for p in entry_points(group="torch_dynamo_backends"))
    needs = "pip install dbo-compile (backend=dbo_compile.backend.dbo works without)"
    yield Finding('backend="dbo"', registered, "found by its entry point", needs)


def _devices() -> Iterator[Finding]:
    yield Finding("lanes on the CPU", True, f"{torch.get_num_threads()} threads")
    has = torch.accelerator.is_available()
    kind = torch.accelerator.current_accelerator() if has else None
    devices = f"{torch.accelerator.device_count()} of {kind}" if has else ""
    yield Finding("lanes as streams", has, devices, "a PyTorch that sees an accelerator")
    cuda = torch.cuda.is_available()
    yield Finding("CUDA graphs", cuda, torch.cuda.get_device_name() if cuda else "", "a CUDA device")


def _groups() -> Iterator[Finding]:
    yield Finding("torch.distributed", dist.is_available(), "", "a PyTorch with torch.distributed", True)
    backends = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "ucc": dist.is_ucc_available()}
    for name, has in backends.items():
        yield Finding(f"process groups: {name}", has, "", f"a PyTorch with {name}")


def _optional() -> Iterator[Finding]:
    for package, what, needs in (
        ("transformers", 'ep_implementation="dbo"', "pip install 'dbo-compile[hf]'"),
        ("depyf", "decompiled bytecode in dumps", "pip install 'dbo-compile[debug]'"),
        ("mkdocs-material", "the documentation as a site", "pip install 'dbo-compile[docs]'"),
    ):
        found = _version(package)
        yield Finding(package, bool(found), f"{found}: {what}", f"{what}: {needs}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
