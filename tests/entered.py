"""A namespace by its name, for the time of a block.

A handle that stays open is one of the few that select() can take, which libnftables calls.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from natkeep.kernel.netns import inside, open_namespace


@contextmanager
def entered(name: str) -> Iterator[None]:
    """The calling thread is in the namespace *name* while the block runs."""
    namespace = open_namespace(name)
    try:
        with inside(namespace):
            yield
    finally:
        os.close(namespace.fd)
