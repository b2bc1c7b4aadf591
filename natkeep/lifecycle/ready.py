"""the file ID.ready: all that the hook needs to open a prepared move, in the form it needs it.

natkeep/criu/natkeep_hook_open.py reads it, in a tenth of the time that reading the journal, making
the plan and packing the messages again would take; all that is inside the blackout. ASCII lines:

    natkeep-ready 3
    boot BOOT ID
    journal SIZE                    of ID.journal, in octets, when prepare had ended: any verb
                                    that came later has written to it, and this file holds no more
    image RUN ID                    of the dump; - where none is known
    home DEVICE:INODE               a namespace that the restored tree may be in; one or more
    site DEVICE:INODE LAST HEX PASS UNHOOKING PATH
                                    a site's namespace, in order of opening: what is sent there and
                                    the sequence number of its last message; what is tried before
                                    that, with one message more, or -; what follows that once nobody
                                    waits, or - (kernel/passing.py); where the namespace is found
                                    a gateway that prepare has opened is behind the others, and
                                    nothing but the last is sent there
    hold NAME                       the holder's socket in the state directory, if there is one
    doing RECORD, done RECORD       what the journal notes before and after, a line a step
    end

Rule: it saves time and decides nothing. Without it, or where it does not fit, the move is opened
as ever.
"""

from __future__ import annotations

from contextlib import suppress

from natkeep.errors import JournalError
from natkeep.kernel.interface import Kernel, Packed
from natkeep.kernel.netns import path_of
from natkeep.plan.move import Site
from natkeep.plan.replay import holder_name
from natkeep.plan.steps import Identity, OpenEarly, OpenGate, Plan, Prior
from natkeep.state.codec import record_line
from natkeep.state.journal import Journal


def write_ready(kernel: Kernel, journal: Journal, plan: Plan) -> None:
    """Leave ID.ready beside the journal of a move that has just been prepared, closed."""
    lines = [
        "natkeep-ready 3",
        f"boot {journal.boot}",
        f"journal {journal.size()}",
        f"image {journal.image or '-'}",
    ]
    lines += [f"home {_name(journal.identity(home))}" for home in plan.move.homes()]
    for step in plan.open:
        packed = kernel.pack_open(step) if isinstance(step, OpenGate) else None
        path = path_of(step.site.netns)
        if packed is None or not (path.isascii() and path.isprintable()):
            return
        lines.append(_site_line(journal, step.site, packed, path))
    for site in [step.site for step in plan.prepare if isinstance(step, OpenEarly)]:
        path = path_of(site.netns)
        if path.isascii() and path.isprintable():
            packed = Packed(b"", 0, unhooking=kernel.pack_unhooking(site))
            lines.append(_site_line(journal, site, packed, path))
    if any(isinstance(step, OpenGate) and step.delivers for step in plan.open):
        lines.append(f"hold {holder_name(plan.move.id)}")
    for state in ("doing", "done"):
        for number in range(len(plan.prepare), len(plan.steps)):
            lines.append(f"{state} {record_line(number, state, Prior()).decode().rstrip()}")
    with suppress(JournalError):  # a full disk: the move is prepared, and opens the long way
        journal.write_ready("\n".join([*lines, "end", ""]).encode("ascii"))


def _site_line(journal: Journal, site: Site, packed: Packed, path: str) -> str:
    batches = (packed.messages, packed.with_pass, packed.unhooking)
    sent = " ".join(batch.hex() or "-" for batch in batches)
    return f"site {_name(journal.identity(site))} {packed.last} {sent} {path}"


def _name(identity: Identity) -> str:
    device, inode = identity
    return f"{device}:{inode}"
