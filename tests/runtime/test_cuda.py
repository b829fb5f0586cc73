"""CUDA graphs, with CUDA's part played by stand-ins: what is made while compiling, what a failure leaves behind."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dbo_compile.runtime import cuda
from dbo_compile.runtime.cuda import CudaGraphs


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.append((func.overloadpacket.__name__, result.dtype, type(result)))
        return result


@pytest.fixture
def stand_ins(monkeypatch):
    """Streams do nothing, pools are numbers; `fails` has captures fail at their end, `pools` are those they go to."""
    told = SimpleNamespace(fails=False, pools=[])

    class Capture(nullcontext):
        def __init__(self, _graph, *, pool=None, **_rest):
            super().__init__()
            told.pools.append(pool)

        def __exit__(self, *_error):
            if told.fails and told.pools[-1] is not None:
                raise RuntimeError("operation failed due to a previous error during capture")

    numbers = count(1)
    for name, stand_in in {
        "Stream": lambda _device: SimpleNamespace(wait_stream=lambda _other: None),
        "stream": lambda _stream: nullcontext(),
        "graph_pool_handle": lambda: next(numbers),
        "CUDAGraph": lambda **_: SimpleNamespace(),
        "current_stream": lambda _device: None,
        "set_stream": lambda _stream: None,
        "synchronize": lambda _device: None,
        "graph": Capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(cuda.compat, "stop_recording", lambda _device, _pool: None)
    return told


@pytest.mark.usefixtures("stand_ins")
def test_workspaces_are_really_made_while_a_graph_is_compiled():
    with Ops() as ops, FakeTensorMode(), torch.inference_mode():
        graphs = CudaGraphs(torch.device("cpu"))
    products = [(name, dtype) for name, dtype, kind in ops.seen if name in ("mm", "addmm") and kind is torch.Tensor]
    assert products == [(name, dtype) for dtype in (torch.float32, torch.bfloat16) for name in ("mm", "addmm")]
    assert not isinstance(graphs._one, FakeTensor)
    assert not graphs._one.is_inference()


def test_after_a_capture_that_failed_the_next_one_has_another_pool(stand_ins):
    graphs = CudaGraphs(torch.device("cpu"))
    stand_ins.fails = True
    with pytest.raises(RuntimeError, match="during capture"):
        graphs.capture(tuple)
    stand_ins.fails = False
    graphs.capture(tuple)
    graphs.capture(tuple)
    failed, other, *pools = stand_ins.pools
    assert other is None  # what brings the random number generator back
    assert pools[0] == pools[1] != failed
    assert len(graphs._failed) == 1
