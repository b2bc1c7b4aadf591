"""the verbs of a move on one kernel and one state directory, each from its own file here."""

from __future__ import annotations

from natkeep.lifecycle.looking import Looking
from natkeep.lifecycle.opening import Opening
from natkeep.lifecycle.quiescing import Quiescing


class Lifecycle(Quiescing, Opening, Looking):
    """The verbs that a move may need while a process is frozen, and status.

    repair and gc are Repairing and Collecting: a restore need not wait for their import.
    """
