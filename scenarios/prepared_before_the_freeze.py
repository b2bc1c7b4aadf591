"""A move is prepared while the server still runs; who comes and goes meanwhile is no exception.

    clients 10.1.0.2            gateway            source 10.2.0.10 (OLD): alive at prepare
    ┌───────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ 2 + 1 │══════════════════│OLD⇄NEW│══════════════════│NEW⇄OLD│══════════════════│ server │
    │ went  │─ ─ ended before ─│       │    anti-spoof    └───────┘                  └────────┘
    └───────┘                  └───────┘                  destination 10.3.0.20 (NEW)

`natkeep inspect --live` reads the sockets of the running server, `natkeep prepare` gets what it
said. Then one client hangs up, whose FIN has to pass as if nothing had been prepared, and another
one dials. After the dump natkeep-hook compares the image: who came is kept, and of who went the
gateway never hears.
"""

from dataclasses import replace

from natkeep.lab import wire_checks
from natkeep.lab.application import all_in, all_open
from natkeep.lab.ends import octets_agree
from natkeep.lab.home import Machine, expect
from natkeep.lab.translators import natkeep_command

SETUP = {"engine": "criu"}


def tell(lab):
    lab.serve()
    lab.dial(connections=2)
    going = lab.call()
    lab.lets_in(going)
    lab.calls.made.remove(going)  # of whom the destination is never to see anything
    lab.talk()
    lab.look_at_sites()

    told = lab.directory / "live.json"
    words = [*natkeep_command(), "inspect", "--live", str(lab.server.pid), "--json"]
    told.write_text(lab.topology["source"].run(*words).stdout)
    natkeep = Machine(lab, "gateway")
    natkeep.environment = {"NATKEEP_STATE_DIR": str(lab.directory / "natkeep-state")}
    before = natkeep.ruleset()
    sites = [f"{role}={lab.topology[role].name}" for role in ("gateway", "destination")]
    options = [word for site in sites for word in ("--site", site)]
    natkeep.natkeep(
        "prepare", "lab", *natkeep.map(), *options, "--mode", lab.mode, "--connections", str(told)
    )
    expect(lab, "the gateway is left alone until the freeze", natkeep.ruleset() == before)
    lab.talk()  # on, through whatever has been prepared

    hang_up(lab, going)
    lab.client.do({"open": None})
    lab.client.wait(all_open(3), "one more to be connected")
    lab.report.before.clear()
    lab.keep()
    lab.talk()
    lab.freeze()
    lab.place_order()
    lab.restore()
    lab.talk_on()
    ruleset = natkeep.ruleset()
    translated = {each: f" . {each.source.port} . " in ruleset for each in (*lab.kept, going.tuple)}
    wanted = {**dict.fromkeys(lab.kept, True), going.tuple: False}
    expect(lab, "the gateway keeps who came, and not who went", translated == wanted)
    lab.quiet()
    judge_going(lab, going)
    lab.finish()


def hang_up(lab, going):
    """The client ends it, and so does the server; every octet has arrived before."""
    server = lab.server.application
    ends = {going.tuple: going.tuple}
    lab.report.assertions.append(octets_agree(going.application.fresh(), server.fresh(), ends))
    going.application.do("shutdown_write")
    peers = [each["peer"] for each in server.fresh()["connections"]]
    index = peers.index(str(going.tuple.source))
    with lab.must("who hangs up is heard, though the move is prepared"):
        server.wait(lambda report: report["connections"][index]["state"] == "eof", "the FIN")
        server.do({"close": None, "only": [index]})
        going.application.wait(all_in("done", 1), "the server's FIN")


def judge_going(lab, going):
    """What the wires say of who went: nothing broke, nothing was missing, and nobody spoke late."""
    frames = {at: lab.tap.captures[at].frames() for at in ("client", "far", "destination")}
    went = wire_checks.Kept((going.tuple,), {}, lab.frozen_ns, None)
    at_peer = sorted(frames.pop("client"), key=lambda frame: frame.at_ns)
    resets = wire_checks.count_resets(at_peer, went)
    segments = [frame.segment for some in frames.values() for frame in some if frame.segment]
    beyond = [s for s in segments if going.tuple.source in (s.tuple.source, s.tuple.destination)]
    expect(lab, "who went was not reset", not resets, f"{resets} segments")
    expect(lab, "who went is never seen beyond the gateway", not beyond, f"{len(beyond)} segments")
    lab.report.assertions += [
        replace(each, name=f"who went: {each.name}")
        for steps in (wire_checks.acks_advance, wire_checks.timestamps_advance, wire_checks.no_hole)
        for each in (steps(at_peer, went),)
    ]
