from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from dbo_compile.log import RankFormatter, logger, setup_from_environment

ROOT = Path(__file__).parent.parent
LINE = r"\d\d:\d\d:\d\d {}INFO dbo_compile\.backend: 3 segments$"

TALK = """
import torch
from dbo_compile.log import logger, setup_from_environment
setup_from_environment()
setup_from_environment()
logger.debug("a debug line")
logger.info("an info line")
logger.warning("a warning line")
"""


@pytest.fixture
def untouched_logger():
    before = logger.level, list(logger.handlers)
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()
    yield logger
    logger.setLevel(before[0])
    logger.handlers[:] = before[1]


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stderr_of(code: str, **environ: str) -> list[str]:
    """What a new process prints on stderr, line by line; it sees none of our variables but those given."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("DBO_LOGS", "TORCH_LOGS", "RANK")}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, env=inherited | environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def line_from_backend() -> str:
    record = logging.LogRecord("dbo_compile.backend", logging.INFO, __file__, 7, "%d segments", (3,), None)
    return RankFormatter().format(record)


def test_without_dbo_logs_logging_stays_as_the_application_has_it(untouched_logger):
    setup_from_environment({})
    setup_from_environment({"DBO_LOGS": ""})
    assert (untouched_logger.level, untouched_logger.handlers) == (logging.NOTSET, [])


def test_dbo_logs_sets_the_level_and_one_handler_however_often_it_is_read(untouched_logger):
    setup_from_environment({"DBO_LOGS": "debug"})
    setup_from_environment({"DBO_LOGS": "info"})
    assert untouched_logger.level == logging.INFO
    assert [type(handler.formatter) for handler in untouched_logger.handlers] == [RankFormatter]


def test_a_handler_of_the_application_stays_the_only_one(untouched_logger):
    own = logging.NullHandler()
    untouched_logger.addHandler(own)
    setup_from_environment({"DBO_LOGS": "info"})
    assert untouched_logger.handlers == [own]


@pytest.mark.parametrize("torch_logs", ["dbo_compile", "+dbo_compile", "dynamo, -dbo_compile"])
def test_torch_logs_with_our_name_goes_before_dbo_logs(untouched_logger, torch_logs):
    setup_from_environment({"DBO_LOGS": "info", "TORCH_LOGS": torch_logs})
    assert (untouched_logger.level, untouched_logger.handlers) == (logging.NOTSET, [])


def test_torch_logs_with_other_names_does_not_concern_us(untouched_logger):
    setup_from_environment({"DBO_LOGS": "info", "TORCH_LOGS": "+dynamo,guards"})
    assert untouched_logger.level == logging.INFO


def test_an_unknown_level_is_an_error_that_lists_the_levels(untouched_logger):
    with pytest.raises(ValueError, match=r"^DBO_LOGS='verbose': expected one of debug, info, warning$"):
        setup_from_environment({"DBO_LOGS": "verbose"})


def test_a_line_has_no_rank_in_a_process_that_is_none(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert re.match(LINE.format(""), line_from_backend())


def test_a_line_has_the_rank_that_the_launcher_gave(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert re.match(LINE.format("rank 3 "), line_from_backend())


def test_a_process_group_knows_the_rank_better_than_the_launcher(monkeypatch, process_group):
    monkeypatch.setenv("RANK", "3")
    assert re.match(LINE.format("rank 0 "), line_from_backend())


@pytest.mark.slow
def test_dbo_logs_shows_each_line_once_from_its_level_on():
    texts = [line.split(" ", 1)[1] for line in stderr_of(TALK, DBO_LOGS="info", RANK="5")]
    assert texts == ["rank 5 INFO dbo_compile: an info line", "rank 5 WARNING dbo_compile: a warning line"]


@pytest.mark.slow
def test_torch_logs_shows_each_line_once_whatever_dbo_logs_says():
    for environ in ({}, {"DBO_LOGS": "warning"}):
        texts = [line.split("] ", 1)[1] for line in stderr_of(TALK, TORCH_LOGS="+dbo_compile", **environ)]
        assert texts == ["a debug line", "an info line", "a warning line"]
