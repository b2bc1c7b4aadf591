"""What entries say beside their tuples is said by those that are made in their place.

An entry of each kind is put into the kernel's table, as a gateway would have it; then it is looked
for, purged, made anew with a translation, and in the end restored.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from functools import partial
from ipaddress import ip_address

import pytest

from natkeep.errors import RefusedError
from natkeep.kernel import sysctl
from natkeep.kernel.conntrack_dump import dump
from natkeep.kernel.conntrack_own import find_noted, find_own
from natkeep.kernel.ctnetlink import NEW, ask_for_tcp, for_each, pack_entry
from natkeep.kernel.ctnetlink_answers import read_attributes
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Netlink,
    attribute,
)
from natkeep.kernel.netns import entered
from natkeep.plan.entry_attributes import BOTH, PLAIN, Attributes
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.observation import SeenEntry
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.step_undo import undo_of
from natkeep.plan.steps import InsertEntries, Plan, Prior, PurgeEntries
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.values import replace

pytestmark = pytest.mark.root

SITE = Site(Role.GATEWAY)
ENDS = {4: ("10.1.0.2", "10.2.0.10", "10.3.0.20"), 6: ("fd00:1::2", "fd00:2::10", "fd00:3::20")}


def _pack(*values: int) -> str:
    packed = (attribute(n, struct.pack("!I", value)) for n, value in enumerate(values, 1))
    return b"".join(packed).hex()


ADJUSTED = Attributes(seq_original=_pack(1000, 0, 7), seq_reply=_pack(2000, 0, 0xFFFFFFF9))
EACH = {
    "mark": Attributes(mark=0x80000002),
    "labels": Attributes(labels="01" + "00" * 14 + "80"),
    "helper": Attributes(helper="ftp"),
    "zone": Attributes(zone=7),
    "zone of the original direction": Attributes(zone=7, zone_of="original", mark=3),
    "zone of the reply direction": Attributes(zone=7, zone_of="reply"),
    "sequence adjustment": ADJUSTED,
    "time stamps": Attributes(
        synproxy=_pack(5, 6, 7), seq_original=_pack(0, 0, 9), seq_reply=_pack(0, 0, 8)
    ),
}
EACH_KIND = pytest.mark.parametrize("kind", EACH)


@pytest.fixture
def site(netns: str) -> Iterator[str]:
    """The test is inside; something asks for labels and for a helper there."""
    with entered(netns):
        ruleset = 'table ip other {\nct helper f {\ntype "ftp" protocol tcp\n}\nchain c {\n'
        ruleset += 'ct zone set 7\nct label set 1\nct helper set "f"\n}\n}\n'
        subprocess.run(["nft", "-f", "-"], check=True, text=True, input=ruleset)
        yield netns


def kept_of(version: int, count: int = 1) -> Connections:
    peer, old, _ = map(ip_address, ENDS[version])
    return Connections.of(
        FourTuple(Endpoint(peer, 2000 + n), Endpoint(old, 80)) for n in range(count)
    )


def put(some: Connections, said: Attributes) -> None:
    """An entry of each connection without a translation, as its *original direction* is."""
    records = [r[len(r) // 2 :] + r[: len(r) // 2] for r in some.each()]
    if said.process_dialled:
        some = Connections.packed(b"".join(records), 4 if some.v4 else 6)
    pack = partial(pack_entry, timeout=500, ports=False, attributes=said)
    with Netlink(NETLINK_NETFILTER) as netlink:
        batch = for_each(some, some, NEW, NLM_F_CREATE | NLM_F_EXCL, pack)
        assert netlink.send_batch(batch) == []


def read(version: int) -> list[Attributes]:
    """What each entry of the table says, sorted by nothing."""
    return [read_attributes(answer) for answer in dump(ask_for_tcp(version))]


def plan_of(netns: str, kept: Connections, mode: Mode, role: Role = Role.GATEWAY) -> Plan:
    """As prepare makes it: with what is there."""
    _, old, new = map(ip_address, ENDS[4 if kept.v4 else 6])
    move = Move("web", (Map(old, new),), (Site(role, netns),), mode)
    kernel = LinuxKernel()
    kernel.open_sites(move.sites)
    return make_plan(move, kept, kernel.look_around(move, kept))


def do(plan: Plan) -> tuple[PurgeEntries, Prior]:
    """Purge and insert, as the plan says; what the purge noted is returned."""
    kernel = LinuxKernel()
    kernel.open_sites(plan.move.sites)
    [purge_] = [step for step in plan.steps if isinstance(step, PurgeEntries)]
    [insert] = [step for step in plan.steps if isinstance(step, InsertEntries)]
    prior = kernel.apply(purge_, lambda prior: None)
    kernel.apply(insert, lambda prior: None)
    return purge_, prior


@EACH_KIND
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("role", [Role.GATEWAY, Role.DESTINATION])
def test_an_entry_made_anew_says_what_was_said(
    site: str, kind: str, version: int, mode: Mode, role: Role
) -> None:
    kept, said = kept_of(version), EACH[kind]
    put(kept, said)
    plan = plan_of(site, kept, mode, role)

    do(plan)

    assert read(version) == [said]


@EACH_KIND
def test_a_process_that_dialled_has_the_same_said_the_other_way_round(site: str, kind: str) -> None:
    kept, said = kept_of(4), replace(EACH[kind], process_dialled=True)
    put(kept, said)

    if said.synproxy or said.zone_of != BOTH:
        with pytest.raises(RefusedError, match="conntrack entry"):
            plan_of(site, kept, Mode.STATEFUL)
        return
    do(plan_of(site, kept, Mode.STATEFUL))

    turned = replace(
        said, process_dialled=False, seq_original=said.seq_reply, seq_reply=said.seq_original
    )
    assert read(4) == [turned]


@EACH_KIND
@pytest.mark.parametrize("dialled", [False, True])
def test_what_a_gateway_had_is_restored_as_it_was(site: str, kind: str, dialled: bool) -> None:
    kept, said = kept_of(4, 5), replace(EACH[kind], process_dialled=dialled)
    if said.facing(process_dialled=dialled).refusal():
        return
    put(kept.pick([1, 2, 4], 4), said)
    put(kept.pick([3], 4), PLAIN)
    before = find_noted(SITE, [*find_own(kept)])
    step, prior = do(plan_of(site, kept, Mode.STATEFUL))
    kernel = LinuxKernel()
    kernel.open_sites([step.site])

    for undo in (undo_of(InsertEntries(step.site, step.translation)), undo_of(step)):
        kernel.revert(step.site, undo, prior)

    assert before == find_noted(SITE, [*find_own(kept)])
    assert len(before[0].connections) == 3
    assert len(read(4)) == 4


def test_connections_that_say_different_things_keep_each_its_own(site: str) -> None:
    kept = kept_of(4, 3000)  # so many that the table is dumped
    for place, said in enumerate(EACH.values()):
        put(kept.pick([10 * place], 4), said)

    do(plan_of(site, kept, Mode.STATEFUL))

    made = read(4)
    assert len(made) == 3000
    assert sorted(map(str, made)) == sorted(map(str, [*EACH.values(), *(3000 - 8) * [PLAIN]]))


@pytest.mark.parametrize("kind", ["mark", "zone", "time stamps"])
@pytest.mark.parametrize("role", [Role.GATEWAY, Role.DESTINATION])
def test_few_entries_are_found_beside_many_of_others(site: str, kind: str, role: Role) -> None:
    """A gateway is asked for each; at a destination the kernel picks those of OLD."""
    both = kept_of(4, 7000)
    kept, others = both.pick(range(4000), 4), both.pick(range(4000, 7000), 4)
    put(others.toward(ip_address("10.9.9.9")), EACH[kind])
    put(kept.pick([7], 4), EACH[kind])
    dialled = Attributes(mark=5, process_dialled=True)
    put(kept.pick([9], 4), dialled)

    [translation] = plan_of(site, kept, Mode.STATEFUL, role).translations

    said = {one.attributes: [*one.connections] for one in translation.noted}
    assert said == {EACH[kind]: [*kept.pick([7], 4)], dialled: [*kept.pick([9], 4)]}


def test_an_entry_is_made_in_each_zone_where_a_direction_is_tracked_by_itself(site: str) -> None:
    """`iif … ct zone set 7` on the peers' side alone: then each direction has its own entry."""
    kept = kept_of(4, 2)
    put(kept.pick([0], 4), Attributes(zone=7))
    put(kept.pick([0], 4), Attributes(process_dialled=True))

    do(plan_of(site, kept, Mode.STATEFUL))

    assert sorted(said.zone for said in read(4)) == [0, 0, 7]
    seen = observe(site, kept)
    assert [entry is not None and entry.translated for entry in seen] == [True, True]


def observe(netns: str, kept: Connections) -> tuple[SeenEntry | None, ...]:
    plan = plan_of(netns, kept, Mode.STATEFUL)
    kernel = LinuxKernel()
    kernel.open_sites(plan.move.sites)
    [entries] = kernel.observe(plan.move.sites[0], plan).entries.values()
    return entries


def test_an_entry_of_another_zone_is_seen_and_deleted_there(site: str) -> None:
    kept = kept_of(4, 3)
    put(kept, Attributes(zone=7))
    step, _ = do(plan_of(site, kept, Mode.STATEFUL))
    kernel = LinuxKernel()
    kernel.open_sites([step.site])

    assert all(entry is not None and entry.translated for entry in observe(site, kept))
    kernel.revert(step.site, undo_of(InsertEntries(step.site, step.translation)), Prior())

    assert read(4) == []


def test_a_longer_time_out_is_kept(site: str) -> None:
    kept, usual = (
        kept_of(4, 2),
        int(sysctl.read("netfilter/nf_conntrack_tcp_timeout_established") or 0),
    )
    put(kept.pick([0], 4), Attributes(timeout=usual + 5000))

    do(plan_of(site, kept, Mode.STATEFUL))

    left = sorted(read_attributes(answer, 1).timeout for answer in dump(ask_for_tcp(4)))
    assert usual - 60 < left[0] <= usual < usual + 4000 < left[1]
