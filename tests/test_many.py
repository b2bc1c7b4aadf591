"""Many moves at once: what is there is what is there when they go one by one, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_kernel import FakeKernel
from two_hosts import look, make_two_hosts

from natkeep.errors import JournalError, KernelError, RefusedError
from natkeep.kernel.linux import LinuxKernel
from natkeep.lab.ipv6_addresses import await_addresses
from natkeep.lifecycle import many, many_undo
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.many import Wanted, open_many, prepare_many
from natkeep.lifecycle.many_undo import teardown_many
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.status import read_status
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.maps import Map
from natkeep.plan.move import Mode, Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.state.directory import StateDirectory

GATEWAY = Site(Role.GATEWAY, "gw")


def make(number: int, *, gate: Gate = Gate.OPEN, site: Site = GATEWAY, version: int = 4,
         count: int = 2, mode: Mode = Mode.STATEFUL) -> Wanted:  # fmt: skip
    """A move of its own OLD; the NEW of two is the same."""
    old, new, peer = (
        (f"10.2.0.{number + 1}", f"10.3.0.{number // 2 + 20}", "10.1.0.2")
        if version == 4
        else (f"fd00:2::{number + 1:x}", f"fd00:3::{number + 32:x}", "fd00:1::2")
    )
    end = Endpoint(parse_address(old), 5000)
    peers = (Endpoint(parse_address(peer), 40000 + 10 * number + n) for n in range(count))
    kept = Connections.of(FourTuple(one, end) for one in peers)
    maps = (Map(end.address, parse_address(new)),)
    return Wanted(Move(f"m{number}", maps, (site,), mode, hold=False), kept, gate)


# ---- on the fake kernel --------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path) -> Executor:
    return Executor(FakeKernel(), StateDirectory(str(tmp_path / "state"), create=True))


def one_by_one(executor: Executor, wanted: list[Wanted]) -> None:
    for one in wanted:
        prepare(executor, one.move, one.connections, one.gate)


def holds(executor: Executor) -> dict[str, object]:
    """What the fake kernel holds, but for the order in which steps were done."""
    here = dict(vars(vars(executor.kernel)["sites"]["gw"]))
    return {**here, "loaded": sorted(map(str, here["loaded"]))}


def tells(executor: Executor) -> dict[str, list[str]]:
    """What each journal says, but for its times and sums."""
    found = {}
    for move_id in executor.state.ids():
        lines = Path(executor.state.path, f"{move_id}.journal").read_text().splitlines()
        found[move_id] = [re.sub(r'"(begun|at)":\d+', "", line) for line in lines]
    return found


def test_it_is_as_one_by_one(fake: Executor, tmp_path: Path) -> None:
    wanted = [make(n, gate=Gate.OPEN if n % 2 else Gate.CLOSED) for n in range(5)]
    assert prepare_many(fake, wanted) == {}
    other = Executor(FakeKernel(), StateDirectory(str(tmp_path / "other"), create=True))
    one_by_one(other, wanted)
    assert holds(fake) == holds(other)
    assert tells(fake) == tells(other)

    closed = [one.move.id for one in wanted if one.gate == Gate.CLOSED]
    assert open_many(fake, closed) == {}
    for move_id in closed:
        open_move(other, move_id)
    assert holds(fake) == holds(other)
    assert tells(fake) == tells(other)

    assert teardown_many(fake, [one.move.id for one in wanted]) == {}
    assert fake.state.ids() == ()
    assert not any(vars(vars(fake.kernel)["sites"]["gw"]).values())
    assert teardown_many(fake, ["m0", "m1"]) == {}, "a second time is fine"


def test_what_one_is_refused_for_the_others_are_not(fake: Executor) -> None:
    one_by_one(fake, [make(9)])
    twice, taken, none = make(1), make(2), make(3)
    taken = taken._replace(move=Move("m2", make(9).move.maps, (GATEWAY,), hold=False),
                           connections=make(9).connections)  # fmt: skip
    none = none._replace(connections=make(4).connections)
    failed = prepare_many(fake, [make(0), twice, twice, taken, none, make(5)])
    assert {*failed} == {"m1", "m2", "m3"}
    assert all(isinstance(error, RefusedError) for error in failed.values())
    assert "the id m1 is in use" in str(failed["m1"])
    assert "(of move m9)" in str(failed["m2"])
    assert fake.state.ids() == ("m0", "m1", "m5", "m9")


def test_two_of_a_list_cannot_have_one_tuple(fake: Executor) -> None:
    first, second = make(0), make(1)
    again = second._replace(
        move=Move("m1", first.move.maps, (GATEWAY,), hold=False), connections=first.connections
    )
    failed = prepare_many(fake, [first, again, make(2)])
    assert {*failed} == {"m1"}
    assert "(of move m0)" in str(failed["m1"])


@pytest.mark.parametrize("fail_at", range(18))
def test_a_step_that_fails_is_that_of_one_move(fake: Executor, fail_at: int) -> None:
    """The fake kernel refuses one step once: all are undone, and their halves go through."""
    vars(fake.kernel)["fail_at"] = fail_at
    assert prepare_many(fake, [make(n) for n in range(3)]) == {}
    assert fake.state.ids() == ("m0", "m1", "m2")


def test_a_move_that_always_fails_is_named(fake: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = FakeKernel.apply

    def refuse(self: FakeKernel, step: object, remember: object) -> object:
        if getattr(step, "move_id", "") == "m2":
            raise KernelError("no room")
        return apply(self, step, remember)  # type: ignore[arg-type]

    monkeypatch.setattr(FakeKernel, "apply", refuse)
    failed = prepare_many(fake, [make(n) for n in range(5)])
    assert [*map(str, failed.values())] == ["no room"]
    assert fake.state.ids() == ("m0", "m1", "m3", "m4")


def test_ends_of_one_connection_go_one_after_the_other(fake: Executor) -> None:
    """The second has to know what the first does at the gateway: it reads its journal."""
    server = make(0)
    end, peer = (
        Endpoint(parse_address("10.2.0.1"), 5000),
        Endpoint(parse_address("10.1.0.2"), 40000),
    )
    client = Wanted(
        Move("client", (Map(peer.address, parse_address("10.4.0.4")),), (GATEWAY,), hold=False),
        Connections.of([FourTuple(end, peer)]), Gate.OPEN,
    )  # fmt: skip
    lists = [*many._split([server, client, make(1), make(2)])]
    assert [[one.move.id for one in some] for some in lists] == [["m0"], ["client"], ["m1", "m2"]]
    assert prepare_many(fake, [server, client]) == {}
    assert len(fake.state.load("client").surroundings.carried) == 1


def test_what_is_of_another_kind_goes_alone() -> None:
    some = [make(n) for n in range(5)]
    guarded = Move("m1", some[1].move.maps, (GATEWAY,), hold=False, guard=True)
    two_sites = Move("m3", some[3].move.maps, (GATEWAY, Site(Role.DESTINATION, "dst")))
    some[1], some[3] = some[1]._replace(move=guarded), some[3]._replace(move=two_sites)
    lists = [[one.move.id for one in part] for part in many._split(some)]
    assert lists == [["m0"], ["m1"], ["m2"], ["m3"], ["m4"]]


def test_a_journal_that_cannot_be_read_stops_no_other(fake: Executor) -> None:
    assert prepare_many(fake, [make(n) for n in range(3)]) == {}
    Path(fake.state.path, "m1.journal").write_text("?\n")
    failed = teardown_many(fake, ["m0", "m1", "m2"])
    assert {*failed} == {"m1"}
    assert isinstance(failed["m1"], JournalError)
    assert fake.state.ids() == ("m1",)


def test_an_undo_that_fails_is_named_and_stops_no_other(
    fake: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare_many(fake, [make(n) for n in range(3)]) == {}
    revert = FakeKernel.revert

    def refuse(self: FakeKernel, site: Site, undo: object, prior: object) -> None:
        if "gate-m1" in str(undo):
            raise KernelError("busy")
        revert(self, site, undo, prior)  # type: ignore[arg-type]

    monkeypatch.setattr(FakeKernel, "revert", refuse)
    failed = teardown_many(fake, ["m0", "m1", "m2"])
    assert {*failed} == {"m1"}
    assert "move m1: not undone: busy" in str(failed["m1"])
    monkeypatch.undo()
    assert teardown_many(fake, ["m1"]) == {}
    assert not any(vars(vars(fake.kernel)["sites"]["gw"]).values())


def test_of_an_earlier_boot_only_the_journals_go(fake: Executor) -> None:
    assert prepare_many(fake, [make(n) for n in range(3)]) == {}
    for journal in Path(fake.state.path).glob("*.journal"):
        boot = json.loads(journal.read_text().splitlines()[0])["boot"]
        journal.write_text(journal.read_text().replace(boot, "another"))
    vars(fake.kernel)["sites"].clear()
    assert teardown_many(fake, ["m0", "m1", "m2"]) == {}
    assert fake.state.ids() == ()


def test_a_lock_that_is_not_given_up_is_named_of_each(fake: Executor) -> None:
    assert prepare_many(fake, [make(n) for n in range(2)]) == {}
    other = StateDirectory(fake.state.path, create=True)
    fake.state.patience = 0
    with other.locked():
        failed = prepare_many(fake, [make(n) for n in range(2, 4)])
        failed |= teardown_many(fake, ["m0", "m1"])
    assert {*failed} == {"m0", "m1", "m2", "m3"}
    assert {type(error) for error in failed.values()} == {JournalError}
    assert fake.state.ids() == ("m0", "m1")


def test_more_than_go_at_once_go_in_several(
    fake: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "MOST", 2)
    monkeypatch.setattr(many_undo, "MOST", 2)
    assert prepare_many(fake, [make(n) for n in range(5)]) == {}
    assert len(fake.state.ids()) == 5
    assert teardown_many(fake, fake.state.ids()) == {}


# ---- on the real one -----------------------------------------------------------------------------


@pytest.fixture
def hosts(make_netns: Callable[[], str]) -> dict[str, str]:
    names = make_two_hosts(make_netns)
    theirs = "table inet t { chain c { type filter hook forward priority 0; ct state new; }; }"
    subprocess.run(["ip", "netns", "exec", names["gateway"], "nft", theirs], check=True)
    for line in ("address add fd00:3::1/64 dev gate0 nodad", "route add fd00:1::/64 dev gate0"):
        subprocess.run(["ip", "-n", names["gateway"], *line.split()], check=True)
    await_addresses(names["gateway"])
    return names


def make_executor(path: Path) -> Executor:
    state = StateDirectory(str(path), create=True)
    return Executor(LinuxKernel(state.path), state)


def by_name(surfaces: dict[str, str]) -> dict[str, object]:
    """With the ruleset in the order of names: chains and sets stand in that of their making."""
    found: dict[str, object] = {}
    for name, text in surfaces.items():
        found[name] = text
        if name.endswith("ruleset"):
            things = json.loads(text)["nftables"]
            for one in things:
                next(iter(one.values())).pop("handle", None)
            objects = [json.dumps(one) for one in things if "rule" not in one]
            rules: dict[str, list[object]] = {}
            for one in things:
                if "rule" in one:
                    rules.setdefault(one["rule"]["chain"], []).append(one)
            found[name] = (sorted(objects), rules)
    return found


@pytest.mark.root
@pytest.mark.needs("nftables")
@pytest.mark.parametrize("mode", [*Mode])
@pytest.mark.parametrize("role", [Role.GATEWAY, Role.SOURCE])
def test_the_kernel_has_what_it_has_one_by_one(
    hosts: dict[str, str], tmp_path: Path, mode: Mode, role: Role
) -> None:
    site = Site(role, hosts["gateway"])
    gates = (Gate.CLOSED,) if role == Role.SOURCE else (Gate.OPEN, Gate.CLOSED)
    wanted = [
        make(n, site=site, mode=mode, version=6 if n == 5 else 4, gate=gates[n % len(gates)])
        for n in range(6)
    ]
    if role == Role.GATEWAY:
        _track_one(hosts["gateway"], wanted[1])
    before = look(hosts)
    single = make_executor(tmp_path / "single")
    one_by_one(single, wanted)
    alone = by_name(look(hosts))
    for one in wanted:
        teardown(single, one.move.id)
    assert look(hosts) == before

    executor = make_executor(tmp_path / "many")
    assert prepare_many(executor, wanted) == {}
    assert by_name(look(hosts)) == alone
    assert tells(executor).keys() == {one.move.id for one in wanted}
    assert not any(site.drift for one in read_status(executor, ()) for site in one.sites)
    closed = [one.move.id for one in wanted if one.gate == Gate.CLOSED]
    assert open_many(executor, closed) == {}
    assert {one.gate for one in read_status(executor, ())} <= {Gate.OPEN} or role == Role.SOURCE
    assert teardown_many(executor, [one.move.id for one in wanted]) == {}
    assert look(hosts) == before
    assert executor.state.ids() == ()


def _track_one(netns: str, wanted: Wanted) -> None:
    """The gateway has an entry of its own of one connection, which comes back in the end."""
    inbound = next(iter(wanted.connections))
    subprocess.run(
        ["ip", "netns", "exec", netns, "conntrack", "-I", "-p", "tcp",
         "-s", str(inbound.source.address), "-d", str(inbound.destination.address),
         "--sport", str(inbound.source.port), "--dport", str(inbound.destination.port),
         "--state", "ESTABLISHED", "--status", "SEEN_REPLY,ASSURED", "--timeout", "300"],
        check=True, capture_output=True,
    )  # fmt: skip


@pytest.mark.root
@pytest.mark.needs("nftables")
def test_some_of_many_leave_the_others(hosts: dict[str, str], tmp_path: Path) -> None:
    site = Site(Role.GATEWAY, hosts["gateway"])
    executor = make_executor(tmp_path / "state")
    before = look(hosts)
    assert prepare_many(executor, [make(n, site=site) for n in range(4)]) == {}
    assert teardown_many(executor, ["m0", "m3"]) == {}
    assert not any(site.drift for one in read_status(executor, ()) for site in one.sites)
    assert prepare_many(executor, [make(n, site=site) for n in (0, 3)]) == {}
    assert not any(site.drift for one in read_status(executor, ()) for site in one.sites)
    assert teardown_many(executor, executor.state.ids()) == {}
    assert look(hosts) == before


@pytest.mark.root
@pytest.mark.needs("nftables")
def test_what_another_program_removed_of_one_is_in_no_others_way(
    hosts: dict[str, str], tmp_path: Path
) -> None:
    site = Site(Role.GATEWAY, hosts["gateway"])
    executor = make_executor(tmp_path / "state")
    before = look(hosts)
    assert prepare_many(executor, [make(n, site=site) for n in range(5)]) == {}
    gone = "delete element inet natkeep in4 { 10.2.0.2 }"
    subprocess.run(["ip", "netns", "exec", hosts["gateway"], "nft", gone], check=True)
    assert teardown_many(executor, [f"m{n}" for n in range(4)]) == {}
    assert executor.state.ids() == ("m4",)
    assert not any(site.drift for one in read_status(executor, ()) for site in one.sites)
    teardown(executor, "m4")
    assert look(hosts) == before
