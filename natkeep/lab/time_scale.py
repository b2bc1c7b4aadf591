"""How many times slower than usual this machine is: what every deadline of lab and tests is times.

    NATKEEP_TIME_SCALE=12 natkeep lab run server_moves_to_new_address      in an emulated machine

Rule: deadlines are stretched, and waits that show that nothing comes. What is to be late, and
what a protocol's own timers say, is not.
"""

from __future__ import annotations

import os
import re

from natkeep.errors import UsageError

VARIABLE = "NATKEEP_TIME_SCALE"


def scaled(seconds: float) -> float:
    """*seconds* on a usual machine, on this one; UsageError where the variable has no number."""
    text = os.environ.get(VARIABLE) or "1"
    if not re.fullmatch(r"\d{1,3}(\.\d{1,3})?", text, re.ASCII) or not 1 <= float(text) <= 100:
        raise UsageError(f"{VARIABLE}: {text!r} is not a number from 1 to 100")
    return seconds * float(text)
