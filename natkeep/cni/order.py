"""An order for a pod that is to come, and what came of it: files of one directory, root's alone.

NAMESPACE_NAME.json is written by an agent, or by hand, before the pod is made:

    {"schema": 1, "id": "web", "uid": "...", "maps": ["10.211.1.4=auto"],
     "connections": "web.connections", "dump": "...", "mode": "stateful", "listeners": true,
     "interface": "eth0"}

`auto` is the interface's address of OLD's family. Of a pod in several networks each is added by a
call of its own: `interface` says which one NEW is of, else it is eth0. In the place of
`connections` (as of --connections) there may be `image`; paths begin at the directory. dump: the
run id of the dump that the list is of; a list of none is compared with the image at the restore,
since connections come and go. uid: of the pod, if it matters; another pod of that name has no order
then. NAMESPACE_NAME.new is ours, while the destination is prepared:

    {"schema": 1, "id": "web", "network": "pods", "container": "...", "interface": "eth0",
     "maps": ["10.211.1.4=10.211.2.7"], "new": ["10.211.2.7"]}

Rule: half an order is refused by name, and so is what others than root can write.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from natkeep.checkpoint import Checkpoint
from natkeep.cni.call import Call, Pod
from natkeep.errors import NatkeepError, RefusedError, UsageError
from natkeep.fleet.want import SCHEMA, a_text, as_object, texts
from natkeep.plan.maps import Map, Wish, parse_map
from natkeep.plan.move import Mode, parse_id
from natkeep.plan.tuples import Address
from natkeep.state.files import replace_file
from natkeep.values import dataclass

_KEYS = {
    "schema", "id", "uid", "maps", "connections", "image", "mode", "listeners", "dump", "interface",
}  # fmt: skip
_LIMIT = 1 << 20
FIRST = "eth0"
"""How runtimes name a pod's interface in the cluster's own network, the first they make."""
_INTERFACE = re.compile(r"[^\s/:]{1,15}")


@dataclass(frozen=True, slots=True)
class PodOrder:
    """See above; path: of the connections. interface: "" where it does not say."""

    id: str
    uid: str
    wishes: tuple[Wish, ...]
    path: str
    is_image: bool
    mode: Mode
    listeners: bool
    dump: str
    interface: str

    def is_for(self, pod: Pod) -> bool:
        """Whether it means this very pod; RefusedError where that is not known."""
        if self.uid and not pod.uid:
            raise RefusedError("the order is for a uid, and the runtime tells none (K8S_POD_UID)")
        return self.uid in ("", pod.uid)

    def make_maps(self, addresses: tuple[Address, ...]) -> tuple[Map, ...]:
        """Its maps for a pod of these addresses; RefusedError where they do not fit."""
        return tuple(wish.to(_find_new(wish, addresses)) for wish in self.wishes)

    def read_connections(self) -> Checkpoint:
        """What is to be kept."""
        if self.is_image:
            from natkeep.checkpoint.archive import opened_image
            from natkeep.checkpoint.images import read_checkpoint

            with opened_image(self.path) as images:
                return read_checkpoint(images)
        from natkeep.checkpoint.listing import read_listing

        return read_listing(self.path)


def _find_new(wish: Wish, addresses: tuple[Address, ...]) -> Address:
    found = [each for each in addresses if each.version == wish.old.version]
    listed = ", ".join(map(str, found)) or "none"
    if wish.new is not None and wish.new not in found:
        raise RefusedError(
            f"NEW {wish.new} is not of this pod, which has {listed}",
            hint='if another of its interfaces has it, "interface" of the order names that',
        )
    if wish.new is None and len(found) != 1:
        raise RefusedError(f"auto for {wish.old}: the pod has not one address, but {listed}")
    return wish.new or found[0]


def find_order(call: Call) -> PodOrder | None:
    """The order for the pod that is added; UsageError if it cannot be understood."""
    if call.pod is None:
        return None
    text = _read(Path(call.config.orders), f"{call.pod.file}.json")
    if text is None:
        return None
    order = _parse(text, call)
    return order if order.is_for(call.pod) else None


def _parse(text: str, call: Call) -> PodOrder:
    try:
        found = as_object(text)
        for key in found:
            if key not in _KEYS:
                raise ValueError(f"unknown key {key}")
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']!r} is not {SCHEMA}")
        ways = [key for key in ("image", "connections") if key in found]
        if len(ways) != 1:
            raise ValueError("which connections? image, or connections")
        if not isinstance(found.get("listeners", False), bool):
            raise ValueError("listeners is true or false")
        wishes = tuple(map(parse_map, texts(found["maps"])))
        if not wishes:
            raise ValueError("maps: none")
        interface = found.get("interface")
        if interface is not None and not _INTERFACE.fullmatch(a_text(interface)):
            raise ValueError(f"{interface!r} is no name of an interface")
        return PodOrder(
            parse_id(a_text(found["id"])), a_text(found.get("uid", "")), wishes,
            os.path.join(call.config.orders, a_text(found[ways[0]])), ways == ["image"],
            Mode(found.get("mode", Mode.STATEFUL)), found.get("listeners", False),
            a_text(found.get("dump", "")), interface or "",
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, NatkeepError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UsageError(f"half an order for {call.pod and call.pod.file}: {why}") from None


@dataclass(frozen=True, slots=True)
class Told:
    """What was prepared for a pod, as it is told beside the order; path: where.

    interface: "" where an earlier natkeep has told it.
    """

    path: Path
    id: str
    network: str
    container: str
    interface: str
    maps: tuple[str, ...]
    new: tuple[str, ...]

    def write(self) -> None:
        """Have it there, whole."""
        document = {
            "schema": SCHEMA, "id": self.id, "network": self.network,
            "container": self.container, "interface": self.interface,
            "maps": [*self.maps], "new": [*self.new],
        }  # fmt: skip
        try:
            text = f"{json.dumps(document)}\n"
            replace_file(self.path, text.encode(), mode=0o644, durable=False)
        except OSError as error:
            raise NatkeepError(f"{self.path}: {error.strerror}") from None

    def is_of(self, call: Call) -> bool:
        """Whether it was prepared for the container of *call*, at this interface."""
        ours = (self.network, self.container) == (call.config.network, call.container)
        return ours and self.interface in ("", call.interface)

    def is_attached(self, valid: frozenset[tuple[str, str]]) -> bool:
        """Whether its interface is one of *valid*."""
        return any(
            container == self.container and self.interface in ("", interface)
            for container, interface in valid
        )


def make_told(call: Call, pod: Pod, move_id: str, maps: tuple[Map, ...]) -> Told:
    """What is to be told of a pod, not written yet."""
    return Told(
        Path(call.config.orders, f"{pod.file}.new"), move_id, call.config.network,
        call.container, call.interface, tuple(map(str, maps)),
        tuple(str(map_.new) for map_ in maps),
    )  # fmt: skip


def read_told(directory: str, name: str) -> Told | None:
    """What NAME.new says; None where there is none. UsageError if it cannot be read."""
    text = _read(Path(directory), f"{name}.new")
    if text is None:
        return None
    try:
        found: dict[str, Any] = as_object(text)
        return Told(
            Path(directory, f"{name}.new"), parse_id(found["id"]), a_text(found["network"]),
            a_text(found["container"]), a_text(found.get("interface", "")),
            tuple(texts(found["maps"])), tuple(texts(found["new"])),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, NatkeepError) as error:
        raise UsageError(f"{name}.new cannot be read: {error}") from None


def find_all_told(directory: str) -> Iterator[str]:
    """The names of what is told in *directory*."""
    for path in sorted(Path(directory).glob("*.new")):
        yield path.name.removesuffix(".new")


def _read(directory: Path, name: str) -> str | None:
    """A file that root alone can write, in such a directory; None where there is none."""
    try:
        _refuse_foreign(directory, os.stat(directory))
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{directory / name}: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _refuse_foreign(directory / name, status)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LIMIT:
            raise UsageError(f"{directory / name} is not a file, or too large")
        try:
            return file.read().decode()
        except UnicodeDecodeError:
            raise UsageError(f"{directory / name} is not UTF-8 text") from None


def _refuse_foreign(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise UsageError(f"{path} can be written by others than root")
