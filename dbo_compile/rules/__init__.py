"""Placement rules, one module per family of ops. Importing this package registers them all."""

from __future__ import annotations

from dbo_compile.rules import attention, contract, create, pieces, pointwise, view
from dbo_compile.rules.registry import RULES, rule

__all__ = ["RULES", "attention", "contract", "create", "pieces", "pointwise", "rule", "view"]
