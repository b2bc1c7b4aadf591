"""natkeep migrate of containers: what their tools are asked, and what cannot be moved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest

from natkeep.cli import main
from natkeep.errors import RefusedError
from natkeep.migrate.containers import Podman, Runc, make_engine
from natkeep.migrate.host import Answer, Host, HostError
from natkeep.migrate.record import Record

NETNS = {"type": "network", "path": "/run/netns/web"}
MISSING = Answer(1, "", "there is none")
NO_PROGRAM = Answer(127, "", "No such file or directory")


def config(**other: Any) -> dict[str, Any]:
    """A container's config.json."""
    plain = {"process": {}, "root": {"path": "rootfs"}, "linux": {"namespaces": [NETNS]}}
    return {**plain, **other}


class Machine:
    """A host whose programs answer so; by their first words, the longest that fits."""

    hook = "/usr/bin/natkeep-hook"

    def __init__(self, role: str, **answers: Any) -> None:
        self.role, self.asked = role, list[Sequence[str]]()
        self.answers: dict[str, Any] = {
            "criu": "Version: 4.2", "test": "", "rm": "", "runc delete": "",
            "podman image": "", "podman rm": "", **answers,
        }  # fmt: skip

    def __str__(self) -> str:
        return self.role

    def run(self, *words: str, ok: object = None, **_: object) -> Answer:
        self.asked.append(words)
        if (
            words[0] == "stat" and "stat" not in self.answers
        ):  # each network namespace but natkeep's own is the container's
            found = ["1" if path == "/proc/self/ns/net" else "2" for path in words[4:]]
            return Answer(0, "\n".join(found), "")
        line = " ".join(words)
        known = [name for name in self.answers if line.startswith(name)]
        answer = self.answers[max(known, key=len)] if known else MISSING
        if isinstance(answer, Answer):
            return answer
        return Answer(0, answer if isinstance(answer, str) else json.dumps(answer), "")


def hosts(at_source: Mapping[str, Any], at_destination: Mapping[str, Any]) -> tuple[Host, Host]:
    machines = Machine("source", **at_source), Machine("destination", **at_destination)
    return cast(Host, machines[0]), cast(Host, machines[1])


STATE = {"pid": 7, "status": "running", "bundle": "/bundles/web"}
RUNC = {"runc state": STATE, "cat /bundles/web/config.json": config()}
THERE = {"cat /bundles/web/config.json": config()}


def record(engine: str, **other: Any) -> Record:
    return Record(
        "web", "a", 0, "b", engine=engine, container="web", images="/var/tmp/natkeep/web", **other
    )


def test_the_process_and_its_namespace_are_asked_of_runc() -> None:
    move = record("runc")
    make_engine(move).look(*hosts(RUNC, THERE))
    assert (move.pid, move.bundle) == (7, "/bundles/web")
    assert move.site("source") == "source=/run/netns/web"
    assert move.site("relay") == "relay=/run/netns/web"
    assert move.site("destination") == "destination=/run/netns/web"
    assert move.site("gateway") == "gateway"


def test_a_container_of_the_host_network_is_where_natkeep_is() -> None:
    host = config(linux={})
    move = record("runc")
    source, destination = hosts(
        {**RUNC, "cat /bundles/web/config.json": host}, {"cat /bundles/web/config.json": host}
    )
    with pytest.raises(RefusedError, match="another network namespace than its configuration"):
        make_engine(move).look(source, destination)  # as one that was run by `ip netns exec`
    source.run = lambda *words, **_: (  # type: ignore[method-assign, assignment]
        Answer(0, "1\n1", "") if words[0] == "stat" else Machine.run(cast(Any, source), *words)
    )
    make_engine(move).look(source, destination)
    assert move.site("source") == "source"
    assert move.site("destination") == "destination"


@pytest.mark.parametrize(
    ("at_source", "at_destination", "told"),
    [
        ({"runc state": NO_PROGRAM}, {}, "source has no runc"),
        ({"runc state": MISSING}, {}, "source: runc has no container web running"),
        ({"runc state": {**STATE, "status": "stopped"}}, {}, "no container web running"),
        ({}, {"runc state": STATE}, "destination has a container web already"),
        ({}, {"runc state": NO_PROGRAM}, "destination has no runc"),
        ({}, {"cat": MISSING, "cat /bundles/web/config.json": MISSING},
         "destination has no /bundles/web/config.json"),
        ({}, {"test": MISSING}, "destination has no /bundles/web/rootfs"),
        ({}, {"cat /bundles/web/config.json": config(process={"terminal": True})}, "a terminal"),
        ({}, {"cat /bundles/web/config.json": config(linux={"namespaces": [{"type": "network"}]})},
         "its address is known only when it has been restored"),
        ({}, {"criu": NO_PROGRAM}, "destination has no criu"),
        ({}, {"criu": "Version: 3.17.1"}, "destination has CRIU 3.17, which calls no script"),
        ({}, {"stat": Answer(0, "1\n1", "")}, "natkeep's own network namespace by a path"),
    ],
)  # fmt: skip
def test_what_runc_cannot_move_is_refused_by_name(
    at_source: dict[str, Any], at_destination: dict[str, Any], told: str
) -> None:
    source, destination = hosts({**RUNC, **at_source}, {**THERE, **at_destination})
    with pytest.raises((RefusedError, HostError), match=told):
        make_engine(record("runc")).look(source, destination)


def test_a_process_of_a_container_is_not_moved_without_its_tool() -> None:
    with pytest.raises(RefusedError, match="process 7 is in another network namespace") as refused:
        make_engine(Record("m7", "a", 7, "b")).look(*hosts({}, {"test": MISSING}))
    assert refused.value.hint == "of a container: A:runc:NAME, A:podman:NAME"


def test_each_command_of_runc() -> None:
    move = record(
        "runc", bundle="/b", pre_dumps=2, found={"bundle": "/a"}, dump_options=["--file-locks"]
    )
    engine = make_engine(move)
    assert isinstance(engine, Runc)
    source, destination = hosts({}, {})
    first, second = (" ".join(engine.pre_dump(number).words) for number in (1, 2))
    assert "--pre-dump" in first
    assert "--parent-path" not in first
    assert "--parent-path ../pre-1" in second
    dump = engine.dump(source, {})
    assert "--parent-path ../pre-2 --file-locks web" in " ".join(dump.words)
    assert dump.environment == {"HOME": "/var/tmp/natkeep/web/criu/source-dump"}
    assert "--bundle /b" in " ".join(engine.restore(destination, move.hook).words)
    back = engine.restore(source, {})
    assert "--bundle /a" in " ".join(back.words)
    assert back.environment == {}  # no hook is to be called


FOUND = {
    "Id": "0123", "StaticDir": "/c/0123/userdata", "OCIRuntime": "runc", "Image": "4567",
    "ImageName": "localhost/web", "OCIConfigPath": "/c/config.json",
    "State": {"Running": True, "Pid": 7}, "HostConfig": {"NetworkMode": "ns:/run/netns/web"},
}  # fmt: skip
PODMAN = {"podman container inspect": [FOUND], "cat /c/config.json": config()}


def found(**other: Any) -> dict[str, Any]:
    return {"podman container inspect": [{**FOUND, **other}]}


def test_the_container_is_asked_of_podman() -> None:
    move = record("podman")
    engine = make_engine(move)
    assert isinstance(engine, Podman)
    source, destination = hosts(PODMAN, {})
    engine.look(source, destination)
    assert move.pid == 7
    assert move.site("destination") == "destination=/run/netns/web"
    assert engine.image == "/c/0123/userdata/checkpoint"
    assert "--import" in engine.restore(destination, move.hook).words
    assert engine.restore(source, move.hook).words[-1] == "web"  # from what stays there


@pytest.mark.parametrize(
    ("at_source", "at_destination", "told"),
    [
        (found(HostConfig={"NetworkMode": "bridge"}), {}, "a network of podman's own .bridge."),
        (found(HostConfig={"NetworkMode": "host", "AutoRemove": True}), {}, "runs with --rm"),
        (found(Pod="89"), {}, "in a pod"),
        (found(State={"Running": False, "Pid": 0}), {}, "no container web running"),
        ({}, {"podman container inspect": [FOUND]}, "destination has a container web already"),
        ({}, {"podman image": MISSING}, "destination lacks localhost/web, 4567"),
    ],
)
def test_what_podman_cannot_move_is_refused_by_name(
    at_source: dict[str, Any], at_destination: dict[str, Any], told: str
) -> None:
    source, destination = hosts({**PODMAN, **at_source}, at_destination)
    with pytest.raises(RefusedError, match=told):
        make_engine(record("podman")).look(source, destination)


def test_podman_takes_no_pre_dump() -> None:
    with pytest.raises(RefusedError, match="--pre-dump"):
        make_engine(record("podman", pre_dumps=1)).look(*hosts(PODMAN, {}))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a:runc:", "b"], "'a:runc:' is not [USER@]A:PID"),
        (["runc:web", "b"], "'runc:web' is not [USER@]A:PID"),
        (["a:docker:web", "b"], "(of a container: A:runc:NAME, A:podman:NAME)"),
        (["a:runc:web", "b", "--criu", "/opt/criu"], "runc takes criu from its PATH"),
        (["a:runc:web", "b", "--images", "/a b"], "takes no path with blanks"),
        (["a:1", "b", "--bundle", "/b"], "--bundle is for [USER@]A:runc:NAME"),
        (["a:podman:web", "b", "--bundle", "/b"], "--bundle is for [USER@]A:runc:NAME"),
        (["a:runc:web+1", "b"], "web+1"),
    ],
)
def test_a_wrong_command_line_is_exit_2(tmp_path, capsys, words: list[str], told: str) -> None:
    assert main(["migrate", *words, "--state-dir", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err
