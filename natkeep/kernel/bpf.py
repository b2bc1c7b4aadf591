"""How many BPF programs are attached to a device where traffic control is (tcx, netkit).

Those of tc(8) itself are filters, which rtnetlink tells (survey.py); these only bpf(2) does.

Rule: read only. A kernel or a machine that does not know the question has none.
"""

from __future__ import annotations

import ctypes
import os
import struct

_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
"""Of the system call, by machine."""
_PROG_QUERY = 16
_POINTS = (46, 47, 54, 55)
"""BPF_TCX_INGRESS, BPF_TCX_EGRESS, BPF_NETKIT_PRIMARY, BPF_NETKIT_PEER."""
_QUERY = struct.Struct("=IIIIQI")  # index, point, flags, flags of each, where ids go, how many


def count_programs(index: int) -> int:
    """Of the device with that *index*, in the namespace that the calling thread is in."""
    number = _NUMBERS.get(os.uname().machine)
    return sum(_count(number, index, point) for point in _POINTS) if number else 0


def _count(number: int, index: int, point: int) -> int:
    question = ctypes.create_string_buffer(_QUERY.pack(index, point, 0, 0, 0, 0), 128)
    if ctypes.CDLL(None).syscall(number, _PROG_QUERY, question, len(question)) < 0:
        return 0
    return int(_QUERY.unpack_from(question.raw)[-1])
