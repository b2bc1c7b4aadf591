"""Which moves have an address as OLD, by the first lines of their journals.

Rule: of a thousand moves each is read once, and again only when it has been written to.
"""

from __future__ import annotations

import re
from contextlib import suppress

from natkeep.plan.tuples import parse_address
from natkeep.state.files import StateFiles

_OLD = re.compile(rb'"old":"([0-9a-f.:]+)"')


class OldIndex:
    """The OLD addresses in each journal, packed; kept as long as the file is as it was."""

    def __init__(self, files: StateFiles) -> None:
        self._files = files
        self._olds: dict[str, tuple[tuple[int, int], frozenset[bytes]]] = {}

    def find(self, addresses: frozenset[bytes]) -> tuple[str, ...]:
        """The ids of the journals that name one of the packed *addresses* as OLD, sorted."""
        names = [name for name in self._files.names() if name.endswith(".journal")]
        for name in names:
            with suppress(OSError, ValueError):  # what cannot be read, `status` reports
                self._read(name)
        known = ((name, self._olds.get(name)) for name in names)
        return tuple(sorted(name[:-8] for name, of in known if of and of[1] & addresses))

    def _read(self, name: str) -> None:
        stamp, known = self._files.stamp(name), self._olds.get(name)
        if known is None or known[0] != stamp:
            header = self._files.read_start(name).split(b"\n", 1)[0]
            olds = (parse_address(old.decode("ascii")) for old in _OLD.findall(header))
            self._olds[name] = (stamp, frozenset(old.packed for old in olds))
