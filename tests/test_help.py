"""What natkeep says of itself: help of each verb, what a typo may have meant, the completion."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from natkeep import cli
from natkeep.cli.parser import SHELLS, VERBS
from natkeep.cli.setup import make_completion
from natkeep.cli.usage import EXAMPLES, GROUPS

PARSER = cli.make_parser()


def walk(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from walk(verb)


PARSERS = {parser.prog.removeprefix("natkeep").strip(): parser for parser in walk(PARSER)}


def test_each_verb_stands_in_one_group() -> None:
    grouped = [verb for _, verbs in GROUPS for verb in verbs]

    assert sorted(grouped) == sorted([*VERBS, "lab"])


@pytest.mark.parametrize("topic", [topic for topic in PARSERS if topic])
def test_each_verb_has_examples_that_are_understood(topic: str) -> None:
    assert EXAMPLES[topic]
    for what, command in EXAMPLES[topic]:
        words = shlex.split(command.partition(" > ")[0])
        words = words[words.index("natkeep") + 1 :]  # behind ssh
        assert what
        assert " ".join(words).startswith(topic.split()[0])
        assert cli.make_parser(words).parse_args(words).run


@pytest.mark.parametrize("topic", PARSERS)
def test_each_option_has_a_text(topic: str) -> None:
    silent = [
        action.option_strings or action.metavar
        for action in PARSERS[topic]._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]

    assert silent == []


@pytest.mark.parametrize(
    ("words", "code"),
    [([], 2), (["help"], 0), (["--help"], 0), (["-q", "--help", "open"], 0)],
    ids=["alone", "help", "--help", "--help verb"],
)
def test_natkeep_alone_lists_its_verbs_in_groups(
    words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone it is no success: a script whose variable is empty is to notice."""
    try:
        done = cli.main(words)
    except SystemExit as left:
        done = int(left.code or 0)

    out, err = capsys.readouterr()
    assert (done, err) == (code, "")
    assert all(f"\n{title}:\n" in out for title, _ in GROUPS)
    assert all(re.search(rf"^  {verb} +\w", out, re.MULTILINE) for verb in (*VERBS, "lab"))
    assert out.count("--state-dir DIR") == 2  # usage and text


@pytest.mark.parametrize("topic", [topic for topic in PARSERS if topic])
def test_help_of_a_verb_is_its_help_with_examples(
    topic: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["help", *topic.split()]) == 0
    out = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*topic.split(), "--help"])

    assert capsys.readouterr().out == out
    assert out.startswith(f"usage: natkeep {topic} ")
    assert all(f"  # {what}\n  {command}\n" in out for what, command in EXAMPLES[topic])


PUT = "put -- before criu: natkeep run ID OPTIONS -- criu restore ..."
RUN = "run web --map 10.2.0.10=10.3.0.20"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("stauts web", "no verb 'stauts'", "did you mean status; natkeep help lists them"),
        ("zzz", "no verb 'zzz'", "natkeep help lists them"),
        # `open` is a word of the line, and the only verb whose parser is made
        ("stauts open", "no verb 'stauts'", "did you mean status; natkeep help lists them"),
        ("lab rnu x", "no verb 'lab rnu'", "did you mean run; natkeep help lab lists them"),
        ("help teardwn", "no verb 'teardwn'", "did you mean teardown; natkeep help lists them"),
        ("help open web", "natkeep open has no verbs: 'web'", "natkeep help open"),
        (
            "open web --imgae x", "unrecognized arguments: --imgae x",
            "did you mean --image; natkeep open --help",
        ),
        (
            "lab run x --pcpa=d", "unrecognized arguments: --pcpa=d",
            "did you mean --pcap; natkeep lab run --help",
        ),
        ("open web api", "unrecognized arguments: api", "natkeep open --help"),
        (f"{RUN} criu restore -D x", "unrecognized arguments: -D x", PUT),
        (f"{RUN} criu restore -v4", "argument -v/--verbose: ignored explicit argument '4'", PUT),
        (f"{RUN} -- criu restore -D x --fast", "", ""),
        (
            "setup --link --completion", "--completion [--install] stands alone",
            "natkeep help setup",
        ),
        (
            "explain pere-on-link", "no finding has the code 'pere-on-link'",
            "did you mean peer-on-link",
        ),
        (
            "setup --completion csh", "no completion for the shell 'csh'",
            "one of bash, zsh, fish",
        ),
    ],
)  # fmt: skip
def test_a_typo_is_told_what_may_have_been_meant(
    words: str, message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not message:
        assert cli.make_parser(words.split()).parse_args(words.split()).criu[-1] == "--fast"
        return
    assert cli.main(words.split()) == 2

    assert capsys.readouterr().err == f"natkeep: {message}\n  ({hint})\n"


def test_only_the_parsers_of_verbs_that_are_named_are_made() -> None:
    """Each takes half a millisecond, for which a restore may wait."""
    parser = cli.make_parser(["open", "web"])
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]

    assert [list(action.choices) for action in actions] == [["open"]]


# ---- completion ----------------------------------------------------------------------------------

ASK = {
    "bash": """source ./script
COMP_WORDS=($WORDS "$LAST"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
_shtab_natkeep natkeep "$LAST"; printf '%s\\n' "${COMPREPLY[@]}" """,
    "fish": """source ./script
complete -C "$WORDS $LAST" | string replace -r '\\t.*' ''""",
}


def complete(shell: str, words: str, place: Path) -> list[str]:
    (place / "script").write_text(make_completion(shell))
    words, _, last = words.rpartition(" ")
    done = subprocess.run(
        [shell, "-c", ASK[shell]], cwd=place, text=True, capture_output=True, timeout=30,
        env={"WORDS": words, "LAST": last, "NATKEEP_STATE_DIR": str(place), "HOME": str(place),
             "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("shell", ASK)
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("natkeep prep", ["prepare"]),
        ("natkeep open ", ["api_2", "web"]),
        ("natkeep teardown w", ["web"]),
        ("natkeep finish ", ["far"]),
        ("natkeep prepare web --liv", ["--live"]),
        ("natkeep prepare web --mode statel", ["stateless"]),
        ("natkeep prepare web --site gate", ["gateway", "gateway="]),
        ("natkeep explain peer-on", ["peer-on-link"]),
        ("natkeep lab r", ["run"]),
        ("natkeep setup --completion z", ["zsh"]),
    ],
)
def test_a_shell_completes_verbs_options_and_ids(
    shell: str, words: str, wanted: list[str], tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    (tmp_path / "migrations").mkdir()
    for name in ("web.journal", "api_2.journal", "lock", "migrations/far.json"):
        (tmp_path / name).touch()

    assert complete(shell, words, tmp_path) == wanted


def test_zsh_takes_the_completion(tmp_path: Path) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("no zsh")
    (tmp_path / "_natkeep").write_text(make_completion("zsh"))
    (tmp_path / "web_1.journal").touch()
    ask = """fpath=($PWD $fpath); autoload -Uz compinit; compinit -D -u
print $_comps[natkeep]; functions[_arguments]=:; source ./_natkeep
compadd() { print -r -- $@ }; _natkeep_ids"""
    done = subprocess.run(
        ["zsh", "-f", "-c", ask], cwd=tmp_path, text=True, capture_output=True, timeout=30,
        env={"NATKEEP_STATE_DIR": str(tmp_path), "PATH": os.environ["PATH"]},
    )  # fmt: skip

    assert (done.stdout.split(), done.stderr) == (["_natkeep", "--", "web_1"], "")


@pytest.mark.parametrize("shell", SHELLS)
def test_setup_prints_the_completion_or_puts_it_where_the_shell_looks(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 1000)

    assert cli.main(["setup", "--completion"]) == 0
    printed = capsys.readouterr().out
    assert cli.main(["setup", "--completion", shell, "--install"]) == 0

    (installed,) = (path for path in tmp_path.rglob("*natkeep*") if path.is_file())
    assert printed == make_completion(shell).rstrip("\n") + "\n"
    assert installed.read_text().rstrip("\n") == printed.rstrip("\n")
    said = f"natkeep: {shell} completes natkeep's words by {installed}\n"
    assert capsys.readouterr().err == said
