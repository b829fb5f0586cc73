"""What is shown of steps that tell of requests: the rewritten graph runs, how they were cut, and what goes on with one.
"""

from __future__ import annotations

import json
import runpy

import pytest
import torch

import dbo_compile
from dbo_compile import reports
from dbo_compile.axes import CuSeqlens
from dbo_compile.explanation import explain
from dbo_compile.levels import Levels
from dbo_compile.runnable import runnable
from dbo_compile.runtime.given import RequestInputs
from tests.serving.model import Model, Pages, caches, step_of
from tests.serving.test_backend import OPTIONS, compiled, straddling
from tests.serving.test_serving import twin


def apart():
    """A step of requests of 3, 6 and 9 tokens: cut between the second and the third."""
    pages = Pages()
    return step_of([(pages.request(list(range(n))), n) for n in (3, 6, 9)])


@torch.no_grad()
def dumped(run, folder, *steps):
    """The folder of the graph, after these steps."""
    with dbo_compile.debug(folder, bytecode=False):
        for step in steps:
            run(*step)
    (found,) = folder.glob("rank0/graph*")
    return found


@pytest.mark.parametrize("rows", [(7, 6), (2, 11), (12, 1)])
def test_the_rewritten_graph_runs_and_tells_each_microbatch_of_its_requests(group, tmp_path, rows):
    model, step, seen = Model(group).double(), straddling(), []
    plain, run = twin(model, group), compiled(model)
    folder = dumped(run, tmp_path, step)
    report = reports()[-1]
    played, num_args = report.engine.player, len(report.levels.graph.find_nodes(op="placeholder"))
    report.engine.player = lambda module, rows, args: seen.append(args) or played(module, rows, args)
    with torch.no_grad():
        run(*step)
        for cache in caches(model):
            cache.zero_()
        (got,) = runpy.run_path(str(folder / "5_graph.py"))["run"](rows, *seen[0][:num_args])
        assert torch.equal(got, plain(*step))
    assert all(map(torch.equal, caches(model), caches(plain)))


def test_a_function_among_token_dims_is_imported_or_left_for_the_user(group, tmp_path):
    dumped(compiled(Model(group, num_layers=1).double()), tmp_path, straddling())
    levels: Levels = reports()[-1].levels
    axes = {"mask": (3, lambda x, tokens: x), "bias": (5, CuSeqlens), "bounds": (7, CuSeqlens(padded=True))}
    text = runnable(levels, RequestInputs(axes), "").text
    assert "from dbo_compile.axes import CuSeqlens as CuSeqlens\n" in text
    assert "\'bias\': (5, CuSeqlens),\n" in text
    assert "\'bounds\': (7, CuSeqlens(of=\'queries\', padded=True)),\n" in text
    assert "\'mask\': (3, None  # put " in text
    compile(text, "5_graph.py", "exec")


def test_a_report_says_how_steps_were_cut(group, tmp_path):
    folder = dumped(compiled(Model(group).double()), tmp_path, straddling(), straddling(), apart())
    report = json.loads((folder / "report.json").read_text())
    last = ["rows [0, 9), requests [0, 2)", "rows [9, 18), requests [2, 3)"]
    assert report["cuts"] == {"whole": 1, "straddling": 2, "last": last}
    assert last[1] in (folder / "index.html").read_text()


def test_an_explanation_says_how_the_step_was_cut(group):
    found = explain(Model(group).double(), *straddling(), options=OPTIONS)
    assert found.split
    assert "2, of which 2 with a request in two microbatches; the last one:" in str(found)
    assert "    microbatch 1: rows [7, 13), requests [1, 3)\n" in str(found)
    assert found.reports[0].barriers == {}


@pytest.mark.parametrize(("last", "num_arcs"), [(straddling, 4), (apart, 2)])
def test_the_lane_chart_has_arcs_where_a_request_is_in_both_microbatches(group, tmp_path, last, num_arcs):
    """Two layers: in the prediction always, among what was measured if it was so."""
    folder = dumped(compiled(Model(group).double()), tmp_path, straddling(), last())
    chart, trace = ((folder / name).read_text() for name in ("lanes.svg", "trace.json"))
    assert chart.count(": the cache of a request in both</title>") == num_arcs
    assert chart.count("<title>layers_0#0 -&gt; layers_0#1: the cache of a request in both</title>") == num_arcs // 2
    assert trace.count('"name": "layers_1#0 -> layers_1#1"') == num_arcs  # begin and end
