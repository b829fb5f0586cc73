from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENTRY_POINTS = {
    "torch_dynamo_backends": {"dbo": "dbo_compile.backend:dbo"},
    "console_scripts": {"dbo-compile": "dbo_compile.cli:main"},
}

pytestmark = pytest.mark.slow


def run(*command: str, **environ: str) -> str:
    """What a command prints; it runs outside the checkout, so that only what is installed can be imported."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TORCH_LOGS", "DBO_LOGS", "PYTHONPATH")}
    done = subprocess.run(command, cwd="/", env=inherited | environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture
def installed():
    try:
        return distribution("dbo-compile")
    except PackageNotFoundError:
        pytest.skip("dbo-compile is not installed in this environment: `pip install -e .`")


@pytest.fixture
def wheel(tmp_path):
    """Built from a copy: a build leaves files behind."""
    if importlib.util.find_spec("setuptools") is None or int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("building without isolation needs setuptools 77 or newer")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "dbo_compile", tmp_path / "dbo_compile", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run(*pip, "--wheel-dir", str(tmp_path / "dist"), str(tmp_path))
    (path,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_a_wheel_has_every_module_the_licence_and_the_entry_points(wheel):
    modules = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "dbo_compile").rglob("*.py"))
    assert sorted(name for name in wheel.namelist() if name.endswith(".py")) == modules
    (licence,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    parser = ConfigParser()
    parser.read_string(wheel.read(entry_points).decode())
    assert {group: dict(parser[group]) for group in parser.sections()} == ENTRY_POINTS


def test_the_installed_project_has_the_entry_points(installed):
    points = {group: {} for group in ENTRY_POINTS}
    for point in installed.entry_points:
        points[point.group][point.name] = point.value
    assert points == ENTRY_POINTS


def test_every_entry_point_leads_to_something_that_can_be_called(installed):
    assert [point.name for point in installed.entry_points if not callable(point.load())] == []


def test_torch_lists_the_backend_without_importing_it(installed):
    code = """
import json, sys, torch
print(json.dumps(["dbo" in torch._dynamo.list_backends(), [m for m in sys.modules if m.startswith("dbo_compile")]]))
"""
    assert json.loads(run(sys.executable, "-c", code)) == [True, []]


def test_torch_finds_the_backend_by_its_name(installed):
    code = """
import torch
from dbo_compile.backend import dbo
print(torch._dynamo.lookup_backend("dbo") is dbo)
"""
    assert run(sys.executable, "-c", code) == "True"


def test_torch_logs_with_our_name_does_not_break_the_import_of_torch_or_ours(installed):
    """Torch imports our packages while it is only half imported itself, and swallows what the inner ones raise."""
    code = "import torch, dbo_compile.backend; from dbo_compile.rules import RULES; print(len(RULES))"
    plain = run(sys.executable, "-c", code)
    assert run(sys.executable, "-c", code, TORCH_LOGS="+dbo_compile") == plain
