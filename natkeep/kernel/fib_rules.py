"""The rules of the routing policy (ip rule): how the kernel shows them, and how one is asked for.

Rule: which rules there are to be is for ip_rules.py and policy_rules.py. All functions act in the
namespace that the socket they are given is of. Numbers are from linux/fib_rules.h.
"""

from __future__ import annotations

import errno
import socket
import struct

from natkeep.kernel.netlink import NLM_F_DUMP, Netlink

NEWRULE, DELRULE, _GETRULE = 32, 33, 34
HEADER = struct.Struct("=BBBBBxxBI")
"""fib_rule_hdr: family, lengths of destination and source, tos, table, action, flags."""
DST, SRC, IIFNAME, GOTO, PRIORITY, MARK = 1, 2, 3, 4, 6, 10
TABLE, MASK, PROTOCOL, IP_PROTO, SPORT, DPORT = 15, 16, 21, 22, 23, 24
_TUN_ID, _OIFNAME, _L3MDEV, _UID_RANGE = 12, 17, 19, 20
SELECTS = (IIFNAME, MARK, _TUN_ID, _OIFNAME, _L3MDEV, _UID_RANGE, IP_PROTO, SPORT, DPORT)
"""By which a rule selects packets beside their addresses."""
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.EAFNOSUPPORT})


def dump_rules(netlink: Netlink, version: int) -> list[bytes]:
    """The rules of IP *version*, in the order in which they are asked.

    None where the kernel has no policy routing (CONFIG_IP_MULTIPLE_TABLES), or not that version.
    """
    asked = HEADER.pack(FAMILY[version], *[0] * 6)
    try:
        return [*netlink.request(_GETRULE, NLM_F_DUMP, asked)]
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return []
