"""A relay boots: two rules keep it silent until natkeep has prepared it anew.

    ┌────────┐     ┌──────────────────────┐     ┌─────────────┐
    │ client │═════│ OLD ⇄ relay ⇄ FROM:q │═════│ server, NEW │     before, and in the end
    └────────┘     └──────────────────────┘     └─────────────┘
    ┌────────┐     ┌──────────────────────┐     ┌─────────────┐     booted: it has its addresses,
    │ client │═ ═ ▶│ drop            drop │◀ ═ ═│ server, NEW │     and no table, entry or journal
    └────────┘     └──────────────────────┘     └─────────────┘

Without the two it answers both ends with resets, the server's as well, since it has FROM too.
`natkeep prepare --gate open`, of the same image, counts the same ports, and all goes on. They may
stay: at the input hook they see only what no translation has turned.
Relay and destination are machines of their own, which know nothing of each other.
"""

import time
from functools import partial

from natkeep.lab.criu_restore import Machine
from natkeep.lab.host import await_true
from natkeep.lab.relay import FLAT, ByRelay

SETUP = FLAT
SILENT = """\
table inet until-prepared {{
    chain input {{
        type filter hook input priority -400
        {ip} daddr {old} tcp dport {port} drop
        {ip} daddr {source} tcp dport 10000-32767 drop
    }}
}}
"""


def run(lab, *, silent=True):
    by = ByRelay(lab)
    by.begin(connections=3)
    lab.freeze()
    order = lab.place_order(move_id="web")
    relay, destination = Machine(lab, "source"), Machine(lab, "destination")
    options = [*relay.map(), "--via", str(by.source), *lab.frozen.options]
    destination.natkeep(
        "prepare", "web", "--site", f"destination={destination.host.name}", *options
    )
    options += ["--site", f"relay={relay.host.name}", "--gate", "open"]
    relay.natkeep("prepare", "web", *options)
    status = relay.cli.call("status", "web", "--json")
    by.note_wires(status)
    by.take_over()
    with lab.report.must("the server is restored at the destination"):
        lab.at = destination.host
        lab.engine.restore(lab.at, lab.traffic.server, lab.frozen, destination.hook("web"))
    lab.note_restored()
    lab.traffic.talk_on()

    ends = {"old": lab.old, "source": by.source, "port": lab.server_endpoint.port}
    rules = SILENT.format(ip="ip" if lab.family == 4 else "ip6", **ends)
    up_ns = by.boot(status, rules if silent else "")
    time.sleep(2)  # until both ends have said again what was lost: after 0.2, 0.4, 0.8 and 1.6 s
    with lab.report.must("the peers speak to the relay before it is prepared"):
        await_true(partial(have_spoken, lab, up_ns), "a peer to say it again", seconds=10)
    booted = Machine(lab, "source", state="state-booted")
    booted.natkeep("prepare", "web", *options)
    lab.traffic.talk_on()
    lab.traffic.check_ends()
    by.check_spoofs()
    for machine in (booted, destination):
        machine.natkeep("teardown", "web", "--yes", "--drop", "0")
    lab.undone.append(order)
    lab.conclude()


def have_spoken(lab, since_ns):
    """Whether the client's own wire has a segment to OLD since then."""
    said = (each for each in lab.captures["client"].frames() if each.at_ns > since_ns)
    return any(each.segment and each.segment.tuple in lab.traffic.kept for each in said)
