"""natkeep/terminal.py: what reaches a terminal is printable, and everything passes there."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from natkeep.cli.output import end_document, print_json
from natkeep.terminal import say, say_exception, show

PACKAGE = Path(__file__).parent.parent / "natkeep"

UNPRINTABLE = {
    "escape code": ("e\x1b[31m", "e\\x1b[31m"),
    "C1 control": ("e\x9b31m", "e\\x9b31m"),
    "DEL": ("e\x7f", "e\\x7f"),
    "bell": ("e\x07", "e\\x07"),
    "newline": ("e\nnatkeep: all is well", "e\\nnatkeep: all is well"),
    "line separator": ("e\u2028f", "e\\u2028f"),
    "carriage return": ("e\rf", "e\\rf"),
    "bidirectional override": ("e\u202ef", "e\\u202ef"),
    "bidirectional isolate": ("e\u2066f", "e\\u2066f"),
    "zero width": ("e\u200bf", "e\\u200bf"),
    "no UTF-8": (os.fsdecode(b"e\xff"), "e\\udcff"),
    "a tag": ("e\U000e0041", "e\\U000e0041"),
}


@pytest.mark.parametrize("name", UNPRINTABLE)
def test_what_is_not_printable_is_shown_as_an_escape(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, told = UNPRINTABLE[name]
    show([raw, "the next"])
    say(raw)
    assert capsys.readouterr() == (f"{told}\nthe next\n", f"{told}\n")


@pytest.mark.parametrize("name", UNPRINTABLE)
def test_json_says_the_same_name_and_stays_json(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, _ = UNPRINTABLE[name]
    print_json({"netns": raw})
    end_document()
    out = capsys.readouterr().out
    assert json.loads(out) == {"netns": raw}
    assert out.isascii()
    assert all(line.isprintable() for line in out.split("\n"))


def test_letters_of_other_languages_are_shown_where_the_encoding_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = {}
    for encoding in ("utf-8", "ascii"):
        file = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding=encoding))
        show(["naïve-名"])
        shown[encoding] = file.getvalue().decode(encoding)
    assert shown == {"utf-8": "naïve-名\n", "ascii": "na\\xefve-\\u540d\n"}


def test_a_stream_that_was_closed_at_the_start_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    show(["lost"])
    say("lost")


def test_a_traceback_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError("of a name: \x1b[2J\u202e")
    say_exception(ValueError, error, None)
    assert capsys.readouterr().err == "ValueError: of a name: \\x1b[2J\\u202e\n"


def test_a_fault_of_natkeeps_own_is_told_so() -> None:
    program = (
        "import natkeep.cli as c\n"
        "def fail(*_): raise ValueError('\\x1b[2J')\n"
        "c.make_parser = fail\n"
        "c.program()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: \\x1b[2J"


def find_writers(path: Path) -> list[int]:
    """Lines of *path* that write to a standard stream in another way."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        streams = ("sys.stdout.write", "sys.stderr.write", "sys.stdout.buffer", "sys.stderr.buffer")
        if called in ("print", "input", "warnings.warn", *streams):
            found.append(node.lineno)
    return found


def test_nothing_else_writes_to_a_standard_stream() -> None:
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "terminal.py"]
    assert [f"{path}:{line}" for path in paths for line in find_writers(path)] == []
