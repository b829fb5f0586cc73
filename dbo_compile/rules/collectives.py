"""Which ops are communication, and how to make known that another one is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dbo_compile.rules.registry import Rule
from dbo_compile.rules.registry import rule as register_rule

c10d = torch.ops._c10d_functional
SetNumSms = Callable[[int | None], object]


@dataclass(frozen=True, slots=True)
class CommOp:
    """An op that is played on the comm lane.

    `group_arg` is the index of its process group among its arguments, None if it names none: ops of one group are
    issued in one fixed order on every rank. `set_num_sms` tells its library how many multiprocessors it may occupy.
    """

    group_arg: int | None
    set_num_sms: SetNumSms | None = None


_comm_ops: dict[Any, CommOp] = {}
_waits: dict[Any, None] = {c10d.wait_tensor.default: None}


def register_comm_op(
    op: Any, *, rule: Rule, group_arg: int | None = None, set_num_sms: SetNumSms | None = None
) -> None:
    """Play the op overload `op` on the comm lane, and place its result by `rule`.

    `rule` gets a `Value` for each tensor (its sizes, and where the tokens are in it), and returns where the tokens are
    in the result, or raises `CannotSplit` with the reason. `group_arg` is the index of the process group among the
    arguments. The op must be functional, and its result must be there, or ordered behind it on the stream that it was
    called on, when it returns. `set_num_sms` is called with the option `comm_sms` before a step is played or captured,
    and with None, which stands for the library's own default, after it.

    An all-to-all of a library of your own, which receives rows in an order of its own:

        def dispatch(rows: Value, counts: Value, group: str) -> Placement:
            if rows.is_local:
                return Local()
            raise CannotSplit("which rank a row goes to depends on its place among all tokens")

        dbo_compile.register_comm_op(torch.ops.mylib.dispatch.default, rule=dispatch, group_arg=2)

    Raises `ValueError` if `op` has a rule already, or is an op with several overloads instead of one of them.
    """
    if hasattr(op, "overloads"):
        raise ValueError(f"{op} has the overloads {op.overloads()}; register each by itself, e.g. {op}.default")
    register_rule(op)(rule)
    _comm_ops[op] = CommOp(group_arg, set_num_sms)


def comm_op(target: Any) -> CommOp | None:
    """What is known of `target` as communication, or None if it is none. A wait is none: it moves no data."""
    return _comm_ops.get(target)


def sms_setters(targets: Iterable[Any]) -> tuple[SetNumSms, ...]:
    """What is to be told how many multiprocessors communication may occupy, in a graph that calls `targets`."""
    ops = (comm_op(target) for target in targets)
    return tuple(dict.fromkeys(op.set_num_sms for op in ops if op is not None and op.set_num_sms is not None))


def is_wait(target: Any) -> bool:
    """Whether `target` waits for a collective and returns its result."""
    return target in _waits
