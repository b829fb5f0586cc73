"""The budget of multiprocessors: set around what is played, restored whatever happens, off unless asked for."""

from __future__ import annotations

import pytest
import torch

from dbo_compile import compat
from dbo_compile.rules.collectives import comm_op, register_comm_op, sms_setters
from dbo_compile.runtime import player as player_module
from dbo_compile.runtime.capture import CapturePlayer
from dbo_compile.runtime.graphs import Limits
from dbo_compile.runtime.player import player_for
from dbo_compile.runtime.sms import BudgetPlayer, comm_group, sm_budget
from dbo_compile.runtime.streams import StreamPlayer
from tests.runtime.fake_device import FakeDevice


@pytest.fixture
def left_free(monkeypatch):
    """What PyTorch's products leave free, over time; the real switch warns and is process-wide."""
    values = [5]
    monkeypatch.setattr("dbo_compile.runtime.sms.leave_sms_free", values.append)
    monkeypatch.setattr("dbo_compile.runtime.sms.gemm_sms_left_free", lambda: values[-1])
    return values


def test_a_budget_is_set_for_products_and_comm_ops_and_restored(left_free):
    first, second = [], []
    with sm_budget(20, [first.append, second.append]):
        assert (left_free[-1], first, second) == (20, [20], [20])
    assert (left_free[-1], first, second) == (5, [20, None], [20, None])


def test_a_budget_is_restored_after_an_error_of_a_play_or_of_a_setter(left_free):
    told = []

    def refuses(num_sms):
        if num_sms is not None:
            raise ValueError("too few")

    with pytest.raises(KeyError), sm_budget(20, [told.append]):
        raise KeyError
    with pytest.raises(ValueError, match="too few"), sm_budget(20, [told.append, refuses]):
        raise AssertionError("never gets here")
    assert (left_free[-1], told) == (5, [20, None, 20, None])


def test_everything_is_played_within_the_budget(left_free):
    player = BudgetPlayer(lambda module, rows, args: (module, rows, args, left_free[-1]), 12, [])
    assert player("module", (4, 3), [7]) == ("module", (4, 3), [7], 12)
    assert left_free[-1] == 5


def test_the_switch_of_pytorch_can_be_read_back():
    assert compat.gemm_sms_left_free() is None
    compat.leave_sms_free(7)
    try:
        assert compat.gemm_sms_left_free() == 7
    finally:
        compat.leave_sms_free(None)
    assert compat.gemm_sms_left_free() is None


@torch.library.custom_op("dbo_test_sms::send", mutates_args=())
def send(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def test_a_comm_op_brings_its_own_setter():
    told = []
    op = torch.ops.dbo_test_sms.send.default
    register_comm_op(op, rule=lambda x: x.place, set_num_sms=told.append)
    assert comm_op(op).set_num_sms == told.append
    assert sms_setters([torch.ops.aten.sin.default, op, op]) == (told.append,)


def test_a_group_with_a_budget_needs_nccl(monkeypatch):
    monkeypatch.delattr("torch.distributed.ProcessGroupNCCL", raising=False)
    with pytest.raises(RuntimeError, match="has no NCCL"):
        comm_group(comm_sms=8)


# -- which player a graph gets ---------------------------------------------------------------------


def otherwise(module, rows, args):
    return ()


class FakeGraphs:
    def __init__(self, device):
        self.device = device

    def memory_size(self):
        return 80 * 2**30


def kinds_of(player):
    """The players that are around each other, from the outside in."""
    kinds = []
    while player is not otherwise:
        kinds.append(type(player))
        player = getattr(player, "player", otherwise)
    return kinds


@pytest.mark.parametrize(
    ("device", "options", "kinds"),
    [
        ("cpu", {}, []),
        ("meta", {}, []),
        ("cuda", {}, [CapturePlayer, StreamPlayer]),
        ("cuda", {"cuda_graph": False}, [StreamPlayer]),
        ("cuda", {"uncapturable": "it reads sizes on the host"}, [StreamPlayer]),
        ("cuda", {"comm_sms": 20}, [CapturePlayer, BudgetPlayer, StreamPlayer]),
        ("xpu", {}, []),
    ],
)
def test_the_device_of_the_tensors_chooses_the_player(device, options, kinds, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(player_module, "Accelerator", lambda device: FakeDevice())
    monkeypatch.setattr(player_module, "CudaGraphs", FakeGraphs)
    wanted = {"cuda_graph": "auto", "uncapturable": "", "limits": Limits()} | options
    assert kinds_of(player_for(torch.device(device), otherwise=otherwise, **wanted)) == kinds


@pytest.mark.parametrize(("given", "gib"), [(None, 10), (3, 3), (0.5, 0.5)])
def test_graphs_never_take_all_of_a_device(given, gib, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(player_module, "Accelerator", lambda device: FakeDevice())
    monkeypatch.setattr(player_module, "CudaGraphs", FakeGraphs)
    options = {"cuda_graph": "auto", "uncapturable": "", "limits": Limits(), "graph_memory_gib": given}
    player = player_for(torch.device("cuda"), otherwise=otherwise, **options)
    assert player.limits.most_bytes == gib * 2**30


def test_what_cannot_be_captured_is_a_warning_where_capturing_was_asked_for(monkeypatch, caplog):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(player_module, "Accelerator", lambda device: FakeDevice())
    device = torch.device("cuda")
    with caplog.at_level("INFO", "dbo_compile"):
        for asked in ("auto", True):
            player_for(device, otherwise=otherwise, cuda_graph=asked, uncapturable="why", limits=Limits())
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "programs are played uncaptured: why"),
        ("WARNING", "programs are played uncaptured: why"),
    ]
