"""the runs: one story at one place, struck at a point or killed at some time, and then judged."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from place import SITES, Place, Said, Surfaces, listing
from stories import GC, KILLS, Story

from natkeep.lab.host_state import difference


@dataclass
class Result:
    """wrong: what was not as it was to be; half_way: the kill came when a move was on disk."""

    name: str
    wrong: list[str] = field(default_factory=list)
    compared: int = 0
    half_way: bool = False


def _living(rows: list[tuple[str, str]]) -> dict[str, object]:
    """What `inspect --live --json` says of a process with these connections."""
    rest = {"device": None, "unsent": 0, "kept": True, "reason": None}
    sockets = [
        {"protocol": "tcp", "state": "ESTABLISHED", "local": local, "peer": peer, **rest}
        for local, peer in rows
    ]
    return {"schema": 1, "live": True, "sockets": sockets}


class _Stage:
    """A story at its place, and the result so far."""

    def __init__(self, story: Story, name: str) -> None:
        self.story, self.result = story, Result(name)
        self.rows = listing(story.version, story.count)
        self.place = Place(story.sites, rows=self.rows, lock=story.lock)

    def __enter__(self) -> _Stage:
        self.place.__enter__()
        self._write("list", self.rows)
        # Another move's: the same ends, but for the ports.
        self._write("other", [(local, f"{peer[:-4]}9999") for local, peer in self.rows[:1]])
        self._write("udp", [(f"udp {local}", peer) for local, peer in self.rows])
        (self.place.directory / "live").write_text(json.dumps(_living(self.rows)))
        self.origin = self.place.look()
        return self

    def __exit__(self, *_: object) -> None:
        self.place.__exit__()

    def _write(self, name: str, rows: list[tuple[str, str]]) -> None:
        text = "".join(f"{local} {peer}\n" for local, peer in rows)
        (self.place.directory / name).write_text(text)

    def tell(self, words: tuple[str, ...], **how: object) -> Said:
        """Run one verb of the story, or what another program does in front of it."""
        if words[0] == "at":
            return self.place.harm(*words[1:])
        if words[0].startswith("fault="):
            words, how["strikes"] = words[1:], words[0].partition("=")[2]
        names = {site: self.place.name(site) for site in SITES}
        files = {n: self.place.directory / n for n in ("list", "other", "udp", "image", "live")}
        return self.place.natkeep(*(word.format(**names, **files) for word in words), **how)

    def tell_well(self, words: tuple[str, ...]) -> None:
        """Run one verb, which must succeed."""
        said = self.tell(words)
        if said.code != (-9 if words[0].endswith(":kill") else 0):
            self.result.wrong.append(f"{words[:2]} exited {said.code}: {_last(said.words)}")

    def compare(self, when: str, wanted: Surfaces, found: Surfaces, *, but: str = "") -> None:
        """Note what differs, and how much was compared."""
        names = [name for name in wanted if not (but and name.endswith(but))]
        self.result.compared += len(names)
        told = difference({n: wanted[n] for n in names}, found)
        if told:
            self.result.wrong.append(f"{when}: {told}")

    def end(self, when: str, *, lock_is_gone: bool = False) -> None:
        """Tear all moves down, and look at the twelve surfaces."""
        for move_id in self.story.ids:
            self.tell_well(("teardown", move_id, "--yes"))
        if self.story.last:
            self.tell_well(self.story.last)
        wanted, found = self.origin, self.place.look()
        if lock_is_gone:
            wanted, found = _without_lock(wanted), _without_lock(found)
        self.compare(when, wanted, found)


def trace(story: Story) -> tuple[set[str], str]:
    """The points that the story's verb reaches; and what went wrong without a fault."""
    with _Stage(story, story.name) as stage:
        for words in story.before:
            stage.tell_well(words)
        seen = stage.place.directory / "seen"
        said = stage.tell(story.verb, strikes=story.fault, traced=seen)
        if bool(said.code) != bool(story.fault):
            stage.result.wrong.append(f"exited {said.code}: {_last(said.words)}")
        stage.end("without a fault", lock_is_gone=bool(story.lock) and not story.fault)
        points = set(seen.read_text().split()) if seen.exists() else set()
        return points, "; ".join(stage.result.wrong)


def strike(story: Story, point: str, kind: str) -> Result:
    """Tell the story with a fault of *kind* at *point*."""
    with _Stage(story, f"{point}:{kind} in {story.name!r}") as stage:
        for words in story.before:
            stage.tell_well(words)
        before = stage.place.look() if story.before else stage.origin
        faults = f"{story.fault},{point}:{kind}".lstrip(",")
        said = stage.tell(story.verb, strikes=faults)
        if f"natkeep: fault {point}:{kind}" not in said.words:
            stage.result.wrong.append(f"it did not strike: {_last(said.words)}")
        if kind == "kill":
            if said.code != -9:
                stage.result.wrong.append(f"exited {said.code}")
        else:
            _judge(stage, said, before)
        taken = bool(story.lock) and _has_taken_lock(stage.place.state)
        stage.end("after teardown", lock_is_gone=taken)
        if kind == "kill":
            _tell_again(stage)
        return stage.result


def _has_taken_lock(state: Path) -> bool:
    """Whether a prepare at the source came to its end: by design no teardown puts the lock back."""
    for journal in state.glob("web.journal"):
        header, *records = map(json.loads, journal.read_text().split("\n")[:-1])
        if "TakeOverLock" in header["steps"]:
            number = header["steps"].index("TakeOverLock")
            states = [record["state"] for record in records if record["step"] == number]
            return states[-1:] == ["done"]
    return False


def _judge(stage: _Stage, said: Said, before: Surfaces) -> None:
    """Whether what there is fits the exit code."""
    story, found = stage.story, stage.place.look()
    if said.code == 0 and story.undoes:
        return  # the end compares
    if said.code == 0:
        stage.tell_well(("status", story.verb[1], "--strict"))
    elif said.code in (1, 5, 7) and not story.is_whole:
        return
    elif said.code in (1, 5, 7):
        wanted = before
        if story.undoes and not difference(_at_sites(stage.origin), found):
            wanted = stage.origin
        but = "state directory" if story.before else ""
        stage.compare(f"after exit {said.code}", wanted, found, but=but)
    elif said.code != 8 or not re.search(r"not undone|left", said.words):
        stage.result.wrong.append(f"exited {said.code}: {_last(said.words)}")


def _at_sites(surfaces: Surfaces) -> Surfaces:
    return {name: text for name, text in surfaces.items() if name != "state directory"}


def _tell_again(stage: _Stage) -> None:
    """The same once more, without a fault; a killed move is in nobody's way."""
    for words in (*stage.story.before, stage.story.verb):
        stage.tell_well(words)
    stage.end("after it was done again", lock_is_gone=bool(stage.story.lock))


# ---- kills at random ---------------------------------------------------------------------------

_durations: dict[str, float] = {}


def _duration(story: Story) -> float:
    """How long the story's verb takes here, undisturbed, in s."""
    if story.name not in _durations:
        with _Stage(story, story.name) as stage:
            for words in story.before:
                stage.tell_well(words)
            _durations[story.name] = stage.tell(story.verb).seconds
    return _durations[story.name]


def kill(number: int, seed: float) -> Result:
    """Kill run *number* at a time that *seed* says."""
    story, dice = KILLS[number % len(KILLS)], random.Random(seed)
    delay = dice.uniform(0, 1.05) * _duration(story)
    with _Stage(story, f"kill {number} of {story.name!r} after {delay * 1000:.0f} ms") as stage:
        for words in story.before:
            stage.tell_well(words)
        said = stage.tell(story.verb, kill_after=delay)
        on_disk = any(Path(stage.place.state).glob("*.journal"))
        stage.result.half_way = said.code == -9 and on_disk
        if said.code not in (0, -9):
            stage.result.wrong.append(f"exited {said.code}: {_last(said.words)}")
        if number % 3 == 0:
            stage.tell_well(GC)
        stage.end("after teardown")
        if number % 10 == 0:
            _tell_again(stage)
        return stage.result


def _without_lock(surfaces: Surfaces) -> Surfaces:
    """Without CRIU's table or rules, and without the numbers of what was made anew."""
    ruleset, iptables = "source: ruleset", "source: iptables"
    things = json.loads(surfaces[ruleset])["nftables"]
    kept = [thing for thing in things if not re.search('CRIU|"family": "ip6?"', json.dumps(thing))]
    rules = surfaces[iptables].splitlines()
    others = "\n".join(rule for rule in rules if "0xc114" not in rule)
    return {**surfaces, ruleset: json.dumps(kept), iptables: others}


def _last(words: str) -> str:
    return " / ".join(words.strip().splitlines()[-2:])
