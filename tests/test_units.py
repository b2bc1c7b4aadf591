"""the systemd units: systemd accepts them, and what they start is a command that there is."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from natkeep import policy
from natkeep.cli import make_parser

FOLDER = Path(__file__).parent.parent / "natkeep/systemd"
UNITS = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".service", ".timer"))
SERVICES = [name for name in UNITS if name.endswith(".service")]
LIST = ("After", "Before", "PartOf", "ReloadPropagatedFrom", "WantedBy")


def read(name: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # its documented use
    unit.read(FOLDER / name)
    return unit


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_has_nothing_to_say() -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", *(str(FOLDER / name) for name in UNITS)],
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_starts_a_verb_that_there_is(name: str) -> None:
    service = read(name)["Service"]
    commands = [service[key] for key in ("ExecStart", "ExecReload") if key in service]

    for command in commands:
        env, natkeep, *arguments = shlex.split(command)
        assert (env, natkeep) == ("/usr/bin/env", "natkeep")
        assert make_parser(arguments).parse_args(arguments).run


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_no_more_than_it_needs(name: str) -> None:
    service = read(name)["Service"]

    holds = ["CAP_NET_RAW"] if name == "natkeep-agent.service" else []
    assert service["CapabilityBoundingSet"].split() == [
        "CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", *holds
    ]  # fmt: skip
    assert service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"
    # The sites are the work, and their sysctls.
    assert "PrivateNetwork" not in service
    assert "ProtectKernelTunables" not in service


def test_a_reload_of_the_firewall_is_a_reload_of_repair_behind_it() -> None:
    """A reload is handed on to active units only, and ordered as a start is."""
    unit = read("natkeep-repair.service")

    for key in ("After", "PartOf", "ReloadPropagatedFrom"):
        assert {"nftables.service", "firewalld.service"} <= set(unit["Unit"][key].split())
    assert unit["Service"]["Type"] == "oneshot"
    assert unit["Service"]["RemainAfterExit"] == "yes"
    assert unit["Service"]["ExecReload"] == unit["Service"]["ExecStart"]
    assert "nftables.service" in unit["Install"]["WantedBy"].split()


def test_the_watch_looks_before_the_kernel_forgets_an_end() -> None:
    """nf_conntrack_tcp_timeout_close is 10 s; a look and the timer's accuracy are within it."""
    timer = read("natkeep-watch.timer")["Timer"]
    seconds = float(timer["OnUnitInactiveSec"].removesuffix("s"))
    slack = float(timer["AccuracySec"].removesuffix("ms")) / 1000

    assert seconds + slack < 9
    assert read("natkeep-watch.service")["Service"].get("RemainAfterExit", "no") == "no"


def test_gc_comes_before_repair_at_boot() -> None:
    assert "natkeep-repair.service" in read("natkeep-gc.service")["Unit"]["Before"].split()


def test_what_an_agent_has_prepared_outlives_it() -> None:
    """Its journals and the processes that hold segments; and it starts only where it is bounded."""
    unit = read("natkeep-agent.service")

    assert unit["Service"]["KillMode"] == "process"
    assert unit["Service"]["RuntimeDirectory"] == "natkeep"
    assert unit["Service"]["RuntimeDirectoryPreserve"] == "yes"
    assert unit["Unit"]["ConditionPathExists"] == policy.PATH
