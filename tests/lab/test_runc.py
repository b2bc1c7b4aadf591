"""containers move: with runc and with podman, by an annotation and by /etc/criu/runc.conf."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from natkeep.lab import engines, lab, scenario
from natkeep.lab.engine import EngineError, Opening
from natkeep.lab.engines import runc
from natkeep.lab.engines.criu import find_criu
from natkeep.lab.engines.runc import Runc, find_left_cgroups, inside
from natkeep.lab.lab import Lab
from natkeep.lab.report import Report
from natkeep.lab.scenario import find_scenario
from natkeep.lab.translators import TRANSLATORS, Natkeep, natkeep_command

ETC = Path("/etc/criu")


def observe_etc() -> list[tuple[str, int, bytes]]:
    """CRIU's configuration files, with their modes."""
    files = sorted(ETC.rglob("*")) if ETC.exists() else []
    return [(str(each), each.stat().st_mode, each.read_bytes()) for each in files if each.is_file()]


@pytest.fixture(autouse=True)
def _nothing_is_left():
    """A container leaves no cgroup, and nothing in /etc/criu."""
    etc, cgroups = observe_etc(), set(find_left_cgroups())

    yield

    assert observe_etc() == etc
    assert set(find_left_cgroups()) <= cgroups  # other runs have their own, while they live


@pytest.mark.root
@pytest.mark.criu
@pytest.mark.lab
@pytest.mark.needs("runc", "podman")
def test_a_container_of_podman_moves():
    judge(scenario.run(find_scenario("podman_container_moves")), "podman")


@pytest.mark.root
@pytest.mark.criu
@pytest.mark.lab
@pytest.mark.needs("sshd")
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("runc", marks=pytest.mark.needs("runc")),
        pytest.param("podman", marks=pytest.mark.needs("runc", "podman")),
    ],
)
def test_a_container_moves_by_migrate(engine: str):
    judge(scenario.run(find_scenario(f"migrate_{engine}_container")), engine)


def judge(report: Report, engine: str) -> None:
    assert [str(each) for each in report.assertions if not each.ok] == []
    assert report.engine == engine
    assert report.before == report.after
    assert len(report.before) == 4
    assert report.resets == 0


class ByDefaultFile(Runc):
    """Without the annotation: CRIU's configuration is in /etc/criu/runc.conf.

    That /etc is a copy on which only the lab's host looks, so the machine's own stays as it is.
    """

    def configure(self, host, bundle, configuration):
        etc = host.directory / f"etc-{host.role}"
        if not etc.exists():
            host.run("cp", "-a", "/etc", str(etc))
            host.run("mount", "--bind", str(etc), "/etc")
        (etc / "criu").mkdir(exist_ok=True)
        (etc / "criu" / "runc.conf").write_text(configuration)
        return {}


def spy_on_hook(monkeypatch, directory: Path) -> Path:
    """Have the hook note, at post-restore, in which network namespace and with what it runs."""
    seen = directory / "seen"
    plain = Natkeep.hook

    def hook(translator):
        script = directory / "spy"
        script.write_text(
            "#!/bin/sh\n"
            "if [ $CRTOOLS_SCRIPT_ACTION = post-restore ]; then\n"
            f"  {{ readlink /proc/self/ns/net; readlink /proc/$CRTOOLS_INIT_PID/ns/net;"
            f" echo $NATKEEP_ID; }} >>{seen}\n"
            "fi\n"
            f"exec {plain(translator)}\n"
        )
        script.chmod(0o755)
        return script

    monkeypatch.setattr(Natkeep, "hook", hook)
    return seen


@pytest.mark.root
@pytest.mark.criu
@pytest.mark.lab
@pytest.mark.needs("runc")
@pytest.mark.parametrize("kind", [Runc, ByDefaultFile])
def test_the_hook_runs_once_in_the_namespace_of_runc(kind, monkeypatch, tmp_path):
    """Found by the annotation and by runc's default file; NATKEEP_ID comes through runc."""
    seen = spy_on_hook(monkeypatch, tmp_path)
    monkeypatch.setattr(lab, "choose_engine", lambda name, probe: kind(find_criu()))

    judge(scenario.run(find_scenario("runc_container_moves")), "runc")

    here, there, move = seen.read_text().splitlines()
    assert here == os.readlink("/proc/self/ns/net") != there
    assert move == "lab"


class ByHook(Natkeep):
    """The gateway by command; the destination by the hook, which finds NEW for itself."""

    def prepare(self, order):
        self.call(
            "prepare", order.id, "--map", f"{order.old}={order.new}",
            "--site", f"gateway={order.gateway.name}", *order.options,
        )  # fmt: skip

    def opening(self, order):
        environment = {**self.environment, "NATKEEP_MAP": f"{order.old}=auto"}
        return Opening(lambda: None, self.hook(), environment)

    def teardown(self, order):
        """Where the hook ran: it names its site by a pid of that pid namespace."""
        for journal in (self.directory / "natkeep-state").glob("*.journal"):
            command = inside(order.destination, *natkeep_command())
            environment = {**os.environ, **self.environment}
            subprocess.run([*command, "teardown", journal.stem, "--yes"], check=True,
                           capture_output=True, env=environment)  # fmt: skip


@pytest.mark.root
@pytest.mark.criu
@pytest.mark.lab
@pytest.mark.needs("runc")
def test_the_hook_prepares_for_a_container_whose_address_nobody_knew(monkeypatch):
    """As in a pod: the address of the restored container's namespace is read when it exists."""
    monkeypatch.setitem(TRANSLATORS, "natkeep", ByHook)

    with Lab("container", engine="runc") as lab:
        lab.begin(connections=4)
        lab.move()
        lab.translator.call("open", lab.order.id)
        lab.traffic.talk_on()
        lab.finish()

    judge(lab.report, "runc")


@pytest.mark.root
@pytest.mark.criu
@pytest.mark.lab
@pytest.mark.needs("runc")
def test_a_checkpoint_that_fails_says_why_in_the_words_of_criu():
    """Without --tcp-established CRIU refuses, and the container goes on."""
    with pytest.MonkeyPatch.context() as patch, Lab("refused", engine="runc") as lab:
        lab.serve()
        lab.dial()
        plain = runc._images
        patch.setattr(runc, "_images", lambda into: plain(into)[:-1])
        with pytest.raises(EngineError, match="consider using --tcp-established"):
            lab.engine.freeze(lab.at, lab.traffic.server, lab.directory / "refused")
        lab.traffic.talk()


def test_without_runc_the_engine_says_what_to_install(monkeypatch):
    monkeypatch.setattr(engines, "find_criu", lambda: Path("/criu"))
    monkeypatch.setattr(engines.shutil, "which", lambda name: None)

    with pytest.raises(EngineError, match="there is no podman") as raised:
        engines.choose_engine("podman")

    assert raised.value.hint == "apt-get install podman"


def test_cgroups_of_labs_that_are_over_are_removed(monkeypatch, tmp_path):
    """Those of a lab that lives, by its lock's file, and of others stay."""
    locks, cgroups = tmp_path / "locks", tmp_path / "cgroups"
    for each in ("freezer/natkeep-lab-dead-podman/below", "natkeep-lab-live-x", "cpu/other"):
        (cgroups / each).mkdir(parents=True)
    locks.mkdir()
    (locks / "live").touch()
    monkeypatch.setattr(runc, "LOCKS", locks)
    monkeypatch.setattr(runc, "CGROUPS", cgroups)

    runc.remove_cgroups()

    left = sorted(str(each.relative_to(cgroups)) for each in cgroups.rglob("*"))
    assert left == ["cpu", "cpu/other", "freezer", "natkeep-lab-live-x"]
