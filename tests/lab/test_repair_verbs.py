"""the verb repair, in the practice network: others break what is there, and the transfer completes.

Judged as every story is: each octet's number at both ends, no reset and no frame with OLD on any
wire (but repair's own question to the link, whether another host has OLD by now), and sites that
are byte-identical after teardown. (The engine *repair*, TCP_REPAIR, is another thing: it restores
the sockets here because it is quicker.)

What is broken while segments go both ways, and what only in a pause, is the kernel's doing. Without
our table a gateway shows the peer a segment from NEW, and a destination gets one for NEW: each is
answered with a reset at once, long before anybody can repair (docs/repair.md).
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from natkeep.lab.capture import Frame
from natkeep.lab.host import await_true
from natkeep.lab.lab import Frames, Lab
from natkeep.lab.translators import natkeep_command

pytestmark = [pytest.mark.lab, pytest.mark.root]

WHILE_THEY_TALK = {
    "conntrack -F": ("conntrack -F", ("gateway", "destination")),
    "our elements deleted": ("nft flush set inet natkeep kept-lab-0", ("gateway", "destination")),
    "the accept deleted": ("nft flush chain inet natkeep gate-lab", ("gateway", "destination")),
    "our rule deleted": ("nft flush chain inet natkeep in-at-BEFORE", ("gateway", "destination")),
    "our dispatch deleted": (
        "nft delete element inet natkeep inV '{ LOCAL }'",
        ("gateway", "destination"),
    ),
    "OLD removed from lo": ("ip address delete OLD dev lo", ("destination",)),
    "lo down and up": ("ip link set lo down; ip link set lo up", ("destination",)),
    "ARP speaks of OLD": ("nft delete table arp natkeep", ("destination",)),
    "a link down and up": (
        "dev=$(ip -o link show up | sed -n 's/^[0-9]*: \\(eth0\\|far\\)@.*/\\1/p'); "
        "ip link set $dev down; ip link set $dev up",
        ("gateway", "destination"),
    ),
    "routes wiped": (
        "ip -4 route flush table main; ip -6 route flush table main",
        ("gateway", "destination"),
    ),
}
NOT_OURS = ("a link down and up", "routes wiped")
SAFE_WITHOUT_ENTRIES = ("conntrack -F", "OLD removed from lo", "the accept deleted", "routes wiped")
IN_A_PAUSE = {
    "nft flush ruleset": ("nft flush ruleset", ("gateway", "destination")),
    "our table deleted": ("nft delete table inet natkeep", ("gateway", "destination")),
    "conntrack -F": ("conntrack -F", ("gateway", "destination")),
}


def natkeep(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NATKEEP_STATE_DIR": str(lab.directory / "natkeep-state")}
    return subprocess.run(
        [*natkeep_command(), *arguments], capture_output=True, text=True, env=environment
    )


def sees_the_end(lab: Lab) -> bool:
    """Whether the looks of repair, this one included, are certain of it at each site."""
    assert natkeep(lab, "repair", "lab").returncode == 0
    seen = json.loads((lab.directory / "natkeep-state" / "lab.seen").read_text())
    return [bits for _, bits in seen["ended"]] == ["1", "1"]


def break_it(lab: Lab, role: str, script: str) -> None:
    local = lab.old if role == "gateway" else lab.new
    for word, meaning in (
        ("BEFORE", str(local).replace(":", "_")), ("LOCAL", str(local)), ("V", str(lab.family)),
        ("OLD", f"{lab.old}/{lab.old.max_prefixlen}"),
    ):  # fmt: skip
        script = script.replace(word, meaning)
    lab.topology[role].run("sh", "-ec", script)


def await_silence(lab: Lab) -> None:
    """Until every octet is acknowledged, too: an acknowledgement may wait for 40 ms and more."""

    listing = ("ss", "-Htn", "state", "established")

    def is_silent() -> bool:
        rows = [
            line.split()
            for role in ("client", "destination")
            for line in lab.topology[role].run(*listing).stdout.splitlines()
        ]
        return bool(rows) and all(row[1] == "0" for row in rows)

    await_true(is_silent, "the last acknowledgement", seconds=10)


def repair_it(lab: Lab, role: str, *, named: bool) -> None:
    """named: nobody but repair can have put it back meanwhile, so that status must tell."""
    told = natkeep(lab, "status", "lab", "--strict", "--json")
    drift = {
        site["role"]: site["drift"]
        for move in json.loads(told.stdout)["moves"]
        for site in move["sites"]
    }
    done = natkeep(lab, "repair", "lab")
    after = natkeep(lab, "status", "lab", "--strict")

    assert done.returncode == 0, done.stderr
    assert after.returncode == 0, after.stdout
    if named:
        assert told.returncode == 6
        assert [other for other, lines in drift.items() if lines] == [role]


def without_questions(lab: Lab, frames: Frames) -> Frames:
    """The frames but repair's question on the destination's link, whether another host has OLD."""

    def is_question(frame: Frame) -> bool:
        if "ARP who has" in frame.summary:
            return frame.summary.endswith(f"ARP who has {lab.old} says {lab.new}")
        # Neighbour discovery asks from the link's own address, and to a multicast one.
        others = [each for each in frame.addresses - {lab.old} if not each.is_multicast]
        return "ICMPv6ND_NS" in frame.summary and [each.is_link_local for each in others] == [True]

    link = ("destination", "far")
    assert any(is_question(frame) for frame in frames["destination"])
    return {
        point: [each for each in seen if point not in link or not is_question(each)]
        for point, seen in frames.items()
    }


def cells(table: dict[str, tuple[str, tuple[str, ...]]]) -> list[tuple[str, str]]:
    return [(name, role) for name, (_, roles) in table.items() for role in roles]


@pytest.mark.parametrize(
    ("name", "role", "family", "mode"),
    [
        (name, role, family, mode)
        for number, (name, role) in enumerate(cells(WHILE_THEY_TALK))
        for family, mode in [(4, "stateful"), (6, "stateless" if number % 2 else "stateful")]
        # With its link down a gateway loses its own IPv6 addresses, which no other can give back.
        if (name, role, family) != ("a link down and up", "gateway", 6)
        # Stateless, each segment is looked up: the next one without its rule is already refused.
        and (mode == "stateful" or name in SAFE_WITHOUT_ENTRIES)
    ],
)
def test_a_transfer_goes_on_through_the_damage_and_its_repair(
    name: str, role: str, family: int, mode: str
) -> None:
    script, _ = WHILE_THEY_TALK[name]
    with Lab("repair verbs", engine="repair", family=family, mode=mode) as lab:
        lab.begin(connections=3)
        lab.move()
        lab.traffic.talk_on()
        if name == "OLD removed from lo":
            lab.select_frames = lambda frames: without_questions(lab, frames)

        break_it(lab, role, script)
        # The rules make entries anew by themselves, and lo's own addresses come by themselves.
        by_itself = ("conntrack -F", "lo down and up")
        if name == "a link down and up" and role == "gateway":
            by_itself += (name,)  # all its routes are its devices' own, which come back with them
        repair_it(lab, role, named=name not in by_itself)

        lab.traffic.talk_on()
        lab.finish()
    failed = [(each.name, each.detail) for each in lab.report.assertions if not each.ok]
    if name in NOT_OURS:
        # The damage goes further than the move: the routes of the other family stay wiped.
        failed = [
            each for each in failed if each[0] != f"teardown leaves the {role} byte-identical"
        ]
    assert failed == []


@pytest.mark.parametrize(("name", "role"), cells(IN_A_PAUSE))
@pytest.mark.parametrize("first", ["client", "server"])
def test_a_connection_in_a_pause_survives_the_worst(name: str, role: str, first: str) -> None:
    """Whoever speaks first afterwards; both are heard, and every octet arrives."""
    script, _ = IN_A_PAUSE[name]
    family = 4 if first == "client" else 6
    with Lab("repair verbs", engine="repair", family=family) as lab:
        lab.begin(connections=3)
        lab.move()
        lab.traffic.talk_on()
        lab.traffic.quiet()
        await_silence(lab)

        break_it(lab, role, script)
        repair_it(lab, role, named=True)

        (lab.traffic.client_says if first == "client" else lab.traffic.server_says)()
        (lab.traffic.server_says if first == "client" else lab.traffic.client_says)()
        lab.traffic.talk()
        lab.traffic.talk_on()
        lab.finish()
    assert lab.report.passed, [(a.name, a.detail) for a in lab.report.assertions if not a.ok]


def test_a_close_comes_through_after_the_entries_were_flushed_and_repaired() -> None:
    """With nothing but rules a FIN as the first segment would not (H4)."""
    with Lab("repair verbs", engine="repair") as lab:
        lab.begin()
        lab.move()
        lab.traffic.talk_on()
        lab.traffic.quiet()
        await_silence(lab)
        for role in ("gateway", "destination"):
            break_it(lab, role, "conntrack -F")
        assert natkeep(lab, "repair", "lab").returncode == 0

        lab.traffic.client_closes()
        lab.traffic.server_closes()
        lab.finish()
    assert lab.report.passed, [(a.name, a.detail) for a in lab.report.assertions if not a.ok]


def test_an_entry_that_is_deleted_comes_back_with_its_mark() -> None:
    """By the mark of the SYN the gateway lets answers pass; no rule can know it any more."""
    with Lab("repair verbs", engine="repair") as lab:
        gateway = lab.topology["gateway"]
        gateway.nft(
            "add table inet uplinks\n"
            "add chain inet uplinks c { type filter hook forward priority 0; }\n"
            'add rule inet uplinks c iifname "near" tcp flags syn / syn,ack ct mark set 2\n'
            'add rule inet uplinks c oifname "near" ct mark != 2 drop\n'
        )
        lab.begin()
        lab.move()
        lab.traffic.talk_on()
        lab.traffic.quiet()
        await_silence(lab)
        break_it(lab, "gateway", "conntrack -D -p tcp")
        assert natkeep(lab, "repair", "lab").returncode == 0
        lab.traffic.server_says()
        lab.traffic.client_says()
        lab.finish()
    assert lab.report.passed, [(a.name, a.detail) for a in lab.report.assertions if not a.ok]


def test_a_connection_that_has_ended_does_not_come_back_and_gc_clears_its_move() -> None:
    with Lab("repair verbs", engine="repair") as lab:
        lab.begin()
        lab.move()
        lab.traffic.talk_on()
        lab.traffic.quiet()
        lab.traffic.client_closes()
        lab.traffic.server_closes()
        await_true(lambda: sees_the_end(lab), "repair sees that the connection has ended")
        for role in ("gateway", "destination"):
            break_it(lab, role, "conntrack -F")

        done = natkeep(lab, "repair", "lab")
        left = [
            lab.topology[role].run("conntrack", "-L", "-p", "tcp").stdout
            for role in ("gateway", "destination")
        ]
        collected = natkeep(lab, "gc", "--site", f"gateway={lab.topology['gateway'].name}")

        lab.finish()  # which tears down once more, and finds every surface as it was
    assert done.returncode == 0
    assert "nothing to repair" in done.stderr
    assert left == ["", ""]
    assert "cleared move lab: its connections have all ended" in collected.stderr
    assert lab.report.passed, [(a.name, a.detail) for a in lab.report.assertions if not a.ok]
