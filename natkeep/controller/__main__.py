"""`python -m natkeep.controller`: runs the controller, until a signal ends it.

The store is NATKEEP_STORE's or that of /etc/natkeep/natkeep.toml, as for `natkeep fleet`.
"""

from __future__ import annotations

import argparse
import os
import sys

from natkeep import policy
from natkeep.errors import NatkeepError
from natkeep.fleet.stores import open_store
from natkeep.terminal import say


def main() -> int:
    """Exit codes as natkeep's: 2 for a store that is none, 1 without kopf."""
    parser = argparse.ArgumentParser(
        prog="python -m natkeep.controller", description="Realise ConnectionMoves by a fleet."
    )
    parser.add_argument(
        "--namespace", action="append", default=[], help="only of these; else of all"
    )
    args = parser.parse_args()
    try:
        settings = policy.read_policy().agent
        store = open_store(os.environ.get("NATKEEP_STORE") or settings.store, settings)
        try:
            from natkeep.controller.operator import run
        except ImportError as error:
            raise NatkeepError(f"{error}", hint="pip install 'natkeep[kubernetes]'") from None
        run(store, tuple(args.namespace))
    except NatkeepError as error:
        hint = f" ({error.hint})" if error.hint else ""
        say(f"natkeep: {error}{hint}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
