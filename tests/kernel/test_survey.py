"""kernel/survey.py: XDP programs, as ip(8) has attached them, and rules that do not track."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from natkeep.kernel import survey
from natkeep.kernel.netns import inside, open_namespace
from natkeep.plan.diagnostics import find
from natkeep.plan.move import Site
from natkeep.plan.roles import Role

pytestmark = pytest.mark.root
Run = Callable[..., str]


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
    make_site: Callable[[], str], run: Run, tmp_path: Path
) -> None:
    netns = make_site()
    namespace = open_namespace(netns)
    with inside(namespace):
        assert survey.find_xdp() == ()

        program = write_program(tmp_path / "pass.o")
        run(netns, "ip", "link", "set", "wire", "xdpgeneric", "obj", str(program), "sec", "xdp")

        assert survey.find_xdp() == ("wire",)
    os.close(namespace.fd)


def test_chains_that_keep_packets_from_being_tracked_are_named(
    make_site: Callable[[], str], run: Run
) -> None:
    netns = make_site()
    namespace = open_namespace(netns)
    site = Site(Role.GATEWAY, netns)
    with inside(namespace):
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
    os.close(namespace.fd)
