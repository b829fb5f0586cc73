"""Placement rules, one module per family of ops. Importing this package registers them all."""

from __future__ import annotations

from dbo_compile.rules import (
    attention,
    comm,
    contract,
    create,
    flex,
    index,
    pieces,
    pointwise,
    reduce,
    requests,
    scatter,
    sort,
    view,
)
from dbo_compile.rules.registry import RULES, rule, rule_of

__all__ = [
    "RULES",
    "attention",
    "comm",
    "contract",
    "create",
    "flex",
    "index",
    "pieces",
    "pointwise",
    "reduce",
    "requests",
    "rule",
    "rule_of",
    "scatter",
    "sort",
    "view",
]
