"""kernel/survey.py: XDP programs, as ip(8) has attached them, and rules that do not track."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from natkeep.kernel import bpf, survey
from natkeep.kernel.netns import entered
from natkeep.plan.diagnostics import find
from natkeep.plan.move import Site
from natkeep.plan.roles import Role

pytestmark = pytest.mark.root
Run = Callable[..., str]


@pytest.fixture
def netns(make_site: Callable[[], str]) -> Iterator[str]:
    """The test is inside; `wire` is one of its devices."""
    name = make_site()
    with entered(name):
        yield name


def write_program(path: Path) -> Path:
    """An object file whose section `xdp` is `r0 = XDP_PASS; exit`, all that ip(8) asks for."""
    code = struct.pack("<BBhi", 0xB7, 0, 0, 2) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    license_ = b"GPL\0"
    names = b"\0xdp\0license\0.strtab\0.symtab\0prog\0"
    symbols = bytes(24) + struct.pack("<IBBHQQ", names.index(b"prog"), 0x12, 0, 1, 0, len(code))
    parts = [code, license_.ljust(8, b"\0"), symbols, names]
    starts = [64 + sum(map(len, parts[:i])) for i in range(len(parts))]
    kinds = [(b"xdp", 1, 6, 0, 0, 0), (b"license", 1, 3, 0, 0, 0),
             (b".symtab", 2, 0, 4, 1, 24), (b".strtab", 3, 0, 0, 0, 0)]  # fmt: skip
    sizes = [len(code), len(license_), len(symbols), len(names)]
    headers = bytes(64)
    for (name, type_, flags, link, info, entry), start, size in zip(
        kinds, starts, sizes, strict=True
    ):
        headers += struct.pack(
            "<IIQQQQIIQQ", names.index(name), type_, flags, 0, start, size, link, info, 8, entry
        )
    at = 64 + sum(map(len, parts))
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 1, 247, 1, 0, 0, at, 0, 64, 0, 0, 64, 5, 4)
    path.write_bytes(header + b"".join(parts) + headers)
    return path


def test_a_device_with_an_xdp_program_is_named_and_no_other(
    netns: str, run: Run, tmp_path: Path
) -> None:
    assert survey.find_xdp() == ()

    program = write_program(tmp_path / "pass.o")
    run(netns, "ip", "link", "set", "wire", "xdpgeneric", "obj", str(program), "sec", "xdp")

    assert survey.find_xdp() == ("wire",)


def test_a_device_whose_traffic_control_has_a_bpf_program_is_named(netns: str, run: Run) -> None:
    site = Site(Role.GATEWAY, netns)
    run(netns, "tc", "qdisc", "add", "dev", "wire", "clsact")
    assert "bpf" not in {one.code for one in find(site, survey.gather_facts())}

    accept = ["bpf", "bytecode", "1,6 0 0 4294967295,"]
    run(netns, "tc", "filter", "add", "dev", "wire", "egress", "protocol", "all", *accept)
    [found] = [one for one in find(site, survey.gather_facts()) if one.code == "bpf"]
    assert found.detail == "attached to wire"
    run(netns, "tc", "qdisc", "delete", "dev", "wire", "clsact")
    assert survey.find_bpf() == ()

    with attached_by_tcx("wire"):
        assert survey.find_bpf() == ("wire",)
    assert survey.find_bpf() == ()


@contextlib.contextmanager
def attached_by_tcx(device: str) -> Iterator[None]:
    """`r0 = TCX_NEXT; exit` at its way in, from Linux 6.6 on, as long as the link is open."""
    code = struct.pack("<BBhi", 0xB7, 0, 0, -1) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    octets, license_ = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    where = ctypes.addressof(octets), ctypes.addressof(license_)
    program = call_bpf(5, struct.pack("=IIQQ", 3, 2, *where))
    link = call_bpf(28, struct.pack("=IIII", program, socket.if_nametoindex(device), 46, 0))
    try:
        yield
    finally:
        os.close(link)
        os.close(program)


def call_bpf(command: int, attributes: bytes) -> int:
    """bpf(2), which gives a descriptor; the test is skipped on a kernel that does not do this."""
    libc, room = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(attributes, 128)
    number = bpf._NUMBERS.get(os.uname().machine)
    got = libc.syscall(number, command, room, len(room)) if number else -1
    if got < 0:
        pytest.skip(f"no tcx here: {os.strerror(ctypes.get_errno())}")
    return int(got)


def test_chains_that_keep_packets_from_being_tracked_are_named(netns: str, run: Run) -> None:
    site = Site(Role.GATEWAY, netns)
    assert "not-tracked" not in {one.code for one in find(site, survey.gather_facts())}
    ruleset = """
        table inet natkeep { chain c { notrack; }; }
        table inet fast {
            chain pre { tcp dport 5000 notrack; tcp sport 5000 notrack; }
            chain other { accept; }
        }"""
    run(netns, "nft", "-f", "-", stdin=ruleset)
    raw = ("iptables-nft", "-t", "raw", "-A", "OUTPUT", "-p", "tcp", "-j", "NOTRACK")
    run(netns, *raw)

    [found] = [one for one in find(site, survey.gather_facts()) if one.code == "not-tracked"]

    assert found.detail == "inet fast pre; ip raw OUTPUT"
