"""Names for segments, from the paths of the modules that their ops come from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from keyword import kwlist

from torch import fx, nn

from dbo_compile import origin
from dbo_compile.passes.cut import Group, Kind
from dbo_compile.rules.collectives import comm_op

TAKEN = frozenset((*kwlist, *dir(fx.GraphModule(nn.Module(), fx.Graph())), "steps"))
"""What cannot be the attribute of an emitted module by which it calls a segment."""


def names_of(groups: Sequence[Group]) -> list[str]:
    """A name for each group, unique: `layers_0_mlp`, `layers_0_mlp_all_to_all`, `layers_0_mlp_2`."""
    first = [_name(group) for group in groups]
    taken = set(first)  # `layers_2` is the second of `layers` only if there is no layer 2
    count: Counter[str] = Counter()
    names = []
    for name in first:
        count[name] += 1
        unique = name
        while count[name] > 1 and unique in taken:
            unique = f"{name}_{count[name]}"
            count[name] += unique in taken
        taken.add(unique)
        names.append(unique)
    return names


def _name(group: Group) -> str:
    path = _common_path([p for n in group.nodes if (p := origin.module_path(n))])
    match group.mode.kind:
        case Kind.COMM:
            op = next(str(n.target) for n in group.nodes if comm_op(n.target))
            parts = [path, re.sub(r"(_single|_into_tensor|_tensor)?_?$", "", op.split(".")[-2], count=1)]
        case Kind.HOST:
            parts = [path, "read_counts"]
        case Kind.COMPUTE | Kind.PLAIN:
            parts = [path]
    if not group.mode.per_microbatch:
        parts.append("once")
    name = re.sub(r"\W+", "_", ".".join(p for p in parts if p)) or "main"
    return f"module_{name}" if name[0].isdigit() or name in TAKEN else name


def _common_path(paths: Sequence[str]) -> str:
    """The deepest module that most of the ops come from, without the leading `model.` that every path has."""
    count: Counter[str] = Counter()
    for path in paths:
        parts = path.split(".")
        count.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    deepest = [p for p, n in count.items() if 2 * n > len(paths)]
    return max(deepest, key=lambda p: (p.count("."), count[p], p), default="").removeprefix("model.")
