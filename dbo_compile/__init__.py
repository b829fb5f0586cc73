"""dbo-compile: dual-batch overlap for any PyTorch model, as a `torch.compile` backend.

`torch.compile(model, backend="dbo")` splits the tokens of a step into two microbatches and plays the communication
of one under the compute of the other.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbo_compile.axes import CuSeqlens, MaxSeqlen, Requests, SeqLens, Shared, Tokens
    from dbo_compile.config import Config
    from dbo_compile.debugging import debug
    from dbo_compile.decorator import dbo
    from dbo_compile.explanation import Explanation, Verification, explain, verify
    from dbo_compile.report import Report, reports, save_decisions
    from dbo_compile.rules.collectives import register_comm_op
    from dbo_compile.rules.registry import rule as register_rule
    from dbo_compile.rules.requests import register_attention_op
    from dbo_compile.runtime.tune import load_decisions
    from dbo_compile.trust import token_local

# Loaded when first asked for: TORCH_LOGS="+dbo_compile" imports this package while torch is half loaded.
_HOMES = {
    "Config": ("config", "Config"),
    "CuSeqlens": ("axes", "CuSeqlens"),
    "Explanation": ("explanation", "Explanation"),
    "MaxSeqlen": ("axes", "MaxSeqlen"),
    "Report": ("report", "Report"),
    "Requests": ("axes", "Requests"),
    "SeqLens": ("axes", "SeqLens"),
    "Shared": ("axes", "Shared"),
    "Tokens": ("axes", "Tokens"),
    "Verification": ("explanation", "Verification"),
    "dbo": ("decorator", "dbo"),
    "debug": ("debugging", "debug"),
    "explain": ("explanation", "explain"),
    "load_decisions": ("runtime.tune", "load_decisions"),
    "register_attention_op": ("rules.requests", "register_attention_op"),
    "register_comm_op": ("rules.collectives", "register_comm_op"),
    "register_rule": ("rules.registry", "rule"),
    "reports": ("report", "reports"),
    "save_decisions": ("report", "save_decisions"),
    "token_local": ("trust", "token_local"),
    "verify": ("explanation", "verify"),
}

__all__ = [
    "Config",
    "CuSeqlens",
    "Explanation",
    "MaxSeqlen",
    "Report",
    "Requests",
    "SeqLens",
    "Shared",
    "Tokens",
    "Verification",
    "dbo",
    "debug",
    "explain",
    "load_decisions",
    "register_attention_op",
    "register_comm_op",
    "register_rule",
    "reports",
    "save_decisions",
    "token_local",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)
