"""the tests of natkeep beside other programs' tables, at their real priorities (neighbours/).

With each of them in place at gateway and destination, connections are kept through a move, the
wires stay pure, and what is theirs is byte-identical, handles included, after prepare, open and
teardown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from string import Template

import pytest

from natkeep.lab.application import all_in
from natkeep.lab.host import Host
from natkeep.lab.lab import Lab
from natkeep.lab.scenario import perform
from natkeep.lab.topology import DESTINATION, address
from natkeep.lab.traffic_words import PORT
from natkeep.plan.tuples import Endpoint

pytestmark = [pytest.mark.root, pytest.mark.lab]

TEXTS = Path(__file__).with_name("neighbours")
SITES = ("gateway", "destination")
WORDS = {  # the addresses that other programs give to what they run
    4: {
        "IP": "ip", "ADDR": "ipv4_addr", "CONTAINERS": "10.88.0.0/16", "CONTAINER": "10.88.0.2",
        "CONTAINER_ENDPOINT": "10.88.0.2:80", "LOOPBACK": "127.0.0.0/8",
        "MULTICAST": "224.0.0.0/4", "SERVICE": "10.96.0.10", "EMPTY_SERVICE": "10.96.0.99",
        "SERVICES": "10.96.0.0/12",
    },
    6: {
        "IP": "ip6", "ADDR": "ipv6_addr", "CONTAINERS": "fd00:88::/64", "CONTAINER": "fd00:88::2",
        "CONTAINER_ENDPOINT": "[fd00:88::2]:80", "LOOPBACK": "::1", "MULTICAST": "ff00::/8",
        "SERVICE": "fd00:96::10", "EMPTY_SERVICE": "fd00:96::99", "SERVICES": "fd00:96::/108",
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another program's ruleset: its text, and whose command loads it."""

    text: str
    loader: str = "nft"

    def __str__(self) -> str:
        return f"{self.text.partition('.')[0]} by {self.loader}"

    def load(self, lab: Lab, host: Host) -> None:
        if self.loader == "nft":
            host.nft(fill(lab, self.text))
        else:
            command = self.loader.replace("ip", "ip6" if lab.family == 6 else "ip", 1)
            host.run(f"{command}-restore", text_in=fill(lab, self.text))


NETAVARK, FIREWALLD = Neighbour("netavark.nft"), Neighbour("firewalld.nft")
DOCKER = Neighbour("docker.rules", "iptables-nft")
DOCKER_LEGACY = Neighbour("docker.rules", "iptables-legacy")
KUBE_PROXY = Neighbour("kube-proxy.nft")
KUBE_IPTABLES = Neighbour("kube-proxy.rules", "iptables-nft")
KUBE_LEGACY = Neighbour("kube-proxy.rules", "iptables-legacy")
BESIDE = [  # whose, IP version, mode: everybody in both modes and in both families
    (NETAVARK, 4, "stateful"),
    (NETAVARK, 6, "stateless"),
    (DOCKER, 6, "stateful"),
    (DOCKER, 4, "stateless"),
    (DOCKER_LEGACY, 4, "stateful"),
    (DOCKER_LEGACY, 6, "stateless"),
    (FIREWALLD, 6, "stateful"),
    (FIREWALLD, 4, "stateless"),
    (KUBE_PROXY, 4, "stateful"),
    (KUBE_PROXY, 6, "stateless"),
    (KUBE_IPTABLES, 6, "stateful"),
    (KUBE_IPTABLES, 4, "stateless"),
    (KUBE_LEGACY, 4, "stateful"),
    (KUBE_LEGACY, 6, "stateless"),
]


def fill(lab: Lab, name: str) -> str:
    """The text of that name, with the addresses of *lab*."""
    lab.settle()
    return Template((TEXTS / name).read_text()).substitute(
        WORDS[lab.family],
        OLD=lab.old, OLD_ENDPOINT=Endpoint(lab.old, PORT), NEW=DESTINATION.address(lab.family),
        GATEWAY=address("near", 1, lab.family), PORT=PORT,
    )  # fmt: skip


def settle_beside(lab: Lab, neighbour: Neighbour) -> None:
    """The neighbour's tables at gateway and destination."""
    for role in SITES:
        neighbour.load(lab, lab.topology[role])


def read_theirs(host: Host, *, handles: bool = True) -> str:
    """Everything in netfilter that is not natkeep's, without what counters count."""
    flags = "-as" if handles else "-s"
    listed = [line.split() for line in host.run("nft", "list", "tables").stdout.splitlines()]
    looks = [f"nft {flags} list {' '.join(words)}" for words in listed if words[-1] != "natkeep"]
    looks += [f"ip{six}tables-{kind}-save" for six in ("", "6") for kind in ("nft", "legacy")]
    shown = host.run("sh", "-ec", "\n".join(looks)).stdout
    lines = [line for line in shown.splitlines() if not line.startswith("#")]
    return "\n".join(re.sub(r"\[\d+:\d+\]", "", line) for line in lines)


class Witness:
    """Asserts, in the report of *lab*, that what is others' is still as it was at the beginning."""

    def __init__(self, lab: Lab, *, handles: bool = True) -> None:
        self.lab, self.handles = lab, handles
        self.before = self._read()
        assert all(self.before.values())

    def _read(self) -> dict[str, str]:
        return {role: read_theirs(self.lab.topology[role], handles=self.handles) for role in SITES}

    def compare(self, when: str) -> None:
        for role, text in self._read().items():
            old, new = self.before[role].splitlines(), text.splitlines()
            changed = f"gone {sorted(set(old) - set(new))}, new {sorted(set(new) - set(old))}"
            name = f"others' tables at the {role} are byte-identical after {when}"
            self.lab.report.check(name, old == new, "" if old == new else changed)


def move(lab: Lab, witness: Witness) -> None:
    """The usual order, with a look at others' tables after each step."""
    lab.freeze()
    lab.prepare()
    witness.compare("prepare")
    lab.restore()
    witness.compare("open")


def end(lab: Lab, witness: Witness) -> None:
    lab.traffic.talk_on()
    lab.traffic.quiet()
    lab.traffic.server_says()
    lab.traffic.client_says()
    lab.finish()
    witness.compare("teardown")


def failures(lab: Lab) -> list[str]:
    assert lab.report.assertions
    return [str(each) for each in lab.report.assertions if not each.ok]


def tell(
    story: Callable[[Lab], None], family: int, mode: str = "stateful", translator: str = "natkeep"
) -> Lab:
    """A lab in which *story* has been told."""
    with Lab(
        "coexistence", engine="repair", family=family, mode=mode, translator=translator
    ) as lab:
        perform(lab, story)
    return lab


def move_beside(neighbour: Neighbour, lab: Lab) -> None:
    settle_beside(lab, neighbour)
    lab.begin(connections=3)
    witness = Witness(lab)
    move(lab, witness)
    end(lab, witness)


@pytest.mark.parametrize(("neighbour", "family", "mode"), BESIDE, ids=str)
def test_connections_are_kept_beside_others_tables_which_stay_as_they_are(neighbour, family, mode):
    lab = tell(partial(move_beside, neighbour), family, mode)

    assert failures(lab) == []
    witnessed = [each for each in lab.report.assertions if "byte-identical after" in each.name]
    assert len(witnessed) == len(SITES) * 3  # the story was told to its end


@pytest.mark.parametrize("neighbour", [FIREWALLD, KUBE_PROXY], ids=str)
def test_rules_written_by_hand_lose_them_there(neighbour):
    """The story can fail: these stand at -100 and 100, and know nothing of conntrack."""
    lab = tell(partial(move_beside, neighbour), 4, translator="naive")

    assert any("carry on" in each for each in failures(lab))


def half_closed_beside(neighbour: Neighbour, lab: Lab) -> None:
    settle_beside(lab, neighbour)
    lab.begin(connections=3)
    lab.traffic.quiet()
    lab.traffic.client_closes()
    witness = Witness(lab)
    move(lab, witness)
    lab.traffic.server_says()
    lab.traffic.server_closes()
    lab.traffic.client.wait(all_in("done", 3), "both ways closed")
    lab.finish()
    witness.compare("teardown")


@pytest.mark.parametrize(
    ("neighbour", "family", "mode"),
    [
        (FIREWALLD, 6, "stateful"),
        (FIREWALLD, 6, "stateless"),
        (KUBE_PROXY, 4, "stateful"),
        (KUBE_IPTABLES, 4, "stateless"),
    ],
    ids=str,
)
def test_half_closed_sockets_come_back_beside_them(neighbour, family, mode):
    """The forged FIN passes lo: firewalld asks for its way back, and kube-proxy's mark is in it."""
    lab = tell(partial(half_closed_beside, neighbour), family, mode)

    assert failures(lab) == []


def dial_service(lab: Lab, connections: int) -> None:
    """The client dials the service's own address."""
    service = Endpoint(ip_address(WORDS[lab.family]["SERVICE"]), 80)
    lab.traffic.dial_one_by_one(lab.topology["client"], service, connections)


def service_moves(neighbour: Neighbour, lab: Lab) -> None:
    settle_beside(lab, neighbour)
    lab.serve()
    dial_service(lab, 3)
    lab.traffic.talk()
    assert {each.source.address for each in lab.traffic.views.values()} == {
        address("old", 1, lab.family)
    }
    witness = Witness(lab)
    move(lab, witness)
    end(lab, witness)


@pytest.mark.parametrize(
    ("neighbour", "family"),
    [(KUBE_PROXY, 4), (KUBE_PROXY, 6), (KUBE_IPTABLES, 4), (KUBE_LEGACY, 6)],
    ids=str,
)
def test_connections_to_a_masqueraded_service_are_kept(neighbour, family):
    """kube-proxy at the gateway turns the service into OLD, and the peer into itself."""
    lab = tell(partial(service_moves, neighbour), family)

    assert failures(lab) == []


@pytest.mark.parametrize("neighbour", [KUBE_PROXY, KUBE_LEGACY], ids=str)
def test_without_conntrack_they_are_refused_beforehand(neighbour):
    lab = tell(partial(service_moves, neighbour), 4, "stateless")

    assert "conntrack's work" in lab.refused


def reload_firewalld(lab: Lab) -> None:
    """What firewalld does: its table goes and comes back, behind a drop of all that is new."""
    for role in SITES:
        host = lab.topology[role]
        host.nft(fill(lab, "firewalld-reload.nft"))
        host.nft("delete table inet firewalld\n" + fill(lab, "firewalld.nft"))
        host.nft("delete table inet firewalld_policy_drop\n")


def move_amid_reloads(lab: Lab) -> None:
    settle_beside(lab, FIREWALLD)
    lab.begin(connections=3)
    witness = Witness(lab, handles=False)
    reload_firewalld(lab)
    lab.freeze()
    reload_firewalld(lab)
    lab.prepare()
    reload_firewalld(lab)
    witness.compare("prepare")
    lab.restore()
    for _ in range(3):
        reload_firewalld(lab)
        lab.traffic.talk_on()
    witness.compare("open")
    end(lab, witness)


@pytest.mark.parametrize(("family", "mode"), [(4, "stateful"), (6, "stateless")])
def test_firewalld_may_reload_at_any_time(family, mode):
    lab = tell(move_amid_reloads, family, mode)

    # Its rules have new handles, which the lab's own look at both sites takes for a change.
    left = [each for each in failures(lab) if "FAIL teardown leaves the" not in each]
    assert left == []
    assert "FAIL teardown leaves the gateway" in "".join(failures(lab))


def test_a_change_of_others_tables_is_found():
    """The comparison can fail: by a rule, by a handle alone, and in iptables-legacy."""
    changes = (
        "nft add rule inet firewalld filter_INPUT accept",
        "nft flush chain inet firewalld mangle_PREROUTING_ZONES;"
        " for each in eth0 near; do nft add rule inet firewalld mangle_PREROUTING_ZONES"
        ' iifname "$each" return; done',
        "iptables-legacy -A INPUT -j ACCEPT",
    )

    def story(lab: Lab) -> None:
        settle_beside(lab, FIREWALLD)
        for change in changes:
            witness = Witness(lab)
            lab.topology["gateway"].run("sh", "-ec", change)
            witness.compare("a change")

    found = tell(story, 4).report.assertions

    assert [each.ok for each in found if "byte-identical after" in each.name] == [False, True] * 3
