"""the action script behind its shell front: opens the prepared move when the sockets are there.

CRIU starts `natkeep-hook` at each of its points without arguments, with stdin closed; what is
printed goes to CRIU's log. At `post-restore` all sockets exist, still in repair, and no task
runs: it is the last point at which a non-zero exit ends the restore without harm (the tasks are
killed silently and the image can be restored again).

Rule: orders come from the environment, never from the image; what is not ours is left with 0
before anything else is imported.
"""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Exit code for CRIU: 0, or that of the error that is printed."""
    move_id = os.environ.get("NATKEEP_ID")
    if os.environ.get("CRTOOLS_SCRIPT_ACTION") != "post-restore" or not move_id:
        return 0
    from natkeep.errors import NatkeepError

    try:
        return _open(move_id)
    except NatkeepError as error:
        hint = f" ({error.hint})" if error.hint else ""
        print(f"natkeep-hook: {error}{hint}", file=sys.stderr)
        return error.exit_code


def _open(move_id: str) -> int:
    from natkeep.journal import StateDirectory
    from natkeep.kernel.linux import LinuxKernel
    from natkeep.lifecycle import Lifecycle

    Lifecycle(LinuxKernel(), StateDirectory(create=False)).open(move_id)
    print(f"natkeep-hook: {move_id}: gate open", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
