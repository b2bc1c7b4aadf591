"""The check before conntrack entries are inserted: is there room for them?

Rule: nothing is changed here.
"""

from __future__ import annotations

from natkeep.errors import RefusedError
from natkeep.kernel import conntrack
from natkeep.plan.steps import InsertEntries


def check_room(step: InsertEntries) -> None:
    """A table that is nearly full would take neither these entries nor those of others."""
    from natkeep.plan.diagnostics import FULL

    count = int(conntrack.read_setting("nf_conntrack_count") or 0)
    limit = int(conntrack.read_setting("nf_conntrack_max") or 0)
    wanted = count + len(step.translation.kept)
    if limit and wanted > limit * FULL // 100:
        raise RefusedError(
            f"{step.site}: the conntrack table would hold {wanted} of {limit} entries, "
            f"over {FULL} %",
            hint="raise net.netfilter.nf_conntrack_max",
        )
