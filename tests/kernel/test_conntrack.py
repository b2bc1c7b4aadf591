"""kernel/conntrack.py: entries as another program reads them, and a purge that spares neighbours.

The oracles are pyroute2's parser for what an entry says, and conntrack(8) for making stale ones.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from natkeep.kernel import conntrack, netlink, sysctl
from natkeep.kernel.conntrack_own import find_carried, find_own
from natkeep.kernel.conntrack_purge import purge
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import entered
from natkeep.plan.conntrack import PEER_DIALLED, Entry, entries
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.observation import SeenEntry
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.step_undo import undo_of
from natkeep.plan.steps import InsertEntries, Plan, PurgeEntries
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple

pytestmark = pytest.mark.root
Run = Callable[..., str]

CT_GET = 0x101
LIBERAL, SEEN_REPLY, ASSURED, DST_NAT = 0x08, 0x02, 0x04, 0x20

# peer, OLD, NEW: plain ones, and ones full of octets that a template could be mistaken in
ADDRESSES = {
    "v4": ("10.1.0.2", "10.2.0.10", "10.3.0.20"),
    "v6": ("fd00:1::2", "fd00:2::10", "fd00:3::20"),
    "v4-ones": ("10.255.255.255", "10.255.0.255", "255.255.0.255"),
    "v6-ones": ("fdff:ffff::ffff", "fdff::ffff:ffff", "fdff:0:ffff::"),
    "v4-zeros": ("1.0.0.0", "10.0.0.0", "2.0.0.0"),
}
EACH_CASE = pytest.mark.parametrize("case", ADDRESSES)
EACH_ROLE = pytest.mark.parametrize("role", [Role.GATEWAY, Role.DESTINATION])


@pytest.fixture
def site(netns: str) -> Iterator[str]:
    """The test is inside; the namespace tracks nothing by itself."""
    with entered(netns):
        yield netns


def plan_of(case: str, role: Role, netns: str, mode: Mode = Mode.STATEFUL, count: int = 4) -> Plan:
    """Connections from two peers, and ports that hold 0xffff and 0x0001."""
    peer, old, new = (ip_address(text) for text in ADDRESSES[case])
    ports = [65535, 1, 0xFF00, 0x00FF, *range(5000, 5000 + count)][:count]
    kept = Connections.of(
        FourTuple(Endpoint(_shift(peer, i % 2), port), Endpoint(old, 65535 - i % 3))
        for i, port in enumerate(ports)
    )
    return make_plan(Move("web", (Map(old, new),), (Site(role, netns),), mode), kept)


def _shift(address: Address, by: int) -> Address:
    return ip_address(int(address) ^ by)


def translation_of(case: str, role: Role, netns: str, count: int = 4) -> Translation:
    [translation] = plan_of(case, role, netns, count=count).translations
    return translation


def read_entries() -> dict[Entry, dict[str, Any]]:
    """Every TCP entry of this thread's namespace, by its two tuples."""
    from pyroute2.netlink.nfnetlink.nfctsocket import nfct_msg

    found = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        with netlink.Netlink(netlink.NETLINK_NETFILTER) as dump:
            answers = [*dump.request(CT_GET, netlink.NLM_F_DUMP, bytes((family, 0, 0, 0)))]
        for answer in answers:
            message = nfct_msg(netlink.message(CT_GET, 0, answer))
            message.decode()
            original, reply = (_read_tuple(message, f"CTA_TUPLE_{d}") for d in ("ORIG", "REPLY"))
            tcp = message.get_nested("CTA_PROTOINFO", "CTA_PROTOINFO_TCP")
            flags = [tcp.get_attr(f"CTA_PROTOINFO_TCP_FLAGS_{d}") for d in ("ORIGINAL", "REPLY")]
            found[Entry(original, reply)] = {
                "status": message.get_attr("CTA_STATUS"),
                "timeout": message.get_attr("CTA_TIMEOUT"),
                "flags": [set_ for set_, _ in flags],  # and which of them are valid
                "state": tcp.get_attr("CTA_PROTOINFO_TCP_STATE"),
            }
    return found


def _read_tuple(message: Any, name: str) -> FourTuple:
    ip = message.get_nested(name, "CTA_TUPLE_IP")
    ports = message.get_nested(name, "CTA_TUPLE_PROTO")
    ends = []
    for side in ("SRC", "DST"):
        text = ip.get_attr(f"CTA_IP_V4_{side}") or ip.get_attr(f"CTA_IP_V6_{side}")
        ends.append(Endpoint(ip_address(text), ports.get_attr(f"CTA_PROTO_{side}_PORT")))
    return FourTuple(*ends)


def track(run: Run, netns: str, tuple_: FourTuple, *, state: str = "ESTABLISHED") -> None:
    """An entry without NAT, as the kernel makes one when it sees a packet of *tuple_*."""
    source, destination = tuple_.source, tuple_.destination
    run(
        netns,
        *("conntrack", "-I", "-p", "tcp", "-s", str(source.address)),
        *("-d", str(destination.address), "--sport", str(source.port)),
        *("--dport", str(destination.port), "--state", state, "--timeout", "999"),
    )


def look_up(translation: Translation) -> list[SeenEntry | None]:
    with netlink.Netlink(netlink.NETLINK_NETFILTER) as socket_:
        return [*conntrack.look_up(socket_, translation)]


@EACH_CASE
@EACH_ROLE
def test_the_kernel_has_the_entries_that_the_plan_says(site: str, case: str, role: Role) -> None:
    translation = translation_of(case, role, site)

    conntrack.insert(translation)

    found = read_entries()
    assert set(entries(translation)) == set(found)
    for entry in found.values():
        assert entry["status"] & (SEEN_REPLY | ASSURED | DST_NAT) == SEEN_REPLY | ASSURED | DST_NAT
        assert entry["state"] == 3  # ESTABLISHED
        assert 431_990 <= entry["timeout"] <= 432_000
        assert all(flags & LIBERAL for flags in entry["flags"])


@EACH_ROLE
def test_conntrack_lists_them_as_destination_nat(site: str, run: Run, role: Role) -> None:
    translation = translation_of("v4", role, site)

    conntrack.insert(translation)

    assert run(site, "conntrack", "-L", "--dst-nat").count("[ASSURED]") == 4
    assert run(site, "conntrack", "-L", "--src-nat") == ""


def test_stateless_entries_translate_nothing(site: str, run: Run) -> None:
    [translation] = plan_of("v4", Role.GATEWAY, site, Mode.STATELESS).translations

    conntrack.insert(translation)

    assert set(entries(translation)) == set(read_entries())
    assert run(site, "conntrack", "-L", "--dst-nat") == ""
    assert all(seen is not None and seen.translated for seen in look_up(translation))


def test_the_timeout_is_the_one_of_the_namespace(site: str) -> None:
    assert sysctl.write("netfilter/nf_conntrack_tcp_timeout_established", "7777")

    conntrack.insert(translation_of("v4", Role.GATEWAY, site))

    assert all(7770 <= entry["timeout"] <= 7777 for entry in read_entries().values())


def neighbours(tuple_: FourTuple) -> list[FourTuple]:
    """Tuples that differ from it in one bit of one field."""
    source, destination = tuple_.source, tuple_.destination
    return [
        FourTuple(Endpoint(_shift(source.address, 4), source.port), destination),
        FourTuple(Endpoint(source.address, source.port ^ 4), destination),
        FourTuple(source, Endpoint(_shift(destination.address, 4), destination.port)),
        FourTuple(source, Endpoint(destination.address, destination.port ^ 4)),
    ]


@EACH_CASE
@EACH_ROLE
@pytest.mark.parametrize("which", ["before", "before-reply", "after", "after-reply"])
def test_a_purge_removes_stale_entries_and_spares_their_neighbours(
    site: str, run: Run, case: str, role: Role, which: str
) -> None:
    translation = translation_of(case, role, site)
    before, after = [*translation.tuples()][2]
    stale = before if which.startswith("before") else after
    if which.endswith("reply"):
        stale = stale.reply()
    near = neighbours(stale)[:2]
    for tuple_ in (stale, *near):
        track(run, site, tuple_)

    assert purge(translation) == 1

    assert {Entry(tuple_, tuple_.reply()) for tuple_ in near} == set(read_entries())
    assert purge(translation) == 0


def test_a_purge_spares_neighbours_in_every_field(site: str, run: Run) -> None:
    translation = translation_of("v4", Role.GATEWAY, site, count=1)
    [(before, after)] = translation.tuples()
    near = {near for end in (before, after) for near in neighbours(end)}
    for tuple_ in near:
        track(run, site, tuple_)

    assert purge(translation) == 0

    assert near == {entry.original for entry in read_entries()}


def test_a_purge_of_many_finds_the_first_the_last_and_those_between(site: str, run: Run) -> None:
    """3,000 are several chunks of messages."""
    translation = translation_of("v4", Role.GATEWAY, site, count=3000)
    tuples = [*translation.tuples()]
    for index in (0, 1, 1499, 2998, 2999):
        track(run, site, tuples[index][0])

    assert purge(translation) == 5

    assert read_entries() == {}


@EACH_CASE
def test_our_own_entries_are_purged_too(site: str, case: str) -> None:
    """So that a step that is done again starts from nothing."""
    translation = translation_of(case, Role.DESTINATION, site)
    conntrack.insert(translation)

    purge(translation)

    assert read_entries() == {}


@EACH_ROLE
def test_deleting_takes_ours_and_leaves_others(site: str, run: Run, role: Role) -> None:
    translation = translation_of("v4", role, site)
    conntrack.insert(translation)
    near = neighbours(next(translation.tuples())[0])[0]
    track(run, site, near)

    conntrack.delete(translation)
    conntrack.delete(translation)

    assert {Entry(near, near.reply())} == set(read_entries())


def test_inserting_over_an_existing_entry_says_so(site: str, run: Run) -> None:
    translation = translation_of("v4", Role.GATEWAY, site)
    track(run, site, [*translation.tuples()][3][0])

    with pytest.raises(FileExistsError):
        conntrack.insert(translation)


@EACH_ROLE
@pytest.mark.parametrize("which", ["before", "before-reply", "after", "after-reply"])
def test_whatever_is_in_the_way_the_step_puts_its_entries_there(
    site: str, run: Run, role: Role, which: str
) -> None:
    """With a stale reply tuple the kernel does not refuse: it changes our port, silently (H2)."""
    plan = plan_of("v4", role, site)
    [step] = [step for step in plan.steps if isinstance(step, InsertEntries)]
    before, after = [*step.translation.tuples()][3]
    stale = before if which.startswith("before") else after
    track(run, site, stale.reply() if which.endswith("reply") else stale)
    kernel = LinuxKernel()
    kernel.open_sites([step.site])

    kernel.apply(step, lambda prior: None)

    assert set(entries(step.translation)) <= set(read_entries())
    assert all(seen is not None and seen.translated for seen in look_up(step.translation))


def test_what_is_looked_up_comes_in_the_order_of_the_connections(site: str, run: Run) -> None:
    translation = translation_of("v4", Role.GATEWAY, site)
    conntrack.insert(translation)
    tuples = [before for before, _ in translation.tuples()]
    for tuple_ in tuples[1:3]:
        source, destination = tuple_.source, tuple_.destination
        run(
            site,
            *("conntrack", "-D", "-p", "tcp", "-s", str(source.address)),
            *("--sport", str(source.port), "--dport", str(destination.port)),
        )
    track(run, site, tuples[2])

    seen = look_up(translation)

    assert [entry and entry.translated for entry in seen] == [True, None, False, True]


@pytest.mark.parametrize(
    ("state", "alive"),
    [
        ("ESTABLISHED", True),
        ("FIN_WAIT", True),
        ("CLOSE_WAIT", True),
        ("LAST_ACK", True),
        ("SYN_SENT", True),  # of another connection by this tuple: it says nothing of ours
        ("TIME_WAIT", False),
        ("CLOSE", False),
    ],
)
def test_an_entry_lives_until_its_connection_has_ended(
    site: str, run: Run, state: str, alive: bool
) -> None:
    translation = translation_of("v4", Role.GATEWAY, site, count=1)
    track(run, site, next(translation.tuples())[0], state=state)

    [seen] = look_up(translation)

    assert seen is not None
    assert alive == seen.alive


@pytest.mark.parametrize("setting", ["0", "1"])
def test_entries_count_packets_and_the_accounting_setting_stays(site: str, setting: str) -> None:
    sysctl.write("netfilter/nf_conntrack_acct", setting)
    plan = plan_of("v4", Role.GATEWAY, site)
    [step] = [step for step in plan.steps if isinstance(step, InsertEntries)]
    kernel = LinuxKernel()
    kernel.open_sites([step.site])

    kernel.apply(step, lambda prior: None)

    assert setting == sysctl.read("netfilter/nf_conntrack_acct")
    counts = [(s.packets_in, s.packets_out) for s in look_up(step.translation) if s]
    assert counts == [(0, 0)] * 4


def test_a_setting_that_is_not_there_is_none_and_cannot_be_written(site: str) -> None:
    assert sysctl.read("netfilter/nf_conntrack_none") is None
    assert sysctl.write("netfilter/nf_conntrack_none", "1") is False


def test_a_connection_that_is_translated_here_already_is_found_with_its_other_side(
    site: str, run: Run
) -> None:
    """A gateway that publishes 10.9.0.1:8080 for OLD:80, and one it does not touch."""
    run(
        site,
        *("conntrack", "-I", "-p", "tcp", "-s", "10.1.0.2", "-d", "10.9.0.1", "--sport", "5000"),
        *("--dport", "8080", "--dst-nat", "10.2.0.10:80", "--state", "ESTABLISHED"),
        *("--timeout", "999"),
    )
    kept, plain, unseen = (
        FourTuple(Endpoint.parse(f"10.1.0.2:{port}"), Endpoint.parse("10.2.0.10:80"))
        for port in (5000, 5001, 5002)
    )
    track(run, site, plain)

    found = [*find_carried(find_own(Connections.of([kept, plain, unseen])))]

    outside = FourTuple(Endpoint.parse("10.1.0.2:5000"), Endpoint.parse("10.9.0.1:8080"))
    assert [(kept, outside)] == found


@EACH_CASE
def test_what_a_gateway_knew_is_restored_and_nothing_in_its_place_is_touched(
    site: str, case: str
) -> None:
    translation = translation_of(case, Role.GATEWAY, site)
    directions = PEER_DIALLED * len(translation.kept)
    plain = {Entry(outer, kept.reply()) for outer, kept in zip(
        translation.outer, translation.kept, strict=True)}  # fmt: skip

    conntrack.restore(undo_of(PurgeEntries(translation.site, translation)), directions)
    conntrack.restore(undo_of(PurgeEntries(translation.site, translation)), directions)

    assert plain == read_entries().keys()
    purge(translation)
    conntrack.insert(translation)
    translated = read_entries().keys()
    conntrack.restore(undo_of(PurgeEntries(translation.site, translation)), directions)
    assert translated == read_entries().keys()
