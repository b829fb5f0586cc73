"""How two ranks find each other and connect: by addresses in their store, and a token that only they know."""

from __future__ import annotations

import secrets
import socket
import struct
import time
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

REPLY_SECONDS = 5.0
"""How long who answers a connection may take to say that it is the rank that was meant."""


def connections(store: Store, rank: int, partners: Iterable[int], deadline: float) -> dict[int, socket.socket]:
    """Connections to these ranks, each of which connects to this one.

    `store` is for them alone. Raises `OSError` or `RuntimeError` if they are not all there by `deadline`, a time of
    `time.monotonic`.
    """
    found: dict[int, socket.socket] = {}
    awaited = {p for p in partners if p > rank}
    token = store.compare_set("token", "", secrets.token_hex(16))
    with _server(len(awaited)) as server:
        store.set(f"at/{rank}", " ".join([str(server.getsockname()[1]), *_addresses(store)]))
        for partner in (p for p in partners if p < rank):
            found[partner] = _dialled(store, token, rank, partner, deadline)
        while awaited:
            server.settimeout(_left(deadline))
            if accepted := _accepted(server, token):
                partner, found[partner] = accepted
                awaited.remove(partner)
    return found


def _server(num_partners: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=num_partners, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=num_partners)


def _addresses(store: Store) -> list[str]:
    """Where the other ranks may reach this one, the likeliest first: by the way to their store, by the way out."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    hosts = [getattr(store, "host", "localhost"), "192.0.2.1"]  # an address that is nowhere: RFC 5737
    return list(dict.fromkeys(address for host in hosts if (address := _route_to(host))))


def _route_to(host: str) -> str:
    """The address of this host on the way to another one; "" if there is no way. Nothing is sent."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
    except OSError:
        pass
    return ""


def _dialled(store: Store, token: bytes, rank: int, partner: int, deadline: float) -> socket.socket:
    store.wait([f"at/{partner}"], timedelta(seconds=_left(deadline)))
    port, *addresses = store.get(f"at/{partner}").decode().split()
    why = "it has no address"
    for address in addresses:
        with ExitStack() as unless_right:
            try:
                connection = socket.create_connection((address, int(port)), timeout=_left(deadline))
                unless_right.callback(connection.close)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(token + struct.pack("q", rank))
                if _read(connection, len(token)) == token:
                    unless_right.pop_all()
                    return connection
                why = "that is another host"
            except OSError as error:
                why = str(error)
    raise ConnectionError(f"rank {partner} cannot be reached at {' or '.join(addresses)}, port {port}: {why}")


def _accepted(server: socket.socket, token: bytes) -> tuple[int, socket.socket] | None:
    """The next rank that connects; None if who does is no rank."""
    with ExitStack() as unless_right:
        connection, _ = server.accept()
        unless_right.callback(connection.close)
        connection.settimeout(REPLY_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            said = _read(connection, len(token) + 8)
            if said[:-8] != token:
                return None
            connection.sendall(token)
        except OSError:
            return None
        unless_right.pop_all()
        return struct.unpack("q", said[-8:])[0], connection


def _read(connection: socket.socket, size: int) -> bytes:
    said = b""
    while len(said) < size:
        if not (more := connection.recv(size - len(said))):
            raise ConnectionError("the connection was closed")
        said += more
    return said


def _left(deadline: float) -> float:
    return max(0.01, deadline - time.monotonic())
