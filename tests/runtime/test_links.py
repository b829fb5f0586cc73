"""What ranks tell each other over sockets of their own."""

from __future__ import annotations

import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from dbo_compile.runtime import connect, links
from dbo_compile.runtime.links import SocketLink, rounds_of


@pytest.mark.parametrize("radix", [2, 3, 32])
@pytest.mark.parametrize("num_ranks", [*range(1, 12), 31, 32, 33, 64, 65, 320])
def test_after_the_last_round_every_rank_knows_of_every_other(monkeypatch, num_ranks, radix):
    monkeypatch.setattr(links, "RADIX", radix)
    known = {0}  # how far behind this rank those are of whom it knows
    for num_known, distances in rounds_of(num_ranks):
        assert known == set(range(num_known))
        assert len(distances) < radix
        known |= {d + i for d in distances for i in range(num_known) if d + i < num_ranks}
    assert known == set(range(num_ranks))


def test_thirty_two_ranks_need_one_round_and_a_thousand_two():
    assert [len(rounds_of(n)) for n in (1, 2, 32, 33, 320, 1024, 1025)] == [0, 1, 1, 2, 2, 2, 3]


@pytest.fixture
def linked():
    def run(num_ranks, play, timeout_s=20.0):
        """What `play(link)` returns on each of so many ranks, each a thread."""
        store = dist.HashStore()
        with ThreadPoolExecutor(num_ranks) as pool:
            deadline = time.monotonic() + timeout_s
            made = [pool.submit(SocketLink, store, rank, num_ranks, deadline) for rank in range(num_ranks)]
            return list(pool.map(play, [m.result() for m in made]))

    return run


def told(exchange):
    assert exchange.is_done(20.0)
    return exchange.values()


@pytest.mark.parametrize(("num_ranks", "radix"), [(1, 32), (2, 32), (5, 2), (7, 3), (8, 2), (12, 32), (12, 4)])
def test_every_rank_hears_of_every_other(linked, monkeypatch, num_ranks, radix):
    monkeypatch.setattr(links, "RADIX", radix)

    def play(link):
        return [told(link.start([step, -link.rank, 2**62 + link.rank])) for step in range(3)]

    expected = [[(step, -rank, 2**62 + rank) for rank in range(num_ranks)] for step in range(3)]
    assert linked(num_ranks, play) == [expected] * num_ranks


def test_an_exchange_that_was_started_goes_on_after_another_was(linked):
    def play(link):
        first, second = link.start([link.rank]), link.start([10 + link.rank])
        return told(first), told(second)

    assert linked(3, play) == [([(0,), (1,), (2,)], [(10,), (11,), (12,)])] * 3


def test_it_is_not_done_before_the_last_has_come_and_forgets_nothing(linked):
    def play(link):
        if link.rank == 1:
            time.sleep(0.5)
        exchange, since = link.start([link.rank]), time.monotonic()
        early = exchange.is_done(0.05)
        return early, 0.04 < time.monotonic() - since < 0.4, told(exchange)

    one, late, two = linked(3, play)
    assert one == two == (False, True, [(0,), (1,), (2,)])
    assert late[0]


def test_a_connection_that_is_closed_is_an_error_that_names_the_rank(linked):
    def play(link):
        if link.rank == 1:
            link.sockets[0].close()
            return
        with pytest.raises(ConnectionError, match="connection to rank 1: "):
            link.start([7]).is_done(20.0)

    linked(2, play)


def test_a_message_that_cannot_be_sent_is_an_error_for_whoever_waits(linked):
    def play(link):
        if link.rank == 1:
            link.sockets[0].shutdown(socket.SHUT_RDWR)
            return
        time.sleep(0.2)
        exchanges = [link.start([7]) for _ in range(3)]
        with pytest.raises(ConnectionError, match="connection to rank 1: "):
            exchanges[-1].is_done(20.0)

    linked(2, play)


def test_a_stranger_that_connects_is_not_taken_for_a_rank():
    store = dist.HashStore()

    def intrude():
        store.wait(["at/0"])
        port = int(store.get("at/0").decode().split()[0])
        for said in (b"", b"GET / HTTP/1.0\r\n\r\n", b"0" * 32 + struct.pack("q", 1)):
            with socket.create_connection(("localhost", port)) as stranger:
                stranger.sendall(said)
        return SocketLink(store, 1, 2, time.monotonic() + 20.0)

    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(SocketLink, store, 0, 2, time.monotonic() + 20.0), pool.submit(intrude)]
        exchanges = [m.result().start([rank]) for rank, m in enumerate(made)]
        assert [told(exchange) for exchange in exchanges] == [[(0,), (1,)]] * 2


def test_an_address_that_is_another_host_is_passed_over(monkeypatch):
    """A host may have an address that elsewhere is somebody else's, who answers or does not."""
    store, server = dist.HashStore(), socket.create_server(("127.0.0.1", 0))
    token = b"1" * 32

    def listen():
        with ThreadPoolExecutor(1) as other, socket.create_server(("127.0.0.2", server.getsockname()[1])) as right:
            other.submit(lambda: server.accept()[0].sendall(b"HTTP/1.0 400 Bad Request" + b" " * 32))
            return connect._accepted(right, token)

    store.set("at/0", f"{server.getsockname()[1]} 127.0.0.1 127.0.0.2")
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(listen)
        time.sleep(0.1)
        connection = connect._dialled(store, token, 5, 0, time.monotonic() + 20.0)
        rank, accepted = found.result()
        assert (connection.getpeername()[0], rank) == ("127.0.0.2", 5)
    for made in (connection, accepted, server):
        made.close()


def test_a_rank_that_never_comes_is_an_error_at_the_deadline():
    for rank in range(2):
        began = time.monotonic()
        with pytest.raises((RuntimeError, OSError)):
            SocketLink(dist.HashStore(), rank, 2, began + 0.3)
        assert time.monotonic() - began < 2.0


def test_the_way_to_the_store_is_what_other_ranks_are_told():
    port = connect._server(1).getsockname()[1]  # one that is free now
    store = dist.TCPStore("127.0.0.1", port, 1, is_master=True)
    assert connect._addresses(PrefixStore("a", PrefixStore("b", store)))[0] == "127.0.0.1"
    assert "127.0.0.1" in connect._addresses(dist.HashStore()) or "::1" in connect._addresses(dist.HashStore())
