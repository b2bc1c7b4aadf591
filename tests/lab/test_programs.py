"""Programs as they are installed, moved by `natkeep migrate`; clients check each message."""

from __future__ import annotations

import http.client
import itertools
import json
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from natkeep.kernel.netns import entered
from natkeep.lab.host import await_true
from natkeep.lab.lab import Lab
from natkeep.lab.programs import Programs
from natkeep.lab.ssh import Machines
from natkeep.lab.time_scale import scaled
from natkeep.lab.topology import CLIENT
from natkeep.plan.tuples import Endpoint, FourTuple

pytestmark = [
    pytest.mark.root, pytest.mark.lab, pytest.mark.criu, pytest.mark.needs("sshd")
]  # fmt: skip
SERVERS = Path(__file__).parent / "servers"
AS_POSTGRES = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")
Step = Callable[[int], None]


@contextmanager
def talking(*steps: Step, pause_s: float) -> Iterator[None]:
    """Each of *steps* in a thread, with 0, 1, 2, … while the block runs, and 10 times more."""
    ended = threading.Event()

    def go_on(step: Step) -> None:
        more = 10
        for number in itertools.count():
            step(number)
            more -= ended.wait(pause_s)
            if not more:
                return

    with ThreadPoolExecutor() as pool:
        running = [pool.submit(go_on, each) for each in steps]
        try:
            yield
        finally:
            ended.set()
    for each in running:
        each.result()


class Move:
    """A program at the source, and its clients, while `natkeep migrate` moves it."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.old = lab, str(lab.home.address(4))
        self.programs = Programs(lab)
        self.machines = Machines(lab, "source", "destination", controller="gateway")

    def serve_by(self, *argv: str, ports: Iterable[int]) -> None:
        """It is started, and listens."""
        self.programs.serve_by(*argv)
        for port in ports:
            shown = ("ss", "-Hltn", f"sport = :{port}")
            await_true(lambda: self.lab.at.run(*shown).stdout.strip(), f"to listen at {port}")  # noqa: B023

    def connect(self, port: int) -> socket.socket:
        """A client of OLD."""
        with entered(self.lab.topology["client"].name):
            made = socket.socket()
        made.settimeout(scaled(15))
        made.connect((self.old, port))
        return made

    def keep(self, *sockets: socket.socket) -> None:
        """These are the connections."""
        self.programs.keep_tuples(*map(tuple_of, sockets))

    def migrate(self, *steps: Step, pause_s: float = 0.02, options: Iterable[str] = ()) -> None:
        """The clients talk before, meanwhile and afterwards."""
        with talking(*steps, pause_s=pause_s):
            said = self.machines.migrate(*options)
        count = len(self.programs.kept)
        assert f"{count} of {count} peers were heard" in said, said


def tuple_of(connected: socket.socket) -> FourTuple:
    source, destination = connected.getsockname(), connected.getpeername()
    return FourTuple(
        Endpoint.parse("{}:{}".format(*source)), Endpoint.parse("{}:{}".format(*destination))
    )


def find_established(move: Move, port: int) -> list[FourTuple]:
    """The connections of a client that is a program of its own."""
    shown = move.lab.topology["client"].run(
        "ss", "-Htn", "state", "established", f"dport = :{port}"
    )
    lines = map(str.split, shown.stdout.splitlines())
    return [FourTuple(*map(Endpoint.parse, words[2:4])) for words in lines]


def make_asking(clients: Sequence[socket.socket]) -> Step:
    """A line on each of them, and its echo."""

    def ask(number: int) -> None:
        line = b"message %d\n" % number
        for each in clients:
            each.sendall(line)
        for each in clients:
            assert each.recv(100) == line

    return ask


def close(*sockets: socket.socket) -> None:
    """In order, so that there is no reset."""
    for each in sockets:
        each.shutdown(socket.SHUT_WR)
        assert each.recv(1) == b""
        each.close()


@contextmanager
def move_of() -> Iterator[Move]:
    """A lab, which is judged when the block is left; the clients have ended by then."""
    with Lab("programs", engine="criu") as lab:
        move = Move(lab)
        yield move
        move.machines.call("finish", "web", "--drain", "30")
        lab.finish()

        assert [str(each) for each in lab.report.assertions if not each.ok] == []


@pytest.mark.needs("openssl")
def test_tls():
    with move_of() as move:
        certificate = move.lab.directory / "certificate.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", "/CN=server.lab",
             "-addext", "subjectAltName=DNS:server.lab", "-keyout", certificate,
             "-out", certificate],
            check=True, capture_output=True,
        )  # fmt: skip
        move.serve_by(
            sys.executable, str(SERVERS / "tls_echo.py"), move.old, "443", str(certificate),
            ports=[443],
        )  # fmt: skip
        context = ssl.create_default_context(cafile=certificate)
        clients = [
            context.wrap_socket(move.connect(443), server_hostname="server.lab") for _ in range(20)
        ]
        move.keep(*clients)
        move.migrate(make_asking(clients))
        close(*(each.unwrap() for each in clients))


def encode(*words: object) -> bytes:
    """A command of redis."""
    texts = [str(each).encode() for each in words]
    return b"*%d\r\n" % len(texts) + b"".join(b"$%d\r\n%s\r\n" % (len(t), t) for t in texts)


@pytest.mark.needs("redis-server")
def test_redis_publishes_and_counts():
    """Each message comes to the subscriber, in order; and each of 100 INCRs in flight counts.

    A client that comes after the move is answered, too.
    """
    with move_of() as move:
        move.serve_by(
            "redis-server", "--bind", move.old, "--protected-mode", "no", "--save", "",
            "--dir", str(move.lab.directory), ports=[6379],
        )  # fmt: skip
        sockets = [move.connect(6379) for _ in range(3)]
        move.keep(*sockets)
        publisher, subscriber, counter = (each.makefile("rwb", 0) for each in sockets)
        subscriber.write(encode("SUBSCRIBE", "news"))
        assert [subscriber.readline() for _ in range(6)][-1] == b":1\r\n"

        def publish(number: int) -> None:
            publisher.write(encode("PUBLISH", "news", number))
            assert publisher.readline() == b":1\r\n"
            assert [subscriber.readline() for _ in range(7)][-1] == b"%d\r\n" % number

        def count(number: int) -> None:
            counter.write(encode("INCR", "n") * 100)
            for each in range(100):
                assert counter.readline() == b":%d\r\n" % (100 * number + each + 1)

        move.lab.listeners = True
        move.migrate(publish, count, options=["--listeners"])
        newcomer = move.connect(6379)
        move.programs.newcomer(tuple_of(newcomer))
        newcomer.sendall(encode("PING"))
        assert newcomer.recv(100) == b"+PONG\r\n"
        close(*sockets, newcomer)


NGINX = """\
daemon off; user root; worker_processes 2; pid {directory}/nginx.pid; error_log stderr;
events {{}}
http {{
    access_log off;
    server {{
        listen {old}:80;
        proxy_buffering off;
        location / {{ proxy_pass http://127.0.0.1:8000; }}
    }}
}}
"""


@pytest.mark.needs("nginx")
def test_nginx_passes_tokens_on():
    """A stream of events from an application that is its child; no token is missing."""
    with move_of() as move:
        directory = move.lab.directory
        configuration, end = directory / "nginx.conf", directory / "end"
        configuration.write_text(NGINX.format(directory=directory, old=move.old))
        application = f"{sys.executable} {SERVERS / 'tokens.py'} 8000 {end}"
        move.serve_by(
            "sh", "-c", f"{application} & exec nginx -c {configuration}", ports=[8000, 80]
        )
        sockets = [move.connect(80) for _ in range(2)]
        move.keep(*sockets)
        streams = [Stream(each) for each in sockets]
        move.migrate(*(each.read for each in streams))
        end.touch()
        for each in streams:
            each.end()
        close(*sockets)


class Stream:
    """Server-sent events, as http.client reads them."""

    def __init__(self, connected: socket.socket) -> None:
        client = http.client.HTTPConnection("server.lab")
        client.sock = connected
        client.request("GET", "/")
        self.response, self.seen = client.getresponse(), 0
        assert self.response.status == 200

    def read(self, number: int) -> None:
        assert self.response.readline() == b"data: %d\n" % number
        assert self.response.readline() == b"\n"
        self.seen += 1

    def end(self) -> None:
        rest = self.response.read().decode().split("\n\n")
        assert rest == [*(f"data: {self.seen + n}" for n in range(len(rest) - 1)), ""]


SSHD = """\
HostKey {key}
AuthorizedKeysFile {authorized}
PidFile none
UsePAM no
StrictModes no
ListenAddress {old}:2222
"""


def test_sshd_keeps_a_shell_on_its_terminal():
    """The shell is a child of the listening sshd, whose tree moves with the pseudo-terminal."""
    with move_of() as move:
        machines = move.machines
        for role in ("source", "destination"):  # its own terminals, as another machine has
            options = ("-o", "newinstance,ptmxmode=0666")
            move.lab.topology[role].run("mount", "-t", "devpts", *options, "devpts", "/dev/pts")
        configuration = move.lab.directory / "sshd_config"
        key = machines.directory / "source" / "hostkey"
        configuration.write_text(SSHD.format(key=key, authorized=machines.authorized, old=move.old))
        move.serve_by("/usr/sbin/sshd", "-D", "-e", "-f", str(configuration), ports=[2222])
        shell = subprocess.Popen(
            move.lab.topology["client"].command(
                "ssh", "-tt", "-q", "-F", "/dev/null", "-i", str(machines.key), "-p", "2222",
                "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
                f"root@{move.old}", "PS1= bash --noediting --norc --noprofile -i",
            ),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
        typed, said = shell.stdin, shell.stdout
        assert typed is not None
        assert said is not None

        def tell(line: str) -> None:
            typed.write(f"{line}\n".encode())

        def hear() -> str:
            return said.readline().decode().strip()

        tell("stty -echo; n=0; echo begin")
        while hear() != "begin":
            pass
        tell("tty")
        terminal = hear()
        move.programs.keep_tuples(*find_established(move, 2222))

        def ask(number: int) -> None:
            tell("echo line $((n++))")
            assert hear() == f"line {number}"

        move.migrate(ask)
        tell("tty; exit 7")
        assert hear() == terminal
        assert shell.wait(scaled(10)) == 7
        said.close()
        typed.close()


HAPROXY = """\
defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
frontend all
  bind {old}:7000
  default_backend all
backend all
  server one {client}:7001
"""


@pytest.mark.needs("haproxy")
def test_haproxy_keeps_clients_and_server():
    """Connections that it accepted, and those that it opened itself."""
    with move_of() as move:
        address = str(CLIENT.address(4))
        configuration = move.lab.directory / "haproxy.cfg"
        configuration.write_text(HAPROXY.format(old=move.old, client=address))
        move.serve_by("haproxy", "-db", "-f", str(configuration), ports=[7000])
        with entered(move.lab.topology["client"].name):
            listener = socket.create_server((address, 7001))
        pairs = [(move.connect(7000), listener.accept()[0]) for _ in range(20)]
        listener.close()
        move.keep(*itertools.chain(*pairs))

        def pass_on(number: int) -> None:
            line = b"message %d\n" % number
            for client, _ in pairs:
                client.sendall(line)
            for _, server in pairs:
                assert server.recv(100) == line
                server.sendall(line)
            for client, _ in pairs:
                assert client.recv(100) == line

        move.migrate(pass_on)
        for client, server in pairs:
            client.shutdown(socket.SHUT_WR)
            close(server)
            assert client.recv(1) == b""
            client.close()


@pytest.mark.needs("node")
def test_node_answers_200_clients():
    with move_of() as move:
        move.serve_by("node", str(SERVERS / "echo.js"), move.old, "7000", ports=[7000])
        clients = [move.connect(7000) for _ in range(200)]
        move.keep(*clients)
        move.migrate(make_asking(clients), pause_s=0.1)
        close(*clients)


@pytest.mark.needs("websockets")
def test_web_sockets():
    """Both ends ping, too."""
    from websockets.sync.client import connect

    with move_of() as move, ExitStack() as ends:
        script = str(SERVERS / "web_socket.py")
        move.serve_by(sys.executable, script, move.old, "7000", ports=[7000])
        sockets = [move.connect(7000) for _ in range(20)]
        move.keep(*sockets)
        clients = [
            ends.enter_context(
                connect("ws://server.lab", sock=each, ping_interval=0.2, ping_timeout=60)
            )
            for each in sockets
        ]

        def ask(number: int) -> None:
            for each in clients:
                each.send(f"message {number}")
            for each in clients:
                assert each.recv(scaled(15)) == f"message {number}"

        move.migrate(ask)
        ends.close()


@pytest.mark.needs("iperf3")
def test_iperf3_measures_both_ways():
    """Three connections; the client ends by itself, and both ways go on after the move."""
    with move_of() as move:
        move.serve_by("iperf3", "--server", "--bind", move.old, "--one-off", ports=[5201])
        client = move.lab.topology["client"].start(
            "iperf3", "iperf3", "--client", move.old, "--bidir", "--json", "--time", "8",
            "--bitrate", "4M",
        )  # fmt: skip
        await_true(lambda: len(find_established(move, 5201)) == 3, "iperf3 to measure")
        move.programs.keep_tuples(*find_established(move, 5201))
        move.migrate()
        assert client.process.poll() is None
        assert client.process.wait(scaled(30)) == 0, client.log.read_text()
        told = json.loads(client.log.read_text())
        assert "error" not in told
        last = told["intervals"][-2]  # a whole second
        assert last["sum"]["bytes"] > 0
        assert last["sum_bidir_reverse"]["bytes"] > 0


class Sql:
    """A client of PostgreSQL's protocol, version 3; an error ends the test."""

    def __init__(self, connected: socket.socket) -> None:
        self.file = connected.makefile("rwb", 0)
        begin = b"\0\x03\0\0user\0postgres\0\0"
        self.file.write(struct.pack("!I", len(begin) + 4) + begin)
        self.read_rows()

    def read(self) -> tuple[bytes, bytes]:
        """The kind of the next message, and what is in it."""
        kind, size = struct.unpack("!cI", self.read_exactly(5))
        body = self.read_exactly(size - 4)
        assert kind != b"E", body
        return kind, body

    def read_exactly(self, size: int) -> bytes:
        octets = b""
        while len(octets) < size:
            octets += (piece := self.file.read(size - len(octets)))
            assert piece, "the server has ended"
        return octets

    def read_rows(self) -> list[bytes]:
        rows = []
        while (message := self.read())[0] != b"Z":
            if message[0] == b"D":
                rows.append(message[1][6:])  # of one column
        return rows

    def ask(self, text: str) -> list[bytes]:
        octets = text.encode() + b"\0"
        self.file.write(b"Q" + struct.pack("!I", len(octets) + 4) + octets)
        return self.read_rows()


@pytest.mark.needs("postgres", "resource")
def test_postgresql_keeps_a_transaction_and_listen():
    """An open transaction with a table of its own; each NOTIFY comes, in order."""
    with move_of() as move, tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        shutil.chown(directory, "postgres", "postgres")
        programs = max(Path("/usr/lib/postgresql").glob("*/bin"))
        subprocess.run(
            [*AS_POSTGRES, str(programs / "initdb"), "--pgdata", str(data), "--auth", "trust",
             "--no-sync"],
            check=True, capture_output=True,
        )  # fmt: skip
        with (data / "pg_hba.conf").open("a") as file:
            file.write("host all all all trust\n")
        move.serve_by(
            "unshare", "--ipc", *AS_POSTGRES, str(programs / "postgres"), "-D", str(data),
            "-h", move.old, "-k", "", "-F", ports=[5432],
        )  # fmt: skip
        log = move.lab.at.directory / "program.log"
        await_true(lambda: "ready to accept" in log.read_text(), "PostgreSQL to begin")
        sockets = [move.connect(5432) for _ in range(3)]
        move.keep(*sockets)
        transaction, listener, writer = map(Sql, sockets)
        writer.ask("CREATE TABLE all_rows (i int); CREATE TEMP TABLE own (i int)")
        transaction.ask("BEGIN; CREATE TEMP TABLE hidden (i int)")
        process = transaction.ask("SELECT pg_backend_pid()")
        listener.ask("LISTEN news")

        def notify(number: int) -> None:
            transaction.ask(f"INSERT INTO hidden VALUES ({number})")
            writer.ask(f"INSERT INTO all_rows VALUES ({number}); NOTIFY news, '{number}'")
            writer.ask(f"INSERT INTO own VALUES ({number})")
            kind, body = listener.read()
            assert (kind, body[4:]) == (b"A", b"news\0%d\0" % number)

        move.migrate(notify)
        assert transaction.ask("SELECT pg_backend_pid()") == process
        counts = [
            client.ask(f"SELECT count(*) FROM {table}")
            for client, table in ((transaction, "hidden"), (writer, "all_rows"), (writer, "own"))
        ]
        assert counts[0] == counts[1] == counts[2] != [b"0"]
        transaction.ask("COMMIT")
        for each in sockets:
            each.sendall(b"X\0\0\0\4")
        close(*sockets)
