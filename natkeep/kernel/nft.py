"""the nft text's way into the kernel, one transaction a call: assembled here, or by libnftables.

Rule: only rendered lines from plan/ come in here, and nothing is listed through libnftables: its
cache reads every element of every set (1.3 s beside a set of 100,000). What stands in the kernel is
read by elements.py. What assembler.py does not know, and what the kernel refuses, libnftables is
given; the `nftables` binding is imported only here.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable

from natkeep.errors import KernelError
from natkeep.kernel import nftables
from natkeep.kernel.assembler import assemble
from natkeep.kernel.statements import NotUnderstood

_UNANSWERED = (errno.ENOBUFS, errno.EMSGSIZE)
"""What receiving an answer fails with; a refusal is an answer."""

_MESSAGE = re.compile(r"(?:Error|Warning): (.*)")


class NftError(KernelError):
    """libnftables refused a transaction; nothing of it was done."""


def run_transaction(lines: Iterable[str]) -> None:
    """Load *lines* in the namespace we are in, all or nothing; NftError otherwise."""
    lines = tuple(lines)
    try:
        messages = assemble(lines)
    except NotUnderstood:
        run_by_libnftables(lines)
        return
    try:
        nftables.send_batch(messages)
    except OSError as error:
        if error.errno in _UNANSWERED:  # it may be done, and must not be done twice
            raise NftError(f"nft: {error.strerror}") from error
        # Refused as a whole: libnftables tries once more, and says which part of the text it was.
        run_by_libnftables(lines)


def run_by_libnftables(lines: Iterable[str]) -> None:
    """The same, whatever the text."""
    # Imported here, since a hook that has nothing to do must not pay for it; and a context
    # for each call, because it holds a netlink socket of the namespace that it was made in.
    import nftables

    code, _, error = nftables.Nftables().cmd("\n".join(lines))
    if code:
        found = _MESSAGE.search(error)
        reason = found.group(1) if found else error.strip() or "no reason given"
        raise NftError(f"nft: {reason}")


def is_available() -> bool:
    """Whether libnftables and its binding can be loaded."""
    try:
        import nftables

        nftables.Nftables()
    except (ImportError, OSError):
        return False
    return True
