"""examine: what about a machine stops or endangers a move (the verb `check`)."""

from __future__ import annotations

from natkeep.kernel import survey
from natkeep.kernel.interface import Kernel
from natkeep.plan.diagnostics import Finding, find
from natkeep.plan.move import Site


def examine(kernel: Kernel, sites: tuple[Site, ...]) -> tuple[Finding, ...]:
    """The findings at each of *sites*; nothing is changed."""
    kernel.open_sites(sites)
    facts = {site: kernel.ask(site, survey.gather_facts) for site in sites}
    return tuple(finding for site in sites for finding in find(site, facts[site]))
