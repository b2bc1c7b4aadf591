"""As much of the CRI as the lab needs: messages of protobuf packed by hand, over gRPC.

    cri = Cri(socket)
    cri.call("ContainerStatus", {1: container, 2: True})     its answer, by the fields' numbers

Rule: the numbers are those of the kubelet's api.proto, runtime.v1; each stands beside its word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from natkeep.lab.engine import EngineError
from natkeep.lab.time_scale import scaled

Message = dict[int, list[Any]]
"""An answer: each field that is there, with all its values (int, or octets)."""


def pack(fields: Mapping[int, Any]) -> bytes:
    """A message: text, octets, int, a message, a list of these; a dict of texts is a map."""
    out = b""
    for number, value in fields.items():
        for one in value if isinstance(value, list) else [value]:
            out += _pack_one(number, one)
    return out


def _pack_one(number: int, value: Any) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, dict) and any(isinstance(key, str) for key in value):
        pairs = ({1: key, 2: each} for key, each in value.items())
        return b"".join(_pack_one(number, pair) for pair in pairs)
    data = value.encode() if isinstance(value, str) else value
    data = pack(data) if isinstance(data, dict) else data
    return _varint(number << 3 | 2) + _varint(len(data)) + bytes(data)


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def unpack(data: bytes) -> Message:
    """The fields of a message; of fixed width none is looked at."""
    fields: Message = {}
    at = 0

    def read() -> int:
        nonlocal at
        value = shift = 0
        while True:
            octet = data[at]
            at += 1
            value |= (octet & 127) << shift
            shift += 7
            if octet < 128:
                return value

    while at < len(data):
        tag = read()
        kind, values = tag & 7, fields.setdefault(tag >> 3, [])
        if kind == 0:
            values.append(read())
        elif kind == 2:
            length = read()
            values.append(data[at : at + length])
            at += length
        else:
            at += 8 if kind == 1 else 4
    return fields


class Cri:
    """The runtime that listens at a socket."""

    def __init__(self, socket: Path) -> None:
        try:
            import grpc  # PyPI's grpcio: of the lab's extra
        except ImportError:
            raise EngineError("there is no grpcio", hint="pip install 'natkeep[lab]'") from None
        self._grpc = grpc
        self._channel = grpc.insecure_channel(f"unix://{socket}")

    def call(
        self, method: str, fields: Mapping[int, Any], service: str = "RuntimeService"
    ) -> Message:
        """One call and its answer; EngineError with the runtime's words."""
        stub = self._channel.unary_unary(
            f"/runtime.v1.{service}/{method}", request_serializer=pack,
            response_deserializer=unpack,
        )  # fmt: skip
        try:
            answer: Message = stub(fields, timeout=scaled(60), wait_for_ready=True)
        except self._grpc.RpcError as error:
            raise EngineError(f"{method}: {error.code().name}: {error.details()}") from None
        return answer

    def pull(self, image: str) -> None:
        """Bring an image from its registry."""
        self.call("PullImage", {1: {1: image}}, "ImageService")

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    # ---- pods ------------------------------------------------------------------------------------

    def run_pod(self, pod: Mapping[int, Any]) -> str:
        """The id of a new pod, whose network is up."""
        return str(self.call("RunPodSandbox", {1: pod})[1][0].decode())

    def addresses(self, pod: str) -> list[str]:
        """Those of a pod: the first one, and the others."""
        network = unpack(unpack(self.call("PodSandboxStatus", {1: pod})[1][0])[5][0])
        more = (unpack(each)[1][0] for each in network.get(2, []))
        return [each.decode() for each in (network[1][0], *more)]

    def remove_pod(self, pod: str) -> None:
        """With what is in it."""
        self.call("StopPodSandbox", {1: pod})
        self.call("RemovePodSandbox", {1: pod})

    def pods(self) -> list[str]:
        """The ids of all there are."""
        found = self.call("ListPodSandbox", {}).get(1, [])
        return [unpack(each)[1][0].decode() for each in found]

    # ---- containers ------------------------------------------------------------------------------

    def create(self, pod: str, container: Mapping[int, Any], config: Mapping[int, Any]) -> str:
        """The id of a new container; config: the pod's, as it was made."""
        return str(self.call("CreateContainer", {1: pod, 2: container, 3: config})[1][0].decode())

    def start(self, container: str) -> None:
        """Run it, or restore it."""
        self.call("StartContainer", {1: container})

    def checkpoint(self, container: str, archive: Path) -> None:
        """Write its archive; it goes on running."""
        self.call("CheckpointContainer", {1: container, 2: str(archive), 3: 30})

    def pid(self, container: str) -> int:
        """Of its first process, where the runtime is."""
        pairs = map(unpack, self.call("ContainerStatus", {1: container, 2: True})[2])
        info = {pair[1][0].decode(): pair[2][0].decode() for pair in pairs}
        return int(json.loads(info["info"])["pid"])


def pod_config(name: str, *, cgroup: str, logs: Path, shares_pids: bool = False) -> dict[int, Any]:
    """A pod of namespace `default`; shares_pids: one pid namespace for all its containers."""
    metadata = {1: name, 2: f"uid-{name}", 3: "default", 4: 0}
    namespaces = {2: 0 if shares_pids else 1}
    return {1: metadata, 2: name, 3: str(logs), 8: {1: cgroup, 2: {1: namespaces}}}


def container_config(
    name: str, image: str, command: Sequence[str], mounts: Mapping[str, tuple[str, bool]],
    annotations: Mapping[str, str], *, shares_pids: bool = False,
) -> dict[int, Any]:  # fmt: skip
    """A container; mounts: where, what of the host, and whether it is read-only."""
    bound = [{1: path, 2: what, 3: int(ro)} for path, (what, ro) in mounts.items()]
    namespaces = {2: 0 if shares_pids else 1}
    return {
        1: {1: name, 2: 0}, 2: {1: image}, 3: [*command], 7: bound, 10: dict(annotations),
        11: f"{name}.log", 15: {2: {3: namespaces}},
    }  # fmt: skip
