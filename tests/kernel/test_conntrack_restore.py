"""entries that a gateway had of its own: read, purged, and restored as they were."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from natkeep.kernel import conntrack
from natkeep.kernel.conntrack_purge import purge
from natkeep.kernel.netns import entered
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.step_undo import undo_of
from natkeep.plan.steps import PurgeEntries
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address

pytestmark = pytest.mark.root

OLD, NEW, PEER = "10.2.0.10", "10.3.0.20", "10.1.0.2"


@pytest.fixture
def site(netns: str) -> Iterator[str]:
    """A namespace that this thread is in."""
    with entered(netns):
        yield netns


def translation_of(site: str, count: int) -> Translation:
    kept = Connections.of(
        FourTuple(Endpoint.parse(f"{PEER}:{2000 + n}"), Endpoint.parse(f"{OLD}:80"))
        for n in range(count)
    )
    maps = (Map(parse_address(OLD), parse_address(NEW)),)
    plan = make_plan(Move("web", maps, (Site(Role.GATEWAY, site),)), kept)
    return plan.translations[0]


def track(source: str, destination: str, *more: str) -> None:
    (saddr, _, sport), (daddr, _, dport) = (end.partition(":") for end in (source, destination))
    subprocess.run(
        ["conntrack", "-I", "-p", "tcp", "-s", saddr, "-d", daddr, "--sport", sport,
         "--dport", dport, "--state", "ESTABLISHED", "--status", "SEEN_REPLY,ASSURED",
         "--timeout", "999", *more],
        check=True, capture_output=True,
    )  # fmt: skip


def list_entries() -> set[str]:
    """Both tuples of each entry, and its flags; what runs down is left out."""
    shown = subprocess.run(["conntrack", "-L"], check=True, capture_output=True, text=True).stdout
    return {line[line.index("src=") :].rpartition(" mark=")[0] for line in shown.splitlines()}


@pytest.mark.parametrize("count", [4, 3000])
def test_each_entry_is_restored_in_its_own_direction_and_no_other(site: str, count: int) -> None:
    """Few connections are asked for one by one, many are found in one dump."""
    translation = translation_of(site, count)
    track(f"{PEER}:2000", f"{OLD}:80")
    track(f"{OLD}:80", f"{PEER}:2002")
    track(f"{PEER}:9", f"{OLD}:80")  # of nobody that is kept
    before = list_entries()

    directions = conntrack.read_directions(translation)
    assert purge(translation) == 2
    conntrack.restore(undo_of(PurgeEntries(translation.site, translation)), directions)
    conntrack.restore(undo_of(PurgeEntries(translation.site, translation)), directions)

    assert directions == "<->" + "-" * (count - 3)
    assert list_entries() == before


@pytest.mark.parametrize("count", [4, 3000])
def test_an_entry_of_another_zone_is_the_gateways_own(site: str, count: int) -> None:
    track(f"{PEER}:2000", f"{OLD}:80", "--zone", "7")

    directions = conntrack.read_directions(translation_of(site, count))

    assert directions == "<" + "-" * (count - 1)


def test_where_nothing_is_tracked_nothing_is_written_down(site: str) -> None:
    assert conntrack.read_directions(translation_of(site, 4)) == ""
    track(f"{PEER}:9", f"{OLD}:80")
    assert conntrack.read_directions(translation_of(site, 4)) == ""
