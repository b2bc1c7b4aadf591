"""the stories: what is done at a place before the verb that is struck, and that verb.

A story is told whole, once, to learn which points its verb reaches; then again for each fault.
Rule: between them the stories reach every point of natkeep.faultpoints (tests/test_faults.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from place import CORPUS, NEW, OLD

MAPS = tuple(f"--map={OLD[v]}={NEW[v]}" for v in (4, 6))
MAP = MAPS[:1]
PAIR = ("--site=gateway={gateway}", "--site=destination={destination}")
SOURCE = ("--site=source={source}",)
PEERS = ("--site=peer={peer}",)
LIST = ("--connections={list}",)
IMAGE = (f"--image={CORPUS}",)
BESIDE = ("--connections={other}",)

Words = tuple[str, ...]


@dataclass(frozen=True)
class Story:
    """Verbs before, the verb that is struck, and what undoes it all.

    Before may also be `fault=POINT:KIND` in front of a verb, and `at SITE COMMAND`, of another
    program.

    fault: one that strikes always, so that the points on the way back are reached.
    ids: of the moves that are torn down at the end, in this order.
    last: a verb that clears what no teardown can, at the very end.
    lock: of CRIU, at the source: `nftables` or `iptables`.
    """

    name: str
    before: tuple[Words, ...]
    verb: Words
    ids: tuple[str, ...] = ("web",)
    sites: tuple[str, ...] = ("gateway", "destination")
    count: int = 3
    version: int = 4
    fault: str = ""
    last: Words = ()
    lock: str = ""

    @property
    def undoes(self) -> bool:
        """Whether the verb only takes away, so that it may succeed in spite of a fault."""
        return self.verb[0] in ("teardown", "gc") or "teardown" in self.verb

    @property
    def is_whole(self) -> bool:
        """Whether a verb that fails changes nothing; repair leaves what it has put back.

        So does open what it added, behind the closed gate, for connections that came.
        """
        return self.verb[0] != "repair" and self.verb != COMPARE


def _prepare(*options: str, move_id: str = "web") -> Words:
    return ("prepare", move_id, *options)


STATEFUL = _prepare(*MAP, *PAIR, *LIST)
STATELESS = _prepare("--mode=stateless", *MAPS[1:], *PAIR, *LIST)
UDP = _prepare(*MAP, *PAIR, "--connections={udp}")
RECEIVING = _prepare("--listeners", *MAPS, *PAIR, *IMAGE)
RECEIVING_STATELESS = (*RECEIVING, "--mode=stateless")
TEARDOWN = ("teardown", "web", "--yes")
ALONE = _prepare(*MAP, PAIR[1], *LIST)
OTHER = _prepare(*MAP, *PAIR, *BESIDE, move_id="other")
QUIESCE = ("quiesce", "web", *MAP, *SOURCE)
LEAVE = _prepare(*MAPS, *SOURCE, "--image={image}")
RELAY = _prepare(*MAP, "--site=relay={source}", "--image={image}")
LISTED_RELAY = _prepare(*MAP, "--site=relay={source}", *LIST)
ROUTED = ("at", "source", "echo 0 >/proc/sys/net/ipv4/conf/eth0/forwarding")
TELLING = _prepare("--unkept=reset", *MAP, *PAIR, f"--image={CORPUS.parent / 'tcp-close'}")
LIVING = _prepare(*MAPS, *PAIR, "--connections={live}")
COMPARE = ("open", "web", f"--image={CORPUS}")
REPAIR = ("repair", "web")
GC = ("gc", *PAIR)
CRASHED = (("fault=begun-FillSet:kill", *_prepare(*MAP, PAIR[0], *LIST)),)
GUARDED = (*STATEFUL, "--guard")
UNGUARDED = (
    "at", "state",
    # Its first word, its pid, is not out yet when prepare ends.
    "for each in web.guard-*; do until test -s $each; do sleep 0.01; done; "
    "kill -9 $(cat $each); flock $each true; done",
)  # fmt: skip
DELETED = tuple(
    ("at", site, "nft delete table inet natkeep") for site in ("gateway", "destination")
)
WIPED = (
    *DELETED,
    ("at", "destination", "ip rule delete to 10.2.0.10"),
    ("at", "destination", "ip address delete 10.2.0.10/32 dev lo; ip link set lo down"),
    ("at", "destination", "conntrack -D -p tcp -s 10.1.0.2 --dport 5000"),
)
THERE = _prepare(*MAP, *PEERS, *LIST)
WIPED_THERE = (
    ("at", "peer", "nft delete table inet natkeep"),
    ("at", "peer", "ip route delete 10.2.0.10 dev lo"),
)
NEXT = _prepare(*MAP, *PAIR, *LIST, "--replace=web", move_id="next")

MANY = tuple(("many", "m0", verb, "{gateway}", "{list}") for verb in ("prepare", "teardown"))

STORIES = (
    Story("prepare stateful", (), STATEFUL),
    Story("prepare stateless, IPv6", (), STATELESS, version=6),
    Story("prepare 1,000", (), (*STATEFUL, "--gate=open"), count=1000),
    Story("prepare with listeners", (), (*RECEIVING, "--gate=open")),
    Story("prepare stateless with listeners", (), RECEIVING_STATELESS),
    Story("prepare, undone", (), (*RECEIVING, "--gate=open"), fault="done-OpenGate:error"),
    Story(
        "prepare stateless, undone",
        (),
        (*STATELESS, "--gate=open"),
        version=6,
        fault="applied-OpenGate:errno",
    ),
    Story("open stateful", (STATEFUL,), ("open", "web")),
    Story("open stateless", (STATELESS,), ("open", "web"), version=6),
    Story("open with listeners", (RECEIVING,), ("open", "web")),
    Story("teardown stateful", (STATEFUL, ("open", "web")), TEARDOWN),
    Story("teardown stateless", (STATELESS, ("open", "web")), TEARDOWN, version=6),
    Story("teardown with listeners", (RECEIVING, ("open", "web")), TEARDOWN),
    Story("teardown 1,000", (STATEFUL,), TEARDOWN, count=1000),
    Story("teardown of a destination alone", (ALONE,), TEARDOWN, last=GC),
    Story("teardown beside another", (STATEFUL, OTHER), TEARDOWN, ids=("web", "other")),
    Story("prepare beside another", (OTHER,), STATEFUL, ids=("other", "web")),
    Story("prepare many", (), MANY[0], ids=("m0", "m1", "m2"), sites=("gateway",)),
    Story("teardown many", MANY[:1], MANY[1], ids=("m0", "m1", "m2"), sites=("gateway",)),
    Story("quiesce", (), QUIESCE, sites=("source",)),
    Story("teardown of a quiesce", (QUIESCE,), TEARDOWN, sites=("source",)),
    Story("source", (), LEAVE, sites=("source",), lock="nftables"),
    Story(
        "source, undone",
        (),
        LEAVE,
        sites=("source",),
        lock="nftables",
        fault="applied-TakeOverLock:error",
    ),
    Story("relay", (), RELAY, sites=("source",), lock="nftables"),
    Story(
        "relay, undone",
        (),
        RELAY,
        sites=("source",),
        lock="nftables",
        fault="applied-TakeOverLock:error",
    ),
    Story("teardown of a relay", (LISTED_RELAY,), TEARDOWN, sites=("source",)),
    Story(
        "repair of a relay",
        (LISTED_RELAY, ("at", "source", "nft delete table inet natkeep"), ROUTED),
        REPAIR,
        sites=("source",),
    ),
    Story("source, iptables", (), LEAVE, sites=("source",), lock="iptables"),
    Story("prepare, telling", (), (*TELLING, "--gate=open")),
    Story("open, telling", (TELLING,), ("open", "web")),
    Story("teardown, telling", (TELLING, ("open", "web")), TEARDOWN),
    Story("prepare of a living process", (), LIVING),
    Story("open, compared", (LIVING,), COMPARE),
    Story("open, compared, stateless", ((*LIVING, "--mode=stateless"),), COMPARE),
    Story("teardown, compared", (LIVING, COMPARE), TEARDOWN),
    Story("source after quiesce", (QUIESCE,), LEAVE, sites=("source",), lock="nftables"),
    Story(
        "source after quiesce, undone",
        (QUIESCE,),
        LEAVE,
        sites=("source",),
        lock="nftables",
        fault="begun-TakeOverLock:errno",
    ),
    Story("prepare guarded", (), GUARDED),
    Story("teardown guarded", (GUARDED,), TEARDOWN),
    Story("repair", (STATEFUL, ("open", "web"), *WIPED), REPAIR),
    Story("repair, closed", (STATEFUL, *WIPED), REPAIR),
    Story("repair stateless", (STATELESS, ("open", "web"), *DELETED), REPAIR, version=6),
    Story("repair with listeners", (RECEIVING, ("open", "web"), *WIPED), REPAIR),
    Story("prepare of UDP", (), (*UDP, "--gate=open")),
    Story("teardown of UDP", (UDP, ("open", "web")), TEARDOWN),
    Story("repair of UDP", (UDP, ("open", "web"), *DELETED), REPAIR),
    Story("repair, telling", (TELLING, ("open", "web"), *DELETED), REPAIR),
    Story("prepare at the peers' own host", (), (*THERE, "--gate=open"), sites=("peer",)),
    Story("teardown there", (THERE, ("open", "web")), TEARDOWN, sites=("peer",)),
    Story("repair there", (THERE, ("open", "web"), *WIPED_THERE), REPAIR, sites=("peer",)),
    Story("repair guarded", (GUARDED, ("open", "web"), UNGUARDED, *DELETED), REPAIR),
    Story(
        "repair of a quiesce",
        (QUIESCE, ("at", "source", "nft delete table inet natkeep")),
        REPAIR,
        sites=("source",),
    ),
    Story("gc after a crash", (("fault=applied-PurgeEntries:kill", *STATEFUL),), GC),
    Story("gc without a journal", (*CRASHED, ("at", "state", "rm web.*")), GC, last=GC),
    Story("replace", (STATEFUL,), NEXT, ids=("next", "web")),
    Story("replace, the earlier first", (STATEFUL,), NEXT, ids=("web", "next")),
    Story(
        "replace, undone", (STATEFUL,), NEXT, ids=("web", "next"), fault="done-InsertEntries:errno"
    ),
)


# ---- what is killed at random --------------------------------------------------------------------


def _kills() -> tuple[Story, ...]:
    """prepare, open, teardown and repair, in both modes, of 1 and of 1,000 connections."""
    found = []
    for count in (1, 1000):
        for mode, prepare, version in (("stateful", STATEFUL, 4), ("stateless", STATELESS, 6)):
            for before, verb in (
                ((), (*prepare, "--gate=open")),
                ((prepare,), ("open", "web")),
                ((prepare, ("open", "web")), TEARDOWN),
                ((prepare, ("open", "web"), *DELETED), REPAIR),
            ):
                name = f"{verb[0]} {mode} {count}"
                found.append(Story(name, before, verb, count=count, version=version))
    return tuple(found)


KILLS = _kills()
