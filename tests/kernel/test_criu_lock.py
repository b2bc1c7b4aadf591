"""CRIU's lock, in all its forms: exactly this dump's is removed, and it can be put back.

The lock is made here as CRIU 4.2.1 makes it (the last tests let CRIU itself make it).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_kernel import revert_step

from natkeep.checkpoint.images import read_checkpoint
from natkeep.errors import KernelError
from natkeep.kernel import criu_lock
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import entered
from natkeep.lab.host import Host
from natkeep.lab.lab import Lab
from natkeep.plan.criu_lock import DumpLock, NetworkLock
from natkeep.plan.move import Site
from natkeep.plan.roles import Role
from natkeep.plan.steps import Prior, TakeOverLock
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

RUN = "aaf6b8e3-c33b-47e9-baff-d0ec3de03291"
OTHER_RUN = "aaf6b8e3-c33b-47e9-bbff-d0ec3de03291"  # differs in the last character that is shown
TABLE, OTHER_TABLE = "CRIU-aaf6b8e3-c33b-47e9-ba", "CRIU-aaf6b8e3-c33b-47e9-bb"

OLD = {4: "10.2.0.10", 6: "[fd00:2::10]"}
PEER = {4: "10.1.0.2", 6: "[fd00:1::2]"}

Run = Callable[..., str]

EACH_VERSION = pytest.mark.parametrize("version", [4, 6])
EACH_BACKEND = pytest.mark.parametrize("backend", ["nft", "legacy"])


def some(*versions: int, ports: tuple[int, ...] = (50001, 50002)) -> Connections:
    return Connections.of(
        FourTuple(Endpoint.parse(f"{PEER[v]}:{port}"), Endpoint.parse(f"{OLD[v]}:5000"))
        for v in versions
        for port in ports
    )


def lock_process(run: Run, netns: str, table: str, connections: Connections) -> None:
    """The table as CRIU makes it, typed here and not rendered by what is tested."""
    lines = [f"table inet {table} {{"]
    for version, type_ in ((4, "ipv4_addr"), (6, "ipv6_addr")):
        elements = [
            f"{t.source.address} . {t.source.port} . {t.destination.address} . {t.destination.port}"
            for inbound in connections
            for t in (inbound, inbound.reply())
            if t.source.address.version == version
        ]
        lines.append(f"set conns{version} {{")
        lines.append(f"type {type_} . inet_service . {type_} . inet_service")
        if elements:
            lines.append(f"elements = {{ {', '.join(elements)} }}")
        lines.append("}")
    for chain in ("output", "input"):
        lines.append(f"chain {chain} {{")
        lines.append(f"type filter hook {chain} priority filter; policy accept;")
        lines.append("meta mark 0xc114 accept")
        for family, number in (("ip", 4), ("ip6", 6)):
            lines.append(
                f"{family} saddr . tcp sport . {family} daddr . tcp dport @conns{number} drop"
            )
        lines.append("}")
    run(netns, "nft", "-f", "-", stdin="\n".join([*lines, "}"]) + "\n")


NAMESPACE = """
table inet {table} {{
    chain output {{
        type filter hook output priority filter; policy drop;
        meta mark 0xc114 accept
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        meta mark 0xc114 accept
    }}
}}
"""


def lock_with_iptables(run: Run, netns: str, backend: str, connections: Connections) -> None:
    """As CRIU does: one iptables call a rule, inserted in front."""
    for inbound in connections:
        tool = f"{'iptables' if inbound.source.address.version == 4 else 'ip6tables'}-{backend}"
        for chain, t in (("INPUT", inbound), ("OUTPUT", inbound.reply())):
            words = (
                f"-w -t filter -I {chain} --protocol tcp -m mark ! --mark 0xC114 "
                f"--source {t.source.address} --sport {t.source.port} "
                f"--destination {t.destination.address} --dport {t.destination.port} -j DROP"
            )
            run(netns, tool, *words.split())


WHOLE = """*filter
:CRIU - [0:0]
-I INPUT -j CRIU
-I OUTPUT -j CRIU
-A CRIU -m mark --mark 0xc114 -j ACCEPT
-A CRIU -j DROP
COMMIT
"""


def shown(run: Run, netns: str) -> dict[str, str]:
    """Every table as its own tool prints it, counters and comments apart."""
    found = {"nft": run(netns, "nft", "--stateless", "list", "ruleset")}
    for tool in ("iptables", "ip6tables"):
        for backend in ("nft", "legacy"):
            text = run(netns, f"{tool}-{backend}-save")
            found[f"{tool}-{backend}"] = re.sub(r"(?m)^#.*\n|\[\d+:\d+\]", "", text)
    return found


def take(netns: str, lock: DumpLock, kept: Connections) -> Prior:
    kernel, site = LinuxKernel(), Site(Role.SOURCE, netns)
    kernel.open_sites([site])
    remembered: list[Prior] = []
    step = TakeOverLock(site, lock, kept)
    kernel.check(step)
    prior = kernel.apply(step, remembered.append)
    assert remembered == [prior]
    return prior


def put_back(netns: str, lock: DumpLock, kept: Connections, prior: Prior) -> None:
    kernel, site = LinuxKernel(), Site(Role.SOURCE, netns)
    kernel.open_sites([site])
    revert_step(kernel, TakeOverLock(site, lock, kept), prior)


NFT = DumpLock(NetworkLock.NFTABLES, RUN)
IPTABLES = DumpLock(NetworkLock.IPTABLES, RUN)
NFT_WHOLE = DumpLock(NetworkLock.NFTABLES, RUN, whole=True)
IPTABLES_WHOLE = DumpLock(NetworkLock.IPTABLES, RUN, whole=True)

pytestmark = pytest.mark.root


def test_the_table_of_this_dump_goes_and_that_of_another_stays(netns: str, run: Run) -> None:
    other = some(4, 6, ports=(50003,))
    lock_process(run, netns, OTHER_TABLE, other)
    before = shown(run, netns)
    lock_process(run, netns, TABLE, some(4, 6))

    take(netns, NFT, some(4, 6))

    assert shown(run, netns) == before
    assert OTHER_TABLE in before["nft"]


def test_what_the_plan_does_not_keep_stays_locked(netns: str, run: Run) -> None:
    """The process had connections at another address: natkeep's gate does not guard them."""
    lock_process(run, netns, TABLE, some(4, 6, ports=(50003,)))
    before = shown(run, netns)
    run(netns, "nft", "delete", "table", "inet", TABLE)
    lock_process(run, netns, TABLE, some(4, 6, ports=(50001, 50002, 50003)))

    take(netns, NFT, some(4, 6))

    assert shown(run, netns) == before


def test_of_a_table_that_lacks_some_the_rest_goes_all_the_same(netns: str, run: Run) -> None:
    lock_process(run, netns, TABLE, some(4, ports=(50001, 50003)))

    take(netns, NFT, some(4))

    assert "50003" in shown(run, netns)["nft"]
    assert "50001" not in shown(run, netns)["nft"]


@pytest.mark.parametrize("locked", [(50001, 50002), (50001, 50002, 50003)])
def test_the_table_comes_back_as_it_was(netns: str, run: Run, locked: tuple[int, ...]) -> None:
    lock_process(run, netns, TABLE, some(4, 6, ports=locked))
    before = shown(run, netns)
    prior = take(netns, NFT, some(4, 6))
    assert shown(run, netns) != before

    for _ in range(2):
        put_back(netns, NFT, some(4, 6), prior)
        assert shown(run, netns) == before


def test_the_lock_of_a_whole_namespace_goes_and_comes_back(netns: str, run: Run) -> None:
    run(netns, "nft", "-f", "-", stdin=NAMESPACE.format(table=TABLE))
    before = shown(run, netns)

    prior = take(netns, NFT_WHOLE, some(4))

    assert shown(run, netns)["nft"] == ""
    for _ in range(2):
        put_back(netns, NFT_WHOLE, some(4), prior)
        assert shown(run, netns) == before


@EACH_BACKEND
@EACH_VERSION
def test_rules_of_this_dump_go_and_those_of_another_and_of_others_stay(
    netns: str, run: Run, backend: str, version: int
) -> None:
    tool = f"{'iptables' if version == 4 else 'ip6tables'}-{backend}"
    peer = PEER[version].strip("[]")
    run(netns, tool, "-A", "INPUT", "-s", peer, "-p", "tcp", "--dport", "5000", "-j", "DROP")
    lock_with_iptables(run, netns, backend, some(version, ports=(50003,)))
    before = shown(run, netns)
    lock_with_iptables(run, netns, backend, some(version))

    prior = take(netns, IPTABLES, some(version))

    assert shown(run, netns) == before
    for _ in range(2):  # put back once, if asked twice
        put_back(netns, IPTABLES, some(version), prior)
        words = shown(run, netns)[tool].count("--mark 0xc114")
        assert words == 2 * 3


@EACH_BACKEND
def test_the_chain_of_a_whole_namespace_goes_and_comes_back(
    netns: str, run: Run, backend: str
) -> None:
    for tool in ("iptables", "ip6tables"):
        for chain in ("INPUT", "OUTPUT"):
            run(netns, f"{tool}-{backend}", "-A", chain, "-p", "udp", "-j", "DROP")
    bare = shown(run, netns)
    for tool in ("iptables", "ip6tables"):
        run(netns, f"{tool}-{backend}-restore", "--noflush", stdin=WHOLE)
    before = shown(run, netns)

    prior = take(netns, IPTABLES_WHOLE, some(4, 6))

    assert shown(run, netns) == bare
    for _ in range(2):
        put_back(netns, IPTABLES_WHOLE, some(4, 6), prior)
        assert shown(run, netns) == before


@pytest.mark.parametrize("lock", [NFT, IPTABLES, NFT_WHOLE, IPTABLES_WHOLE])
def test_without_a_lock_there_is_nothing_to_take_and_no_table_is_made(
    netns: str, run: Run, lock: DumpLock
) -> None:
    before = shown(run, netns)

    prior = take(netns, lock, some(4, 6))
    put_back(netns, lock, some(4, 6), prior)

    assert prior == Prior()
    assert shown(run, netns) == before
    with entered(netns), open("/proc/thread-self/net/ip_tables_names") as names:
        assert names.read() == ""


def test_a_process_lock_leaves_the_chain_of_a_namespace_alone(netns: str, run: Run) -> None:
    run(netns, "iptables-nft-restore", "--noflush", stdin=WHOLE)
    before = shown(run, netns)

    take(netns, IPTABLES, some(4))

    assert shown(run, netns) == before


def test_without_iptables_the_lock_is_refused_beforehand(
    netns: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_with_iptables(run, netns, "nft", some(4))
    monkeypatch.setattr(criu_lock, "_PATH", "/nonexistent")

    with pytest.raises(KernelError, match="no iptables-nft-save") as raised:
        take(netns, IPTABLES, some(4))

    assert raised.value.hint is not None


def test_when_the_second_family_fails_the_first_is_locked_again(
    netns: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that failed has changed nothing."""
    lock_with_iptables(run, netns, "nft", some(4, 6))
    before = shown(run, netns)
    usual = criu_lock._restore

    def fail(variant: criu_lock.Variant, lines: tuple[str, ...]) -> None:
        if variant[1] == 6:
            raise KernelError("told to fail")
        usual(variant, lines)

    monkeypatch.setattr(criu_lock, "_restore", fail)
    with pytest.raises(KernelError, match="told to fail"):
        take(netns, IPTABLES, some(4, 6))

    assert {k: sorted(v.splitlines()) for k, v in shown(run, netns).items() if k != "nft"} == {
        k: sorted(v.splitlines()) for k, v in before.items() if k != "nft"
    }


# ---- CRIU itself -------------------------------------------------------------------------


def tables(host: Host) -> str:
    text = host.run("nft", "--stateless", "list", "ruleset").stdout
    return text + host.run("iptables-legacy-save").stdout


@pytest.mark.criu
@pytest.mark.lab
@pytest.mark.parametrize("method", ["nftables", "iptables"])
@pytest.mark.parametrize(("family", "listen"), [(4, None), (6, None), (4, "[::]:5000")])
def test_what_criu_itself_left_is_found_whole(method: str, family: int, listen: str | None) -> None:
    """Also of an IPv4 connection that an IPv6 socket has."""
    with Lab("lock", engine="criu", family=family) as lab:
        lab.begin(connections=2, listen=listen)
        source, images = lab.topology["source"], Path(lab.directory) / "images"
        images.mkdir()
        dump = f"dump --images-dir {images} --tree {lab.traffic.server.pid} --tcp-established"
        source.run(str(lab.engine.binary), *dump.split(), "--network-lock", method)
        checkpoint = read_checkpoint(images)
        assert checkpoint.lock is not None
        assert not checkpoint.lock.whole
        locked = tables(source)
        assert "0x0000c114" in locked

        prior = take(source.name, checkpoint.lock, checkpoint.connections)

        assert "c114" not in tables(source)
        assert "CRIU" not in tables(source)
        put_back(source.name, checkpoint.lock, checkpoint.connections, prior)
        assert _sorted(tables(source)) == _sorted(locked)


def _sorted(text: str) -> list[str]:
    """The lines of a ruleset; the order of set elements and of equal drops means nothing."""
    return sorted(re.findall(r"[^\s,{}=]+", text))


@pytest.mark.criu
@pytest.mark.lab
@pytest.mark.parametrize("method", ["nftables", "iptables"])
def test_what_criu_left_of_a_whole_namespace_is_found_whole(method: str) -> None:
    """CRIU runs in another network namespace than the process, as under a container engine."""
    with Lab("lock", engine="criu") as lab:
        lab.begin()
        source, images = lab.topology["source"], Path(lab.directory) / "images"
        images.mkdir()
        dump = f"dump --images-dir {images} --tree {lab.traffic.server.pid} --tcp-established"
        command = [str(lab.engine.binary), *dump.split(), "--network-lock", method]
        run_beside(source, command)
        checkpoint = read_checkpoint(images)
        assert checkpoint.lock is not None
        assert checkpoint.lock.whole
        locked = tables(source)
        assert "CRIU" in locked

        prior = take(source.name, checkpoint.lock, checkpoint.connections)

        assert "CRIU" not in tables(source)
        put_back(source.name, checkpoint.lock, checkpoint.connections, prior)
        assert _sorted(tables(source)) == _sorted(locked)


def run_beside(host: Host, command: list[str]) -> None:
    """In the host's pid and mount namespaces, and the network namespace of this test."""
    line = ["nsenter", "--target", str(host.init_pid), "--pid", "--mount", "--", *command]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_table_that_can_hold_no_others_is_not_read(
    netns: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that the dump had is kept; the kernel would take seconds for many connections."""
    lock_process(run, netns, TABLE, some(4, 6))
    monkeypatch.setattr(criu_lock.nftables_dump, "read_keys", lambda *_: pytest.fail("it is read"))

    take(netns, DumpLock(NetworkLock.NFTABLES, RUN, connections=4), some(4, 6))

    assert shown(run, netns)["nft"] == ""
