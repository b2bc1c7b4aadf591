"""lab hosts: what they can reach, what they may not say, and that nothing of them stays."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from natkeep.lab import topology
from natkeep.lab.host import NAMES, Host, LabError, await_true
from natkeep.lab.topology import DESTINATION, SOURCE, THIRD, USUAL, Seat, Topology

pytestmark = [pytest.mark.root, pytest.mark.lab]

HELLO = """
import socket, sys
with socket.create_server(("::", 7000), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
    open(sys.argv[1], "w").close()
    while True:
        listener.accept()[0].close()
"""
DIAL = "import socket, sys; socket.create_connection((sys.argv[1], 7000), 3).close()"


def namespaces(lab: Topology) -> list[Path]:
    return namespaces_of(lab.hex)


def namespaces_of(hex_: str) -> list[Path]:
    return sorted(NAMES.glob(f"{topology.PREFIX}{hex_}-*"))


def test_client_reaches_every_host_through_the_gateway_in_both_families():
    with Topology([*USUAL, THIRD]) as lab:
        for seat in (SOURCE, DESTINATION, THIRD):
            ready = lab.directory / f"{seat.role}.ready"
            lab[seat.role].start("hello", sys.executable, "-c", HELLO, str(ready))
            await_true(ready.exists, "the listener")
            for family in (4, 6):
                lab["client"].run(sys.executable, "-c", DIAL, str(seat.address(family)))


def test_no_port_of_the_switch_waits_for_its_carrier():
    """A veth whose peer has its own index is brought up as much as a second late, now and then."""
    with Topology() as lab:
        links = lab["switch"].run("ip", "-json", "link", "show", "type", "veth").stdout
        indexes = [(each["ifindex"], each["link_index"]) for each in json.loads(links)]

    assert len(indexes) == 6
    assert all(mine != peers for mine, peers in indexes)


def test_a_lab_is_made_and_forwards_in_half_a_second():
    """One may have to wait for what else the machine does, three of five do not."""
    made, forwarded = [], []
    for _ in range(5):
        began = time.monotonic()
        with Topology() as lab:
            made.append(time.monotonic() - began)

            def forwarding(switch: Host = lab["switch"]) -> bool:
                states = switch.run("bridge", "link").stdout
                return states.count("state forwarding") == states.count("master")

            await_true(forwarding, "all ports to forward")
            forwarded.append(time.monotonic() - began - made[-1])

    assert statistics.median(made) < 0.5
    assert statistics.median(forwarded) < 0.5


def test_nothing_is_left_after_an_exception():
    with pytest.raises(RuntimeError), Topology() as lab:  # noqa: PT012 # both are the subject
        assert len(namespaces(lab)) == 5
        raise RuntimeError

    assert namespaces(lab) == []
    assert not lab.directory.exists()
    assert not (topology.LOCKS / lab.hex).exists()


def test_a_lab_runs_on_one_processor_and_gives_the_others_back():
    usual = os.sched_getaffinity(0)
    with Topology() as lab:
        (processor,) = os.sched_getaffinity(0)
        assert lab["client"].run("nproc").stdout.strip() == "1"

    assert os.sched_getaffinity(0) == usual
    assert processor in usual


def test_several_labs_at_once_do_not_meet():
    with Topology() as one, Topology() as other:
        assert one.hex != other.hex
        assert len(namespaces(one)) == len(namespaces(other)) == 5
    assert namespaces(one) == namespaces(other) == []


def test_nothing_is_left_when_a_host_cannot_be_made():
    lab = Topology([Seat("client", "near", 2), Seat("broken", "near", 3, first_pid=2**31 - 1)])
    with pytest.raises(LabError, match="broken"):
        lab.__enter__()

    assert namespaces(lab) == []


def test_what_is_deferred_runs_last_in_first_out_and_before_the_hosts_go():
    seen = []
    with Topology() as lab:
        lab.defer(lambda: seen.append(len(namespaces(lab))))
        lab.defer(seen.append, "first")

    assert seen == ["first", 5]


def test_processes_of_a_host_have_its_own_pids_and_end_with_it():
    with Topology() as lab:
        source = lab["source"]
        program = source.start("sleeper", "sleep", "1000")

        assert program.pid >= SOURCE.first_pid
        assert source.alive(program.pid)
        assert not lab["destination"].alive(program.pid)

    assert program.process.wait(5) != 0


def test_descriptors_of_a_program_belong_to_its_host():
    """CRIU cannot dump a descriptor of the mount namespace outside."""
    with Topology() as lab:
        source = lab["source"]
        program = source.start("sleeper", "sleep", "1000")
        mounts = source.run("cut", "-d", " ", "-f1", "/proc/1/mountinfo").stdout.split()
        for number in ("0", "1", "2"):
            info = source.run("cat", f"/proc/{program.pid}/fdinfo/{number}").stdout
            fields = dict(line.split(":\t") for line in info.splitlines())

            assert fields["mnt_id"].strip() in mounts


def test_init_reaps_orphans():
    with Topology() as lab:
        lab["client"].run("sh", "-c", "sh -c 'sleep 0.05 & echo $!' ")

        def zombies() -> str:
            return lab["client"].run("ps", "-o", "stat=", "-A").stdout

        await_true(lambda: "sleep" not in zombies() and "Z" not in zombies(), "orphans to go")


SPOOFS = {
    "IPv4": "Ether(dst='ff:ff:ff:ff:ff:ff')/IP(src='10.2.0.10', dst='10.1.0.2')/UDP()",
    "IPv6": "Ether(dst='ff:ff:ff:ff:ff:ff')/IPv6(src='fd00:2::10', dst='fd00:1::2')/UDP()",
    "ARP request": "Ether(dst='ff:ff:ff:ff:ff:ff')/ARP(psrc='10.2.0.10', pdst='10.3.0.1')",
    "ARP reply": "Ether(dst='ff:ff:ff:ff:ff:ff')/ARP(op=2, psrc='10.2.0.10', pdst='10.3.0.1')",
    "neighbour advertisement": "Ether(dst='33:33:00:00:00:01')/IPv6(src='fd00:3::20',"
    " dst='ff02::1')/ICMPv6ND_NA(tgt='fd00:2::10')",
    "neighbour solicitation": "Ether(dst='33:33:00:00:00:01')/IPv6(src='fd00:3::20',"
    " dst='ff02::1')/ICMPv6ND_NS(tgt='fd00:2::10')",
}


def test_anti_spoof_filter_drops_every_kind_of_frame_that_says_old():
    frames = ", ".join(SPOOFS.values())
    script = (
        "from scapy.layers.l2 import *; from scapy.layers.inet import *;"
        "from scapy.layers.inet6 import *; from scapy.sendrecv import sendp;"
        f"sendp([{frames}], iface='eth0', verbose=False)"
    )
    honest = "Ether(dst='ff:ff:ff:ff:ff:ff')/IP(src='10.3.0.20', dst='10.1.0.2')/UDP()"
    with Topology() as lab:
        lab["destination"].run(sys.executable, "-c", script)
        counter = ["nft", "list", "counter", "netdev", "antispoof", "spoofed"]

        assert f"packets {len(SPOOFS)} " in lab["switch"].run(*counter).stdout

        lab["destination"].run(sys.executable, "-c", script.replace(frames, honest))

        assert f"packets {len(SPOOFS)} " in lab["switch"].run(*counter).stdout


def test_sweep_removes_labs_of_the_dead_and_leaves_those_of_the_living():
    script = (
        "from natkeep.lab.topology import Topology\n"
        "lab = Topology().__enter__()\n"
        "lab['client'].start('sleeper', 'sleep', '1000')\n"
        "print(lab.hex, flush=True)\n"
        "input()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(topology.__file__).parents[2])}
    owner = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert owner.stdout is not None
    dead = owner.stdout.readline().strip()
    with Topology() as living:

        def count() -> tuple[int, int]:
            return tuple(len(namespaces_of(each)) for each in (dead, living.hex))

        topology.sweep()
        assert count() == (5, 5)
        owner.send_signal(signal.SIGKILL)
        owner.communicate()

        topology.sweep()  # unless another lab that begins just now has done it

        assert count() == (0, 5)
    assert not (topology.LOCKS / dead).exists()
