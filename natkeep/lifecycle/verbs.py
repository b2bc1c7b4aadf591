"""the verbs of a move on one kernel and one state directory, each from its own file here."""

from __future__ import annotations

from natkeep.lifecycle.open import Opening
from natkeep.lifecycle.quiesce import Quiescing
from natkeep.lifecycle.status import Looking


class Lifecycle(Quiescing, Opening, Looking):
    """The verbs that a move may need while a process is frozen, and status.

    repair and gc are Repairing and Collecting: a restore need not wait for their import.
    """
