"""The lab's side of traffic.py: start lines, commands, reports and waiting with a deadline.

    serve = Application(tmp / "serve")
    process = Popen(["ip", "netns", "exec", "web", *serve.serve_line("10.2.0.10:80")])
    serve.wait(lambda report: report["listening"], "listening")
    dial = Application(tmp / "dial")
    Popen(["ip", "netns", "exec", "peer", *dial.dial_line("10.2.0.10:80", count=8)])
    dial.wait(all_open(8), "connected")
    dial.do({"talk": {"interval_ms": 10, "size": 64}})       # returns when it is acknowledged
    dial.wait(answered(100), "100 answers each")
    serve.command({"freeze": str(tmp / "state.json")})       # does not wait
    dial.do("mark"); …; dial.fresh()["connections"][0]["longest_silence_ms"]

Rule: nothing here sleeps without a deadline, and what is waited for is named in the error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from natkeep.errors import NatkeepError
from natkeep.lab.host import Host
from natkeep.lab.report import Assertion
from natkeep.lab.time_scale import scaled
from natkeep.plan.tuples import Endpoint, FourTuple

SCRIPT = Path(__file__).with_name("traffic.py")
DATAGRAMS = Path(__file__).with_name("datagrams.py")

Report = dict[str, Any]
Views = Mapping[FourTuple, FourTuple]
"""Each four-tuple as the peer sees it, from the peer to the process, and as the process sees it;
they differ behind a gateway's own NAT."""
Item = str | dict[str, Any]
Source = Endpoint | str | None
"""Where a client dials from, with port 0 for any; None: as the kernel chooses."""

# How often a report is looked at while waiting; the script writes every 20 ms at most.
_LOOK_EVERY_S = 0.002


class TrafficError(NatkeepError):
    """The application refused a command, or did not come to a state before the deadline."""


class Application:
    """One traffic.py process, by the directory that steers it; or one of another *script*.

    A directory belongs to one life of an application: a resumed process carries on in the same
    one, an unrelated process needs its own.
    """

    def __init__(self, directory: Path, script: Path = SCRIPT) -> None:
        self.directory, self.script = directory, script
        self.directory.mkdir(parents=True, exist_ok=True)
        report = self.report()  # of a process that another part of the lab began to steer
        self._seq = 0 if report is None else int(report["seq"])

    def serve_line(self, *listen: str) -> list[str]:
        """The command line of a server at the addresses *listen*."""
        return self._line("serve", *(word for each in listen for word in ("--listen", each)))

    def dial_line(self, to: str, *, count: int = 1, source: str | None = None) -> list[str]:
        """The command line of a client with *count* connections."""
        origin = [] if source is None else ["--from", source]
        return self._line("dial", "--to", to, "--count", str(count), *origin)

    def resume_line(self, state: Path, *, role: str = "serve") -> list[str]:
        """The command line that goes on from what `freeze` wrote into *state*."""
        return self._line(role, "--resume", str(state))

    def _line(self, role: str, *arguments: str) -> list[str]:
        # -I -S: nothing of the user's environment and no site-packages, a third less to dump.
        script = [sys.executable, "-I", "-S", str(self.script)]
        return [*script, role, *arguments, "--dir", str(self.directory)]

    def command(self, *items: Item) -> int:
        """Replace the orders and return their number at once; see traffic.py for the items.

        Orders that were not read yet are lost; `do` waits, and so never loses any.
        """
        self._seq += 1
        self._replace("command", json.dumps({"seq": self._seq, "do": items}))
        return self._seq

    def do(self, *items: Item, within: float = 5.0) -> Report:
        """Give orders, wait until they are carried out; the report written right after them."""
        seq = self.command(*items)
        report = self.wait(lambda report: report["seq"] >= seq, f"to do {items}", within=within)
        if report["failed"]:
            raise TrafficError(f"{self.directory.name}: {report['failed']}")
        return report

    def go(self, how: str = "probe") -> None:
        """Let a resumed application leave repair: `probe` as CRIU does, or `silent`."""
        self._replace("go", how)

    def report(self) -> Report | None:
        """The newest report; None before the first."""
        try:
            report: Report = json.loads((self.directory / "report.json").read_text())
        except FileNotFoundError:
            return None
        return report

    def fresh(self) -> Report:
        """A report that was written after this call."""
        return self.do()

    def wait(
        self, predicate: Callable[[Report], object], what: str, *, within: float = 5.0
    ) -> Report:
        """The first report that satisfies *predicate*; TrafficError, with the last one, if late."""
        deadline = time.monotonic() + scaled(within)
        while True:
            report = self.report()
            if report is not None and predicate(report):
                return report
            if time.monotonic() > deadline:
                waited = f"waited {scaled(within)} s {what}"
                raise TrafficError(f"{self.directory.name}: {waited}; last report: {report}")
            time.sleep(_LOOK_EVERY_S)

    def _replace(self, name: str, text: str) -> None:
        # Rename, so that the application never reads half an order.
        temporary = self.directory / f".{name}.tmp"
        temporary.write_text(text)
        os.replace(temporary, self.directory / name)


class Applications(Application):
    """Several as one: each carries the orders out, and a report has the connections of all."""

    def __init__(self, *applications: Application) -> None:
        self.applications, self.directory = applications, applications[0].directory

    def do(self, *items: Item, within: float = 5.0) -> Report:
        return self._join([each.do(*items, within=within) for each in self.applications])

    def report(self) -> Report | None:
        reports = [report for each in self.applications if (report := each.report())]
        return self._join(reports) if len(reports) == len(self.applications) else None

    @staticmethod
    def _join(reports: Sequence[Report]) -> Report:
        return {
            **reports[0],
            "connections": [one for each in reports for one in each["connections"]],
        }


def start_server(
    host: Host, name: str, *listen: Endpoint | str, script: Path = SCRIPT
) -> Application:
    """A server at *host*, which listens."""
    server = Application(host.directory / name, script)
    host.start(name, *server.serve_line(*map(str, listen)))
    server.wait(lambda report: len(report["listening"]) == len(listen), "listening")
    return server


def start_client(
    host: Host, name: str, to: Endpoint, *, count: int = 1, source: Source = None,
    script: Path = SCRIPT,
) -> Application:  # fmt: skip
    """A client at *host* with *count* open connections, which leave from *source*."""
    client = Application(host.directory / name, script)
    line = client.dial_line(str(to), count=count, source=None if source is None else str(source))
    host.start(name, *line)
    client.wait(all_open(count), "connected")
    return client


def all_open(count: int) -> Callable[[Report], bool]:
    """*count* connections are there, and all of them open."""
    return all_in("open", count)


def all_in(state: str, count: int) -> Callable[[Report], bool]:
    """*count* connections are there, and all of them in *state*."""
    return lambda report: [each["state"] for each in report["connections"]] == [state] * count


def answered(times: int) -> Callable[[Report], bool]:
    """Every connection has had at least *times* answers in full."""
    return lambda report: all(each["answered"] >= times for each in report["connections"])


def received(octets: int) -> Callable[[Report], bool]:
    """Every connection has read at least *octets*."""
    return lambda report: all(each["rx"] >= octets for each in report["connections"])


def handed_over(report: Report) -> bool:
    """The application has handed everything to the kernel."""
    return all(each["owed"] == 0 for each in report["connections"])


def faults(report: Report) -> Sequence[str]:
    """What is wrong with the connections of a report, in words; empty when nothing is."""
    found = []
    for index, each in enumerate(report["connections"]):
        if each["mismatch"] is not None:
            found.append(f"connection {index}: wrong octet {each['mismatch']}")
        if each["error"] is not None:
            found.append(f"connection {index}: {each['state']} ({each['error']})")
    return found


def tuple_of(connection: dict[str, Any]) -> FourTuple:
    """A connection of a report, from its own end to the other."""
    return FourTuple(Endpoint.parse(connection["local"]), Endpoint.parse(connection["peer"]))


def octets_agree(client: Report, server: Report, views: Views) -> Assertion:
    """Every octet arrived once, in order, in both directions, and no connection broke."""
    theirs = {tuple_of(each).reply(): each for each in server["connections"]}
    kept = [theirs[each] for each in views.values() if each in theirs]
    bad = [*faults(client), *faults({"connections": kept})]
    for each in client["connections"]:
        name = tuple_of(each)
        other = theirs.get(views.get(name, name), {"rx": 0, "tx": 0})
        if (each["rx"], each["tx"]) != (other["tx"], other["rx"]):
            bad.append(f"{each['local']} sent {each['tx']} and got {each['rx']}, "
                       f"the process got {other['rx']} and sent {other['tx']}")  # fmt: skip
    total = sum_of(client, "rx") + sum_of(client, "tx")
    ok = not bad and total > 0
    detail = "; ".join(bad[:3]) if bad else f"{total} octets, each checked by its number"
    return Assertion("every octet arrived once and in order", ok, detail)


def sockets_agree(client: Report, server: Report, views: Views) -> Assertion:
    """getsockname and getpeername at both ends still tell the tuples of the beginning."""
    after = [tuple_of(each) for each in client["connections"]]
    theirs = {tuple_of(each).reply() for each in server["connections"]}
    missing = [str(each) for each in views.values() if each not in theirs]
    ok = after == list(views) and not missing
    detail = f"{len(after)} connections" if ok else f"peer {after}, process lacks {missing}"
    return Assertion("both ends' sockets tell the same four-tuples as before", ok, detail)


def sum_of(report: Report, key: str) -> int:
    """The sum of *key* over all connections."""
    return sum(each[key] for each in report["connections"])
