"""The application that is migrated, and its peer: every octet numbered, steered through files.

Rule: one script of the standard library, started by path (`python3 -I -S …/traffic.py serve …`),
so that CRIU has little to dump and a bare host little to provide. It must never hold a control
socket, a pipe or an inotify descriptor: whatever steers it has to survive a dump and a restore
in another mount namespace, so the steering is two files that are opened and closed each time.
The lab's side of those files is `application.py`.

    serve --listen ADDR:PORT [--listen …] --dir DIR            accept and wait for orders
    dial  --to ADDR:PORT [--count N] [--from ADDR:PORT] --dir DIR
                           N connections; with a port in --from, connection i leaves from PORT + i
    serve --resume STATEFILE --dir DIR             (also dial)
                           re-create what `freeze` wrote, in repair; do nothing, commands included,
                           until there is a file DIR/go ("" or "probe": leave repair as CRIU does,
                           with a window probe; "silent": without); then go on. A file DIR/go from
                           before the report says "recreated" does not count.

ADDR is 10.2.0.10, [fd00:2::10], [::] (both families) or [::ffff:10.2.0.10] (IPv4-mapped).

THE OCTETS. Direction "dial" is what the side that dialled sends, "serve" the other one. A direction
is a row of blocks of eight octets: one letter (D or S), then the block's own offset in the stream,
seven octets big-endian. So a capture can be read by eye, the content follows from the offset alone
(the state of a connection is its two offsets), and the receiver notices loss, repetition,
reordering or a swap of directions within eight octets of where it happened.

DIR/command  {"seq": k, "do": [ITEM, …]}     replaced atomically by the lab; done once, in order
ITEM         "OPERATION" or {"OPERATION": ARGUMENT, "only": [index, …]}   (else all connections)

    talk {"interval_ms": 10, "size": 64, "answer": 64}
                     send `size` octets, wait until `answer` octets came (default: size; 0: do not
                     wait), send the next not before interval_ms after the last. Swallows, marks.
    answer           each octet that arrives is answered with one octet (how `serve` starts)
    swallow          nothing is answered (how `dial` starts)
    push N           owe N octets, and try to send them right now
    bulk N           send N octets as fast as the connection takes them; null: until `quiet`
    quiet            stop talk and bulk (what is owed as push or answer is still sent, and an
                     answer that is under way still counts)
    pause_reading, resume_reading      so that queues fill
    shutdown_write   quiet; once everything owed has been handed to the kernel, send FIN
    close            close(2) at once        reset      close with RST
    open null        dial one more (--to), or {"open": "ADDR:PORT"} in either role
    mark             begin to measure silence anew
    freeze "PATH"    close the listeners, put every connection into repair, write PATH, do nothing
                     more until `thaw` or SIGKILL (which then is silent: no FIN, no RST). The
                     network must be shut before: a socket in repair goes on to acknowledge.
    thaw             take a freeze back
    accept_every MS  take at most one waiting connection in MS milliseconds; 0: all at once
    exit             close everything and end

DIR/report.json   replaced atomically after each command, and on change about every 20 ms
    {"seq", "failed": null | text, "pid", "role": "serve"|"dial", "monotonic",
     "phase": "running"|"frozen"|"recreated"|"exited", "listening": ["ADDR:PORT", …],
     "connections": [{"local", "peer", "family": "4"|"6"|"mapped",   IPv4-mapped prints as IPv4
       "state": "connecting"|"open"|"eof" (peer's FIN came)|"shut" (we sent FIN)|"done" (both)
                |"closed" (by us)|"reset"|"timeout"|"failed", "error": null | "ECONNRESET" …,
       "rx", "tx",                  octets read and checked, octets handed to the kernel
       "owed",                      octets that the application still has to hand over (bulk too;
                                    null while an endless bulk runs)
       "asked", "answered",         requests of `talk` sent, and answered in full
       "mismatch": null | {"offset", "expected", "got"} (hex),   the first wrong octet
       "longest_silence_ms",        longest gap between arrivals since mark, talk or opening
       "last_rx_monotonic"}]}       null before the first arrival
Connections keep their index for good. Clocks are CLOCK_MONOTONIC of the host it runs on now.

Size: over 400 lines, because one interpreter has to run it by its path alone.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import errno
import importlib
import json
import os
import resource
import selectors
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

TICK_S = 0.005
# Reports take at most a tenth of the time, however many connections there are.
REPORT_EVERY_S, REPORT_SHARE = 0.02, 10
# A talker is looked at no more often than this, so that thousands of them cost one pass each.
PASS_EVERY_S = 0.001

CHUNK = 64 * 1024
BLOCK = 8
LETTER = {"dial": ord("D"), "serve": ord("S")}
OTHER = {"dial": "serve", "serve": "dial"}

MAPPED = "::ffff:"


def make_octets(direction: str, start: int, count: int) -> bytes:
    """Octets *start* to *start + count* of a direction (`dial` or `serve`: who sends it)."""
    first = start - start % BLOCK
    letter = LETTER[direction] << 56
    blocks = array.array("Q", range(letter | first, letter | (start + count), BLOCK))
    if sys.byteorder == "little":
        blocks.byteswap()
    return blocks.tobytes()[start - first : start - first + count]


def find_mismatch(direction: str, start: int, data: bytes) -> dict[str, Any] | None:
    """The first octet of *data* that is not what belongs at its offset."""
    wanted = make_octets(direction, start, len(data))
    if data == wanted:
        return None
    at = next(i for i, pair in enumerate(zip(data, wanted, strict=True)) if pair[0] != pair[1])
    block = slice(at, at + 2 * BLOCK)
    return {"offset": start + at, "expected": wanted[block].hex(), "got": data[block].hex()}


class Talk:
    """Requests at an interval, and what is still missing of the answer to the last one."""

    SAVED = ("interval_ms", "size", "answer", "awaited", "over")

    def __init__(
        self, interval_ms: float, size: int, answer: int | None = None, awaited: int = 0,
        over: bool = False,
    ) -> None:  # fmt: skip
        self.interval_ms, self.size = interval_ms, size
        self.answer = size if answer is None else answer
        self.awaited = awaited
        self.over = over  # nothing more is asked, but the last answer still counts
        self.due = 0.0

    def is_due(self, now: float) -> bool:
        return self.awaited == 0 and not self.over and self.due <= now


def save(each: Any) -> dict[str, Any]:
    """What of *each* a resumed process has to know."""
    return {name: getattr(each, name) for name in each.SAVED}


class Connection:
    """One TCP connection: two offsets, what is owed, and what has been seen."""

    def __init__(self, sock: socket.socket | None, role: str, state: str) -> None:
        self.sock = sock
        self.fd = -1 if sock is None else sock.fileno()
        self.watched = 0  # what the selector was told about this connection
        self.role = role
        self.state = state
        self.answering = role == "serve"
        self.reading = True
        self.shut_wanted = False
        self.talk: Talk | None = None
        self.rx = self.tx = 0
        self.owed = 0
        self.bulk: int | None = 0
        self.asked = self.answered = 0
        self.error: str | None = None
        self.mismatch: dict[str, Any] | None = None
        self.last_rx: float | None = None
        self.longest_silence = 0.0
        self.silent_since = time.monotonic()
        self.names: dict[str, Any] = {"local": None, "peer": None, "family": None}

    SAVED: tuple[str, ...] = (
        "state", "answering", "reading", "shut_wanted", "rx", "tx", "owed", "bulk", "asked",
        "answered", "error", "mismatch", "longest_silence", "names",
    )  # fmt: skip

    REPORTED: tuple[str, ...] = ("state", "error", "rx", "tx", "asked", "answered", "mismatch")

    def saved(self) -> dict[str, Any]:
        """The socket apart."""
        return {**save(self), "talk": self.talk and save(self.talk)}

    def load(self, saved: dict[str, Any]) -> None:
        for name in self.SAVED:
            setattr(self, name, saved[name])
        self.talk = saved["talk"] and Talk(**saved["talk"])

    def report(self) -> dict[str, Any]:
        return {
            **self.names,
            **{name: getattr(self, name) for name in self.REPORTED},
            "owed": None if self.bulk is None else self.owed + self.bulk,
            "longest_silence_ms": round(self.longest_silence * 1000, 3),
            "last_rx_monotonic": self.last_rx,
        }

    # What it wants from the kernel

    def events(self) -> int:
        """What to wait for; 0 when there is nothing, and then it must not be polled at all."""
        if self.state == "connecting":
            return selectors.EVENT_WRITE
        wanted = 0
        if self.reading and self.state in ("open", "shut"):
            wanted |= selectors.EVENT_READ
        if self.state in ("open", "eof") and (self.owed or self.bulk != 0 or self.shut_wanted):
            wanted |= selectors.EVENT_WRITE
        return wanted

    def learn_names(self) -> None:
        """The addresses as the socket says them now; after a reset the last ones known stay."""
        if self.sock is not None:
            with contextlib.suppress(OSError):
                self.names["local"] = print_on_wire(self.sock.getsockname())
                self.names["family"] = name_family(self.sock)
                self.names["peer"] = print_on_wire(self.sock.getpeername())

    # Sending

    def send(self) -> None:
        """As much as is owed and the kernel takes; then the FIN, if it is due."""
        while self.sock is not None and self.state in ("open", "eof"):
            left = CHUNK if self.bulk is None else self.owed + self.bulk
            if left == 0:
                break
            try:
                sent = self.sock.send(make_octets(self.role, self.tx, min(left, CHUNK)))
            except BlockingIOError:
                return
            except OSError as error:
                self.fail(error)
                return
            self.tx += sent
            from_bulk = max(sent - self.owed, 0)
            self.owed -= sent - from_bulk
            if self.bulk is not None:
                self.bulk -= from_bulk
            if sent == CHUNK:
                return  # the other connections want their turn
        if self.shut_wanted and self.state in ("open", "eof"):
            self.shut()

    def shut(self) -> None:
        assert self.sock is not None
        self.shut_wanted = False
        with contextlib.suppress(OSError):  # reset meanwhile: reading will say so
            self.sock.shutdown(socket.SHUT_WR)
        self.state = "done" if self.state == "eof" else "shut"

    def ask(self, now: float) -> None:
        """Send the next request of `talk`, if it is time and the last one is answered."""
        talk = self.talk
        if talk is None or self.state not in ("open", "eof") or not talk.is_due(now):
            return
        talk.due = now + talk.interval_ms / 1000
        talk.awaited = talk.answer
        self.asked += 1
        self.owed += talk.size
        self.send()

    # Receiving

    def receive(self) -> None:
        assert self.sock is not None
        try:
            data = self.sock.recv(4 * CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self.fail(error)
            return
        if not data:
            self.state = "done" if self.state == "shut" else "eof"
            return
        self.check(data)
        self.note_arrival(len(data))

    def check(self, data: bytes) -> None:
        if self.mismatch is None:  # only the first says something: after it all is shifted
            self.mismatch = find_mismatch(OTHER[self.role], self.rx, data)
        self.rx += len(data)

    def note_arrival(self, octets: int) -> None:
        now = time.monotonic()
        self.longest_silence = max(self.longest_silence, now - self.silent_since)
        self.last_rx = self.silent_since = now
        self.count(octets, now)

    def count(self, octets: int, now: float) -> None:
        if self.answering:
            self.owed += octets
            self.send()
        elif self.talk is not None and self.talk.awaited > 0:
            self.talk.awaited = max(self.talk.awaited - octets, 0)
            if self.talk.awaited == 0:
                self.answered += 1
                self.ask(now)

    def finish_connecting(self) -> None:
        assert self.sock is not None
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.fail(OSError(code, os.strerror(code)))
        else:
            self.state = "open"
            self.send()

    # Ends

    def fail(self, error: OSError) -> None:
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        # EPIPE is what a write says after a reset that was not read yet.
        states = {"ECONNRESET": "reset", "EPIPE": "reset", "ETIMEDOUT": "timeout"}
        self.end(states.get(name, "failed"))
        self.error = name

    def end(self, state: str) -> None:
        self.learn_names()
        if self.sock is not None:
            self.sock.close()
        self.sock, self.talk = None, None
        self.owed = self.bulk = 0
        self.state = state

    # What the lab may order: the operations of the command file that concern one connection

    def do_talk(self, argument: dict[str, Any]) -> None:
        talk = Talk(**argument)
        talk.awaited = 0 if self.talk is None else self.talk.awaited
        self.talk, self.answering = talk, False
        self.do_mark()
        self.ask(time.monotonic())

    def do_answer(self, _: None = None) -> None:
        self.answering = True

    def do_swallow(self, _: None = None) -> None:
        self.answering = False

    def do_push(self, octets: int) -> None:
        self.owed += octets
        self.send()

    def do_bulk(self, octets: int | None) -> None:
        self.bulk = None if octets is None or self.bulk is None else self.bulk + octets
        self.send()

    def do_quiet(self, _: None = None) -> None:
        self.bulk = 0
        if self.talk is not None:
            self.talk.over = True

    def do_pause_reading(self, _: None = None) -> None:
        self.reading = False

    def do_resume_reading(self, _: None = None) -> None:
        self.reading = True

    def do_shutdown_write(self, _: None = None) -> None:
        self.do_quiet()
        self.shut_wanted = True
        self.send()

    def do_close(self, _: None = None) -> None:
        self.end("closed")

    def do_reset(self, _: None = None) -> None:
        if self.sock is not None:
            linger = struct.pack("ii", 1, 0)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.end("closed")

    def do_mark(self, _: None = None) -> None:
        self.longest_silence = 0.0
        self.silent_since = time.monotonic()


class Process:
    """The event loop: listeners, connections, the command file and the report."""

    def __init__(self, role: str, directory: Path) -> None:
        self.role, self.directory = role, directory
        self.to: str | None = None
        self.source: str | None = None
        # poll, not epoll: one descriptor less that a dump has to save and a restore to rebuild.
        self.selector = selectors.PollSelector()
        self.listeners: list[socket.socket] = []
        self.listening: list[str] = []
        self.accept_every_s = 0.0
        self.resting: list[socket.socket] = []  # listeners that do not accept just now
        self.connections: list[Connection] = []
        self.frozen: list[tuple[Connection, Any]] = []  # with the state that tcp_repair.py read
        self.phase = "running"
        self.seq = 0
        self.failed: str | None = None
        self.changed = True
        self._command_seen: tuple[int, int] | None = None
        self._now = self._next_look = self._next_report = self._next_pass = 0.0
        self._next_accept = 0.0

    # The loop

    def run(self) -> None:
        while self.phase != "exited":
            timeout = min(self._next_look, self._next_pass) - time.monotonic()
            for key, events in self.selector.select(max(timeout, 0)):
                self.changed = True
                if key.data is None:
                    self.accept(key.fileobj)
                else:
                    self.serve_events(key.data, events & key.events)
            self.keep_time()
        self.report()

    def serve_events(self, connection: Connection, events: int) -> None:
        if connection.state == "connecting":
            connection.finish_connecting()
        else:
            if events & selectors.EVENT_READ:
                connection.receive()
            if events & selectors.EVENT_WRITE:
                connection.send()
        self.watch(connection)

    def keep_time(self) -> None:
        """Whatever is done because it is time for it."""
        now = time.monotonic()
        if now < self._now:  # restored on a machine that was started later
            self.start_clocks(now)
        self._now = now
        if now >= self._next_look:
            self._next_look = now + TICK_S
            self.look()
        if now >= self._next_pass:
            self.ask_all(now)
        if self.resting and now >= self._next_accept:
            self.wake_listeners()
        if self.changed and now >= self._next_report:
            self.report()

    def wake_listeners(self) -> None:
        for listener in self.resting:
            self.selector.register(listener, selectors.EVENT_READ)
        self.resting.clear()

    def start_clocks(self, now: float) -> None:
        self._next_look = self._next_report = self._next_pass = self._next_accept = now
        for connection in self.connections:
            connection.silent_since, connection.last_rx = now, None
            if connection.talk is not None:
                connection.talk.due = now

    def ask_all(self, now: float) -> None:
        """Let every talker whose time has come ask; find out when the next one's comes."""
        soonest = float("inf")
        if self.phase == "running":
            for connection in self.connections:
                if connection.talk is None or connection.talk.over:
                    continue
                if connection.talk.is_due(now):
                    connection.ask(now)
                    self.watch(connection)
                    self.changed = True
                if connection.talk is not None and connection.talk.awaited == 0:
                    soonest = min(soonest, connection.talk.due)
        self._next_pass = min(max(soonest, now + PASS_EVERY_S), now + TICK_S)

    def watch(self, connection: Connection) -> None:
        """Tell the selector what the connection waits for, at once: a closed fd is soon reused."""
        wanted = connection.events() if self.phase == "running" else 0
        if wanted == connection.watched:
            return
        if wanted == 0:
            self.selector.unregister(connection.fd)
        elif connection.watched == 0:
            self.selector.register(connection.fd, wanted, connection)
        else:
            self.selector.modify(connection.fd, wanted, connection)
        connection.watched = wanted

    # Where connections come from

    def listen(self, text: str) -> None:
        address = parse_address(text)
        sock = make_socket(address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(4096)
        self.listeners.append(sock)
        self.listening.append(print_address(sock.getsockname()))
        self.selector.register(sock, selectors.EVENT_READ)

    def accept(self, listener: Any) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            while True:
                sock, _ = listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.add(Connection(sock, self.role, "open"))
                if self.accept_every_s:
                    self.selector.unregister(listener)
                    self.resting.append(listener)
                    self._next_accept = time.monotonic() + self.accept_every_s
                    return

    def dial(self, text: str | None) -> None:
        if text is None:
            raise ValueError("open: an address is needed")
        address = parse_address(text)
        sock = make_socket(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(sock, self.role, "connecting")
        connection.names["peer"] = print_on_wire(address)  # known before it answers
        try:
            if self.source is not None:
                host, port, *rest = parse_address(self.source)
                # One port may serve for connections to several addresses, if all say so.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((host, port and port + len(self.connections), *rest))
            sock.connect(address)
        except BlockingIOError:
            pass
        except OSError as error:
            connection.fail(error)
        self.add(connection)

    def add(self, connection: Connection) -> None:
        connection.learn_names()  # now: who is reset at once could not be named any more
        self.connections.append(connection)
        self.watch(connection)

    # Orders and reports

    def look(self) -> None:
        """Has the lab written anything?"""
        if self.phase == "recreated":
            with contextlib.suppress(FileNotFoundError):
                self.go((self.directory / "go").read_text().strip())
            return
        path = self.directory / "command"
        try:
            status = path.stat()
        except FileNotFoundError:
            return
        # Reading a file every 5 ms would cost more than the traffic does.
        if (seen := (status.st_ino, status.st_mtime_ns)) == self._command_seen:
            return
        self._command_seen = seen
        command = json.loads(path.read_text())
        if command["seq"] > self.seq:
            self.failed = None
            for item in command["do"]:
                self.do(item)
            self.seq = command["seq"]
            self.report(names_too=True)

    def do(self, item: str | dict[str, Any]) -> None:
        try:
            if isinstance(item, str):
                item = {item: None}
            item = dict(item)
            only = item.pop("only", range(len(self.connections)))
            ((name, argument),) = item.items()
            if own := getattr(self, f"do_{name}", None):
                own(argument)
                return
            if self.phase != "running":
                raise ValueError(f"{self.phase}: only thaw and exit")
            for index in only:
                connection = self.connections[index]
                getattr(connection, f"do_{name}")(argument)
                self.watch(connection)
            self._next_pass = 0.0
        except Exception as error:
            self.failed = f"{item}: {type(error).__name__}: {error}"

    def report(self, *, names_too: bool = False) -> None:
        started, busy = time.monotonic(), time.process_time()
        if names_too:
            for connection in self.connections:
                connection.learn_names()
        value = {
            "seq": self.seq,
            "failed": self.failed,
            "pid": os.getpid(),
            "role": self.role,
            "monotonic": started,
            "phase": self.phase,
            "listening": self.listening,
            "connections": [connection.report() for connection in self.connections],
        }
        replace(self.directory / "report.json", json.dumps(value))
        self.changed = False
        # Of the processor, or one that is frozen here would next report ten blackouts later; where
        # it is restored it is another process, whose time may be less.
        took = time.process_time() - busy
        self._next_report = time.monotonic() + max(REPORT_EVERY_S, REPORT_SHARE * took)

    def do_open(self, to: str | None) -> None:
        self.dial(to or self.to)

    def do_accept_every(self, milliseconds: float) -> None:
        self.accept_every_s = milliseconds / 1000
        self.wake_listeners()

    def do_exit(self, _: None = None) -> None:
        for connection in self.connections:
            connection.learn_names()
            if connection.sock is not None:
                connection.sock.close()
        self.phase = "exited"

    # Freezing, thawing, resuming

    def do_freeze(self, path: str) -> None:
        repair = load_repair()
        self.do_accept_every(0)
        for listener in self.listeners:
            self.accept(listener)  # what waits to be accepted would be reset
        try:
            for connection in self.connections:
                if connection.sock is not None and has_state(connection.sock):
                    self.frozen.append((connection, repair.freeze(connection.sock)))
            self.save(Path(path))
        except Exception:
            self.do_thaw()
            raise
        self.phase = "frozen"
        for connection in self.connections:
            self.watch(connection)
        for listener in self.listeners:
            self.selector.unregister(listener)
            listener.close()
        self.listeners.clear()

    def do_thaw(self, _: None = None) -> None:
        repair = load_repair()
        for connection, state in self.frozen:
            repair.thaw(connection.sock, state)
        self.frozen.clear()
        self.phase = "running"
        self.start()

    def save(self, path: Path) -> None:
        sockets = {id(connection): state.to_text() for connection, state in self.frozen}
        value = {
            "seq": self.seq + 1,  # the freeze itself, which must not be carried out again
            "to": self.to,
            "source": self.source,
            "listening": self.listening,
            "connections": [
                {"socket": sockets.get(id(connection)), **connection.saved()}
                for connection in self.connections
            ],
        }
        replace(path, json.dumps(value))

    def resume(self, path: Path) -> None:
        """Re-create what `save` wrote; everything stays in repair until the file `go` is there."""
        repair = load_repair()
        (self.directory / "go").unlink(missing_ok=True)  # of an earlier move
        value = json.loads(path.read_text())
        self.seq, self.to, self.source = value["seq"], value["to"], value["source"]
        self.listening, self.phase = value["listening"], "recreated"
        for saved in value["connections"]:
            sock = None
            if saved["socket"] is not None:
                sock = repair.recreate(repair.SocketState.from_text(saved["socket"]))
                sock.setblocking(False)
            connection = Connection(sock, self.role, saved["state"])
            connection.load(saved)
            self.connections.append(connection)

    def go(self, how: str) -> None:
        """The gate is open: leave repair, then do what a started process does."""
        repair = load_repair()
        leave = repair.leave_repair_silently if how == "silent" else repair.leave_repair
        for connection in self.connections:
            if connection.sock is not None:
                leave(connection.sock)
        self.phase = "running"
        self.start()

    def start(self) -> None:
        """Listen, and look after the connections there are; also after thaw and resume."""
        # Listeners come last: the kernel does not bind a connection beside a listening socket.
        if not self.listeners:
            listening, self.listening = self.listening, []
            for text in listening:
                self.listen(text)
        now = time.monotonic()
        self.start_clocks(now)
        for connection in self.connections:
            connection.ask(now)
            self.watch(connection)
        self.changed = True


def has_state(sock: socket.socket) -> bool:
    """Whether there is anything left of the connection that could be moved."""
    closed = 7
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != closed


def load_repair() -> Any:
    """tcp_repair.py beside this file: late, since a process that CRIU moves never needs it."""
    beside = str(Path(__file__).parent)
    if beside not in sys.path:
        sys.path.append(beside)
    return importlib.import_module("tcp_repair")


def replace(path: Path, text: str) -> None:
    """Write so that a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


# Addresses


def parse_address(text: str) -> tuple[Any, ...]:
    """10.2.0.10:80 or [fd00::1]:80 as the socket module wants it."""
    host, _, port = text.rpartition(":")
    if host.startswith("["):
        return (host[1:-1], int(port), 0, 0)
    return (host, int(port))


def print_address(address: tuple[Any, ...]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def print_on_wire(address: tuple[Any, ...]) -> str:
    """An IPv4-mapped address as the IPv4 address that it is in the packets."""
    return print_address((address[0].removeprefix(MAPPED), address[1]))


def make_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket that fits the address; an IPv6 one takes IPv4 as well."""
    sock = socket.socket(socket.AF_INET6 if len(address) == 4 else socket.AF_INET)
    sock.setblocking(False)
    if len(address) == 4:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    return sock


def name_family(sock: socket.socket) -> str:
    if sock.family == socket.AF_INET:
        return "4"
    return "mapped" if sock.getsockname()[0].startswith(MAPPED) else "6"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="traffic.py")
    roles = parser.add_subparsers(dest="role", required=True)
    serve = roles.add_parser("serve")
    serve.add_argument("--listen", action="append", default=[], metavar="ADDR:PORT")
    dial = roles.add_parser("dial")
    dial.add_argument("--to", metavar="ADDR:PORT")
    dial.add_argument("--count", type=int, default=1, metavar="N")
    dial.add_argument("--from", dest="source", metavar="ADDR:PORT")
    for role in (serve, dial):
        role.add_argument("--dir", required=True, metavar="DIR")
        role.add_argument("--resume", metavar="STATEFILE")
    return parser


def main(process: type[Process] = Process) -> None:
    """*process*: datagrams.py has another one."""
    options = make_parser().parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # thousands of connections
    running = process(options.role, Path(options.dir))
    if options.resume is not None:
        running.resume(Path(options.resume))
    elif options.role == "serve":
        running.listening = options.listen
        running.start()
    else:
        running.to, running.source = options.to, options.source
        for _ in range(options.count):
            running.dial(options.to)
    running.run()


if __name__ == "__main__":
    main()
