"""plan/other_rules.py: rules followed for a packet, what is sure and what is not."""

from __future__ import annotations

import sys
from ipaddress import ip_address

from natkeep.plan.other_rules import (
    Chain,
    Element,
    Expression,
    Hook,
    Ruleset,
    find_virtual,
    follow,
)
from natkeep.plan.packet import ANY, ESTABLISHED, NEW, UNTRACKED, Effect, Packet
from natkeep.plan.protocols import UDP
from natkeep.plan.tuples import Endpoint, FourTuple
from natkeep.values import replace

TUPLE = FourTuple(Endpoint(ip_address("10.3.0.20"), 5000), Endpoint(ip_address("10.1.0.2"), 50001))
PACKET = Packet(TUPLE, (2, "pod"), (3, "eth0"), NEW)
FILTER = frozenset({"filter"})
ACCEPT, DROP = (Expression("verdict", 0, word, ("",)) for word in ("accept", "drop"))
MASQUERADE = Expression("do", 0, "masquerade", ())


def load(what: str, *at: int) -> Expression:
    return Expression("load", 1, what, at)


def equals(value: bytes, word: str = "==") -> Expression:
    return Expression("cmp", 1, word, (value,))


FROM_NEW = (load("payload 1", 12, 4), equals(TUPLE.source.address.packed))
FROM_ANOTHER = (load("payload 1", 12, 4), equals(bytes(4)))
DROPPED = Effect("drop", "ip t c", True)
STRANGE = Expression("unknown", 0, "numgen", ())


def does(
    *rules: tuple[Expression, ...],
    drops: bool = False,
    sets: dict[str, dict[bytes, Element]] | None = None,
    **chains: object,
) -> list[Effect]:
    found = {("ip t", "c"): Chain(Hook("forward", 0, "filter", drops), [*rules])}
    for name, more in chains.items():
        found["ip t", name] = Chain(None, [*more])  # type: ignore[misc]
    ruleset = Ruleset(found, lambda table, name, key: (sets or {})[name].get(key))
    return follow(ruleset, "forward", PACKET, FILTER)


def test_a_rule_that_matches_is_sure_one_that_cannot_is_left_out() -> None:
    assert does((*FROM_NEW, MASQUERADE)) == [Effect("masquerade", "ip t c", True)]
    assert does((*FROM_ANOTHER, MASQUERADE)) == []
    assert does((STRANGE, MASQUERADE)) == [Effect("masquerade", "ip t c", False)]


def test_what_is_accepted_for_sure_is_not_dropped_by_what_comes_behind() -> None:
    assert does((*FROM_NEW, ACCEPT), (DROP,), drops=True) == []
    assert does((*FROM_ANOTHER, ACCEPT), (DROP,)) == [Effect("drop", "ip t c", True)]
    assert does((STRANGE, ACCEPT), (DROP,)) == [Effect("drop", "ip t c", False)]
    assert does(drops=True) == [Effect("drop", "ip t c", True)]
    verdicts = (Expression("verdicts", 0, "lookup", ()),)
    assert does(verdicts, drops=True) == [Effect("drop", "ip t c", False)]


def test_jumps_come_back_and_gotos_do_not() -> None:
    jump = (Expression("verdict", 0, "jump", ("o",)),)
    goto = (Expression("verdict", 0, "goto", ("o",)),)
    back = (Expression("verdict", 0, "return", ("",)),)
    assert does(jump, (DROP,), o=[back]) == [Effect("drop", "ip t c", True)]
    assert does(jump, (DROP,), o=[(ACCEPT,)]) == []
    assert does(goto, (DROP,), o=[back]) == []
    assert does((STRANGE, *jump), (DROP,), o=[(ACCEPT,)]) == [Effect("drop", "ip t c", False)]
    loop = (Expression("verdict", 0, "jump", ("c",)),)
    assert {effect.sure for effect in does(loop, (DROP,))} == {False}


def test_devices_prefixes_masks_states_and_marks() -> None:
    prefix = (load("payload 1", 12, 2), equals(bytes((10, 3))))
    device = (load("oifname"), equals(b"eth0".ljust(16, b"\0")))
    pods = (load("iifname"), equals(b"po"))
    bits = (8).to_bytes(4, sys.byteorder)
    fresh = (
        load("ct state"), Expression("mask", 1, "", (1, bits, bytes(4))), equals(bytes(4), "!=")
    )  # fmt: skip
    unmarked = Expression("marked", 0, "==", (0, 0xFF))
    marked = Expression("marked", 0, "==", (1, 0xFF))
    for rule in (prefix, device, pods, fresh, (unmarked,)):
        assert does((*rule, DROP)) == [Effect("drop", "ip t c", True)]
    assert does((marked, DROP)) == []
    ruleset = Ruleset({("ip t", "c"): Chain(Hook("forward", 0, "filter", False), [(*fresh, DROP)])})
    assert follow(ruleset, "forward", Packet(TUPLE, state=ESTABLISHED), FILTER) == []


PORT = (5000).to_bytes(2, "big")
SPORT = load("payload 2", 0, 2)


def test_ranges_and_what_is_compared_with_another_width() -> None:
    between = (SPORT, Expression("range", 1, "==", (bytes(2), b"\xff\xff")))
    beyond = (SPORT, Expression("range", 1, "==", (b"\xf0\x00", b"\xff\xff")))
    assert does((*between, DROP)) == [Effect("drop", "ip t c", True)]
    assert does((*beyond, DROP)) == []


def test_what_a_set_has_is_asked_with_the_whole_key() -> None:
    sets = {
        "s": {PORT: Element()},
        "two": {TUPLE.source.address.packed + PORT + bytes(2): Element()},
    }
    one = (SPORT, Expression("lookup", 1, "==", ("ip t", "s", 2)))
    none = (SPORT, Expression("lookup", 1, "!=", ("ip t", "s", 2)))
    both = (
        Expression("load", 8, "payload 1", (12, 4)),
        Expression("load", 9, "payload 2", (0, 2)),
        Expression("lookup", 8, "==", ("ip t", "two", 8)),
    )
    half = (SPORT, Expression("lookup", 1, "==", ("ip t", "two", 8)))
    comes_and_goes = (SPORT, Expression("lookup", 1, "==", ()))
    for rule in (one, both):
        assert does((*rule, DROP), sets=sets) == [Effect("drop", "ip t c", True)]
    assert does((*none, DROP), sets=sets) == []
    for rule in (half, comes_and_goes):
        assert does((*rule, DROP), sets=sets) == [Effect("drop", "ip t c", False)]


def test_a_verdict_map_ends_or_jumps_and_what_it_has_not_goes_on() -> None:
    verdicts = (SPORT, Expression("verdicts", 1, "0", ("ip t", "m", 2)))
    for verdict, expected in (
        (Element("accept"), []),
        (Element("drop"), [Effect("drop", "ip t c", True)]),
        (Element("jump", "o"), [Effect("masquerade", "ip t o", True)]),
        (Element("continue"), [DROPPED]),
        (None, [DROPPED]),
    ):
        sets = {"m": {PORT: verdict} if verdict else {}}
        assert does(verdicts, drops=True, sets=sets, o=[(MASQUERADE,)]) == expected


def test_a_device_that_is_not_known_leaves_a_doubt() -> None:
    by_name, by_index = load("oifname"), load("oif")
    for at, value in ((by_name, b"eth0"), (by_index, (3).to_bytes(4, sys.byteorder))):
        rule = (at, equals(value), ACCEPT)
        ruleset = Ruleset({("ip t", "c"): Chain(Hook("forward", 0, "filter", True), [rule])})
        for oif, expected in (((3, "eth0"), []), ((4, "tun0"), [True]), (ANY, [False])):
            packet = Packet(TUPLE, (2, "pod"), oif, NEW)
            found = follow(ruleset, "forward", packet, FILTER)
            assert [effect.sure for effect in found] == expected


def test_what_comes_back_by_the_same_device_passes_a_filter_of_the_reverse_path() -> None:
    for what, missing in (("fib", bytes(4)), ("fib present", b"\0")):
        rule = (load(what), equals(missing), DROP)
        ruleset = Ruleset({("ip t", "c"): Chain(Hook("forward", 0, "filter", False), [rule])})
        for back, expected in ((2, []), (3, [True]), (None, [False])):
            packet = Packet(TUPLE, (2, "pod"), (3, "eth0"), back=back)
            found = follow(ruleset, "forward", packet, FILTER)
            assert [effect.sure for effect in found] == expected


def test_marks_are_carried_to_the_rules_behind() -> None:
    five = (5).to_bytes(4, sys.byteorder)
    from_map = (SPORT, Expression("map", 1, "2", ("ip t", "m", 2)), Expression("mark", 2, "", ()))
    sets = {"m": {PORT: Element(data=five)}}
    unmarked = (load("mark"), equals(five, "!="), DROP)
    for rule in ((Expression("set", 1, "", (five,)), Expression("mark", 1, "", ())), from_map):
        assert [one.does for one in does(rule, unmarked, sets=sets)] == ["mark 5"]
        masked = (Expression("remark", 0, "mark", (4, 4)), unmarked)
        assert [one.does for one in does(rule, (masked[0],), unmarked, sets=sets)] == ["mark 5"] * 2
    saved = (Expression("remark", 0, "connmark", (0, 0xFFFFFFFF, 0xFF)),)
    restored = (Expression("remark", 0, "mark", (0, 0xF0, 0xFF)),)
    assert [one.does for one in does(rule, saved, restored, sets=sets)][1:] == [
        "connmark 5", "mark 0",
    ]  # fmt: skip
    by_connection = (load("ct mark"), Expression("mark", 1, "", ()))
    assert does(by_connection, unmarked)[1:] == [Effect("drop", "ip t c", False)]


def test_what_iptables_matches() -> None:
    for kind, word, values, sure in (
        ("state", "==", (NEW,), True),
        ("state", "==", (ESTABLISHED,), None),
        ("state", "!=", (ESTABLISHED,), True),
        ("ports", "==", (0, 22, 22, 4000, 6000), True),
        ("ports", "==", (1, 22, 22, 4000, 6000), None),
        ("ports", "!=", (2, 80, 90), True),
    ):
        expected = [] if sure is None else [Effect("drop", "ip t c", sure)]
        assert does((Expression(kind, 0, word, values), DROP)) == expected


def test_notrack_is_heeded_in_front_of_conntrack_alone() -> None:
    notrack = (Expression("do", 0, "notrack", ()),)
    untracked = (load("ct state"), equals(UNTRACKED.to_bytes(4, sys.byteorder)), DROP)
    for priority, expected in ((-300, ["notrack", "drop"]), (-200, [])):
        raw = Chain(Hook("forward", priority, "filter", False), [notrack])
        behind = Chain(Hook("forward", 0, "filter", False), [untracked])
        ruleset = Ruleset({("ip t", "raw"): raw, ("ip t", "c"): behind})
        assert [one.does for one in follow(ruleset, "forward", PACKET, FILTER)] == expected


def test_a_datagram_is_asked_for_its_protocol_and_has_no_flags() -> None:
    flags = (load("payload 2", 13, 1), equals(b"\x10"), DROP)
    for what in (load("l4proto"), load("payload 1", 9, 1)):
        rules = [(what, equals(bytes([number])), DROP) for number in (6, 17)]
        for packet, nth in ((PACKET, 0), (replace(PACKET, protocol=UDP), 1)):
            for place, rule in enumerate(rules):
                ruleset = Ruleset(
                    {("ip t", "c"): Chain(Hook("forward", 0, "filter", False), [rule])}
                )
                dropped = follow(ruleset, "forward", packet, FILTER)
                assert dropped == ([DROPPED] if place == nth else [])
    ruleset = Ruleset({("ip t", "c"): Chain(Hook("forward", 0, "filter", False), [flags])})
    [effect] = follow(ruleset, "forward", replace(PACKET, protocol=UDP), FILTER)
    assert not effect.sure


def test_chains_of_some_priorities_or_of_a_device() -> None:
    usual = Chain(Hook("forward", 0, "filter", False), [(DROP,)])
    of_device = Chain(Hook("ingress", 0, "filter", False, ("pod",)), [(DROP,)])
    ruleset = Ruleset({("ip t", "c"): usual, ("netdev t", "c"): of_device})
    assert follow(ruleset, "forward", PACKET, FILTER, range(-10, 0)) == []
    assert len(follow(ruleset, "forward", PACKET, FILTER, range(10))) == 1
    assert len(follow(ruleset, "ingress", PACKET, FILTER)) == 1
    assert follow(ruleset, "ingress", Packet(TUPLE, (3, "eth0")), FILTER) == []


def test_a_server_of_ipvs_is_known_by_its_end() -> None:
    table = """IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A02000A:1388 rr
  -> 0A030014:1388      Masq    1      0          0
TCP  [fd00:0002:0000:0000:0000:0000:0000:0010]:1388 rr
"""
    ends = {text: Endpoint.parse(text) for text in
            ("10.2.0.10:5000", "10.3.0.20:5000", "[fd00:2::10]:5000", "10.2.0.10:80")}  # fmt: skip
    assert [*find_virtual(table, frozenset(ends.values()))] == [
        "virtual server 10.2.0.10:5000",
        "real server 10.3.0.20:5000",
        "virtual server [fd00:2::10]:5000",
    ]
    assert [*find_virtual(table, frozenset([ends["10.2.0.10:80"]]))] == []
