"""Finds CRIU's network lock on the source, removes it, and puts it back when that is undone.

Rule: only what plan/criu_lock.py says is this dump's; a table by its run id, rules by four-tuples.
Where CRIU's table holds connections that are not kept, those stay locked, in it.
All functions act in the namespace that the calling thread is in.

iptables has two kernels' worth of tables: those of nf_tables and the legacy ones. A table is
looked for before its program is started, because the legacy program makes what it lists. The
programs are those that CRIU used; a transaction of iptables-restore is all or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from natkeep import faultpoints
from natkeep.errors import KernelError
from natkeep.kernel import nftables, nftables_dump
from natkeep.kernel.interface import Driver, Place, Remember
from natkeep.plan.criu_lock import (
    DumpLock,
    NetworkLock,
    SavedRules,
    find_rules,
    pack_keys,
    render_deletion,
    render_elements,
    render_restoration,
    render_table,
    set_name,
)
from natkeep.plan.nft import IP
from natkeep.plan.step_undo import PutLockBack
from natkeep.plan.steps import Prior, TakeOverLock
from natkeep.plan.tuples import Connections

_TOOLS = {4: "iptables", 6: "ip6tables"}
_LEGACY_NAMES = {4: "ip_tables_names", 6: "ip6_tables_names"}
_VARIANTS = [(backend, version) for backend in ("nft", "legacy") for version in _TOOLS]
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
"""Where the system's own tools are, whatever PATH says."""

Variant = tuple[str, int]
"""Back end of iptables, and IP version."""


class LockDriver(Driver[TakeOverLock]):
    """The lock is removed where it is; revert puts back what was found."""

    def check(self, at: Place, step: TakeOverLock) -> None:
        """KernelError where the lock is in a filter table and its program is missing."""
        find_lock(step.lock, step.connections)

    def apply(self, at: Place, step: TakeOverLock, remember: Remember) -> Prior:
        """Remove it; prior.facts names the tables that it is in."""
        prior = find_lock(step.lock, step.connections)
        remember(prior)
        take_lock(step.lock, step.connections)
        return prior

    def revert(self, at: Place, undo: PutLockBack, prior: Prior) -> None:
        """Put back what of it is missing."""
        put_lock_back(undo.lock, undo.connections, prior)


def find_lock(lock: DumpLock, kept: Connections) -> Prior:
    """Which tables the lock is in; present is false throughout: only this step removes it."""
    facts: dict[str, str | int | bool] = {}
    if lock.method == NetworkLock.NFTABLES:
        if nftables_dump.has_table("inet", lock.table):
            facts["table"] = True
        return Prior(facts=facts)
    for (backend, version), found in _find_rules(lock, kept):
        if found.rules or found.chain:
            facts[f"{backend}{version}"] = True
    return Prior(facts=facts)


def take_lock(lock: DumpLock, kept: Connections) -> None:
    """Remove the lock; KernelError when the kernel says no, and then all of it is there."""
    if lock.method == NetworkLock.NFTABLES:
        _take_table(lock, kept)
        return
    taken: list[Variant] = []
    try:
        for variant, found in _find_rules(lock, kept):
            if taken:
                faultpoints.reach("half", "lock")
            _restore(variant, render_deletion(found))
            taken.append(variant)
    except BaseException:
        for variant in taken:
            _put_rules_back(variant, lock, kept)
        raise


def put_lock_back(lock: DumpLock, kept: Connections, prior: Prior) -> None:
    """The reverse of `take_lock`, as far as something is missing of what *prior* names."""
    if "table" in prior.facts:
        _put_table_back(lock, kept)
    for backend, version in _VARIANTS:
        if prior.facts.get(f"{backend}{version}"):
            _put_rules_back((backend, version), lock, kept)


# ---- nftables ----------------------------------------------------------------------------


def _take_table(lock: DumpLock, kept: Connections) -> None:
    if not nftables_dump.has_table("inet", lock.table):
        return
    lines: tuple[str, ...] = (f"delete table inet {lock.table}",)
    # Reading a table of 100,000 connections takes the kernel 3 s, in the blackout; it is not read
    # where all that the dump had is kept.
    if not lock.whole and lock.connections != len(kept):
        locked = {v: set(nftables_dump.read_keys(lock.table, set_name(v))) for v in _TOOLS}
        if any(locked[version] - pack_keys(kept, version) for version in _TOOLS):
            lines = render_elements("delete", lock, _pick_locked(kept, locked))
    nftables.run_transaction(lines)


def _pick_locked(kept: Connections, locked: dict[int, set[bytes]]) -> Connections:
    """Those of *kept* that are in CRIU's table: deleting another one would be refused."""
    return Connections.of(
        inbound
        for inbound in kept
        for version in (inbound.source.address.version,)
        if pack_keys(Connections.of([inbound]), version) <= locked[version]
    )


def _put_table_back(lock: DumpLock, kept: Connections) -> None:
    if not nftables_dump.has_table("inet", lock.table):
        nftables.run_transaction(render_table(lock, kept))
    elif not lock.whole:
        nftables.run_transaction(render_elements("add", lock, kept))


# ---- iptables ----------------------------------------------------------------------------


def _find_rules(lock: DumpLock, kept: Connections) -> Iterator[tuple[Variant, SavedRules]]:
    for variant in _VARIANTS:
        if _has_filter_table(variant):
            saved = _run(variant, "save", ["-t", "filter"])
            yield variant, find_rules(saved, lock, kept)


def _has_filter_table(variant: Variant) -> bool:
    backend, version = variant
    if backend == "nft":
        return nftables_dump.has_table(IP[version], "filter")
    try:
        with open(f"/proc/thread-self/net/{_LEGACY_NAMES[version]}", encoding="ascii") as file:
            return "filter" in file.read().split()
    except OSError:
        return False


def _put_rules_back(variant: Variant, lock: DumpLock, kept: Connections) -> None:
    _, version = variant
    saved = _run(variant, "save", ["-t", "filter"]) if _has_filter_table(variant) else ""
    present = find_rules(saved, lock, kept)
    if present.chain:
        return
    missing = [t for t in kept if t.source.address.version == version and t not in present.tuples]
    _restore(variant, render_restoration(lock, missing))


def _restore(variant: Variant, lines: tuple[str, ...]) -> None:
    if lines:
        _run(variant, "restore", ["-w", "--noflush"], "\n".join(lines) + "\n")


def _run(variant: Variant, verb: str, options: list[str], text: str = "") -> str:
    import shutil  # only here: both take longer to import than a hook's own part takes
    import subprocess

    backend, version = variant
    name = f"{_TOOLS[version]}-{backend}-{verb}"
    program = shutil.which(name, path=_PATH)
    if program is None:
        raise KernelError(
            f"CRIU's lock is in a filter table, and there is no {name} to remove it with",
            hint="install iptables, or dump with --network-lock nftables",
        )
    clean = {"PATH": _PATH, "LC_ALL": "C"}
    done = subprocess.run(
        [program, *options], env=clean, input=text, capture_output=True, text=True
    )
    if done.returncode:
        raise KernelError(f"{name}: {done.stderr.strip() or done.returncode}")
    return done.stdout
