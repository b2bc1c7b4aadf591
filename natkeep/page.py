"""What a capture shows of a connection, drawn: an HTML page that loads nothing.

    time-sequence plot    each segment of one connection as its peer's wire carried it: when, and
                          which octets; the blackout is shaded, and a segment has a colour for what
                          became of it: sent in the blackout, held and replayed, said again
    steps                 when each began and ended

Rule: what a capture holds is shown, nothing is reckoned for it. *Held* is what the peer sent while
the process was silent, did not say again, and had acknowledged when the process was heard again.
Needs matplotlib (natkeep[plots]), which is imported when something is drawn.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

from natkeep.errors import UsageError
from natkeep.plan.tuples import Endpoint, FourTuple

_MOST = 20_000  # points of a direction that are drawn; a bulk transfer has more
_WRAP = 1 << 32
_AROUND = 300.0  # ms, at least, that are drawn before and after the blackout
_COLOURS = {
    "data": "#1f5fa8", "sent in the blackout": "#d98200",
    "held, and replayed to the process": "#1b7f3b", "said again": "#b00020",
}  # fmt: skip
_RARE = ("held, and replayed to the process", "said again")
_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }
pre { line-height: 1.2; overflow-x: auto } th { text-align: left; padding-right: 2em }
svg { width: 100%; height: auto } .fail { color: #b00020; font-weight: bold }
#verdict.pass { color: #1b7f3b } #verdict.fail { color: #b00020 }
"""


class Seen(NamedTuple):
    """A segment in a capture: when, and its header; ack is None where it acknowledges nothing."""

    at_ns: int
    tuple: FourTuple
    seq: int
    ack: int | None
    length: int


@dataclass(frozen=True, slots=True)
class Point:
    """A segment with data: milliseconds after the freeze, first octet, length, what became of it.

    again: all of it had been sent before. held: it waited for the process, and reached it.
    """

    at_ms: float
    octet: int
    length: int
    again: bool = False
    held: bool = False

    @property
    def end(self) -> int:
        """The octet behind its last one."""
        return self.octet + self.length


@dataclass(frozen=True, slots=True)
class Trace:
    """A connection as its peer's wire carried it; milliseconds after the freeze.

    inbound: its four-tuple, from the peer to the process. restored_ms: when the restore was
    through. answered_ms: when the process was heard again, by any peer.
    """

    inbound: FourTuple
    restored_ms: float | None
    answered_ms: float | None
    to_process: tuple[Point, ...]
    to_peer: tuple[Point, ...]


class Step(NamedTuple):
    """A step of a move; milliseconds after the freeze."""

    name: str
    begin_ms: float
    end_ms: float


def read_trace(
    seen: Sequence[Seen], inbound: FourTuple, frozen_ns: int, restored_ns: int | None
) -> Trace:
    """What *seen* holds, in its order, of the connection *inbound* (peer to process)."""
    restored = answered = None
    if restored_ns is not None:
        restored = (restored_ns - frozen_ns) / 1e6
        answered = _find_answer(seen, inbound.destination, frozen_ns, restored_ns)
    ours = [each for each in seen if each.tuple in (inbound, inbound.reply())]
    to_process, to_peer = (_points(ours, way, frozen_ns) for way in (inbound, inbound.reply()))
    if answered is not None:
        to_process = _mark_held(to_process, _acks(ours, inbound, frozen_ns), answered)
    return Trace(inbound, restored, answered, to_process[-_MOST:], to_peer[-_MOST:])


def _find_answer(
    seen: Iterable[Seen], process: Endpoint, frozen_ns: int, restored_ns: int
) -> float | None:
    """When the process spoke again: the end of its longest silence in the blackout."""
    times = [each.at_ns for each in seen if each.tuple.source == process]
    silent = [(b - a, b) for a, b in pairwise(times) if b > frozen_ns and a < restored_ns]
    return (max(silent)[1] - frozen_ns) / 1e6 if silent else None


def _points(seen: Iterable[Seen], way: FourTuple, frozen_ns: int) -> tuple[Point, ...]:
    found: list[Point] = []
    first, highest = None, 0
    for each in seen:
        if each.tuple != way or not each.length:
            continue
        first = each.seq if first is None else first
        octet = (each.seq - first) % _WRAP
        end = octet + each.length
        at_ms = (each.at_ns - frozen_ns) / 1e6
        found.append(Point(at_ms, octet, each.length, again=end <= highest))
        highest = max(highest, end)
    return tuple(found)


def _acks(seen: Sequence[Seen], inbound: FourTuple, frozen_ns: int) -> list[tuple[float, int]]:
    """What the process acknowledges, counted as the points' octets are, and when."""
    first = next((each.seq for each in seen if each.tuple == inbound and each.length), 0)
    back = (each for each in seen if each.tuple == inbound.reply() and each.ack is not None)
    return [((each.at_ns - frozen_ns) / 1e6, ((each.ack or 0) - first) % _WRAP) for each in back]


def _mark_held(
    points: tuple[Point, ...], acks: Sequence[tuple[float, int]], answered_ms: float
) -> tuple[Point, ...]:
    half = _WRAP // 2  # what is beyond is an acknowledgement of what came before the first octet
    known = max((ack for at, ack in acks if at < answered_ms and ack < half), default=0)
    later = [(at, ack) for at, ack in acks if at >= answered_ms and ack < half]

    def is_held(point: Point) -> bool:
        if not 0 <= point.at_ms < answered_ms or point.end <= known:
            return False
        heard = next((at for at, ack in later if ack >= point.end), None)
        return heard is not None and not any(
            point.at_ms < each.at_ms <= heard and each.again
            and each.octet < point.end and each.end > point.octet
            for each in points
        )  # fmt: skip

    return tuple(replace(each, held=True) if is_held(each) else each for each in points)


# ---- the page ------------------------------------------------------------------------------------


def demand_matplotlib() -> None:
    """UsageError where it is not installed, before anything is done for a page."""
    if find_spec("matplotlib") is None:
        hint = "pip install 'natkeep[plots]', or Debian's python3-matplotlib"
        raise UsageError("a report as a page needs matplotlib", hint=hint)


def render_page(
    title: str, verdict: str, lead: str, sections: Iterable[tuple[str, str]], *, passed: bool
) -> str:
    """The page, whole; sections: a heading and its HTML each, all else is text."""
    name, kind = html.escape(title), "pass" if passed else "fail"
    body = "".join(f"<h2>{html.escape(heading)}</h2>{inside}\n" for heading, inside in sections)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{name}: {html.escape(verdict)}</title>
<style>{_STYLE}</style></head><body>
<h1>{name}: <span id="verdict" class="{kind}">{html.escape(verdict)}</span></h1>
<p>{html.escape(lead)}</p>
{body}</body></html>
"""


def render_table(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and what is said of them."""
    each = ((html.escape(name), html.escape(text)) for name, text in rows)
    lines = (f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in each)
    return f"<table>{''.join(lines)}</table>"


def render_text(lines: Iterable[str]) -> str:
    """Lines as they are."""
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def draw(trace: Trace) -> str:
    """The time-sequence plot, both directions, as SVG."""
    figure = _make_figure(7)
    begin, end = _choose_window(trace.restored_ms)
    ways = (("peer to process", trace.to_process), ("process to peer", trace.to_peer))
    for axes, (name, all_points) in zip(figure.subplots(2, 1, sharex=True), ways, strict=True):
        points = [point for point in all_points if begin <= point.at_ms <= end]
        if trace.restored_ms is not None:
            axes.axvspan(0, trace.restored_ms, color="#eeeeee", label="blackout")
        axes.axvline(0, color="#999999", linewidth=0.8)
        if trace.answered_ms is not None:
            axes.axvline(
                trace.answered_ms, color="#1b7f3b", linewidth=0.8, linestyle="--",
                label="the process is heard again; what was held is replayed",
            )  # fmt: skip
        for label, colour, some in _sorted(points, trace):
            axes.vlines(
                [p.at_ms for p in some], [p.octet for p in some], [p.end for p in some],
                colors=colour, linewidth=2, label=label,
            )  # fmt: skip
            if label in _RARE:  # a few octets would not be seen
                axes.plot(
                    [p.at_ms for p in some], [p.end for p in some], ".", color=colour, markersize=5
                )
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_ylabel("octets")
        axes.margins(y=0.08)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower right", fontsize=8)
    axes.set_xlabel("milliseconds after the freeze")
    figure.suptitle(str(trace.inbound), fontsize=11)
    return _to_svg(figure)


def _choose_window(restored_ms: float | None) -> tuple[float, float]:
    """From when to when it is drawn: the blackout, and so much around it that it can be seen."""
    if restored_ms is None:
        return float("-inf"), float("inf")
    return -max(restored_ms / 2, _AROUND), restored_ms + max(restored_ms / 2, _AROUND)


def draw_steps(steps: Sequence[Step], restored_ms: float) -> str:
    """A bar for each step, one below the other, as SVG."""
    figure = _make_figure(0.9 + 0.32 * len(steps))
    axes = figure.subplots()
    axes.axvspan(0, restored_ms, color="#eeeeee", label="blackout")
    for row, step in enumerate(steps):
        took = step.end_ms - step.begin_ms
        axes.barh(row, took, left=step.begin_ms, color="#1f5fa8", height=0.6)
        axes.annotate(
            f"{took:.0f} ms", (step.end_ms, row), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(steps)), [step.name for step in steps])
    axes.invert_yaxis()
    axes.legend(loc="lower left", fontsize=8)
    axes.margins(x=0.08)
    axes.set_xlabel("milliseconds after the freeze")
    return _to_svg(figure)


def _make_figure(height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no display, no state

    return Figure(figsize=(10, height), layout="constrained")


def _to_svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _sorted(points: Sequence[Point], trace: Trace) -> list[tuple[str, str, list[Point]]]:
    """The points by what they are: label, colour, and those."""

    def name(point: Point) -> str:
        if point.held:
            return "held, and replayed to the process"
        if point.again:
            return "said again"
        restored = trace.restored_ms
        within = restored is not None and 0 <= point.at_ms < restored
        return "sent in the blackout" if within else "data"

    sorts: dict[str, list[Point]] = {each: [] for each in _COLOURS}
    for point in points:
        sorts[name(point)].append(point)
    return [(each, _COLOURS[each], some) for each, some in sorts.items() if some]
