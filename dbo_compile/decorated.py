"""A decorated function: each call is a step, which ranks agree on and pad before Dynamo sees its sizes."""

from __future__ import annotations

import functools
import hashlib
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist

from dbo_compile import backend, compat
from dbo_compile.axes import dims_of_tokens, request_axes
from dbo_compile.config import Config, nearest
from dbo_compile.errors import Disagreement, RankLost, Unpaddable
from dbo_compile.runtime.agree import Agreement, agreement_over
from dbo_compile.runtime.force import LEAST_ROWS, InForce, Known, has_too_few, in_force
from dbo_compile.runtime.members import closed, opened, without_requests
from dbo_compile.runtime.metadata import read_requests
from dbo_compile.runtime.padding import Buckets, Padding, is_decode, unpad, unpad_tree, view_dim
from dbo_compile.runtime.plan import BatchPlan, Limits, Wish


class Steps:
    """A decorated function, or the method of one instance: each call is a step of all ranks."""

    def __init__(self, fn: Callable[..., Any], config: Config, owner: Any = None) -> None:
        functools.update_wrapper(self, fn)
        self._fn = fn
        self._config = config
        self._owner = None if owner is None else weakref.ref(owner)
        signature = inspect.signature(fn)
        names = list(signature.parameters.values())
        self.__code__ = getattr(fn, "__code__", None)  # torch.export asks where a forward stands
        self.__signature__ = signature.replace(parameters=names if owner is None else names[1:])
        check_names(config, self.__signature__)
        self._axes = request_axes(config.token_dims or {})
        self._padding = Padding(dims_of_tokens(config.token_dims or {}), config.pad_values)
        self._limits = Limits.of(config)
        self._compiled = _compiled(fn, config)
        self._agreement: Agreement | None = None
        self._dtypes = ""
        self._num_played = 0
        self._known = Known()
        self._idle: dict[str, Any] = {}
        self._nothing: Any = None
        self._per_token: tuple[int, bool] | None = None
        self.buckets = Buckets(config.pad_to)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._fn(*self._self(), *args, **kwargs)
        agreement = self.agreement
        try:
            inputs = self._named(args, kwargs)
            wish = self._wish(inputs)
        except Exception:
            agreement.meet(self._wrong())  # the others wait for this rank
            raise
        plan = agreement.agree(wish, self._limits)
        try:
            return self._play(plan, inputs)
        except (Disagreement, RankLost, Unpaddable):  # which every rank raises alike
            raise
        except Exception as error:
            agreement.leave(f"it raised {type(error).__name__}: {error}")
            raise

    @property
    def agreement(self) -> Agreement:
        """Where the ranks meet; made when first asked for, on all ranks at the same place."""
        if self._agreement is None:
            name = self._config.dp_group
            default = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
            group = default if name is None else compat.process_group(name)
            self._agreement = agreement_over(group, self._config.timeout_s)
        return self._agreement

    def idle_step(self) -> None:
        """Take part in a step without tokens. Raises `ValueError` before the first call, which shows what inputs are
        like."""
        if not self._idle:
            self.agreement.meet(self._wrong())
            raise ValueError("idle_step has seen no call yet; call the model with inputs of no tokens instead")
        self(**self._idle)

    def agree_ahead(self, num_tokens: int) -> None:
        """Announce the next call, of so many tokens and otherwise like the last one, while this one is played."""
        if self._per_token is None:
            raise ValueError("agree_ahead announces a call that is like the last one: call the model once before")
        self.agreement.agree_ahead(self._wish_of(num_tokens, *self._per_token))

    # -- one step -----------------------------------------------------------------------------------------------------

    def _self(self) -> tuple[Any, ...]:
        return () if self._owner is None else (self._owner(),)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name; those of `*args` and `**kwargs` are not token inputs unless they are named."""
        bound = self.__signature__.bind(*args, **kwargs)
        named = dict(bound.arguments)
        for name, parameter in self.__signature__.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                named |= named.pop(name, {})
            elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY) and name in named:
                raise TypeError(f"a function that dbo decorates takes its arguments by name, but {name} has none")
        return opened(named, self._config.token_dims or {})

    def _num_tokens(self, inputs: Mapping[str, Any]) -> int:
        return self._padding.num_tokens(inputs)

    def _wish(self, inputs: Mapping[str, Any]) -> Wish:
        self._padding.check(inputs)
        num_tokens = self._num_tokens(inputs)
        table = read_requests(inputs, self._axes, num_tokens)
        tensors = [(inputs[name], dim) for name, dim in self._padding.token_dims.items()
                   if isinstance(inputs.get(name), torch.Tensor)]
        first = tensors[0][0]
        elements = first.numel() // num_tokens if num_tokens else 0
        self._per_token = elements, is_decode(tensors) or (table is not None and table.is_decode)
        self._dtypes = " ".join(str(x.dtype) for x, _ in tensors)
        return self._wish_of(num_tokens, *self._per_token)

    def _wish_of(self, num_tokens: int, elements: int, decode: bool) -> Wish:
        program, config = self._program, self._config.fingerprint
        if not num_tokens:
            return Wish.idle(program, config)
        bucket = self.buckets.bucket(num_tokens)
        if self._known.can_pad or self._config.pad_to is not None:
            bucket = max(LEAST_ROWS, bucket)
        can_split = self._config.split != "never"
        pads = self._known.pads
        return Wish(num_tokens, bucket, bucket * elements, can_split, False, decode, program, config, pads=pads)

    def _wrong(self) -> Wish:
        return Wish.wrong(self._program, self._config.fingerprint)

    @property
    def _program(self) -> str:
        """What tells programs apart before any is called: dtypes. Ranks compare the rest as they call them."""
        return hashlib.sha256(self._dtypes.encode()).hexdigest()[:16]

    def _play(self, plan: BatchPlan, inputs: dict[str, Any]) -> Any:
        """Play a step, and once more where its first graph turns out to be one that must not be padded."""
        if not plan.num_microbatches:
            return self._nothing
        num_tokens = self._num_tokens(inputs)
        pads = plan.pads or has_too_few(plan)
        step = InForce(plan, num_tokens=num_tokens, pads=pads)
        try:
            return self._played(step, inputs)
        except Unpaddable as why:
            self._known.learn(step)
            self._known.check_unpadded(step, str(why))
        except Disagreement:
            self._known.same_size |= step.same_size  # what is new to this model: the next step is padded for it
            raise
        return self._played(InForce(plan, num_tokens=num_tokens, pads=False), inputs)

    def _played(self, step: InForce, inputs: dict[str, Any]) -> Any:
        num_tokens, num_rows = step.num_tokens, step.num_rows
        padded = self._padding.pad(inputs, num_rows)
        if not self._num_played:
            self._ask_for_dynamic(padded)
        with in_force(step), compat.host_reads_in_graph():
            results = self._compiled(*self._self(), **closed(padded))
        self._num_played += 1
        self._known.learn(step)
        for name, x in padded.items():
            if x is not inputs[name] and x.data_ptr() in step.written:
                inputs[name].copy_(unpad(x, self._padding.token_dims[name], num_rows, num_tokens))
        if not self._idle:
            self._idle = closed(without_requests(self._padding.empty(inputs), self._axes))
            self._nothing = self._unpadded(results, step, 0, padded)
        return self._unpadded(results, step, num_tokens, padded)

    def _ask_for_dynamic(self, inputs: Mapping[str, Any]) -> None:
        """Have Dynamo make symbols of the token dims at once; the backend would ask it for a second trace."""
        for name, dim in self._padding.token_dims.items():
            if isinstance(x := inputs.get(name), torch.Tensor):
                compat.ask_for_dynamic(x, dim % x.ndim)

    def _unpadded(self, results: Any, step: InForce, num_tokens: int, padded: Mapping[str, Any]) -> Any:
        """Results of a graph are known, and views of arguments; what else Python made is cut where it has as many rows
        as were padded to, in the token dim of the first argument."""
        num_rows, dims = step.num_rows, self._padding.token_dims
        guess = next(iter(dims.values()))

        def cut(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            known = step.results.get(id(x))
            if known is not None and known[0] is x:
                return x if known[1] is None else unpad(x, known[1], num_rows, num_tokens)
            views = (view_dim(x, padded[name], dim) for name, dim in dims.items() if name in padded)
            return unpad_tree(x, next((d for d in views if d is not None), guess), num_rows, num_tokens)

        return results if num_tokens == num_rows else compat.tree_map(cut, results)

    # -- copies of what is decorated ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle of a decorated Module keeps: it compiles, and meets other ranks, afresh."""
        return {"fn": self._fn, "config": self._config, "owner": self._self()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["fn"], state["config"], *state["owner"])  # type: ignore[misc]


def _compiled(fn: Callable[..., Any], config: Config) -> Callable[..., Any]:
    """`fn` compiled apart from every other use of its code, by which Dynamo keeps what it has compiled."""
    target = getattr(fn, "__func__", fn)
    own: Any = fn
    if isinstance(target, FunctionType):
        own = FunctionType(target.__code__.replace(), target.__globals__, target.__name__, target.__defaults__,
                           target.__closure__)
        own.__kwdefaults__ = target.__kwdefaults__
        own = own if target is fn else own.__get__(fn.__self__)  # type: ignore[attr-defined]
    inside = replace(config, token_dims=_last_names(config.token_dims or {}), pad_values=_last_names(config.pad_values))
    compiled: Callable[..., Any] = torch.compile(own, backend=functools.partial(backend.compile_with, config=inside))
    return compiled


def _last_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Members by the names that a graph has for them."""
    return {name.rpartition(".")[2]: value for name, value in values.items()}


def check_names(config: Config, signature: inspect.Signature) -> None:
    """Raise `ValueError` for a name in `token_dims` or `pad_values` that is none of a function's arguments."""
    parameters = signature.parameters
    if not config.token_dims:
        raise ValueError("token_dims must name an argument that carries tokens, e.g. token_dims={'input_ids': 0}")
    carriers = dims_of_tokens(config.token_dims)
    for name in config.pad_values:
        if name not in carriers:
            raise ValueError(f"pad_values has {name!r}, which is no input of tokens{nearest(name, list(carriers))} "
                             f"Those of token_dims are: {', '.join(carriers)}")
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in config.token_dims:
        if name.partition(".")[0] not in parameters:
            raise ValueError(f"{name!r} is no argument{nearest(name, list(parameters))} The arguments are: "
                             f"{', '.join(parameters)}")
