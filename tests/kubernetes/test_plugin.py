"""natkeep-cni as a container runtime starts it, in namespaces of the test; no runtime is needed.

What it does among real plugins, the scenario pod_moves shows.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hook_caller import NEW, OLD, cable

from natkeep.cni import plugin
from natkeep.lab.host import await_true

PLUGIN = Path(sys.executable).with_name("natkeep-cni")
RESULT = (
    '{"cniVersion":"1.0.0","interfaces":[{"name":"veth0"},{"name":"eth0","sandbox":"/x"}],'
    '"ips":[{"address":"%s/24","interface":1},{"address":"192.0.2.9/24","interface":0}],'
    '"dns":{"search":["a\\"}b\\\\"]},"big":12345678901234567890}'
).replace("%s", NEW)
POD = {"K8S_POD_NAMESPACE": "default", "K8S_POD_NAME": "web-b", "K8S_POD_UID": "u-1"}
ORDER = {"schema": 1, "id": "web", "maps": [f"{OLD}=auto"], "connections": "list"}


class Node:
    """A node with a configuration of the plugin's, its orders and its state directory."""

    def __init__(self, folder: Path, netns: str) -> None:
        self.orders, self.state = folder / "orders", folder / "state"
        self.orders.mkdir(mode=0o755)
        (self.orders / "list").write_text(f"{OLD}:5000 192.0.2.1:40000\n")
        self.netns = netns
        self.more: dict[str, Any] = {}

    def order(self, **keys: Any) -> Path:
        path = self.orders / "default_web-b.json"
        path.write_text(json.dumps(ORDER | keys))
        return path

    def config(self, result: str | None = RESULT) -> str:
        """As libcni writes it: keys in their order, no blanks."""
        given = {"cniVersion": "1.0.0", "name": "pods", "type": "natkeep-cni"}
        given |= {"orders": str(self.orders), "stateDir": str(self.state), **self.more}
        text = json.dumps(given, separators=(",", ":"), sort_keys=True)
        return text if result is None else f'{text[:-1]},"prevResult":{result}}}'

    def environment(self, verb: str, args: dict[str, str]) -> dict[str, str]:
        words = ";".join(f"{key}={value}" for key, value in {"IgnoreUnknown": "1", **args}.items())
        return {
            "CNI_COMMAND": verb, "CNI_CONTAINERID": "c1", "CNI_NETNS": f"/run/netns/{self.netns}",
            "CNI_IFNAME": "eth0", "CNI_ARGS": words, "PATH": "/usr/bin:/bin",
        }  # fmt: skip

    def call(
        self, verb: str, text: str | None = None, *, args: dict[str, str] = POD, at: str = "",
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        given = {**self.environment(verb, args), **environment}
        given = {name: value for name, value in given.items() if value}
        text = self.config() if text is None else text
        enter = ["nsenter", f"--net=/run/netns/{at}"] if at else []
        return subprocess.run(
            [*enter, PLUGIN], input=text, env=given, capture_output=True, text=True
        )

    def does(self, verb: str, text: str | None = None, **environment: str) -> str:
        done = self.call(verb, text, **environment)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        return done.stdout

    def fails(self, verb: str, text: str | None = None, **environment: Any) -> tuple[int, str]:
        done = self.call(verb, text, **environment)
        assert done.returncode == 1
        assert done.stderr == ""
        error = json.loads(done.stdout)
        assert error["cniVersion"] == "1.0.0"
        return error["code"], error["msg"].removeprefix("natkeep-cni: ")

    def told(self) -> dict[str, Any] | None:
        path = self.orders / "default_web-b.new"
        return json.loads(path.read_text()) if path.exists() else None

    def status(self) -> list[dict[str, Any]]:
        natkeep = [PLUGIN.with_name("natkeep"), "status", "--json", "--state-dir", self.state]
        done = subprocess.run(natkeep, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)["moves"]

    def gates(self) -> list[tuple[str, str]]:
        return [(move["id"], move["gate"]) for move in self.status()]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """Of its pod there is no namespace."""
    return Node(tmp_path, "nowhere")


@pytest.fixture
def ready(tmp_path: Path, netns: str) -> Iterator[Node]:
    cable(netns)
    node = Node(tmp_path, netns)
    yield node
    natkeep = [PLUGIN.with_name("natkeep"), "-q", "teardown", "web", "--yes"]
    subprocess.run([*natkeep, "--state-dir", node.state], check=True)


# ---- without an order ----------------------------------------------------------------------------


def test_a_pod_without_an_order_has_its_result_back_octet_by_octet(node: Node) -> None:
    for version in ("1.0.0", "1.1.0"):
        text = node.config().replace("1.0.0", version)
        assert node.does("ADD", text) == RESULT.replace("1.0.0", version) + "\n"
    assert node.does("ADD", args={}) == RESULT + "\n"  # of no pod
    assert node.does("DEL") == node.does("CHECK") == node.does("GC") == ""
    assert not node.state.exists()


@pytest.mark.parametrize(
    "text",
    [
        lambda text: text.replace(":", " : "),
        lambda text: text.replace(",", ",\n\t"),
        lambda text: text.replace("{", '{"args":{"prevResult":{},"orders":"/n"},', 1),
    ],
)
def test_a_configuration_of_another_hand_is_read_too(
    node: Node, text: Callable[[str], str]
) -> None:
    said = node.does("ADD", text(node.config(RESULT.replace(",", ", "))))
    assert json.loads(said) == json.loads(RESULT)


def test_no_program_is_started_for_a_pod_without_an_order(node: Node, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    copy = Path(shutil.copy(PLUGIN, tmp_path / "natkeep-cni"))  # nothing is beside it
    environment = {
        "CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_NETNS": "/x", "CNI_IFNAME": "eth0",
        "CNI_ARGS": ";".join(f"{key}={value}" for key, value in POD.items()),
        "PATH": str(tmp_path / "empty"),
    }  # fmt: skip
    done = subprocess.run(
        ["/bin/sh", copy], input=node.config(), env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, RESULT + "\n", "")


@pytest.mark.parametrize("told", ["{", '{"schema": 1, "id": 5}', ""])
def test_a_pod_can_end_whatever_is_told_of_it(node: Node, tmp_path: Path, told: str) -> None:
    path = node.orders / "default_web-b.new"
    path.write_text(told)
    assert node.does("DEL") == ""
    assert node.call("DEL", node.config().replace('"name"', '"name":"x","na')).returncode == 0
    copy = shutil.copy(PLUGIN, tmp_path / "natkeep-cni")  # natkeep is not there any more
    environment = {**node.environment("DEL", POD), "PATH": "/nowhere"}
    done = subprocess.run(["/bin/sh", copy], input=node.config(), env=environment, text=True)
    assert done.returncode == 0
    assert path.exists()


def test_it_says_its_versions_and_that_it_can_serve(node: Node, tmp_path: Path) -> None:
    said = json.loads(node.does("VERSION"))
    assert said == {"cniVersion": "1.1.0", "supportedVersions": ["1.0.0", "1.1.0"]}
    assert node.does("STATUS", node.config(None)) == ""
    node.more["agent"] = str(tmp_path / "sock")
    for text in (
        node.config(None),
        node.config(None).replace(":", ": "),
    ):  # also past the front
        assert node.fails("STATUS", text)[0] == 50
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(node.more["agent"])
        assert node.does("STATUS", node.config(None)) == ""


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.whole
def test_bad_input_has_the_code_that_the_specification_gives_it(node: Node) -> None:
    config = json.loads(node.config())

    def changed(**keys: Any) -> str:
        return json.dumps({**config, **keys})

    assert node.fails("ADD", changed(cniVersion="0.3.1"))[0] == 1
    assert node.fails("ADD", changed(cniVersion=None))[0] == 1
    assert node.fails("DO")[0] == 4
    for name in ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"):
        assert node.fails("ADD", changed(), **{name: ""}) == (4, f"{name} is not set")
    assert node.fails("ADD", changed(), CNI_CONTAINERID="../c")[0] == 4
    assert node.fails("ADD", changed(), args=POD | {"K8S_POD_NAME": "../b"})[0] == 4
    for text in ("", "{", "[]", '{"cniVersion":' * 100_000):
        assert node.fails("ADD", text)[0] == 6
    for bad in ({"prevResult": None}, {"prevResult": []}, {"orders": 5}, {"orders": "here"}):
        assert node.fails("ADD", changed(**bad))[0] == 7
    assert node.fails("GC", changed(**{"cni.dev/valid-attachments": 5}))[0] == 7
    assert node.fails("ADD", node.config(None)) == (
        7, "no prevResult: natkeep-cni stands at the end of a chain",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "code", "words"),
    [
        ({"schema": 2}, 102, "schema 2 is not 1"),
        ({"maps": []}, 102, "maps: none"),
        ({"maps": [f"{OLD}"]}, 102, "is not of the form OLD=NEW"),
        ({"id": "a/b"}, 102, "a/b"),
        ({"also": 1}, 102, "unknown key also"),
        ({"image": "i"}, 102, "which connections"),
        ({"mode": "other"}, 102, "other"),
        ({"listeners": 1}, 102, "listeners"),
        ({"interface": ""}, 102, "'' is no name of an interface"),
        ({"interface": 5}, 102, "5 is not a text"),
        ({"connections": "absent"}, 103, "absent"),
        ({"maps": [f"{OLD}=10.9.9.9"]}, 104, f"NEW 10.9.9.9 is not of this pod, which has {NEW}"),
        ({"maps": ["fd00::1=auto"]}, 104, "the pod has not one address, but none"),
    ],
)
def test_an_order_that_cannot_be_carried_out_fails_the_pod(
    node: Node, keys: dict[str, Any], code: int, words: str
) -> None:
    path = node.order(**keys)
    found, message = node.fails("ADD")
    assert (found, words in message) == (code, True), message
    path.unlink()
    assert node.does("ADD") == RESULT + "\n"


def test_an_order_that_others_can_write_is_refused(node: Node) -> None:
    path = node.order()
    path.chmod(0o666)
    assert node.fails("ADD") == (102, f"{path} can be written by others than root")
    path.chmod(0o600)
    node.orders.chmod(0o777)
    assert node.fails("ADD") == (102, f"{node.orders} can be written by others than root")
    node.orders.chmod(0o755)
    path.rename(node.orders / "elsewhere")
    path.symlink_to(node.orders / "elsewhere")
    assert node.fails("ADD")[0] == 102


def test_an_order_for_another_pod_of_that_name_is_none(node: Node) -> None:
    node.order(uid="u-2")
    assert json.loads(node.does("ADD")) == json.loads(RESULT)
    args = {name: value for name, value in POD.items() if name != "K8S_POD_UID"}
    code, message = node.fails("ADD", args=args)
    assert (code, "K8S_POD_UID" in message) == (104, True)


# ---- with an order -------------------------------------------------------------------------------


@pytest.mark.root
def test_the_destination_is_prepared_and_undone_with_its_container(ready: Node) -> None:
    ready.order(uid="u-1")
    assert json.loads(ready.does("ADD")) == json.loads(RESULT)
    assert ready.gates() == [("web", "closed")]
    assert ready.told() == {
        "schema": 1, "id": "web", "network": "pods", "container": "c1", "interface": "eth0",
        "maps": [f"{OLD}={NEW}"], "new": [NEW],
    }  # fmt: skip
    assert ready.does("CHECK") == ""

    # An earlier sandbox of that name, which the runtime ends late, takes nothing with it.
    assert ready.does("DEL", CNI_CONTAINERID="c0") == ""
    assert ready.gates() == [("web", "closed")]
    nft = ["ip", "netns", "exec", ready.netns, "nft", "flush", "ruleset"]
    subprocess.run(nft, check=True)
    code, message = ready.fails("CHECK")
    assert (code, message.startswith("web: ")) == (106, True)

    for _ in range(2):
        assert ready.does("DEL", CNI_NETNS="") == ""
        assert (ready.gates(), ready.told()) == ([], None)


@pytest.mark.root
def test_a_list_is_compared_with_the_image_unless_it_is_of_a_dump(ready: Node) -> None:
    for keys, image in ({}, None), ({"dump": "r-1"}, "r-1"):
        ready.order(**keys)
        ready.does("ADD")
        header = json.loads((ready.state / "web.journal").read_text().splitlines()[0])
        assert (header["image"], bool(header["move"].get("live"))) == (image, image is None)


@pytest.mark.root
def test_what_another_sandbox_has_left_is_prepared_anew_unless_it_is_in_use(ready: Node) -> None:
    ready.order()
    ready.does("ADD", CNI_CONTAINERID="c1")
    ready.does("ADD", CNI_CONTAINERID="c2")  # c1 was killed, and nothing was said of it
    assert ready.told()["container"] == "c2"
    natkeep = [PLUGIN.with_name("natkeep"), "-q", "open", "web", "--state-dir", ready.state]
    subprocess.run(natkeep, check=True)
    code, message = ready.fails("ADD", CNI_CONTAINERID="c3")
    assert (code, message.startswith("web is at this node already, and is in use")) == (104, True)
    assert ready.gates() == [("web", "open")]


@pytest.mark.root
def test_gc_undoes_what_is_of_no_attached_container_of_this_network(ready: Node) -> None:
    ready.order()
    ready.does("ADD")
    attached = {"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]}
    for more, left in (
        ({}, 1),  # nothing is known of what is attached
        (attached, 1),
        ({"cni.dev/valid-attachments": [], "name": "others"}, 1),
        ({"cni.dev/valid-attachments": []}, 0),
    ):
        ready.more = more
        assert ready.does("GC", ready.config(None), CNI_CONTAINERID="", CNI_NETNS="") == ""
        assert len(ready.gates()) == left


# ---- a pod in several networks -------------------------------------------------------------------

SECOND = RESULT.replace(NEW, "192.168.7.5").replace("eth0", "net1")
"""What the chain of the other network has made, as Multus has it."""


def at_net1(node: Node, verb: str, name: str = "storage", **environment: str) -> str:
    """What natkeep-cni says of the pod's other interface."""
    text = node.config(SECOND).replace('"name":"pods"', f'"name":"{name}"')
    return node.does(verb, text, CNI_IFNAME="net1", **environment)


@pytest.mark.root
@pytest.mark.parametrize("name", ["storage", "pods"])
@pytest.mark.parametrize("new", ["auto", NEW])
def test_of_two_networks_the_first_is_meant_and_the_other_one_changes_nothing(
    ready: Node, new: str, name: str
) -> None:
    """name: of the other network, or the pod is twice in one."""
    ready.order(maps=[f"{OLD}={new}"])
    ready.does("ADD")
    journal, told = (ready.state / "web.journal").read_text(), ready.told()
    assert json.loads(at_net1(ready, "ADD", name)) == json.loads(SECOND)
    for verb in ("CHECK", "DEL", "DEL"):
        assert at_net1(ready, verb, name) == ""
        assert ((ready.state / "web.journal").read_text(), ready.told()) == (journal, told)
    assert ready.does("CHECK") == ""
    nft = ["ip", "netns", "exec", ready.netns, "nft", "flush", "ruleset"]
    subprocess.run(nft, check=True)
    assert at_net1(ready, "CHECK", name) == ""
    assert ready.fails("CHECK")[0] == 106
    ready.does("DEL")
    assert (ready.gates(), ready.told()) == ([], None)


@pytest.mark.root
@pytest.mark.parametrize("new", ["auto", "192.168.7.5"])
def test_an_order_names_the_other_network(ready: Node, new: str) -> None:
    lines = "link add net1 type veth peer name net2\naddress add 192.168.7.5/24 dev net1\n"
    ip = ["ip", "-n", ready.netns, "-batch", "-"]
    subprocess.run(ip, input=f"{lines}link set net1 up\nlink set net2 up\n", text=True, check=True)
    ready.order(maps=[f"{OLD}={new}"], interface="net1")
    assert json.loads(ready.does("ADD")) == json.loads(RESULT)
    assert (ready.state.exists(), ready.told()) == (False, None)
    at_net1(ready, "ADD")
    told = ready.told()
    assert told is not None
    assert (told["interface"], told["new"]) == ("net1", ["192.168.7.5"])
    assert ready.gates() == [("web", "closed")]
    ready.does("CHECK")
    ready.does("DEL")
    assert at_net1(ready, "CHECK") == ""
    assert ready.gates() == [("web", "closed")]
    at_net1(ready, "DEL")
    assert (ready.gates(), ready.told()) == ([], None)


@pytest.mark.root
def test_which_network_is_not_guessed(ready: Node) -> None:
    """A pod is not begun without what was ordered for it, whichever network is made first."""
    path = ready.order()
    text = ready.config(SECOND)
    code, message = ready.fails("ADD", text, CNI_IFNAME="net1")
    assert (code, "does not say which interface it is for" in message) == (104, True), message
    ready.order(maps=[f"{OLD}=192.168.7.5"])
    code, message = ready.fails("ADD")
    assert (code, '"interface" of the order names that' in message) == (104, True), message
    assert (ready.gates(), ready.told()) == ([], None)
    ready.order()
    ready.does("ADD")
    for other in ({"CNI_CONTAINERID": "c2"}, {}):  # another sandbox's; and another order by then
        assert ready.fails("ADD", text, CNI_IFNAME="net1", **other)[0] == 104
        path.write_text(path.read_text().replace('"web"', '"shop"'))
    assert ready.gates() == [("web", "closed")]


@pytest.mark.root
def test_gc_looks_at_the_interface_and_at_none_of_an_earlier_natkeep(ready: Node) -> None:
    ready.order()
    ready.does("ADD")
    told = ready.orders / "default_web-b.new"
    was = told.read_text()
    both = [{"containerID": "c1", "ifname": name} for name in ("eth0", "net1")]
    for attached, text, left in (
        (both, was, 1),
        (both[1:], was.replace('"interface": "eth0", ', ""), 1),
        (both[1:], was, 0),
    ):
        told.write_text(text)
        ready.more = {"cni.dev/valid-attachments": attached}
        assert ready.does("GC", ready.config(None), CNI_CONTAINERID="", CNI_NETNS="") == ""
        assert len(ready.gates()) == left


@pytest.mark.root
def test_a_pod_without_the_address_fails_and_nothing_is_left(ready: Node) -> None:
    subprocess.run(["ip", "-n", ready.netns, "address", "flush", "dev", "eth0"], check=True)
    ready.order()
    code, message = ready.fails("ADD")
    assert (code, NEW in message) == (104, True)
    assert (ready.gates(), ready.told()) == ([], None)


@pytest.mark.root
def test_a_policy_of_the_node_that_drops_them_fails_the_pod(
    ready: Node, make_netns: Callable[[], str]
) -> None:
    """The plugin runs at the node, which the pod's packets pass."""
    host = make_netns()
    lines = ("link set eth1 netns " + host,)
    inside = ("address add 10.3.0.1/24 dev eth1", "link set eth1 up")
    inside += ("link add uplink type veth peer name far", "address add 192.0.2.9/24 dev uplink")
    inside += ("link set uplink up", "link set far up")
    for netns, batch in ((ready.netns, lines), (host, inside)):
        ip = ["ip", "-n", netns, "-batch", "-"]
        subprocess.run(ip, input="\n".join(batch), text=True, check=True)
    policy = (
        "add table inet policy_of\n"
        "add chain inet policy_of forward { type filter hook forward priority filter; }\n"
        f"add rule inet policy_of forward ip saddr {NEW} drop\n"
    )
    nft = ["ip", "netns", "exec", host, "nft", "-f", "-"]
    subprocess.run(nft, input=policy, text=True, check=True)
    ready.order()
    code, message = ready.fails("ADD", at=host)
    assert (code, "inet policy_of forward drops" in message) == (104, True), message
    subprocess.run(nft, input="delete table inet policy_of\n", text=True, check=True)
    assert json.loads(ready.does("ADD", at=host)) == json.loads(RESULT)


class Agent(threading.Thread):
    """Listens as an agent does, and gives each of the *answers* in turn."""

    def __init__(self, path: Path, *answers: str) -> None:
        super().__init__(daemon=True)
        self.heard: list[Any] = []
        self._answers = answers
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()

    def run(self) -> None:
        for answer in self._answers:
            asking = self._socket.accept()[0]
            with asking, asking.makefile("rwb") as lines:
                self.heard.append(json.loads(lines.readline()))
                lines.write(f"{answer}\n".encode())
        self._socket.close()


@pytest.mark.root
def test_the_agent_is_told_new_and_its_no_fails_the_pod(ready: Node, tmp_path: Path) -> None:
    ready.order()
    ready.more["agent"] = str(tmp_path / "sock")
    agent = Agent(tmp_path / "sock", '{"ok":false,"exit":1,"message":"no gateway"}', '{"ok":true}')
    agent.start()
    assert ready.fails("ADD") == (104, "the agent says no: no gateway")
    assert (ready.gates(), ready.told()) == ([], None)
    assert json.loads(ready.does("ADD")) == json.loads(RESULT)
    assert ready.gates() == [("web", "closed")]
    agent.join()
    assert [{**each, "wait_s": 0} for each in agent.heard] == [
        {"verb": "ready", "id": "web", "new": NEW, "wait_s": 0, "staged": True}
    ] * 2


@pytest.mark.root
def test_without_an_agent_where_one_is_named_the_pod_fails(
    ready: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ready.order()
    ready.more["agent"] = str(tmp_path / "sock")
    monkeypatch.setattr(plugin, "PATIENCE", 0.2)
    for name, value in ready.environment("ADD", POD).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ready.config().encode())))
    assert plugin.main() == 1
    error = json.loads(capsys.readouterr().out)
    assert (error["code"], "no agent answers at" in error["msg"]) == (109, True)
    assert (ready.gates(), ready.told()) == ([], None)


@pytest.mark.root
def test_by_a_fleet_the_gateway_is_open_when_the_pod_is_made(
    ready: Node, tmp_path: Path, make_netns: Callable[[], str]
) -> None:
    """NEW is known from here on; with `phase` `staged` it would be known, and nothing else done."""
    gateway = make_netns()
    lines = (
        "link add near type veth peer name far", "link set near up", "link set far up",
        "address add 10.3.0.1/24 dev near", "route add default via 10.3.0.9",
    )  # fmt: skip
    batch = ["ip", "-n", gateway, "-batch", "-"]
    subprocess.run(batch, input="\n".join(lines), text=True, check=True)
    (tmp_path / "store").mkdir(mode=0o700)
    ready.more["agent"] = str(tmp_path / "sock/agent")
    Path(ready.more["agent"]).parent.mkdir(mode=0o700)
    natkeep, store = PLUGIN.with_name("natkeep"), f"dir:{tmp_path / 'store'}"
    sockets = {"b": ready.more["agent"], "gw": str(tmp_path / "sock/gw")}
    states = {"b": ready.state, "gw": tmp_path / "gw"}
    fleet = [natkeep, "-q", "fleet"]
    with ExitStack() as ends:
        for node, state in states.items():
            words = ["--node", node, "--store", store, "--state-dir", state]
            agent = subprocess.Popen([natkeep, "agent", *words, "--socket", sockets[node]])
            ends.callback(agent.wait)
            ends.callback(agent.kill)
        told = {
            **ORDER, "connections": str(ready.orders / "list"),
            "sites": [{"node": "b", "role": "destination"},
                      {"node": "gw", "role": "gateway", "netns": gateway}],
        }  # fmt: skip
        (tmp_path / "web.json").write_text(json.dumps(told))
        await_true(
            partial(is_applied, [*fleet, "apply", tmp_path / "web.json"], store),
            "agents",
            seconds=60,
        )
        ready.order()
        assert json.loads(ready.does("ADD")) == json.loads(RESULT)
        shown = [natkeep, "status", "web", "--json", "--state-dir", states["gw"]]
        done = subprocess.run(shown, capture_output=True, text=True, check=True)
        [found] = json.loads(done.stdout)["moves"]
        assert (found["gate"], found["maps"]) == ("open", [{"old": OLD, "new": NEW}])
        environment = {**os.environ, "NATKEEP_STORE": store}
        subprocess.run([*fleet, "end", "web", "--yes"], env=environment, check=True)
        waits = [*fleet, "wait", "web", "--for", "settled"]
        subprocess.run(waits, env=environment, check=True)
        assert ready.gates() == []
        assert ready.does("DEL") == ""
        assert ready.told() is None


def is_applied(words: list[Any], store: str) -> bool:
    """Whether the order is taken: it is not before its agents run."""
    done = subprocess.run(words, env={**os.environ, "NATKEEP_STORE": store}, capture_output=True)
    return done.returncode == 0
