"""Two ports of one address go to two hosts, each to another port there.

    client 10.1.0.2            gateway                       destination 10.3.0.20
    ┌──────┐  10.2.0.10:5000  ┌────────────┐  10.3.0.20:8080  ┌─────────┐  10.2.0.10:5000  ┌─────┐
    │ peer │══════════════════│:5000 ⇄ 8080│══════════════════│NEW ⇄ OLD│══════════════════│ web │
    │      │  10.2.0.10:5001  │            │  10.4.0.30:8443  ├─────────┤  10.2.0.10:5001  ├─────┤
    │      │══════════════════│:5001 ⇄ 8443│══════════════════│NEW ⇄ OLD│══════════════════│ api │
    └──────┘                  └────────────┘                  └─────────┘                  └─────┘
                                                              third 10.4.0.30

As a host of containers that publish ports. Two processes of the source, 10.2.0.10 (OLD), move by
two moves, through one gateway. The port that the wire shows has to be free at NEW; the sockets keep
theirs. Entries that are flushed change nothing, nor that conntrack picks none up; where the rules
are flushed in a pause, they are repaired.
"""

import json
import sys
import time

from natkeep.lab.host import await_true
from natkeep.lab.topology import SOURCE, THIRD, USUAL

SETUP = {"seats": (*USUAL, THIRD)}
CONNECTIONS = 20
LISTEN = """
import signal, socket, sys
with socket.create_server((sys.argv[1], 8080)):
    print("listens", flush=True)
    signal.pause()
"""


def run(lab):
    lab.wire_port = 8080
    lab.begin(connections=CONNECTIONS)
    api = lab.beside(SOURCE, "api")
    api.port, api.wire_port, api.site = 5001, 8443, THIRD
    api.begin(connections=CONNECTIONS)
    both = (lab, api)
    for each in both:
        each.freeze()
    refuse_taken(lab)
    for each in both:
        each.prepare()
    for each in both:
        each.restore()
    talk_on(both)
    check_status(lab)
    lab.conditions.conntrack_loose(0)
    for role in ("gateway", "destination", "third"):
        lab.conditions.flush_conntrack(role)
        talk_on(both)
    lab.conditions.conntrack_loose(1)
    repair(lab, both)
    lab.traffic.server_closes()
    lab.traffic.client_closes()
    api.traffic.client_closes()
    api.traffic.server_closes()
    for each in both:
        each.traffic.check_ends()
    lab.conclude()


def talk_on(both):
    for each in both:
        each.traffic.talk_on()


def refuse_taken(lab):
    """Another program listens at the port that the wire would show."""
    program = lab.topology["destination"].start("taken", sys.executable, "-c", LISTEN, str(lab.new))
    await_true(lambda: program.log.read_text(), "the other program to listen")
    lab.must_refuse(f"{lab.new}", "8080 already")
    lab.topology["destination"].kill(program.pid)


def repair(lab, both):
    """Another program flushes the gateway's rules in a pause."""
    for each in both:
        each.traffic.quiet()
    time.sleep(1)  # until nothing is said again: what comes while there are no rules is reset
    lab.topology["gateway"].run("nft", "flush", "ruleset")
    for each in both:
        with lab.report.must(f"repair of {each.order.id}"):
            lab.translator.call("repair", each.order.id)
    for each in both:
        each.traffic.client_says()
        each.traffic.server_says()
    check_status(lab)


def check_status(lab):
    """Both moves of one OLD stand at the gateway, and nothing of either is missing."""
    with lab.report.must("status finds no drift"):
        document = json.loads(lab.translator.call("status", "--strict", "--json"))
    ports = {
        (one["old"], one["old_port"], one["new"], one["new_port"])
        for move in document["moves"]
        for one in move["maps"]
    }
    old, web, api = (str(end) for end in (lab.old, lab.new, THIRD.address(lab.family)))
    wanted = {(old, 5000, web, 8080), (old, 5001, api, 8443)}
    lab.report.check("status has the ports of both moves", ports == wanted, str(ports))
