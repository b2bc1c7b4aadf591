"""open: the kept connections are let through, at every site, gateway first.

A move that was prepared from a live process is compared with the image before that, and the sites
that waited for the freeze are made ready. What only makes packets quicker is removed afterwards.

When prepare (or a comparison before the restore) ends with the gates closed it leaves the file
ID.ready: all that the hook needs to open the move, in the form it needs it.
natkeep/criu/natkeep_hook_open.py reads it, in a tenth of the time that reading the journal, making
the plan and packing the messages again would take; all that is inside the blackout (`make
bench-hook`). ASCII lines:

    natkeep-ready 5
    boot BOOT ID
    journal SIZE                    of ID.journal, in octets, when prepare had ended: any verb
                                    that came later has written to it, and this file holds no more
    image RUN ID                    of the dump; - where none is known
    home DEVICE:INODE               a namespace that the restored tree may be in; one or more
    site DEVICE:INODE COOKIE LAST HEX UNHOOKING PATH
                                    a site's namespace, in order of opening, with its cookie (0
                                    where the kernel has none): the sequence number of
                                    the last message that opens it, and these messages; those that
                                    take the base chain of the gates away once no restore waits, or
                                    - (kernel/nftables.py); where the namespace is found. A gateway
                                    that prepare has opened is behind the others, and nothing but
                                    UNHOOKING is sent there
    datagrams NAME                  the holder's socket in the state directory, if it has datagrams
    hold NAME                       the same, if there is a holder
    doing RECORD, done RECORD       what the journal notes before and after, a line a step
    end

Rule: ID.ready saves time and decides nothing. Without it, or where it does not fit, the move is
opened as ever, by `open_move`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

from natkeep.checkpoint import Checkpoint
from natkeep.errors import JournalError, NatkeepError, RefusedError
from natkeep.kernel import nftables
from natkeep.kernel.interface import Kernel, Packed
from natkeep.kernel.netns import path_of
from natkeep.lifecycle.executor import Executor, leftover
from natkeep.lifecycle.progress import is_prepared, refuse_earlier_boot, unprepared
from natkeep.plan.move import Site
from natkeep.plan.replay import holder_name
from natkeep.plan.steps import OpenEarly, OpenGate, Plan, Unknown
from natkeep.plan.translation import Compared
from natkeep.state.directory import read_boot_id
from natkeep.state.journal import Journal


def open_move(
    executor: Executor,
    move_id: str,
    confirm: Callable[[Journal], Checkpoint | None] = lambda journal: None,
    *,
    opens: bool = True,
) -> Compared | None:
    """Let the kept connections through at every site, gateway first; again is fine.

    opens: else all is made ready for that, in a comparison with the image, and no gate is opened:
    the hook then has nothing to compare in the blackout.

    confirm: asked, under the lock, before anything is opened; whatever it raises is the end.
    The image that it returns is compared with what was prepared: what came is added. Returned
    is how they differ, None where there was no image.
    KernelError when a site no longer has the move's gate, JournalError when it was not
    prepared to the end: then nothing is opened.
    """
    with executor.state.holding(move_id), ExitStack() as stack:
        journal, plan = executor.load(move_id)
        if journal.move.live:  # more than its own rules may have to be changed
            stack.enter_context(executor.state.locked())
        _refuse_to_open(journal, plan)
        image = confirm(journal)
        executor.open_known(journal, plan.move.sites)
        compared = None
        if image is None and journal.change is None:
            if not is_prepared(journal, plan):
                raise unprepared(journal)
        else:
            from natkeep.lifecycle import compare  # a move of a frozen process needs it not

            compared, plan = compare.bring_up_to_date(executor, journal, plan, image)
        wanted = range(len(plan.steps) if opens else len(plan.prepare))
        numbers = [n for n in wanted if not journal.is_done(n)]
        for number in numbers if journal.move.live else ():
            if number not in journal.records:
                executor.kernel.check(plan.steps[number])
        closed = not (opens or journal.is_opened())
        ready = partial(write_ready, executor.kernel, journal, plan)
        executor.apply_or_undo(journal, plan, numbers, ready if closed else lambda: None)
        return compared


def _refuse_to_open(journal: Journal, plan: Plan) -> None:
    refuse_earlier_boot(journal)
    move_id = journal.move.id
    if any(isinstance(s, Unknown) and not journal.is_done(n) for n, s in enumerate(plan.steps)):
        raise JournalError(
            f"move {move_id} was prepared by a natkeep that opens it by other steps",
            hint=f"use that version for it; natkeep teardown {move_id} undoes it",
        )
    if journal.move.quiesces:
        raise RefusedError(
            f"{move_id} only holds listeners so far: there is no gate to open",
            hint=f"natkeep prepare {move_id} --site source=...; teardown lets callers in",
        )


def close_move(executor: Executor, move_id: str, *, dumps: bool = False) -> None:
    """Close the gates that `open_move` opened; all else stays, and it can be opened again.

    For a tree that came to nothing; and (dumps) before a dump where peers look different on the
    wire, since CRIU's lock knows them only as the process does, and would let through what they
    say. LeftoverError when a gate could not be closed.
    """
    with executor.state.holding(move_id):
        journal, plan = executor.load(move_id)
        refuse_earlier_boot(journal)
        if journal.move.quiesces:
            raise RefusedError(f"{move_id} only holds listeners so far: there is no gate to close")
        executor.open_known(journal, plan.move.sites)
        opened = range(len(plan.prepare), len(plan.steps))
        if dumps:
            executor.undo_for_now(journal, opened)
        elif left := executor.undo(journal, reversed(opened)):
            raise leftover(journal, left)


def remove_gate_hooks(executor: Executor, move_id: str) -> bool:
    """At the sites of an open move take the gates out of all packets' way, if none is closed.

    False where a gateway waits for its destination to speak: then again a little later.

    It waits for the kernel, so it is for afterwards, when no restore waits any more. Without a
    lock: the kernel refuses it if anything was changed since the gates were looked at, and what
    closes a gate at the same time looks again (kernel/nftables.py).
    """
    header = executor.state.read_header(move_id)
    if header is None or header.boot != read_boot_id():
        return True
    for site, identity in zip(header.move.sites, header.namespaces, strict=True):
        with suppress(NatkeepError):
            executor.kernel.open_sites([site], {site: identity})
    return executor.kernel.unhook_gates()


def write_ready(kernel: Kernel, journal: Journal, plan: Plan) -> None:
    """Leave ID.ready beside the journal of a move that has just been prepared, closed."""
    lines = [
        "natkeep-ready 5",
        f"boot {journal.boot}",
        f"journal {journal.size()}",
        f"image {journal.image or '-'}",
    ]
    lines += [f"home {journal.identity(home)}" for home in plan.move.homes()]
    for step in plan.open:
        packed: Packed | None = None
        if isinstance(step, OpenGate):
            packed = kernel.ask(step.site, nftables.pack_open, step)
        if packed is None or not _is_plain(step.site):
            return
        lines.append(_site_line(journal, step.site, packed))
    for site in [step.site for step in plan.prepare if isinstance(step, OpenEarly)]:
        if _is_plain(site):
            unhooking = kernel.ask(site, nftables.pack_gate_hook_removal)
            lines.append(_site_line(journal, site, Packed(b"", 0, unhooking=unhooking)))
    gates = [step for step in plan.open if isinstance(step, OpenGate)]
    words = (
        ("datagrams", any(step.datagrams for step in gates)),
        ("hold", any(step.delivers for step in gates)),
    )
    lines += [f"{word} {holder_name(plan.move.id)}" for word, there in words if there]
    opening = [*enumerate(plan.steps)][len(plan.prepare) :]
    for state in ("doing", "done"):
        lines += [f"{state} {line}" for line in journal.lines(opening, state)]
    with suppress(JournalError):  # a full disk: the move is prepared, and opens the long way
        journal.write_ready("\n".join([*lines, "end", ""]).encode("ascii"))


def _is_plain(site: Site) -> bool:
    path = path_of(site.netns)
    return path.isascii() and path.isprintable()


def _site_line(journal: Journal, site: Site, packed: Packed) -> str:
    sent = " ".join(batch.hex() or "-" for batch in (packed.messages, packed.unhooking))
    path = path_of(site.netns)
    known = journal.identity(site)
    return f"site {known} {known.cookie} {packed.last} {sent} {path}"
