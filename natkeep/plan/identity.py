"""The identity of a network namespace: which one it is, however it is named.

Rule: the only place that says whether two namespaces are the same.
"""

from __future__ import annotations

from natkeep.values import dataclass


@dataclass(frozen=True, slots=True)
class Identity:
    """Device and inode of a namespace, and its cookie.

    The kernel gives the inode of a namespace that has ended to the next one; a cookie
    (SO_NETNS_COOKIE, Linux 5.14) it never gives again until the next boot. cookie is 0 where none
    is known, as on an earlier kernel or in a journal of natkeep 0.1: then device and inode decide.
    """

    device: int
    inode: int
    cookie: int = 0

    def __str__(self) -> str:
        return f"{self.device}:{self.inode}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identity):
            return NotImplemented
        if (self.device, self.inode) != (other.device, other.inode):
            return False
        return self.cookie == other.cookie or not (self.cookie and other.cookie)

    def __hash__(self) -> int:
        return hash((self.device, self.inode))
