"""tests of the source as the conductor has it: quiesce, its take-over, and when a teardown is safe.

On the fake kernel, and at the end the command line in a real namespace with real listeners.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_kernel import FakeKernel, FakeSite, KilledError

from natkeep import cli
from natkeep.errors import JournalError, KernelError, NatkeepError, RefusedError
from natkeep.kernel.netns import entered
from natkeep.lifecycle.check import check
from natkeep.lifecycle.drain import count_alive, find_exposed
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.gc import gc
from natkeep.lifecycle.open import close_move, open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.quiesce import quiesce
from natkeep.lifecycle.replace import replace_move
from natkeep.lifecycle.rollback import rollback
from natkeep.lifecycle.status import read_status
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.criu_lock import DumpLock, NetworkLock
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.protocols import TCP
from natkeep.plan.roles import Role
from natkeep.plan.steps import HoldListeners, TakeOverLock
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.state.directory import StateDirectory
from natkeep.values import replace

OLD, NEW = parse_address("10.2.0.10"), parse_address("10.3.0.20")
MAPS = (Map(OLD, NEW),)
GATEWAY, DESTINATION, SOURCE = (
    Site(role, name)
    for role, name in ((Role.GATEWAY, "gw"), (Role.DESTINATION, "dst"), (Role.SOURCE, "src"))
)
LISTENER, WILDCARD = Endpoint(OLD, 5000), Endpoint.parse("0.0.0.0:22")
CONNECTIONS = Connections.of(
    FourTuple(Endpoint.parse(f"10.1.0.{n}:50000"), LISTENER) for n in range(1, 4)
)
LOCK = DumpLock(NetworkLock.NFTABLES, "aaf6b8e3-c33b-47e9-baff-d0ec3de03291")
ANY_PORT: frozenset[int] = frozenset()


@pytest.fixture
def kernel() -> FakeKernel:
    """A source that has OLD, two listeners, and CRIU's lock of the dump."""
    made = FakeKernel()
    for site in (GATEWAY, DESTINATION, SOURCE):
        made.sites[site.netns] = FakeSite()
    here = made.sites["src"]
    here.addresses.add(OLD)
    here.waiting = {LISTENER: 0, WILDCARD: 0, Endpoint.parse("10.9.0.1:7"): 3}
    here.locks = {LOCK.table: set(CONNECTIONS), "CRIU-other": {next(iter(CONNECTIONS)).reply()}}
    return made


@pytest.fixture
def executor(kernel: FakeKernel, tmp_path: Path) -> Executor:
    return Executor(kernel, StateDirectory(str(tmp_path / "state"), create=True))


def move(*sites: Site, move_id: str = "web") -> Move:
    return Move(move_id, MAPS, sites, lock=LOCK if SOURCE in sites else None)


def is_bare(kernel: FakeKernel, name: str = "src") -> bool:
    here = kernel.sites[name]
    return not (here.gates or here.sets or here.loaded or here.holds)


# ---- before a dump at the destination --------------------------------------------------------


@pytest.mark.parametrize("hold", [False, True])
def test_an_open_move_is_closed_and_opened_again(
    executor: Executor, kernel: FakeKernel, hold: bool
) -> None:
    prepare(executor, replace(move(GATEWAY, DESTINATION), hold=hold), CONNECTIONS)
    open_move(executor, "web")

    for _ in range(2):  # again is fine
        close_move(executor, "web", dumps=True)
        assert kernel.sites["dst"].gates == {"web": Gate.CLOSED}
    assert gc(executor, (), lambda move_id: True).cleared == ()  # its undoing has not begun
    with pytest.raises(RefusedError, match="web was opened at"):
        rollback(executor, "web")
    open_move(executor, "web")

    assert [kernel.sites[each].gates["web"] for each in ("gw", "dst")] == [Gate.OPEN, Gate.OPEN]


def test_what_is_no_open_move_has_no_gate_to_close(
    executor: Executor, capsys: pytest.CaptureFixture[str]
) -> None:
    quiesce(executor, move(SOURCE), ANY_PORT, 1)

    assert cli.main(["quiesce", "web", "--state-dir", executor.state.path]) == 4
    assert "there is no gate to close" in capsys.readouterr().err
    assert cli.main(["quiesce", "other", "--state-dir", executor.state.path]) == 2
    assert "no --map OLD=NEW" in capsys.readouterr().err


# ---- quiesce ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("port", "held"), [(5000, {LISTENER}), (22, {WILDCARD}), (80, set())])
def test_a_map_of_one_port_holds_what_listens_at_it(
    executor: Executor, port: int, held: set[Endpoint]
) -> None:
    ported = replace(move(SOURCE), maps=(Map(OLD, NEW, port, 8080),))
    if held:
        assert set(quiesce(executor, ported, ANY_PORT, 1)) == held
        return
    with pytest.raises(RefusedError, match=f"no socket listens at {OLD}:{port} "):
        quiesce(executor, ported, ANY_PORT, 1)


def test_quiesce_holds_what_listens_at_old_or_everywhere(
    executor: Executor, kernel: FakeKernel
) -> None:
    held = quiesce(executor, move(SOURCE), ANY_PORT, 1)

    assert set(held) == {LISTENER, WILDCARD}
    assert kernel.sites["src"].holds == {"web": held}
    [status] = read_status(executor, ("web",))
    assert [site.drift for site in status.sites] == [()]


def test_quiesce_of_ports_holds_no_others(executor: Executor, kernel: FakeKernel) -> None:
    assert quiesce(executor, move(SOURCE), frozenset({5000}), 1) == (LISTENER,)
    assert kernel.sites["src"].holds == {"web": (LISTENER,)}


def test_quiesce_returns_when_everybody_is_accepted(executor: Executor, kernel: FakeKernel) -> None:
    kernel.sites["src"].waiting[LISTENER] = 3  # the fake accepts one at each look

    quiesce(executor, move(SOURCE), ANY_PORT, 5)

    assert kernel.sites["src"].waiting[LISTENER] == 0


def test_quiesce_that_comes_to_no_end_says_where_and_leaves_nothing(
    executor: Executor, kernel: FakeKernel
) -> None:
    kernel.sites["src"].waiting[LISTENER] = 1_000_000

    with pytest.raises(NatkeepError, match=r"not accepted: \d+ at 10.2.0.10:5000") as raised:
        quiesce(executor, move(SOURCE), ANY_PORT, 0.1)

    assert raised.value.exit_code == 1
    assert is_bare(kernel)
    assert executor.state.ids() == ()


def test_quiesce_where_nobody_listens_is_refused(executor: Executor, kernel: FakeKernel) -> None:
    kernel.sites["src"].waiting.clear()

    with pytest.raises(RefusedError, match="no socket listens at"):
        quiesce(executor, move(SOURCE), ANY_PORT, 1)

    assert executor.state.ids() == ()


def test_teardown_releases_a_quiesce_and_needs_no_leave(
    executor: Executor, kernel: FakeKernel
) -> None:
    quiesce(executor, move(SOURCE), ANY_PORT, 1)

    assert find_exposed(executor, "web") == ()
    assert teardown(executor, "web")

    assert is_bare(kernel)
    assert not teardown(executor, "web")


def test_a_quiesce_that_was_killed_is_released_by_teardown(
    executor: Executor, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.die_at = 0
    with monkeypatch.context() as dead:  # after SIGKILL nothing is undone
        dead.setattr(Executor, "undo", lambda *_: [])
        dead.setattr(StateDirectory, "remove", lambda *_: None)
        with pytest.raises(KilledError):
            quiesce(executor, move(SOURCE), ANY_PORT, 1)
    assert "web" in kernel.sites["src"].holds

    assert teardown(executor, "web")

    assert is_bare(kernel)


def test_a_quiesce_cannot_be_opened_into_a_move(executor: Executor, kernel: FakeKernel) -> None:
    quiesce(executor, move(SOURCE), ANY_PORT, 1)
    with pytest.raises(RefusedError, match="the id web is in use"):
        prepare(executor, move(GATEWAY, DESTINATION), CONNECTIONS)
    with pytest.raises(RefusedError, match="the id web is in use"):
        quiesce(executor, move(SOURCE), ANY_PORT, 1)
    with pytest.raises(RefusedError, match="only holds listeners"):
        open_move(executor, "web")
    assert "web" in kernel.sites["src"].holds


# ---- the move goes on from it ----------------------------------------------------------------


def test_the_move_of_the_same_id_takes_the_hold_over(
    executor: Executor, kernel: FakeKernel
) -> None:
    held = quiesce(executor, move(SOURCE), ANY_PORT, 1)

    plan = prepare(executor, move(GATEWAY, DESTINATION, SOURCE), CONNECTIONS)

    assert plan.move.held == held
    assert kernel.sites["src"].holds == {"web": held}
    assert kernel.sites["src"].gates == {"web": Gate.CLOSED}
    journal = executor.state.load("web")
    assert (journal.move.held, journal.move.quiesces, journal.move.lock) == (held, False, LOCK)
    assert journal.connections == CONNECTIONS
    teardown(executor, "web")
    assert all(is_bare(kernel, name) for name in kernel.sites)


def test_a_move_that_fails_gives_the_hold_back(executor: Executor, kernel: FakeKernel) -> None:
    held = quiesce(executor, move(SOURCE), ANY_PORT, 1)
    before = kernel.applied
    steps = len(check(executor, move(SOURCE), CONNECTIONS).prepare)

    for number in range(steps):
        kernel.fail_at = kernel.applied + number
        with pytest.raises(KernelError, match="told to fail"):
            prepare(executor, move(SOURCE), CONNECTIONS)

        assert kernel.sites["src"].holds == {"web": held}
        assert kernel.sites["src"].gates == {}
        assert kernel.sites["src"].locks[LOCK.table] == set(CONNECTIONS)
        assert executor.state.load("web").move.quiesces
    assert kernel.applied > before


def test_the_hold_is_in_the_new_journal_from_its_first_moment(
    executor: Executor, kernel: FakeKernel, tmp_path: Path
) -> None:
    """Killed right after the journal has changed hands, a teardown still releases it."""
    quiesce(executor, move(SOURCE), ANY_PORT, 1)
    plan = check(executor, move(SOURCE), CONNECTIONS)
    kinds = tuple(type(step).__name__ for step in plan.steps)
    identities = (kernel.identity(SOURCE),)
    number = kinds.index(HoldListeners.__name__)
    executor.state.begin(
        plan.move, CONNECTIONS, plan.surroundings, identities, kinds,
        before=tuple(range(len(kinds))), blocks=(number, plan.steps[number]),
    )  # fmt: skip

    journal = executor.state.load("web")
    assert {n: record.state for n, record in journal.records.items()} == {number: "doing"}
    teardown(executor, "web")

    assert is_bare(kernel)
    assert list((tmp_path / "state").glob("web.*")) == []


# ---- CRIU's lock, and a failing prepare ------------------------------------------------------


def test_whatever_step_fails_criu_s_lock_is_there_and_nothing_of_ours(
    executor: Executor, kernel: FakeKernel
) -> None:
    ours = move(GATEWAY, DESTINATION, SOURCE)
    steps = check(executor, ours, CONNECTIONS).steps
    assert any(isinstance(step, TakeOverLock) for step in steps)
    locks = {name: set(some) for name, some in kernel.sites["src"].locks.items()}
    for number in range(len(steps)):
        kernel.fail_at = kernel.applied + number
        with pytest.raises(KernelError, match="told to fail"):
            prepare(executor, ours, CONNECTIONS, Gate.OPEN)

        assert kernel.sites["src"].locks == locks, f"step {number}"
        assert all(is_bare(kernel, name) for name in kernel.sites)
    kernel.fail_at = None

    prepare(executor, ours, CONNECTIONS, Gate.OPEN)

    assert set(kernel.sites["src"].locks) == {"CRIU-other"}
    assert kernel.sites["src"].gates == {"web": Gate.CLOSED}
    [status] = read_status(executor, ("web",))
    assert status.gate == Gate.OPEN


def test_a_teardown_never_puts_the_lock_back(executor: Executor, kernel: FakeKernel) -> None:
    prepare(executor, move(SOURCE), CONNECTIONS)

    teardown(executor, "web")

    assert set(kernel.sites["src"].locks) == {"CRIU-other"}
    assert is_bare(kernel)


def test_a_process_that_lives_at_the_source_is_refused(
    executor: Executor, kernel: FakeKernel
) -> None:
    kernel.sites["src"].sockets.update(CONNECTIONS)

    with pytest.raises(RefusedError, match="3 of the connections still have their sockets") as no:
        prepare(executor, move(GATEWAY, SOURCE), CONNECTIONS)

    assert "--leave-running" in str(no.value.hint)
    assert executor.state.ids() == ()
    prepare(executor, move(GATEWAY, SOURCE), CONNECTIONS, frozen=True)


# ---- when the gate may go --------------------------------------------------------------------


def test_the_gate_may_not_go_while_old_would_answer(executor: Executor, kernel: FakeKernel) -> None:
    prepare(executor, move(GATEWAY, DESTINATION, SOURCE), CONNECTIONS)
    open_move(executor, "web")

    [reason] = find_exposed(executor, "web")

    assert reason == ("source=src still has OLD 10.2.0.10: it would answer 3 peers with a reset")
    assert kernel.sites["src"].gates == {"web": Gate.CLOSED}


def test_the_gate_may_go_when_old_has_left(executor: Executor, kernel: FakeKernel) -> None:
    prepare(executor, move(SOURCE), CONNECTIONS)
    kernel.sites["src"].addresses.clear()

    assert find_exposed(executor, "web") == ()


def test_the_gate_may_go_when_the_process_is_back(executor: Executor, kernel: FakeKernel) -> None:
    prepare(executor, move(SOURCE), CONNECTIONS)
    kernel.sites["src"].sockets.update(CONNECTIONS)
    assert find_exposed(executor, "web") == ()
    kernel.sites["src"].sockets.clear()
    assert len(find_exposed(executor, "web")) == 1

    open_move(executor, "web")

    assert kernel.sites["src"].gates == {"web": Gate.OPEN}
    assert find_exposed(executor, "web") == ()
    assert count_alive(executor, "web") == 0  # at home nothing breaks when natkeep goes


def test_the_gate_may_go_when_its_connections_have_ended_elsewhere(executor: Executor) -> None:
    prepare(executor, move(SOURCE), CONNECTIONS)
    every = [*CONNECTIONS]

    assert find_exposed(executor, "web", {TCP: CONNECTIONS}) == ()
    [reason] = find_exposed(executor, "web", {TCP: Connections.of(every[:2])})
    assert "would answer 1 peers" in reason
    others = Connections.of([FourTuple(Endpoint.parse("10.9.9.9:1"), every[0].destination)])
    assert len(find_exposed(executor, "web", {TCP: others})) == 1


def test_the_gate_may_go_when_criu_s_lock_was_never_taken(
    executor: Executor, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its last step; nothing was undone."""
    ours = move(SOURCE)
    plan = check(executor, ours, CONNECTIONS)
    kernel.die_at = len(plan.prepare) - 2
    monkeypatch.setattr(Executor, "undo", lambda *_: [])
    monkeypatch.setattr(StateDirectory, "remove", lambda *_: None)
    with pytest.raises(KilledError):
        prepare(executor, ours, CONNECTIONS)

    assert kernel.sites["src"].gates == {"web": Gate.CLOSED}
    assert find_exposed(executor, "web") == ()


def test_a_source_without_a_known_lock_is_exposed_all_the_same(executor: Executor) -> None:
    """Nobody knows whether CRIU's lock is there: natkeep's gate may be all that is."""
    prepare(executor, Move("web", MAPS, (SOURCE,)), CONNECTIONS)

    assert len(find_exposed(executor, "web")) == 1


def test_moving_on_takes_an_earlier_source_along(executor: Executor, kernel: FakeKernel) -> None:
    """A to B to C: what natkeep did at A's host is undone there, and CRIU's lock stays gone."""
    prepare(executor, move(GATEWAY, SOURCE), CONNECTIONS)
    onward = Move("web2", MAPS, (GATEWAY, SOURCE))

    replace_move(executor, "web", onward, CONNECTIONS)

    assert executor.state.ids() == ("web2",)
    assert LOCK.table not in kernel.sites["src"].locks
    assert kernel.sites["src"].gates == {"web2": Gate.CLOSED}


def test_a_journal_with_a_lock_that_is_none_is_corrupt(executor: Executor, tmp_path: Path) -> None:
    prepare(executor, move(SOURCE), CONNECTIONS)
    path = tmp_path / "state/web.journal"
    path.write_text(path.read_text().replace(str(LOCK.run_id), "x;flush ruleset"))

    with pytest.raises(JournalError, match="corrupt"):
        executor.state.load("web")


# ---- the command line, in a real namespace ---------------------------------------------------


@pytest.fixture
def source(netns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A namespace that has OLD on its lo."""
    monkeypatch.setenv("NATKEEP_STATE_DIR", str(tmp_path / "state"))
    command = ["ip", "-n", netns, "address", "add", f"{OLD}/32", "dev", "lo"]
    subprocess.run(command, check=True)
    return netns


@pytest.fixture
def listen(source: str) -> Iterator[Callable[..., socket.socket]]:
    """`listen("10.2.0.10")`: a listener at port 5000 in the source, which accepts nobody."""
    made: list[socket.socket] = []

    def make(host: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with entered(source):
            made.append(socket.socket(family))
        made[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made[-1].bind((host, 5000))
        made[-1].listen(8)
        return made[-1]

    yield make
    for each in made:
        each.close()


def dial(source: str) -> socket.socket:
    with entered(source):
        client = socket.socket()
    client.setblocking(False)
    client.connect_ex((str(OLD), 5000))
    return client


def is_connected(client: socket.socket) -> bool:
    time.sleep(0.05)  # over lo it takes microseconds, and the retry of a SYN a second
    return client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1


def ruleset(source: str) -> str:
    done = subprocess.run(
        ["ip", "netns", "exec", source, "nft", "list", "ruleset"], capture_output=True, text=True
    )
    return done.stdout


QUIESCE = ("quiesce", "web", "--map", f"{OLD}={NEW}")


@pytest.mark.root
@pytest.mark.parametrize("host", [str(OLD), "0.0.0.0", "::", f"::ffff:{OLD}"])
def test_who_dials_a_quiesced_listener_waits_and_gets_in_after_teardown(
    source: str, listen: Callable[..., socket.socket], host: str
) -> None:
    listener = listen(host)

    assert cli.main([*QUIESCE, "--site", f"source={source}"]) == 0
    client = dial(source)
    assert not is_connected(client)
    assert cli.main(["teardown", "web"]) == 0

    assert ruleset(source) == ""
    listener.settimeout(5)  # the SYN comes again after one second
    accepted, _ = listener.accept()
    accepted.close(), client.close()


@pytest.mark.root
def test_quiesce_waits_until_the_queue_is_empty(
    source: str, listen: Callable[..., socket.socket], capsys: pytest.CaptureFixture[str]
) -> None:
    listener = listen(str(OLD))
    clients = [dial(source) for _ in range(3)]
    assert all(is_connected(client) for client in clients)
    began = time.monotonic()
    accepted: list[socket.socket] = []

    def accept_slowly() -> None:
        for _ in clients:
            time.sleep(0.1)
            accepted.append(listener.accept()[0])

    thread = threading.Thread(target=accept_slowly)
    thread.start()
    code = cli.main(["--json", *QUIESCE, "--site", f"source={source}"])
    took = time.monotonic() - began
    thread.join()

    assert code == 0
    assert len(accepted) == 3
    assert 0.2 < took < 5
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1, "id": "web", "listeners": ["10.2.0.10:5000"],
    }  # fmt: skip
    for each in (*clients, *accepted):
        each.close()
    cli.main(["teardown", "web"])


@pytest.mark.root
def test_quiesce_of_a_queue_that_nobody_empties_fails_and_leaves_nothing(
    source: str, listen: Callable[..., socket.socket], capsys: pytest.CaptureFixture[str]
) -> None:
    listen("::")
    client = dial(source)
    assert is_connected(client)

    code = cli.main([*QUIESCE, "--site", f"source={source}", "--timeout", "0.2"])

    said = capsys.readouterr().err
    assert code == 1
    assert "connections are not accepted: 1 at [::]:5000" in said
    assert "--skip-in-flight" in said
    assert ruleset(source) == ""
    client.close()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--site", "destination"], 2, "quiesce is for the source"),
        (["--site", "source", "--site", "source=x"], 2, "quiesce is for the source"),
        (["--port", "0"], 2, "'0' is not a port"),
        (["--timeout", "-1"], 2, "'-1' is not a number of seconds"),
    ],
)
def test_a_wrong_command_line_is_said_at_once(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*QUIESCE, *arguments]) == code
    assert message in capsys.readouterr().err


@pytest.mark.root
def test_teardown_at_the_source_asks_for_leave(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list").write_text(f"{OLD}:5000 10.1.0.2:50594\n")
    arguments = ["--map", f"{OLD}={NEW}", "--site", f"source={source}"]
    assert cli.main(["prepare", "web", *arguments, "--connections", f"{tmp_path}/list"]) == 0
    assert "CRIU's lock is left: a list of connections" in capsys.readouterr().err

    code = cli.main(["teardown", "web"])

    assert code == 4
    assert "still has OLD 10.2.0.10: it would answer 1 peers" in capsys.readouterr().err
    assert "gate-web" in ruleset(source)
    assert cli.main(["status", "web", "--strict"]) == 0
    assert cli.main(["teardown", "web", "--yes"]) == 0
    assert ruleset(source) == ""


def test_the_hook_s_source_is_loaded_only_where_it_is_asked_for() -> None:
    code = "import sys, natkeep.criu.hook; sys.exit('natkeep.criu.dump' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
