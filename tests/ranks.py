"""Several processes that talk to each other through gloo, for tests: started once, used for many cases.

A function that runs on every rank must be importable (a function of a test module), as must what it takes and returns.
Their store lives in the process that starts them, like that of torchrun: it outlives every rank.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
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
    Tests in which ranks are meant to fail use `start`, `ask` and `answers`, which kill nothing.

    With `preload`, names of modules, ranks are forked from a process that has imported them, and so start at once.
    """

    def __init__(self, num_ranks: int, *, preload: Sequence[str] = ()) -> None:
        self.num_ranks = num_ranks
        self._preload = preload
        self._store: dist.TCPStore | None = None
        self._ranks: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for _, connection in self._ranks:
            connection.close()
        for process, _ in self._ranks:
            process.join(5.0)
        self.kill()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Run `fn(*args)` on every rank within `timeout` seconds."""
        if not self._ranks:
            self.start()
        return self._run(fn, args, timeout)

    def start(self) -> None:
        context: Any = multiprocessing.get_context("forkserver" if self._preload else "spawn")
        if self._preload:
            context.set_forkserver_preload(list(self._preload))
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.num_ranks):
            here, there = context.Pipe()
            args = (there, self._store.port, rank, self.num_ranks)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            there.close()  # so that a dead rank reads as the end of the pipe
            self._ranks.append((process, here))
        self._run(_ready, (), START_SECONDS)

    def ask(self, ranks: Iterable[int], fn: Callable[..., Any], *args: Any) -> None:
        """Have these ranks run `fn(*args)`, without waiting for them."""
        question = pickle.dumps((fn, args))
        for rank in ranks:
            self._ranks[rank][1].send_bytes(question)

    def answers(self, ranks: Iterable[int], timeout: float) -> dict[int, Answer]:
        """What each of these ranks answers; those that do not within `timeout` seconds are missing."""
        deadline = time.monotonic() + timeout
        answers: dict[int, Answer] = {}
        asked = {self._ranks[rank][1]: rank for rank in ranks}
        while asked:
            ready = multiprocessing.connection.wait(list(asked), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                answers[asked.pop(connection)] = answer = _receive(connection)
                if answer.error is not None:
                    deadline = min(deadline, time.monotonic() + 1.0)
        return answers

    def pid(self, rank: int) -> int:
        found = self._ranks[rank][0].pid
        assert found is not None, "a rank that was started has a process id"
        return found

    def kill(self) -> None:
        for process, connection in self._ranks:
            process.kill()
            process.join()
            connection.close()
        self._ranks = []

    def _run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        everyone = range(self.num_ranks)
        self.ask(everyone, fn, *args)
        found = self.answers(everyone, timeout)
        silence = "did not end either" if any(a.error for a in found.values()) else f"no answer in {timeout} s"
        answers = [found.get(rank, Answer(None, silence)) for rank in everyone]
        if errors := [f"rank {i}: {a.error}" for i, a in enumerate(answers) if a.error is not None]:
            self.kill()
            raise RankFailed("\n".join(errors))
        return [a.value for a in answers]


def _receive(connection: Connection) -> Answer:
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        return Answer(None, "died")


def _serve(connection: Connection, port: int, rank: int, num_ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False),
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
