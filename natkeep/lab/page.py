"""The report of a scenario as one HTML page: what a peer saw, drawn; opens without a network."""

from __future__ import annotations

import html
from collections.abc import Iterable

from natkeep import page
from natkeep.lab.capture import ACK, Frame
from natkeep.lab.report import Report, render_facts, render_picture
from natkeep.page import Seen, Trace
from natkeep.plan.tuples import FourTuple


def read_trace(
    frames: Iterable[Frame], inbound: FourTuple, frozen_ns: int, restored_ns: int | None
) -> Trace:
    """The segments of the connection *inbound* (peer to process) in *frames*, in their order."""
    seen = [
        Seen(frame.at_ns, one.tuple, one.seq, one.ack if one.flags & ACK else None, one.length)
        for frame in frames
        if (one := frame.segment) is not None
    ]
    return page.read_trace(seen, inbound, frozen_ns, restored_ns)


def render_page(report: Report, trace: Trace | None) -> str:
    """The page, whole: it loads nothing."""
    rows = "".join(
        f'<li class="{"ok" if each.ok else "fail"}">{html.escape(str(each))}</li>'
        for each in report.assertions
    )
    none = "<p>No segment of a kept connection was seen.</p>"
    plot = page.draw(trace) if trace is not None else none
    sections = (
        ("What the peer saw", page.render_table(render_facts(report)) + plot),
        ("Where it was translated", page.render_text(render_picture(report))),
        ("Asserted, on the wires and in the applications", f"<ul>{rows}</ul>"),
    )
    verdict = "pass" if report.passed else "fail"
    return page.render_page(report.scenario, verdict, report.title, sections, passed=report.passed)
