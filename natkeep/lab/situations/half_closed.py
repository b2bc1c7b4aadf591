"""Half-closed connections, frozen and restored by the real CRIU.

CRIU walks a restored socket to its state with segments of its own, through lo, marked 0xC114:
the gate must let them pass, conntrack must not learn the connection from them the wrong way
round, and what the kernel answers to them must not say OLD on a wire (points T4 and T10).

The states are those of the process's socket. What is still open then carries data, and the
connection ends as connections do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial

from natkeep.lab.application import Report
from natkeep.lab.host import Host, await_true
from natkeep.lab.lab import Lab
from natkeep.lab.situations import situation
from natkeep.plan.tuples import FourTuple

MUCH = 100_000
half_closed = partial(situation, engine="criu", probes=(True,))


@half_closed(12, "CLOSE_WAIT")
def close_wait(lab: Lab) -> None:
    """The client has closed its side; the process goes on sending."""
    lab.begin(pause=True)
    lab.traffic.client_closes()
    _move_in(lab, "CLOSE-WAIT")
    lab.traffic.server_sends(MUCH)
    _end(lab)


@half_closed(12, "FIN_WAIT2")
def fin_wait_2(lab: Lab) -> None:
    """The process has closed its side; the client goes on sending."""
    lab.begin(pause=True)
    lab.traffic.server_closes()
    _move_in(lab, "FIN-WAIT-2")
    lab.traffic.client_sends(MUCH)
    _end(lab)


@half_closed(12, "FIN_WAIT1")
def fin_wait_1(lab: Lab) -> None:
    """The process has closed its side, and its FIN has not arrived yet."""
    lab.begin(pause=True)
    with _fin_is_lost(lab):
        lab.traffic.process.do("shutdown_write")
        _move_in(lab, "FIN-WAIT-1")
    lab.traffic.client_sends(MUCH)
    _end(lab)


@half_closed(12, "LAST_ACK")
def last_ack(lab: Lab) -> None:
    """The client has closed its side, then the process; its FIN has not arrived yet."""
    lab.begin(pause=True)
    lab.traffic.client_closes()
    with _fin_is_lost(lab):
        lab.traffic.process.do("shutdown_write")
        _move_in(lab, "LAST-ACK")
    _end(lab)


@half_closed(12, "CLOSING")
def closing(lab: Lab) -> None:
    """Both have closed their sides at the same time; the process's FIN has not arrived yet."""
    lab.begin(pause=True)
    with _fin_is_lost(lab):
        lab.traffic.process.do("shutdown_write")
        _await_state(lab, "FIN-WAIT-1")
        lab.traffic.client.do("shutdown_write")
        _move_in(lab, "CLOSING")
    _end(lab)


def _move_in(lab: Lab, state: str) -> None:
    _await_state(lab, state)
    lab.move()


def _await_state(lab: Lab, state: str) -> None:
    """By what the kernel says of the process's socket; the application's own is not as fine."""
    (kept,) = lab.traffic.views.values()
    await_true(lambda: tcp_state(lab.at, kept.reply()) == state, f"the socket to be in {state}")


def tcp_state(host: Host, connection: FourTuple) -> str:
    """What ss says of the socket of *connection*, from its own end; empty when there is none."""
    wanted = [str(connection.source), str(connection.destination)]
    rows = (line.split() for line in host.run("ss", "-Htan").stdout.splitlines())
    return next((row[0] for row in rows if row[3:5] == wanted), "")


def _fin_is_lost(lab: Lab) -> AbstractContextManager[None]:
    """The switch loses what the source sends with FIN; from the freeze on it sends nothing."""
    return lab.conditions.loses(lab.home.role, "tcp flags & fin == fin")


def _end(lab: Lab) -> None:
    """Both sides close what is open, both see it, and neither kernel has a connection left."""
    client, process = lab.traffic.client, lab.traffic.process
    with lab.report.must("the connection ends properly at both ends"):
        for each in (client, process):
            each.do("shutdown_write")
        for each in (client, process):
            each.wait(_all_done, "for the end", within=lab.traffic.patience_s)
        (kept,) = lab.traffic.views.values()
        for host, own in ((lab.topology["client"], kept), (lab.at, kept.reply())):
            await_true(partial(_is_gone, host, own), f"the end of {own} in the kernel")
    lab.traffic.carried_on = True
    lab.finish()


def _all_done(report: Report) -> bool:
    return all(each["state"] == "done" for each in report["connections"])


def _is_gone(host: Host, connection: FourTuple) -> bool:
    return tcp_state(host, connection) in ("", "TIME-WAIT")
