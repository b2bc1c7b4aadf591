"""tests of what a site tells of a connection: live, ended, one-way, or nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from natkeep.plan.connection_state import (
    SiteStatus,
    State,
    count_answered,
    find_fallen_silent,
    find_one_way,
    find_states,
)
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.observation import Gate, Observation, SeenEntry
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import Plan
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address

DESTINATION, GATEWAY = Site(Role.DESTINATION), Site(Role.GATEWAY, "gw")
MAP = Map(parse_address("10.2.0.10"), parse_address("10.3.0.20"))
KEPT = Connections.of(
    FourTuple(Endpoint.parse(f"10.1.0.2:{port}"), Endpoint.parse("10.2.0.10:80"))
    for port in (1, 2, 3)
)
FIRST, SECOND, THIRD = KEPT.each()
LIVE, ENDED, ONE_WAY = State.LIVE, State.ENDED, State.ONE_WAY


def entry(inward: int | None = 1, outward: int | None = 1, alive: bool = True) -> SeenEntry:
    return SeenEntry(True, inward, outward, alive)


def plan_at(*sites: Site, mode: Mode = Mode.STATEFUL) -> Plan:
    return make_plan(Move("web", (MAP,), sites, mode), KEPT)


def translation_at(site: Site) -> Translation:
    [translation] = [t for t in plan_at(site).translations if t.site == site]
    return translation


def stand(
    site: Site,
    entries: Sequence[SeenEntry | None],
    sockets: Connections | None = None,
    *,
    opened: float | None = math.inf,
    **more: object,
) -> SiteStatus:
    if sockets is None and site == DESTINATION:
        sockets = KEPT
    seen = Observation(Gate.OPEN, {}, frozenset(), {0: tuple(entries)}, 3, sockets=sockets)
    return SiteStatus(site, replace(seen, **more), (), opened)  # type: ignore[arg-type]


def states(status: SiteStatus, entries: Sequence[SeenEntry | None]) -> list[State | None]:
    return find_states(status, translation_at(status.site), entries)


def test_at_the_destination_the_sockets_tell_what_lives() -> None:
    """That of the second has gone, and its entry shows the end; of the third the entry has gone."""
    entries = [entry(), entry(9, 9, alive=False), None]
    one = Connections.of_records([FIRST])
    assert states(stand(DESTINATION, entries, one), entries) == [LIVE, ENDED, ENDED]
    assert states(stand(DESTINATION, entries, KEPT), entries) == [LIVE, LIVE, LIVE]


def test_a_socket_that_has_gone_while_the_entry_goes_on_is_not_called_ended() -> None:
    """It was dumped to move on, or is not restored yet."""
    entries = [entry()] * 3
    nothing = Connections()
    assert states(stand(DESTINATION, entries, nothing), entries) == [None, None, None]


def test_before_it_is_opened_nothing_is_said() -> None:
    entries = [entry(), entry(alive=False), None]
    for site in (DESTINATION, GATEWAY):
        assert states(stand(site, entries, opened=None), entries) == [None] * 3
        gone = replace(stand(site, entries), seen=None)
        assert find_states(gone, translation_at(site), [None] * 3) == [None] * 3


def test_at_a_gateway_the_entries_tell() -> None:
    entries = [entry(), entry(alive=False), None]
    assert states(stand(GATEWAY, entries), entries) == [LIVE, ENDED, None]
    seen_earlier = replace(stand(GATEWAY, entries), ended={0: 0b101})
    assert states(seen_earlier, entries) == [LIVE, ENDED, ENDED]


@pytest.mark.parametrize("opened", [5.0, 3600.0, math.inf])
def test_one_way_is_what_was_counted_in_one_direction_alone(opened: float) -> None:
    entries = [entry(0, 3), entry(3, 0), entry(0, 0)]
    for site in (DESTINATION, GATEWAY):
        found = stand(site, entries, opened=opened)
        assert states(found, entries) == [ONE_WAY, ONE_WAY, LIVE]
    uncounted = [entry(None, None)] * 3
    assert states(stand(DESTINATION, uncounted, opened=opened), uncounted) == [LIVE] * 3


def test_an_answer_has_five_seconds() -> None:
    entries = [entry(0, 3), entry(3, 0), entry(0, 0)]
    assert states(stand(DESTINATION, entries, opened=4.9), entries) == [LIVE] * 3


def test_a_socket_that_says_the_same_again_and_again_is_one_way_whatever_was_counted() -> None:
    entries = [entry(500, 500)] * 3
    found = stand(DESTINATION, entries, unanswered=frozenset([FIRST, THIRD]))
    assert states(found, entries) == [ONE_WAY, LIVE, ONE_WAY]


def test_peers_have_answered_whose_packets_were_counted() -> None:
    def answered(site: Site, entries: list[SeenEntry | None], **more: object) -> int | None:
        return count_answered(stand(site, entries, **more), translation_at(site), entries)  # type: ignore[arg-type]

    entries = [entry(1, 1), entry(0, 4), entry(4, 0)]
    assert answered(DESTINATION, entries) == 2
    assert answered(DESTINATION, entries, heard=frozenset([SECOND])) == 3  # its entry is new
    assert answered(GATEWAY, entries) == 1  # a peer that asks while nobody answers has not answered
    assert answered(DESTINATION, [entry(1, 1), None, None]) == 1
    assert answered(DESTINATION, [entry(None, None), None, None]) is None
    assert answered(DESTINATION, entries, opened=None) is None


def test_at_a_gateway_new_has_spoken_though_the_entries_are_new() -> None:
    entries: list[SeenEntry | None] = [entry(4, 0)] * 3
    seen = stand(GATEWAY, entries, spoken=frozenset([FIRST, SECOND]))
    assert states(seen, entries) == [LIVE, LIVE, ONE_WAY]
    assert count_answered(seen, translation_at(GATEWAY), entries) == 2
    assert one_way(seen) == []


def test_a_stateless_gateway_that_tracks_nothing_knows_nothing_once_new_has_spoken() -> None:
    """Until then it knows what prepare has found."""
    [translation] = plan_at(GATEWAY, mode=Mode.STATELESS).translations
    entries = [entry(None, None), entry(0, 0), entry(0, 0)]
    seen = stand(GATEWAY, entries, spoken=frozenset([FIRST]))
    assert find_states(seen, translation, entries) == [None, LIVE, LIVE]
    assert count_answered(seen, translation, entries) is None


def test_a_stateless_destination_that_tracks_nothing_knows_by_its_sockets_and_whom_it_heard() -> (
    None
):
    [translation] = plan_at(DESTINATION, mode=Mode.STATELESS).translations
    entries = [entry(None, None), entry(None, None), entry(0, 0)]
    seen = stand(DESTINATION, entries, heard=frozenset([FIRST, SECOND]))
    assert find_states(seen, translation, entries) == [LIVE] * 3
    assert count_answered(seen, translation, entries) == 2
    assert [*find_one_way("web", seen, [seen], [translation])] == []


# ---- a whole move ------------------------------------------------------------------------------


def one_way(judged: SiteStatus, *others: SiteStatus) -> list[str]:
    sites = (judged, *others)
    return [*find_one_way("web", judged, sites, [translation_at(judged.site)])]


DEAF, MUTE = [entry(0, 3)] * 3, [entry(3, 0)] * 3
DEAF_SAID = "one-way: packets of the process pass on 3 connections, and none of a peer: "
MUTE_SAID = "one-way: packets of the peers pass on 3 connections, and none of the process: "


@pytest.mark.parametrize(
    ("judged", "others", "said"),
    [
        (stand(DESTINATION, DEAF), [], f"{DEAF_SAID}is the gateway open (natkeep open web there)?"),
        (
            stand(DESTINATION, DEAF), [stand(GATEWAY, [entry(0, 0)] * 3, gate=Gate.CLOSED)],
            f"{DEAF_SAID}the gateway's gate is closed (natkeep open web)",
        ),
        (
            stand(DESTINATION, DEAF), [stand(GATEWAY, [entry(0, 0), None, None])],
            f"{DEAF_SAID}the gateway tracks none of them (notrack?)",
        ),
        (
            stand(DESTINATION, DEAF), [stand(GATEWAY, [entry(1, 0)] * 3)],
            f"{DEAF_SAID}a hop between masquerades or drops",
        ),
        (stand(DESTINATION, MUTE), [], f"{MUTE_SAID}its packets take another way"),
        (stand(GATEWAY, DEAF), [], f"{DEAF_SAID}theirs take another way"),
        (stand(GATEWAY, MUTE), [], f"{MUTE_SAID}is the destination open?"),
        (stand(GATEWAY, MUTE), [stand(DESTINATION, MUTE)], f"{MUTE_SAID}is the destination open?"),
        (stand(DESTINATION, [entry(9, 9)] * 3, unanswered=frozenset(KEPT.each())), [], DEAF_SAID),
    ],
)  # fmt: skip
def test_a_move_of_which_one_direction_is_silent_says_why_it_may_be(
    judged: SiteStatus, others: list[SiteStatus], said: str
) -> None:
    [line] = one_way(judged, *others)
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("judged", "others"),
    [
        (stand(DESTINATION, [entry(0, 3), entry(1, 1), None]), []),  # one is well: a peer has gone
        (stand(DESTINATION, [entry(0, 0)] * 3), []),
        (stand(DESTINATION, [None] * 3), []),
        (stand(DESTINATION, DEAF, heard=frozenset([FIRST])), []),
        (stand(DESTINATION, [entry(0, 3, alive=False)] * 3), []),
        (stand(DESTINATION, DEAF, Connections()), []),  # not restored yet, or dumped to move on
        (stand(DESTINATION, DEAF, opened=4.9), []),
        (stand(DESTINATION, DEAF, opened=None), []),
        (stand(GATEWAY, MUTE), [stand(DESTINATION, [None] * 3, opened=None)]),
        (stand(GATEWAY, MUTE), [stand(DESTINATION, [None] * 3, opened=1.0)]),
        (stand(Site(Role.SOURCE), MUTE), []),
        (replace(stand(DESTINATION, DEAF), seen=None), []),
    ],
)
def test_it_is_not_said_of_one_that_is_well_idle_or_not_open_for_long(
    judged: SiteStatus, others: list[SiteStatus]
) -> None:
    assert one_way(judged, *others) == []


# ---- looked at again and again -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([(5, 5), (5, 6), (5, 6)], "one-way: packets of the process pass, and none of a peer"),
        ([(5, 5), (6, 5), (7, 5)], "one-way: packets of the peers pass, and none of the process"),
        ([(5, 5), (5, 5), (5, 6)], ""),  # which may be answered yet
        ([(5, 5), (5, 6), (6, 6)], ""),
        ([(5, 5), (6, 6), (6, 6)], ""),
        ([(5, 5), (5, 5), (5, 5)], ""),
        ([(5, 5), (0, 6), (0, 7)], ""),  # made anew
    ],
)
def test_a_direction_that_falls_silent_later_is_seen_by_looking_again(
    counts: list[tuple[int, int]], said: str
) -> None:
    for site in (GATEWAY, DESTINATION):
        looks = [stand(site, [entry(*count), None, None]) for count in counts]
        lines = [*find_fallen_silent(looks, looks[-1:], "web")]
        assert [line[: len(said)] for line in lines] == [said] * bool(said)
    gone = [replace(look, seen=None) for look in looks]
    assert [*find_fallen_silent(gone, gone[-1:], "web")] == []
