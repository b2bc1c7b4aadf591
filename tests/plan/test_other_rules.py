"""plan/other_rules.py: rules followed for a packet, what is sure and what is not."""

from __future__ import annotations

import sys
from ipaddress import ip_address

from natkeep.plan.other_rules import (
    ESTABLISHED,
    NEW,
    Chain,
    Effect,
    Expression,
    Hook,
    Packet,
    Ruleset,
    find_virtual,
    follow,
)
from natkeep.plan.tuples import Endpoint, FourTuple

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
STRANGE = Expression("unknown", 0, "numgen", ())


def does(*rules: tuple[Expression, ...], drops: bool = False, **chains: object) -> list[Effect]:
    found = {("ip t", "c"): Chain(Hook("forward", 0, "filter", drops), [*rules])}
    for name, more in chains.items():
        found["ip t", name] = Chain(None, [*more])  # type: ignore[misc]
    return follow(Ruleset(found), "forward", PACKET, FILTER)


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


def test_sets_and_ranges() -> None:
    port = (5000).to_bytes(2, "big")
    one = (load("payload 2", 0, 2), Expression("lookup", 1, "==", (port, bytes(2))))
    none = (load("payload 2", 0, 2), Expression("lookup", 1, "!=", (port,)))
    between = (load("payload 2", 0, 2), Expression("range", 1, "==", (bytes(2), b"\xff\xff")))
    several = (load("payload 2", 0, 2), Expression("lookup", 1, "==", (port * 4,)))
    assert does((*one, DROP)) == does((*between, DROP)) == [Effect("drop", "ip t c", True)]
    assert does((*none, DROP)) == []
    assert does((*several, DROP)) == [Effect("drop", "ip t c", False)]


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
