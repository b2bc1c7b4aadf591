"""examine: what about a machine, or a move, stops or endangers it (`check`; prepare asks as well).

Each look reads by kernel/, leaves the judgement to plan/, and is registered here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natkeep.errors import RefusedError
from natkeep.lifecycle.datagrams import look_at_lock
from natkeep.lifecycle.hops import look_at_hops
from natkeep.lifecycle.marks import look_at_marks
from natkeep.lifecycle.other_rules import look_at_other_rules
from natkeep.lifecycle.path import (
    look_at_new,
    look_at_owners,
    look_at_policy_rules,
    look_at_routes,
)
from natkeep.lifecycle.subject import Look, Subject
from natkeep.plan.findings import Finding, Severity


def look_at_machine(subject: Subject) -> Iterator[Finding]:
    """What each site is, whatever is moved."""
    from natkeep.kernel import survey  # what a prepare need not wait for
    from natkeep.plan.diagnostics import find

    for site in subject.sites:
        facts = subject.kernel.ask(site, survey.gather_facts)
        yield from find(site, facts, of_move=subject.plan is not None)


OF_MACHINE: tuple[Look, ...] = (look_at_machine,)
"""Asked by `check` alone: they take long, or are about more than one move."""

OF_PATH: tuple[Look, ...] = (
    look_at_new,
    look_at_routes,
    look_at_policy_rules,
    look_at_hops,
    look_at_marks,
    look_at_other_rules,
    look_at_lock,
)
"""Of a plan: whether its packets pass. Each prepare asks them, inside a blackout too: the number of
what they ask the kernel may not grow with the connections, but with their peers at most."""


def examine(subject: Subject) -> Iterator[Finding]:
    """All that there is to be found; nothing is changed."""
    looks = OF_MACHINE
    if subject.plan is not None:
        looks += (*OF_PATH, look_at_owners)
    if subject.checkpoint is not None:
        from natkeep.lifecycle.process import OF_PROCESS  # what a prepare need not wait for

        looks += OF_PROCESS
    for look in looks:
        yield from look(subject)


def refuse_stopped(
    looks: Iterable[Look], subject: Subject, passed_over: frozenset[str] = frozenset()
) -> tuple[Finding, ...]:
    """The warnings of *looks*; RefusedError for the first finding that stops the move.

    passed_over: codes of findings that do not count.
    """
    found = (finding for look in looks for finding in look(subject))
    findings = [finding for finding in found if finding.code not in passed_over]
    for finding in findings:
        if finding.severity == Severity.STOP:
            raise RefusedError(
                finding.what(), hint=finding.remedy or f"natkeep explain {finding.code}"
            )
    return tuple(each for each in findings if each.severity == Severity.WARN)
