"""The destination talks with the source's OLD all the time, as an operator's ssh and image copy do.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD)
    ┌──────┐  10.2.0.10:5000  ┌───────┐                  ┌────────┐
    │ peer │══════════════════│OLD⇄NEW│──────────────────│  sshd  │   10.2.0.10:6022 stays there
    └──────┘                  └───┬───┘                  └────────┘
                                  │ 10.3.0.20:5000       ┌────────┐
                                  └──────────────────────│ server │   destination 10.3.0.20 (NEW)
                                   10.2.0.10:6022 ◀──────│  ssh   │
                                                         └────────┘

OLD is an address of the destination from `prepare` on. Only what was moved is at home there: what
stands goes on, and new connections reach the source, before, during and after the move. The
destination is a router, too: what it passes on to OLD for others is not for its own sockets either.
"""

from natkeep.lab.application import start_client, start_server, tuple_of
from natkeep.lab.engine import SILENCE_TABLE
from natkeep.plan.tuples import Endpoint


def run(lab):
    for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        lab.topology["destination"].run("sysctl", "-qw", f"{key}=1")
    lab.begin()
    there = Endpoint(lab.old, 6022)
    start_server(lab.topology["source"], "sshd", there)
    talks = Talks(lab, there)
    for moment, change in (
        ("before the move", lambda: None),
        ("while the process is frozen", lambda: freeze(lab, there.port)),
        ("once the destination is prepared", lab.prepare),
        ("once the move is open", lab.restore),
    ):
        change()
        talks.go_on(moment)
    lab.traffic.talk_on()
    lab.finish()
    talks.go_on("after teardown")


def freeze(lab, port):
    """As CRIU, which locks what it dumps; the engine `repair` locks all TCP of its host."""
    lab.freeze()
    source = lab.topology["source"]
    if SILENCE_TABLE in source.run("nft", "list", "tables").stdout.split():
        for chain, end in (("into", "dport"), ("out", "sport")):
            rule = f"insert rule inet {SILENCE_TABLE} {chain} tcp {end} {port} accept\n"
            source.nft(rule)


class Talks:
    """Connections of the destination with OLD; what is judged besides is not theirs."""

    def __init__(self, lab, there):
        self.lab, self.there, self.clients = lab, there, []
        self.tuples = set()
        lab.select_frames = lambda frames: {
            at: [f for f in some if f.segment is None or f.segment.tuple not in self.tuples]
            for at, some in frames.items()
        }

    def go_on(self, moment):
        """A new one begins; all of them are answered 20 times more."""
        name = f"ssh-{len(self.clients)}"
        client = start_client(self.lab.topology["destination"], name, self.there)
        client.do({"talk": {"interval_ms": 10, "size": 64}})
        tuple_ = tuple_of(client.fresh()["connections"][0])
        self.tuples |= {tuple_, tuple_.reply()}
        self.clients.append(client)
        with self.lab.report.must(f"the destination talks with the source {moment}"):
            for each in self.clients:
                count = each.fresh()["connections"][0]["answered"]
                each.wait(lambda r, n=count: r["connections"][0]["answered"] >= n + 20, moment)
