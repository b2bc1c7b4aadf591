"""The record of a migration on the controller's disk: what it is, and how far it has come.

It is written before a step begins, so that one who comes later (`--resume`, `--rollback`, `finish`)
knows which hosts to ask, and for what. What became of the step itself the hosts tell.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from natkeep.errors import JournalError, UsageError
from natkeep.plan.maps import parse_map
from natkeep.plan.move import parse_id
from natkeep.state.files import replace_file

SCHEMA = 1
STEPS = ("check", "prepare", "dump", "copy", "restore", "source", "verify", "done")
"""In their order."""
IMAGES = "/var/tmp/natkeep"
"""Below it images lie where no directory was named."""
GATEWAY, PEER, RELAY = "gateway", "peer", "relay"


@dataclass
class Record:
    """One migration.

    source, destination, translators: hosts as ssh knows them, or `local`. translators: those whose
    site of *role* translates for the peers: one `gateway`, each `peer`'s own host, or the source as
    a `relay`; until the check has chosen them what was asked for, and role is empty where nothing
    was. pid and started: of the process at the source, with the clock ticks of its start (proc(5),
    starttime). maps: `OLD=NEW`. vias: the relay's addresses. images: a directory of that name on
    source and destination; shared: it is one and the same; made: it was empty on both. reached: the
    step that was begun last. engine and container: who has the process, and its name there; bundle:
    runc's at the destination; boot: the destination's, its boot_id, empty where an earlier natkeep
    did not note it; netns: of a container at `source` and `destination`, empty where it is
    natkeep's own; found: what its engine found out.
    """

    id: str
    source: str
    pid: int
    destination: str
    role: str = ""
    translators: list[str] = field(default_factory=list)
    started: int = 0
    maps: list[str] = field(default_factory=list)
    vias: list[str] = field(default_factory=list)
    images: str = ""
    shared: bool = False
    made: bool = False
    listeners: bool = False
    no_udp: bool = False
    pre_dumps: int = 0
    criu: str = "criu"
    dump_options: list[str] = field(default_factory=list)
    restore_options: list[str] = field(default_factory=list)
    ssh: list[str] = field(default_factory=lambda: ["ssh"])
    natkeep: list[str] = field(default_factory=lambda: ["natkeep"])
    engine: str = "criu"
    container: str = ""
    bundle: str = ""
    boot: str = ""
    netns: dict[str, str] = field(default_factory=dict)
    found: dict[str, str] = field(default_factory=dict)
    reached: str = "check"
    path: Path | None = field(default=None, compare=False)

    def save(self) -> None:
        """Write it whole, on disk before this returns."""
        assert self.path is not None
        value = {"schema": SCHEMA, **{k: v for k, v in asdict(self).items() if k != "path"}}
        replace_file(self.path, json.dumps(value, indent=1).encode(), durable=True)

    def begin(self, step: str) -> None:
        """Note that *step* begins."""
        self.reached = step
        self.save()

    def is_past(self, step: str) -> bool:
        """Whether *step* had begun."""
        return self.reached in STEPS and STEPS.index(self.reached) >= STEPS.index(step)

    def forget(self) -> None:
        """Nothing of it is left anywhere."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def map_options(self) -> list[str]:
        """natkeep's words that name its maps."""
        return [word for each in self.maps for word in ("--map", each)]

    def inspect_options(self) -> list[str]:
        """The same, and whether UDP is left."""
        return [*self.map_options(), *(["--no-udp"] if self.no_udp else [])]

    def options(self, *, listeners: bool = True) -> list[str]:
        """All that prepare is told, but for sites and connections."""
        words = self.inspect_options()
        words += [word for each in self.vias for word in ("--via", each)]
        return [*words, *(["--listeners"] if self.listeners and listeners else [])]

    def site(self, role: str) -> str:
        """natkeep's word for the site of *role*, in the namespace of a container where it is one's.

        A relay is where the process was; who else translates is no container.
        """
        path = self.netns.get("source" if role == RELAY else role)
        return f"{role}={path}" if path else role

    def translator_id(self, target: str) -> str:
        """The move's id where *target* translates: one of its own where a container is there, too.

        Each is a move in another namespace of that host.
        """
        ends = {self.source: "source", self.destination: "destination"}
        beside = self.netns.get(ends.get(target, ""))
        return f"{self.id}-{self.role}" if beside else self.id

    @property
    def hook(self) -> dict[str, str]:
        """What natkeep-hook has to know of a restore."""
        return {"NATKEEP_ID": self.id}

    @property
    def process(self) -> str:
        """What moves, as it is named on the command line."""
        return f"{self.engine}:{self.container}" if self.container else str(self.pid)

    @property
    def olds(self) -> list[str]:
        """The OLD of each map, without its port."""
        return [str(parse_map(each).old) for each in self.maps]


def directory(state_dir: str | None) -> Path:
    """Where records are: below a state directory that is named, else where they outlive a boot."""
    named = state_dir or os.environ.get("NATKEEP_STATE_DIR")
    if named:
        return Path(named) / "migrations"
    if os.geteuid() == 0:
        return Path("/var/lib/natkeep/migrations")
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(home) / "natkeep/migrations"


def place(state_dir: str | None, move_id: str) -> Path:
    """The file of *move_id*; its directory is made."""
    where = directory(state_dir)
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    return where / f"{parse_id(move_id)}.json"


def load(state_dir: str | None, move_id: str) -> Record:
    """The record of *move_id*; JournalError where there is none, or none that natkeep wrote."""
    path = directory(state_dir) / f"{parse_id(move_id)}.json"
    try:
        value = json.loads(path.read_text())
        return _from_json(value, path)
    except FileNotFoundError:
        known = ", ".join(_ids(state_dir)) or "none"
        raise JournalError(
            f"no migration {move_id} was begun here", hint=f"known here: {known}"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise JournalError(f"{path}: {error}") from None


def _from_json(value: Any, path: Path) -> Record:
    if not isinstance(value, dict) or value.pop("schema", None) != SCHEMA:
        raise ValueError("it is no record of a migration that this natkeep knows")
    if {*value, "boot"} != {each.name for each in fields(Record)} - {"path"}:
        raise ValueError("it has other keys than this natkeep writes")
    return Record(**value, path=path)


def _ids(state_dir: str | None) -> Iterator[str]:
    where = directory(state_dir)
    if where.is_dir():
        yield from (path.stem for path in sorted(where.glob("*.json")))


def refuse_known(state_dir: str | None, move_id: str) -> None:
    """UsageError where a migration of that id was begun and not ended."""
    if (directory(state_dir) / f"{move_id}.json").exists():
        raise UsageError(
            f"migration {move_id} was begun before",
            hint=f"natkeep migrate --resume {move_id} or --rollback {move_id}; "
            f"natkeep finish {move_id}",
        )
