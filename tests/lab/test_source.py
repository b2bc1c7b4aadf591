"""the source in the lab, with CRIU itself: the proof that the wrong order resets, and the hook."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from natkeep.lab.capture import RST
from natkeep.lab.criu_restore import Machine
from natkeep.lab.engine import EngineError, Frozen
from natkeep.lab.lab import Lab
from natkeep.lab.relay import FLAT, ByRelay
from natkeep.lab.scenario import find_scenario, run
from natkeep.state.directory import StateDirectory

pytestmark = [pytest.mark.root, pytest.mark.criu, pytest.mark.lab]

POINTS = {"source": ("source", "eth0")}


@pytest.fixture(params=[4, 6])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A client talks to a server on two connections; the source's own interface is watched."""
    with Lab("source", engine="criu", family=request.param, points=POINTS) as made:
        made.begin(connections=2)
        yield made


def drop_criu_lock(lab: Lab) -> None:
    source = lab.topology["source"]
    for line in source.run("nft", "list", "tables").stdout.splitlines():
        if "CRIU-" in line:
            source.run("nft", "delete", *line.split())


def ends(lab: Lab, within: float = 3) -> list[str]:
    """The states of the client's connections, once something has become of them or *within* s."""
    lab.traffic.client.do({"push": 64})  # whose request was acknowledged would only wait
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        states = [each["state"] for each in lab.traffic.client.fresh()["connections"]]
        if states != ["open", "open"]:
            break
    return [each["state"] for each in lab.traffic.client.fresh()["connections"]]


def count_resets(lab: Lab) -> int:
    lab.captures.stop()
    frames = lab.captures["source"].frames()
    return sum(1 for f in frames if f.segment is not None and f.segment.flags & RST)


def test_without_the_gate_the_source_answers_with_a_reset(lab: Lab) -> None:
    """The wrong order: CRIU's lock goes first. So the scenario's assertions can fail."""
    lab.freeze()
    drop_criu_lock(lab)

    assert "reset" in ends(lab, within=30)
    assert count_resets(lab) > 0


def test_with_the_gate_first_it_does_not(lab: Lab) -> None:
    source = Machine(lab, "source")
    lab.freeze()
    listing = lab.directory / "list"
    listing.write_text("".join(f"{line}\n" for line in lab.traffic.server.connections))
    source.prepare("web", "--connections", str(listing))
    drop_criu_lock(lab)  # natkeep cannot tell whose it is, from a list

    assert ends(lab) == ["open", "open"]
    assert count_resets(lab) == 0
    assert [str(each) for each in lab.report.assertions if not each.ok] == []


def test_the_gate_alone_withdrawn_resets(lab: Lab) -> None:
    """What teardown asks leave for is real."""
    source = Machine(lab, "source")
    lab.freeze()
    source.prepare("web", *lab.frozen.options)
    source.refuses("2 peers with a reset", "teardown", "web")
    source.natkeep("teardown", "web", "--yes")

    assert [str(each) for each in lab.report.assertions if not each.ok] == []
    assert "reset" in ends(lab, within=30)


def dump_with_hook(lab: Lab, machine: Machine, *options: str, **environment: str) -> Path:
    images = Path(lab.directory) / "images"
    images.mkdir()
    hook = machine.hook("web").hook
    lab.engine.run(
        machine.host, images, "dump", "--tree", str(lab.traffic.server.pid), *options,
        "--action-script", str(hook),
        env={**os.environ, **machine.cli.environment, **environment},
    )  # fmt: skip
    return images


@pytest.mark.parametrize("method", ["nftables", "iptables"])
def test_the_hook_takes_the_lock_over_at_post_dump(lab: Lab, method: str) -> None:
    source = Machine(lab, "source")
    images = dump_with_hook(
        lab, source, "--network-lock", method, NATKEEP_SOURCE=str(lab.old), NATKEEP_ID="web"
    )

    state = StateDirectory(source.cli.environment["NATKEEP_STATE_DIR"], create=False)
    assert state.ids() == ("web",)
    shown = source.ruleset()
    assert "gate-web" in shown
    assert "CRIU" not in shown
    assert shown.count("0x0000c114") == 2  # in natkeep's own table
    assert "2 connections kept quiet here" in (images / "dump.log").read_text()
    assert ends(lab) == ["open", "open"]
    assert count_resets(lab) == 0
    source.refuses("2 peers with a reset", "teardown", "web")


def test_the_hook_finds_a_namespace_that_criu_is_not_in(lab: Lab) -> None:
    """As under a container engine: CRIU and its hook run beside the tree's network namespace."""
    source, images = Machine(lab, "source"), Path(lab.directory) / "images"
    images.mkdir()
    before = source.ruleset()
    criu = f"{lab.engine.binary} dump --images-dir {images} --tree {lab.traffic.server.pid}"
    options = f"--tcp-established --log-file dump.log --action-script {source.hook('web').hook}"
    host = ["nsenter", "--target", str(source.host.init_pid), "--pid", "--mount", "--"]
    environment = {**os.environ, **source.cli.environment, "NATKEEP_SOURCE": str(lab.old)}
    done = subprocess.run(
        [*host, *criu.split(), *options.split(), "--network-lock", "nftables"],
        env={**environment, "NATKEEP_ID": "web"}, capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 0, (images / "dump.log").read_text()[-2000:]
    assert "gate-web" in source.ruleset()
    assert "CRIU" not in source.ruleset()
    assert ends(lab) == ["open", "open"]
    assert count_resets(lab) == 0
    source.natkeep("teardown", "web", "--yes")  # in another process: found by identity
    assert source.ruleset() == before


def test_without_an_id_the_hook_names_the_move_after_criu(lab: Lab) -> None:
    source = Machine(lab, "source")
    dump_with_hook(lab, source, "--network-lock", "nftables", NATKEEP_SOURCE=f"{lab.old}={lab.new}")

    [move_id] = StateDirectory(source.cli.environment["NATKEEP_STATE_DIR"], create=False).ids()
    assert move_id.startswith("criu-")


@pytest.mark.parametrize("orders", ["not an address", "10.99.0.1=auto", "10.2.0.10=127.0.0.1"])
def test_wrong_orders_end_the_dump_and_the_process_goes_on(lab: Lab, orders: str) -> None:
    source = Machine(lab, "source")
    before = source.ruleset()

    with pytest.raises(EngineError):
        dump_with_hook(lab, source, "--network-lock", "nftables", NATKEEP_SOURCE=orders)

    assert "natkeep-hook: " in (Path(lab.directory) / "images/dump.log").read_text()
    assert source.ruleset() == before
    lab.traffic.talk_on()
    assert [str(each) for each in lab.report.assertions if not each.ok] == []


def test_a_process_that_is_to_stay_is_refused(lab: Lab) -> None:
    source = Machine(lab, "source")
    before = source.ruleset()

    with pytest.raises(EngineError):
        dump_with_hook(
            lab, source, "--network-lock", "nftables", "--leave-running",
            NATKEEP_SOURCE=str(lab.old),
        )  # fmt: skip

    assert "--leave-running" in (Path(lab.directory) / "images/dump.log").read_text()
    assert source.ruleset() == before


def test_an_id_that_is_prepared_by_command_is_refused_while_the_process_lives(lab: Lab) -> None:
    """Dumped with --leave-running, and then prepared by command (T7)."""
    source = Machine(lab, "source")
    images = Path(lab.directory) / "images"
    images.mkdir()
    lab.engine.run(
        source.host, images, "dump", "--tree", str(lab.traffic.server.pid), "--leave-running"
    )

    source.refuses("2 of the connections still have their sockets", *_prepare(source, images))

    lab.traffic.talk_on()
    assert [str(each) for each in lab.report.assertions if not each.ok] == []


def _prepare(source: Machine, images: Path) -> tuple[str, ...]:
    return ("prepare", "web", *source.map(), "--site", source.site, "--image", str(images))


def test_a_whole_move_with_the_source_comes_home_at_post_restore(lab: Lab) -> None:
    """One id for three sites: the way home is a teardown when the sockets are there again."""
    source = Machine(lab, "source")
    lab.freeze()
    sites = [f"{r}={lab.topology[r].name}" for r in ("gateway", "destination")]
    options = [word for site in (*sites, source.site) for word in ("--site", site)]
    source.natkeep("prepare", "web", *source.map(), *options, *lab.frozen.options)
    script = lab.directory / "home"
    command = f"{source.hook('web').hook.with_name('natkeep')} teardown web"
    script.write_text(f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ] || {command}\n')
    script.chmod(0o755)

    with pytest.raises(EngineError):  # it would open gateway and destination
        lab.engine.restore(source.host, lab.traffic.server, lab.frozen, source.hook("web"))
    opening = source.hook("web")
    lab.restore_at_source(type(opening)(opening.open, script, opening.environment))

    lab.traffic.talk_on()
    assert "natkeep" not in source.ruleset()
    assert count_resets(lab) == 0
    assert [str(each) for each in lab.report.assertions if not each.ok] == []


@pytest.mark.parametrize("name", ["rollback_to_source", "quiesce_then_dump"])
def test_the_stories_are_told_over_ipv6_as_well(name: str) -> None:
    report = run(find_scenario(name), engine="criu", family=6)

    assert [str(each) for each in report.assertions if not each.ok] == []


# ---- UDP, which CRIU does not lock --------------------------------------------------------------


@pytest.fixture(params=[4, 6])
def udp_lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A client's two sockets: the server has one that is connected to the first, and its own."""
    family = request.param
    with Lab("source", engine="criu", family=family, points=POINTS, udp=True) as made:
        made.begin(connections=2)
        made.traffic.connect(0)
        yield made


def unreachable(lab: Lab) -> list[str]:
    """What the source answers to what peers say now: ICMP errors."""
    for _ in range(3):
        lab.traffic.client.do({"push": 64})
        time.sleep(0.1)
    lab.captures.stop()
    frames = lab.captures["source"].frames()
    return [frame.summary for frame in frames if "unreach" in frame.summary.lower()]


def test_at_post_dump_the_gate_stands_before_the_sockets_are_gone(udp_lab: Lab) -> None:
    source = Machine(udp_lab, "source")

    images = dump_with_hook(
        udp_lab, source, "--network-lock", "nftables", NATKEEP_SOURCE=str(udp_lab.old),
        NATKEEP_ID="web",
    )  # fmt: skip

    assert unreachable(udp_lab) == []
    assert [each["state"] for each in udp_lab.traffic.client.fresh()["connections"]] == ["open"] * 2
    assert "2 connections kept quiet here" in (images / "dump.log").read_text()


def test_without_the_hook_peers_are_told_that_a_port_is_unreachable(udp_lab: Lab) -> None:
    """The wrong order. So the assertions above can fail."""
    images = Path(udp_lab.directory) / "images"
    images.mkdir()
    source = udp_lab.topology["source"]

    udp_lab.engine.run(source, images, "dump", "--tree", str(udp_lab.traffic.server.pid))

    assert unreachable(udp_lab) != []


@pytest.mark.parametrize("family", [4, 6])
def test_a_relay_stands_before_the_sockets_are_gone_and_passes_on(family: int) -> None:
    with Lab("source", engine="criu", family=family, points=POINTS, udp=True, **FLAT) as lab:
        by = ByRelay(lab)
        by.begin(connections=2)
        lab.traffic.connect()
        source, destination = Machine(lab, "source"), Machine(lab, "destination")

        images = dump_with_hook(
            lab, source, "--network-lock", "nftables", NATKEEP_SOURCE=f"{lab.old}={lab.new}",
            NATKEEP_VIA=str(by.source), NATKEEP_ID="web",
        )  # fmt: skip
        lab.traffic.client.do({"push": 64})
        options = ("--image", str(images), "--via", str(by.source))
        destination.prepare("web", *options)
        source.natkeep("open", "web")
        lab.engine.restore(
            destination.host, lab.traffic.server, Frozen(images, options), destination.hook("web")
        )

        assert unreachable(lab) == []
        lab.traffic.talk()
        lab.traffic.talk_on()
        assert [str(each) for each in lab.report.assertions if not each.ok] == []
