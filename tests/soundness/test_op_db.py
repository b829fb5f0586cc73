"""PyTorch's own samples of every op: what a rule claims of a call is true, however its tokens are cut.

`SOUNDNESS_OP_DB` is how many samples of each op are tried, or `all`.
"""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path

import pytest
import torch

from dbo_compile.rules import RULES
from tests.soundness.calls import all_ops
from tests.soundness.coverage import FAST, Depth, kinds, most_missed, table, tally, tally_in_processes, tally_of_our_own
from tests.soundness.dtensor import TwoRanks

NUM_SAMPLES = os.environ.get("SOUNDNESS_OP_DB", "")
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "soundness.md"


def test_claims_on_a_sample_of_every_op_are_true():
    made = tally(all_ops(), FAST)
    tally_of_our_own(made, FAST)
    assert made.wrong == []
    judged = sum(made.verdicts.values(), start=type(made.verdicts[None])())
    assert judged["right"] > 3000, judged


@pytest.mark.slow
@pytest.mark.skipif(not NUM_SAMPLES, reason="many minutes: make soundness")
def test_claims_on_all_samples_of_every_op_are_true():
    depth = Depth(None if NUM_SAMPLES == "all" else int(NUM_SAMPLES))
    with TwoRanks() as dtensor:
        made = tally_in_processes(all_ops(), depth, dtensor.splits)
    tally_of_our_own(made, Depth(searches=False))
    text = report(made)
    print(text)
    RESULTS.write_text(text)
    assert made.wrong == []


REPORT = """\
# What the rules claim, tried on PyTorch's own samples

`SOUNDNESS_OP_DB={num_samples} pytest tests/soundness/test_op_db.py`, on {today}, PyTorch {torch}, Python {python}.
`make soundness` does it for all samples.

For every op of PyTorch's `op_db`, {num_samples} sample inputs of each type (float64, int64, bool), each call of an ATen
op that they make, and each choice of token dims and of sizes that count tokens: what the rule claims, against the op on
parts of the tokens (uneven, about even, three), joined, against the op on all of them; on the sample as it is,
shuffled, and shuffled and negated. Also two-rank collectives, and made-up calls for pointwise ops and reductions that
no sample calls. {num_calls} distinct calls. Verdicts: {kinds}.

Ops whose process died (each runs in a fork of its own), so that their samples are not in here: {crashed}.

`fails` are calls with a fixed size where tokens would be: a trace of them has no symbol to split. `local` claims say
that rows are a microbatch's own: of floats, all rows must be there; of numbers of rows, nothing can be tried on one op,
and `tests/soundness/test_routes.py` tries whole ways of them instead.

## How many true splits are claimed

A way to split a call is *true* if parts of its arguments give parts of its results. Not counted: variants in place and
`*_copy`, which AOTAutograd leaves in no graph. A missed one costs a barrier, never a wrong answer. The last column asks
the sharding rules of DTensor about the same calls and dims on a mesh of two ranks: is some result sharded, none
partial, with nothing redistributed? DTensor does not shard unevenly in views, which these samples ask for often: its
share says nothing about what it is made for. It is not asked about collectives and made-up calls.

{table}

The ops with the most missed splits:

{most_missed}

Rules that no call has asked ({num_never}): {never}.
"""


def report(made):
    never = sorted(str(op) for op in RULES if op not in made.verdicts)
    return REPORT.format(
        num_samples=NUM_SAMPLES,
        today=date.today(),
        torch=torch.__version__,
        python=platform.python_version(),
        num_calls=len(made.seen),
        kinds=kinds(made),
        crashed=", ".join(made.crashed) or "none",
        table=table(made),
        most_missed=most_missed(made),
        num_never=len(never),
        never=", ".join(f"`{name}`" for name in never),
    )
