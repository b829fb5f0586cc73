"""Placement rules: given where the tokens are in the arguments of an op, where are they in its result.

A rule is called only when some argument carries tokens. It returns a placement (a tuple of them for an op with
several results), or a `Ruling` where that does not say enough, or raises `CannotSplit` with the reason. It sees `Value`
for each tensor, `Number` for each symbolic integer, everything else as it is; never an fx.Node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from dbo_compile.ir.tokens import Placement, Ruling

Rule = Callable[..., Placement | tuple[Placement, ...] | Ruling]
_rules: dict[Any, Rule] = {}
RULES: Mapping[Any, Rule] = MappingProxyType(_rules)
_reads_whole: list[Any] = []


def rule(*targets: Any, reads_whole: bool = False) -> Callable[[Rule], Rule]:
    """Register the function as the rule of each op overload in `targets`; a second rule for one op is an error.

    With `reads_whole` it is also asked about `Shared` values whose size counts the tokens of all microbatches.
    A target may be the name of an overload, `library.op.default`, of a library that need not be there, or of a
    higher-order op.
    """

    def register(fn: Rule) -> Rule:
        for target in targets:
            if target in _rules:
                raise ValueError(f"{target} already has a rule: {_rules[target].__name__}")
            _rules[target] = fn
            if reads_whole:
                _reads_whole.append(target)
        return fn

    return register


def rule_of(target: Any) -> Rule | None:
    """The rule of an op overload, or None; ops of libraries that may not be there are registered by name."""
    return _rules.get(target) or _rules.get(str(target))


def reads_whole(target: Any) -> bool:
    """Whether the rule of an op overload is asked about values that belong to all microbatches together."""
    return target in _reads_whole or str(target) in _reads_whole
