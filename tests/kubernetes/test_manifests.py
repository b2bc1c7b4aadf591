"""deploy/: held against Kubernetes' own schemas, and its promises against what they are for."""

from __future__ import annotations

import copy
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_api import make_move
from kubernetes_schema import DEPLOY, find, load, load_all, refuse, schema
from pages import BLOCKS

from natkeep.cli.parser import make_parser

VERSIONS = ("1.31", kubernetes_validate.latest_version())


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_own_schemas_take_every_document(version: str) -> None:
    documents = load_all()
    assert len(documents) > 6
    for each in documents:
        kubernetes_validate.validate(each, version, strict=True)


def test_the_schemas_refuse_what_is_wrong() -> None:
    wrong = copy.deepcopy(find("DaemonSet"))
    wrong["spec"]["template"]["spec"]["hostNetworks"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_kustomize_takes_all_there_is() -> None:
    [kustomization] = load("kustomization.yaml")
    files = {path.name for path in DEPLOY.glob("*.yaml")} - {"kustomization.yaml"}
    assert {*kustomization["resources"]} == files


def test_the_agents_ask_the_api_for_nothing() -> None:
    pod = find("DaemonSet")["spec"]["template"]["spec"]
    accounts = {each["metadata"]["name"]: each for each in load("rbac.yaml")[:2]}
    assert pod["automountServiceAccountToken"] is False
    assert accounts[pod["serviceAccountName"]]["automountServiceAccountToken"] is False
    [subject] = find("ClusterRoleBinding")["subjects"]
    assert subject["name"] == "natkeep-controller" != pod["serviceAccountName"]


def test_the_agents_have_the_capabilities_that_natkeep_needs_and_no_more() -> None:
    pod = find("DaemonSet")["spec"]["template"]["spec"]
    assert (pod["hostNetwork"], pod["hostPID"], "hostIPC" in pod) == (True, True, False)
    for container in pod["containers"]:
        rights = container["securityContext"]
        assert "privileged" not in rights
        assert rights["capabilities"]["drop"] == ["ALL"]
        # natkeep/systemd/*.service has the same four
        assert {*rights["capabilities"]["add"]} == {
            "NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE", "DAC_READ_SEARCH", "NET_RAW",
        }  # fmt: skip
        assert rights["readOnlyRootFilesystem"]
    paths = {each["hostPath"]["path"] for each in pod["volumes"]}
    assert paths == {"/run/natkeep", "/run/natkeep-gateway", "/run/netns", "/etc/natkeep"}
    writable = {
        mount["mountPath"]
        for container in pod["containers"]
        for mount in container["volumeMounts"]
        if not mount.get("readOnly")
    }
    assert writable == {"/run/natkeep", "/run/natkeep-gateway"}


def test_the_controller_has_no_capability() -> None:
    pod = find("Deployment")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert not any("hostPath" in volume for volume in pod["volumes"])


def test_the_agents_are_started_as_natkeep_is() -> None:
    """A node's own namespace and its pods have an agent each, and no state in common."""
    found = {}
    for container in find("DaemonSet")["spec"]["template"]["spec"]["containers"]:
        program, *words = container["command"]
        assert program == "natkeep"
        args = make_parser().parse_args([word.replace("$(NODE)", "node-1") for word in words])
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert args.state_dir in mounted
        found[args.node] = args.state_dir, args.group, args.config
    assert found == {
        "node-1": ("/run/natkeep", [], None),
        "node-1.gateway": ("/run/natkeep-gateway", ["nodes"], "/etc/natkeep/gateway.toml"),
    }


# ---- the schema of a ConnectionMove --------------------------------------------------------------

PODS = {"sourcePod": {"name": "web-a"}, "targetPod": {"name": "web-b"}}


def test_a_usual_one_is_taken() -> None:
    assert refuse(make_move()) == []
    assert refuse(make_move(gateways=[{"nodeSelector": {"zone": "a"}}, {"group": "edge"}])) == []


def test_the_one_of_the_page_is_taken() -> None:
    [text] = [each.text for each in BLOCKS if "kind: ConnectionMove" in each.text]
    assert refuse(yaml.safe_load(text)) == []


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"sourcePod": {}}, "'name' is a required property"),
        ({"targetPod": {"name": ""}}, "'' should be non-empty"),
        ({"targetPod": {"name": "web-a"}}, "sourcePod and targetPod are the same"),
        ({"gateways": []}, "[] should be non-empty"),
        ({"gateways": [{}]}, "either group or nodeSelector"),
        ({"gateways": [{"group": "a", "nodeSelector": {"b": "c"}}]}, "either group or"),
        ({"gateways": [{"group": "../a"}]}, "does not match"),
        ({"gateways": [{"nodeSelector": {}}]}, "{} should be non-empty"),
        ({"gateways": [{"nodeSelector": {"a": 1}}]}, "1 is not of type 'string'"),
        ({"connections": ""}, "'' should be non-empty"),
        ({"connections": None}, "None is not of type 'string'"),
        ({"mode": "both"}, "'both' is not one of"),
        ({"unkept": "reset"}, "'reset' is not one of"),
        ({"deadlineSeconds": -1}, "-1 is less than"),
        ({"deadlineSeconds": 604801}, "604801 is greater than"),
        ({"frozen": "yes"}, "'yes' is not of type 'boolean'"),
        ({"froze": True}, "'froze' was unexpected"),
    ],
)
def test_a_bad_one_is_refused_by_the_server(wrong: dict[str, Any], why: str) -> None:
    [said] = refuse(make_move(**wrong))
    assert why in said


@pytest.mark.parametrize("name", schema()["properties"]["spec"]["required"])
def test_what_has_to_be_there_is_demanded(name: str) -> None:
    body = make_move()
    del body["spec"][name]
    assert refuse(body) == [f"'{name}' is a required property"]


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ({}, {"targetPod": {"name": "web-c"}}, ["sourcePod and targetPod cannot be changed"]),
        ({}, {"sourcePod": {"name": "web-c"}}, ["sourcePod and targetPod cannot be changed"]),
        ({}, {"mode": "stateless"}, ["mode cannot be changed"]),
        ({"frozen": True}, {}, ["frozen cannot be taken back"]),
        ({}, {"frozen": True, "connections": "10.2.0.10:1 10.1.0.2:1\n"}, []),
        ({}, {"gateways": [{"group": "edge"}, {"group": "west"}], "deadlineSeconds": 9}, []),
    ],
)
def test_what_may_be_changed(before: dict[str, Any], after: dict[str, Any], why: list[str]) -> None:
    said = refuse(make_move(**after), make_move(**before))
    assert [line.partition(";")[0] for line in said] == why


def test_the_columns_are_of_fields_that_there_are() -> None:
    [version] = find("CustomResourceDefinition")["spec"]["versions"]
    for column in version["additionalPrinterColumns"]:
        node = {**schema()}
        node["properties"] = {
            **node["properties"],
            "metadata": {"properties": {"creationTimestamp": {"type": "date"}}},
        }
        for name in column["jsonPath"].replace("[0]", ".items").strip(".").split("."):
            node = node[name] if name == "items" else node["properties"][name]
        assert node["type"] == column["type"]
