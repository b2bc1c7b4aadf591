"""all verbs on one kernel and one state directory, each from its own file here."""

from __future__ import annotations

from natkeep.lifecycle.looking import Looking
from natkeep.lifecycle.opening import Opening
from natkeep.lifecycle.quiescing import Quiescing


class Lifecycle(Quiescing, Opening, Looking):
    """The verbs; see the files of this folder."""
