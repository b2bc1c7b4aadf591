"""kernel/sock_diag.py: which kept connections still have a socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from natkeep.kernel.netns import entered
from natkeep.kernel.sock_diag import find_alive, find_kept, is_taken, read_living
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address

pytestmark = pytest.mark.root

# family, address that is bound, address that the client dials
CASES = {
    "v4": (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
    "v6": (socket.AF_INET6, "::1", "::1"),
    "v4-mapped": (socket.AF_INET6, "::", "::ffff:127.0.0.1"),
}


@pytest.fixture
def site(netns: str) -> Iterator[None]:
    """The test is inside a namespace of its own."""
    with entered(netns):
        yield


def count_alive(connections: Connections) -> int:
    return len(find_kept(connections))


def connect(case: str, stack: ExitStack) -> tuple[socket.socket, socket.socket, FourTuple]:
    """A client's and a server's socket, and the tuple from the one to the other."""
    family, bound, dialled = CASES[case]
    listener = stack.enter_context(socket.socket(family))
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind((bound, 0))
    listener.listen()
    client = stack.enter_context(socket.socket(family))
    client.connect((dialled, listener.getsockname()[1]))
    server = stack.enter_context(listener.accept()[0])
    ends = [
        Endpoint(parse_address(n[0]), n[1]) for n in (client.getsockname(), client.getpeername())
    ]
    return client, server, FourTuple(*ends)


@pytest.mark.parametrize("case", CASES)
def test_a_connection_lives_as_long_as_its_socket(site: None, case: str) -> None:
    with ExitStack() as stack:
        client, server, tuple_ = connect(case, stack)
        kept = Connections.of([tuple_])
        assert count_alive(kept) == 1
        assert find_alive(kept, read_living()) == tuple_

        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        server.close()  # with a reset: gone at once

        assert count_alive(kept) == 0
        del client


@pytest.mark.parametrize("case", CASES)
def test_neither_a_listener_nor_a_neighbour_counts(site: None, case: str) -> None:
    with ExitStack() as stack:
        _, _, tuple_ = connect(case, stack)
        source, destination = tuple_.source, tuple_.destination
        neighbours = [
            FourTuple(Endpoint(source.address, source.port ^ 1), destination),
            FourTuple(source, Endpoint(destination.address, destination.port ^ 1)),
            FourTuple(Endpoint(source.address + 1, source.port), destination),
            FourTuple(source, Endpoint(destination.address + 1, destination.port)),
        ]

        assert count_alive(Connections.of(neighbours)) == 0
        assert count_alive(Connections.of([*neighbours, tuple_])) == 1


def test_a_socket_in_time_wait_has_no_owner(site: None) -> None:
    with ExitStack() as stack:
        client, server, tuple_ = connect("v4", stack)
        kept, reply = Connections.of([tuple_]), Connections.of([tuple_.reply()])
        server.close()
        assert client.recv(1) == b""
        assert count_alive(kept) == 1  # FIN_WAIT2: the client has not closed its half
        client.close()

        # The one that closed first, the server's, is in TIME_WAIT; the other is gone.
        assert (count_alive(kept), count_alive(reply)) == (0, 0)


def test_sockets_of_all_families_are_counted_together(site: None) -> None:
    with ExitStack() as stack:
        tuples = [connect(case, stack)[2] for case in CASES]

        assert count_alive(Connections.of(tuples)) == 3


def test_no_connection_lives_in_an_empty_namespace(site: None) -> None:
    tuple_ = FourTuple(Endpoint.parse("10.1.0.2:5000"), Endpoint.parse("10.2.0.10:80"))

    assert count_alive(Connections.of([tuple_])) == 0


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("listens", [True, False])
def test_a_port_is_taken_where_something_listens_or_is_bound(
    site: None, bound: str, listens: bool
) -> None:
    end = Endpoint.parse("127.0.0.1:8080")
    assert not is_taken(end)
    with socket.socket(socket.AF_INET6 if ":" in bound else socket.AF_INET) as other:
        other.bind((bound, end.port))
        if listens:
            other.listen()

        assert is_taken(end)
        assert not is_taken(Endpoint(end.address, 8081))
    assert not is_taken(end)
