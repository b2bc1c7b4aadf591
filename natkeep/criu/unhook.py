"""what natkeep-hook leaves to be done when the process is back: `python3 -m natkeep.criu.unhook`.

The gates of the move that NATKEEP_ID names go out of all packets' way (kernel/passing.py), which
waits for the kernel; so it comes a moment after the restore, and nobody waits for it.
"""

from __future__ import annotations

import os
import signal
import time

_REST = 1.0
"""Seconds in which CRIU ends, and what it restored gets the processor."""
_LIMIT = 10  # seconds; then nothing stays


def main() -> None:
    """Do it, or nothing: it saves time later on."""
    from natkeep.errors import NatkeepError
    from natkeep.journal import StateDirectory
    from natkeep.kernel.linux import LinuxKernel
    from natkeep.lifecycle.verbs import Lifecycle

    signal.alarm(_LIMIT)
    time.sleep(_REST)
    try:
        state = StateDirectory(os.environ.get("NATKEEP_STATE_DIR") or None, create=False)
        Lifecycle(LinuxKernel(state.path), state).unhook(os.environ["NATKEEP_ID"])
    except NatkeepError:  # torn down meanwhile
        return


if __name__ == "__main__":
    main()
