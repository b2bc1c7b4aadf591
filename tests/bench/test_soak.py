"""the tests of the soak: a short one, and that its gauges and its octets can fail."""

from __future__ import annotations

import pytest

from bench.gauges import SLACK_KIB, Book, judge
from bench.soak import PEERS, TALKS, soak


@pytest.mark.root
@pytest.mark.criu
@pytest.mark.lab
def test_server_moves_on_and_on_and_nothing_grows():
    """Three rounds: by then CRIU has made each kind of move once."""
    told: list[str] = []

    found = soak(migrations=12, tell=told.append)

    assert [str(each) for each in found if not each.ok] == []
    assert len([each for each in found if "every octet arrived" in each.name]) == len(PEERS)
    read = {each.name: each.detail for each in found}
    assert read["gateway: nft objects"] == "0 in each of 3 readings"
    assert read["server: descriptors"].startswith(str(len(PEERS) * len(TALKS) + 4))
    assert "readings" in read["natkeep prepare: memory KiB"]
    for share in ("4 by criu", "8 by repair", "1 run", "6 --replace", "3 home", "8 stateful"):
        assert share in told[-1]


@pytest.mark.root
@pytest.mark.lab
def test_soak_fails_with_the_first_move_that_does(monkeypatch):
    monkeypatch.setenv("NATKEEP_BIN", "/bin/false")

    found = soak(migrations=4)

    failed = {each.name: each.detail for each in found if not each.ok}
    assert "natkeep prepare exited 1" in failed["move 1 succeeds"]
    assert "migrations" in failed
    assert any("every octet arrived" in name for name in failed)


@pytest.mark.parametrize(
    ("name", "values", "ok"),
    [
        ("nft objects", [3, 3, 3], True),
        ("nft objects", [3, 3, 4], False),
        ("nft objects", [3, 4, 3], False),
        ("nft objects", [3, 2, 2], False),  # it should not shrink either: what was it that went?
        ("nft objects", [3], False),
        ("gateway: conntrack rows", [12, 0, 12], True),
        ("gateway: conntrack rows", [0, 12, 13], False),
        ("memory KiB", [9000, 9000 + SLACK_KIB], True),
        ("memory KiB", [9000, 9000 + SLACK_KIB + 1], False),
        ("memory KiB", [9000, 15000, 9000, 9000, 15000, 9000], True),
        ("memory KiB", [9000 + 100 * number for number in range(30)], False),
        ("memory KiB", [9000], False),
    ],
)
def test_gauge_tells_growth(name, values, ok):
    book = Book()
    for value in values:
        book.note({name: value})

    (found,) = book.assertions()

    assert found == judge(name, values)
    assert found.ok is ok


def looks_at(*values: int):
    """A look that shows one of *values* after the other, and then the last one for ever."""
    left = list(values)
    return lambda: {"files": left.pop(0) if left[1:] else left[0], "memory KiB": 9000}


def test_what_an_application_has_open_for_a_moment_is_no_growth():
    """Neither at first, when there is nothing to compare with, nor later."""
    book = Book()
    book.note_settled(looks_at(27, 26, 27, 26))
    book.note_settled(looks_at(26))
    book.note_settled(looks_at(27, 27, 26))

    assert book.readings["files"] == [26, 26, 26]
    assert book.readings["memory KiB"] == [9000, 9000, 9000]


def test_what_stays_is_growth_however_often_one_looks():
    book = Book()
    book.note_settled(looks_at(26))
    book.note_settled(looks_at(28, 27, 28, 27))

    assert book.readings["files"] == [26, 27]


def test_what_went_is_no_less_noticed():
    book = Book()
    book.note_settled(looks_at(26))
    book.note_settled(looks_at(25))

    assert book.readings["files"] == [26, 25]


def test_gauge_says_what_it_showed():
    assert judge("nft objects", [3, 4, 3, 5]).detail == "3 at first, then 4, 5"
    assert judge("memory KiB", [9000, 9100]).detail == "9,000 then 9,100, at most 9,100, 2 readings"
