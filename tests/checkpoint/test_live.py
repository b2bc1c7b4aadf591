"""tests of checkpoint/live.py and described.py: a living tree, and what was written of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from natkeep import report
from natkeep.checkpoint import Checkpoint, TcpState
from natkeep.checkpoint import live as living
from natkeep.checkpoint.images import read_checkpoint, read_checkpoint_with_queues
from natkeep.checkpoint.listing import parse_listing
from natkeep.checkpoint.live import Found, find_inodes, make_checkpoint, parse_pid
from natkeep.errors import ImageError, UsageError
from natkeep.plan.tuples import parse_address
from natkeep.values import replace

CORPUS = Path(__file__).parent / "corpus"

CHILD = """
import os, socket, sys
mine, its = socket.socketpair()[0], socket.socket()
if os.fork() == 0:
    if os.fork() == 0:
        late = socket.socket()
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    said = " ".join(os.readlink(link) for link in links if os.path.islink(link))
    os.write(1, f"{said}\\n".encode())  # both write to one pipe: a line is one write
    sys.stdin.read()
else:
    sys.stdin.read()
"""


@pytest.fixture
def tree() -> Iterator[subprocess.Popen[str]]:
    """A process, its child and its grandchild, each with sockets."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def test_the_sockets_of_all_descendants_are_found(tree: subprocess.Popen[str]) -> None:
    assert tree.stdout is not None
    said = " ".join(tree.stdout.readline() for _ in range(2))
    wanted = {int(word[8:-1]) for word in said.split() if word.startswith("socket:[")}

    assert len(wanted) == 3
    assert find_inodes(tree.pid) == wanted
    assert wanted <= find_inodes(os.getpid())


def test_of_a_thread_of_the_kernel_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stat = b"S 2 0 0 0 -1 2129984".split()  # flags 0x00208040
    monkeypatch.setattr(living, "_read_stats", lambda: {os.getpid(): stat})

    with pytest.raises(ImageError, match="is a thread of the kernel"):
        find_inodes(os.getpid())


@pytest.mark.parametrize(
    "text", ["", "web", "0", "-1", "+1", "1 ", "\u0661", "12345678", "1" * 5000]
)
def test_a_pid_is_a_number(text: str) -> None:
    with pytest.raises(UsageError, match="is not a pid"):
        parse_pid(text)


def found(inode: int, state: int = 1, peer: str = "10.1.0.2", protocol: int = 6) -> Found:
    return Found(
        inode, protocol, state, (parse_address("10.2.0.10"), 5000), (parse_address(peer), inode)
    )


def test_what_others_have_is_left_out_and_what_cannot_be_kept_says_why() -> None:
    some = [found(1), found(2), found(3, state=2), found(4, protocol=262), found(5, protocol=255)]

    checkpoint = make_checkpoint(some, frozenset({1, 3, 4, 5}), 7)

    assert checkpoint.live
    assert [str(each) for each in checkpoint.connections] == ["10.1.0.2:1 > 10.2.0.10:5000"]
    assert [(s.protocol, s.state, s.unkept) for s in checkpoint.sockets] == [
        ("tcp", TcpState.ESTABLISHED, None),
        ("tcp", TcpState.SYN_SENT, "not yet established: CRIU dials again on restore"),
        ("mptcp", None, "MPTCP: CRIU cannot restore it"),
        ("raw", None, "raw: neither TCP nor UDP"),
    ]


def test_a_process_without_tcp_and_udp_is_refused() -> None:
    with pytest.raises(ImageError, match="process 7 has no TCP or UDP socket"):
        make_checkpoint([found(1, protocol=255), found(2)], frozenset({1}), 7)


def test_udp_of_a_living_process_with_what_it_has_not_read() -> None:
    end = parse_address("10.2.0.10")
    connected = replace(found(1, 0, protocol=17), unread=768)
    some = [connected, Found(2, 17, 7, (end, 53), None), Found(3, 17, 7, (end, 53), None)]

    checkpoint = make_checkpoint(some, frozenset({1, 2, 3}), 7)

    assert [str(each) for each in checkpoint.udp] == ["10.1.0.2:1 > 10.2.0.10:5000"]
    assert [str(each) for each in checkpoint.udp_servers] == ["10.2.0.10:53"]
    assert [each.unread for each in checkpoint.sockets] == [768, 0, 0]
    document = report.checkpoint_to_json(checkpoint, [end])
    assert parse_listing(json.dumps(document), "list") == checkpoint
    first, line, *_ = report.checkpoint_lines(checkpoint, [end])
    assert first == "3 kept (3 udp), 0 lost"
    assert line.endswith("  kept (768 octets of its buffer are unread datagrams, which CRIU drops)")


def test_an_earlier_natkeep_did_not_keep_udp() -> None:
    document = report.checkpoint_to_json(read_checkpoint(str(CORPUS / "udp")), [])
    for socket_ in document["sockets"]:
        del socket_["unread"], socket_["outcome"]
        socket_ |= {"kept": False, "reason": "udp: not a TCP connection"}

    again = parse_listing(json.dumps(document), "list")

    assert (len(again.udp), len(again.udp_servers)) == (3, 3)


@pytest.mark.parametrize("maps", [(), ("10.9.9.9",)])
def test_what_inspect_prints_is_read_back_whatever_its_map_was(maps: tuple[str, ...]) -> None:
    """The sockets of a real server, as if they had been read while it lived."""
    seen = read_checkpoint(str(CORPUS / "plain"))
    sockets = tuple(each for each in seen.sockets if each.state != TcpState.CLOSED)
    before = replace(Checkpoint.of(sockets), live=True)

    olds = [parse_address(text) for text in maps]
    text = json.dumps(report.checkpoint_to_json(before, olds), indent=2)

    assert parse_listing(text, "list") == before


@pytest.mark.parametrize("maps", [(), ("10.9.9.9",)])
@pytest.mark.parametrize("image", sorted(path.name for path in CORPUS.iterdir() if path.is_dir()))
def test_what_inspect_prints_of_an_image_is_read_back_as_the_image(
    image: str, maps: tuple[str, ...]
) -> None:
    """Sockets, what CRIU noted about the dump, and so its lock and listeners."""
    seen = read_checkpoint_with_queues(str(CORPUS / image))
    olds = [parse_address(text) for text in maps]
    assert seen.sockets

    again = parse_listing(json.dumps(report.checkpoint_to_json(seen, olds)), "list")

    assert (again.sockets, again.lock, again.live) == (seen.sockets, seen.lock, False)
    assert (again.connections, again.inventory) == (seen.connections, seen.inventory)
    assert (again.udp, again.udp_servers) == (seen.udp, seen.udp_servers)


def test_an_earlier_natkeep_said_less_of_an_image() -> None:
    document = report.checkpoint_to_json(read_checkpoint(str(CORPUS / "plain")), [])
    for key in ("dump", "sum"):
        del document[key]
    for socket_ in document["sockets"]:
        del socket_["outcome"]

    again = parse_listing(json.dumps(document), "list")

    assert len(again.connections) == 7
    assert (again.inventory, again.lock) == (None, None)


def test_what_is_local_is_not_kept_though_the_document_says_so() -> None:
    socket_ = {
        "protocol": "tcp", "state": "ESTABLISHED", "local": "127.0.0.1:1", "peer": "127.0.0.1:2",
        "device": None, "unsent": 0, "kept": True, "reason": None,
    }  # fmt: skip
    text = json.dumps({"schema": 1, "live": True, "sockets": [socket_]})

    assert len(parse_listing(text, "list").connections) == 0
