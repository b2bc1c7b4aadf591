"""kernel/nft_messages.py: what natkeep packs itself the kernel has as it has libnftables' text."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address
from typing import TypeVar

import pytest
from golden_rules import CASES, Case

from natkeep.kernel import nftables
from natkeep.kernel.netlink import NETLINK_NETFILTER, NLM_F_DUMP, Netlink, attribute, attributes
from natkeep.kernel.netns import entered
from natkeep.kernel.nft_messages import pack_objects
from natkeep.plan import base_chains, filters, listeners
from natkeep.plan.filters import owned_table, owned_table_name
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.nft import DROP, TABLE, Chain, Match, NatMap, Object, Rule, Set, Table, TcpFlags
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import FillSet, InstallGate, Loads
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

T = TypeVar("T")
Shown = dict[int, object]
"""An object's attributes, by number."""

TABLES, CHAINS, RULES, SETS, ELEMENTS = 1, 4, 7, 10, 13
PASSING: dict[int, set[int]] = {TABLES: {4}, CHAINS: {2}, RULES: {3, 6}, SETS: {16, 19}}
"""What tells an object from others of its kind (handles, an address), and not what it is."""
USERDATA, TYPEOF = 13, 3

EACH_FAMILY = pytest.mark.parametrize(
    ("old", "new", "peer"),
    [("10.2.0.10", "10.3.0.20", "10.1.0.2"), ("fd00:2::10", "fd00:3::20", "fd00:1::2")],
)


def dump(netlink: Netlink, kind: int, body: bytes) -> Iterator[dict[int, bytes]]:
    for answer in netlink.request(10 << 8 | kind, NLM_F_DUMP, body):
        yield {0: answer[:1], **attributes(answer[4:])}


def user_data(told: bytes) -> list[bytes]:
    """Its entries, without the one in which nft 1.0.6 notes of what expression a type was made.

    It is empty, and `list` shows the type of the set with it and without.
    """
    found = []
    while told:
        entry, told = told[: 2 + told[1]], told[2 + told[1] :]
        if entry[0] != TYPEOF:
            found.append(entry)
    return found


def all_elements(netlink: Netlink, one: dict[int, bytes]) -> list[bytes]:
    """In an order of their own: a hash has none that two sets would share."""
    body = one[0] + bytes(3) + attribute(1, one[1]) + attribute(2, one[2])
    found = []
    for answer in dump(netlink, ELEMENTS, body):
        some = answer.get(3, b"")
        while some:
            length = struct.unpack_from("=H", some)[0] + 3 & ~3
            found.append(some[:length])
            some = some[length:]
    return sorted(found)


def ruleset() -> dict[int, list[Shown]]:
    """All that is in the namespace that we are in, in the kernel's own words."""
    seen: dict[int, list[Shown]] = {}
    with Netlink(NETLINK_NETFILTER) as netlink:
        for kind, passing in PASSING.items():
            seen[kind] = []
            for one in list(dump(netlink, kind, bytes(4))):
                shown: Shown = {n: value for n, value in one.items() if n not in passing}
                if kind == SETS:
                    shown[USERDATA] = user_data(one[USERDATA])
                    shown[ELEMENTS] = all_elements(netlink, one)
                seen[kind].append(shown)
    return seen


def load(netns: str, objects: Iterable[T], way: Callable[[Iterable[T]], None]) -> object:
    """What the kernel says then, and what nft does."""
    with entered(netns):
        way(objects)
        seen = ruleset()
        command = ["nft", "--json", "list", "ruleset"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        nftables.run_transaction(["flush ruleset"])
    return seen, re.sub(r"\"(handle|elem)\": (\d+|\[.*?\]\]?)", "", text)


def by_text(objects: Iterable[Object]) -> None:
    nftables.run_transaction(map(str, objects))


def by_messages(objects: Iterable[Object]) -> None:
    nftables.send_batch(pack_objects(objects))


def owned(old: str, new: str, peer: str, role: Role) -> list[Object]:
    """An owned table without its owner: it would be gone before one could look."""
    ends = Endpoint(ip_address(peer), 5000), Endpoint(ip_address(old), 80)
    move = Move("web", (Map(ip_address(old), ip_address(new)),), (Site(role, "x"),))
    plan = make_plan(move, Connections.of([FourTuple(*ends)]))
    objects = owned_table("web", plan.translations)
    assert f"create table inet {owned_table_name('web')} {{ flags owner; }}" == str(objects[0])
    return [
        one._replace(name=TABLE, owner=False)
        if isinstance(one, Table)
        else one._replace(table=TABLE)  # type: ignore[union-attr]
        for one in objects
    ]


@pytest.mark.root
@pytest.mark.needs("nftables")
@pytest.mark.parametrize("role", [Role.GATEWAY, Role.DESTINATION])
@EACH_FAMILY
def test_the_kernel_has_the_same_of_an_owned_table(
    old: str, new: str, peer: str, role: Role, netns: str
) -> None:
    objects = owned(old, new, peer, role)

    ours, theirs = (load(netns, objects, way) for way in (by_messages, by_text))

    assert "outer-0" in str(ours)
    assert ours == theirs


@pytest.mark.root
@pytest.mark.needs("nftables")
def test_the_kernel_has_the_same_of_what_opens(netns: str) -> None:
    chains = [base_chains.gate_chain("web"), "callers-web", filters.reset_chain("web")]
    opening = [
        filters.opening("web"),
        listeners.opening("web"),
        filters.reset_opening("web"),
    ]
    objects: list[Object] = [Table(), *map(Chain, chains), *opening]

    ours, theirs = (load(netns, objects, way) for way in (by_messages, by_text))

    assert str(ours).count("'comment': 'open'") + str(ours).count('"comment": "open"') == 3
    assert ours == theirs


MASQUERADED = {
    "10.1.0.2": ("10.1.0.2:50594", "10.2.0.10:80", "10.2.0.1:20001", "10.2.0.10:80"),
    "fd00:1::2": ("[fd00:1::2]:50594", "[fd00:9::1]:8080", "[fd00:2::1]:20001", "[fd00:2::10]:80"),
}
"""A client and where it dials, and the same as the process sees them."""


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_FAMILY
def test_the_kernel_has_the_same_of_what_fills_a_map(
    old: str, new: str, peer: str, netns: str
) -> None:
    client, dialled, masked, local = map(Endpoint.parse, MASQUERADED[peer])
    kept = Connections.of([FourTuple(masked, local)])
    around = Surroundings(carried=kept, carriers=Connections.of([FourTuple(client, dialled)]))
    move = Move("web", (Map(ip_address(old), ip_address(new)),), (Site(Role.GATEWAY, "x"),))
    steps = make_plan(move, kept, around).steps
    fills = [step for step in steps if isinstance(step, FillSet)]
    sets = [one for step in steps if isinstance(step, InstallGate) for one in step.objects()]
    made = [Table(), *(one for one in sets if isinstance(one, Set))]

    def packed(objects: Iterable[Object]) -> None:
        by_text(objects)
        nftables.fill_sets(one for step in fills for one in step.fillings())

    def typed(objects: Iterable[Object]) -> None:
        nftables.run_transaction([*map(str, objects), *(ln for s in fills for ln in s.lines())])

    ours, theirs = (load(netns, made, way) for way in (packed, typed))

    assert "to-outer-web-0" in str(ours)
    assert ours == theirs


def loaded(case: Case) -> tuple[list[Object], list[list[Object]]]:
    """What all moves share, and what each step of this one adds; but for what no text can say."""
    plan = case.plan()
    steps = [one for one in plan.steps if isinstance(one, Loads)]
    parts = dict.fromkeys(part for step in steps for part in step.static())
    own = [[one for one in step.objects() if not is_raw(one)] for step in steps]
    return [one for part in parts for one in part], own


def is_raw(one: Object) -> bool:
    return isinstance(one, Rule) and one.is_raw()


def is_packed(objects: Iterable[Object]) -> bool:
    try:
        pack_objects(objects)
    except TypeError:
        return False
    return True


@pytest.mark.root
@pytest.mark.needs("nftables")
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_has_the_same_of_a_move_among_thousands(name: str, netns: str) -> None:
    """What of it goes packed: some by its text, of the same move, takes nothing from that."""
    shared, steps = loaded(CASES[name])

    def mixed(steps: Iterable[list[Object]]) -> None:
        by_text(shared)
        for one in steps:
            (by_messages if is_packed(one) else by_text)(one)

    def typed(steps: Iterable[list[Object]]) -> None:
        by_text(shared)
        for one in steps:
            by_text(one)

    ours, theirs = (load(netns, steps, way) for way in (mixed, typed))

    assert "web" in str(ours)
    assert ours == theirs


@pytest.mark.parametrize("name", ["gateway-v4", "gateway-two-maps", "gateway-publishes-a-port"])
def test_all_of_a_gateways_move_goes_packed(name: str) -> None:
    _, steps = loaded(CASES[name])

    assert len(steps) == 3
    assert all(map(is_packed, steps))


@pytest.mark.root
@pytest.mark.needs("nftables")
def test_a_difference_would_show(netns: str) -> None:
    """One octet of one expression."""
    rule = Rule("one", (TcpFlags(("fin", "syn"), ("syn",)), DROP))
    other = rule._replace(statements=(TcpFlags(("syn",), ("syn",)), DROP))

    ours = load(netns, [Table(), Chain("one"), rule], by_messages)
    theirs = load(netns, [Table(), Chain("one"), other], by_text)

    assert ours != theirs


@pytest.mark.parametrize(
    "statement", [NatMap("dnat", ("ip daddr",), "to"), base_chains.FROM_WIRE, filters.RETURN]
)
def test_what_goes_by_its_text_is_not_packed(statement: object) -> None:
    with pytest.raises(TypeError, match="goes by its text"):
        pack_objects([Rule("one", (statement,))])  # type: ignore[arg-type]


def test_a_port_is_packed_as_a_number_and_an_address_as_its_octets() -> None:
    [message] = pack_objects([Rule("one", (Match(("tcp dport",), 80),))])
    assert b"\x00\x50" in message.body
    [message] = pack_objects([Rule("one", (Match(("ip daddr",), ip_address("10.3.0.20")),))])
    assert ip_address("10.3.0.20").packed in message.body
