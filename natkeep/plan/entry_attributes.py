"""The attributes of a conntrack entry beside its tuples, which an entry in its place takes over.

A gateway may choose an uplink by the connection's mark, a policy by its labels, a tenant by its
zone. So what a kept connection's entry says is read before any entry is purged, stands in the
journal, and is in each entry that is made in its place: at once, by a repair, after a replacement.

What ctnetlink does not let anyone set is refused for that connection: a secmark. A time-out policy
(`ct timeout`) it neither shows nor sets; only what is left of a longer time-out is known.

Rule: values only; kernel/ctnetlink.py knows how they are packed.
"""

from __future__ import annotations

from typing import Any

from natkeep.plan.move import Site
from natkeep.plan.tuples import Connections
from natkeep.values import dataclass, replace

BOTH, ORIGINAL, REPLY = "both", "original", "reply"
"""The directions that an entry's zone is for: `ct zone`, `ct original zone`, `ct reply zone`."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """What an entry says; as nf_conntrack has it where it has not been given.

    process_dialled: its original direction is process to peer. labels, seq_original, seq_reply and
    synproxy: octets of CTA_LABELS, CTA_SEQ_ADJ_ORIG, CTA_SEQ_ADJ_REPLY, CTA_SYNPROXY in
    hexadecimal. secmark: its security context. timeout: seconds that are left, if these are more
    than an entry gets anew.
    """

    zone: int = 0
    zone_of: str = BOTH
    mark: int = 0
    labels: str = ""
    helper: str = ""
    seq_original: str = ""
    seq_reply: str = ""
    synproxy: str = ""
    secmark: str = ""
    timeout: int = 0
    process_dialled: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.zone < 1 << 16 or not 0 <= self.mark < 1 << 32 or self.timeout < 0:
            raise ValueError(f"zone {self.zone}, mark {self.mark} or {self.timeout} s are none")
        if self.zone_of not in (BOTH, ORIGINAL, REPLY):
            raise ValueError(f"a zone of {self.zone_of!r}")
        for octets in (self.labels, self.seq_original, self.seq_reply, self.synproxy):
            bytes.fromhex(octets)

    def refusal(self) -> str:
        """Why no entry that is made anew can say the same; empty where one can.

        Its original direction is peer to process, whichever was before (plan/conntrack.py).
        """
        if self.secmark:
            return f"its conntrack entry has a secmark ({self.secmark}), which no program can set"
        if self.process_dialled and self.synproxy:
            return "its conntrack entry shifts its time stamps, in the direction of who dialled"
        if self.process_dialled and self.zone_of != BOTH:
            return f"its conntrack entry is in zone {self.zone} in one direction only"
        return ""

    def facing(self, *, process_dialled: bool) -> Attributes:
        """The same of an entry with this original direction."""
        if process_dialled == self.process_dialled:
            return self
        return replace(
            self,
            process_dialled=process_dialled,
            seq_original=self.seq_reply,
            seq_reply=self.seq_original,
        )

    def describe(self) -> str:
        """As options of conntrack(8), each with a blank behind it; the rest it cannot say."""
        zone = {BOTH: "--zone", ORIGINAL: "--orig-zone", REPLY: "--reply-zone"}[self.zone_of]
        options = f"{zone} {self.zone} " if self.zone else ""
        return options + (f"--mark {self.mark:#x} " if self.mark else "")

    def to_json(self) -> dict[str, Any]:
        """What it has been given."""
        names: tuple[str, ...] = type(self).__match_args__
        return {n: v for n in names if (v := getattr(self, n)) != getattr(PLAIN, n)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Attributes:
        """From the journal; TypeError or ValueError for what to_json does not write."""
        for name, given in value.items():
            if type(given) is not type(getattr(PLAIN, name, None)):
                raise ValueError(f"{name} of an entry is not {given!r}")
        return cls(**value)


PLAIN = Attributes()
USUAL = (PLAIN, Attributes(process_dialled=True))
"""Of an entry that says nothing beside its tuples, by who dialled."""


@dataclass(frozen=True, slots=True)
class Noted:
    """Connections, as the process sees them, whose entries at *site* say *attributes*."""

    site: Site
    attributes: Attributes
    connections: Connections
