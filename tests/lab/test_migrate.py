"""natkeep migrate when something fails, or ends it: the process runs at one host only."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from browser import count, take_picture
from pages import blocks_of
from recipe import likeness, typed

from natkeep.lab import scenario
from natkeep.lab.application import Application
from natkeep.lab.engine import Frozen
from natkeep.lab.host import await_true, write_script
from natkeep.lab.lab import Lab
from natkeep.lab.peer_host import PeerHost
from natkeep.lab.ssh import ContainerMachines, Machines
from natkeep.lab.topology import SECOND_CLIENT, USUAL
from natkeep.lab.translators import natkeep_command

pytestmark = [
    pytest.mark.root, pytest.mark.lab, pytest.mark.criu, pytest.mark.needs("sshd")
]  # fmt: skip


class Controller:
    """natkeep migrate at the gateway, line by line, until it is ended."""

    def __init__(self, machines: Machines, *words: str) -> None:
        self.machines, self.said = machines, list[str]()
        host = machines.lab.topology[machines.controller]
        self.process = subprocess.Popen(
            host.command(*natkeep_command(), "migrate", *machines.words(), *words),
            stderr=subprocess.PIPE, text=True,
            env=machines.environment("controller"),
        )  # fmt: skip

    def read_until(self, step: str) -> bool:
        """Whether a line of *step* came; all lines before it are read."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if line.split()[2:3] == [step]:
                return True
        return False

    def end(self, number: int) -> None:
        """Signal natkeep, which nsenter has started."""
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        for child in Path(children).read_text().split():
            os.kill(int(child), number)

    def wait(self) -> int:
        assert self.process.stderr is not None
        self.said += self.process.stderr
        return self.process.wait(60)


def find_ssh(machines: Machines) -> list[int]:
    """Pids of ssh with the lab's own configuration."""
    wanted = os.fsencode(machines.client)
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"ssh") and wanted in words:
            found.append(int(entry.parent.name))
    return found


def kill_all(pids: list[int]) -> list[int]:
    """Those of them that had not ended by themselves; some ssh does but one thing."""
    killed = []
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
    return killed


def perform(
    run: Callable[[Lab, Machines], bool], via: str = "", *,
    engine: str = "criu", connections: int = 3, udp: bool = False, family: int = 4,
    before_finish: Callable[[Lab, Machines], None] | None = None,
    usual: type[Machines] = Machines,
) -> None:  # fmt: skip
    """Run it in a lab; *run* says whether the server is at the destination in the end.

    via: `peers`, of which each has a host of its own, or else as is found: the gateway.
    connections: of each peer. usual: the machines where it is no container.
    """
    seats = (*USUAL, SECOND_CLIENT) if via == "peers" else USUAL
    with Lab("migrate", engine=engine, seats=seats, udp=udp, family=family) as lab:

        def whole(lab: Lab) -> None:
            if via == "peers":
                PeerHost(lab, lab.topology.peers)
            roles = ("source", "destination", *lab.peer_sites)
            options = ("--via", via) if via else ()
            kind = usual if engine == "criu" else ContainerMachines
            machines = kind(lab, *roles, controller="gateway", options=options)
            lab.serve()
            for role in lab.topology.peers:
                lab.dial(connections=connections, role=role)
            lab.traffic.talk()
            for name in ("udp_timeout", "udp_timeout_stream") if udp else ():
                # After so many seconds a socket counts as silent, which `finish` waits for.
                set_to = f"net.netfilter.nf_conntrack_{name}=2"
                lab.topology["destination"].run("sysctl", "-qw", set_to)
            lab.begin_freeze()
            lab.frozen = Frozen(machines.images, ())
            moved = run(lab, machines)
            machines.take("destination" if moved else "source")
            if moved:
                lab.undone.append(lab.place_order(move_id="web"))  # `finish` undoes it
            lab.traffic.talk_on()
            runs = [r for r in ("source", "destination") if machines.is_at(r)]
            lab.report.check("it runs at one host", len(runs) == 1, str(runs))
            lab.traffic.check_ends()
            if moved and not udp:
                lab.traffic.client_closes()
                lab.traffic.server_closes()
            if moved and before_finish:
                before_finish(lab, machines)
            if moved:
                machines.call("finish", "web", "--drain", "30")
            for role in () if moved else ("gateway", *roles):
                left = lab.topology[role].run("nft", "list", "ruleset").stdout
                lab.report.check(f"no rule is left at the {role}", "natkeep" not in left, left)
            lab.conclude(moved=moved)

        scenario.perform(lab, whole)
    assert [str(each) for each in lab.report.assertions if not each.ok] == []
    assert lab.report.passed


def failing(lab: Lab, *, after: float = 0, back: float = 0) -> str:
    """An action script with which a restore at the destination fails, before it has any socket.

    after: so many seconds. back: so many does the source wait before it restores.
    """
    script = lab.directory / "failing"
    script.write_text(
        '#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = pre-restore ] || exit 0\n'
        f"if ip -o address show dev eth0 | grep -q {lab.old}; then\n"
        f"touch {script}.back; sleep {back}; exit 0\nfi\n"
        f"sleep {after}; exit 1\n"
    )
    script.chmod(0o755)
    return str(script)


def test_a_restore_that_fails_is_taken_back():
    def run(lab: Lab, machines: Machines) -> bool:
        script = failing(lab)
        done = machines.natkeep(
            "migrate", *machines.words(), "--restore-option=--action-script",
            f"--restore-option={script}",
        )  # fmt: skip
        lab.report.check("it fails", done.returncode == 1, done.stderr)
        lab.report.check("it says why", "criu restore" in done.stderr, done.stderr)
        lab.report.check("and where it runs", "as before" in done.stderr, done.stderr)
        return False

    perform(run)


def test_the_controller_is_killed_on_the_way_back():
    """While the process is restored at the source, where it is found then."""

    def run(lab: Lab, machines: Machines) -> bool:
        script = failing(lab, back=4)
        words = ("--restore-option=--action-script", f"--restore-option={script}")
        controller = Controller(machines, *words)
        assert controller.read_until("FAILED"), controller.said
        await_true(Path(f"{script}.back").exists, "the source to restore it", seconds=30)
        controller.end(signal.SIGKILL)
        assert controller.wait() == -signal.SIGKILL, controller.said
        lab.report.check("it is not there yet", not machines.is_at("source"))
        again = machines.natkeep("migrate", "--rollback", "web")
        lab.report.check("it is taken back", again.returncode == 0, again.stderr)
        lab.report.check("it tells where it runs", "as before" in again.stderr, again.stderr)
        return False

    perform(run)


@pytest.mark.parametrize(
    ("way", "step", "via"),
    [
        ("--rollback", "prepare", ""), ("--rollback", "dump", ""),
        # To resume what is not frozen is refused, and it is taken back.
        ("--resume", "check", ""), ("--resume", "dump", ""), ("--resume", "copy", ""),
        # While the peers' hosts are opened, which are several and reached by ssh.
        ("--rollback", "dump", "peers"), ("--resume", "dump", "peers"),
    ],
)  # fmt: skip
def test_the_controller_is_killed(way: str, step: str, via: str):
    kill_controller(way, step, via=via)


RUNC = pytest.param("runc", marks=pytest.mark.needs("runc"))
PODMAN = pytest.param("podman", marks=pytest.mark.needs("runc", "podman"))


@pytest.mark.parametrize("engine", [RUNC, PODMAN])
def test_a_restore_of_a_container_that_fails_is_taken_back(engine: str):
    """By a script that the user's own configuration of CRIU names, and only there."""

    def run(lab: Lab, machines: Machines) -> bool:
        words = machines.words()  # makes what is ready at the destination
        mark = machines.images.with_name("mark")
        script = write_script(
            lab.directory / "failing",
            f"[ $CRTOOLS_SCRIPT_ACTION != pre-restore ] || ! [ -e {mark}/it ]",
        )
        for configuration in lab.directory.rglob("criu*.conf"):
            configuration.write_text(f"action-script {script}\n")
        destination = lab.topology["destination"]
        destination.run("mkdir", "-p", str(mark))
        destination.run("mount", "-t", "tmpfs", "tmpfs", str(mark))
        destination.run("touch", f"{mark}/it")
        done = machines.natkeep("migrate", *words)
        lab.report.check("it fails", done.returncode == 1, done.stderr)
        lab.report.check("it says why", f"{engine} restore" in done.stderr, done.stderr)
        lab.report.check("and where it runs", "as before" in done.stderr, done.stderr)
        again = machines.natkeep("migrate", *words, "--dry-run")
        lab.report.check("nothing is in the way of another", not again.returncode, again.stderr)
        return False

    perform(run, engine=engine)


@pytest.mark.parametrize("engine", ["criu", RUNC, PODMAN])
def test_a_server_of_udp_moves_by_a_gateway(engine: str):
    """CRIU locks no UDP: of it natkeep-hook keeps the source quiet, before the dump has ended."""

    def run(lab: Lab, machines: Machines) -> bool:
        for configuration in lab.directory.rglob("criu*.conf"):
            configuration.write_text("")  # the lab's own network-lock; natkeep has its own
        lab.traffic.quiet()
        controller = Controller(machines, "--map", f"{lab.old}={lab.new}")
        dumped = controller.read_until("dump")
        lab.report.check("the hook was called", '"web"' in machines.status("source"))
        code = controller.wait()
        lab.report.check("it succeeds", dumped and not code, "".join(controller.said))
        lab.traffic.talk()
        return True

    perform(run, engine=engine, udp=True)


@pytest.mark.parametrize("engine", [RUNC, PODMAN])
def test_the_controller_of_a_container_is_killed(engine: str):
    kill_controller("--rollback", "dump", engine=engine)


@pytest.mark.needs("runc", "podman")
def test_the_controller_of_a_container_is_killed_and_it_goes_on():
    """podman's image is where its record says."""
    kill_controller("--resume", "copy", engine="podman")


@pytest.mark.needs("runc")
def test_the_controller_is_killed_where_a_container_is_beside_its_gateway():
    kill_controller("--rollback", "copy", engine="runc", via="source")


def kill_controller(way: str, step: str, **how: str) -> None:
    """Once the line of *step* was read, and so in the step that follows."""

    def run(lab: Lab, machines: Machines) -> bool:
        controller = Controller(machines)
        assert controller.read_until(step), controller.said
        controller.end(signal.SIGKILL)
        assert controller.wait() == -signal.SIGKILL, controller.said
        done = machines.natkeep("migrate", way, "web")
        moved = machines.is_at("destination")
        said = f"{''.join(controller.said)}{done.stderr}"
        if way == "--rollback" and not moved:
            lab.report.check("it is taken back", done.returncode == 0, said)
        elif way == "--resume" and moved:
            lab.report.check("it goes on", done.returncode == 0, said)
        elif way == "--resume":  # it was not frozen yet, so there is nothing to go on with
            lab.report.check("it says that it runs at the source", "nothing is frozen" in said)
            machines.call("migrate", "--rollback", "web")
        else:  # the restore was through by then
            lab.report.check("it says that there is no way back", "no way back" in said, said)
        return moved

    perform(run, **how)


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, "prepare"), (signal.SIGHUP, "dump"), (signal.SIGTERM, "restore")],
)
def test_a_signal_takes_it_back(number: signal.Signals, step: str):
    """Ctrl-C, the end of the terminal, kill."""

    def run(lab: Lab, machines: Machines) -> bool:
        controller = Controller(machines)
        assert controller.read_until(step), controller.said
        controller.end(number)
        code = controller.wait()
        said = "".join(controller.said)
        moved = machines.is_at("destination")
        lab.report.check("it says so", code != 0 or moved, said)
        told = (
            "there is no way back" in said or "were heard" in said if moved else "as before" in said
        )
        lab.report.check("it tells where it runs", told, said)
        return moved

    perform(run)


@pytest.mark.parametrize(
    ("step", "via"), [("prepare", ""), ("dump", ""), ("copy", ""), ("dump", "peers")]
)
def test_every_ssh_is_killed(step: str, via: str):
    """The gateway is beside the controller; peers' hosts are reached by ssh, too."""

    def run(lab: Lab, machines: Machines) -> bool:
        controller = Controller(machines)
        assert controller.read_until(step), controller.said
        killed = kill_all(find_ssh(machines))
        assert killed, controller.said
        controller.wait()
        time.sleep(0.1)
        said = "".join(controller.said)
        moved = machines.is_at("destination")
        told = "runs on destination" in said if moved else "as before" in said
        lab.report.check("it tells where it runs", told, said)
        return moved

    perform(run, via)


@pytest.mark.parametrize(
    ("role", "engine"),
    [
        ("destination", "criu"),
        # podman finds it out when the process has ended already.
        pytest.param("source", "podman", marks=pytest.mark.needs("runc", "podman")),
    ],
)
def test_a_full_disk_takes_it_back(role: str, engine: str):
    def run(lab: Lab, machines: Machines) -> bool:
        host = lab.topology[role]
        host.run("mount", "-o", "remount,size=1m", str(machines.images))
        done = machines.natkeep("migrate", *machines.words())
        lab.report.check("it says why", "o space left on device" in done.stderr, done.stderr)
        lab.report.check("and where it runs", "as before" in done.stderr, done.stderr)
        lab.report.check("it fails", done.returncode == 1, str(done.returncode))
        return False

    perform(run, engine=engine)


def test_with_listeners_other_programs_are_reached_at_the_source():
    """Its sshd, which `natkeep finish` asks for a new connection."""

    def run(lab: Lab, machines: Machines) -> bool:
        lab.listeners = True
        done = machines.natkeep("migrate", *machines.words(), "--listeners")
        lab.report.check("it succeeds", done.returncode == 0, done.stderr)
        return True

    perform(run)


@pytest.mark.parametrize(("via", "role", "count"), [("", "gateway", 1), ("peers", "peer", 2)])
def test_a_dry_run_says_each_command_and_changes_nothing(via: str, role: str, count: int):
    def run(lab: Lab, machines: Machines) -> bool:
        done = machines.natkeep("migrate", *machines.words(), "--dry-run")
        lab.report.check("it succeeds", done.returncode == 0, done.stderr)
        said = {line.split()[2] for line in done.stderr.splitlines()}
        lab.report.check("and tells of nothing as done", said == {"check", "would"}, done.stderr)
        told = [line for line in done.stderr.splitlines() if " would " in line]
        order = (
            "--site destination", *[f"--site {role}"] * count, "dump --images-dir",
            *["natkeep open web --connections -"] * (1 + count),  # the destination compares
            "restore --images-dir", "--site source",
        )  # fmt: skip
        each_once = dict.fromkeys(order)
        places = [n for each in each_once for n, line in enumerate(told) if each in line]
        ok = len(places) == len(order) and places == sorted(places)
        lab.report.check("each command once, in its place", ok, done.stderr)
        again = machines.natkeep("migrate", "--rollback", "web")
        lab.report.check("nothing was begun", again.returncode == 7, again.stderr)
        return False

    perform(run, via)


def test_at_a_terminal_the_copy_has_a_bar():
    """Over a wire on which it takes some seconds."""

    def run(lab: Lab, machines: Machines) -> bool:
        slowly = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "20mbit"]
        source, gateway = lab.topology["source"], lab.topology[machines.controller]
        source.run(*slowly, "burst", "64k", "latency", "400ms")
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (25, 100))
        controller = subprocess.Popen(
            gateway.command(*natkeep_command(), "migrate", *machines.words()), stderr=theirs,
            env=machines.environment("controller"),
        )  # fmt: skip
        os.close(theirs)
        said = b""
        with suppress(OSError):  # the end of the other side
            while piece := os.read(ours, 4096):
                said += piece
        os.close(ours)
        lab.report.check("it succeeds", controller.wait() == 0, said.decode())
        bars = re.findall(rb"copy: +(\d+)%", said)
        lab.report.check("the bar goes on", len(set(bars)) > 2, said.decode())
        lines = [line.rpartition(b"\r")[2] for line in said.splitlines()]
        steps = [line.split()[2] for line in lines if b" ms  " in line]
        lab.report.check("each line is whole", steps.count(b"copy") == 1, str(steps))
        end = b"natkeep: web: silent for ", b" ms at most; 3 of 3 peers answered"
        told = any(all(each in line for each in end) for line in lines)
        lab.report.check("it says what came of it", told, said.decode())
        return True

    perform(run)


class ByOthers(Machines):
    """What ssh starts there is not root."""

    sshd = (
        "ForceCommand setpriv --reuid 65534 --regid 65534 --clear-groups sh -c "
        '"$SSH_ORIGINAL_COMMAND"'
    )


def test_where_ssh_is_root_by_sudo_alone():
    """As which a setpriv serves here that anyone may run, and that is root's."""

    def run(lab: Lab, machines: Machines) -> bool:
        lab.directory.chmod(0o711)
        sudo = lab.directory / "sudo"
        shutil.copy(shutil.which("setpriv") or "", sudo)
        sudo.chmod(0o4755)
        root = [str(sudo), "--reuid", "0", "--regid", "0", "--clear-groups"]
        there = shlex.join([*root, "env", "SUDO_UID=65534", *natkeep_command()])
        done = machines.natkeep("migrate", *machines.words(), "--natkeep", there)
        lab.report.check("it succeeds", done.returncode == 0, done.stderr)
        return True

    perform(run, usual=ByOthers)


@pytest.mark.needs("matplotlib", "chromium")
@pytest.mark.parametrize("via", ["", "peers"])
def test_a_page_shows_what_the_peers_saw(via: str, tmp_path: Path):
    def run(lab: Lab, machines: Machines) -> bool:
        said = machines.call("migrate", *machines.words(), "--report", str(tmp_path / "page"))
        lab.report.check("it says where it is", f"{tmp_path}/page/web.html" in said, said)
        return True

    perform(run, via)
    look_at(tmp_path / "page/web.html", r"10\.1\.0\.\d" if via else r"this host \(gateway\)")


@pytest.mark.needs("matplotlib", "chromium")
def test_a_page_shows_what_a_relay_passes_on(tmp_path: Path, monkeypatch):
    words, report = Machines.words, ["--report", str(tmp_path / "page")]
    monkeypatch.setattr(Machines, "words", lambda self: [*words(self), *report])
    done = scenario.run(scenario.find_scenario("migrate_between_two_hosts"), engine="criu")
    assert done.passed
    look_at(tmp_path / "page/web.html", "source")


def look_at(page: Path, host: str) -> None:
    """That it says what it is to, and that a browser shows it."""
    text = page.read_text()
    assert re.search(r"silent for \d+ ms at most; \d+ of \d+ peers answered", text)
    assert re.search(rf"captured at {host}", text)
    drawn = re.findall(r"<!-- (.+?) -->", text)  # the words in a plot
    for what in ("peer to process", "process to peer", "blackout", "copy", "restore"):
        assert what in drawn, what
    assert any("heard again" in each for each in drawn)
    assert any(re.fullmatch(r"\S+:\d+ &gt; 10\.[12]\.0\.10:5000", each) for each in drawn)
    pixels = take_picture(page, page.parent, height=4000)
    assert count(pixels, "#eeeeee") > 10_000  # the blackout
    assert count(pixels, "#1f5fa8") > 1_000  # the steps, and what was said


def test_a_process_that_came_by_a_move_is_refused():
    def run(lab: Lab, machines: Machines) -> bool:
        machines.call("migrate", *machines.words())
        back = [f"destination:{lab.traffic.server.pid}", "source", "--id", "back"]
        done = machines.natkeep("migrate", *machines.words()[2:], *back)
        lab.report.check("it is refused", done.returncode == 4, done.stderr)
        lab.report.check("by name", "came there by move web" in done.stderr, done.stderr)
        return True

    perform(run)


NO_SSH = (
    "add table inet no_ssh\n"
    "add chain inet no_ssh in { type filter hook input priority 0; }\n"
    "add rule inet no_ssh in tcp dport 22 reject with tcp reset\n"
)


def test_a_peers_host_that_cannot_be_reached_is_named():
    def run(lab: Lab, machines: Machines) -> bool:
        lab.topology["client2"].nft(NO_SSH)
        done = machines.natkeep("migrate", *machines.words())
        lab.report.check("exit 9", done.returncode == 9, str(done.returncode))
        told = f"{machines.addresses['client2']} cannot be reached" in done.stderr
        lab.report.check("it is named", told and "Connection refused" in done.stderr, done.stderr)
        return False

    perform(run, "peers")


def test_a_peers_host_that_is_away_does_not_hold_up_the_way_back():
    def run(lab: Lab, machines: Machines) -> bool:
        script = failing(lab, after=5)
        words = ("--restore-option=--action-script", f"--restore-option={script}")
        controller = Controller(machines, *words)
        assert controller.read_until("copy"), controller.said
        lab.topology["client2"].nft(NO_SSH)
        code, said = controller.wait(), "".join(controller.said)
        lab.report.check("it fails", code == 1, said)
        runs = "runs on source, as before" in said and machines.is_at("source")
        lab.report.check("it runs", runs, said)
        left = f"something is left: {machines.addresses['client2']} cannot be reached" in said
        lab.report.check("what is left is named", left, said)
        lab.topology["client2"].run("nft", "delete", "table", "inet", "no_ssh")
        machines.call("migrate", "--rollback", "web")
        return False

    perform(run, "peers")


def test_a_peers_host_that_is_away_is_not_needed_once_the_process_runs():
    def run(lab: Lab, machines: Machines) -> bool:
        controller = Controller(machines)
        assert controller.read_until("restore"), controller.said
        controller.end(signal.SIGKILL)
        controller.wait()
        lab.topology["client2"].nft(NO_SSH)
        machines.call("migrate", "--resume", "web")
        lab.topology["client2"].run("nft", "delete", "table", "inet", "no_ssh")
        return True

    perform(run, "peers")


def test_a_peers_host_that_is_away_does_not_hold_up_the_end():
    def run(lab: Lab, machines: Machines) -> bool:
        machines.call("migrate", *machines.words())
        return True

    def before_finish(lab: Lab, machines: Machines) -> None:
        lab.topology["client2"].nft(NO_SSH)
        done = machines.natkeep("finish", "web", "--drain", "30")
        told = f"translates: {machines.addresses['client2']} cannot be reached" in done.stderr
        lab.report.check("what is left is named", told and done.returncode == 8, done.stderr)
        for role in ("source", "destination", "client"):
            left = '"web"' in machines.status(role)
            lab.report.check(f"it has ended at the {role}", not left)
        lab.topology["client2"].run("nft", "delete", "table", "inet", "no_ssh")

    perform(run, "peers", before_finish=before_finish)


def test_peers_hosts_translate_ipv6():
    def run(lab: Lab, machines: Machines) -> bool:
        machines.call("migrate", *machines.words())
        return True

    perform(run, "peers", family=6)


def test_a_server_of_udp_moves_by_the_hosts_that_are_named():
    """No connection of it tells who its peers are."""

    def run(lab: Lab, machines: Machines) -> bool:
        machines.options = ("--via", "peer:client", "--via", "peer:client2")
        lab.traffic.quiet()
        machines.call("migrate", *machines.words(), "--map", f"{lab.old}={lab.new}")
        lab.traffic.talk()
        return True

    perform(run, "peers", udp=True)


def test_it_is_given_on_the_source_itself():
    """Which has another address, by which the destination sees it."""

    def run(lab: Lab, machines: Machines) -> bool:
        other = str(lab.old + 1)
        lab.topology["source"].run("ip", "address", "add", f"{other}/24", "dev", "eth0")
        machines.client.write_text(f"Host *\n BindAddress {other}\n{machines.client.read_text()}")
        machines.controller = "source"
        process, *words = machines.words()
        said = machines.call("migrate", process.replace("source", "local"), *words)
        told = "leaves this host, where `natkeep finish web` is given" in said
        lab.report.check("it says that it leaves this host", told, said)
        return True

    perform(run, "peers")


def test_unasked_the_peers_hosts_are_taken_where_nothing_else_can():
    """The host that it is given on is a peer's, and the source has no address beside OLD."""

    def run(lab: Lab, machines: Machines) -> bool:
        machines.controller, machines.options = "client2", ()
        done = machines.natkeep("migrate", *machines.words())
        lab.report.check("it succeeds", done.returncode == 0, done.stderr)
        told = f"{machines.addresses['client']}, this host (peer) translate, as the peers' own"
        lab.report.check("it says who", told in done.stderr, done.stderr)
        lab.report.check("and why", "(this host (gateway) is no gateway" in done.stderr)
        return True

    perform(run, "peers")


def test_where_ssh_would_be_cut_off_it_is_refused():
    """OLD is the destination's own address from the prepare on."""

    def run(lab: Lab, machines: Machines) -> bool:
        process, destination, *options = machines.words()
        for controller, ends, told in (
            ("source", [process.replace("source", "local"), destination], "sees this host as"),
            ("destination", [process, "local"], "is reached at"),
        ):
            machines.controller = controller
            done = machines.natkeep("migrate", *ends, *options)
            lab.report.check(f"at the {controller} it is refused", done.returncode == 4)
            lab.report.check("and why", f"{told} {lab.old}" in done.stderr, done.stderr)
        return False

    perform(run, "peers")


def test_the_wire_shows_another_port():
    def run(lab: Lab, machines: Machines) -> bool:
        lab.wire_port = 8080
        map_ = f"{lab.old}:{lab.port}={lab.new}:{lab.wire_port}"
        done = machines.natkeep("migrate", *machines.words(), "--map", map_)
        lab.report.check("it succeeds", done.returncode == 0, done.stderr)
        return True

    perform(run)


WITH_UDP = """
import os, socket, sys
beside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
beside.bind(("10.2.0.10", 5000))
beside.set_inheritable(True)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""A server with a socket of UDP, too."""


def test_udp_is_left_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    line = Application.serve_line
    monkeypatch.setattr(
        Application, "serve_line", lambda *args: [sys.executable, "-c", WITH_UDP, *line(*args)]
    )

    def run(lab: Lab, machines: Machines) -> bool:
        done = machines.natkeep(
            "migrate", *machines.words(), "--no-udp", "--map", f"{lab.old}=auto"
        )
        lab.report.check("it succeeds", done.returncode == 0, done.stderr)
        [move] = json.loads(machines.status("destination"))["moves"]
        lab.report.check("UDP is left", not move.get("udp_servers"), str(move))
        return True

    perform(run)


def test_what_was_there_before_is_left_alone():
    """A move of the same id, and an image in the directory that was named."""

    def run(lab: Lab, machines: Machines) -> bool:
        source = lab.topology["source"]
        held = ["quiesce", "web", "--map", f"{lab.old}={lab.new}", "--port", "5000"]
        source.run(*natkeep_command(), *held, env=machines.environment("source"))
        done = machines.natkeep("migrate", *machines.words())
        lab.report.check("it is refused", done.returncode == 4, done.stderr)
        lab.report.check("the move is there", '"web"' in machines.status("source"))
        end = ["teardown", "web", "--yes"]
        source.run(*natkeep_command(), *end, env=machines.environment("source"))

        image = machines.images / "dump"
        destination = lab.topology["destination"]
        destination.run("mkdir", str(image))
        done = machines.natkeep("migrate", *machines.words())
        lab.report.check("an image is, too", "is not empty" in done.stderr, done.stderr)
        destination.run("rmdir", str(image))  # fails unless it is there still
        return False

    perform(run)


def test_migrate_says_what_the_pages_show():
    """The README's two commands, and all that docs/migrate.md shows of the first."""
    short, shown = blocks_of("test_migrate_says_what_the_pages_show")
    [command] = typed(shown.text)
    migrate, finish = (shlex.split(line, comments=True) for line in short.text.splitlines())
    assert migrate == [word.replace("1234", "$PID") for word in shlex.split(command)]
    assert finish[1:] == ["finish", "web"]

    def run(lab: Lab, machines: Machines) -> bool:
        hosts = machines.client.read_text()
        for role, name in (("source", "a.example"), ("destination", "b.example")):
            hosts = hosts.replace(f"Host {role} ", f"Host {role} {name} ")
        machines.client.write_text(hosts)
        words = [word.replace("$PID", str(lab.traffic.server.pid)) for word in migrate]
        done = machines.natkeep(*words[1:], *machines.words()[2:])
        lab.report.check("it succeeds", done.returncode == 0, done.stderr)
        name = f"({os.uname().nodename})"
        said = likeness(done.stderr.replace(name, "(gateway)"))
        expected = likeness(shown.text.partition("\n")[2])
        lab.report.check("it says what the page shows", said == expected, done.stderr)
        return True

    perform(run, connections=20)
