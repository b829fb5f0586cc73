"""The documentation: its code runs, its links lead somewhere, its listings are what the tool prints now."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

import dbo_compile
from dbo_compile.config import Config
from dbo_compile.page import graph_page

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FILES = [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in FILES)
BLOCK = re.compile(r"^```python( no-run)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
RUN = ["docs/adding-a-comm-op.md", "docs/adding-a-rule.md", "docs/debugging.md", "docs/expert-parallelism.md",
       "docs/quickstart.md", "docs/serving.md"]  # fmt: skip
"""Pages whose blocks run, one after the other in one namespace, but for those marked `python no-run`."""


def text_of(page):
    return (ROOT / page).read_text()


def blocks(page):
    return [(bool(no_run), code) for no_run, code in BLOCK.findall(text_of(page))]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("listings", DOCS / "tools" / "listings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def levels(tool):
    if not torch.__version__.startswith(tool.TORCH):
        pytest.skip(f"the listings are those of PyTorch {tool.TORCH}")
    return tool.levels_of(1)


@pytest.fixture
def no_group():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# -- code ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_block_of_python_is_python(page):
    for _, code in blocks(page):
        compile(code, page, "exec")


@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page, no_group, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module = ModuleType(re.sub(r"\W", "_", page))  # Dynamo looks names up in the module that code says it is from
    monkeypatch.setitem(sys.modules, module.__name__, module)
    ran = [code for no_run, code in blocks(page) if not no_run]
    assert ran
    for code in ran:
        exec(compile(code, page, "exec"), module.__dict__)


def test_what_the_documentation_calls_is_there():
    for page in PAGES:
        for name in re.findall(r"\bdbo_compile\.([a-z_]+)\(", text_of(page)):
            assert hasattr(dbo_compile, name), f"{page}: dbo_compile.{name}"


def test_what_the_documentation_reads_of_a_report_is_there():
    for page in PAGES:
        names = set(re.findall(r"(?:`report|reports\(\)\[-1\])\.(\w+)", text_of(page))) - {"json", "schema"}  # files
        assert [name for name in names if not hasattr(dbo_compile.Report, name)] == [], page


def test_every_option_that_is_named_there_is_one():
    options = {f.name for f in fields(Config)}
    for page in PAGES:
        named = {n.lower() for n in re.findall(r"\bDBO_([A-Z_]+)\b", text_of(page))} - {"logs"}
        assert named <= options, f"{page}: {named - options}"


# -- links --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_that_are_there(page):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL))
    local = [link.split("#")[0] for link in links if not re.match(r"https?:|#", link)]
    assert [link for link in local if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r"[\w-]+\.md", text_of("mkdocs.yml")))
    assert named == {p.name for p in DOCS.glob("*.md")}


def test_the_debugging_guide_names_the_files_of_a_dump(tmp_path):
    options = {"split": "always", "inner": "eager"}
    with dbo_compile.debug(tmp_path, bytecode=False), torch.no_grad():
        torch.compile(torch.nn.Linear(5, 3), backend="dbo", options=options)(torch.randn(9, 5))
    (folder,) = tmp_path.glob("rank0/graph*")
    told = text_of("docs/debugging.md")
    assert [p.name for p in folder.iterdir() if p.name not in told] == []


# -- listings -----------------------------------------------------------------------------------------------------

HOW_TO = "`python docs/tools/listings.py` makes the listings again"


def test_listings_are_what_the_tool_prints_now(tool, levels):
    page = text_of("docs/how-it-works.md")
    made = tool.listings(levels)
    found = {name: text for _, name, text, _ in tool.LISTING.findall(page)}
    assert found.keys() == made.keys()
    for name, text in made.items():
        assert found[name].rstrip("\n") == text, f"{name}: {HOW_TO}"
    assert tool.refreshed(page, made) == page


def test_every_option_is_in_the_table_with_its_meaning(tool):
    page = text_of("docs/options.md")
    assert tool.with_options(page) == page, HOW_TO
    assert [f.name for f in fields(Config)] == re.findall(r"^\| `(\w+)`", page, re.MULTILINE)


def test_charts_are_what_the_tool_draws_now(tool, levels):
    for name, picture in tool.charts(levels).items():
        assert (DOCS / "images" / name).read_text() == picture, f"{name}: {HOW_TO}"


def test_a_page_of_a_dump_can_be_made_of_any_report(levels):
    report = dbo_compile.reports()[-1]
    assert "layers_0_experts" in graph_page(report.to_dict(), "", [])


# -- the site -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="needs mkdocs-material: pip install 'dbo-compile[docs]'")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "api" / "index.html").is_file()


# -- figures ----------------------------------------------------------------------------------------------------------

MEASURED = {
    "Inductor, exchange in halves": "Inductor, halves",
    "Inductor, overlap scheduling on": "Inductor, overlap scheduling",
    "asynchronous collectives by hand": "by hand",
    "two threads that yield, as in vLLM": "two threads",
    "dbo, always split": "dbo",
}
"""Rows of `when-it-pays.md`, and what the benchmark calls them."""


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows_of(path, start):
    """The rows of the first table whose header starts so, without the rule below it."""
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(start))
    return [cells(line) for line in (lines[at], *itertools.takewhile(lambda x: x.startswith("|"), lines[at + 2 :]))]


def ratios_to_inductor(results):
    """By communication over compute, and variant."""
    _, *measured = rows_of(DOCS / "results" / results, "| link |")
    return {(ratio, variant): share for _, ratio, variant, _, share, *_ in measured}


@pytest.mark.parametrize(("header", "results"), [("|", "link.md"), (", wide layers |", "link-wide.md")])
def test_the_table_of_overlap_is_that_of_the_benchmark(header, results):
    ratios = ratios_to_inductor(results)
    (_, *columns), *shown = rows_of(DOCS / "when-it-pays.md", f"| communication / compute{header:>2}")
    assert {name for name, *_ in shown} == MEASURED.keys()
    for name, *shares in shown:
        assert shares == [ratios[column, MEASURED[name]] for column in columns], name


def test_the_table_of_the_gpu_is_that_of_the_benchmark():
    header, *measured = rows_of(DOCS / "results" / "gpu-2026-11-28.md", "| tokens | eager |")
    (_, *sizes), *shown = rows_of(ROOT / "README.md", "| tokens | 16384 |")
    took = {(row[0], way): cell.split()[0] for row in measured for way, cell in zip(header, row, strict=True)}
    for (_, *each), way in zip(shown, ("Inductor, graph", "two threads, graph", "dbo, graph"), strict=True):
        assert [cell.strip("*") for cell in each] == [took[n, way] for n in sizes], way
    gains = [float(took[n, "Inductor, graph"]) / float(took[n, "dbo, graph"]) for n in sizes]
    assert f"{min(gains):.2f} to {max(gains):.2f} times as fast" in text_of("README.md")


def test_the_table_of_the_readme_is_that_of_the_benchmark():
    ratios = ratios_to_inductor("link-wide.md")
    (_, *columns), *shown = rows_of(ROOT / "README.md", "| communication / compute |")
    for (_, *shares), variant in zip(shown, ("by hand", "two threads", "dbo"), strict=True):
        assert [share.strip("*") for share in shares] == [ratios[column, variant] for column in columns], variant
    narrow = ratios_to_inductor("link.md")
    text = text_of("README.md").partition("Layers a quarter as wide")[2].partition("`split=")[0]
    wanted = [narrow[at, variant] for variant in ("dbo", "two threads") for at in ("0.53", "1.02")]
    assert re.findall(r"\b\d\.\d\d\b", text) == wanted


def test_the_seconds_of_the_first_call_are_those_of_the_benchmark():
    header, *measured = rows_of(DOCS / "results" / "compile.md", "| layers | Inductor |")
    (_, *layers), *shown = rows_of(DOCS / "when-it-pays.md", "| seconds, layers |")
    seconds = {(row[0], name): cell for row in measured for name, cell in zip(header, row, strict=True)}
    for name, *each in shown:
        assert each == [seconds[n, name] for n in layers], name


def test_the_architectures_that_are_split_are_those_of_the_result():
    share = re.search(r"(\d+ of \d+) are split whole", text_of("docs/results/architectures.md"))
    assert f"[{share[1]}](docs/results/architectures.md)" in text_of("README.md")


def shown_of_every_size():
    """The best, the middle and the worst of dbo, and the worst of Inductor against itself."""
    sizes = DOCS / "results" / "sizes.md"
    _, *measured = rows_of(sizes, "| link |")
    ratios = {(link, int(tokens)): float(ratio) for link, tokens, _, _, ratio, *_ in measured}
    _, dbo, again = rows_of(sizes, "| to Inductor |")
    assert max(ratio for (_, tokens), ratio in ratios.items() if tokens >= 256) <= 1.02
    return [f"{x:.2f}" for x in (min(ratios.values()), float(dbo[3]), float(dbo[5]), float(again[5]))]


@pytest.mark.parametrize(
    ("page", "start", "end", "more"),
    [
        ("docs/when-it-pays.md", "(results/sizes.md)):", "An earlier run", ["1.02"]),
        ("README.md", "from 1 to 4096 tokens", "Agreeing costs", []),
    ],
)
def test_the_figures_of_every_size_are_those_of_the_benchmark(page, start, end, more):
    text = text_of(page).partition(start)[2].partition(end)[0]
    assert re.findall(r"\b\d\.\d\d\b", text) == [*shown_of_every_size(), *more]
