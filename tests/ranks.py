"""Several processes that talk to each other through gloo, for tests: started once, used for many cases.

A function that runs on every rank must be importable (a function of a test module), as must what it takes and returns.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist

START_SECONDS = 60.0


class RankFailed(Exception):
    """A rank raised, died or did not answer in time; the message has the traceback of every rank that gave one."""


class Answer(NamedTuple):
    value: Any
    error: str | None


class Ranks:
    """`with Ranks(2) as ranks: ranks.run(fn, x)` returns `[fn(x) of rank 0, fn(x) of rank 1]`.

    After a failure all ranks are killed, since the others may wait for the failed one; the next `run` starts new ones.
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._ranks: list[tuple[SpawnProcess, Connection]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for _, connection in self._ranks:
            connection.close()
        for process, _ in self._ranks:
            process.join(5.0)
        self.kill()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Run `fn(*args)` on every rank within `timeout` seconds."""
        if not self._ranks:
            self._start()
            self._ask(_ready, (), START_SECONDS)
        return self._ask(fn, args, timeout)

    def kill(self) -> None:
        for process, connection in self._ranks:
            process.kill()
            process.join()
            connection.close()
        self._ranks = []

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        store = Path(tempfile.mkdtemp(prefix="ranks-")) / "store"
        for rank in range(self.num_ranks):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(there, store, rank, self.num_ranks), daemon=True)
            process.start()
            there.close()  # so that a dead rank reads as the end of the pipe
            self._ranks.append((process, here))

    def _ask(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        question = pickle.dumps((fn, args))
        for _, connection in self._ranks:
            connection.send_bytes(question)
        answers = self._collect(timeout)
        if errors := [f"rank {i}: {a.error}" for i, a in enumerate(answers) if a.error is not None]:
            self.kill()
            raise RankFailed("\n".join(errors))
        return [a.value for a in answers]

    def _collect(self, timeout: float) -> list[Answer]:
        """Collect an answer from each rank; after one error the others, which may wait for that rank, get a second."""
        deadline, silence = time.monotonic() + timeout, f"no answer in {timeout} s"
        answers: dict[int, Answer] = {}
        while len(answers) < self.num_ranks:
            asked = {c: i for i, (_, c) in enumerate(self._ranks) if i not in answers}
            ready = multiprocessing.connection.wait(list(asked), max(0.0, deadline - time.monotonic()))
            if not ready:
                return [answers.get(i, Answer(None, silence)) for i in range(self.num_ranks)]
            for connection in ready:
                answers[asked[connection]] = answer = _receive(connection)
                if answer.error is not None:
                    deadline, silence = min(deadline, time.monotonic() + 1.0), "did not end either"
        return [answers[i] for i in range(self.num_ranks)]


def _receive(connection: Connection) -> Answer:
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        return Answer(None, "died")


def _serve(connection: Connection, store: Path, rank: int, num_ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), num_ranks),
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(minutes=5),
    )
    while True:
        try:
            question = connection.recv_bytes()
        except EOFError:
            return
        try:
            fn, args = pickle.loads(question)
            answer = pickle.dumps(Answer(fn(*args), None))
        except Exception:
            answer = pickle.dumps(Answer(None, traceback.format_exc().rstrip()))
        connection.send_bytes(answer)


def _ready() -> None:
    dist.barrier()
