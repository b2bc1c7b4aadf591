"""receptions on the real kernel: nothing is left, others stay, and who may not listen there."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from ipaddress import ip_address

import pytest
from fake_kernel import chains_left, revert_step

from natkeep.errors import RefusedError
from natkeep.kernel import conntrack_listeners, sock_diag
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Batch,
    Netlink,
    attribute,
    message,
    nested,
)
from natkeep.kernel.netns import entered
from natkeep.plan.drift import find_drift
from natkeep.plan.listeners import make_receptions
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.observation import Gate, Observation
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import AddAddress, ForgetCalls, InstallReception, Plan, Prior, Step
from natkeep.plan.tuples import NO_CONNECTIONS, Address, Connections, Endpoint, FourTuple

pytestmark = pytest.mark.root

ESTABLISHED, TIME_WAIT = 3, 7
OLD, NEW = ip_address("10.2.0.10"), ip_address("10.3.0.20")
OLD6, NEW6 = ip_address("fd00:2::10"), ip_address("fd00:3::20")
MAPS = (Map(OLD, NEW), Map(OLD6, NEW6))
LISTENERS = tuple(Endpoint(old, port) for old in (OLD, OLD6) for port in (80, 443))
KEPT = Connections.of(
    FourTuple(Endpoint.parse(peer), Endpoint(old, 80))
    for peer, old in (("10.1.0.2:50594", OLD), ("[fd00:1::2]:50594", OLD6))
)
FOREIGN = """
table ip theirs {
    chain nat { type nat hook postrouting priority srcnat; oifname "none" masquerade; }
    chain mangle { type filter hook prerouting priority -350; ct state new counter; }
}
"""

EACH_ROLE = pytest.mark.parametrize("role", [Role.GATEWAY, Role.DESTINATION])
EACH_MODE = pytest.mark.parametrize("mode", list(Mode))
Run = Callable[..., str]
Picture = Callable[[str], list[str]]


class Here:
    """A site with other people's rules in it, and what is done there."""

    def __init__(self, netns: str, run: Run) -> None:
        self.netns, self._run, self.kernel = netns, run, LinuxKernel()
        run(netns, "nft", "-f", "-", stdin=FOREIGN)
        self.track(50000, OLD, 9000)  # and their entries

    def plan(
        self,
        role: Role,
        mode: Mode = Mode.STATEFUL,
        *,
        move_id: str = "web",
        kept: Connections = KEPT,
        listeners: tuple[Endpoint, ...] = LISTENERS,
    ) -> Plan:
        site = Site(role, self.netns)
        self.kernel.open_sites([site])
        return make_plan(Move(move_id, MAPS, (site,), mode, listeners), kept)

    def apply(self, steps: Iterable[Step]) -> list[tuple[Step, Prior]]:
        return [(step, self.kernel.apply(step, lambda prior: None)) for step in steps]

    def revert(self, done: list[tuple[Step, Prior]]) -> None:
        for step, prior in reversed(done):
            revert_step(self.kernel, step, prior)

    def observe(self, plan: Plan) -> Observation:
        return self.kernel.observe(plan.move.sites[0], plan)

    def track(self, port: int, to: object, local_port: int, *more: str) -> None:
        """An entry of a connection that 10.1.0.2 has begun."""
        state = [] if "--state" in more else ["--state", "ESTABLISHED"]
        if "SYN_SENT" not in more:
            state += ["--status", "SEEN_REPLY,ASSURED"]
        self.run(
            *("conntrack", "-I", "-p", "tcp", "-s", "10.1.0.2", "-d", str(to)),
            *("--sport", str(port), "--dport", str(local_port), "--timeout", "999"),
            *state,
            *more,
        )  # fmt: skip

    def let_in(
        self, port: int, to: Address, local_port: int, inside: Address, *, state: int = ESTABLISHED
    ) -> None:
        """An entry as conntrack itself makes it; conntrack(8) adds the flag of a picked-up one."""
        caller = ip_address("10.1.0.2").packed

        def pack(type_: int, ends: tuple[bytes, bytes], ports: tuple[int, int]) -> bytes:
            numbers = [attribute(2 + i, p.to_bytes(2, "big")) for i, p in enumerate(ports)]
            return nested(
                type_,
                nested(1, *(attribute(1 + i, end) for i, end in enumerate(ends))),
                nested(2, attribute(1, b"\x06"), *numbers),
            )

        body = struct.pack("!BBH", socket.AF_INET, 0, 0) + b"".join(
            (
                pack(1, (caller, to.packed), (port, local_port)),
                pack(2, (to.packed, caller), (local_port, port)),
                attribute(3, (0x0E).to_bytes(4, "big")),
                nested(4, nested(1, attribute(1, bytes((state,))))),
                attribute(7, (999).to_bytes(4, "big")),
                b"" if to == inside else nested(13, attribute(1, inside.packed)),
            )
        )
        with entered(self.netns), Netlink(NETLINK_NETFILTER) as netlink:
            flags = NLM_F_CREATE | NLM_F_EXCL
            assert netlink.send_batch(Batch(message(1 << 8, flags, body), (), 1)) == []

    def tracked(self) -> set[int]:
        """The callers' ports of all entries."""
        listed = self.run("conntrack", "-L", "-p", "tcp")
        return {int(line.split("sport=")[1].split()[0]) for line in listed.splitlines()}

    def run(self, *command: str) -> str:
        return self._run(self.netns, *command)


@pytest.fixture
def here(make_site: Callable[[], str], run: Run) -> Here:
    return Here(make_site(), run)


@EACH_MODE
@EACH_ROLE
@pytest.mark.parametrize("kept", [KEPT, NO_CONNECTIONS], ids=["kept", "listeners alone"])
def test_what_was_prepared_has_no_drift_and_leaves_nothing(
    here: Here, role: Role, mode: Mode, kept: Connections, take_picture: Picture
) -> None:
    plan = here.plan(role, mode, kept=kept)
    bare = take_picture(here.netns)
    for step in plan.steps:
        here.kernel.check(step)
    assert bare == take_picture(here.netns)

    done = here.apply(plan.steps)

    seen = here.observe(plan)
    assert seen.gate == Gate.OPEN
    assert find_drift(plan, plan.move.sites[0], seen) == ()
    here.revert(done)
    assert bare == take_picture(here.netns)
    here.revert(done)  # again, as after a crash in the midst of it
    assert bare == take_picture(here.netns)


@EACH_MODE
@EACH_ROLE
def test_each_step_alone_is_undone(
    here: Here, role: Role, mode: Mode, take_picture: Picture
) -> None:
    for step in here.plan(role, mode).steps:
        before = take_picture(here.netns)
        done = here.apply([step])
        if isinstance(step, InstallReception | ForgetCalls):
            # Base chains of a mode stay until the table goes; here the translation has made them.
            here.revert(done)
            assert before == take_picture(here.netns)
            here.apply([step])


@EACH_MODE
@EACH_ROLE
@pytest.mark.parametrize("goes", [0, 1])
@pytest.mark.parametrize("kept", [KEPT, NO_CONNECTIONS], ids=["kept", "listeners alone"])
def test_two_moves_of_one_address_leave_each_other_alone(
    here: Here, role: Role, mode: Mode, goes: int, kept: Connections, take_picture: Picture
) -> None:
    bare = take_picture(here.netns)
    others = Connections.of(
        FourTuple(Endpoint(each.source.address, 6000), each.destination) for each in KEPT
    )
    elsewhere = tuple(Endpoint(end.address, end.port + 8000) for end in LISTENERS)
    plans = [
        here.plan(role, mode, kept=kept),
        here.plan(role, mode, move_id="web-0", kept=others, listeners=elsewhere),
    ]
    done = [here.apply(plan.steps) for plan in plans]
    seen = [here.observe(plan) for plan in plans]
    for plan, each in zip(plans, seen, strict=True):
        assert find_drift(plan, plan.move.sites[0], each) == ()

    # An address that two moves use changes hands in lifecycle/; its rules stay as long as it does.
    handed = [one for one in done[goes] if isinstance(one[0], AddAddress)]
    here.revert([one for one in done[goes] if one not in handed])

    stays = 1 - goes
    assert not chains_left(plans[goes], here.observe(plans[goes]))
    assert here.observe(plans[stays]) == seen[stays]
    assert "10.2.0.10" in here.run("nft", "list", "set", "inet", "natkeep", "held4") or (
        role == Role.GATEWAY
    )
    here.revert([*done[stays], *handed])
    assert bare == take_picture(here.netns)


def test_old_may_speak_again_when_its_last_listener_goes(here: Here) -> None:
    """Another move with another address keeps the table, but not the silence of this one."""
    others = here.plan(
        Role.DESTINATION, move_id="six", kept=KEPT.at(OLD6), listeners=(LISTENERS[2],)
    )
    here.apply(others.steps)
    here.kernel.unhook_gates()
    held = here.run("nft", "list", "table", "inet", "natkeep")
    alone = here.plan(Role.DESTINATION, kept=NO_CONNECTIONS, listeners=LISTENERS[:1])

    here.revert(here.apply(alone.steps))

    assert held == here.run("nft", "list", "table", "inet", "natkeep")
    assert "10.2.0.10" not in here.run("nft", "list", "table", "arp", "natkeep")


@pytest.mark.parametrize(
    ("bound", "port", "taken"),
    [
        ("10.3.0.20", 443, True),
        ("0.0.0.0", 80, True),
        ("::", 80, True),
        ("::ffff:10.3.0.20", 80, True),
        ("fd00:3::20", 443, True),
        ("10.3.0.20", 81, False),
        ("127.0.0.1", 80, False),
        ("::1", 80, False),
    ],
)
@pytest.mark.needs("powers")
def test_nobody_else_may_listen_where_callers_arrive(
    here: Here, bound: str, port: int, taken: bool
) -> None:
    plan = here.plan(Role.DESTINATION)
    [step] = [step for step in plan.steps if isinstance(step, InstallReception)]

    with ExitStack() as stack:
        with entered(here.netns):
            family = socket.AF_INET6 if ":" in bound else socket.AF_INET
            listener = stack.enter_context(socket.socket(family))
            listener.bind((bound, port))
            listener.listen()
        if taken:
            with pytest.raises(RefusedError, match=f"a socket listens at .* port {port} already"):
                here.kernel.check(step)
        else:
            here.kernel.check(step)
        listener.shutdown(socket.SHUT_RDWR)
        here.kernel.check(step)


def test_new_must_be_there_also_when_only_listeners_move(here: Here) -> None:
    here.run("ip", "address", "del", f"{NEW}/24", "dev", "eth0")
    plan = here.plan(Role.DESTINATION, kept=NO_CONNECTIONS)

    [step] = [step for step in plan.steps if isinstance(step, InstallReception)]

    with pytest.raises(RefusedError, match=r"NEW 10\.3\.0\.20 is not an address"):
        here.kernel.check(step)


@EACH_ROLE
def test_calls_without_an_answer_are_forgotten_and_no_others(here: Here, role: Role) -> None:
    """A SYN that comes again would follow the first one's entry, to where nobody listens."""
    plan = here.plan(role)
    [step] = [step for step in plan.steps if isinstance(step, ForgetCalls)]
    called, syn_sent = OLD if role == Role.GATEWAY else NEW, ("--state", "SYN_SENT")
    here.track(40001, called, 80, *syn_sent)
    here.track(40002, called, 443, *syn_sent)
    here.track(40003, called, 81, *syn_sent)
    here.track(40004, "10.9.9.9", 80, *syn_sent)
    here.track(40005, called, 80)
    here.run("conntrack", "-I", "-p", "tcp", "-w", "7", "-s", "10.1.0.2", "-d", str(called),
             "--sport", "40006", "--dport", "80", "--timeout", "99", *syn_sent)  # fmt: skip
    assert {40001, 40002, 40006} <= here.tracked()

    here.apply([step])

    assert here.tracked() == {50000, 40003, 40004, 40005}


@EACH_ROLE
def test_callers_are_counted_and_their_entries_go_with_the_move(
    here: Here, role: Role, take_picture: Picture
) -> None:
    """And not those of kept connections to the same port, nor what is translated elsewhere."""
    other = here.plan(role, move_id="kept", listeners=())
    here.apply(other.steps)
    done = here.apply(here.plan(role, kept=NO_CONNECTIONS).steps)
    plan = here.plan(role, kept=NO_CONNECTIONS)
    before, after = (OLD, NEW) if role == Role.GATEWAY else (NEW, OLD)
    here.let_in(40001, before, 80, after)
    here.let_in(40002, before, 80, ip_address("10.9.9.9"))
    here.let_in(40003, before, 443, before)
    here.let_in(40004, before, 81, after)
    here.let_in(40005, before, 443, after, state=TIME_WAIT)
    if role == Role.GATEWAY:
        assert here.observe(plan).callers == 1
    [receiving] = [r for r in make_receptions(plan.move, plan.move.sites[0]) if r.map.old == OLD]
    with entered(here.netns):
        assert conntrack_listeners.count(receiving) == 1
        assert conntrack_listeners.count(receiving, conntrack_listeners.read_table(4)) == 1

    # The addresses are handed to the other move, in lifecycle/.
    here.revert([one for one in done if not isinstance(one[0], AddAddress)])

    assert here.tracked() == {50000, 50594, 40002, 40003, 40004}
    assert find_drift(other, other.move.sites[0], here.observe(other)) == ()


def test_callers_are_sockets_at_a_listeners_end_that_nobody_kept(netns: str) -> None:
    with ExitStack() as stack, entered(netns):
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        end = Endpoint(ip_address("127.0.0.1"), listener.getsockname()[1])
        assert sock_diag.count_callers(frozenset({end}), []) == 0
        clients = [
            stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(3)
        ]
        for _ in clients:
            stack.enter_context(listener.accept()[0])
        peer = Endpoint(end.address, clients[0].getsockname()[1])

        assert sock_diag.count_callers(frozenset({end}), []) == 3
        kept = Connections.of([FourTuple(peer, end)])
        assert sock_diag.count_callers(frozenset({end}), [kept]) == 2
        assert sock_diag.count_callers(frozenset({Endpoint(end.address, 1)}), []) == 0


@EACH_ROLE
@pytest.mark.parametrize(
    ("old", "peer"), [(OLD, "10.1.0.2"), (OLD6, "fd00:1::2")], ids=["v4", "v6"]
)
def test_a_caller_whom_nobody_has_answered_is_forgotten_in_either_family(
    here: Here, role: Role, old: Address, peer: str
) -> None:
    """Linux 6.18 gives just the others when it is asked for an IPv6 address."""
    plan = here.plan(role)
    [receiving] = [
        r for r in make_receptions(plan.move, plan.move.sites[0]) if r.map.old == old
    ]  # fmt: skip
    for port, local_port in ((50001, receiving.ports[0]), (50002, 9)):
        here.run(
            *("conntrack", "-I", "-p", "tcp", "-s", peer, "-d", str(receiving.before)),
            *("--sport", str(port), "--dport", str(local_port), "--timeout", "999"),
            *("--state", "SYN_SENT"),
        )

    with entered(here.netns):
        conntrack_listeners.delete_unreplied(receiving)

    listed = here.run("conntrack", "-L", "-f", "ipv4" if old.version == 4 else "ipv6")
    assert "sport=50001 " not in listed
    assert "sport=50002 " in listed
