"""the tests of `--guard` in the lab: the ruleset is flushed, and the connections outlive it."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from natkeep.lab.application import faults
from natkeep.lab.host import await_true
from natkeep.lab.lab import Lab
from natkeep.lab.scenario import perform
from natkeep.lab.translators import TranslatorError

pytestmark = [pytest.mark.root, pytest.mark.lab]

BOTH = ("gateway", "destination")


def freeze_and_prepare(lab: Lab, *, guard: bool) -> None:
    lab.begin(connections=3)
    lab.freeze()
    if guard:
        options = (*lab.frozen.options, "--guard")
        lab.frozen = dataclasses.replace(lab.frozen, options=options)
    lab.prepare()


def flush(lab: Lab, roles: Sequence[str]) -> None:
    """Whoever lives has sent something when this returns, and nothing of it was translated."""
    for role in roles:
        lab.topology[role].run("nft", "flush", "ruleset")
    lab.traffic.client.do({"push": 64})
    if lab.restored_ns:
        lab.traffic.process.do({"push": 64})


def repair(lab: Lab) -> None:
    with lab.report.must("natkeep repair"):
        lab.translator.call("repair", lab.order.id)


def flushed_while_open(roles: Sequence[str], lab: Lab, *, guard: bool = True) -> None:
    freeze_and_prepare(lab, guard=guard)
    lab.restore()
    lab.traffic.talk_on()
    flush(lab, roles)
    bad = faults(lab.traffic.client.fresh())
    lab.report.check("nobody is reset by a flush", not bad, str(bad))
    repair(lab)
    lab.traffic.talk_on()
    lab.finish()


def flushed_while_frozen(lab: Lab) -> None:
    freeze_and_prepare(lab, guard=True)
    flush(lab, BOTH)
    repair(lab)
    lab.restore()
    lab.traffic.talk_on()
    lab.finish()


def guardian_is_killed(lab: Lab) -> None:
    freeze_and_prepare(lab, guard=True)
    lab.restore()
    for file in (lab.directory / "natkeep-state").glob("*.guard-*"):
        os.kill(int(file.read_text()), signal.SIGKILL)
        await_true(partial(is_unlocked, file), "the guardian to end")
    with pytest.raises(TranslatorError, match="exited 6"):
        lab.translator.call("status", lab.order.id, "--strict")
    repair(lab)
    flush(lab, BOTH)
    repair(lab)
    lab.traffic.talk_on()
    lab.finish()


def is_unlocked(file: Path) -> bool:
    with file.open() as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def tell(story: Callable[[Lab], None], family: int, mode: str = "stateful") -> list[str]:
    """What did not hold."""
    with Lab("guard", engine="repair", family=family, mode=mode) as lab:
        perform(lab, story)
        assert len(lab.report.assertions) > 3
        assert not list(lab.directory.glob("natkeep-state/*guard*"))
        return [str(each) for each in lab.report.assertions if not each.ok]


@pytest.mark.parametrize(
    ("roles", "family", "mode"),
    [
        (("destination",), 4, "stateful"),
        (("destination",), 6, "stateless"),
        (("gateway",), 6, "stateful"),
        (("gateway",), 4, "stateless"),
        (BOTH, 4, "stateful"),
    ],
)
def test_connections_outlive_a_flush_until_repair(roles, family, mode):
    assert tell(partial(flushed_while_open, roles), family, mode) == []


@pytest.mark.parametrize("mode", ["stateful", "stateless"])
def test_flush_while_the_process_is_frozen_is_outlived_too(mode):
    assert tell(flushed_while_frozen, 4, mode) == []


def test_guardian_that_was_killed_is_named_and_repaired():
    assert tell(guardian_is_killed, 4) == []


@pytest.mark.parametrize("role", BOTH)
def test_without_a_guard_a_flush_resets_them(role):
    """So the stories above can fail."""
    failed = tell(partial(flushed_while_open, (role,), guard=False), 4)

    assert any("no reset on any wire" in each for each in failed)
