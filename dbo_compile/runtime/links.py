"""How every rank tells every other a few numbers: over sockets of their own, or by an all-reduce on a device.

Sockets rather than Gloo on the CPU. A small collective there wakes four threads one after the other; here the calling
thread sends, and sleeps until the answer is there (`benchmarks.bench_engine` has both). What was started can be waited
for again and again, or be left.

Ranks pass on what they know, as in the all-gather of Bruck et al. (IEEE TPDS 8, 1997), with a radix of `RADIX`: up to
so many ranks all talk to all in one round, 1,000 ranks need two.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch.distributed.distributed_c10d import ProcessGroup, Store, Work

from dbo_compile.runtime.connect import connections

RADIX = 32


class Link(Protocol):
    """Each rank starts its exchanges in the same order, and gives as many numbers of 64 bits as the others."""

    def start(self, values: Sequence[int]) -> Exchange: ...


class Exchange(Protocol):
    """What every rank tells every other, under way."""

    def is_done(self, seconds: float) -> bool:
        """Whether it ended within so many seconds. Raises `OSError` or `RuntimeError` if a connection is broken."""

    def values(self) -> list[tuple[int, ...]]:
        """The numbers of each rank, by rank, when it is done."""


# -- sockets ----------------------------------------------------------------------------------------------------------


def rounds_of(num_ranks: int) -> list[tuple[int, list[int]]]:
    """For each round: how many ranks a rank knows of by then, with itself; how far off those are that it tells."""
    found, known = [], 1
    while known < num_ranks:
        found.append((known, [j * known for j in range(1, RADIX) if j * known < num_ranks]))
        known *= RADIX
    return found


class SocketLink:
    """The connections of one rank. Raises `OSError` or `RuntimeError` if they are not all there by `deadline`, a time
    of `time.monotonic`; `store` is for these connections alone."""

    def __init__(self, store: Store, rank: int, num_ranks: int, deadline: float) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.rounds = rounds_of(num_ranks)
        away = [d for _, distances in self.rounds for d in distances]
        partners = sorted({(rank + d) % num_ranks for d in away} | {(rank - d) % num_ranks for d in away})
        self.sockets = connections(store, rank, partners, deadline)

    def start(self, values: Sequence[int]) -> SocketExchange:
        return SocketExchange(self, struct.pack(f"{len(values)}q", *values))


class SocketExchange:
    """What has come so far is kept from one `is_done` to the next."""

    def __init__(self, link: SocketLink, mine: bytes) -> None:
        self._link = link
        self._known = {link.rank: mine}
        self._rounds = iter(link.rounds)
        self._sources: Iterator[int] = iter(())
        self._source: int | None = None
        self._buffer, self._num_read = bytearray(), 0
        self._broken = ""
        self._next()

    def is_done(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self._source is not None:
            if self._broken:
                raise ConnectionError(self._broken)
            connection = self._link.sockets[self._source]
            connection.settimeout(max(1e-6, until - time.monotonic()))
            try:
                num_read = connection.recv_into(memoryview(self._buffer)[self._num_read :])
            except TimeoutError:
                return False
            except OSError as error:
                raise ConnectionError(_broken(self._source, str(error))) from error
            if not num_read:
                raise ConnectionError(_broken(self._source, "closed at its end"))
            self._num_read += num_read
            if self._num_read == len(self._buffer):
                self._learn(self._source)
                self._next()
        return True

    def values(self) -> list[tuple[int, ...]]:
        ranks = range(self._link.num_ranks)
        return [struct.unpack(f"{len(self._known[rank]) // 8}q", self._known[rank]) for rank in ranks]

    def _next(self) -> None:
        """Go to the next rank to be listened to, by way of the next round if there is none in this one."""
        self._source = next(self._sources, None)
        if self._source is not None or (a_round := next(self._rounds, None)) is None:
            self._num_read = 0
            return
        num_known, distances = a_round
        rank, n = self._link.rank, self._link.num_ranks
        mine = b"".join(self._known[other] for other in _behind(rank, num_known, n))
        for target in ((rank + distance) % n for distance in distances):
            try:
                self._link.sockets[target].settimeout(None)
                self._link.sockets[target].sendall(mine)
            except OSError as error:  # for whoever waits: who starts an exchange may be far from that
                self._broken = self._broken or _broken(target, str(error))
        self._buffer = bytearray(len(mine))
        self._sources = iter([(rank - distance) % n for distance in distances])
        self._next()

    def _learn(self, source: int) -> None:
        width = len(self._known[self._link.rank])
        num_known = len(self._buffer) // width
        for i, other in enumerate(_behind(source, num_known, self._link.num_ranks)):
            self._known[other] = bytes(self._buffer[i * width : (i + 1) * width])


def _broken(rank: int, why: str) -> str:
    return f"connection to rank {rank}: {why}"


def _behind(rank: int, count: int, num_ranks: int) -> list[int]:
    """So many ranks, from this one backwards: those it knows of."""
    return [(rank - i) % num_ranks for i in range(count)]


# -- a device ---------------------------------------------------------------------------------------------------------


class DeviceLink:
    """An all-reduce over a process group, on a stream of its own: each rank fills its own column of a matrix that is 0
    elsewhere. One exchange at a time, of `num_values` each."""

    def __init__(self, group: ProcessGroup, device: torch.device, num_values: int) -> None:
        self._group = group
        self._stream = torch.Stream(device)
        with torch.inference_mode(False), self._stream:  # no inference tensor: those are not written outside
            self._matrix = torch.zeros(num_values, group.size(), dtype=torch.int64, device=device)

    def start(self, values: Sequence[int]) -> DeviceExchange:
        column = torch.tensor(list(values), dtype=torch.int64, device="cpu")
        with self._stream:
            self._matrix.zero_()[:, self._group.rank()] = column.to(self._matrix.device)
            return DeviceExchange(self._group.allreduce([self._matrix]), self._matrix, self._stream)


class DeviceExchange:
    """Asked, not waited for: waiting on a stream has no end where a rank is lost."""

    def __init__(self, work: Work, matrix: torch.Tensor, stream: torch.Stream) -> None:
        self._work = work
        self._matrix = matrix
        self._stream = stream

    def is_done(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self._work.is_completed():
            if time.monotonic() > until:
                return False
            time.sleep(0)
        with self._stream:
            return self._work.wait()

    def values(self) -> list[tuple[int, ...]]:
        with self._stream:
            return list(zip(*self._matrix.tolist(), strict=True))
