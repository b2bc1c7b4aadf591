"""The verb `setup`: a shell's completion; installation.py has the links and the units.

The scripts are shtab's, made of the parser, with what it cannot know: ids come from the state
directory, codes and roles from their tables. Nothing else imports shtab, and no move needs it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from natkeep.cli.output import print_verb
from natkeep.cli.parser import SHELLS, make_parser
from natkeep.errors import NatkeepError, UsageError
from natkeep.plan.findings import CATALOGUE
from natkeep.plan.roles import Role
from natkeep.terminal import show

_IDS = """sh -c 'cd "${NATKEEP_STATE_DIR:-/run/natkeep}" 2>/dev/null && \
for f in *.journal; do [ ! -e "$f" ] || echo "${f%.journal}"; done'"""
_MIGRATIONS = """sh -c 'for d in "${NATKEEP_STATE_DIR:-/var/lib/natkeep}" \
"${XDG_STATE_HOME:-$HOME/.local/state}/natkeep"; do for f in "$d"/migrations/*.json; do \
f=${f##*/}; [ "$f" = "*.json" ] || echo "${f%.json}"; done; done'"""
_SCENARIOS = """sh -c 'natkeep lab list | cut -d" " -f1'"""


def setup(args: argparse.Namespace) -> int:
    """Print the completion of a shell, or write it where the shell looks for it."""
    others = args.link or args.units or args.remove
    if args.completion is None and not args.install:
        from natkeep.cli.installation import set_up

        return set_up(args)
    if args.completion is None or others:
        raise UsageError("--completion [--install] stands alone", hint="natkeep help setup")
    shell = args.completion or os.path.basename(os.environ.get("SHELL", ""))
    if shell not in SHELLS:
        raise UsageError(
            f"no completion for the shell {shell!r}", hint=f"one of {', '.join(SHELLS)}"
        )
    script = make_completion(shell)
    if not args.install:
        show(script.rstrip("\n").split("\n"))
        return 0
    place = _find_place(shell)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(script, encoding="utf-8")
    args.id = None
    print_verb(args, f"{shell} completes natkeep's words by {place}", path=str(place))
    return 0


def _find_place(shell: str) -> Path:
    """Where *shell* looks for the completions of programs, all users' if we are root."""
    below = {  # as in scripts/wheel_pages.py
        "bash": "bash-completion/completions/natkeep",
        "zsh": "zsh/site-functions/_natkeep",
        "fish": "fish/vendor_completions.d/natkeep.fish",
    }[shell]
    if os.geteuid() == 0:
        return Path("/usr/local/share", below)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share", below)


def make_completion(shell: str) -> str:
    """The script by which *shell* completes natkeep's verbs, options and ids."""
    try:
        import shtab
    except ImportError:
        raise NatkeepError(
            "the completion is made by shtab, which is not installed",
            hint="pip install 'natkeep[completion]', beside this natkeep",
        ) from None
    parser = make_parser()
    _mark(parser, shtab.FILE, shtab.DIRECTORY)
    return str(shtab.complete(parser, shell))


def _mark(parser: argparse.ArgumentParser, file: Any, directory: Any) -> None:
    """Say at each option and argument what completes it, by its metavar."""
    roles = " ".join(f"{role} {role}=" for role in Role)
    kinds = {
        "FILE": file, "PATH": file, "DIR|TAR": file, "DIR": directory,
        "ID": _by_command("ids", _IDS),
        "SCENARIO": _by_command("scenarios", _SCENARIOS),
        "CODE": _by_command("codes", f"printf '%s\\n' {' '.join(CATALOGUE)}"),
        "ROLE[=NETNS]": _by_command("roles", f"printf '%s\\n' {roles}"),
        "SHELL": _by_command("shells", f"printf '%s\\n' {' '.join(SHELLS)}"),
    }  # fmt: skip
    if parser.prog in ("natkeep migrate", "natkeep finish"):
        kinds["ID"] = _by_command("migrations", _MIGRATIONS)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                _mark(verb, file, directory)
        elif action.metavar in kinds:
            action.complete = kinds[str(action.metavar)]  # type: ignore[attr-defined]


def _by_command(name: str, command: str) -> dict[str, Any]:
    """What shtab is told of words that *command* prints, which each of the shells can run."""
    name = f"_natkeep_{name}"
    return {
        "bash": name, "zsh": name, "fish": f"({name})",
        "preamble": {
            "bash": f'{name}() {{ compgen -W "$({command})" -- "$1"; }}',
            "zsh": f'{name}() {{ compadd "$@" -- $({command}); }}',
            "fish": f"function {name}\n  {command}\nend",
        },
    }  # fmt: skip
