"""Three members of etcd on loopback, which a test starts, kills, stops and ends by their pids."""

from __future__ import annotations

import ctypes
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from natkeep.errors import NatkeepError
from natkeep.fleet.etcd import EtcdStore
from natkeep.policy import Agent

NUMBERS = (0, 1, 2)
_PDEATHSIG = 1
_PATIENCE = 60.0  # s


class Cluster:
    """See above; more: arguments of each member, scheme: of their clients' URLs."""

    def __init__(self, path: Path, *more: str, scheme: str = "http") -> None:
        self.path, self.more = path, more
        ports = _find_ports(6)
        self.clients = [f"{scheme}://127.0.0.1:{port}" for port in ports[:3]]
        self._peers = [f"http://127.0.0.1:{port}" for port in ports[3:]]
        self._members: dict[int, subprocess.Popen[bytes]] = {}
        for number in NUMBERS:
            self.start(number)

    @property
    def store(self) -> str:
        """As `--store` has it."""
        return "etcd:" + ",".join(self.clients)

    def start(self, number: int) -> None:
        client, peer = self.clients[number], self._peers[number]
        cluster = ",".join(f"n{n}={url}" for n, url in enumerate(self._peers))
        folder = self.path / f"etcd-{number}"
        folder.mkdir(exist_ok=True, mode=0o700)
        with (folder / "log").open("ab") as log:
            self._members[number] = subprocess.Popen(
                [
                    "etcd", f"--name=n{number}", f"--data-dir={folder}/data",
                    f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
                    f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
                    f"--initial-cluster={cluster}", "--initial-cluster-state=new",
                    "--enable-v2=false", "--logger=zap", "--log-level=warn",
                    "--unsafe-no-fsync", *self.more,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_us,
            )  # fmt: skip

    def wait(self) -> None:
        """Until there is a leader."""
        store, until = EtcdStore(self.clients, Agent()), time.monotonic() + _PATIENCE
        while True:
            try:
                store.range("/")
                break
            except NatkeepError:
                if time.monotonic() > until:
                    raise
        store.close()

    def leader(self) -> int:
        """Which member leads; there is one."""
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            for number in self._members:
                with suppress(NatkeepError), ExitStack() as stack:
                    store = EtcdStore([self.clients[number]], Agent())
                    stack.callback(store.close)
                    status = store.call("maintenance/status")
                    if status.get("leader") == status["header"]["member_id"]:
                        return number
        raise TimeoutError("no member leads")

    def kill(self, number: int) -> None:
        member = self._members.pop(number)
        member.kill()
        member.wait()

    def stop(self, *numbers: int) -> None:
        """They hang, and keep their connections."""
        for number in numbers:
            self._members[number].send_signal(signal.SIGSTOP)

    def go_on(self, *numbers: int) -> None:
        for number in numbers:
            self._members[number].send_signal(signal.SIGCONT)

    def close(self) -> None:
        for number in [*self._members]:
            self.kill(number)


def die_with_us() -> None:
    """However the test ends, no member outlives it."""
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)


def _find_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
