"""plan/path.py: what the kernel's answers about a way mean, each code in both families."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from natkeep.plan.findings import CATALOGUE, Severity
from natkeep.plan.move import Site
from natkeep.plan.path import Route, SourceRule, Way, find_apart, find_uncopied, judge
from natkeep.plan.roles import Role
from natkeep.values import replace

GATEWAY, DESTINATION = Site(Role.GATEWAY), Site(Role.DESTINATION)
ENDS = {
    4: tuple(map(ip_address, ("10.1.0.2", "10.2.0.10", "10.3.0.20"))),
    6: tuple(map(ip_address, ("fd00:1::2", "fd00:2::10", "fd00:3::20"))),
}
EACH_VERSION = pytest.mark.parametrize("version", [4, 6])
NEAR, FAR = Route("unicast", "near", "", True), Route("unicast", "far", "10.3.0.1")


def make_way(version: int, **more: object) -> Way:
    peer, old, new = ENDS[version]
    return Way(peer, old, new, **{"out": FAR, **more})  # type: ignore[arg-type]


def codes(site: Site, way: Way, **more: bool) -> list[str]:
    return [finding.code for finding in judge(site, [way], **more)]


@EACH_VERSION
def test_a_peer_behind_a_router_is_well(version: int) -> None:
    [finding] = judge(DESTINATION, [make_way(version, there=Route("local"))])

    assert finding.severity == Severity.OK
    assert "via 10.3.0.1 dev far" in finding.detail


@EACH_VERSION
def test_a_neighbour_of_new_is_refused_and_so_is_what_has_no_route(version: int) -> None:
    assert codes(DESTINATION, make_way(version, out=NEAR)) == ["peer-on-link"]
    # But for one that has moved, or whose own host is a site: what NEW says is what it waits for.
    assert codes(DESTINATION, make_way(version, out=NEAR, direct=True)) == [""]
    # And where there is no gateway the peers' own hosts may do it, which nothing tells here.
    assert codes(DESTINATION, make_way(version, out=NEAR, alone=True)) == ["needs-peer-site"]
    assert codes(DESTINATION, make_way(version, out=Route("none"))) == ["no-way-back"]
    assert codes(DESTINATION, make_way(version, out=Route("blackhole"))) == ["no-way-back"]
    assert codes(DESTINATION, make_way(version, out=Route("local"))) == [""]


def test_the_filter_of_the_reverse_path_is_told_where_it_drops() -> None:
    dropped = Route("reverse")
    assert codes(DESTINATION, make_way(4, there=dropped)) == ["reverse-path"]
    assert codes(GATEWAY, make_way(4, there=dropped)) == ["reverse-path"]
    assert codes(GATEWAY, make_way(4, there=FAR, back=dropped)) == ["reverse-path"]


@EACH_VERSION
def test_what_leaves_by_a_device_that_new_is_not_on_is_told(version: int) -> None:
    """At a destination it may arrive; at a gateway it may, unless NEW is known to be elsewhere."""
    assert codes(DESTINATION, make_way(version, home="eth0")) == ["other-device"]
    assert codes(DESTINATION, make_way(version, home="far")) == [""]
    by_router, beyond = Route("unicast", "up", "10.8.0.1"), Route("unicast", "far", "10.4.0.1")
    beside = replace(beyond, hop="", neighbour=True)
    for there, to_new, expected in (
        (by_router, beyond, "other-way"),
        (by_router, beside, "no-way-there"),
        (beyond, beside, ""),
    ):
        way = make_way(version, out=FAR, there=there, back=FAR, to_new=to_new)
        assert codes(GATEWAY, way) == [expected]
    assert CATALOGUE["other-way"].severity == CATALOGUE["other-device"].severity == Severity.WARN


@EACH_VERSION
def test_a_neighbour_of_old_does_not_cross_the_gateway_unless_it_was_seen_there(
    version: int,
) -> None:
    beside = make_way(version, out=NEAR, to_old=NEAR)
    assert beside.is_beside()
    assert codes(GATEWAY, beside) == ["peer-beside-old"]
    assert codes(GATEWAY, replace(beside, crosses=True)) == [""]
    assert codes(GATEWAY, make_way(version, out=NEAR, to_new=NEAR)) == ["peer-on-link"]
    assert codes(GATEWAY, make_way(version, out=NEAR, to_old=Route("local", "near"))) == [""]


@EACH_VERSION
def test_a_gateway_without_a_route_is_told_by_its_direction(version: int) -> None:
    none = Route("none")
    assert codes(GATEWAY, make_way(version, there=none)) == ["no-way-there"]
    assert codes(GATEWAY, make_way(version, there=FAR, back=none)) == ["no-way-back"]
    # That forwarding is off is said once, and not for each peer.
    assert codes(GATEWAY, make_way(version, there=none), forwards=False) == [""]


@EACH_VERSION
def test_new_that_leaves_by_another_uplink_than_old_is_refused(version: int) -> None:
    one = Route("unicast", "wana", "10.21.0.1", entry=b"a")
    other = Route("unicast", "wanb", "10.22.0.1", entry=b"b")
    assert codes(GATEWAY, make_way(version, there=FAR, back=one, before=other)) == ["other-uplink"]
    # Of one route several next hops may be chosen, by whatever the kernel takes for its hash.
    hashed = replace(other, entry=b"a")
    assert codes(GATEWAY, make_way(version, there=FAR, back=one, before=hashed)) == [""]
    gone = Route("none")
    assert codes(GATEWAY, make_way(version, there=FAR, back=one, before=gone)) == [""]


def test_peers_of_one_kind_are_one_line() -> None:
    peers = [ip_address(f"10.1.0.{n}") for n in range(2, 7)]
    ways = [replace(make_way(4, out=NEAR), peer=peer) for peer in peers]
    well = [replace(way, out=FAR) for way in ways]

    [finding] = judge(DESTINATION, ways)
    assert "peer 10.1.0.2 is on NEW's link near" in finding.detail
    assert "(5 peers in all)" in finding.detail
    assert ["5 peers are" in one.detail for one in judge(DESTINATION, well)] == [True]


def make_rule(source: str, length: int, **more: object) -> SourceRule:
    plain = {
        "priority": 100, "table": 100, "local": True, "inverted": False, "ours": False,
        "said": b"100",
    }  # fmt: skip
    return SourceRule(ip_address(source).packed, length, **{**plain, **more})  # type: ignore[arg-type]


@EACH_VERSION
def test_rules_for_new_alone_are_to_be_copied_and_those_for_both_are_not(version: int) -> None:
    _, old, new = ENDS[version]
    whole = new.max_prefixlen
    wide = 8 if version == 4 else 16
    host, network = make_rule(str(new), whole), make_rule(str(new), whole - 8)

    assert find_uncopied([host, network], new, old) == [host, network]
    assert find_uncopied([make_rule(str(new), wide)], new, old) == []
    assert find_uncopied([replace(host, local=False)], new, old) == []
    assert find_uncopied([host, make_rule(str(old), whole)], new, old) == []
    assert find_uncopied([replace(make_rule(str(old), whole), inverted=True)], new, old) != []


def test_a_rule_for_old_alone_is_one_that_leads_apart() -> None:
    _, old, new = ENDS[4]
    theirs = make_rule("10.2.0.0", 24, table=200, said=b"200")

    assert find_apart([theirs], new, old) == [theirs]
    assert find_apart([replace(theirs, ours=True)], new, old) == []
    assert find_apart([make_rule(str(new), 32, said=b"200"), theirs], new, old) == []


def test_each_code_of_a_way_stops_a_move() -> None:
    ours = ("no-way-there", "no-way-back", "peer-on-link", "peer-beside-old", "other-uplink",
            "reverse-path", "old-routed-apart")  # fmt: skip
    assert {CATALOGUE[code].severity for code in ours} == {Severity.STOP}
