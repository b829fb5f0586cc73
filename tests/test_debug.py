"""`dbo_compile.debug`: the page that it leaves, in a real browser; depyf is optional; the environment is as it was."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import dbo_compile
from dbo_compile import debugging, log
from dbo_compile.chart import svg
from dbo_compile.page import graph_page, root_page
from tests.test_chart import moe_chart, with_arcs

ALWAYS = {"inner": "eager", "split": "always"}


@pytest.fixture(autouse=True)
def _nothing_said_before():
    log._warned.clear()


def values(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def call(fn, *sizes, **options):
    compiled = torch.compile(fn, backend="dbo", options=ALWAYS | options)
    return [compiled(values(n, 5)) for n in sizes]


def test_the_block_dumps_and_the_environment_is_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("DBO_DUMP", "before")
    with dbo_compile.debug(tmp_path / "x", bytecode=False) as folder:
        assert os.environ["DBO_DUMP"] == str(folder) == str(tmp_path / "x")
        call(nn.Linear(5, 3).double(), 9)
    assert os.environ["DBO_DUMP"] == "before"
    monkeypatch.delenv("DBO_DUMP")
    with pytest.raises(ZeroDivisionError), dbo_compile.debug(tmp_path / "y", bytecode=False):
        raise ZeroDivisionError
    assert "DBO_DUMP" not in os.environ
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    (page,) = (tmp_path / "x").glob("rank0/graph*/index.html")
    assert "measured" in page.read_text()


def test_debug_is_a_function_of_the_package_whatever_was_imported_before():
    assert dbo_compile.debug is debugging.debug


def test_depyf_decompiles_the_bytecode(tmp_path):
    pytest.importorskip("depyf")
    with dbo_compile.debug(tmp_path):
        fn = torch.compile(nn.Linear(5, 3).double(), backend="dbo", options=ALWAYS)
        with torch.no_grad():
            fn(values(9, 5))
    code = "".join(p.read_text() for p in (tmp_path / "rank0" / "bytecode").glob("full_code_for_*.py"))
    assert "def __guard_" in code
    assert "__compiled_fn" in code
    links = Page((tmp_path / "index.html").read_text()).links
    assert sum("/bytecode/full_code_for_" in link for link in links) >= 1
    assert [link for link in links if not (tmp_path / link).is_file()] == []


@pytest.mark.parametrize("trouble", ["absent", "broken"])
def test_without_depyf_everything_else_works_and_it_says_how_to_get_it(tmp_path, monkeypatch, caplog, trouble):
    monkeypatch.setitem(sys.modules, "depyf", None if trouble == "absent" else object())
    with caplog.at_level(logging.WARNING, "dbo_compile"), dbo_compile.debug(tmp_path):
        call(nn.Linear(5, 3).double(), 9)
    assert list(tmp_path.glob("rank0/graph*/index.html"))
    (said,) = [r.getMessage() for r in caplog.records]
    assert ("pip install" in said) == (trouble == "absent")


# -- pages --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.sources, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name == "href"]
        self.sources += [value for name, value in attrs if name == "src"]


def test_pages_link_what_is_there_and_load_nothing(tmp_path):
    with dbo_compile.debug(tmp_path, bytecode=False):
        call(nn.Sequential(nn.Linear(5, 3), nn.ReLU()).double(), 9, 8, 7)
        call(torch.exp, 1)
    pages = list(tmp_path.rglob("index.html"))
    assert len(pages) == 3
    for path in pages:
        page = Page(path.read_text())
        assert page.links
        assert [link for link in page.links if not (path.parent / link).is_file()] == []
        assert page.sources == []
        assert not {"script", "link", "img", "iframe"} & set(page.tags)
        assert re.findall(r"https?://[^\"<]+", path.read_text().replace("http://www.w3.org/2000/svg", "")) == []


REPORT = {
    "version": 2, "split": True, "reason": "", "num_microbatches": 2, "num_segments": 9, "num_unique_segments": 8,
    "num_comm_ops": 3, "fingerprint": "0123456789abcdef", "obligations": [{"op": "x", "assumes": "<&>"}],
    "barriers": [{"op": "mean (model.py:12, x.mean(0))", "reason": "it reduces over the token dim 0"}],
    "segments": [{"name": "attn", "lane": "compute", "times": 2, "seconds": 1e-3, "code": "attn", "module": "m.attn"}],
    "schedule": [], "predicted": {"seconds": 1, "compute": 1, "comm": 1, "hidden_comm": 0.5}, "measured": [],
    "calls": {"total": 3, "split": 2, "declined": {"9 tokens <are> few": 1}}, "cuts": None,
    "decisions": {
        "512/512": {"chosen": "split", "seconds": {"split": 1e-3, "unsplit": 2e-3}},
        "8/8": {"chosen": "unsplit", "seconds": {"unsplit": 3e-3}},
    },
}  # fmt: skip


def test_a_page_shows_decisions_reasons_and_what_to_do():
    text = graph_page(REPORT, "", [])
    for shown in ("512/512", "1.000", "2.000", "A sum or mean over tokens", "9 tokens &lt;are&gt; few", "x</td><td"):
        assert shown in text
    assert "<are>" not in text
    assert "nan" not in text


def test_names_in_the_page_of_a_dump_are_escaped():
    assert "<b>" not in root_page([("<b>", "<b>")])


# -- a real browser -----------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"there is no browser: install one of {', '.join(BROWSERS)}")
DARK = ["--blink-settings=preferredColorScheme=0"]
# What the browser itself says of the page, written into the page: labels that lie on each other, colours, requests.
PROBE = """<script>
const boxes = [...document.querySelectorAll("svg text")].map(t => [t.textContent, t.getBoundingClientRect()]);
const on = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
const clashes = [];
for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++)
  if (on(boxes[i][1], boxes[j][1])) clashes.push(boxes[i][0] + " on " + boxes[j][0]);
const steps = [...document.querySelectorAll("rect.step")].map(r => r.getBoundingClientRect());
const inside = (a, b) => a.left >= b.left && a.right <= b.right && a.top >= b.top && a.bottom <= b.bottom;
const out = [...document.querySelectorAll("text.name")]
  .filter(t => !steps.some(s => inside(t.getBoundingClientRect(), s))).map(t => t.textContent);
document.title = "probe" + JSON.stringify({
  labels: boxes.length, clashes, out, back: getComputedStyle(document.querySelector("svg rect.back")).fill,
  text: getComputedStyle(document.body).color, wide: document.documentElement.scrollWidth <= innerWidth,
  loaded: performance.getEntriesByType("resource").length,
});
</script>"""


def browse(page: Path, *flags: str) -> str:
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", profile, *flags]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [2, 32])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_label_lies_on_another_one_in_a_browser(tmp_path, num_layers, theme):
    charts = [with_arcs(num_layers), moe_chart(num_layers, "measured")]
    page = tmp_path / "index.html"
    text = graph_page(REPORT, svg(charts), []).replace("style-src", "script-src 'unsafe-inline'; style-src")
    page.write_text(text.replace("</body>", f"{PROBE}</body>"))
    flags = ["--window-size=1280,1600", *(DARK if theme == "dark" else [])]
    dom = browse(page, "--dump-dom", *flags)
    found = json.loads(re.search(r"<title>probe(.*?)</title>", dom)[1])
    assert (found["clashes"], found["out"], found["wide"], found["loaded"]) == ([], [], True, 0)
    assert found["labels"] > 10 * num_layers
    dark = ("rgb(22, 24, 28)", "rgb(228, 228, 228)")
    assert (found["back"], found["text"]) == (dark if theme == "dark" else ("rgb(255, 255, 255)", "rgb(34, 34, 34)"))
    picture = tmp_path / "page.png"
    browse(page, f"--screenshot={picture}", *flags)
    assert picture.stat().st_size > 20_000
