"""natkeep migrate --report: what a capture tells, and what is refused before anything else."""

from __future__ import annotations

import ipaddress
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from natkeep.cli import main
from natkeep.migrate.capture import Capture, Packet, demand_tcpdump, read_packets, select
from natkeep.migrate.forward import Migration
from natkeep.migrate.host import LOCAL, Answer, Host, HostError, Ssh
from natkeep.migrate.page import draw_network, find_busiest, find_kept, find_wires
from natkeep.migrate.record import Record
from natkeep.page import Seen
from natkeep.plan.tuples import Endpoint, FourTuple

INBOUND = FourTuple(Endpoint.parse("10.1.0.2:40000"), Endpoint.parse("10.2.0.10:5000"))
NEAR_NEW = FourTuple(INBOUND.source, Endpoint.parse("10.3.0.20:5000"))
INBOUND6 = FourTuple(Endpoint.parse("[fd01::2]:40000"), Endpoint.parse("[fd02::10]:5000"))


def frame(
    tuple_: FourTuple, *, kind: int = 0, interface: int = 2, length: int = 7, fragment: int = 0
) -> bytes:
    """A segment as a capture on `any` has it, cut behind its headers."""
    source, destination = tuple_.source, tuple_.destination
    tcp = struct.pack("!HHIIBBHHH4x", source.port, destination.port, 100, 200, 0x60, 0x10, 0, 0, 0)
    version = source.address.version
    if version == 4:
        total = 20 + len(tcp) + length
        ip = struct.pack("!BBHHHBBH", 0x45, 0, total, 1, fragment, 64, 6, 0)
    else:
        ip = struct.pack("!IHBB", 6 << 28, len(tcp) + length, 6, 64)
    ip += source.address.packed + destination.address.packed
    protocol = 0x0800 if version == 4 else 0x86DD
    return struct.pack("!HHIHBB8x", protocol, 0, interface, 1, kind, 6) + ip + tcp


def capture(*frames: bytes, order: str = "<") -> bytes:
    octets = struct.pack(f"{order}IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 128, 276)
    for number, raw in enumerate(frames):
        octets += struct.pack(f"{order}4I", 1, number, len(raw), 999) + raw
    return octets


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tuple_", [INBOUND, INBOUND6], ids=["4", "6"])
def test_a_segment_of_a_capture_is_read(order: str, tuple_: FourTuple) -> None:
    some = capture(frame(tuple_), frame(tuple_.reply(), kind=4, interface=3, length=0), order=order)
    assert [*read_packets(some)] == [
        Packet(2, False, Seen(10**9, tuple_, 100, 200, 7)),
        Packet(3, True, Seen(10**9 + 1, tuple_.reply(), 100, 200, 0)),
    ]


def test_what_is_no_whole_segment_of_ours_is_left() -> None:
    fragment, other = frame(INBOUND, fragment=3), frame(INBOUND, kind=3)
    udp = bytearray(frame(INBOUND))
    udp[20 + 9] = 17
    arp = struct.pack("!HHIHBB8x", 0x0806, 0, 2, 1, 0, 6) + bytes(60)
    some = capture(fragment, other, bytes(udp), arp, frame(INBOUND)[:30], frame(INBOUND))
    assert len([*read_packets(some)]) == 1
    assert len([*read_packets(some[:-5])]) == 0  # tcpdump was ended while it wrote


def test_each_segment_is_taken_once_though_a_bridge_shows_it_again() -> None:
    def packet(interface: int, ns: int, *, outgoing: bool = False) -> Packet:
        return Packet(interface, outgoing, Seen(ns, INBOUND, ns, None, 1))

    packets = [packet(3, 5), packet(2, 1), packet(2, 3), packet(3, 3), packet(2, 5, outgoing=True),
               packet(2, 4)]  # fmt: skip
    found = select(iter(packets), find_wires(Record("web", "a", 1, "b"), [INBOUND]))
    assert [each.at_ns for each in found] == [1, 3, 4]


@pytest.mark.parametrize("role", ["gateway", "relay"])
def test_beside_the_peers_the_wire_shows_old(role: str) -> None:
    record = Record("web", "a", 1, "b", role, maps=["10.2.0.10=10.3.0.20"])
    assert find_wires(record, [INBOUND]) == {
        (INBOUND, False): INBOUND,
        (INBOUND.reply(), True): INBOUND.reply(),
    }


def test_at_a_peers_own_host_it_shows_old_and_then_new() -> None:
    record = Record("web", "a", 1, "b", "peer", maps=["10.2.0.10=10.3.0.20"])
    assert find_wires(record, [INBOUND]) == {
        (INBOUND, True): INBOUND,
        (INBOUND.reply(), False): INBOUND.reply(),
        (NEAR_NEW, True): INBOUND,
        (NEAR_NEW.reply(), False): INBOUND.reply(),
    }


def test_those_are_drawn_by_which_peers_said_most() -> None:
    others = [
        FourTuple(Endpoint(INBOUND.source.address, port), INBOUND.destination)
        for port in range(1, 6)
    ]
    seen = [Seen(0, each, 0, None, 1) for number, each in enumerate(others) for _ in range(number)]
    seen += [Seen(0, others[0], 0, 5, 0)] * 9  # acknowledgements alone
    assert find_busiest(seen, others) == [others[4], others[3], others[2]]
    assert find_busiest(seen, others[:1]) == []


def test_a_connection_that_is_kept_is_of_tcp_and_not_the_process_own() -> None:
    row = {"kept": True, "protocol": "tcp", "local": "10.2.0.10:5000", "peer": "10.1.0.2:40000"}
    rows = [
        row, {**row, "kept": False}, {**row, "protocol": "udp"}, {**row, "peer": None},
        {**row, "local": "127.0.0.1:1", "peer": "127.0.0.1:2"},
    ]  # fmt: skip
    assert find_kept({"sockets": rows}) == [INBOUND]


@pytest.mark.parametrize(
    ("role", "wires"),
    [
        ("gateway", ["10.2.0.10", "10.3.0.20", "10.2.0.10"]),
        ("relay", ["10.2.0.10", "10.3.0.20"]),
        ("peer", ["10.3.0.20", "10.2.0.10"]),
    ],
)
def test_the_hosts_are_drawn_with_what_their_wires_show(role: str, wires: list[str]) -> None:
    record = Record("web", "root@a", 77, "root@b", role, maps=["10.2.0.10=10.3.0.20"])
    hosts = [Host(name, "", Ssh(), "web") for name in ("root@a", "root@b", "gw")]
    migration = SimpleNamespace(
        record=record, source=hosts[0], destination=hosts[1], translators=hosts[2:]
    )
    lines = draw_network(cast(Migration, migration))
    picture = "\n".join(lines[:-1])
    addresses = [word for word in picture.split() if word.count(".") == 3]
    assert addresses == wires
    assert "root@a" in picture
    assert "process 77" in picture
    assert ("gw" in picture) == (role == "gateway")
    assert "OLD=NEW: 10.2.0.10=10.3.0.20" in lines[-1]
    assert all(ipaddress.ip_address(each) for each in addresses)


def test_a_host_without_tcpdump_is_named() -> None:
    class Bare(Host):
        def run(self, *words: str, **options: object) -> Answer:  # type: ignore[override]
            return Answer(127, "", "not found")

    with pytest.raises(HostError, match=r"this host \(gateway\): .* needs tcpdump there"):
        demand_tcpdump(Bare(LOCAL, "gateway", Ssh(), "web"))


@pytest.fixture
def fake_tcpdump(tmp_path: Path, monkeypatch) -> Callable[[str], None]:
    """A tcpdump of these lines of shell, in PATH."""

    def make(lines: str) -> None:
        script = tmp_path / "bin/tcpdump"
        script.parent.mkdir()
        script.write_text(f"#!/bin/sh\n{lines}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")

    return make


LISTENING = "echo 'tcpdump: data link type X' >&2; echo 'tcpdump: listening on any' >&2"


def test_a_capture_that_cannot_be_says_why(fake_tcpdump) -> None:
    fake_tcpdump("echo 'tcpdump: data link type X' >&2; echo 'any: not permitted' >&2; exit 1")
    with pytest.raises(HostError, match=r"this host .*: tcpdump: any: not permitted"):
        Capture(Host(LOCAL, "gateway", Ssh(), "web"), [INBOUND.source])


def test_a_capture_ends_when_it_is_asked_to(tmp_path: Path, fake_tcpdump) -> None:
    """And what it has is taken then: tcpdump writes late."""
    file = tmp_path / "file"
    file.write_bytes(capture(frame(INBOUND), frame(INBOUND.reply(), kind=4)))
    fake_tcpdump(f"sleep 60 & trap 'cat {file}; kill $!; exit' TERM; {LISTENING}; wait")
    some = Capture(Host(LOCAL, "gateway", Ssh(), "web"), [INBOUND.source])
    seen = some.read(find_wires(Record("web", "a", 1, "b"), [INBOUND]))
    assert [each.tuple for each in seen] == [INBOUND, INBOUND.reply()]
    some.close()
    some.close()


def test_a_capture_ends_by_itself_when_we_are_killed(tmp_path: Path, fake_tcpdump) -> None:
    mark = tmp_path / "pid"
    fake_tcpdump(f"echo $$ >{mark}; {LISTENING}; exec sleep 60")
    code = (
        "import time; from natkeep.migrate.capture import Capture, Host; "
        "from natkeep.migrate.host import LOCAL, Ssh; "
        "from natkeep.plan.tuples import Endpoint; "
        "one = Capture(Host(LOCAL, 'gateway', Ssh(), 'web'), [Endpoint.parse('10.1.0.2:1')]); "
        "print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as ours:
        assert ours.stdout is not None
        assert ours.stdout.readline() == b"ready\n"
        pid = int(mark.read_text())
        assert Path(f"/proc/{pid}").exists()
        ours.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def migrate(tmp_path: Path, *words: str) -> int:
    # `false` in the place of ssh: exit 9 if it comes so far
    end = ["--ssh", "false", "--state-dir", str(tmp_path / "state")]
    return main(["migrate", "a:1", "b", *words, *end])


def test_without_matplotlib_it_is_said_what_to_install(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("natkeep.page.find_spec", lambda name: None)
    assert migrate(tmp_path, "--report", str(tmp_path / "page")) == 2
    said = capsys.readouterr().err
    assert "a report as a page needs matplotlib" in said
    assert "pip install 'natkeep[plots]'" in said
    assert "python3-matplotlib" in said
    assert [*tmp_path.iterdir()] == []


@pytest.mark.needs("matplotlib")
def test_a_report_that_cannot_be_is_refused_first(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert migrate(tmp_path, "--report", str(tmp_path / "file/page")) == 2
    assert "Not a directory" in capsys.readouterr().err
    assert migrate(tmp_path, "--report", str(tmp_path / "page"), "--dry-run") == 2
    assert "there is nothing to report" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    state = ["--state-dir", str(tmp_path / "state")]
    assert main(["migrate", "--resume", "web", "--report", str(tmp_path), *state]) == 2
    assert "stand alone" in capsys.readouterr().err
    assert migrate(tmp_path, "--report", str(tmp_path / "page")) == 9  # all is well so far
