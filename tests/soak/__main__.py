"""Soak: two gloo ranks play thousands of steps of random sizes, and nothing may leak, hang or differ.

    python -m tests.soak [--steps 10000] [--seed 0] [--minutes 120]

A step has sizes of its own on each rank; sometimes a rank has none. Every `SAMPLED` steps the results are compared with
those of the unsharded model in eager mode, and live tensors and memory are counted; every `RECOMPILED` steps all that
was compiled is thrown away and made anew. Ends with a summary, and with exit code 1 if anything grew or differed. A
step that hangs is an error after `STEP_SECONDS`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from tests.ranks import RankFailed, Ranks
from tests.soak.steps import RECOMPILED, Sample, play, start, summary

BLOCK = 50
"""Steps for each of which the ranks are asked anew."""
STEP_SECONDS = 60.0
CLOSE = 1e-4
LEAK_BYTES = 24 * 2**20
"""How much the memory of a rank may grow from the end of its warm-up to the end, caches of compiled sizes included."""
RECOMPILED_BYTES = 10 * 2**20
"""How much more for each time that all is compiled anew: what PyTorch itself keeps of it, 6 to 8 MiB of this model with
`backend="aot_eager"`. Of a graph that we kept there would be 20 MiB."""


def faults(samples: Sequence[Sample]) -> list[str]:
    """What is wrong with a rank: results that differ, tensors or memory that grow.

    Half of the run is warm-up: memory grows until all sizes have been compiled, and until PyTorch lets go of the first
    graphs that were thrown away, which it does late. Of the other half the first third
    is compared with the last, and the least of each: what is there for a moment is no leak.
    """
    found = [f"step {s.step}: {s.off:.1e} from eager" for s in samples if s.off > CLOSE]
    late = [s for s in samples if s.step >= samples[-1].step / 2]
    by_third = [late[: len(late) // 3], late[-(len(late) // 3) :]]
    if len(late) >= 3:
        before, after = (min(s.num_tensors for s in part) for part in by_third)
        if after > before + 2:
            found.append(f"live tensors grew from {before} to {after} between steps {late[0].step} and {late[-1].step}")
        low, high = (min(s.num_bytes for s in part) for part in by_third)
        num_compiled = by_third[1][0].step // RECOMPILED - by_third[0][0].step // RECOMPILED
        if high > low + LEAK_BYTES + num_compiled * RECOMPILED_BYTES:
            found.append(f"memory grew by {(high - low) / 2**20:.0f} MiB from step {late[0].step} to {late[-1].step}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=120.0, help="stop after so many, whatever was played")
    args = parser.parse_args()
    began, samples = time.monotonic(), (list[Sample](), list[Sample]())
    with Ranks(2) as ranks:
        ranks.run(start, args.seed)
        for first in range(0, args.steps, BLOCK):
            last = min(first + BLOCK, args.steps)
            try:
                found = ranks.run(play, first, last, timeout=STEP_SECONDS * 10)
            except RankFailed as error:
                sys.exit(f"seed {args.seed}, steps {first} to {last - 1}: {error}")
            for mine, new in zip(samples, found, strict=True):
                mine.extend(new)
            newest = [f"{s[-1].num_tensors} tensors, {s[-1].num_bytes / 2**20:.0f} MiB" for s in samples]
            print(f"{last} steps, {time.monotonic() - began:.0f} s: {'; '.join(newest)}", flush=True)
            if time.monotonic() - began > 60 * args.minutes:
                break
        told = ranks.run(summary)
    print(f"seed {args.seed}: {told}")
    wrong = [f"rank {rank}: {fault}" for rank, mine in enumerate(samples) for fault in faults(mine)]
    print("\n".join(wrong) or "nothing grew, nothing hung, nothing differed")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
