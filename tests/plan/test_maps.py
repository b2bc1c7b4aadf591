"""plan/maps.py: which map a connection goes by, and what is no map."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from natkeep.errors import NatkeepError, RefusedError, UsageError
from natkeep.plan.maps import Map, find_map, parse_map, share
from natkeep.plan.move import Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

OLD = ip_address("10.2.0.10")


@pytest.mark.parametrize(
    ("text", "old", "new", "ports"),
    [
        ("10.2.0.10=10.3.0.20", "10.2.0.10", "10.3.0.20", (None, None)),
        ("fd00:2::10=fd00:3::20", "fd00:2::10", "fd00:3::20", (None, None)),
        ("::ffff:10.2.0.10=10.3.0.20", "10.2.0.10", "10.3.0.20", (None, None)),
        ("10.2.0.10=auto", "10.2.0.10", None, (None, None)),
        ("10.2.0.10:80=10.3.0.20:8080", "10.2.0.10", "10.3.0.20", (80, 8080)),
        ("10.2.0.10:80=auto:8080", "10.2.0.10", None, (80, 8080)),
        ("[fd00:2::10]:80=[fd00:3::20]:65535", "fd00:2::10", "fd00:3::20", (80, 65535)),
        ("[fd00:2::10]:80=auto:1", "fd00:2::10", None, (80, 1)),
    ],
)
def test_a_map_is_parsed(
    text: str, old: str, new: str | None, ports: tuple[int | None, int | None]
) -> None:
    wish = parse_map(text)

    assert (ip_address(old), new and ip_address(new)) == (wish.old, wish.new)
    assert ports == (wish.old_port, wish.new_port)


@pytest.mark.parametrize(
    "text",
    [
        "10.2.0.10=10.3.0.20",
        "10.2.0.10:80=10.3.0.20:8080",
        "fd00:2::10=fd00:3::20",
        "[fd00:2::10]:80=[fd00:3::20]:80",
    ],
)
def test_a_map_prints_as_it_is_written(text: str) -> None:
    wish = parse_map(text)

    assert wish.new is not None
    assert text == str(wish.to(wish.new))


@pytest.mark.parametrize(
    "text",
    [
        "", "10.2.0.10", "10.2.0.10=", "=10.3.0.20", "auto=10.3.0.20", "a=b", "1.2.3.4=5=6",
        "10.2.0.10:80=10.3.0.20", "10.2.0.10=10.3.0.20:80", "10.2.0.10:80=auto",
        "10.2.0.10=auto:80", "10.2.0.10:0=10.3.0.20:80", "10.2.0.10:80=10.3.0.20:65536",
        "10.2.0.10:80=auto:0", "10.2.0.10:80=auto:", "10.2.0.10:=10.3.0.20:80",
        "10.2.0.10:http=10.3.0.20:80", "fd00:2::10:80=[fd00:3::20]:80",
        "[fd00:2::10]=[fd00:3::20]", "auto:80=10.3.0.20:80", "10.2.0.10:80:81=10.3.0.20:80",
    ],
)  # fmt: skip
def test_what_is_no_map_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_map(text)


def test_a_connection_goes_by_the_map_of_its_port_wherever_that_stands() -> None:
    new = [ip_address(f"10.3.0.{n}") for n in (20, 21, 22)]
    maps = (
        Map(OLD, new[0]),
        Map(OLD, new[1], 80, 8080),
        Map(OLD, new[2], 443, 443),
    )
    peer = Endpoint(ip_address("10.1.0.2"), 50000)
    ends = {port: Endpoint(OLD, port) for port in (80, 443, 5000)}
    some = Connections.of(FourTuple(peer, end) for end in ends.values())

    assert [next(iter(each)).destination.port for each in share(maps, some) if len(each) == 1] == [
        5000,
        80,
        443,
    ]
    assert [maps[1], maps[2], maps[0]] == [find_map(maps, end) for end in ends.values()]
    assert find_map(maps[1:], ends[5000]) is None


def test_one_old_is_mapped_once_and_each_of_its_ports_once() -> None:
    new, other = ip_address("10.3.0.20"), ip_address("10.3.0.21")
    site = (Site(Role.GATEWAY),)

    Move("web", (Map(OLD, new, 80, 8080), Map(OLD, other, 443, 8443), Map(OLD, new)), site)
    with pytest.raises(UsageError, match=r"10\.2\.0\.10:80 is mapped twice"):
        Move("web", (Map(OLD, new, 80, 8080), Map(OLD, other, 80, 8081)), site)
    with pytest.raises(UsageError, match="one OLD is mapped twice"):
        Move("web", (Map(OLD, new), Map(OLD, other)), site)


def test_mode_stateless_translates_no_ports() -> None:
    new, site = ip_address("10.3.0.20"), (Site(Role.GATEWAY),)

    Move("web", (Map(OLD, new, 80, 80),), site, Mode.STATELESS)
    with pytest.raises(RefusedError, match="mode stateless translates no ports"):
        Move("web", (Map(OLD, new, 80, 8080),), site, Mode.STATELESS)


@pytest.mark.parametrize(
    ("old", "new", "error", "why"),
    [
        ("10.2.0.10", "fd00:3::20", UsageError, "different families"),
        ("10.2.0.10", "10.2.0.10", UsageError, "nothing to translate"),
        ("127.0.0.1", "10.3.0.20", RefusedError, "OLD 127.0.0.1 is loopback"),
        ("10.2.0.10", "127.9.9.9", RefusedError, "NEW 127.9.9.9 is loopback"),
        ("::1", "fd00:3::20", RefusedError, "OLD ::1 is loopback"),
        ("0.0.0.0", "10.3.0.20", RefusedError, "unspecified"),
        ("fd00:2::10", "::", RefusedError, "unspecified"),
        ("224.0.0.1", "10.3.0.20", RefusedError, "multicast"),
        ("ff02::1", "fd00:3::20", RefusedError, "multicast"),
        ("169.254.1.1", "10.3.0.20", RefusedError, "link-local"),
        ("fe80::1", "fd00:3::20", RefusedError, "link-local"),
        ("255.255.255.255", "10.3.0.20", RefusedError, "broadcast"),
    ],
)
def test_a_map_of_unfit_addresses_is_refused(
    old: str, new: str, error: type[NatkeepError], why: str
) -> None:
    with pytest.raises(NatkeepError, match=why) as caught:
        Map(ip_address(old), ip_address(new))

    assert error is type(caught.value)
