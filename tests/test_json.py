"""tests of --json: errors in the one document on stdout, and JSON from verb to verb."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natkeep import cli
from natkeep.checkpoint.ended import parse_ended
from natkeep.cli.output import end_document, error_to_json, print_json, wants_json
from natkeep.errors import DriftError, ImageError

# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [{"schema": 1}, {"schema": 1, "moves": [{"id": "web"}]}])
def test_a_document_that_was_printed_has_the_error_in_it(
    value: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of stdout there is one document: what was found, and that it is drift."""
    print_json(value)
    assert capsys.readouterr().out == ""
    end_document(error_to_json(DriftError("drift: gone", hint="2 in all"), 6))
    error = {"message": "drift: gone", "hint": "2 in all", "exit": 6}
    assert json.loads(capsys.readouterr().out) == {**value, "error": error}
    end_document()
    assert capsys.readouterr().out == ""


_WORDS = ["plan", "inspect", "explain", "status", "web", "--map", "-v", "list", "--", "--mode"]
_ANY = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9)


@given(st.lists(st.sampled_from(_WORDS) | _ANY, max_size=6))
@settings(deadline=None)
def test_whatever_is_typed_with_json_stdout_is_one_document(words: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main(["--json", *words])
        except SystemExit:  # --help, --version
            return
    document = json.loads(out.getvalue())
    assert document["schema"] == 1
    assert (code != 0) == ("error" in document)
    if code:
        assert document["error"]["exit"] == code
        assert err.getvalue().startswith(f"natkeep: {document['error']['message']}\n")


@pytest.mark.parametrize(
    ("words", "wants"),
    [
        ("status --json", True),
        ("--json status", True),
        ("status --js", True),
        ("status", False),
        ("status -", False),
        ("run web -- --json", False),
        ("run web --json -- criu", True),
    ],
)
def test_json_is_asked_for_before_what_is_criu_s(words: str, wants: bool) -> None:
    assert wants_json(words.split()) == wants


# ---- what has ended elsewhere ----------------------------------------------------------------


def moves(*states: tuple[str, str | None]) -> str:
    """A document of status with a move each, of one connection."""
    rows = [{"local": "10.2.0.10:80", "peer": peer, "state": state} for peer, state in states]
    return json.dumps({"schema": 1, "moves": [{"id": "web", "connections": [row]} for row in rows]})


def test_what_status_says_has_ended_is_read() -> None:
    text = moves(("10.1.0.2:1", "ended"), ("10.1.0.2:2", "live"), ("10.1.0.2:3", None))
    assert [str(each) for each in parse_ended(text.encode(), "x")] == ["10.1.0.2:1 > 10.2.0.10:80"]


@pytest.mark.parametrize("other", ["live", "one-way", None])
def test_what_lives_by_another_move_has_not_ended(other: str | None) -> None:
    text = moves(("10.1.0.2:1", "ended"), ("10.1.0.2:1", other))
    assert len(parse_ended(text.encode(), "x")) == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ("\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ("[]", "it is no document of schema 1"),
        ('{"schema": 2, "moves": []}', "it is no document of schema 1"),
        ('{"schema": 1}', "'moves' is missing"),
        ('{"schema": 1, "moves": [7]}', "'int' object is not subscriptable"),
        ('{"schema": 1, "error": {"message": "no move web in /run/natkeep"}}', "no move web in"),
        (moves(("10.1.0.2:1", "over")), "'over' is not a valid State"),
        (moves(("10.1.0.2", "ended")), "'10.1.0.2' has no port"),
        (moves(("[::1]:1", "ended")), "10.2.0.10:80 and [::1]:1 are of different families"),
    ],
)
def test_what_does_not_say_what_has_ended_is_one_line(text: str, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        parse_ended(text.encode("latin-1"), "x")
    assert str(caught.value).startswith(f"x does not tell what has ended: {reason}")
    with pytest.raises(ImageError, match="x: nested too deeply"):
        parse_ended(b"[" * 100_000, "x")
