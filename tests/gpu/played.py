"""A small stack on a GPU, compiled and split, and plays of its programs; a module that compute-sanitizer can run."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.gpu_model import TINY, inputs, make_stack
from dbo_compile import reports
from dbo_compile.runtime.capture import CapturePlayer
from dbo_compile.runtime.cuda import CudaGraphs
from dbo_compile.runtime.graphs import Limits, Play
from dbo_compile.runtime.streams import Accelerator, StreamPlayer

SMALL = replace(TINY, hidden=256, expert_width=128, head_dim=32, num_layers=3)


class Played:
    """A compiled stack, and what a player gets when it is called."""

    def __init__(self, device, sizes=SMALL, **options):
        torch._dynamo.reset()
        self.device, self.sizes = device, sizes
        self.stack = make_stack(sizes, str(device))
        self.compiled = torch.compile(
            self.stack, backend="dbo", options={"inner": "eager", "split": "always"} | options, fullgraph=True
        )

    def inputs(self, num_tokens):
        return inputs(self.sizes, "decode", num_tokens, str(self.device))

    def plays(self, num_tokens):
        """The plays of the split and of the unsplit program, on inputs of their own."""
        seen, x = [], self.inputs(num_tokens)
        with torch.no_grad():
            self.compiled(*x)
            engine = reports()[-1].engine
            usual, engine.player = engine.player, lambda *play: seen.append(Play(*play)) or streams(*play)
            streams = StreamPlayer(Accelerator(self.device))
            self.compiled(*x)
            engine.player = usual
        assert len(seen[-1].rows) == 2, reports()[-1].decline_counts
        unsplit = Play(engine.ways.programs.modules[1], (num_tokens,), seen[-1].args)
        return seen[-1], unsplit


def capture_player(device, **limits):
    return CapturePlayer(StreamPlayer(Accelerator(device)), CudaGraphs(device), device, Limits(**limits))


def main():
    """Play and replay a few times: what a memory checker watches."""
    device = torch.device("cuda", 0)
    played = Played(device)
    player = capture_player(device)
    with torch.no_grad():
        for num_tokens in (10, 14):
            split, unsplit = played.plays(num_tokens)
            for _ in range(4):
                for play in (split, unsplit):
                    player(*play)
    torch.cuda.synchronize()
    assert not player.refused, player.refused
    print(f"{len(player.graphs)} graphs")


if __name__ == "__main__":
    main()
