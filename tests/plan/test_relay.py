"""`--site relay`: the ports that it counts, what its translation is, and what is refused."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from natkeep.errors import NatkeepError, RefusedError, UsageError
from natkeep.plan.conntrack import entries, stale_tuples
from natkeep.plan.drift import find_drift
from natkeep.plan.move import Fate, Map, Mode, Move, Site
from natkeep.plan.observation import Gate, Observation
from natkeep.plan.relay import RelayFacts, Setting, find_left_on, refuse_relay
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.step_undo import RestoreEntries, RestoreForwarding, undo_of
from natkeep.plan.steps import (
    FillSet,
    InsertEntries,
    InstallGate,
    InstallTranslation,
    OpenEarly,
    PassKept,
    PurgeEntries,
    SwitchForwarding,
    TakeOverLock,
)
from natkeep.plan.strays import owner_of
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.plan.via import Via, parse_via
from natkeep.report import relay_to_json
from natkeep.state.codec import move_from_json, move_to_json
from natkeep.values import replace

RELAY, DESTINATION = Site(Role.RELAY, "a"), Site(Role.DESTINATION, "b")
OLD, NEW, FROM = "10.2.0.10", "10.3.0.20", "10.2.0.11"
SWITCHES = Surroundings(forwarding=("ipv4/conf/eth0/forwarding",))


def inbound(peer: str, local: str = f"{OLD}:80") -> FourTuple:
    return FourTuple(Endpoint.parse(peer), Endpoint.parse(local))


def moves(*sites: Site, via: str = FROM, maps: str = f"{OLD}={NEW}", **options: object) -> Move:
    pairs = (text.split("=") for text in maps.split())
    made = tuple(Map(ip_address(old), ip_address(new)) for old, new in pairs)
    vias = tuple(map(parse_via, via.split()))
    return Move("web", made, sites or (RELAY, DESTINATION), vias=vias, **options)


KEPT = Connections.of(
    [
        inbound("10.1.0.9:443", f"{OLD}:40000"),
        inbound("10.1.0.3:5000"),
        inbound("10.1.0.2:5000"),
    ]
)


def texts(some: Connections) -> list[str]:
    return [str(one) for one in some]


def test_each_port_of_the_process_has_ports_of_its_own_in_the_order_of_the_tuples() -> None:
    relay, destination = make_plan(moves(), KEPT).translations

    assert relay.site == RELAY
    assert relay.kept == relay.outer == KEPT
    assert texts(relay.inner) == [
        f"{FROM}:10000 > {NEW}:40000",
        f"{FROM}:10001 > {NEW}:80",  # that of 10.1.0.2 is counted before
        f"{FROM}:10000 > {NEW}:80",
    ]
    assert destination.outer == relay.inner == relay.wire == destination.wire
    assert destination.inner == destination.kept == KEPT
    assert destination.turns_peers


def test_two_machines_count_the_same_whatever_the_order_and_whatever_either_cannot_keep() -> None:
    local = Surroundings(beside=frozenset({ip_address("10.1.0.2")}))
    turned = Connections.of([*KEPT][::-1])

    relay = make_plan(moves(RELAY), turned, local)
    [destination] = make_plan(moves(DESTINATION), KEPT).translations

    [there] = relay.translations
    assert [each.reason for each in relay.unkept] == ["its peer 10.1.0.2 is on the relay itself"]
    pairs = dict(zip(there.kept, there.inner, strict=True))
    known = dict(zip(destination.kept, destination.outer, strict=True))
    assert len(pairs) == 2
    assert pairs.items() <= known.items()


def test_more_addresses_and_other_ports_are_used_one_after_the_other() -> None:
    move = moves(via=f"{FROM}:20000-20000 10.2.0.12:7000-7001")

    relay, _ = make_plan(move, KEPT).translations

    assert {str(one.source) for one in relay.inner if one.destination.port == 80} == {
        f"{FROM}:20000", "10.2.0.12:7000",
    }  # fmt: skip


def test_two_olds_that_become_one_new_share_the_ports_there() -> None:
    kept = Connections.of([inbound("10.1.0.2:5000"), inbound("10.1.0.2:5001", "10.2.0.9:80")])
    move = moves(RELAY, maps=f"{OLD}={NEW} 10.2.0.9={NEW}")

    made = make_plan(move, kept).translations

    ends = [str(one.source) for each in made for one in each.inner]
    assert sorted(ends) == [f"{FROM}:10000", f"{FROM}:10001"]


def test_its_entries_name_both_ends_with_ports_and_what_was_plain_comes_back() -> None:
    plan = make_plan(moves(RELAY), KEPT)
    [relay] = plan.translations

    first = next(entries(relay))
    assert (str(first.original), str(first.reply)) == (
        f"10.1.0.9:443 > {OLD}:40000",
        f"{NEW}:40000 > {FROM}:10000",
    )
    assert f"{NEW}:40000 > {FROM}:10000" in {str(one) for one in stale_tuples(relay)}
    [purge] = [step for step in plan.prepare if isinstance(step, PurgeEntries)]
    undo = undo_of(purge)
    assert isinstance(undo, RestoreEntries)
    assert undo.outer == undo.kept == KEPT


def test_forwarding_comes_when_strangers_are_dropped_and_criu_s_lock_goes_last() -> None:
    from natkeep.plan.criu_lock import DumpLock, NetworkLock

    lock = DumpLock(NetworkLock.NFTABLES, "aaf6b8e3-c33b-47e9-baff-d0ec3de03291")
    plan = make_plan(moves(lock=lock, hold=True), KEPT, SWITCHES)

    at_relay = [type(step) for step in plan.prepare if step.site == RELAY]
    assert at_relay == [
        InstallGate, FillSet, FillSet, InstallTranslation, PurgeEntries, InsertEntries,
        PassKept, SwitchForwarding, TakeOverLock, OpenEarly,
    ]  # fmt: skip
    assert plan.prepare[0].site == DESTINATION
    [switch] = [step for step in plan.prepare if isinstance(step, SwitchForwarding)]
    assert switch.describe() == ("ip netns exec a sysctl -w net/ipv4/conf/eth0/forwarding=1",)
    assert undo_of(switch) == RestoreForwarding("web", "ipv4/conf/eth0/forwarding")


def test_a_host_that_forwards_already_gets_no_filter() -> None:
    plan = make_plan(moves(RELAY), KEPT)

    assert not [s for s in plan.prepare if isinstance(s, PassKept | SwitchForwarding)]


def test_a_setting_that_another_program_has_switched_off_is_drift() -> None:
    plan = make_plan(moves(RELAY), KEPT, SWITCHES)
    seen = Observation(
        Gate.CLOSED, {}, frozenset(), {}, 0, off=frozenset({"ipv4/conf/eth0/forwarding"})
    )

    assert "setting net/ipv4/conf/eth0/forwarding: it is not 1" in find_drift(plan, RELAY, seen)


def test_moves_tell_by_their_rules_whose_the_forwarding_is() -> None:
    setting = Setting("ipv4/conf/eth0.7/forwarding")
    comments = [setting.comment("web"), "web", ""]

    assert owner_of(setting.comment("web")) == "web"
    assert setting.is_of_natkeep(comments)
    assert not setting.is_of_natkeep(comments, "web")
    assert not Setting("ipv6/conf/eth0.7/force_forwarding").is_of_natkeep(comments)
    assert find_left_on(comments, frozenset()) == (setting,)
    assert find_left_on(comments, frozenset({"web"})) == ()


def test_a_journal_has_the_addresses_and_one_without_them_is_read() -> None:
    move = moves(via=f"{FROM} [fd00:2::11]:20000-20010")
    written = move_to_json(move)

    assert move_from_json(written) == move
    gateway = replace(move, vias=(), sites=(Site(Role.GATEWAY),))
    assert "vias" not in move_to_json(gateway)


@pytest.mark.parametrize(
    ("text", "via"),
    [
        (FROM, Via(ip_address(FROM), 10000, 32767)),
        (f"{FROM}:1-2", Via(ip_address(FROM), 1, 2)),
        ("fd00::1", Via(ip_address("fd00::1"))),
        ("[fd00::1]:20-30", Via(ip_address("fd00::1"), 20, 30)),
    ],
)
def test_a_via_is_an_address_and_its_ports(text: str, via: Via) -> None:
    assert parse_via(text) == via
    assert parse_via(str(via)) == via


@pytest.mark.parametrize(
    ("text", "error", "why"),
    [
        ("here", UsageError, "--via here"),
        (f"{FROM}:", UsageError, "--via"),
        (f"{FROM}:80", UsageError, "--via"),
        (f"{FROM}:90-80", UsageError, "90-80 is no range"),
        (f"{FROM}:0-80", UsageError, "0-80 is no range"),
        (f"{FROM}:1-70000", UsageError, "1-70000 is no range"),
        (f"{FROM}:a-b", UsageError, "'a-b' is no range"),
        ("127.0.0.1", RefusedError, "no address of a wire"),
        ("fe80::1%eth0", UsageError, "has a zone"),
    ],
)
def test_a_via_that_is_none_is_refused(text: str, error: type[NatkeepError], why: str) -> None:
    with pytest.raises(error, match=why):
        parse_via(text)


@pytest.mark.parametrize(
    ("sites", "options", "error", "why"),
    [
        ((RELAY, Site(Role.SOURCE)), {}, UsageError, "is the source site, too"),
        ((RELAY, Site(Role.GATEWAY)), {}, RefusedError, "has no gateway"),
        ((Site(Role.GATEWAY),), {}, RefusedError, "has no gateway"),
        ((RELAY, Site(Role.RELAY, "c")), {}, UsageError, "a move has one relay"),
        ((RELAY,), {"via": ""}, RefusedError, "no --via of IPv4"),
        ((RELAY,), {"via": "fd00:2::11"}, RefusedError, "no --via of IPv4"),
        ((RELAY,), {"via": OLD}, RefusedError, f"{OLD} is an OLD or a NEW"),
        ((RELAY,), {"mode": Mode.STATELESS}, RefusedError, "stateless is not for"),
        ((DESTINATION,), {"mode": Mode.STATELESS}, RefusedError, "stateless is not for"),
        ((RELAY,), {"live": True}, RefusedError, "--live is not for"),
        ((RELAY,), {"unkept": Fate.RESET}, RefusedError, "reset is not for"),
        (
            (RELAY,),
            {"listeners": (Endpoint.parse(f"{OLD}:80"),)},
            RefusedError,
            "--listeners is not for",
        ),
    ],
)
def test_a_move_that_no_relay_can_make_is_refused(
    sites: tuple[Site, ...], options: dict[str, object], error: type[NatkeepError], why: str
) -> None:
    with pytest.raises(error, match=why):
        moves(*sites, **options)


def test_too_few_ports_are_refused() -> None:
    with pytest.raises(RefusedError, match="too few ports: 1 for the connections at port 80"):
        make_plan(moves(via=f"{FROM}:20000-20000"), KEPT)


FINE = RelayFacts(True, frozenset({ip_address(FROM)}), range(32768, 61000), None, 0)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (replace(FINE, living=2), "2 of the connections still have their sockets"),
        (replace(FINE, routed=False), f"no route to NEW {NEW}"),
        (replace(FINE, local=frozenset()), f"does not have {FROM}"),
        (replace(FINE, ephemeral=range(32767, 61000)), "takes the ports 32767-60999"),
        (replace(FINE, ephemeral=range(1024, 10001)), "takes the ports 1024-10000"),
        (
            replace(FINE, taken=inbound(f"{NEW}:80", f"{FROM}:10000")),
            f"{FROM}:10000 to {NEW}:80 is a connection there already",
        ),
    ],
)  # fmt: skip
def test_a_host_that_cannot_be_the_relay_is_refused(facts: RelayFacts, why: str) -> None:
    [relay] = make_plan(moves(RELAY), KEPT).translations

    refuse_relay(relay, moves(RELAY).vias, FINE)
    with pytest.raises(RefusedError, match=why):
        refuse_relay(relay, moves(RELAY).vias, facts)


def test_where_all_devices_have_to_forward_all_else_is_dropped_and_routes_are_kept() -> None:
    names = ("ipv6/conf/eth0/accept_ra", "ipv6/conf/all/forwarding")
    plan = make_plan(moves(RELAY), KEPT, Surroundings(forwarding=names))

    switches = [step for step in plan.prepare if isinstance(step, SwitchForwarding)]
    assert [line.split()[-1] for step in switches for line in step.describe()] == [
        "net/ipv6/conf/eth0/accept_ra=2",
        "net/ipv6/conf/all/forwarding=1",
    ]
    [passing] = [step for step in plan.prepare if isinstance(step, PassKept)]
    drops = [rule for rule in passing.rules() if rule.comment != "web"]
    assert [rule.comment for rule in drops] == ["web:ra6-eth0", "web:via6-all"]
    assert [owner_of(rule.comment) for rule in drops] == ["web", "web"]
    assert "iifname" not in str(drops[1])
    left = find_left_on((rule.comment for rule in drops), frozenset())
    assert [(one.name, one.off) for one in left] == [(names[0], "1"), (names[1], "0")]


def test_json_says_what_each_setting_was() -> None:
    plan = make_plan(moves(RELAY), KEPT, SWITCHES)
    name = "ipv4/conf/eth0/forwarding"

    for before in (None, {name: "0"}):
        [said] = relay_to_json(plan, RELAY, before)["forwarding"]
        assert said == {"device": "eth0", "setting": name, "before": "0"}
