"""PyTorch's own samples of every op: what a rule claims of a call is true, however its tokens are cut.

`SOUNDNESS_OP_DB=1 pytest -s` tries all samples and prints for each op how its calls were judged.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from itertools import islice

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from dbo_compile.rules import rule_of
from tests.soundness.brute import Recorder, judge, tensors_of, views

FAST_SAMPLES, MOST_SAMPLES, MOST_NUMBERS = 3, 200, 5000
DTYPES = (torch.float64, torch.int64)


def calls_of(info, num_samples):
    """The calls of ATen ops that the samples of an op make, and those of its variant in place."""
    recorder = Recorder()
    for dtype in DTYPES:
        if dtype not in info.supported_dtypes("cpu"):
            continue
        for sample in islice(_samples(info, dtype), num_samples):
            for fn in filter(None, (info.op, info.inplace_variant)):
                first = sample.input.clone() if isinstance(sample.input, torch.Tensor) else sample.input
                try:
                    with torch.no_grad(), recorder:
                        fn(first, *sample.args, **sample.kwargs)
                except (AssertionError, RuntimeError, TypeError, ValueError):  # not in place, no such kernel
                    continue
    return {call.key: call for call in recorder.calls if _can_be_cut(call)}.values()


def _samples(info, dtype):
    try:
        yield from info.sample_inputs("cpu", dtype, requires_grad=False)
    except ImportError:  # samples that another package makes
        return


def _can_be_cut(call):
    if torch.Tag.nondeterministic_seeded in call.op.tags:
        return False
    return all(x.layout == torch.strided and x.numel() <= MOST_NUMBERS for x in tensors_of(call))


def wrong_claims(infos, num_samples):
    """What was wrong, and for each ATen op how often its calls were judged how."""
    wrong, judged, seen = [], defaultdict(Counter), set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for info in infos:
            for call in calls_of(info, num_samples):
                if call.key in seen:
                    continue
                seen.add(call.key)
                if rule_of(call.op) is None:
                    judged[str(call.op)]["no rule"] += 1
                    continue
                for view in views(call):
                    verdict = judge(call, view)
                    judged[str(call.op)][verdict.kind] += 1
                    if verdict.kind == "wrong":
                        wrong.append(f"{call.key}\n    {view}\n    {verdict.text}")
    return wrong, judged


@pytest.mark.parametrize("part", range(6))
def test_claims_on_a_few_samples_of_every_op_are_true(part):
    wrong, judged = wrong_claims(op_db[part::6], FAST_SAMPLES)
    assert wrong == []
    assert sum(counts["right"] for counts in judged.values()) > 500, "nothing was claimed"


@pytest.mark.slow
@pytest.mark.skipif("SOUNDNESS_OP_DB" not in os.environ, reason="minutes: set SOUNDNESS_OP_DB")
def test_claims_on_all_samples_of_every_op_are_true():
    wrong, judged = wrong_claims(op_db, MOST_SAMPLES)
    for name, counts in sorted(judged.items()):
        print(f"{name:60}", *(f"{kind}: {n}" for kind, n in sorted(counts.items())))
    assert wrong == []
