"""plan/move.py: what is a valid wish, and what is refused."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address

import pytest

from natkeep.errors import NatkeepError, RefusedError, UsageError
from natkeep.plan.maps import Map
from natkeep.plan.move import Move, Site, parse_id
from natkeep.plan.roles import ROLES, Role

GATEWAY, DESTINATION = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst")
MAP4 = Map(ip_address("10.2.0.10"), ip_address("10.3.0.20"))


@pytest.mark.parametrize(
    "text", ["w", "0", "web", "web-1", "9-", "a" * 32, "Web", "web_1", "R_-", "at-beef"]
)
def test_an_id_is_accepted(text: str) -> None:
    assert text == parse_id(text)


@pytest.mark.parametrize(
    "text",
    ["", "-web", "_web", "at-fd00_2__10", "web.1", "a" * 33, "web\n", "wéb", 'x"; }', "../x", "٣"],
)
def test_what_is_no_id_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="is not an id"):
        parse_id(text)


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("destination", Site(Role.DESTINATION, "")),
        ("destination=dst", Site(Role.DESTINATION, "dst")),
        ("gateway=pid:7", Site(Role.GATEWAY, "pid:7")),
        ("gateway=/run/netns/a=b", Site(Role.GATEWAY, "/run/netns/a=b")),
    ],
)
def test_a_site_is_parsed(text: str, site: Site) -> None:
    assert site == Site.parse(text)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("router=gw", UsageError),
        ("", UsageError),
        ("=gw", UsageError),
        ("Gateway", UsageError),
        *((f"{role}=x", RefusedError) for role in Role if ROLES[role].order < 0),
    ],
)
def test_a_bad_site_is_an_error(text: str, error: type[NatkeepError]) -> None:
    with pytest.raises(NatkeepError) as caught:
        Site.parse(text)

    assert error is type(caught.value)


@pytest.mark.parametrize("text", ["destination", "gateway=gw", "gateway=pid:7"])
def test_a_site_prints_as_it_is_written(text: str) -> None:
    assert text == str(Site.parse(text))


def map4(old: str, new: str) -> Map:
    return Map(IPv4Address(old), IPv4Address(new))


@pytest.mark.parametrize(
    ("maps", "sites", "error", "why"),
    [
        ((), (DESTINATION,), UsageError, "no --map"),
        ((MAP4,), (), UsageError, "no site"),
        ((MAP4, map4("10.2.0.10", "10.3.0.21")), (DESTINATION,), UsageError, "mapped twice"),
        ((MAP4, map4("10.3.0.20", "10.4.0.1")), (DESTINATION,), RefusedError, "both an OLD and"),
        ((MAP4,), (DESTINATION, Site(Role.GATEWAY, "dst")), UsageError, "same namespace"),
        ((MAP4,), (DESTINATION, Site(Role.DESTINATION, "b")), UsageError, "one destination"),
    ],
)
def test_a_move_that_contradicts_itself_is_an_error(
    maps: tuple[Map, ...], sites: tuple[Site, ...], error: type[NatkeepError], why: str
) -> None:
    with pytest.raises(NatkeepError, match=why) as caught:
        Move("web", maps, sites)

    assert error is type(caught.value)


def test_a_move_checks_its_id() -> None:
    with pytest.raises(UsageError, match="is not an id"):
        Move('w"; }', (MAP4,), (DESTINATION,))


def test_gateways_come_before_the_destination() -> None:
    other = Site(Role.GATEWAY, "gw2")

    move = Move("web", (MAP4,), (DESTINATION, GATEWAY, other))

    assert (GATEWAY, other, DESTINATION) == move.ordered_sites()
