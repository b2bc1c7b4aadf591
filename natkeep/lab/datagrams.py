"""The UDP application that is migrated, and its peer: every datagram numbered, steered by files.

    serve --listen ADDR:PORT [--listen …] --dir DIR            unconnected sockets, for any peer
    dial  --to ADDR:PORT [--count N] [--from ADDR:PORT] --dir DIR          connected sockets

Started by its path as traffic.py, beside it and with its files of orders and reports. A connection
of a report is a peer of a socket; what it says and hears are the same directions of octets, and
datagram N has them from N * 65,536 on. So a receiver sees which one it is, and in a capture too.

Of traffic.py's orders there are `talk` (what is not answered in 50 ms is asked anew, with another
number), `answer`, `swallow`, `push N` (one datagram of N octets), `quiet`, `close`, `open`, `mark`,
`exit`, `freeze` (the sockets are closed: there is nothing in them that could be moved, and those of
`--resume` are bound and connected anew), and of its own:

    connect          the peer gets a connected socket        unlisten    close the unconnected ones

and of each connection a report has as well "connected", "said", how many it sent, and "heard", the
numbers that arrived: [[FIRST, LAST], …]; one that is not above all earlier ones, or has wrong
octets, is a "mismatch". What is said by a socket of all addresses comes from the one that the
kernel chooses.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __name__ != "__main__":
    from natkeep.lab import traffic
else:  # by its path alone, as -I has it
    sys.path.append(str(Path(__file__).parent))
    import traffic

NUMBER_BITS = 16
MOST = 65_000  # octets of a datagram
_IP_PKTINFO = 8  # linux/in.h; Python has no name for it
ASK_AGAIN_S = 0.05


class Flow(traffic.Connection):
    """What is said to one peer, and heard of it; *to*: where its socket is not connected."""

    SAVED = (*traffic.Connection.SAVED, "said", "heard", "to")
    REPORTED = (*traffic.Connection.REPORTED, "said", "heard")

    def __init__(self, sock: socket.socket | None, role: str, to: Any = None) -> None:
        super().__init__(sock, role, "open")
        self.to = to
        self.said = 0
        self.heard: list[list[int]] = []
        self.again = 0.0
        if sock is not None and to is not None:
            self.names["peer"] = traffic.print_on_wire(to)
            self.names["family"] = traffic.name_family(sock)

    def report(self) -> dict[str, Any]:
        awaited = 0 if self.talk is None else self.talk.awaited
        more = {"connected": self.to is None, "owed": self.owed + awaited}
        return {**super().report(), **more}

    def events(self) -> int:
        return super().events() if self.to is None else 0

    def learn_names(self) -> None:
        if self.to is None:
            super().learn_names()

    def send(self) -> None:
        while self.sock is not None and self.owed:
            size = min(self.owed, MOST)
            data = traffic.make_octets(self.role, self.said << NUMBER_BITS, size)
            try:
                self.sock.send(data) if self.to is None else self.sock.sendto(data, self.to)
            except OSError as error:
                self.fail(error)
                return
            self.said, self.tx, self.owed = self.said + 1, self.tx + size, self.owed - size

    def receive(self) -> None:
        assert self.sock is not None
        try:
            while self.sock is not None:
                self.take(self.sock.recv(2 * MOST, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return
        except OSError as error:
            self.fail(error)

    def take(self, data: bytes) -> None:
        """One datagram."""
        number = int.from_bytes(data[1:8]) >> NUMBER_BITS
        last = self.heard[-1][1] if self.heard else -1
        if self.mismatch is None:
            wrong = traffic.find_mismatch(traffic.OTHER[self.role], number << NUMBER_BITS, data)
            late = {"offset": number, "expected": f"above {last}", "got": f"{number}"}
            self.mismatch = wrong or (late if number <= last else None)
        if number == last + 1 and self.heard:
            self.heard[-1][1] = number
        else:
            self.heard.append([number, number])
        self.rx += len(data)
        self.note_arrival(len(data))

    def ask(self, now: float) -> None:
        talk = self.talk
        if talk is not None and talk.awaited and now >= self.again:
            talk.awaited = talk.answer
            self.owed += talk.size
            self.send()
        elif talk is None or not talk.is_due(now):
            return
        else:
            super().ask(now)
        self.again = now + ASK_AGAIN_S

    def do_connect(self, _: None = None) -> None:
        if self.sock is not None and self.to is not None:
            self.sock, self.to = make_connected(self.sock.getsockname(), self.to), None
            self.fd = self.sock.fileno()

    def end(self, state: str) -> None:
        if self.to is not None:
            self.sock = None  # the others' too
        super().end(state)


class Datagrams(traffic.Process):
    """As the process of traffic.py, whose listeners are the unconnected sockets."""

    connections: list[Any]  # Flow

    def __init__(self, role: str, directory: Path) -> None:
        super().__init__(role, directory)
        self.peers: dict[tuple[int, str], Flow] = {}  # of an unconnected socket, by its descriptor

    def ask_all(self, now: float) -> None:
        for flow in self.connections:
            flow.ask(now)  # also what is asked anew
        super().ask_all(now)

    # Sockets

    def listen(self, text: str) -> None:
        address = traffic.parse_address(text)
        sock = make_socket(address)
        bind(sock, address)
        self.listeners.append(sock)
        self.listening.append(traffic.print_address(sock.getsockname()))

    def accept(self, listener: Any) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, told, _, peer = listener.recvmsg(2 * MOST, 64, socket.MSG_DONTWAIT)
                key = (listener.fileno(), traffic.print_address(peer))
                if key not in self.peers:
                    self.peers[key] = Flow(listener, self.role, peer)
                    self.peers[key].names["local"] = find_local(listener, told)
                    self.connections.append(self.peers[key])
                self.peers[key].take(data)

    def dial(self, text: str | None) -> None:
        if text is None:
            raise ValueError("open: an address is needed")
        address, local = traffic.parse_address(text), None
        if self.source is not None:
            host, port, *rest = traffic.parse_address(self.source)
            local = (host, port and port + len(self.connections), *rest)
        self.add(Flow(make_connected(local, address), self.role))

    def do_unlisten(self, _: None = None) -> None:
        self.close_listeners()
        self.listening.clear()

    def close_listeners(self) -> None:
        for listener in self.listeners:
            self.selector.unregister(listener)
            listener.close()
        self.listeners.clear()
        self.peers.clear()

    # Freezing, resuming

    def do_freeze(self, path: str) -> None:
        for listener in self.listeners:
            self.accept(listener)  # what is in a socket is lost with it
        for flow in self.connections:
            if flow.events():
                flow.receive()
        self.save(Path(path))
        self.phase = "frozen"
        for flow in self.connections:
            self.watch(flow)
        self.close_listeners()

    def do_thaw(self, _: None = None) -> None:
        raise ValueError("its sockets are gone")

    def save(self, path: Path) -> None:
        value = {
            "seq": self.seq + 1, "to": self.to, "source": self.source,
            "listening": self.listening,
            "connections": [
                {**flow.saved(), **self.name_socket(flow)} for flow in self.connections
            ],
        }  # fmt: skip
        traffic.replace(path, json.dumps(value))

    def name_socket(self, flow: Flow) -> dict[str, Any]:
        """The number of the unconnected socket of *flow*, or both ends of its own."""
        if flow.sock is None or flow.to is not None:
            return {"listener": self.listeners.index(flow.sock) if flow.sock else None}
        return {"ends": [flow.sock.getsockname(), flow.sock.getpeername()]}

    def resume(self, path: Path) -> None:
        (self.directory / "go").unlink(missing_ok=True)  # of an earlier move
        value = json.loads(path.read_text())
        self.seq, self.to, self.source = value["seq"], value["to"], value["source"]
        self.phase = "recreated"
        for text in value["listening"]:
            self.listen(text)
        for saved in value["connections"]:
            self.resume_flow(saved)

    def resume_flow(self, saved: dict[str, Any]) -> None:
        sock, to = None, saved["to"] and tuple(saved["to"])
        if "ends" in saved:
            sock = make_connected(*map(tuple, saved["ends"]))
        elif saved["listener"] is not None:
            sock = self.listeners[saved["listener"]]
        flow = Flow(sock, self.role, to)
        flow.load({**saved, "to": to})
        if sock is not None and to is not None:
            self.peers[sock.fileno(), traffic.print_address(to)] = flow
        self.connections.append(flow)

    def go(self, how: str) -> None:
        """There is nothing to leave as TCP's sockets leave repair."""
        self.phase = "running"
        self.start()

    def start(self) -> None:
        """As traffic.py's; the sockets are bound before any of them is read."""
        super().start()
        for listener in self.listeners:
            self.selector.register(listener, selectors.EVENT_READ)


def make_socket(address: Any) -> socket.socket:
    """A socket of the family of *address*."""
    family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    return sock


def bind(sock: socket.socket, address: Any) -> None:
    """Several may have one port, the connected ones apart; but the kernel chooses one for each."""
    if address[1]:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address)


def find_local(sock: socket.socket, told: list[tuple[int, int, bytes]]) -> str:
    """The address that a datagram was sent to; what is answered says what the kernel chooses."""
    address = sock.getsockname()
    for _, kind, value in told:
        octets = value[8:12] if kind == _IP_PKTINFO else value[:16]
        address = (socket.inet_ntop(sock.family, octets), *address[1:])
    return traffic.print_on_wire(address)


def make_connected(local: Any, peer: Any) -> socket.socket:
    """A socket bound to *local*, None for any, and connected to *peer*."""
    sock = make_socket(peer)
    if local is not None:
        bind(sock, local)
    sock.connect(peer)
    return sock


if __name__ == "__main__":
    traffic.main(process=Datagrams)
