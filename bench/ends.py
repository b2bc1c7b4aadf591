"""the ends of connections that bench/stall.py moves: the peers, and the process by TCP_REPAIR.

Every octet is numbered and checked where it arrives.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

from natkeep.kernel.netns import Namespace, inside
from natkeep.lab import tcp_repair
from natkeep.lab.traffic import find_mismatch, make_octets
from natkeep.plan.tuples import Endpoint

WORD = 64  # octets
EVERY = 0.02  # s
PATIENCE = 20.0  # s


# ---- the peer ------------------------------------------------------------------------------------


class Ends:
    """The sockets of one side, their octets, and when they could be sent and had come."""

    def __init__(self, role: str, sockets: list[socket.socket]) -> None:
        self.role, self.sockets = role, sockets
        self.other = "serve" if role == "dial" else "dial"
        self.tx, self.rx = [0] * len(sockets), [0] * len(sockets)
        self.moved: list[list[float]] = [[] for _ in sockets]  # when something went on
        self.fault = ""
        for sock in sockets:
            sock.setblocking(False)

    def send(self, index: int, octets: int) -> int:
        """As many as the kernel takes."""
        try:
            sent = self.sockets[index].send(make_octets(self.role, self.tx[index], octets))
        except BlockingIOError:
            return 0
        self.tx[index] += sent
        return sent

    def receive(self, index: int) -> int:
        """What is there, checked."""
        try:
            data = self.sockets[index].recv(1 << 18)
        except BlockingIOError:
            return 0
        except OSError as error:
            data, self.fault = b"", self.fault or f"{self.role}: {error}"
        if not data:
            self.fault = self.fault or f"{self.role} {index}: the connection ended"
            return -1
        wrong = find_mismatch(self.other, self.rx[index], data)
        if wrong:
            self.fault = self.fault or f"{self.role} {index}: {wrong}"
        self.rx[index] += len(data)
        return len(data)


class Peer:
    """A process at the client, ordered about through a socket, a line of JSON each way."""

    def __init__(self, where: Namespace, to: Endpoint, count: int, pattern: str) -> None:
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            try:
                ours.close()
                _serve_as_peer(where, to, count, pattern, theirs)
            finally:
                os._exit(0)
        theirs.close()
        ours.settimeout(PATIENCE)
        self.lines = ours.makefile("rw")
        try:
            self.ports: list[int] = self.read()
        except BaseException:
            self.kill()
            raise

    def tell(self, order: str) -> None:
        self.lines.write(f"{order}\n")
        self.lines.flush()

    def read(self) -> Any:
        return json.loads(self.lines.readline())

    def ask(self, since: float = 0.0) -> Any:
        """Octets sent and received, the longest silence that ended later, and what is wrong."""
        self.tell(f"report={since!r}")
        return self.read()

    def kill(self) -> None:
        """End it without a word: it may be waiting for a server that is gone."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def end(self) -> None:
        with suppress(OSError, ValueError):
            self.tell("end")
        os.waitpid(self.pid, 0)


def _serve_as_peer(
    where: Namespace, to: Endpoint, count: int, pattern: str, orders: socket.socket
) -> None:
    family = socket.AF_INET if to.address.version == 4 else socket.AF_INET6
    sockets = []
    with inside(where):
        for _ in range(count):
            sock = socket.create_connection((str(to.address), to.port), timeout=PATIENCE)
            assert sock.family == family
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sockets.append(sock)
    lines = orders.makefile("rw")

    def write(value: object) -> None:
        lines.write(json.dumps(value) + "\n")
        lines.flush()

    write([sock.getsockname()[1] for sock in sockets])
    _Talker(Ends("dial", sockets), pattern, orders, write).run()


class _Talker:
    """The peer's loop."""

    def __init__(
        self, ends: Ends, pattern: str, orders: socket.socket, write: Callable[[object], None]
    ) -> None:
        self.ends, self.pattern, self.orders, self.write = ends, pattern, orders, write
        self.select = selectors.DefaultSelector()
        self.select.register(orders, selectors.EVENT_READ)
        both = selectors.EVENT_READ | (selectors.EVENT_WRITE if pattern == "bulk" else 0)
        for index, sock in enumerate(ends.sockets):
            self.select.register(sock, both, index)
        self.talks = pattern == "stream"
        begin = time.monotonic()
        count = len(ends.sockets)
        self.due = [begin + EVERY * index / count for index in range(count)]
        self.next = 0  # whose turn is next: they talk in the order of their numbers

    def run(self) -> None:
        while True:
            timeout = None
            if self.talks:
                self.talk()
                timeout = max(self.due[self.next] - time.monotonic(), 0)
            for key, events in self.select.select(timeout):
                if key.data is None:
                    for order in self.orders.recv(4096).decode().split() or ["end"]:
                        if not self.obey(order):
                            return
                else:
                    self.serve(key.data, events)

    def talk(self) -> None:
        now = time.monotonic()
        while self.due[self.next] <= now:
            self.ends.send(self.next, WORD)
            self.due[self.next] += EVERY
            self.next = (self.next + 1) % len(self.due)

    def serve(self, index: int, events: int) -> None:
        ends = self.ends
        if events & selectors.EVENT_READ:
            got = ends.receive(index)
            if got < 0:
                self.select.unregister(ends.sockets[index])
            elif got and self.pattern != "bulk":
                ends.moved[index].append(time.monotonic())
        if events & selectors.EVENT_WRITE and ends.send(index, 1 << 16):
            ends.moved[index].append(time.monotonic())

    def obey(self, order: str) -> bool:
        """Do it; whether that was not the end."""
        ends = self.ends
        if order == "say":
            for index in range(len(ends.sockets)):
                ends.send(index, WORD)
        elif order == "quiet":
            self.talks = False
            if self.pattern == "bulk":
                for index, sock in enumerate(ends.sockets):
                    self.select.modify(sock, selectors.EVENT_READ, index)
        elif order.startswith("report="):
            since = float(order.removeprefix("report="))
            moved = [_around_the_longest_gap(each, since) for each in ends.moved]
            self.write({"tx": ends.tx, "rx": ends.rx, "moved": moved, "fault": ends.fault})
        elif order == "end":
            for sock in ends.sockets:  # a reset, so that nothing stays in TIME-WAIT
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.close()
            return False
        return True


def _around_the_longest_gap(times: list[float], since: float) -> list[float]:
    """When the longest silence that ended after *since* began and ended; of one time, twice that.

    One before may be longer than a short blackout, on a busy machine.
    """
    if len(times) < 2:
        return times * 2
    ended = [(b - a, a, b) for a, b in pairwise(times) if b > since]
    return list(max(ended)[1:]) if ended else times[-2:]


# ---- the process, by TCP_REPAIR within this one --------------------------------------------------


class Server:
    """Answers each octet with one (bulk: with none), frozen and re-created where it is told."""

    def __init__(self, where: Namespace, at: Endpoint, *, answers: bool) -> None:
        self.answers = answers
        with inside(where):
            family = socket.AF_INET if at.address.version == 4 else socket.AF_INET6
            self.listener = socket.socket(family)
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.listener.bind((str(at.address), at.port))
            self.listener.listen(4096)
        self.ends = Ends("serve", [])
        self.owed: list[int] = []

    def accept(self, count: int) -> None:
        """All peers, in the order in which they came."""
        sockets = []
        self.listener.settimeout(PATIENCE)
        with low_numbers_kept_free():
            for _ in range(count):
                sock, _ = self.listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sockets.append(sock)
        self.listener.close()
        self.ends, self.owed = Ends("serve", sockets), [0] * count

    def start(self) -> None:
        self.waker, self.woken = socket.socketpair()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.waker.close()
        self.thread.join()
        self.woken.close()

    def _run(self) -> None:
        ends = self.ends
        with selectors.DefaultSelector() as select:
            select.register(self.woken, selectors.EVENT_READ)
            for index, sock in enumerate(ends.sockets):
                select.register(sock, selectors.EVENT_READ, index)
            while True:
                for key, _ in select.select(0.05 if any(self.owed) else None):
                    if key.data is None:
                        return
                    got = ends.receive(key.data)
                    if got < 0:
                        select.unregister(key.fileobj)
                    elif self.answers:
                        self.owed[key.data] += got
                        self._answer(key.data)
                for index in [i for i, owed in enumerate(self.owed) if owed]:
                    self._answer(index)

    def _answer(self, index: int) -> None:
        self.owed[index] -= self.ends.send(index, self.owed[index])

    def freeze(self) -> None:
        self.stop()
        self.states = [tcp_repair.freeze(sock) for sock in self.ends.sockets]
        for sock in self.ends.sockets:
            sock.close()

    def recreate(self, where: Namespace) -> None:
        with inside(where), low_numbers_kept_free():
            self.ends.sockets = [tcp_repair.recreate(state) for state in self.states]
        for sock in self.ends.sockets:
            sock.setblocking(False)

    def live(self) -> None:
        for sock in self.ends.sockets:
            tcp_repair.leave_repair(sock)
        self.start()

    def close(self) -> None:
        self.stop()
        for sock in self.ends.sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()


@contextmanager
def low_numbers_kept_free() -> Iterator[None]:
    """What is opened in the block has descriptors behind the first few.

    libnftables, in this same process, waits with select(), which knows none above 1023.
    """
    reserved = [os.open(os.devnull, os.O_RDONLY) for _ in range(100)]
    try:
        yield
    finally:
        for fd in reserved:
            os.close(fd)
