"""Which files of a state directory no journal knows, and whether natkeep may remove them there.

A directory that natkeep has made, or found empty, has a file `lock` that says so (MARK). In another
one a file may be anybody's, whatever its name is.

Rule: nothing is changed here.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator

from natkeep.errors import JournalError
from natkeep.plan.move import ID
from natkeep.state.files import MARK, StateFiles

_FILE = re.compile(
    rf"\.?(?P<id>{ID})"
    r"\.(connections|changed|ready|seen|asked|told|journal)(?P<new>\.new)?"
)


def find_strays(files: StateFiles, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Files of moves that are not *known*, and what a killed writer has not renamed: id and name.

    A file of the second kind may be of a writer that lives, unless the move's lock is held.
    """
    for name in sorted(files.names()):
        match = _FILE.fullmatch(name)
        if match and (match["new"] or match["id"] not in known):
            yield match["id"], name


def is_marked(files: StateFiles) -> bool:
    """Whether natkeep has made the directory, or found it empty."""
    try:
        return files.read("lock") == MARK
    except (OSError, JournalError):
        return False


def refuse_foreign_part(path: str) -> None:
    """JournalError unless all that leads to *path* is root's (or ours), and no other can write it.

    Another user could have put the directory there, or another in its place.
    """
    if part := _find_foreign_part(path):
        raise JournalError(
            f"the state directory {path}: {part}",
            hint="nothing is cleared there: what is in it may be another user's",
        )


def _find_foreign_part(path: str) -> str:
    trusted = {0, os.geteuid()}
    for whole in dict.fromkeys((os.path.abspath(path), os.path.realpath(path))):
        part = "/"
        for name in ("", *whole.split("/")[1:]):
            part = os.path.join(part, name)
            status = os.lstat(part)
            if status.st_uid not in trusted:
                return f"{part} belongs to uid {status.st_uid}"
            loose = status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode)
            if loose and not status.st_mode & stat.S_ISVTX:
                return f"{part} can be written by others"
    return ""
