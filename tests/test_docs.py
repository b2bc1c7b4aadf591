"""README names every verb, option and exit code that there is, and none that there is not."""

import argparse
import re
from pathlib import Path

import pytest

from natkeep import errors
from natkeep.cli import make_parser

README = (Path(__file__).parent.parent / "README.md").read_text()


def verbs(parser: argparse.ArgumentParser, prefix: str = "natkeep"):
    """Each verb's full name and its parser, sub-verbs included."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                yield f"{prefix} {name}", verb
                yield from verbs(verb, f"{prefix} {name}")


PARSER = make_parser()
VERBS = dict(verbs(PARSER))
OPTIONS = sorted(
    {
        option
        for parser in (PARSER, *VERBS.values())
        for action in parser._actions
        for option in action.option_strings
        if option not in ("-h", "--help")
    }
)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "natkeep lab"])
def test_readme_names_each_verb(verb: str) -> None:
    """A verb lands with its README line."""
    assert f"`{verb}" in README


@pytest.mark.parametrize("option", OPTIONS)
def test_readme_names_each_option(option: str) -> None:
    """An option lands with its README line."""
    assert re.search(rf"[`\[( ]{re.escape(option)}[`\] )]", README)


def test_readme_names_no_option_that_there_is_not() -> None:
    """What the tables of commands and options promise exists."""
    tables = [line for line in README.splitlines() if line.startswith("| `")]
    promised = set(re.findall(r"--[a-z][a-z-]+", "\n".join(tables)))
    foreign = {"--action-script"}

    assert promised - foreign <= set(OPTIONS)


@pytest.mark.parametrize("verb", list(VERBS))
def test_each_verb_has_help(verb: str) -> None:
    """`natkeep --help` says what each verb is for."""
    parents = verb.rsplit(" ", 1)[0]
    parser = PARSER if parents == "natkeep" else VERBS[parents]
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))

    assert any(c.dest == verb.rsplit(" ", 1)[1] and c.help for c in action._choices_actions)


def test_readme_lists_each_exit_code() -> None:
    """The table of exit codes is that of errors.py."""
    listed = {int(code) for code in re.findall(r"^\| (\d) \|", README, re.MULTILINE)}
    classes = [c for c in vars(errors).values() if isinstance(c, type)]

    assert listed == {0} | {c.exit_code for c in classes if issubclass(c, errors.NatkeepError)}
