"""The report as a page: the right segments are drawn, and a browser shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import count, take_picture

from natkeep.lab.capture import Frame, Segment
from natkeep.lab.page import read_trace, render_page
from natkeep.lab.report import Report
from natkeep.page import Point, Trace
from natkeep.plan.tuples import Endpoint, FourTuple

INBOUND = FourTuple(Endpoint.parse("10.1.0.2:40000"), Endpoint.parse("10.2.0.10:5000"))
OTHER = FourTuple(Endpoint.parse("10.1.0.3:40000"), Endpoint.parse("10.2.0.10:5000"))
FROZEN = 10_000_000_000


def frame(ms: float, tuple_: FourTuple, seq: int, length: int, ack: int = 0) -> Frame:
    segment = Segment(tuple_, 0x10, seq % (1 << 32), ack % (1 << 32), length, None)
    return Frame(FROZEN + int(ms * 1e6), frozenset(), "", segment)


def test_a_trace_has_the_data_of_one_connection_counted_from_its_first_octet():
    start = (1 << 32) - 50  # it wraps
    frames = [
        frame(-10, INBOUND, start, 100),
        frame(-9, INBOUND.reply(), 7, 0),  # an acknowledgement
        frame(-8, OTHER, 1, 100),
        frame(5, INBOUND, start + 100, 60),
        frame(300, INBOUND, start + 100, 60),
        frame(301, INBOUND.reply(), 7, 20),
    ]
    trace = read_trace(frames, INBOUND, FROZEN, FROZEN + 250_000_000)
    assert trace == Trace(
        INBOUND,
        250.0,
        301.0,
        (
            Point(-10.0, 0, 100, again=False),
            Point(5.0, 100, 60, again=False),
            Point(300.0, 100, 60, again=True),
        ),
        (Point(301.0, 0, 20, again=False),),
    )


def test_held_is_what_was_not_said_again_and_reached_the_process():
    """What had come to the source before its lock was acknowledged from there."""
    start = (1 << 32) - 150
    frames = [
        frame(-10, INBOUND, start, 100),
        frame(-9, INBOUND.reply(), 7, 0, start + 100),
        frame(1, INBOUND, start + 100, 50),  # the source has it still
        frame(2, INBOUND.reply(), 7, 0, start + 150),
        frame(20, INBOUND, start + 150, 50),  # lost
        frame(100, INBOUND, start + 150, 50),  # held
        frame(150, INBOUND, start + 200, 50),  # held
        frame(160, INBOUND, start + 250, 50),  # lost
        frame(240, INBOUND.reply(), 7, 0, start + 250),
        frame(241, INBOUND, start + 250, 50),
        frame(242, INBOUND.reply(), 7, 0, start + 300),
    ]
    trace = read_trace(frames, INBOUND, FROZEN, FROZEN + 250_000_000)
    assert trace.answered_ms == 240.0
    assert [point.at_ms for point in trace.to_process if point.held] == [100.0, 150.0]
    assert [point.at_ms for point in trace.to_process if point.again] == [100.0, 241.0]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    report = Report("a_scenario", title="A server <moves>", old="10.2.0.10", new="10.3.0.20")
    report.translator = "natkeep"
    report.check("it is kept", True, "20 of 20")
    points = (Point(-5, 0, 100, False), Point(20, 100, 100, False), Point(300, 100, 100, True))
    file = tmp_path / "page.html"
    points += (Point(200, 200, 50, held=True),)
    file.write_text(render_page(report, Trace(INBOUND, 250.0, 240.0, points, points[:1])))
    return file


@pytest.mark.needs("matplotlib")
def test_the_page_says_what_the_report_does_and_loads_nothing(page: Path):
    text = page.read_text()
    assert "A server &lt;moves&gt;" in text
    assert "it is kept: 20 of 20" in text
    assert "OLD = 10.2.0.10, NEW = 10.3.0.20" in text
    assert "src=" not in text
    assert "<script" not in text
    drawn = ("blackout", "sent in the blackout", "said again", "held, and replayed", "heard again")
    for what in (*drawn, "process to peer"):
        assert what in text, what  # as a comment beside the glyphs


@pytest.mark.needs("matplotlib", "chromium")
def test_a_browser_draws_it(page: Path, tmp_path: Path):
    """What is red in the plot is red in the picture: more than a word of the page could be."""
    pixels = take_picture(page, tmp_path)
    for colour in ("#b00020", "#1b7f3b", "#d98200", "#1f5fa8"):
        assert count(pixels, colour) > 20, colour
    assert count(pixels, "#eeeeee") > 10_000  # the blackout
