"""tests of --json: errors in the one document on stdout, and JSON from verb to verb."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natkeep import cli
from natkeep.cli.output import end_document, error_to_json, print_json, wants_json
from natkeep.errors import DriftError

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
