"""CRIU's lock on the source goes, natkeep's gate keeps it quiet, and another dump's lock stays.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD): gate instead of lock
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │══════════════════│OLD⇄NEW│══════════════════│NEW⇄OLD│══════════════════│ server │
    └──────┘  3 connections   └───────┘    anti-spoof    └───────┘                  └────────┘
                                                         destination 10.3.0.20 (NEW)

At first nothing redirects the peers, so that their retransmissions reach the source, which
has OLD and no socket: only the gate keeps it from answering with resets. It stands until OLD has
left the host.
"""

import time

from natkeep.lab.capture import RST
from natkeep.lab.criu_restore import Machine
from natkeep.lab.host import await_true

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


def run(lab):
    check = lab.report.check
    lab.begin(connections=3)
    source = Machine(lab, "source")
    source.host.nft(OTHER_DUMP)
    before = source.ruleset()
    lab.freeze()
    locked = source.ruleset()
    check("the dump leaves CRIU's lock", "tcp dport @conns4" in locked and locked != before)

    source.prepare("web", *lab.frozen.options)
    taken = source.ruleset()
    check("of CRIU's locks only the other dump's is left", taken.count("table inet CRIU") == 1)
    check("the other dump's lock is as it was", before.strip() in taken)
    since = time.time_ns()
    lab.traffic.client.do({"push": 64})  # with nothing to send a peer would only wait
    await_true(lambda: asked(lab, since) >= set(lab.traffic.kept), "requests", seconds=20)
    until = time.time_ns()

    lab.prepare()
    lab.restore()
    lab.traffic.talk_on()
    source.refuses("still has OLD 10.2.0.10: it would answer 3 peers", "teardown", "web")
    source.host.run("ip", "address", "delete", "10.2.0.10/24", "dev", "eth0")
    source.natkeep("teardown", "web")
    check("natkeep leaves nothing at the source", source.ruleset() == before)
    lab.finish()
    check_silence(lab, since, until)


def segments(lab, since_ns, until_ns):
    """What passed at the source in that time."""
    frames = lab.captures["source"].frames()
    return [f.segment for f in frames if f.segment and since_ns <= f.at_ns <= until_ns]


def asked(lab, since_ns):
    """The four-tuples whose peers have sent something to the source since then."""
    return {segment.tuple for segment in segments(lab, since_ns, time.time_ns())}


def check_silence(lab, since_ns, until_ns):
    """In that time peers asked again at the source, and nothing answered there."""
    seen = segments(lab, since_ns, until_ns)
    requests = [s for s in seen if s.tuple in lab.traffic.kept]
    answers = [s for s in seen if s.tuple.reply() in lab.traffic.kept]
    resets = sum(1 for s in answers if s.flags & RST)
    told = f"{len(requests)} segments from peers, {len(answers)} answered, {resets} with RST"
    lab.report.check("the source stays quiet", requests and not answers, told)
