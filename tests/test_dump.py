"""Dumps: each file can be read on its own, the rewritten graph runs, and nothing that goes wrong breaks a run."""

from __future__ import annotations

import json
import logging
import os
import runpy
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

import dbo_compile
from dbo_compile import log, reports
from dbo_compile.dump import finish_dumps
from dbo_compile.files import Folder
from tests.ranks import Ranks
from tests.schema import faults, report_schema
from tests.tensors import values

EAGER = {"inner": "eager", "split": "always"}
LEVELS = ["1_placements.txt", "2_segments.txt", "3_schedule.txt", "4_program.txt", "5_graph.py"]
RESULTS = ["report.json", "lanes.svg", "trace.json", "index.html"]


pytestmark = pytest.mark.usefixtures("group")


@pytest.fixture(autouse=True)
def _nothing_said_before():
    finish_dumps()
    log._warned.clear()


class Layer(nn.Module):
    """A shared expert beside a collective, a constant, and a mean over tokens, which is a barrier."""

    def __init__(self):
        super().__init__()
        self.up, self.shared, self.down = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x):
        routed = self.down(funcol.all_reduce(self.up(x), "sum", dist.group.WORLD))
        return routed + self.shared(x) * torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0]) - x.mean(0)


def model(num_layers=2):
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(num_layers))).double()


def compiled(fn, **options):
    return torch.compile(fn, backend="dbo", options=EAGER | options, fullgraph=True)


@torch.no_grad()
def called(fn, *sizes):
    return [fn(values(n, 5)) for n in sizes]


def texts(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- what is in it ------------------------------------------------------------------------------------------------


def test_dump_writes_the_levels_and_charts_of_one_graph(tmp_path):
    called(compiled(model(), dump=str(tmp_path / "deep" / "dump")), 9, 9)
    finish_dumps()
    levels = reports()[-1].levels
    (folder,) = tmp_path.glob("deep/dump/rank0/graph*")
    files = list(folder.iterdir())
    assert sorted(f.name for f in files) == sorted(["0_dynamo.py", *LEVELS, "5_constants.pt", *RESULTS])
    text = {f.name: f.read_text() for f in files if f.suffix != ".pt"}
    assert text["3_schedule.txt"] == f"{levels.schedule}\n"
    assert text["4_program.txt"] == f"{levels.program}\n"
    assert len(text["1_placements.txt"].splitlines()) == len(levels.graph.nodes) - 1
    assert len(text["2_segments.txt"].splitlines()) == len(levels.outline.segments)
    assert "measured" in text["lanes.svg"]


def test_placements_have_barriers_with_their_lines(tmp_path):
    called(compiled(model(1), dump=str(tmp_path)), 9)
    placements = next(tmp_path.rglob("1_placements.txt")).read_text()
    (line,) = [line for line in placements.splitlines() if "barrier:" in line]
    assert line.split()[:2] == ["mean", "Shared"]
    assert "it reduces over the token dim 0; " in line
    assert "test_dump.py" in line


def test_the_option_dumps_every_graph_also_one_that_is_not_split(tmp_path):
    called(compiled(model(1), dump=str(tmp_path)), 9)
    called(compiled(torch.exp, dump=str(tmp_path)), 1)
    first, second = (tmp_path / "rank0" / f"graph{report.number}" for report in reports()[-2:])
    assert sorted(texts(first)) == sorted(["0_dynamo.py", *LEVELS, "5_constants.pt", *RESULTS])
    assert sorted(texts(second)) == ["0_dynamo.py", "index.html", "report.json"]
    reasons = [json.loads((folder / "report.json").read_text())["reason"] for folder in (first, second)]
    assert reasons == ["", "it has a single token"]


def test_with_inductor_the_generated_code_is_there_and_linked(tmp_path):
    called(compiled(nn.Sequential(nn.Linear(5, 7), nn.ReLU()).double(), inner="inductor", dump=str(tmp_path)), 9)
    (code,) = tmp_path.rglob("6_inductor/*.py")
    assert "def call" in code.read_text()
    assert f'href="6_inductor/{code.name}"' in (code.parent.parent / "index.html").read_text()


@pytest.mark.parametrize("rows", [[5, 4], [6, 1]])
def test_the_rewritten_graph_is_python_that_runs(tmp_path, rows):
    seen = []
    fn = compiled(model(), dump=str(tmp_path))
    called(fn, 9)
    finish_dumps()
    engine = reports()[-1].engine
    played = engine.player
    engine.player = lambda module, rows, args: seen.append(args) or played(module, rows, args)
    (want,) = called(fn, sum(rows))
    (file,) = tmp_path.rglob("5_graph.py")
    (got,) = runpy.run_path(str(file))["run"](rows, *seen[0])
    assert torch.equal(got, played(reports()[-1].levels.module, rows, seen[0])[0])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_after_some_calls_the_measured_lanes_are_there_and_the_engine_is_left_alone(tmp_path):
    fn = compiled(model(), dump=str(tmp_path))
    called(fn, 9)
    report = reports()[-1]
    watched = report.engine.player
    called(fn, 8, 7, 6, 5)
    assert report.engine.player is not watched
    (folder,) = tmp_path.glob("rank0/graph*")
    found = json.loads((folder / "report.json").read_text())
    assert [0 <= m["hidden_comm"] <= 1 for m in found["measured"]] == [True] * 3
    assert "measured, 7 tokens" in (folder / "lanes.svg").read_text()


def test_in_the_end_a_dump_has_all_calls_and_not_only_those_that_were_timed(tmp_path):
    called(compiled(model(), dump=str(tmp_path)), 9, 8, 7, 6, 5)
    finish_dumps()
    (path,) = tmp_path.rglob("report.json")
    assert json.loads(path.read_text())["calls"]["total"] == 5
    assert "5 of 5 calls were split" in (tmp_path / "index.html").read_text()


def test_what_is_written_at_exit_is_in_the_folder_of_its_rank(tmp_path, monkeypatch):
    monkeypatch.setattr("dbo_compile.dump.rank", lambda: 3)
    called(compiled(model(1), dump=str(tmp_path)), 9)
    monkeypatch.setattr("dbo_compile.dump.rank", lambda: None)  # the process group is gone
    finish_dumps()
    (path,) = tmp_path.rglob("report.json")
    assert (path.parent.parent.name, json.loads(path.read_text())["rank"]) == ("rank3", 3)


def test_calls_that_are_not_split_are_measured_too_where_there_are_no_others(tmp_path):
    with dbo_compile.debug(tmp_path, bytecode=False):
        called(compiled(model(), min_tokens=100), 9, 8)
    assert "measured, 8 tokens, not split" in next(tmp_path.rglob("lanes.svg")).read_text()


# -- report.json --------------------------------------------------------------------------------------------------


def test_a_report_is_as_its_schema_says(tmp_path):
    called(compiled(model(), dump=str(tmp_path)), 9, 8, 7)
    called(compiled(torch.exp, dump=str(tmp_path)), 1)
    found = [json.loads(p.read_text()) for p in sorted(tmp_path.rglob("report.json"))]
    assert [faults(report, report_schema()) for report in found] == [[], []]
    assert {report["split"] for report in found} == {True, False}


def test_every_field_of_a_report_is_documented(tmp_path):
    fields = report_schema()["properties"]
    called(compiled(model(), dump=str(tmp_path)), 9)
    written = json.loads(next(tmp_path.rglob("report.json")).read_text())
    assert written.keys() == fields.keys()
    assert [name for name, field in fields.items() if not {"description", "type", "anyOf"} & field.keys()] == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"split": 1}, "/split: 1 is no boolean"),
        ({"split": None}, "/split: None is no boolean"),
        ({"num_segments": True}, "/num_segments: True is no integer"),
        ({"predicted": {}}, "/predicted: none of the choices"),
        ({"segments": [{}]}, "/segments/0: lacks name"),
        ({"spilt": 1}, ": has spilt"),
        ({"calls": {"total": 1, "split": 0, "declined": {"why": "x"}}}, "/calls/declined/why: 'x' is no integer"),
    ],
)
def test_the_check_of_the_schema_finds_faults(change, fault):
    called(compiled(model(1)), 9)
    found = faults(reports()[-1].to_dict() | change, report_schema())
    assert found[0] == fault


# -- what can go wrong --------------------------------------------------------------------------------------------


def full_disk(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("trouble", ["unwritable", "full", "ours"])
def test_what_cannot_be_written_is_one_warning_and_no_error(tmp_path, monkeypatch, caplog, trouble):
    folder = tmp_path / "dump"
    if trouble == "unwritable":
        folder.write_text("a file where the folder should be")
    if trouble == "full":
        monkeypatch.setattr(Path, "replace", full_disk)
    if trouble == "ours":
        monkeypatch.setattr("dbo_compile.dump.runnable", lambda *_: 1 / 0)
    fn = model()
    with caplog.at_level(logging.WARNING, "dbo_compile"):
        got = called(compiled(fn, dump=str(folder)), 9, 8, 7, 6)
        called(compiled(lambda x: fn(x) + 1, dump=str(folder)), 9)
        finish_dumps()
    for y, want in zip(got, called(fn, 9, 8, 7, 6), strict=True):
        torch.testing.assert_close(y, want, rtol=0, atol=1e-12)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [f"cannot dump to {folder}"]
    assert not folder.is_dir() or not list(folder.rglob(".*"))


def test_a_dump_does_not_follow_a_link_out_of_its_folder(tmp_path, caplog):
    outside, folder = tmp_path / "outside", tmp_path / "dump"
    outside.mkdir()
    folder.mkdir()
    (folder / "rank0").symlink_to(outside)
    with caplog.at_level(logging.WARNING, "dbo_compile"):
        called(compiled(model(1), dump=str(folder)), 9)
    assert list(outside.iterdir()) == []
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [f"cannot dump to {folder}"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "link/x"])
def test_no_name_leads_out_of_a_folder(tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path)
    with pytest.raises(PermissionError):
        Folder(inside).write(name, "text")
    assert sorted(os.listdir(tmp_path)) == ["inside"]


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "x").symlink_to(tmp_path / "precious")
    Folder(tmp_path / "inside").write("x", "text")
    assert [(tmp_path / name).read_text() for name in ("precious", "inside/x")] == ["precious", "text"]


def test_a_file_is_whole_or_not_there_while_others_write_it(tmp_path):
    sizes = {name: 100_000 * i for i, name in enumerate("abc", 1)}
    writers = [threading.Thread(target=write_often, args=(tmp_path, name * n)) for name, n in sizes.items()]
    for writer in writers:
        writer.start()
    seen = set()
    while any(w.is_alive() for w in writers):
        if (tmp_path / "x").exists():
            text = (tmp_path / "x").read_text()
            seen.add((text[:1], len(text)))
    assert seen <= set(sizes.items())
    assert os.listdir(tmp_path) == ["x"]


def write_often(folder, text):
    for _ in range(20):
        Folder(folder).write("x", text)


def test_nothing_is_written_and_nothing_is_timed_without_the_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fn = compiled(model())
    called(fn, 9)
    player = reports()[-1].engine.player
    called(fn, 8)
    assert reports()[-1].engine.player is player
    assert "measure" not in getattr(player, "__module__", "")
    assert list(tmp_path.iterdir()) == []


# -- several ranks ------------------------------------------------------------------------------------------------


def dump_on_rank(folder):
    torch._dynamo.reset()
    with dbo_compile.debug(folder, bytecode=False):
        called(compiled(model()), 9, 8)
    return len(reports())


@pytest.mark.ranks
def test_two_ranks_dump_into_one_folder(tmp_path):
    with Ranks(2) as ranks:
        ranks.run(dump_on_rank, tmp_path, timeout=300.0)  # compiling may take long on a busy machine
    index = (tmp_path / "index.html").read_text()
    pages = [f"rank{rank}/graph0/index.html" for rank in range(2)]
    assert [index.count(f'href="{page}"') for page in pages] == [1, 1]
    for rank, page in enumerate(pages):
        folder = (tmp_path / page).parent
        assert json.loads((folder / "report.json").read_text())["rank"] == rank
        assert f"rank {rank}, " in (folder / "trace.json").read_text()
    assert list(tmp_path.rglob(".*")) == []
