"""The man pages say of each verb what the parser and docs/reference.md say, in right roff."""

from __future__ import annotations

import argparse
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from natkeep.cli import make_parser

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts/make_man.py"))
PAGES: dict[str, str] = SCRIPT["make_pages"]()
VERBS: dict[str, argparse.ArgumentParser] = dict(SCRIPT["walk"](make_parser()))
convert: Callable[[str], list[str]] = SCRIPT["convert"]


def read(page: str) -> str:
    """The page without its marks, in one line."""
    text = re.sub(r"\\f.|\\&", "", PAGES[page]).replace("\\-", "-").replace("\\(aq", "'")
    return " ".join(text.replace("\\e", "\\").split())


@pytest.mark.parametrize("topic", VERBS)
def test_each_verb_has_a_page_with_all_that_is_said_of_it(topic: str) -> None:
    page = read(f"man1/natkeep-{topic.replace(' ', '-')}.1")
    rows = re.findall(rf"^\| `natkeep {topic}\b.*\| (.+?) \|$", REFERENCE, re.MULTILINE)

    for action in VERBS[topic]._actions:
        everywhere = action.dest in ("help", "json", "quiet", "verbose", "no_color", "state_dir")
        for name in () if everywhere else action.option_strings:
            assert f".TP {name}" in page or f", {name}" in page
    assert rows
    for row in rows if topic != "lab" else ():
        words = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", row).replace("`", "")
        assert words.replace("\\|", "|") in page
    assert ".SH EXAMPLES" in page
    assert "natkeep (1)" in page


REFERENCE = (ROOT / "docs/reference.md").read_text()


def test_the_first_page_names_each_other_the_exit_codes_and_what_all_verbs_take() -> None:
    page = read("man1/natkeep.1")

    for topic in VERBS:
        assert f"natkeep-{topic} (1)" in page or topic.startswith("lab ")
    assert all(f".TP {code} " in page for code in range(10))
    assert all(option in page for option in ("--json", "--state-dir", "--no-color", "--version"))


def test_the_hook_and_the_configuration_have_pages() -> None:
    hook, configuration = read("man8/natkeep-hook.8"), read("man5/natkeep.toml.5")
    variables = set(
        re.findall(r"NATKEEP_[A-Z]+", (ROOT / "natkeep/criu/environment.py").read_text())
    )

    assert all(variable in hook for variable in variables - {"NATKEEP_FAULT"})
    keys = ("allow_old", "allow_new", "max_connections", "[hook]", "map", "mode", "state_dir")
    assert all(key in configuration for key in keys)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_roff_without_a_fault(page: str) -> None:
    if shutil.which("groff") is None:
        pytest.skip("no groff")
    done = subprocess.run(
        ["groff", "-man", "-ww", "-z", "-Tutf8"], input=PAGES[page], capture_output=True, text=True
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "```" not in PAGES[page]
    assert "<!" not in PAGES[page]
    assert "|---" not in PAGES[page]
    assert PAGES[page].isascii()


def test_markdown_becomes_roff() -> None:
    text = "A `co-de` **b** *i j*\n[link](x.md#y).\n\n```sh\n.x \\\n\n'y\n```\n"
    text += "\n| a | b |\n|---|---|\n| `c\\|d` | e |\n"

    assert list(convert(text + "\n- one\n- two\n  more\n")) == [
        *(".PP", "A \\fBco\\-de\\fR \\fBb\\fR \\fIi j\\fR", "link."),
        *(".PP", ".in +4", ".nf", "\\&.x \\e", "\\&", "\\(aqy", ".fi", ".in"),
        *(".TP", "\\fBc|d\\fR", "e"),
        *(".PP", ".IP \\(bu 2", "one", ".IP \\(bu 2", "two", "more"),
    ]  # fmt: skip
