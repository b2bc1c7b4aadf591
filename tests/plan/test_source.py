"""tests of the source in the plan: order, quiet, and the text of CRIU's lock."""

from __future__ import annotations

import pytest

from natkeep.errors import UsageError
from natkeep.plan import criu_lock as locks
from natkeep.plan.criu_lock import DumpLock, NetworkLock, find_rules, render_deletion
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.plan_text import render_nft
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import FillSet, HoldListeners, InstallGate, OpenGate, Plan, TakeOverLock
from natkeep.plan.syn_block import block
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint, FourTuple, parse_address

RUN = "aaf6b8e3-c33b-47e9-baff-d0ec3de03291"
NFT = DumpLock(NetworkLock.NFTABLES, RUN)
IPTABLES = DumpLock(NetworkLock.IPTABLES, RUN)
GATEWAY, DESTINATION, SOURCE = (
    Site(role, name)
    for role, name in ((Role.GATEWAY, "gw"), (Role.DESTINATION, "dst"), (Role.SOURCE, "src"))
)
MAPS = tuple(
    Map(parse_address(old), parse_address(new))
    for old, new in (("10.2.0.10", "10.3.0.20"), ("fd00:2::10", "fd00:3::20"))
)
HELD = (Endpoint.parse("10.2.0.10:80"), Endpoint.parse("0.0.0.0:443"), Endpoint.parse("[::]:22"))


def inbound(text: str) -> FourTuple:
    peer, local = text.split(" > ")
    return FourTuple(Endpoint.parse(peer), Endpoint.parse(local))


FOUR = inbound("10.1.0.2:40212 > 10.2.0.10:5000")
SIX = inbound("[fd00:1::2]:55216 > [fd00:2::10]:5000")
BOTH = Connections.of([FOUR, SIX])


def plan(*sites: Site, lock: DumpLock | None = NFT, mode: Mode = Mode.STATEFUL) -> Plan:
    return make_plan(Move("web", MAPS, sites, mode, lock=lock), BOTH)


# ---- steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(Mode))
def test_the_source_comes_last_and_its_lock_last_of_all(mode: Mode) -> None:
    made = plan(SOURCE, DESTINATION, GATEWAY, mode=mode)

    assert made.move.ordered_sites() == (GATEWAY, DESTINATION, SOURCE)
    at_source = [type(step) for step in made.prepare if step.site == SOURCE]
    assert at_source == [InstallGate, FillSet, FillSet, TakeOverLock]
    assert isinstance(made.prepare[-1], TakeOverLock)
    assert made.prepare[-1].connections == BOTH


def test_nothing_is_opened_at_the_source_while_the_process_is_elsewhere() -> None:
    assert [step.site for step in plan(SOURCE, DESTINATION, GATEWAY).open] == [GATEWAY, DESTINATION]


def test_a_move_of_a_source_alone_is_opened_there() -> None:
    [opening] = plan(SOURCE).open

    assert opening == OpenGate(SOURCE, "web")
    assert opening.describe() == (
        "ip netns exec src nft 'insert rule inet natkeep gate-web accept comment \"open\"'",
        "# ip netns exec src later, unless another gate is closed: delete chain gate",
    )


@pytest.mark.parametrize(
    "lock",
    [
        None,
        DumpLock(NetworkLock.SKIP, RUN),
        DumpLock(NetworkLock.NFTABLES, None),
    ],
)
def test_a_lock_that_nobody_can_name_is_left(lock: DumpLock | None) -> None:
    steps = plan(SOURCE, lock=lock).prepare

    assert [type(step) for step in steps] == [InstallGate, FillSet, FillSet]


def test_a_quiesce_only_holds() -> None:
    move = Move("web", MAPS, (SOURCE,), held=HELD, quiesces=True)
    made = make_plan(move, NO_CONNECTIONS)

    assert made.prepare == (HoldListeners(SOURCE, "web", HELD),)
    assert made.open == ()


def test_a_move_that_takes_a_quiesce_over_holds_before_the_lock_goes() -> None:
    move = Move("web", MAPS, (SOURCE,), lock=NFT, held=HELD)
    kinds = [type(step) for step in make_plan(move, BOTH).prepare]

    assert kinds[-2:] == [HoldListeners, TakeOverLock]


def test_a_move_has_one_source() -> None:
    with pytest.raises(UsageError, match="one source"):
        plan(SOURCE, Site(Role.SOURCE, "other"))


# ---- what it looks like ---------------------------------------------------------------------


def test_the_source_drops_both_directions_and_translates_nothing() -> None:
    [(_, lines)] = render_nft(plan(SOURCE))
    text = "\n".join(lines)

    assert "nat" not in text.replace("natkeep", "")
    assert "hook output priority -350" in text
    assert (
        "insert rule inet natkeep gate-at-10.2.0.10 ip saddr . tcp sport . tcp dport @kept-web-0 "
        'jump gate-web comment "web"' in lines
    )
    assert (
        "insert rule inet natkeep mute-at-10.2.0.10 ip daddr . tcp dport . tcp sport @kept-web-0 "
        'jump gate-web comment "web"' in lines
    )
    assert (
        "insert rule inet natkeep mute-at-fd00_2__10 ip6 daddr . tcp dport . tcp sport @kept-web-1 "
        'jump gate-web comment "web"' in lines
    )


def test_a_listener_at_all_addresses_is_held_at_all_of_them() -> None:
    syn = "tcp flags & (fin | syn | rst | ack) == syn drop"

    assert tuple(map(str, block("web", HELD, linked=False))) == (
        "add chain inet natkeep hold-web",
        f"add rule inet natkeep hold-web ip daddr 10.2.0.10 tcp dport 80 {syn}",
        f"add rule inet natkeep hold-web tcp dport 443 {syn}",
        f"add rule inet natkeep hold-web tcp dport 22 {syn}",
        'add rule inet natkeep gate jump hold-web comment "web:hold"',
    )


@pytest.mark.parametrize(
    ("lock", "first"),
    [
        (NFT, "nft 'delete table inet CRIU-aaf6b8e3-c33b-47e9-ba'"),
        (
            IPTABLES,
            "iptables -w -t filter -D INPUT -s 10.1.0.2/32 -d 10.2.0.10/32 -p tcp "
            "-m mark ! --mark 0xc114 -m tcp --sport 40212 --dport 5000 -j DROP",
        ),
        (DumpLock(NetworkLock.IPTABLES, whole=True), "iptables -w -t filter -D INPUT -j CRIU"),
    ],
)
def test_taking_the_lock_reads_as_commands(lock: DumpLock, first: str) -> None:
    taking = plan(SOURCE, lock=lock).prepare[-1]

    assert taking.describe()[0] == f"ip netns exec src {first}"


# ---- CRIU's names and rules -----------------------------------------------------------------


def test_the_table_is_named_as_criu_cuts_it_off() -> None:
    """`inet CRIU-…` in 32 octets, as seen with CRIU 4.2.1."""
    assert NFT.table == "CRIU-aaf6b8e3-c33b-47e9-ba"
    assert len(f"inet {NFT.table}") == 31


@pytest.mark.parametrize("run_id", ["", "a b", "x;flush ruleset", "a" * 65, "é"])
def test_a_run_id_that_is_none_is_refused(run_id: str) -> None:
    with pytest.raises(ValueError, match="run id"):
        DumpLock(NetworkLock.NFTABLES, run_id)


def test_criu_packs_both_directions() -> None:
    four = locks.pack_keys(BOTH, 4)

    assert four == {
        bytes.fromhex("0a0100029d1400000a02000a13880000"),
        bytes.fromhex("0a02000a138800000a0100029d140000"),
    }
    assert {len(key) for key in locks.pack_keys(BOTH, 6)} == {40}


RULE = (
    "-A INPUT -s 10.1.0.2/32 -d 10.2.0.10/32 -p tcp -m mark ! --mark 0xc114 -m tcp "
    "--sport 40212 --dport 5000 -j DROP"
)
REPLY = (
    "-A OUTPUT -s 10.2.0.10/32 -d 10.1.0.2/32 -p tcp -m mark ! --mark 0xc114 -m tcp "
    "--sport 5000 --dport 40212 -j DROP"
)


def test_criu_s_rules_are_found_and_deleted_as_they_stand() -> None:
    saved = f"*filter\n:INPUT ACCEPT [0:0]\n{RULE}\n{REPLY}\nCOMMIT\n"
    found = find_rules(saved, IPTABLES, BOTH)

    assert found.tuples == {FOUR}
    assert render_deletion(found) == (
        "*filter",
        RULE.replace("-A", "-D", 1),
        REPLY.replace("-A", "-D", 1),
        "COMMIT",
    )


@pytest.mark.parametrize(
    "line",
    [
        RULE.replace("40212", "40213"),
        RULE.replace("10.1.0.2/32", "10.1.0.0/24"),
        RULE.replace("! --mark", "--mark"),
        RULE.replace("0xc114", "0x1"),
        RULE.replace("DROP", "ACCEPT"),
        RULE.replace("INPUT", "FORWARD"),
        RULE.replace("-j DROP", "-m comment --comment mine -j DROP"),
        RULE.replace("-p tcp", "-p udp"),
        RULE.replace("--sport 40212 --dport 5000", "--sport 5000 --dport 40212"),
        "-A INPUT -j DROP",
        ":CRIU - [0:0]",
        "-A",
        "",
    ],
)
def test_what_is_somebody_else_s_is_left(line: str) -> None:
    found = find_rules(f"*filter\n{line}\nCOMMIT\n", IPTABLES, BOTH)

    assert render_deletion(found) == ()


def test_of_a_namespace_only_criu_s_chain_goes() -> None:
    lock = DumpLock(NetworkLock.IPTABLES, whole=True)
    saved = f":CRIU - [0:0]\n-A INPUT -j CRIU\n-A OUTPUT -j CRIU\n-A INPUT -j DROP\n{RULE}\n"

    assert render_deletion(find_rules(saved, lock, BOTH)) == (
        "*filter",
        "-D INPUT -j CRIU",
        "-D OUTPUT -j CRIU",
        "-F CRIU",
        "-X CRIU",
        "COMMIT",
    )
