"""The verb `setup` but for completion: what pip cannot bring to its place.

    --link         natkeep, natkeep-hook and natkeep-cni in /usr/local/bin, where sudo, ssh and
                   systemd look; the last also where container runtimes look, if they do here
    --units        the units of natkeep/systemd/, with the path of this natkeep; none is enabled
    --remove       what the two made, before `pip uninstall`

Rule: a file that setup did not make is never touched; all is looked at before anything is changed.
Debian's package needs none of it.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path

from natkeep.cli.output import print_json, talk
from natkeep.errors import RefusedError
from natkeep.installed import find_program
from natkeep.terminal import show
from natkeep.values import dataclass

BIN = "/usr/local/bin"
UNITS = "/etc/systemd/system"
CNI = ("/opt/cni/bin", "/usr/lib/cni")
"""Where container runtimes look for CNI's plugins; the second is Debian's."""

_OURS = "# Made by natkeep setup; natkeep setup --remove takes it away.\n"
_SOURCE = Path(__file__).parents[1] / "systemd"
_OF_A_FLEET = "natkeep-agent.service"
_HOMES = ("/home/", "/root/", "/run/user/")


@dataclass(frozen=True, slots=True)
class Piece:
    """A file that setup makes: a link to *target*, or with *text*."""

    path: Path
    target: str = ""
    text: str = ""

    def state(self) -> str:
        """`in place`, `missing`, `of another natkeep`, or `not ours`."""
        if not os.path.lexists(self.path):
            return "missing"
        if self.target:
            if os.path.realpath(self.path) == os.path.realpath(self.target):
                return "in place"
            named = self.path.is_symlink() and os.readlink(self.path).endswith(f"/{self.path.name}")
            return "of another natkeep" if named else "not ours"
        found = "" if self.path.is_symlink() else self.path.read_text(errors="replace")
        if not found.startswith(_OURS):
            return "not ours"
        return "in place" if found == self.text else "of another natkeep"

    def make(self) -> None:
        """Put it there, at once or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            if self.target:
                new.symlink_to(self.target)
            else:
                new.write_text(self.text, encoding="utf-8")
                new.chmod(0o644)
            new.replace(self.path)
        finally:
            new.unlink(missing_ok=True)


def set_up(args: argparse.Namespace) -> int:
    """Make what is asked for; without an option say what there is."""
    asked = [name for name in _PIECES if getattr(args, name)]
    states = {piece: piece.state() for name in asked or _PIECES for piece in _PIECES[name]()}
    done: list[Piece] = []
    try:
        if args.remove:
            done += _remove(states)
        elif asked:
            done += _make(states)
    except PermissionError as error:
        raise RefusedError(f"{error.filename}: {error.strerror}", hint="run it as root") from None
    _tell(args, states | dict.fromkeys(done, "removed" if args.remove else "made"), done)
    return 0


def _make(states: dict[Piece, str]) -> Iterator[Piece]:
    for piece, state in states.items():
        if state == "not ours":
            raise RefusedError(
                f"{piece.path} is there, and was not made by natkeep setup",
                hint="move it away first",
            )
    for piece, state in states.items():
        if state != "in place":
            piece.make()
            yield piece


def _remove(states: dict[Piece, str]) -> Iterator[Piece]:
    """Another natkeep's link stays, since it may be in use."""
    for piece, state in states.items():
        others = ("in place", "of another natkeep") if piece.text else ("in place",)
        if state in others and str(piece.path) != piece.target:
            piece.path.unlink()
            yield piece


def _tell(args: argparse.Namespace, states: dict[Piece, str], done: list[Piece]) -> None:
    if not states:
        talk(args, "natkeep: its package has put all in its place")
    if args.json:
        found = [{"path": str(piece.path), "state": state} for piece, state in states.items()]
        print_json({"schema": 1, "setup": found})
    else:
        show(f"{state:<19} {piece.path}" for piece, state in states.items())
    if not any(piece.text for piece in done):
        return
    talk(args, "natkeep: systemd is to be told: systemctl daemon-reload")
    if not args.remove:
        starts = [piece.path.name for piece in done if "[Install]" in piece.text]
        usual = " ".join(name for name in starts if name != _OF_A_FLEET)
        if usual:
            talk(args, f"natkeep: this has enabled none: systemctl enable --now {usual}")
        if _OF_A_FLEET in starts:
            talk(args, f"natkeep: on a node of a fleet: systemctl enable --now {_OF_A_FLEET}")


def _demand_program(name: str) -> str:
    path = find_program(name)
    if path is None:
        raise RefusedError(f"there is no {name} beside natkeep, nor in PATH")
    return os.path.abspath(path)


def _links() -> Iterator[Piece]:
    for name in ("natkeep", "natkeep-hook", "natkeep-cni"):
        program = _demand_program(name)
        packaged = os.path.dirname(program) in ("/usr/bin", "/usr/sbin")
        places = [] if packaged else [BIN]
        if name == "natkeep-cni":  # Debian's package has a link where Debian's runtimes look
            places += [each for each in CNI[: 1 if packaged else 2] if os.path.isdir(each)]
        yield from (Piece(Path(directory, name), target=program) for directory in places)


def _units() -> Iterator[Piece]:
    if not _SOURCE.is_dir():  # Debian's package has them where systemd looks
        return
    program = _demand_program("natkeep")
    for path in sorted(_SOURCE.glob("*.*")):
        text = _OURS + path.read_text(encoding="utf-8")
        quoted = program.replace("%", "%%")
        quoted = f'"{quoted}"' if " " in quoted else quoted
        text = re.sub(r"(?m)^(Exec\w+=)/usr/bin/env natkeep\b", rf"\1{quoted}", text)
        if os.path.realpath(program).startswith(_HOMES):
            text = text.replace("ProtectHome=yes", "ProtectHome=read-only")
        yield Piece(Path(UNITS, path.name), text=text)


_PIECES = {"link": _links, "units": _units}
