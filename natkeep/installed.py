"""Where the programs of this installation are: beside the one that runs, whatever PATH says."""

from __future__ import annotations

import os
import shutil
import sys


def find_program(name: str) -> str | None:
    """The path of one of natkeep's programs, of this installation; None where there is none.

    Beside the program that was started; beside its interpreter (a virtual environment, when natkeep
    was started by `python -m`); else that of the path. Not in this order, `pip install --user`,
    whose interpreter is the system's, would find Debian's.
    """
    started = sys.argv[0] if os.path.basename(sys.argv[0]) == "natkeep" else ""
    for beside in (os.path.realpath(started) if started else "", sys.executable):
        path = os.path.join(os.path.dirname(beside), name)
        if beside and os.access(path, os.X_OK):
            return path
    return shutil.which(name)
