"""plan/process.py: what of a tree CRIU would stumble on at the place of its restore."""

from __future__ import annotations

import pytest

from natkeep.plan.findings import CATALOGUE
from natkeep.plan.move import Site
from natkeep.plan.process import File, Shown, Tree, judge, judge_dump
from natkeep.plan.roles import Role

HERE = Site(Role.DESTINATION)
FILE, FOLDER = 0o100644, 0o40755
TREE = Tree(
    frozenset({300, 301}),
    (File("/bin/serve", 10, 0o100755), File("/var/log/serve.log", None, FILE), File("/", None)),
    ("/run/serve",),
)
FOUND = {
    "/bin/serve": (10, 0o100755),
    "/var/log/serve.log": (7, FILE),
    "/": (0, FOLDER),
    "/run/serve": (0, FOLDER),
}
NOBODY: frozenset[int] = frozenset()


def codes(tree: Tree, shown: Shown) -> list[str]:
    found = [*judge(HERE, tree, shown)]
    assert {each.code for each in found} <= {"", *CATALOGUE}
    return [each.code for each in found if each.code]


def test_all_is_there() -> None:
    found = [*judge(HERE, TREE, Shown(NOBODY, FOUND))]

    assert [each.detail for each in found] == [
        "pids: 2 ids are free",
        "3 files and directories are there, and as they were",
        "1 directories of Unix sockets are there",
    ]
    assert codes(TREE, Shown(frozenset({1, 299}), FOUND)) == []


@pytest.mark.parametrize(
    ("changed", "code", "said"),
    [
        ({"/var/log/serve.log": None}, "file-missing", "not there: /var/log/serve.log"),
        ({"/bin/serve": (11, 0o100755)}, "file-differs", "/bin/serve has 11 octets, not 10"),
        ({"/bin/serve": (10, FILE)}, "file-differs", "has mode 100644, not 100755"),
        ({"/run/serve": None}, "socket-directory", "not there: /run/serve"),
        ({"/run/serve": (0, FILE)}, "socket-directory", "not there: /run/serve"),
    ],
)
def test_what_is_not_there_or_another_is_named(
    changed: dict[str, tuple[int, int] | None], code: str, said: str
) -> None:
    found = {name: seen for name, seen in {**FOUND, **changed}.items() if seen}

    assert codes(TREE, Shown(NOBODY, found)) == [code]
    assert any(said in each.detail for each in judge(HERE, TREE, Shown(NOBODY, found)))


def test_ids_in_use_are_named() -> None:
    [first, *_] = judge(HERE, TREE, Shown(frozenset({301, 5}), FOUND))

    assert (first.code, first.detail) == ("pid-in-use", "in use: 301 (of 2 ids)")


def test_many_are_counted() -> None:
    tree = Tree(files=tuple(File(f"/lib/{number}") for number in range(9)))
    details = [each.detail for each in judge(HERE, tree, Shown(NOBODY, {}))]

    assert "not there: /lib/0, /lib/1, /lib/2, /lib/3 and 5 more" in details


def test_a_tree_with_namespaces_of_its_own() -> None:
    tree = Tree(files=TREE.files, own_mounts=True)

    assert codes(tree, Shown(NOBODY, {})) == ["files-not-seen"]


def test_shared_memory_of_an_ipc_namespace_that_is_not_its_own() -> None:
    assert [each.code for each in judge_dump(Tree(shared_memory=(7, 8)))] == ["sysv-ipc"]
    assert [each.code for each in judge_dump(Tree())] == [""]
