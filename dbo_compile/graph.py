"""The few questions we ask of an FX graph, answered with precise types. Only this file meets fx.Argument and, with
`origin`, meta."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, cast

import sympy
import torch
from torch import fx

from dbo_compile import compat

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
WAIT = torch.ops._c10d_functional.wait_tensor.default


def inputs(graph: fx.Graph) -> tuple[fx.Node, ...]:
    return tuple(n for n in graph.nodes if n.op == "placeholder")


def add_input(graph: fx.Graph, name: str) -> fx.Node:
    """A new input, called `name` if nothing else is: FX sees to that for nodes, but not for the arguments they are."""
    node = graph.placeholder(name)
    node.target = node.name
    return node


def rename_input(node: fx.Node, name: str) -> None:
    """Call an input `name`, if nothing else is."""
    with node.graph.inserting_before(node):
        named = add_input(node.graph, name)
    named.meta = node.meta
    node.replace_all_uses_with(named)
    node.graph.erase_node(node)


def results(graph: fx.Graph) -> tuple[Any, ...]:
    """What the graph returns: nodes, and constants (None among them)."""
    return tuple(cast("Any", graph.output_node().args[0]))


def body(graph: fx.Graph) -> Iterator[fx.Node]:
    return (n for n in graph.nodes if n.op not in ("placeholder", "output"))


def value(node: fx.Node) -> Any:
    """The fake value that stands for the result of `node`."""
    return node.meta.get("val")


def expression(size: int | torch.SymInt | torch.SymFloat | torch.SymBool) -> sympy.Expr:
    """A size as a sympy expression: comparing these adds no guard, comparing SymInts would."""
    if isinstance(size, int):
        return sympy.Integer(size)
    return size.node.expr


def function(node: fx.Node) -> fx.Graph | None:
    """The function that `node` stands for, as an argument of a higher-order op; None if it is a value."""
    owner = node.graph.owning_module
    made = getattr(owner, str(node.target), None) if node.op == "get_attr" else None
    return made.graph if isinstance(made, fx.GraphModule) else None


def is_integer(node: fx.Node) -> bool:
    """Whether the result of `node` is a tensor of integers, booleans not among them."""
    val = value(node)
    if not isinstance(val, torch.Tensor) or val.dtype is torch.bool:
        return False
    return not (val.dtype.is_floating_point or val.dtype.is_complex)


def is_symbolic_number(node: fx.Node) -> bool:
    return isinstance(value(node), SYMBOLIC)


def symbol_inputs(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    """The inputs that are symbolic numbers: which argument holds each symbol."""
    return {expression(value(n)): i for i, n in enumerate(inputs(graph)) if is_symbolic_number(n)}


def reads_number(node: fx.Node) -> bool:
    """Whether `node` reads a number out of a tensor, on the host."""
    return node.target is torch.ops.aten._local_scalar_dense.default


def copies_to_host(node: fx.Node) -> bool:
    """Whether `node` makes a tensor of the CPU out of one on a device: the host waits for what it reads."""
    read = [t for n in node.all_input_nodes for t in _tensors(n)]
    return is_on_host(node) and any(t.device.type != "cpu" for t in read)


def is_on_host(node: fx.Node) -> bool:
    """Whether the result of `node` is a tensor of the CPU, or several of them."""
    made = _tensors(node)
    return bool(made) and all(t.device.type == "cpu" for t in made)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    val = value(node)
    return [t for t in (val if isinstance(val, tuple | list) else [val]) if isinstance(t, torch.Tensor)]


def data_symbols(graph: fx.Graph) -> dict[sympy.Symbol, fx.Node]:
    """The symbols that stand for numbers read out of tensors, and who reads each first."""
    symbols: dict[sympy.Symbol, fx.Node] = {}
    for node in filter(reads_number, body(graph)):
        if (symbol := expression(value(node))).is_Symbol:
            symbols.setdefault(symbol, node)
    return symbols


def is_vouched_for(node: fx.Node) -> bool:
    """Whether the user says, by `dbo_compile.token_local`, that rows come back to their tokens here."""
    return bool(node.meta.get("custom", {}).get("dbo_compile") == "token_local")


def symbols_of(val: Any) -> set[sympy.Symbol]:
    """The symbols in a number, in the sizes and strides of a tensor, or in several of these."""
    if isinstance(val, tuple | list):
        return set().union(*map(symbols_of, val))
    if isinstance(val, torch.Tensor):
        sizes = [d for d in (*val.shape, *val.stride()) if not isinstance(d, int)]
        return {s for d in sizes for s in compat.symbols_in(expression(d))}
    return set(compat.symbols_in(expression(val))) if isinstance(val, SYMBOLIC) else set()


def copied(graph: fx.Graph) -> fx.Graph:
    """Another graph with nodes of its own, which share the fake values; `copy.copy` would share the nodes, too."""
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new


def map_nodes(args: Any, fn: Callable[[fx.Node], Any]) -> Any:
    return fx.node.map_aggregate(args, lambda a: fn(a) if isinstance(a, fx.Node) else a)


def flat(args: Any) -> list[Any]:
    """The leaves of nested arguments, in order."""
    leaves: list[Any] = []
    fx.node.map_aggregate(args, lambda a: leaves.append(a))
    return leaves


def named_args(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`args` and `kwargs` for the op that `node` calls, all by name."""
    names = [arg.name for arg in cast("Any", node.target)._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def has_tag(node: fx.Node, tag: torch.Tag) -> bool:
    return tag in getattr(node.target, "tags", ())


def written(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments that an op changes in place, by its schema."""
    if not _writes(node.target):  # so it is for most ops, and this is asked of every node many times
        return ()
    return tuple([arg for arg, info in _schema_args(node) if info.is_write])


def viewed(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments whose memory the result of an op may share, by its schema."""
    if node.target is WAIT:  # hands its argument on, though its schema does not say so
        return tuple(node.all_input_nodes)
    own = tuple([arg for arg, info in _schema_args(node) if not info.is_write])
    return own if _returns_new(node.target) else own + written(node)


def base(node: fx.Node) -> fx.Node:
    """The node whose memory `node` shares: follows views, and updates in place, to where they begin."""
    while node.op == "call_function":
        if node.target is operator.getitem:
            node = cast("fx.Node", node.args[0])
        elif bases := viewed(node):
            node = bases[0]
        else:
            break
    return node


def shares_input(node: fx.Node) -> bool:
    """Whether a value lies in the memory of an argument of the graph that is written in place."""
    origin = base(node)
    return origin.op == "placeholder" and _is_written(origin)


def is_returned_view(node: fx.Node) -> bool:
    """Whether the graph returns a view of an argument: it must lie in memory as that does, offset and all."""
    if node.op == "placeholder" or not any(u.op == "output" for u in node.users):
        return False
    origin = base(node)
    becomes_argument = any(u.target is torch.ops.aten.copy_.default and u.args[1] is origin for u in origin.users)
    return origin is not node and (origin.op == "placeholder" or becomes_argument)


def _is_written(node: fx.Node) -> bool:
    """Whether something writes the memory of `node`, through whichever view of it."""
    views = [u for u in node.users if u.target is operator.getitem or node in viewed(u)]
    return any(node in written(u) for u in views) or any(map(_is_written, views))


def is_dense(val: torch.Tensor) -> bool:
    """Whether a tensor fills its memory without gaps or repeats, in any order of dims, whatever its symbols stand for.
    Adds no guard: only the order of the dims is that of the call that was traced."""
    dims = [(stride, size) for stride, size in zip(val.stride(), val.shape, strict=True) if expression(size) != 1]
    expected = sympy.Integer(1)
    for stride, size in sorted(dims, key=lambda dim: (_hint(dim[0]), _hint(dim[1]))):
        if sympy.expand(expression(stride) - expected) != 0:
            return False
        expected *= expression(size)
    return True


def stride_order(val: torch.Tensor) -> list[int]:
    """The dims of a tensor, the outermost in memory first, in the call that was traced."""
    strides = val.stride()
    return sorted(range(val.ndim), key=lambda d: -_hint(strides[d]))


def lies_together(val: torch.Tensor, dim: int) -> bool:
    """Whether `dim` is the outermost one in memory, so that some rows of it lie in memory as all of them do."""
    strides = val.stride()
    return all(
        _hint(strides[d]) <= _hint(strides[dim]) or expression(val.shape[d]) == 1 for d in range(val.ndim) if d != dim
    )


def _hint(size: int | torch.SymInt) -> int:
    """The size in the call that was traced; a data-dependent one counts as 7, a number that divides nothing."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    free = compat.symbols_in(expr) - set(size.node.shape_env.backed_var_to_val)
    known = {s: size.node.shape_env.backed_var_to_val[s] for s in compat.symbols_in(expr) - free}
    return int(expr.xreplace(known | dict.fromkeys(free, sympy.Integer(7))))


def _schema_args(node: fx.Node) -> list[tuple[fx.Node, Any]]:
    """The nodes among the arguments whose memory the op says something about, and what it says."""
    aliased = _aliased_args(node.target)
    if not aliased:
        return []
    args = [*enumerate(node.args), *node.kwargs.items()]
    leaves = [(leaf, aliased[name]) for name, arg in args if name in aliased for leaf in flat(arg)]
    return [(leaf, info) for leaf, info in leaves if isinstance(leaf, fx.Node)]


@cache
def _returns_new(target: Any) -> bool:
    """Whether nothing that an op returns is an argument that it has written in place (attention that fills a cache)."""
    schema = getattr(target, "_schema", None)
    return schema is not None and all(made.alias_info is None for made in schema.returns)


@cache
def _writes(target: Any) -> bool:
    return any(info.is_write for info in _aliased_args(target).values())


@cache
def _aliased_args(target: Any) -> dict[int | str, Any]:
    """The arguments that the schema of an op gives alias information for, by position and by name."""
    schema = getattr(target, "_schema", None)
    args = enumerate(schema.arguments) if schema is not None else ()
    return {key: a.alias_info for i, a in args if a.alias_info is not None for key in (i, a.name)}
