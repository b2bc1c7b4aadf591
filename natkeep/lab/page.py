"""The report of a scenario as one HTML page: what a peer saw, drawn; opens without a network.

    time-sequence plot    each segment of one connection as its peer's wire carried it: when, and
                          which octets; the blackout is shaded, what was sent in it or said again
                          has a colour of its own
    network               which address each wire shows
    assertions            as in the text

Rule: what a capture holds is shown, nothing is reckoned for it. Needs matplotlib (natkeep[plots]).
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from natkeep.errors import UsageError
from natkeep.lab.capture import Frame
from natkeep.lab.report import Report, render_facts, render_picture
from natkeep.plan.tuples import FourTuple

_MOST = 20_000  # points of a direction that are drawn; a bulk transfer has more
_WRAP = 1 << 32


@dataclass(frozen=True, slots=True)
class Point:
    """A segment with data: milliseconds after the freeze, first octet, length, whether again."""

    at_ms: float
    octet: int
    length: int
    again: bool


@dataclass(frozen=True, slots=True)
class Trace:
    """A connection as its peer's wire carried it; restored_ms: after the freeze, if it was.

    inbound: its four-tuple, from the peer to the process.
    """

    inbound: FourTuple
    restored_ms: float | None
    to_process: tuple[Point, ...]
    to_peer: tuple[Point, ...]


def read_trace(
    frames: Iterable[Frame], inbound: FourTuple, frozen_ns: int, restored_ns: int | None
) -> Trace:
    """The segments of the connection *inbound* (peer to process) in *frames*, in their order."""
    seen = [frame for frame in frames if frame.segment is not None]
    restored = None if restored_ns is None else (restored_ns - frozen_ns) / 1e6
    ways = (_points(seen, way, frozen_ns) for way in (inbound, inbound.reply()))
    return Trace(inbound, restored, *ways)


def _points(frames: Sequence[Frame], way: FourTuple, frozen_ns: int) -> tuple[Point, ...]:
    found: list[Point] = []
    first, highest = None, 0
    for frame in frames:
        segment = frame.segment
        if segment is None or segment.tuple != way or not segment.length:
            continue
        first = segment.seq if first is None else first
        octet = (segment.seq - first) % _WRAP
        end = octet + segment.length
        at_ms = (frame.at_ns - frozen_ns) / 1e6
        found.append(Point(at_ms, octet, segment.length, again=end <= highest))
        highest = max(highest, end)
    return tuple(found[-_MOST:])


def render_page(report: Report, trace: Trace | None) -> str:
    """The page, whole: it loads nothing."""
    facts = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
        for name, text in render_facts(report)
    )
    rows = "".join(
        f'<li class="{"ok" if each.ok else "fail"}">{html.escape(str(each))}</li>'
        for each in report.assertions
    )
    plot = draw(trace) if trace is not None else "<p>No segment of a kept connection was seen.</p>"
    title, verdict = html.escape(report.scenario), "pass" if report.passed else "fail"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}: {verdict}</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }}
pre {{ line-height: 1.2; overflow-x: auto }} th {{ text-align: left; padding-right: 2em }}
svg {{ width: 100%; height: auto }} .fail {{ color: #b00020; font-weight: bold }}
#verdict.pass {{ color: #1b7f3b }} #verdict.fail {{ color: #b00020 }}
</style></head><body>
<h1>{title}: <span id="verdict" class="{verdict}">{verdict}</span></h1>
<p>{html.escape(report.title)}</p>
<h2>What the peer saw</h2><table>{facts}</table>
{plot}
<h2>Where it was translated</h2><pre>{html.escape(chr(10).join(render_picture(report)))}</pre>
<h2>Asserted, on the wires and in the applications</h2><ul>{rows}</ul>
</body></html>
"""


def demand_matplotlib() -> None:
    """UsageError where it is not installed, before a scenario is run for nothing."""
    if find_spec("matplotlib") is None:
        hint = "pip install 'natkeep[plots]'"
        raise UsageError("a report as a page needs matplotlib", hint=hint)


def draw(trace: Trace) -> str:
    """The time-sequence plot, both directions, as SVG."""
    from matplotlib.figure import Figure  # not pyplot: no display, no state

    figure = Figure(figsize=(10, 7), layout="constrained")
    ways = (("peer to process", trace.to_process), ("process to peer", trace.to_peer))
    for axes, (name, points) in zip(figure.subplots(2, 1, sharex=True), ways, strict=True):
        if trace.restored_ms is not None:
            axes.axvspan(0, trace.restored_ms, color="#eeeeee", label="blackout")
        axes.axvline(0, color="#999999", linewidth=0.8)
        for label, colour, some in _sorted(points, trace.restored_ms):
            axes.vlines(
                [p.at_ms for p in some], [p.octet for p in some],
                [p.octet + p.length for p in some], colors=colour, linewidth=2, label=label,
            )  # fmt: skip
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_ylabel("octets")
        axes.margins(y=0.08)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", fontsize=8)
    axes.set_xlabel("milliseconds after the freeze")
    figure.suptitle(str(trace.inbound), fontsize=11)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _sorted(
    points: Sequence[Point], restored_ms: float | None
) -> list[tuple[str, str, list[Point]]]:
    """The points by what they are: label, colour, and those."""
    again = [point for point in points if point.again]
    first = [point for point in points if not point.again]
    within = [p for p in first if restored_ms is not None and 0 <= p.at_ms < restored_ms]
    usual = [point for point in first if point not in within]
    kinds = (
        ("data", "#1f5fa8", usual),
        ("sent in the blackout", "#d98200", within),
        ("said again", "#b00020", again),
    )
    return [kind for kind in kinds if kind[2]]
