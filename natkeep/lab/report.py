"""The report of one run: assertions, figures, and the document and the text that show them.

    report.check("the peer is heard", heard, "12 octets")
    with report.should("natkeep repairs it"): ...     a NatkeepError inside fails the assertion
    with report.must("the server is restored"): ...   and ends the scenario, by ScenarioOver

Rule: values and text only; wire_checks.py and the scenarios decide what is asserted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from natkeep.errors import NatkeepError

SCHEMA = 1


class ScenarioOver(Exception):
    """An assertion failed without which the scenario cannot go on."""


@dataclass(frozen=True, slots=True)
class Assertion:
    """One thing that has to be so, whether it was, and what was seen."""

    name: str
    ok: bool
    detail: str = ""

    def __str__(self) -> str:
        said = f": {self.detail}" if self.detail else ""
        return f"{'ok  ' if self.ok else 'FAIL'} {self.name}{said}"

    def as_json(self) -> dict[str, Any]:
        """As `lab run --json` shows it."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail}


@dataclass(slots=True)
class Report:
    """What one run of a scenario came to.

    before, after: the four-tuples as the peer's own sockets tell them, `10.1.0.2:50594 >
    10.2.0.10:5000`; after is shorter where connections were lost.
    octets: how many were checked, towards the process and back.
    """

    scenario: str
    title: str = ""
    engine: str = ""
    translator: str = ""
    mode: str = ""
    old: str = ""
    new: str = ""
    assertions: list[Assertion] = field(default_factory=list)
    blackout_ms: float | None = None
    stall_ms: float | None = None
    segments: int = 0
    resets: int = 0
    silence_ms: float | None = None
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    octets: tuple[int, int] = (0, 0)

    def check(self, name: str, ok: object, detail: str = "") -> None:
        """Assert *ok*."""
        self.assertions.append(Assertion(name, bool(ok), detail))

    def fail(self, name: str, error: Exception) -> None:
        """*name* does not hold, for the reason that *error* gives (traffic adds a whole report)."""
        self.check(name, False, str(error).partition("; last report:")[0][:600])

    @contextmanager
    def should(self, name: str) -> Iterator[None]:
        """Assert that the block succeeds; the scenario goes on even if not."""
        began = time.monotonic()
        try:
            yield
        except NatkeepError as error:
            self.fail(name, error)
        else:
            self.check(name, True, f"{(time.monotonic() - began) * 1000:.0f} ms")

    @contextmanager
    def must(self, name: str) -> Iterator[None]:
        """Like `should`, but without it the scenario is over."""
        count = len(self.assertions)
        with self.should(name):
            yield
        if not self.assertions[count].ok:
            raise ScenarioOver

    @contextmanager
    def must_fail(self, name: str, reason: str) -> Iterator[None]:
        """Assert that the block raises a NatkeepError which gives *reason*."""
        try:
            yield
        except NatkeepError as error:
            self.check(name, reason in str(error), str(error)[:300])
        else:
            self.check(name, False, "it succeeded")

    @property
    def passed(self) -> bool:
        """Every assertion held, and there were any."""
        return bool(self.assertions) and all(each.ok for each in self.assertions)

    def as_json(self) -> dict[str, Any]:
        """The contract's document, with what else is known beside it."""
        return {
            "schema": SCHEMA,
            "scenario": self.scenario,
            "engine": self.engine,
            "translator": self.translator,
            "mode": self.mode,
            "verdict": "pass" if self.passed else "fail",
            "assertions": [each.as_json() for each in self.assertions],
            "blackout_ms": _rounded(self.blackout_ms),
            "stall_ms": _rounded(self.stall_ms),
            "segments": self.segments,
            "resets": self.resets,
            "silence_ms": _rounded(self.silence_ms),
            "tuples": {"before": self.before, "after": self.after},
            "octets": {"to_process": self.octets[0], "to_peer": self.octets[1]},
        }


def render_report(report: Report) -> str:
    """The report as text: what the peer saw, what was asserted, where it was translated."""
    lines = [f"{report.scenario}: {report.title}", "", "What the peer saw"]
    lines += [f"  {label:<19}{text}" for label, text in render_facts(report)]
    lines += ["", "Asserted, on the wires and in the applications"]
    lines += [f"  {each}" for each in report.assertions]
    lines += ["", *render_picture(report), "", _last_line(report)]
    return "\n".join(lines)


def render_facts(report: Report) -> list[tuple[str, str]]:
    """What the peer saw: a name and words each."""
    return [
        ("four-tuple before", _tuples(report.before)),
        ("four-tuple after", _tuples(report.after)),
        ("segments", f"{report.segments:,}"),
        ("resets", str(report.resets)),
        ("longest silence", f"{_ms(report.silence_ms)} on the wire, {_ms(report.stall_ms)} in the"
                            f" application (frozen for {_ms(report.blackout_ms)})"),
        ("octets checked", f"{report.octets[0]:,} to the process, {report.octets[1]:,} back"),
    ]  # fmt: skip


def _tuples(tuples: list[str]) -> str:
    if not tuples:
        return "none"
    more = f"  and {len(tuples) - 1} more" if len(tuples) > 1 else ""
    return tuples[0] + more


def render_picture(report: Report) -> list[str]:
    """The network, with the address that each wire shows for the process."""
    old, new = report.old, report.new
    none = report.translator == "none"
    at_gateway, at_destination = ("  no  ", "  no  ") if none else ("OLD⇄NEW", "NEW⇄OLD")
    width = max(len(old), len(new), 14) + 2
    wires = [old.center(width), new.center(width), old.center(width)]
    lines = [
        f" client     {' ' * width}  gateway  {' ' * width} destination",
        f"┌──────┐{wires[0]}┌─────────┐{wires[1]}┌─────────┐{wires[2]}┌─────────┐",
        f"│ peer │{'─' * width}│{at_gateway:^9}│{'─' * width}│{at_destination:^9}│"
        f"{'─' * width}│ process │",
        f"└──────┘{' ' * width}└─────────┘{' ' * width}└─────────┘{' ' * width}└─────────┘",
        f" OLD = {old}, NEW = {new}; "
        + ("not translated" if none else f"translated by {report.translator} where it says ⇄"),
    ]
    return [line.rstrip() for line in lines]


def _last_line(report: Report) -> str:
    same = "unchanged" if report.before and report.before == report.after else "lost"
    return (
        f"engine {report.engine}: four-tuple {_tuples(report.before)} {same}; "
        f"verdict: {'pass' if report.passed else 'fail'}"
    )


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
