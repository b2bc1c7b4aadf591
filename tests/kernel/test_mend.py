"""mending on the real kernel: what others break is put back as it was, and nothing else is touched.

A real namespace, the tools that people really use, and the ruleset compared as nft prints it: so
that a rule that comes back in another place, or twice, is seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address

import pytest

from natkeep.kernel import nftables_dump
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netlink import Netlink
from natkeep.plan.base_chains import heard_set, spoken_set
from natkeep.plan.drift import find_drift
from natkeep.plan.liveness import Life
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.repair import find_patches
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import FillSet, OpenGate, Plan
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.values import replace

pytestmark = pytest.mark.root

OLD, NEW = {4: "10.2.0.10", 6: "fd00:2::10"}, {4: "10.3.0.20", 6: "fd00:3::20"}
PEER = {4: "10.1.0.2", 6: "[fd00:1::2]"}


def kept(version: int) -> Connections:
    local = OLD[4] if version == 4 else f"[{OLD[6]}]"
    return Connections.of(
        FourTuple(Endpoint.parse(f"{PEER[version]}:{port}"), Endpoint.parse(f"{local}:80"))
        for port in range(5000, 5020)
    )


@dataclass
class Stage:
    """A prepared and opened move at one site, all of whose connections live."""

    kernel: LinuxKernel
    netns: str
    plan: Plan
    run: Callable[..., str]

    @property
    def site(self) -> Site:
        return self.plan.move.sites[0]

    @property
    def life(self) -> Life:
        [translation] = self.plan.translations
        return Life(True, translation.kept)

    def sh(self, script: str) -> None:
        self.run(self.netns, "sh", "-ec", script)

    def ruleset(self) -> str:
        # Sets are hashes, and those that are made again may come behind others: sorted blocks.
        text = self.run(self.netns, "nft", "list", "ruleset")
        blocks = re.split(r"\n(?=\t(?:chain|set|map) |table )", text)
        return "\n".join(sorted(" ".join(block.split(" }\n")[0].split()) for block in blocks))

    def picture(self) -> tuple[str, str]:
        return self.ruleset(), self.run(self.netns, "ip", "-j", "address")

    def entries(self) -> set[str]:
        listed = self.run(self.netns, "conntrack", "-L", "-f", f"ipv{self.version}", "-o", "id")
        return set(re.findall(r"id=(\d+)", listed))

    @property
    def version(self) -> int:
        return self.plan.move.maps[0].old.version

    def drift(self) -> tuple[str, ...]:
        seen = self.kernel.observe(self.site, self.plan)
        return find_drift(self.plan, self.site, seen, self.life, opened=True)

    def mend(self) -> list[str]:
        seen = self.kernel.observe(self.site, self.plan)
        found = [*find_patches(self.plan, self.site, seen, self.life, opened=True)]
        for _, patch in found:
            self.kernel.mend(patch, lambda prior: None)
        return [type(patch).__name__ for _, patch in found]


@pytest.fixture
def stage(
    make_site: Callable[[], str], run: Callable[..., str]
) -> Callable[[Role, Mode, int], Stage]:
    def make(role: Role, mode: Mode, version: int) -> Stage:
        netns = make_site()
        map_ = Map(ip_address(OLD[version]), ip_address(NEW[version]))
        listeners = (Endpoint(map_.old, 8080),)
        plan = make_plan(Move("web", (map_,), (Site(role, netns),), mode, listeners), kept(version))
        kernel = LinuxKernel()
        kernel.open_sites(plan.move.sites)
        for step in plan.steps:
            if isinstance(step, OpenGate) or step in plan.prepare:
                kernel.apply(step, lambda prior: None)
        # As packets note it: a repair takes all for heard.
        noted = heard_set if role == Role.DESTINATION else spoken_set
        heard = FillSet(plan.move.sites[0], noted("web", 0), kept(version))
        kernel.mend(heard, lambda prior: None)
        return Stage(kernel, netns, plan, run)

    return make


BREAKAGES = {
    "flush ruleset": "nft flush ruleset",
    "our table deleted": "nft delete table inet natkeep",
    "conntrack -F": "conntrack -F",
    "our elements deleted": "nft flush set inet natkeep kept-web-0",
    "some elements deleted": "nft delete element inet natkeep kept-web-0 '{ PEER . 5003 . 80 }'",
    "the accept and the drop deleted": "nft flush chain inet natkeep gate-web",
    "the callers' accept deleted": "nft flush chain inet natkeep callers-web",
    "a port deleted": "nft delete element inet natkeep listen-web-0 '{ 8080 }'",
    "the gate's dispatch deleted": "nft delete element inet natkeep gateV '{ BEFORE }'",
    "the gate's base chain flushed": "nft flush chain inet natkeep gate",
    "CRIU's mark no longer let through": (
        "nft delete rule inet natkeep gate handle $(nft -a list chain inet natkeep gate | "
        "sed -n 's/.*notrack accept # handle //p')"
    ),
    "one entry deleted": "conntrack -D -p tcp --orig-port-src 5004",
    "rules at the local address flushed": (
        "nft flush chain inet natkeep gate-at-$(echo BEFORE | tr : _)"
    ),
}
AT_DESTINATION = {
    "who may not leave forgotten": "nft flush chain inet natkeep leaving",
    "OLD removed from lo": "ip address del OLD dev lo",
    "lo down": "ip link set lo down",
    "ARP no longer silent": "nft delete table arp natkeep",
    "resets of peers not heard let in": "nft flush chain inet natkeep early-resets",
    "rules for what peers say flushed": (
        "nft flush chain inet natkeep heard-at-$(echo BEFORE | tr : _)"
    ),
    "OLD no longer silent": "nft flush set inet natkeep heldV",
}
CASES = [
    *((name, role) for role in (Role.GATEWAY, Role.DESTINATION) for name in BREAKAGES),
    *((name, Role.DESTINATION) for name in AT_DESTINATION),
]
FAMILIES = [(Mode.STATEFUL, 4), (Mode.STATELESS, 6)]


@pytest.mark.parametrize(("mode", "version"), FAMILIES)
@pytest.mark.parametrize(("name", "role"), CASES, ids=[f"{n}-{r}" for n, r in CASES])
def test_what_others_break_is_named_and_put_back_as_it_was(
    stage: Callable[..., Stage], name: str, role: Role, mode: Mode, version: int
) -> None:
    here = stage(role, mode, version)
    script = (BREAKAGES | AT_DESTINATION)[name]
    before = OLD if role == Role.GATEWAY else NEW
    for word, meaning in (
        ("PEER", PEER[version].strip("[]")), ("BEFORE", before[version]), ("V", str(version)),
        ("OLD", f"{OLD[version]}/{32 if version == 4 else 128}"),
    ):  # fmt: skip
        script = script.replace(word, meaning)
    assert here.drift() == ()
    assert here.mend() == []
    whole, entries = here.picture(), here.entries()

    here.sh(script)
    broken, kept_entries = here.drift(), here.entries()
    mended = here.mend()

    assert broken
    assert mended
    assert here.drift() == ()
    assert here.mend() == []
    assert here.ruleset() == whole[0]
    if name != "lo down":  # which gives lo its own addresses back in another order
        assert here.picture() == whole
    assert kept_entries <= here.entries()  # those that were there are still the same ones
    assert len(here.entries()) == len(entries)


@pytest.mark.parametrize(("mode", "version"), FAMILIES)
def test_a_base_chain_that_goes_between_two_dumps_is_not_missed_by_an_open_move(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, mode: Mode, version: int
) -> None:
    here, request, left = stage(Role.GATEWAY, mode, version), nftables_dump._request, ["gate"]

    def request_late(netlink: Netlink, type_: int, *scope: object) -> object:
        if type_ == nftables_dump.GETRULE and left:
            here.sh(f"nft delete chain inet natkeep {left.pop()}")
        return request(netlink, type_, *scope)

    monkeypatch.setattr(nftables_dump, "_request", request_late)

    assert here.drift() == ()
    assert left == []
    assert here.drift() == ()


MASKED, CARRIED = (
    kept(4),
    Connections.of(
        FourTuple(Endpoint.parse(f"10.1.0.3:{port}"), Endpoint.parse("10.9.0.1:8080"))
        for port in range(6000, 6020)
    ),
)
"""Of a gateway that masquerades and publishes: as the process sees them, and as they arrive."""
WITHOUT_ENTRY = {
    "a map emptied": "nft flush map inet natkeep to-outer-web-0",
    "one of a map's elements deleted": (
        "nft delete element inet natkeep to-inner-web-0 '{ 10.1.0.3 . 6004 . 80 }'"
    ),
    "a set emptied": "nft flush set inet natkeep routed-web-0",
    "the peers' rules deleted": "nft flush chain inet natkeep from-at-10.3.0.20; "
    "nft flush chain inet natkeep invalid-to-at-10.3.0.20",
    "the last drop deleted": "nft flush chain inet natkeep to-at-10.9.0.1",
    "what is rewritten deleted": "nft flush chain inet natkeep invalid-in-at-10.9.0.1",
    "base chains flushed": "nft flush chain inet natkeep peer-outbound; "
    "nft flush chain inet natkeep invalid-local-inbound",
}


@pytest.fixture
def carrying(make_site: Callable[[], str], run: Callable[..., str]) -> Stage:
    """A move at a gateway that masquerades and publishes."""
    netns = make_site()
    move = Move("web", (Map(ip_address(OLD[4]), ip_address(NEW[4])),), (Site(Role.GATEWAY, netns),))
    plan = make_plan(move, MASKED, Surroundings(carried=MASKED, carriers=CARRIED))
    kernel = LinuxKernel()
    kernel.open_sites(plan.move.sites)
    for step in plan.steps:
        kernel.apply(step, lambda prior: None)
    return Stage(kernel, netns, plan, run)


@pytest.mark.parametrize("name", WITHOUT_ENTRY)
def test_what_carries_connections_without_entries_is_named_and_put_back(
    carrying: Stage, name: str
) -> None:
    assert carrying.drift() == ()
    whole = carrying.ruleset()

    carrying.sh(WITHOUT_ENTRY[name])
    assert carrying.drift()
    assert carrying.mend()

    assert carrying.drift() == ()
    assert carrying.ruleset() == whole


def test_maps_go_with_their_move_also_where_its_journal_is_lost(carrying: Stage) -> None:
    carrying.kernel.clear_strays(carrying.site, frozenset({"web"}), frozenset(), sure=True)
    assert carrying.drift() == ()

    other = make_plan(replace(carrying.plan.move, id="other"), kept(4).toward(ip_address(OLD[4])))
    for step in other.prepare:
        carrying.kernel.apply(step, lambda prior: None)
    carrying.kernel.clear_strays(carrying.site, frozenset({"other"}), frozenset(), sure=True)

    assert "web" not in carrying.ruleset()
    assert "to-inner" not in carrying.ruleset()


def test_a_counter_of_somebody_who_was_not_touched_goes_on(stage: Callable[..., Stage]) -> None:
    """Only what is missing is made: a rule beside it keeps its handle."""
    here = stage(Role.DESTINATION, Mode.STATEFUL, 4)
    handles = "nft -a list ruleset | grep -o 'handle [0-9]*' | sort"
    before = set(here.run(here.netns, "sh", "-c", handles).split("\n"))

    here.sh("nft flush chain inet natkeep out-at-10.2.0.10")
    lost = before - set(here.run(here.netns, "sh", "-c", handles).split("\n"))
    here.mend()

    assert len(lost) == 1
    assert before - lost <= set(here.run(here.netns, "sh", "-c", handles).split("\n"))


def test_an_entry_that_was_picked_up_the_other_way_round_translates(
    stage: Callable[..., Stage],
) -> None:
    """After `conntrack -F` the process spoke first: the rules made the entry from its side."""
    here = stage(Role.GATEWAY, Mode.STATEFUL, 4)
    here.sh(
        "conntrack -D -p tcp --orig-port-src 5004; "
        "conntrack -I -p tcp -s 10.3.0.20 -d 10.1.0.2 --sport 80 --dport 5004 "
        "--src-nat 10.2.0.10 --state ESTABLISHED --status SEEN_REPLY,ASSURED --timeout 60"
    )

    assert here.drift() == ()
    assert here.mend() == []
