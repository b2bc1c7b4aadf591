"""kernel/conntrack_purge.py: one by one and by a dump, in all zones; and conntrack.count_wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest

from natkeep.kernel import conntrack, nftables_dump
from natkeep.kernel.conntrack_purge import delete_inbound, delete_untracked, purge
from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink
from natkeep.kernel.netns import entered
from natkeep.plan.conntrack import PEER_DIALLED
from natkeep.plan.kept_connections import make_translations
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.step_undo import undo_of
from natkeep.plan.steps import PurgeEntries
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.plan.via import Via
from natkeep.values import replace

pytestmark = pytest.mark.root
Run = Callable[..., str]

MANY = 3000  # more than are looked up one by one, whatever else is in the table
ENDS = {
    "v4": ("10.1.0.2", "10.2.0.10", "10.3.0.20"),
    "v6": ("fd00:1::2", "fd00:2::10", "fd00:3::20"),
}
FROM = {"v4": "10.3.0.1", "v6": "fd00:3::1"}
EACH_FAMILY = pytest.mark.parametrize("family", ENDS)


@pytest.fixture
def site(netns: str) -> Iterator[str]:
    """The test is inside; the namespace tracks nothing by itself."""
    with entered(netns):
        yield netns


def translation_of(
    family: str, netns: str, count: int, mode: Mode = Mode.STATEFUL, role: Role = Role.GATEWAY
) -> Translation:
    peer, old, new = map(ip_address, ENDS[family])
    kept = Connections.of(
        FourTuple(Endpoint(peer, 2000 + n), Endpoint(old, 5000)) for n in range(count)
    )
    vias = (Via(ip_address(FROM[family])),) if role == Role.RELAY else ()
    move = Move("web", (Map(old, new),), (Site(role, netns),), mode, vias=vias)
    [translation] = make_translations(move, kept)[0]
    return translation


def track(run: Run, netns: str, tuple_: FourTuple, *, zone: int = 0, protocol: str = "tcp") -> None:
    """An entry without NAT."""
    source, destination = tuple_.source, tuple_.destination
    state = ("--state", "ESTABLISHED") if protocol == "tcp" else ()
    run(
        netns,
        *("conntrack", "-I", "-p", protocol, "-s", str(source.address), "--timeout", "999"),
        *("-d", str(destination.address), "--sport", str(source.port), *state),
        *("--dport", str(destination.port), *(("-w", str(zone)) if zone else ())),
    )


def count(run: Run, netns: str) -> int:
    return int(run(netns, "conntrack", "-C"))


@EACH_FAMILY
@pytest.mark.parametrize("connections", [4, MANY], ids=["one by one", "by one dump"])
@pytest.mark.parametrize("zone", [0, 7])
@pytest.mark.parametrize("which", ["outer", "outer-reply", "inner", "inner-reply"])
def test_a_stale_entry_goes_from_whatever_zone_it_is_in(
    site: str, run: Run, family: str, connections: int, zone: int, which: str
) -> None:
    translation = translation_of(family, site, connections)
    outer, inner = [*translation.tuples()][connections - 1]
    stale = outer if which.startswith("outer") else inner
    track(run, site, stale.reply() if which.endswith("reply") else stale, zone=zone)
    near = FourTuple(Endpoint(stale.source.address, 1), stale.destination)
    track(run, site, near, zone=zone)
    track(run, site, stale, protocol="udp", zone=zone)

    assert purge(translation) == 1

    assert count(run, site) == 2
    assert purge(translation) == 0


def test_our_own_entries_go_by_the_dump_too(site: str, run: Run) -> None:
    translation = translation_of("v4", site, MANY)
    conntrack.insert(translation)

    assert purge(translation) == MANY

    assert count(run, site) == 0


def test_in_a_large_table_the_rules_tell_whether_there_are_zones(
    site: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry in a zone that nothing assigns is met by no packet."""
    monkeypatch.setattr("natkeep.kernel.conntrack_zones._SMALL", 0)
    translation = translation_of("v4", site, 1)
    [(stale, _)] = translation.tuples()
    track(run, site, stale, zone=7)

    assert purge(translation) == 0
    run(site, "nft", "-f", "-", stdin="table ip other {\nchain c {\nct zone set 7\n}\n}\n")

    assert purge(translation) == 1


@pytest.mark.parametrize(
    ("rule", "assigns"),
    [
        ("ct zone set 7", True),
        ("ct zone 7 accept", True),
        ("ct original zone 7 accept", True),
        ("ct state established accept", False),
        ("ct mark 17 accept", False),
        ("ct bytes > 17 accept", False),
    ],
)
def test_a_rule_that_has_to_do_with_zones_is_found(
    site: str, run: Run, rule: str, assigns: bool
) -> None:
    run(site, "nft", "-f", "-", stdin=f"table inet other {{\nchain c {{\n{rule}\n}}\n}}\n")

    assert assigns is nftables_dump.assigns_zones(besides="natkeep")
    assert nftables_dump.assigns_zones(besides="other") is False


def test_the_target_of_iptables_that_sets_zones_is_found(site: str, run: Run) -> None:
    assert nftables_dump.assigns_zones(besides="natkeep") is False

    run(site, "iptables-nft", "-t", "raw", "-A", "PREROUTING", "-j", "CT", "--zone", "7")

    assert nftables_dump.assigns_zones(besides="natkeep") is True


@EACH_FAMILY
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("role", [Role.GATEWAY, Role.DESTINATION])
def test_of_many_entries_those_that_are_right_are_not_called_wrong(
    site: str, family: str, mode: Mode, role: Role
) -> None:
    translation = translation_of(family, site, MANY, mode, role)
    conntrack.insert(translation)

    assert conntrack.count_wrong(translation) == 0


@EACH_FAMILY
@pytest.mark.parametrize("reply", [False, True])
def test_an_entry_whose_reply_tuple_something_has_is_refused(
    site: str, run: Run, family: str, reply: bool
) -> None:
    """Were its source not named, the kernel would give it another port and say nothing (H2)."""
    translation = translation_of(family, site, 4)
    outer, inner = [*translation.tuples()][1]
    track(run, site, inner.reply() if reply else inner)

    with pytest.raises(FileExistsError):
        conntrack.insert(translation)

    with Netlink(NETLINK_NETFILTER) as netlink:
        seen = [*conntrack.look_up(netlink, translation)]
    assert [entry is not None and entry.translated for entry in seen] == [True, False, True, True]
    listed = run(site, "conntrack", "-L", "-f", "ipv4" if family == "v4" else "ipv6")
    assert listed.count(f"sport={outer.source.port} ") == 1
    assert all(f"dport={each.source.port} " in listed for each, _ in translation.tuples())


@EACH_FAMILY
def test_of_a_relays_entries_those_are_wrong_that_leave_the_peer_as_it_is(
    site: str, family: str
) -> None:
    """Those of a gateway translate the destination, as a relay's do, and nothing else."""
    translation = translation_of(family, site, MANY, role=Role.RELAY)
    conntrack.insert(translation)
    assert conntrack.count_wrong(translation) == 0
    few = [*range(7)]
    version = translation.map.old.version
    outer = translation.outer.pick(few, version)
    delete_inbound(outer)
    gateway = translation_of(family, site, len(few))
    assert gateway.outer == outer
    conntrack.insert(gateway)

    assert conntrack.count_wrong(translation) == len(few)


def test_entries_that_translate_nothing_are_wrong(site: str, run: Run) -> None:
    translation = translation_of("v4", site, MANY)
    plain = replace(translation, outer=translation.kept)
    undo = undo_of(PurgeEntries(plain.site, plain))
    conntrack.restore(undo, PEER_DIALLED * MANY)
    neighbour = next(iter(translation.outer))
    track(run, site, FourTuple(Endpoint(neighbour.source.address, 1), neighbour.destination))

    assert conntrack.count_wrong(translation) == MANY


def test_entries_that_somebody_has_flushed_are_wrong(site: str, run: Run) -> None:
    translation = translation_of("v4", site, MANY)
    conntrack.insert(translation)
    run(site, "conntrack", "-F")

    assert conntrack.count_wrong(translation) == MANY


@EACH_FAMILY
@pytest.mark.parametrize("others_track", [False, True])
def test_what_nobody_tracks_any_more_is_forgotten_with_the_last_rules(
    site: str, run: Run, family: str, others_track: bool
) -> None:
    peer, old, new = map(ip_address, ENDS[family])
    who_called, who_answered = (Endpoint(peer, 2000), Endpoint(old, 5000))
    track(run, site, FourTuple(who_called, who_answered))
    track(run, site, FourTuple(who_answered, Endpoint(peer, 2001)))
    track(run, site, FourTuple(who_called, Endpoint(new, 7)))
    if others_track:
        run(site, "nft", "add table inet other")
        run(site, "nft", "add chain inet other in { type filter hook input priority 0; }")

    delete_untracked([old])

    assert count(run, site) == (3 if others_track else 1)
