"""plan/repair.py and plan/wanted.py: what is missing is found, and only that is made again."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from natkeep.plan.drift import find_drift
from natkeep.plan.liveness import Life, Sighting, find_life, make_sighting
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.nft import Key, Undo
from natkeep.plan.observation import Gate, Observation, SeenEntry
from natkeep.plan.repair import LoadObjects, find_patches
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import AddAddress, FillSet, InsertEntries, Plan, RaiseLoopback, Step
from natkeep.plan.strays import SeenTable, find_undos
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint, FourTuple
from natkeep.plan.wanted import split_opening, want
from natkeep.values import replace

GATEWAY, DESTINATION = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst")
OLD4, OLD6 = ip_address("10.2.0.10"), ip_address("fd00:2::10")
MAPS = (Map(OLD4, ip_address("10.3.0.20")), Map(OLD6, ip_address("fd00:3::20")))
LISTENERS = (Endpoint(OLD4, 80), Endpoint(OLD6, 443))
KEPT = Connections.of(
    FourTuple(Endpoint.parse(f"{peer}:{port}"), Endpoint.parse(f"{local}:80"))
    for port in (5000, 5001, 5002)
    for peer, local in (("10.1.0.2", "10.2.0.10"), ("[fd00:1::2]", "[fd00:2::10]"))
)
LIVE, WRONG = SeenEntry(True, 1, 1, True), SeenEntry(False, 1, 1, True)
OVER = SeenEntry(True, 9, 9, False)


def make(mode: Mode = Mode.STATEFUL, listeners: tuple[Endpoint, ...] = ()) -> Plan:
    return make_plan(Move("web", MAPS, (GATEWAY, DESTINATION), mode, listeners), KEPT)


def show(plan: Plan, site: Site, **different: object) -> Observation:
    """A site as it is when nobody has touched it, but for what is *different*."""
    steps = [step for step in plan.prepare if step.site == site]
    entries = {
        s.translation.number: (LIVE,) * len(s.translation.kept)
        for s in steps
        if isinstance(s, InsertEntries)
    }
    at_destination = site.role == Role.DESTINATION
    seen = Observation(
        gate=Gate.OPEN,
        missing={},
        addresses=frozenset(step.address for step in steps if isinstance(step, AddAddress)),
        entries=entries,
        alive=len(KEPT),
        sockets=KEPT if at_destination else None,
    )
    return replace(seen, **different)  # type: ignore[arg-type]  # a test names the fields


def patches(
    plan: Plan, site: Site, seen: Observation, *, opened: bool = True, life: Life | None = None
) -> list[Step]:
    life = Life(True, KEPT) if life is None else life
    return [patch for _, patch in find_patches(plan, site, seen, life, opened=opened)]  # type: ignore[misc]


def lines(found: list[Step]) -> list[str]:
    return [str(one) for p in found if isinstance(p, LoadObjects) for one in p.objects]


EACH_SITE = pytest.mark.parametrize("site", [GATEWAY, DESTINATION])
EACH_MODE = pytest.mark.parametrize("mode", list(Mode))


@EACH_SITE
@EACH_MODE
@pytest.mark.parametrize("opened", [True, False])
def test_nothing_is_done_where_nothing_is_missing(site: Site, mode: Mode, opened: bool) -> None:
    plan = make(mode, LISTENERS)

    assert patches(plan, site, show(plan, site), opened=opened) == []


def every_object() -> Iterator[tuple[Mode, Site, Key]]:
    for mode in Mode:
        plan = make(mode, LISTENERS)
        for site in (GATEWAY, DESTINATION):
            for _, wanted in want(plan, site).values():
                yield mode, site, wanted.key


@pytest.mark.parametrize(
    ("mode", "site", "key"),
    list(every_object()),
    ids=lambda value: f"{value.kind}-{value.name}" if isinstance(value, Key) else str(value),
)
def test_each_object_that_is_missing_is_named_and_made_again_alone(
    mode: Mode, site: Site, key: Key
) -> None:
    """All that is loaded: 300 cases, each with one object as its patch."""
    plan = make(mode, LISTENERS)
    _, opening = split_opening(plan, site)
    gone = frozenset((key,))
    seen = show(plan, site, **{"shut" if key in opening else "gone": gone})

    found = patches(plan, site, seen)
    drift = find_drift(plan, site, seen, Life(True, KEPT), opened=True)

    made = lines(found)
    assert len(made) == 1
    assert drift
    assert any(key.name in line or key.kind == "table" for line in drift)


@EACH_SITE
@EACH_MODE
def test_a_table_that_is_gone_comes_back_in_the_order_of_the_plan(site: Site, mode: Mode) -> None:
    """The gate and its sets first, the translation behind them, the accept last of all."""
    plan = make(mode, LISTENERS)
    prepared, opening = split_opening(plan, site)
    sets = {step.name: 3 for step in plan.prepare if isinstance(step, FillSet)}
    seen = show(plan, site, gate=Gate.ABSENT, gone=prepared, shut=opening, missing=sets)

    numbers = [n for n, _ in find_patches(plan, site, seen, Life(True, KEPT), opened=True)]
    found = patches(plan, site, seen)

    assert numbers == sorted(numbers)
    filled = [i for i, patch in enumerate(found) if isinstance(patch, FillSet)]
    texts = [lines([patch]) for patch in found]
    drops = texts.index(next(t for t in texts if "add rule inet natkeep gate-web drop" in t))
    ways = ("dnat ip", "daddr set")
    rewrites = [i for i, text in enumerate(texts) if any(w in each for w in ways for each in text)]
    assert drops < min(filled)
    assert max(filled) < min(rewrites)
    assert [line for line in lines(found[-1:]) if line.endswith('comment "open"')] == lines(
        found[-1:]
    )
    assert find_drift(plan, site, seen, Life(True, KEPT), opened=True)[0] == (
        "table inet natkeep: nothing of move web is there"
    )


@EACH_SITE
def test_a_closed_move_stays_closed(site: Site) -> None:
    plan = make()
    prepared, opening = split_opening(plan, site)
    seen = show(plan, site, gate=Gate.ABSENT, gone=prepared, shut=opening)

    found = patches(plan, site, seen, opened=False)

    assert lines(found)
    assert not any("accept" in line and "gate-web" in line for line in lines(found))


def test_a_rule_goes_back_to_its_place() -> None:
    """CRIU's mark passes before the gates, and a lost drop stands behind the accept."""
    plan = make()
    prepared, _ = split_opening(plan, DESTINATION)

    def lost(chain: str, mark: str) -> list[str]:
        gone = frozenset(t for t in prepared if t.name == chain and mark in t.what)
        return lines(patches(plan, DESTINATION, show(plan, DESTINATION, gone=gone)))

    assert lost("gate", "notrack") == [
        "insert rule inet natkeep gate meta mark 0xc114 notrack accept"
    ]
    assert lost("gate", "@gate6") == ["add rule inet natkeep gate ip6 daddr vmap @gate6"]
    assert lost("gate-web", "drop") == ["add rule inet natkeep gate-web drop"]


def test_a_lost_rule_of_the_kept_connections_does_not_overtake_that_of_callers() -> None:
    """A peer may call again from a kept port: then it is a caller."""
    plan = make(listeners=LISTENERS)
    prepared, _ = split_opening(plan, DESTINATION)
    gone = frozenset(t for t in prepared if t.name == "gate-at-10.2.0.10" and ">gate-web" in t.what)

    [line] = lines(patches(plan, DESTINATION, show(plan, DESTINATION, gone=gone)))

    assert line.startswith("add rule inet natkeep gate-at-10.2.0.10 ip saddr . tcp sport")


@EACH_SITE
def test_tuples_that_have_ended_stay_free_when_the_table_was_lost(site: Site) -> None:
    plan = make(Mode.STATELESS)
    prepared, opening = split_opening(plan, site)
    sets = {step.name: 3 for step in plan.prepare if isinstance(step, FillSet)}
    seen = show(plan, site, gate=Gate.ABSENT, gone=prepared, shut=opening, missing=sets)
    ended = Connections.of(list(KEPT)[:1])

    for life, expected in (
        (Life(True, KEPT.minus(ended)), [FillSet(site, "ended-web-0", ended)]),
        (Life(True, KEPT), []),
        (Life(False, NO_CONNECTIONS), []),  # a gateway alone cannot know
    ):
        found = patches(plan, site, seen, life=life)
        filled = [p for p in found if isinstance(p, FillSet) and p.name.startswith("ended-")]
        assert filled == expected
    assert patches(plan, site, show(plan, site), life=Life(True, KEPT.minus(ended))) == []


@EACH_MODE
@pytest.mark.parametrize("opened", [True, False])
def test_peers_of_an_open_move_stay_heard_when_the_table_was_lost(mode: Mode, opened: bool) -> None:
    """What packets have noted is no drift; a set that is gone is not made anew as if none was."""
    plan = make(mode)
    prepared, opening = split_opening(plan, DESTINATION)
    sets = {step.name: 3 for step in plan.prepare if isinstance(step, FillSet)}
    seen = show(plan, DESTINATION, gate=Gate.ABSENT, gone=prepared, shut=opening, missing=sets)
    life = Life(True, KEPT)
    found = [patch for _, patch in find_patches(plan, DESTINATION, seen, life, opened=opened)]
    filled = {one.name: one for one in found if isinstance(one, FillSet)}

    assert {"kept-web-0", "kept-web-1"} <= filled.keys()
    for number in (0, 1):
        heard, kept = f"heard-web-{number}", filled[f"kept-web-{number}"]
        assert filled.get(heard) == (replace(kept, name=heard) if opened else None)
    assert patches(plan, DESTINATION, show(plan, DESTINATION)) == []


def test_what_is_not_nft_is_done_again_as_a_step() -> None:
    plan = make()
    seen = show(
        plan, DESTINATION, loopback=False, addresses=frozenset((OLD6,)), missing={"kept-web-0": 1}
    )

    found = patches(plan, DESTINATION, seen)
    drift = find_drift(plan, DESTINATION, seen, Life(True, KEPT), opened=True)

    assert [type(patch) for patch in found] == [FillSet, RaiseLoopback, AddAddress]
    assert found[2] == AddAddress(DESTINATION, OLD4, MAPS[0].new)
    assert [line for line in drift if "no rule of this move" not in line] == [
        "set kept-web-0: 1 of 3 connections are missing",
        "device lo: it is down",
        "address 10.2.0.10: not on this host",
    ]


# ---- what lives --------------------------------------------------------------------------------


def picked(plan: Plan, site: Site, seen: Observation, life: Life) -> list[str]:
    """The peers' ports of the connections whose entries are made again."""
    found = patches(plan, site, seen, life=life)
    made = [patch for patch in found if isinstance(patch, InsertEntries)]
    return [str(t.source.port) for patch in made for t in patch.translation.kept]


FIRST = Connections.of(list(KEPT)[:1])


@EACH_SITE
@pytest.mark.parametrize("entry", [None, WRONG, replace(OVER, translated=False)])
def test_only_connections_that_live_get_their_entries_back(
    site: Site, entry: SeenEntry | None
) -> None:
    """Also where the entry is wrong: one that has ended needs none."""
    plan = make()
    seen = show(plan, site, entries={0: (entry,) * 3, 1: (LIVE,) * 3})

    assert picked(plan, site, seen, Life(True, FIRST)) == ["5000"]
    assert picked(plan, site, seen, Life(True, NO_CONNECTIONS)) == []


def test_a_gateway_alone_makes_none_that_it_does_not_know_of() -> None:
    """Missing, it may have ended; wrong and carrying traffic, it has not."""
    plan = make()
    unknown = Life(False)

    lost = show(plan, GATEWAY, entries={0: (None,) * 3, 1: (LIVE,) * 3})
    wrong = show(plan, GATEWAY, entries={0: (None, WRONG, LIVE), 1: (LIVE,) * 3})
    ended = show(plan, GATEWAY, entries={0: (replace(WRONG, alive=False),) * 3, 1: (LIVE,) * 3})

    assert picked(plan, GATEWAY, lost, unknown) == []
    assert picked(plan, GATEWAY, wrong, unknown) == ["5001"]
    assert picked(plan, GATEWAY, ended, unknown) == []
    assert picked(plan, GATEWAY, lost, Life(False, FIRST)) == ["5000"]


def test_who_knows_what_lives() -> None:
    """The image before the move is opened, the destination's sockets then, else nobody."""
    plan = make()
    gateway, destination = show(plan, GATEWAY), show(plan, DESTINATION, sockets=FIRST)
    both = {GATEWAY: gateway, DESTINATION: destination}

    def life(looks: dict[Site, Observation], *, frozen: bool = False) -> Life:
        return find_life(plan, GATEWAY, looks, frozen=frozen, recent=NO_CONNECTIONS)

    assert life(both) == Life(True, FIRST)
    assert set(life(both, frozen=True).living) == set(KEPT)
    assert life(both, frozen=True).known
    assert life({GATEWAY: gateway}) == Life(False, NO_CONNECTIONS)


# ---- what a gateway alone remembers -------------------------------------------------------------


GATEWAY_ALONE = {GATEWAY: Life(False)}


def sight(
    plan: Plan,
    at: int,
    earlier: Sighting | None,
    *entries: SeenEntry | None,
    rest: SeenEntry = LIVE,
) -> Sighting:
    """The first translation's three entries; those of the other are *rest*."""
    seen = show(plan, GATEWAY, entries={0: entries, 1: (rest,) * 3})
    return make_sighting(plan, at, {GATEWAY: seen}, GATEWAY_ALONE, earlier)


def test_an_end_is_certain_when_it_is_seen_twice_with_no_packet_in_between() -> None:
    plan, busy = make(), OVER._replace(packets_in=10)

    first = sight(plan, 5000, None, LIVE, OVER, OVER, rest=OVER)
    assert [t.source.port for t in first.alive_at(plan, GATEWAY)] == [5000]
    assert first.count_unended(plan, GATEWAY) == 6  # never from one look
    soon = sight(plan, 5500, first, OVER, OVER, OVER, rest=OVER)
    assert soon.count_unended(plan, GATEWAY) == 6  # nor from two that are one
    later = sight(plan, 6000, soon, OVER, OVER, busy, rest=OVER)
    assert later.count_unended(plan, GATEWAY) == 2  # 5000 was alive then, 5002 has said something
    last = sight(plan, 7000, later, OVER, OVER, busy, rest=OVER)
    assert last.count_unended(plan, GATEWAY) == 0
    revived = sight(plan, 8000, last, busy, OVER, busy, rest=OVER)
    assert revived.count_unended(plan, GATEWAY) == 1  # in CLOSE still, as resets have put it there
    assert Sighting.from_json(later.to_json()) == later


def test_an_entry_that_is_gone_says_nothing_and_one_that_is_alive_takes_an_end_back() -> None:
    plan = make()
    once = sight(plan, 1000, None, None, OVER, OVER)
    twice = sight(plan, 2000, once, None, OVER, None)
    assert twice.count_unended(plan, GATEWAY) == 5

    gone = sight(plan, 9000, twice, None, None, None)
    assert gone.count_unended(plan, GATEWAY) == 5
    again = sight(plan, 9000, gone, None, LIVE, OVER)
    assert again.count_unended(plan, GATEWAY) == 6
    assert len(again.alive_at(plan, GATEWAY)) == 4


def test_an_end_is_believed_by_two_looks_where_packets_are_not_counted() -> None:
    plan, over = make(), OVER._replace(packets_in=None, packets_out=None)

    first = sight(plan, 1000, None, over, over, over)

    assert sight(plan, 2000, first, over, over, over).count_unended(plan, GATEWAY) == 3


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"at": 1, "alive": []},
        {"at": 1, "alive": [], "ended": []},
        {"at": 1, "alive": [[0, "-1"]], "ended": [], "ending": []},
        {"at": 1, "alive": [[0, "x"]], "ended": [], "ending": []},
        {"at": 1, "alive": [["a", "1"]], "ended": [], "ending": []},
        {"at": None, "alive": [], "ended": [], "ending": []},
        {"at": 1, "alive": 5, "ended": [], "ending": []},
        {"at": 1, "alive": [], "ended": [], "ending": [[0, [[1, 2]]]]},
    ],
)
def test_a_sighting_is_read_as_it_is_written_or_not_at_all(value: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Sighting.from_json(value)


# ---- strays -------------------------------------------------------------------------------------

TABLE = SeenTable(
    chains=("gate", "gate-a", "gate-b", "gate-at-10.2.0.10", "in-at-fd00_3__20", "mine"),
    sets=("kept-a-0", "kept-b-0", "listen-a-1", "held4", "others"),
    rules=(
        ("gate-at-10.2.0.10", "a"),
        ("gate-at-10.2.0.10", "b"),
        ("gate-a", "open"),
        ("in-at-fd00_3__20", "a:listeners"),
        ("mine", "somebody: else"),
    ),
    held=(OLD4,),
    there=True,
    silent=True,
)


def test_a_stray_is_cleared_beside_a_move_that_is_known() -> None:
    """Chains and sets of other names, and the other move's rules, are not touched."""
    gate, listeners = "gate-at-10.2.0.10", "in-at-fd00_3__20"
    assert find_undos(TABLE, frozenset("b"), frozenset((OLD4,)), sure=True) == (
        Undo("inet", "chain", "gate-a"),
        Undo("inet", "set", "kept-a-0"),
        Undo("inet", "set", "listen-a-1"),
        Undo("inet", "rule", gate, "a"),
        Undo("inet", "element", "gate4", "10.2.0.10", unused=gate),
        Undo("inet", "chain", gate, unused=gate),
        Undo("inet", "rule", listeners, "a:listeners"),
        Undo("inet", "element", "in6", "fd00:3::20", unused=listeners),
        Undo("inet", "chain", listeners, unused=listeners),
    )


def test_a_chain_of_a_move_whose_name_looks_like_an_address_is_its_gate() -> None:
    rules = (("gate-at-beef", ""), ("gate-at-10.2.0.10", "at-beef"), ("gate-at-1.2", "at-beef"))
    table = SeenTable(("gate-at-beef", "gate-at-10.2.0.10"), rules=rules, held=(OLD4,), there=True)

    assert table.olds_of("at-beef") == {OLD4}
    undos = find_undos(table, frozenset(), frozenset(), sure=True)
    assert Undo("inet", "chain", "gate-at-beef") in undos
    assert [undo.name for undo in undos if undo.kind == "element"] == ["gate4", "held4"]


def test_where_all_are_known_nothing_goes() -> None:
    assert find_undos(TABLE, frozenset("ab"), frozenset((OLD4,)), sure=True) == ()
    assert find_undos(SeenTable(), frozenset(), frozenset(), sure=True) == ()


def test_what_is_held_goes_unless_a_journal_cannot_be_read() -> None:
    """Its move is known by name only; whose OLD is held is not known then."""
    held = Undo("inet", "element", "held4", str(OLD4)), Undo("arp", "element", "silent", str(OLD4))

    sure, unsure = (find_undos(TABLE, frozenset("b"), frozenset(), sure=s) for s in (True, False))

    assert [undo for undo in sure if undo not in unsure] == [*held]
    assert Undo("inet", "set", "kept-a-0") in unsure
