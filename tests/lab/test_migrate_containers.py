"""natkeep migrate of containers: where their sites are, and who translates for their peers."""

from __future__ import annotations

import json

import pytest

from natkeep.lab import lab as labs
from natkeep.lab import scenario
from natkeep.lab.engines import runc
from natkeep.lab.engines.criu import find_criu
from natkeep.lab.host import Host
from natkeep.lab.lab import Lab
from natkeep.lab.relay import ByRelay
from natkeep.lab.ssh import ContainerMachines, Machines

pytestmark = [
    pytest.mark.root, pytest.mark.lab, pytest.mark.criu, pytest.mark.needs("sshd", "runc")
]  # fmt: skip


def move(
    *options: str, kind: type[ContainerMachines] = ContainerMachines, relay: bool = False
) -> str:
    """What `natkeep migrate` said of a container of runc, whose connections were kept."""
    said = list[str]()

    def whole(lab: Lab) -> None:
        by = ByRelay(lab) if relay else None
        if by:
            by.stand()
        machines = kind(lab, "source", "destination", controller="gateway")
        lab.begin(connections=3)
        said.append(machines.migrate(*options))
        if by:
            by.note_wires(machines.status("source"))
        machines.finish()
        lab.conclude()

    with Lab("containers", engine="runc") as lab:
        scenario.perform(lab, whole)
    assert [str(each) for each in lab.report.assertions if not each.ok] == []
    return said[0]


def test_a_container_goes_on_as_a_relay():
    """In its own network namespace, which outlives it."""
    assert "as a relay from 10.2.0.11" in move("--via", "relay", relay=True)


@pytest.mark.parametrize("end", ["source", "destination"])
def test_the_host_of_a_container_is_its_gateway(end: str):
    """Two moves at one host: in the container's network namespace, and beside it."""
    assert f"{end} translates, as the gateway" in move("--via", end)


class InHostNetwork(runc.Runc):
    """A container without a network namespace of its own."""

    def _bundle(self, host: Host, name: str, configuration: str) -> None:
        super()._bundle(host, name, configuration)
        file = runc._bundle_of(host, name) / "config.json"
        spec = json.loads(file.read_text())
        kinds = [each for each in spec["linux"]["namespaces"] if each["type"] != "network"]
        spec["linux"]["namespaces"] = kinds
        file.write_text(json.dumps(spec))


class HostMachines(ContainerMachines):
    """Machines with a container in their own network namespace, as sshd is."""

    _place, _enter = Machines._place, Machines._enter


def enter(host: Host, *argv: str) -> list[str]:
    """*argv*, made to run in all of *host*."""
    return host.command(*argv)


def test_a_container_with_its_host_network_moves(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runc, "inside", enter)
    monkeypatch.setattr(labs, "choose_engine", lambda name, probe: InHostNetwork(find_criu()))
    assert "3 of 3 peers were heard" in move(kind=HostMachines)
