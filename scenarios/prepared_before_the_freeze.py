"""A move is prepared while the server still runs; connections come and go meanwhile.

    clients 10.1.0.2            gateway            source 10.2.0.10 (OLD): alive at prepare
    ┌───────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ 2 + 1 │══════════════════│OLD⇄NEW│══════════════════│NEW⇄OLD│══════════════════│ server │
    │ went  │─ ─ ended before ─│       │    anti-spoof    └───────┘                  └────────┘
    └───────┘                  └───────┘                  destination 10.3.0.20 (NEW)

`natkeep inspect --live` reads the sockets of the running server, `natkeep prepare` gets what it
said. Then one connection ends, whose FIN has to pass as if nothing had been prepared, and another
one begins. After the dump natkeep-hook compares the image: the new one is kept, and the gateway
never has the ended one.
"""

from dataclasses import replace

from natkeep.lab import wire_checks
from natkeep.lab.application import all_in, all_open, octets_agree
from natkeep.lab.criu_restore import Machine
from natkeep.lab.translators import natkeep_command

SETUP = {"engine": "criu"}


def run(lab):
    check = lab.report.check
    lab.serve()
    lab.dial(connections=2)
    ending = lab.new_connections.dial(lab.old)
    lab.new_connections.are_accepted(ending)
    lab.new_connections.made.remove(ending)  # the destination is never to see anything of it
    lab.traffic.talk()
    lab.read_sites()

    told = lab.directory / "live.json"
    words = [*natkeep_command(), "inspect", "--live", str(lab.traffic.server.pid), "--json"]
    told.write_text(lab.topology["source"].run(*words).stdout)
    gateway = Machine(lab, "gateway", state="natkeep-state")
    options = ("--mode", lab.mode, "--connections", str(told))
    gateway.prepare("lab", *options, sites=("gateway", "destination"))
    rules = gateway.ruleset()
    told_of = [kept for kept in lab.traffic.kept if f" {kept.source.port} . " in rules]
    check("nothing is redirected until the freeze", "kept-lab" in rules and not told_of)
    lab.traffic.talk()  # on, through what has been prepared

    close(lab, ending)
    lab.traffic.client.do({"open": None})
    lab.traffic.client.wait(all_open(3), "one more to be connected")
    lab.report.before.clear()
    lab.traffic.keep()
    lab.traffic.talk()
    lab.freeze()
    lab.place_order()
    lab.restore()
    lab.traffic.talk_on()
    ruleset = gateway.ruleset()
    tuples = (*lab.traffic.kept, ending.tuple)
    translated = [each for each in tuples if f" . {each.source.port} . " in ruleset]
    check("the gateway keeps who came, and not who went", translated == list(lab.traffic.kept))
    lab.traffic.quiet()
    judge_ended(lab, ending)
    lab.finish()


def close(lab, ending):
    """The client ends it, and so does the server; every octet has arrived before."""
    server = lab.traffic.process
    views = {ending.tuple: ending.tuple}
    lab.report.assertions.append(octets_agree(ending.application.fresh(), server.fresh(), views))
    ending.application.do("shutdown_write")
    peers = [each["peer"] for each in server.fresh()["connections"]]
    index = peers.index(str(ending.tuple.source))
    with lab.report.must("who hangs up is heard, though the move is prepared"):
        server.wait(lambda report: report["connections"][index]["state"] == "eof", "the FIN")
        server.do({"close": None, "only": [index]})
        ending.application.wait(all_in("done", 1), "the server's FIN")


def judge_ended(lab, ending):
    """What was captured of the one that ended: it was complete, and nothing came late."""
    ended = wire_checks.Kept((ending.tuple,), {}, lab.frozen_ns, None)
    at_peer = lab.captures["client"].frames()
    resets = wire_checks.count_resets(at_peer, ended)
    frames = lab.captures["far"].frames() + lab.captures["destination"].frames()
    tuples = [frame.segment.tuple for frame in frames if frame.segment]
    beyond = [each for each in tuples if ending.tuple.source in (each.source, each.destination)]
    lab.report.check("who went was not reset", not resets, f"{resets} segments")
    name = "who went is never seen beyond the gateway"
    lab.report.check(name, not beyond, f"{len(beyond)} segments")
    lab.report.assertions += [
        replace(each, name=f"who went: {each.name}")
        for each in wire_checks.numbers_advance(at_peer, ended)
    ]
