"""CRIU's lock on the source goes, natkeep's gate keeps it quiet, and nobody else's lock is touched.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD): gate instead of lock
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │══════════════════│OLD⇄NEW│══════════════════│NEW⇄OLD│══════════════════│ server │
    └──────┘  3 connections   └───────┘    anti-spoof    └───────┘                  └────────┘
                                                         destination 10.3.0.20 (NEW)

At first nobody redirects the peers, so that their retransmissions reach the source, which
has OLD and no socket: only the gate keeps it from answering with resets. It stands until OLD has
left the host.
"""

import time

from natkeep.lab.home import Machine, await_asking, expect, stays_quiet

SETUP = {"engine": "criu", "points": {"source": ("source", "eth0")}}

OTHER_DUMP = """
table inet CRIU-0a0b0c0d-1871-423c-ab {
    set conns4 {
        type ipv4_addr . inet_service . ipv4_addr . inet_service
        elements = { 10.2.0.10 . 7000 . 10.1.0.9 . 40000, 10.1.0.9 . 40000 . 10.2.0.10 . 7000 }
    }
    chain input {
        type filter hook input priority filter; policy accept;
        ip saddr . tcp sport . ip daddr . tcp dport @conns4 drop
    }
}
"""


def tell(lab):
    lab.serve()
    lab.dial(connections=3)
    lab.talk()
    source = Machine(lab, "source")
    source.host.nft(OTHER_DUMP)
    before = source.ruleset()
    lab.freeze()
    locked = source.ruleset()
    expect(lab, "the dump leaves CRIU's lock", "tcp dport @conns4" in locked and locked != before)

    source.prepare("web", *lab.frozen.options)
    taken = source.ruleset()
    expect(
        lab, "of CRIU's locks only the other dump's is left", taken.count("table inet CRIU") == 1
    )
    expect(lab, "the other dump's lock is as it was", before.strip() in taken)
    since = time.time_ns()
    await_asking(lab, "source", since)  # a retransmission of each, which nobody answers
    until = time.time_ns()

    lab.prepare()
    lab.restore()
    lab.talk_on()
    source.refuses("still has OLD 10.2.0.10: it would answer 3 peers", "teardown", "web")
    source.host.run("ip", "address", "delete", "10.2.0.10/24", "dev", "eth0")
    source.natkeep("teardown", "web")
    expect(lab, "natkeep leaves nothing at the source", source.ruleset() == before)
    lab.finish()
    stays_quiet(lab, "source", since, until)
