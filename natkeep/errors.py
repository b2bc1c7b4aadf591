"""the one hierarchy of errors, by whose fault it is; each carries a hint and an exit code.

Rule: every error that a user can meet is one of these. A door (cli, hook) prints
`natkeep: MESSAGE` and, when there is one, the hint in parentheses, and leaves with exit_code.
This file imports nothing, so that everything may import it.
"""

from __future__ import annotations


class NatkeepError(Exception):
    """Something went wrong that has no class of its own (exit 1)."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(in_one_line(message))
        self.hint = hint and in_one_line(hint)


def in_one_line(text: str) -> str:
    """*text* with escapes for what would end the line, or steer the terminal.

    Names out of images, lists and journals are told as they were found.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UsageError(NatkeepError):
    """The command line or a configuration file is wrong (exit 2)."""

    exit_code = 2


class ImageError(NatkeepError):
    """The image directory or the connections file cannot be read or understood (exit 3)."""

    exit_code = 3


class RefusedError(NatkeepError):
    """Understood, and refused: not authorised, or not something natkeep does (exit 4)."""

    exit_code = 4


class KernelError(NatkeepError):
    """The kernel said no; nothing was changed at the site (exit 5)."""

    exit_code = 5


class DriftError(NatkeepError):
    """A site no longer shows what was installed there (exit 6)."""

    exit_code = 6


class JournalError(NatkeepError):
    """The journal is locked, corrupt, of a newer version, or does not know the id (exit 7)."""

    exit_code = 7


class LeftoverError(NatkeepError):
    """Something was left behind; the message says what, the hint how to remove it (exit 8)."""

    exit_code = 8


class UnreachableError(NatkeepError):
    """A host that a migration needs cannot be reached (exit 9)."""

    exit_code = 9
