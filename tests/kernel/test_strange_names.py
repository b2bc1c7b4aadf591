"""names that a tenant of a namespace may choose, in all that natkeep prints of it.

A device whose name has an escape code and an octet that is no UTF-8, a table and a chain with
escape codes and newlines, and a path of the namespace with a bidirectional control.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink
from natkeep.kernel.netns import entered

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]

OLD, NEW = "10.2.0.10", "10.3.0.20"
CORPUS = Path(__file__).parents[1] / "checkpoint/corpus/plain"
DEVICE = b"e\x1b[3m\x7f\xff\xe2\x80\xae"
TABLE, CHAIN = b"t\x1b[2J\nx\xff", b"c\x1b[1m\xe2\x80\xa8"
NEW_TABLE, NEW_CHAIN = 0, 3


def attribute(number: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)


def message(kind: int, family: int, body: bytes, flags: int = 0, res: int = 0) -> bytes:
    payload = struct.pack("!BBH", family, 0, res) + body
    sequence = 1  # the last one that is acknowledged is the only one
    return struct.pack("=IHHII", 16 + len(payload), kind, flags | 1, sequence, 0) + payload


def add_nat_chain() -> None:
    """Nat at prerouting, as `check` tells of it."""
    table = attribute(1, TABLE + b"\0")
    hook = attribute(1, struct.pack("!I", 0)) + attribute(2, struct.pack("!i", -150))
    chain = table + attribute(3, CHAIN + b"\0") + attribute(4 | 0x8000, hook)
    batch = [
        message(16, 0, b"", res=10),
        message(10 << 8 | NEW_TABLE, 1, table, 0x400),
        message(10 << 8 | NEW_CHAIN, 1, chain + attribute(7, b"nat\0"), 0x404),
        message(17, 0, b"", res=10),
    ]
    with Netlink(NETLINK_NETFILTER) as netlink:
        netlink.send_transaction(b"".join(batch), 1)


@pytest.fixture
def place(netns: str, tmp_path: Path) -> Path:
    """The path of such a namespace."""
    for words in (
        [b"link", b"add", DEVICE, b"type", b"veth", b"peer", b"name", b"eth1"],
        [b"address", b"add", f"{NEW}/24".encode(), b"dev", DEVICE],
        [b"link", b"set", DEVICE, b"up"],
        [b"link", b"set", b"eth1", b"up"],
        [b"route", b"add", b"default", b"via", b"10.3.0.1"],
        b"address add fd00:2::10/128 dev lo nodad".split(),  # of the image's other connection
    ):
        subprocess.run([b"ip", b"-n", netns.encode(), *words], check=True)
    with entered(netns):
        add_nat_chain()
    path = tmp_path / "n\u202e\x1b[2J"
    path.symlink_to(f"/run/netns/{netns}")
    return path


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_no_verb_prints_what_a_terminal_would_obey(
    form: list[str], place: Path, netns: str, tmp_path: Path
) -> None:
    told = ""

    def natkeep(*words: str, code: int = 0) -> None:
        nonlocal told
        usual = ["-v", "--state-dir", str(tmp_path / "s"), *form]
        command = [sys.executable, "-m", "natkeep.cli", *usual, *words]
        done = subprocess.run(command, capture_output=True)
        out, err = done.stdout.decode(), done.stderr.decode()
        assert done.returncode == code, err
        assert [line for line in (out + err).split("\n") if not line.isprintable()] == []
        if form and out:
            json.loads(out)
        told += out + err

    site = ["--site", f"destination={place}"]
    natkeep("check", *site)
    natkeep("prepare", "web", f"--map={OLD}={NEW}", f"--image={CORPUS}", *site, "--no-hold")
    natkeep("open", "web")
    command = [b"ip", b"-n", netns.encode(), b"address", b"flush", b"dev", DEVICE]
    subprocess.run(command, check=True)
    natkeep("status", "web", "--strict", code=6)
    natkeep("repair", "web")
    natkeep("status", "web", "--strict")
    natkeep("gc", *site)
    natkeep("teardown", "web", "--yes")
    natkeep("check", "--site", f"destination={place}-none", code=2)
    for name in ("\\x1b[3m", "t\\x1b[2J\\nx") if not form else ("\\u001b[3m", "t\\u001b[2J\\nx"):
        assert name in told


def test_the_hook_prints_no_control_either(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "natkeep.criu.hook"],
        env={
            **os.environ,
            "CRTOOLS_SCRIPT_ACTION": "post-restore",
            "CRTOOLS_IMAGE_DIR": f"{tmp_path}/\x1b[2J\nnatkeep-hook: web: gate open",
            "NATKEEP_ID": "web",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "\\x1b[2J\\nnatkeep-hook: web" in done.stderr
