"""the faults: named points at which natkeep is made to die or to fail, so that this can be tested.

    NATKEEP_FAULT=POINT[:KIND][,POINT[:KIND]...]        read once, when this file is imported

    kill          SIGKILL to itself, the default; a process has no last word then
    error         FaultError, which is no NatkeepError: as a bug in natkeep would raise
    errno[=NAME]  OSError, as the kernel or the disk would: ENOSPC at the journal's points, ENOMEM
                  at all others, or the one that is named

Rule: what is not armed costs one comparison. POINTS is the closed list of all points: a fault
that is not on it is refused (demand_known), and tests/test_faults.py holds it against the code.
A fault can make natkeep do less than it was asked to, never something else. natkeep-hook takes no
orders to fail: it forgets the variable first of all.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from natkeep.errors import UsageError

VARIABLE = "NATKEEP_FAULT"
KINDS = ("kill", "error", "errno")

STEPS = (
    *("InstallGate", "FillSet", "RaiseLoopback", "AddAddress", "InstallTranslation"),
    *("AddRules", "AddRoute"),
    *("InstallReception", "ForgetCalls", "TranslateErrors", "PurgeEntries", "InsertEntries"),
    *("HoldListeners", "HoldSegments", "GuardSite", "InstallResets", "TakeOverLock"),
    *("PassKept", "SwitchForwarding"),
    *("OpenEarly", "OpenGate", "SendResets"),
)
_NEVER_REPAIRED = ("HoldSegments", "TakeOverLock", "AddRoute")
_FILES = ("connections", "changed", "journal", "ready", "seen")

# Where a point is of several kinds of thing, those are its names' second halves.
PLACES: dict[str, tuple[str, ...]] = {
    # The journal: each file is created, written, fsynced, renamed; a line is appended, or half.
    **dict.fromkeys(("locked", "journal-begin", "journal-begun"), ()),
    **dict.fromkeys(("journal-create", "journal-written"), _FILES),
    **dict.fromkeys(("journal-rename", "journal-renamed"), _FILES),
    **dict.fromkeys(
        ("journal-append", "journal-torn", "journal-appended"),
        ("doing", "done", "undone", "changed"),
    ),
    **dict.fromkeys(("journal-remove", "journal-removed", "journal-forgotten"), ()),
    # A step: nothing is on disk, `doing` is, the kernel did it, `done` is on disk; and back.
    **dict.fromkeys(("apply", "begun", "applied", "done", "revert", "reverted", "undone"), STEPS),
    # repair does a step again; gc has cleared something.
    **dict.fromkeys(
        ("repair", "repair-begun", "repaired"),
        tuple(step for step in STEPS if step not in _NEVER_REPAIRED),
    ),
    "collected": ("move", "table"),
    # In the middle of a step.
    "withdrawn": ("gate", "translation", "reception"),
    "half": ("purge", "insert", "delete", "give-back", "forget", "lock"),
    **dict.fromkeys(
        ("between-chunks", "address-added", "route-added", "rule-added", "loopback-lowered"), ()
    ),
    **dict.fromkeys(("insert-counting", "insert-whole"), ()),
    # In the middle of a verb.
    **dict.fromkeys(("handed-over", "quiesce-held", "hold-again", "replace-begin"), ()),
    **dict.fromkeys(("replace-prepared", "replace-noted", "change", "changed", "widened"), ()),
    # An undo is about to drop what may still come to the destination.
    "drop": (),
}
POINTS = tuple(
    f"{place}-{of}" if of else place for place, several in PLACES.items() for of in several or ("",)
)


class FaultError(Exception):
    """What a fault of kind `error` raises."""


def _parse(text: str) -> dict[str, str]:
    """Each point that *text* names, and the kind of its fault; nothing is checked."""
    found = {}
    for fault in text.split(","):
        point, _, kind = fault.partition(":")
        found[point] = kind or "kill"
    return found


_ARMED = _parse(os.environ[VARIABLE]) if VARIABLE in os.environ else None


def demand_known() -> None:
    """UsageError when NATKEEP_FAULT names a point or a kind that there is not."""
    import errno

    for point, kind in (_ARMED or {}).items():
        if point not in POINTS:
            raise UsageError(
                f"{VARIABLE}: there is no point {point!r}", hint="natkeep/faultpoints.py"
            )
        name, _, number = kind.partition("=")
        if name not in KINDS or (number and name != "errno"):
            raise UsageError(f"{VARIABLE}: {kind!r} is none of {', '.join(KINDS)}")
        if number and number not in errno.errorcode.values():
            raise UsageError(f"{VARIABLE}: there is no errno {number!r}")


def reach(point: str, of: str = "", last: Callable[[], object] | None = None) -> None:
    """Here a fault may strike; of: which of several, as a step's kind.

    last: what is done just before, where a fault in the middle of something is meant.
    """
    if _ARMED is None:
        return
    name = f"{point}-{of}" if of else point
    kind = _ARMED.get(name)
    if kind is not None:
        if last is not None:
            last()
        _strike(name, kind)


def _strike(name: str, kind: str) -> None:
    import errno
    import signal

    os.write(2, f"natkeep: fault {name}:{kind}\n".encode())
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "error":
        raise FaultError(f"fault at {name}")
    usual = "ENOSPC" if name.startswith("journal-") else "ENOMEM"
    number = getattr(errno, kind.partition("=")[2] or usual)
    raise OSError(number, os.strerror(number))
