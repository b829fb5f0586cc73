"""The command line: what it prints, its exit statuses, and that it says what it was told wrongly."""

from __future__ import annotations

import json
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

from dbo_compile import doctor
from dbo_compile.cli import main
from dbo_compile.subject import NoSubject, load
from tests.schema import faults, report_schema

SUBJECT = "tests.test_cli:example"
EAGER = ["--set", "inner=eager"]


def example():
    def model(x, scale):
        return funcol.all_reduce(x.exp(), "sum", dist.group.WORLD) * scale

    return model, (torch.ones(9, 5),), {"scale": 3}


def without_communication():
    return torch.nn.Linear(5, 3), [torch.ones(9, 5)]


def no_model():
    return 3


def broken():
    def model(x):
        raise ValueError("the model's own")

    return model, (torch.ones(9, 5),)


def told(capsys, *argv):
    """The exit status, and what is printed."""
    status = main(list(argv))
    return status, capsys.readouterr().out


def exits(*argv):
    with pytest.raises(SystemExit) as raised:
        main(list(argv))
    return raised.value.code


# -- explain ------------------------------------------------------------------------------------------------------


def test_explain_shows_what_is_split(capsys):
    status, text = told(capsys, "explain", SUBJECT, *EAGER)
    assert status == 0
    assert text.startswith("graph 0: split in 2 microbatches")
    assert not dist.is_initialized()


def test_explain_of_what_is_not_split_is_no_success(capsys):
    status, text = told(capsys, "explain", "tests.test_cli:without_communication", *EAGER)
    assert status == 1
    assert text.startswith("graph 0: not split: ")


def test_explain_takes_options_and_prints_json(capsys, tmp_path):
    options = ["--set", "split=always", "--set", "num_microbatches=3", "--dump", str(tmp_path / "dump")]
    status, text = told(capsys, "explain", SUBJECT, *EAGER, *options, "--json")
    (graph,) = json.loads(text)["graphs"]
    assert (status, graph["num_microbatches"], faults(graph, report_schema())) == (0, 3, [])
    assert (tmp_path / "dump").is_dir()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["explain", "nix:da"], "there is no module 'nix' here"),
        (["explain", "tests.nix:da"], "there is no module 'tests.nix' here"),
        (["explain", "tests.test_cli:nix"], "has no function 'nix'"),
        (["explain", "tests.test_cli"], "write module:function"),
        (["explain", "tests.test_cli:no_model"], "must return (model, args) or (model, args, kwargs), not int"),
        (["explain", SUBJECT, "--set", "spilt=never"], "unknown option 'spilt'; did you mean 'split'"),
        (["bench", SUBJECT, "--set", "split=perhaps"], "expected 'auto' or 'always' or 'never'"),
    ],
)
def test_what_was_asked_wrongly_is_said(capsys, argv, said):
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_an_error_of_the_users_own_is_not_taken_for_a_wrong_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "broken_model", SimpleNamespace(example=lambda: __import__("nix_da")))
    with pytest.raises(ModuleNotFoundError, match="nix_da"):
        load("broken_model:example")
    with pytest.raises(NoSubject):
        load("broken_model:nix")


def test_an_error_of_the_model_is_not_taken_for_a_wrong_option():
    with pytest.raises(Exception, match="the model's own"):
        main(["explain", "tests.test_cli:broken", *EAGER])


def test_modules_of_the_current_folder_are_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_model.py").write_text("import torch\ndef f():\n    return torch.exp, (torch.ones(3),)\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert load("my_own_model:f").model is torch.exp
    assert sys.path == path


# -- bench --------------------------------------------------------------------------------------------------------


def test_bench_times_every_variant(capsys, monkeypatch):
    monkeypatch.setattr("dbo_compile.bench.WARM_UP", 2)
    argv = ["bench", SUBJECT, *EAGER, "--set", "split=always", "--repeats", "3"]
    status, text = told(capsys, *argv, "--json")
    found = json.loads(text)
    assert (status, list(found["seconds"]), found["repeats"]) == (0, ["eager", "inductor", "dbo"], 3)
    assert all(0 < s["least"] <= s["median"] <= s["most"] for s in found["seconds"].values())
    assert found["graphs"][0]["calls"] == {"total": 5, "split": 5, "declined": {}}
    lines = told(capsys, *argv)[1].splitlines()
    assert [line.split()[0] for line in lines] == ["median", "eager", "inductor", "dbo", "5"]


# -- trace, doctor ------------------------------------------------------------------------------------------------


def test_trace_opens_the_page_of_a_dump(capsys, monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["trace", str(tmp_path)]) == 1
    assert "DBO_DUMP=" in capsys.readouterr().err
    page = tmp_path / "rank0" / "graph3" / "index.html"
    page.parent.mkdir(parents=True)
    for path in (page, tmp_path / "index.html"):
        path.write_text("")
    assert told(capsys, "trace", str(tmp_path)) == (0, f"{tmp_path / 'index.html'}\n")
    assert opened == [(tmp_path / "index.html").as_uri()]
    status, text = told(capsys, "trace", str(tmp_path), "--no-open", "--json")
    assert (status, json.loads(text)) == (0, {"index": str(tmp_path / "index.html"), "graphs": [str(page)]})
    assert len(opened) == 1


def test_doctor_says_what_works_here(capsys):
    status, text = told(capsys, "doctor")
    named = {line[8:36].strip(): line.split()[0] for line in text.splitlines()}
    assert (status, named["torch"], named["process groups: gloo"]) == (0, "ok", "ok")
    assert {"lanes as streams", "CUDA graphs", "depyf", "transformers", "mkdocs-material"} <= named.keys()
    status, text = told(capsys, "doctor", "--json")
    assert (status, json.loads(text)["well"]) == (0, True)


@pytest.mark.parametrize(
    ("version", "works"), [("2.10.1", False), ("2.11.0+cu130", True), ("2.13.0", True), ("3.0.0", False)]
)
def test_doctor_knows_which_torch_is_supported(capsys, monkeypatch, version, works):
    monkeypatch.setattr("torch.__version__", version)
    status, text = told(capsys, "doctor")
    (line,) = [line for line in text.splitlines() if line[8:36].strip() == "torch"]
    assert (status, line.split()[0]) == ((0, "ok") if works else (1, "MISSING"))


def test_doctor_says_how_to_get_what_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda _: "")
    missing = {f.name: f.needs for f in doctor.findings() if not f.works}
    assert "dbo-compile[debug]" in missing["depyf"]
    assert "dbo-compile[hf]" in missing["transformers"]
    assert all(missing.values())


# -- the whole ----------------------------------------------------------------------------------------------------


def test_every_command_has_help_with_an_example(capsys):
    for command in ("demo", "explain", "bench", "trace", "doctor"):
        assert exits(command, "--help") == 0
        text = capsys.readouterr().out
        assert f"usage: dbo-compile {command}" in text
        assert f"  dbo-compile {command} " in text.partition("options:")[2]


def test_the_demo_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "dbo_compile.demo", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["demo"]) == 1
    assert "dbo-compile[hf]" in capsys.readouterr().err


WRONG = ["", "nix", "trace", "bench --repeats many", "bench --repeats 0", "explain --set split"]


@pytest.mark.parametrize("argv", WRONG)
def test_a_wrong_command_line_is_status_2(argv, capsys):
    assert exits(*argv.split()) == 2
    assert capsys.readouterr().err.startswith("usage: dbo-compile")


def test_the_package_can_be_run(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dbo_compile", "doctor"])
    with pytest.raises(SystemExit) as raised:
        runpy.run_module("dbo_compile", run_name="__main__")
    assert raised.value.code == 0
