"""A QUIC server moves to another address; its client's stream goes on, and neither end sees it.

 client 10.1.0.2                gateway                            destination 10.3.0.20 (NEW)
 ┌──────┐  10.2.0.10:4433  ┌─────────┐  10.3.0.20:4433  ┌─────────┐  10.2.0.10:4433  ┌────────┐
 │ QUIC │══════════════════│ OLD⇄NEW │══════════════════│ NEW⇄OLD │══════════════════│ server │
 └──────┘   one stream     └─────────┘                  └─────────┘                  └────────┘

aioquic at both ends, moved by CRIU. What is said in between QUIC says again by itself; no address
changes for either end, so that it has no path to prove.
"""

import importlib.util
import sys
from pathlib import Path

import natkeep.lab
from natkeep.lab.application import Application, TrafficError
from natkeep.lab.engine import EngineError
from natkeep.lab.programs import UdpPrograms
from natkeep.plan.tuples import Endpoint, FourTuple

SETUP = {"engine": "criu", "udp": True}
PORT = 4433
LINE = (sys.executable, "-I", str(Path(natkeep.lab.__file__).with_name("quic.py")))


def run(lab):
    if importlib.util.find_spec("aioquic") is None:
        raise EngineError("there is no aioquic", hint="pip install aioquic")
    lab.conditions.gateway_tracks()
    client = begin(lab)
    lab.move()
    asked = client.report()["answered"]
    with lab.report.must("the stream goes on"):
        report = client.wait(lambda each: each["answered"] >= asked + 50, "50 answers", within=10)
        lab.report.stall_ms = report["longest_silence_ms"]
        if report["mismatch"]:
            raise TrafficError(report["mismatch"])
    names = ", ".join(" > ".join(pair) for pair in report["names"])
    lab.report.check("no address changes for either end", len(report["names"]) == 1, names)
    lab.finish()


def begin(lab):
    """A server, a client, and a stream between them."""
    programs = UdpPrograms(lab)
    at = ("--at", str(lab.old), str(PORT))
    programs.serve_by(*LINE, "serve", *at, "--dir", str(lab.directory))
    client = Application(lab.directory / "quic")
    lab.topology["client"].start("quic", *LINE, "dial", *at, "--dir", str(client.directory))
    report = client.wait(lambda each: each["answered"] >= 20, "answers to come", within=15)
    [pair] = report["names"]
    programs.keep_tuples(FourTuple(*map(Endpoint.parse, pair)))
    return client
