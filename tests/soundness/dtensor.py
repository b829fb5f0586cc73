"""The same question, asked of DTensor: are rows of the arguments on each of two ranks enough for those of results?"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._op_schema import OpSchema
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from tests.soundness.calls import Call
from tests.soundness.views import View

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_copy.default)


class TwoRanks:
    """Asks DTensor's sharding rules, on a mesh of two ranks that are not there. Use it with `with`."""

    def __enter__(self) -> TwoRanks:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        self.mesh = init_device_mesh("cpu", (2,))
        self._answers: dict[Any, bool] = {}
        self.rules = DTensor._op_dispatcher.sharding_propagator
        return self

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()

    def splits(self, call: Call, view: View) -> bool:
        """Whether some result is sharded and no argument has to be gathered or sent for it.

        Not asked about other sizes of tensors without elements: for some its rule for views never ends.
        """
        if call.op in VIEWS and any(isinstance(x, torch.Tensor) and not x.numel() for x in call.leaves):
            return False
        dims = tuple((i, d) for i, d in view.dims.items() if i not in view.numbers)
        key = call.key, dims
        if key not in self._answers:
            self._answers[key] = self._splits(call, view)
        return self._answers[key]

    def _splits(self, call: Call, view: View) -> bool:
        seen = call.replaced([self._seen(a, view.dims.get(i)) for i, a in enumerate(call.leaves)])
        try:
            answer = self.rules.propagate_op_sharding_non_cached(OpSchema(seen.op, seen.args, seen.kwargs))
        except Exception:  # how it refuses differs from op to op
            return False
        specs = [s for s in tree_leaves(answer.output_spec) if isinstance(s, DTensorSpec)]
        sharded = any(isinstance(p, Shard) for s in specs for p in s.placements)
        partial = any(p.is_partial() for s in specs for p in s.placements)
        return sharded and not partial and not answer.needs_redistribute

    def _seen(self, arg: Any, dim: int | None) -> Any:
        if not isinstance(arg, torch.Tensor):
            return arg
        place = Replicate() if dim is None else Shard(dim)
        return DTensorSpec(self.mesh, (place,), tensor_meta=TensorMeta(arg.shape, arg.stride(), arg.dtype))
