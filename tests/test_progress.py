"""The bar of a copy: at a terminal alone, and only where the copy takes a while."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

SHOWN = """
import argparse, time
from natkeep.cli import progress
from natkeep.terminal import say
progress._DELAY = {delay} or progress._DELAY
bar = progress.make_bar(argparse.Namespace(quiet={quiet}, json={json}))
print(bar is not None, flush=True)
for number in range({pieces}) if bar else ():
    bar.show(number * 1_000_000, 20_000_000 if number > 5 else None)
    if number == 10:
        with bar.aside():
            say("a line")
    time.sleep(0.05)
if bar:
    bar.end()
    bar.end()
"""


def run(*, terminal: bool = True, **values: object) -> tuple[str, str]:
    """What SHOWN has said on stdout, and on stderr."""
    code = SHOWN.format(**{"quiet": False, "json": False, "pieces": 16, "delay": None, **values})
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (25, 80))
    try:
        done = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
            stderr=theirs if terminal else subprocess.PIPE,
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 4096):
                shown += piece
        except OSError:  # the end of the other side
            pass
        out, err = done.communicate()
        assert done.returncode == 0
    finally:
        os.close(ours)
    return out.strip(), shown.decode() if terminal else err


def test_a_bar_goes_on_and_is_gone_in_the_end() -> None:
    there, shown = run()
    assert there == "True"
    assert "copy: " in shown
    assert "MB" in shown
    assert "%" in shown  # once it is known of how much
    lines = shown.replace("\r\n", "\n").split("\n")
    assert lines[0].rpartition("\r")[2] == "a line"
    assert shown.rpartition("\r")[0].rpartition("\r")[2].strip() == ""


def test_a_copy_that_is_over_at_once_shows_none() -> None:
    assert run(pieces=2, delay=60) == ("True", "")  # s, on however busy a machine


@pytest.mark.parametrize(
    "values", [{"terminal": False}, {"quiet": True}, {"json": True}], ids=lambda each: str(each)
)
def test_without_a_person_at_a_terminal_there_is_none(values: dict) -> None:
    assert run(**values) == ("False", "")


def test_tqdm_is_not_imported_for_other_verbs_nor_without_a_terminal(tmp_path: Path) -> None:
    """It takes longer than a blackout may."""
    code = (
        "import sys; from natkeep.cli import main; "
        "main(['migrate', 'a:1', 'b', '--ssh', 'false', '--state-dir', sys.argv[1]]); "
        "print('tqdm' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
