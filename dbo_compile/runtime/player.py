"""Which player a graph gets: by where its tensors are, and by what can be captured there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from dbo_compile.log import logger
from dbo_compile.runtime.agree import Agreement
from dbo_compile.runtime.capture import CapturePlayer
from dbo_compile.runtime.cuda import CudaGraphs
from dbo_compile.runtime.graphs import Limits, Player
from dbo_compile.runtime.sms import BudgetPlayer, SetNumSms
from dbo_compile.runtime.streams import Accelerator, StreamPlayer

GIB = 2**30
MOST_OF_DEVICE = 1 / 8
"""The share of a device that the graphs of one compiled graph may take if nothing is said: where steps are not padded,
each size that comes twice has one."""


def player_for(
    device: torch.device,
    *,
    otherwise: Player,
    cuda_graph: bool | str,
    uncapturable: str,
    limits: Limits,
    ranks: Agreement | None = None,
    graph_memory_gib: float | None = None,
    comm_sms: int | None = None,
    sms_setters: Sequence[SetNumSms] = (),
) -> Player:
    """Streams where the tensors are on an accelerator, `otherwise` elsewhere.

    `uncapturable` is the reason why programs of this graph cannot be captured, "" if they can. `cuda_graph="auto"`
    captures what can be; True does the same, and warns of what cannot. `ranks` are those whose graphs belong together.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != device.type:
        return otherwise
    player: Player = StreamPlayer(Accelerator(device))
    if comm_sms is not None:
        player = BudgetPlayer(player, comm_sms, sms_setters)
    if cuda_graph is False or device.type != "cuda":
        return player
    if uncapturable:
        level = logging.WARNING if cuda_graph is True else logging.INFO
        logger.log(level, "programs are played uncaptured: %s", uncapturable)
        return player
    graphs = CudaGraphs(device)
    most_bytes = int(graphs.memory_size() * MOST_OF_DEVICE if graph_memory_gib is None else graph_memory_gib * GIB)
    return CapturePlayer(player, graphs, device, replace(limits, most_bytes=most_bytes), ranks)
