"""Which store `--store` names.

Rule: nothing is asked of it yet; a store that is away is noticed by the first call.
"""

from __future__ import annotations

from natkeep import policy
from natkeep.errors import UsageError
from natkeep.fleet.directory import DirectoryStore
from natkeep.fleet.etcd import EtcdStore
from natkeep.fleet.store import Store


def open_store(text: str, settings: policy.Agent) -> Store:
    """The store of that name; UsageError if it is none."""
    kind, _, where = text.partition(":")
    if kind == "dir" and where:
        return DirectoryStore(where)
    if kind == "etcd" or (not text and settings.endpoints):
        urls = where.split(",") if where else settings.endpoints
        if urls:
            return EtcdStore(urls, settings)
    raise UsageError(f"{text!r} is not a store", hint="etcd:https://HOST:2379,..., or dir:PATH")
