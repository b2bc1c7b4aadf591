"""UDP servers as they are installed, moved by CRIU: dnsmasq, socat and iperf3."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from natkeep.kernel.netns import entered
from natkeep.lab.host import Program, await_true
from natkeep.lab.lab import Lab
from natkeep.lab.programs import UdpPrograms
from natkeep.lab.time_scale import scaled
from natkeep.lab.topology import CLIENT
from natkeep.plan.tuples import Endpoint, FourTuple

pytestmark = [
    pytest.mark.root,
    pytest.mark.lab,
    pytest.mark.criu,
    pytest.mark.needs("scapy"),
]
FIRST_PORT = 40_000


@contextmanager
def lab_of(*, family: int = 4, answers: bool = True) -> Iterator[Lab]:
    """A lab whose gateway knows all connections from before; judged when the block is left.

    answers: whether the server says anything after the move.
    """
    with Lab("programs", engine="criu", family=family, udp=True) as lab:
        lab.conditions.gateway_tracks()
        yield lab
        lab.finish()

        failed = [each for each in lab.report.assertions if not each.ok]
        if not answers:
            [failed] = [[each for each in failed if "before and after" not in each.name]]
        assert [str(each) for each in failed] == []


class Peer:
    """A socket of the client's host, connected to *server*."""

    def __init__(self, lab: Lab, server: Endpoint, port: int) -> None:
        source = Endpoint(CLIENT.address(lab.family), port)
        self.tuple = FourTuple(source, server)
        with entered(lab.topology["client"].name):
            family = socket.AF_INET if lab.family == 4 else socket.AF_INET6
            self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.settimeout(scaled(5))
        self.socket.bind((str(source.address), port))
        self.socket.connect((str(server.address), server.port))

    def ask(self, octets: bytes) -> bytes:
        """What is answered."""
        self.socket.send(octets)
        return self.socket.recv(65_535)


def make_peers(lab: Lab, port: int, count: int) -> list[Peer]:
    """*count* of them, which have not said anything yet."""
    server = Endpoint(lab.old, port)
    return [Peer(lab, server, FIRST_PORT + number) for number in range(count)]


def close(*peers: Peer) -> None:
    for each in peers:
        each.socket.close()


def await_bound(lab: Lab, port: int) -> None:
    """The program has its socket."""
    shown = ("ss", "-Hlun", f"sport = :{port}")
    await_true(lambda: lab.at.run(*shown).stdout.strip(), f"a socket at port {port}")


def question(number: int) -> bytes:
    """A query of DNS for the address of `name.lab`, with an id."""
    header = number.to_bytes(2) + bytes.fromhex("0100 0001 0000 0000 0000")
    return header + b"\x04name\x03lab\x00" + bytes.fromhex("0001 0001")


@pytest.mark.needs("dnsmasq")
@pytest.mark.parametrize("family", [4, 6])
def test_dnsmasq_answers_known_peers_and_a_newcomer(family):
    with lab_of(family=family) as lab:
        programs = UdpPrograms(lab)
        programs.serve_by(
            "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=",
            "--no-resolv", "--no-hosts", "--bind-interfaces", "--user=root", "--group=root",
            f"--listen-address={lab.old}", "--address=/name.lab/192.0.2.7",
        )  # fmt: skip
        await_bound(lab, 53)
        *known, newcomer = peers = make_peers(lab, 53, 4)
        for number, each in enumerate(known):
            assert_answered(each, number)
        programs.keep_tuples(*(each.tuple for each in known))
        lab.move()
        for number, each in enumerate(peers, 100):
            assert_answered(each, number)
        programs.newcomer(newcomer.tuple)
        close(*peers)


def assert_answered(peer: Peer, number: int) -> None:
    said = peer.ask(question(number))

    assert int.from_bytes(said[:2]) == number
    assert said.endswith(bytes([192, 0, 2, 7]))


@pytest.mark.needs("socat")
@pytest.mark.parametrize(("options", "count"), [("", 1), (",fork", 3)])
def test_socat_goes_on_to_echo(options, count):
    """It connects its socket to the peer, and with `,fork` a child does, for each."""
    with lab_of() as lab:
        programs = UdpPrograms(lab)
        listen = f"UDP-LISTEN:5000,bind={lab.old},reuseaddr{options}"
        programs.serve_by("socat", listen, "PIPE")
        await_bound(lab, 5000)
        peers = make_peers(lab, 5000, count)
        for each in peers:
            assert each.ask(b"before") == b"before"
        programs.keep_tuples(*(each.tuple for each in peers))
        lab.move()
        for each in peers:
            assert each.ask(b"after") == b"after"
        if options:  # the parent's own socket is for any peer
            newcomer = Peer(lab, peers[0].tuple.destination, FIRST_PORT + count)
            assert newcomer.ask(b"new") == b"new"
            programs.newcomer(newcomer.tuple)
            close(newcomer)
        close(*peers)


@pytest.mark.needs("iperf3")
@pytest.mark.parametrize("reverse", [False, True])
def test_iperf3_measures_on(reverse):
    """A connection of TCP beside its datagrams, which the client says, or with --reverse hears."""
    with lab_of(answers=reverse) as lab:
        programs = UdpPrograms(lab)
        programs.serve_by("iperf3", "--server", "--bind", str(lab.old), "--one-off")
        await_true(lambda: lab.at.run("ss", "-Hltn", "sport = :5201").stdout, "iperf3 to listen")
        client = lab.topology["client"].start(
            "iperf3", "iperf3", "--client", str(lab.old), "--udp", "--json", "--time", "4",
            "--bitrate", "400K", "--length", "500", "--cport", str(FIRST_PORT),
            *(["--reverse"] if reverse else []),
        )  # fmt: skip
        shown = ("ss", "-Hun", "state", "established", "sport = :5201")
        await_true(lambda: lab.at.run(*shown).stdout, "iperf3 to measure")
        source = Endpoint(CLIENT.address(4), FIRST_PORT)
        programs.keep_tuples(FourTuple(source, Endpoint(lab.old, 5201)))
        lab.move()
        assert_measured(client, lab, reverse=reverse)


def assert_measured(client: Program, lab: Lab, *, reverse: bool) -> None:
    """It has ended by itself, and lost no more than the client has said in the blackout."""
    assert client.process.wait(scaled(15)) == 0, client.log.read_text()
    total = json.loads(client.log.read_text())["end"]["sum"]
    assert total["packets"] > 100
    a_second = 100
    blackout_s = (lab.report.blackout_ms or 0) / 1000 + 0.1
    assert total["lost_packets"] <= (0 if reverse else blackout_s * a_second)
