"""the hook with NATKEEP_MAP: it prepares by itself, as soon as the tree's namespace is there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from fake_kernel import FakeKernel, FakeSite
from hook_caller import BEFORE, CORPUS, NEW, OLD, TREE, Criu, own_netns

from natkeep.checkpoint.images import read_checkpoint
from natkeep.criu import environment, hook
from natkeep.criu.dump import read_maps
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.prepare import prepare
from natkeep.plan.identity import Identity
from natkeep.plan.observation import Gate
from natkeep.plan.tuples import Endpoint, parse_address
from natkeep.state.directory import StateDirectory


def test_a_tree_in_crius_namespace_is_prepared_at_pre_restore_and_opened_at_post_restore(
    criu: Criu, capsys: pytest.CaptureFixture[str]
) -> None:
    criu.patch.setattr(FakeKernel, "identity", lambda *_: Identity(0, 1))  # both names are of one
    assert criu.call("pre-restore") == 0
    assert criu.gates() == {BEFORE: {criu.id: Gate.CLOSED}}
    assert criu.call("post-restore") == 0
    assert criu.gates() == {BEFORE: {criu.id: Gate.OPEN}}
    assert capsys.readouterr().err.splitlines() == [
        f"natkeep-hook: {criu.id}: {OLD}={NEW}, 5 prepared",
        f"natkeep-hook: {criu.id}: gate open",
    ]


def test_a_tree_with_a_namespace_of_its_own_is_prepared_when_that_is_there(
    criu: Criu, images: Path
) -> None:
    own_netns(images)
    assert criu.call("pre-restore") == 0
    assert criu.gates() == {}
    for _ in range(2):  # CRIU before 4.2 calls twice under RPC
        assert criu.call("post-setup-namespaces") == 0
        applied = criu.kernel.applied
        assert criu.gates() == {TREE: {criu.id: Gate.CLOSED}}
    assert applied == criu.kernel.applied
    for _ in range(2):
        assert criu.call("post-restore") == 0
        assert criu.gates() == {TREE: {criu.id: Gate.OPEN}}


def test_a_tree_that_turns_out_to_be_elsewhere_is_prepared_there_and_opened(criu: Criu) -> None:
    assert criu.call("pre-restore") == 0
    assert criu.gates() == {BEFORE: {criu.id: Gate.CLOSED}}
    assert criu.call("post-restore") == 0
    assert criu.gates() == {TREE: {criu.id: Gate.OPEN}}


def test_new_auto_is_read_in_the_trees_namespace(criu: Criu, images: Path) -> None:
    own_netns(images)
    criu.kernel.sites[TREE] = FakeSite(addresses={parse_address("10.9.0.7")})
    assert criu.call("post-setup-namespaces", NATKEEP_MAP=f"{OLD}=auto") == 0
    journal = StateDirectory(create=False).load(criu.id)
    assert [str(map_) for map_ in journal.move.maps] == [f"{OLD}=10.9.0.7"]
    assert journal.image is not None


def test_a_map_of_one_port_keeps_what_is_at_that_port(criu: Criu, images: Path) -> None:
    own_netns(images)
    criu.kernel.sites[TREE] = FakeSite(addresses={parse_address("10.9.0.7")})
    all_of = read_checkpoint(str(images)).connections.at(parse_address(OLD))
    port = next(iter(all_of)).destination.port
    assert criu.call("post-setup-namespaces", NATKEEP_MAP=f"{OLD}:{port}=auto:8080") == 0

    journal = StateDirectory(create=False).load(criu.id)
    assert [str(map_) for map_ in journal.move.maps] == [f"{OLD}:{port}=10.9.0.7:8080"]
    [kept] = journal.move.share(journal.connections)
    assert kept == all_of.at(Endpoint(parse_address(OLD), port))


@pytest.mark.parametrize(
    ("text", "maps"),
    [
        (f"{OLD}:80", f"{OLD}:80=192.0.2.1:80"),
        (f"{OLD}:80={NEW}:8080,{OLD}", f"{OLD}:80={NEW}:8080 {OLD}=192.0.2.2"),
        ("[fd00:2::10]:80", "[fd00:2::10]:80=[2001:db8::1]:80"),
    ],
)
def test_what_leaves_a_source_may_be_one_port(text: str, maps: str) -> None:
    assert " ".join(map(str, read_maps(text))) == maps


def test_what_a_failed_restore_left_is_replaced_at_the_same_place_and_else_undone(
    criu: Criu, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_netns(images)
    gone = "criu-4194304-1" + environment._suffix(None)
    with monkeypatch.context() as earlier:
        earlier.setattr(environment, "own_id", lambda _: gone)
        assert criu.call("post-setup-namespaces") == 0
    assert criu.gates() == {TREE: {gone: Gate.CLOSED}}
    assert criu.call("post-setup-namespaces") == 0
    assert criu.gates() == {TREE: {criu.id: Gate.CLOSED}}
    assert StateDirectory(create=False).ids() == (criu.id,)


def test_what_was_opened_is_nobodys_to_clear(
    criu: Criu, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own_netns(images)
    gone = "criu-4194304-1" + environment._suffix(None)
    with monkeypatch.context() as earlier:
        earlier.setattr(environment, "own_id", lambda _: gone)
        assert criu.call("post-restore") == 0
    capsys.readouterr()
    assert criu.call("post-setup-namespaces") == 4
    assert f"of moves {criu.id} and {gone}" in capsys.readouterr().err  # port 53 of UDP is its
    assert criu.gates() == {TREE: {gone: Gate.OPEN}}


@pytest.mark.parametrize(
    ("environment", "code", "said"),
    [
        ({"NATKEEP_ID": "web"}, 2, "NATKEEP_ID and NATKEEP_MAP contradict each other"),
        ({"NATKEEP_MAP": OLD}, 2, "'10.2.0.10' is not of the form OLD=NEW"),
        ({"NATKEEP_MAP": f"{OLD}={NEW},"}, 2, "'' is not of the form OLD=NEW"),
        ({"NATKEEP_MAP": f"{OLD}=auto"}, 4, "has not one IPv4 address but none"),
        ({"NATKEEP_MAP": f"10.9.9.9={NEW}"}, 4, "has the local address 10.9.9.9"),
        ({"NATKEEP_MODE": "magic"}, 2, "NATKEEP_MODE: 'magic' is none of"),
        ({"CRTOOLS_IMAGE_DIR": "/nowhere"}, 2, "cannot open '/nowhere'"),
        ({"CRTOOLS_IMAGE_DIR": "/"}, 2, "does not name the CRIU that calls"),
    ],
)
def test_bad_orders_end_the_restore_with_one_line_and_leave_nothing(
    environment: dict[str, str],
    code: int,
    said: str,
    criu: Criu,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert criu.call("post-setup-namespaces", **environment) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("natkeep-hook: ")
    assert said in err
    assert criu.gates() == {}
    assert StateDirectory(create=False).ids() == ()


def test_a_damaged_image_ends_the_restore(
    criu: Criu, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (images / "files.img").read_bytes()
    (images / "files.img").write_bytes(whole[:-1])
    assert criu.call("pre-restore") == 3
    assert capsys.readouterr().err.count("\n") == 1
    assert criu.gates() == {}


@pytest.mark.root
def test_the_operators_policy_binds_the_hook(
    criu: Criu, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "natkeep.toml"
    file.write_text("max_connections = 3\n")
    assert criu.call("pre-restore") == 4
    assert "5 connections are more than this machine allows, 3" in capsys.readouterr().err
    file.write_text("max_connection = 3\n")
    assert criu.call("pre-restore") == 2
    assert "unknown key max_connection " in capsys.readouterr().err
    assert criu.gates() == {}


@pytest.mark.root
def test_standing_orders_pass_by_whatever_has_nothing_to_keep(
    criu: Criu,
) -> None:
    criu.stand('map = ["10.9.9.9=auto"]')
    assert criu.call("post-restore") == 0
    assert criu.gates() == {}
    criu.stand(f'map = ["{OLD}={NEW}"]')
    assert criu.call("post-restore") == 0
    assert criu.gates() == {TREE: {criu.id: Gate.OPEN}}


@pytest.mark.root
@pytest.mark.parametrize("new", ["auto", NEW])
def test_a_standing_map_leaves_a_restore_at_home_alone(
    new: str, criu: Criu, capsys: pytest.CaptureFixture[str]
) -> None:
    """OLD is an address of that host: there is nothing to translate, and NEW may be elsewhere."""
    criu.stand(f'map = ["{OLD}={new}"]')
    for name in (BEFORE, TREE):
        criu.kernel.sites[name] = FakeSite(addresses={parse_address(OLD)})
    for action in ("pre-restore", "post-restore"):
        assert criu.call(action) == 0
        assert capsys.readouterr().err == (
            "natkeep-hook: no connection of this image is to be kept here\n"
        )
    assert criu.gates() == {}


@pytest.mark.root
def test_of_standing_maps_only_those_of_the_image_are_looked_at_closely(
    criu: Criu,
) -> None:
    """Of another OLD, NEW=auto need not be one address here."""
    criu.stand(f'map = ["2001:db8::1=auto", "{OLD}={NEW}", "10.9.9.9=auto"]')
    assert criu.call("post-restore") == 0
    journal = StateDirectory(create=False).load(criu.id)
    assert [str(map_) for map_ in journal.move.maps] == [f"{OLD}={NEW}"]


@pytest.mark.root
def test_a_standing_order_tells_of_a_relay_and_of_peers_that_this_image_has(
    criu: Criu,
) -> None:
    order = f'map = ["{OLD}={NEW}"]\nvia = ["10.2.0.11"]\npeer_map = ["10.9.9.9=10.9.9.8"]'
    criu.stand(order)
    assert criu.call("post-restore") == 0
    journal = StateDirectory(create=False).load(criu.id)
    assert [str(via) for via in journal.move.vias] == ["10.2.0.11:10000-32767"]
    assert journal.move.peer_maps == ()


def test_a_hook_that_takes_too_long_is_undone_and_ends_the_restore(
    criu: Criu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hook, "DEADLINE", 0.1)
    real = FakeKernel.apply

    def hang(self: FakeKernel, *arguments: object) -> object:
        subprocess.run(["sleep", "5"], check=False)
        return real(self, *arguments)  # type: ignore[arg-type]  # whatever it was given

    monkeypatch.setattr(FakeKernel, "apply", hang)
    assert criu.call("pre-restore") == 1
    assert "took longer than 0.1 s, and was undone" in capsys.readouterr().err
    assert criu.gates() == {}


def test_an_unforeseen_error_is_one_line_too(
    criu: Criu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("natkeep.criu.prepare_in_hook.prepare", fail)
    assert criu.call("pre-restore") == 1
    assert capsys.readouterr().err == "natkeep-hook: ZeroDivisionError: by\\nzero\n"


# ---- NATKEEP_ID: is it this tree, and this dump? -----------------------------------------------


def prepare_at(criu: Criu, images: Path, where: str) -> None:
    from natkeep.checkpoint.images import read_checkpoint
    from natkeep.plan.move import Map, Move, Site
    from natkeep.plan.roles import Role

    maps = (Map(parse_address(OLD), parse_address(NEW)),)
    checkpoint = read_checkpoint(images)
    prepare(
        Executor(criu.kernel, StateDirectory(create=True)),
        Move("web", maps, (Site(Role.DESTINATION, where),)),
        checkpoint.connections,
        image=checkpoint.run_id,
    )
    criu.patch.delenv("NATKEEP_MAP")
    criu.patch.setenv("NATKEEP_ID", "web")


@pytest.mark.parametrize(
    ("at_tree", "other_dump", "environment", "code", "said"),
    [
        (True, False, {}, 0, "web: gate open"),
        (False, False, {}, 4, "web was prepared for another namespace than that of the"),
        (True, True, {}, 4, "web was prepared from the image of another dump"),
        (True, False, {"NATKEEP_MODE": "stateful"}, 0, "web: gate open"),
        (True, False, {"NATKEEP_MODE": "stateless"}, 2, "to be stateless, but web is stateful"),
        (True, False, {"CRTOOLS_IMAGE_DIR": ""}, 2, "CRTOOLS_IMAGE_DIR is not set"),
    ],
)
def test_only_the_move_of_this_tree_and_this_dump_is_opened(
    at_tree: bool,
    other_dump: bool,
    environment: dict[str, str],
    code: int,
    said: str,
    criu: Criu,
    images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = TREE if at_tree else "elsewhere"
    prepare_at(criu, images, where)
    if other_dump:
        shutil.copy(CORPUS / "half-closed/inventory.img", images)
    assert criu.call("post-restore", **environment) == code
    assert said in capsys.readouterr().err
    assert criu.gates() == {where: {"web": Gate.CLOSED if code else Gate.OPEN}}


def prepare_for(criu: Criu, where: str, old: str) -> None:
    """A move of others: it says neither from which dump, nor has it connections of the image."""
    from natkeep.plan.move import Map, Move, Site
    from natkeep.plan.roles import Role
    from natkeep.plan.tuples import Connections, Endpoint, FourTuple

    move = Move(
        "web", (Map(parse_address(old), parse_address(NEW)),), (Site(Role.DESTINATION, where),)
    )
    peer = Endpoint.parse("10.1.0.2:7")
    kept = Connections.of([FourTuple(peer, Endpoint(parse_address(old), 5000))])
    prepare(Executor(criu.kernel, StateDirectory(create=True)), move, kept)


@pytest.mark.root
@pytest.mark.parametrize(
    ("where", "old", "boot", "said"),
    [
        ("elsewhere", OLD, "", "move web is for another namespace"),
        ("tree", OLD, "an earlier one", "move web is of an earlier boot"),
        (None, OLD, "", "there is no move web"),
        ("tree", "10.9.9.9", "", "no connection of this image is at an OLD of web"),
    ],
)
def test_a_standing_id_leaves_the_restores_of_others_alone(
    where: str | None,
    old: str,
    boot: str,
    said: str,
    criu: Criu,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as earlier:
        if boot:
            earlier.setattr("natkeep.state.directory.read_boot_id", lambda: boot)
        if where is not None:
            prepare_for(criu, TREE if where == "tree" else where, old)
    criu.stand('id = "web"')
    before = criu.gates()
    assert criu.call("post-restore") == 0
    assert criu.gates() == before
    assert capsys.readouterr().err == (
        f"natkeep-hook: the standing order is not about this restore: {said}\n"
    )


@pytest.mark.root
def test_a_standing_id_that_is_about_this_restore_is_an_order_as_any(
    criu: Criu, images: Path
) -> None:
    prepare_at(criu, images, TREE)
    criu.stand('id = "web"')
    inventory = images / "inventory.img"
    own = inventory.read_bytes()
    shutil.copy(CORPUS / "half-closed/inventory.img", images)
    assert criu.call("post-restore") == 4  # another dump, with connections at OLD
    inventory.write_bytes(own)
    assert criu.call("post-restore") == 0
    assert criu.gates() == {TREE: {"web": Gate.OPEN}}
