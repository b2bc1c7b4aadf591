"""Three members of etcd that demand certificates and passwords, as `natkeep fleet init` makes them.

guarded = Guarded(path); guarded.init("gw-1", "host-b")
guarded.open("node", "orderer")      a store as that user sees it
guarded.config("gw-1", "gw-1")       a natkeep.toml of that user
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from bench.etcd_cluster import NUMBERS, Cluster
from natkeep.errors import NatkeepError
from natkeep.fleet.etcd import EtcdStore
from natkeep.policy import Agent


def certify(path: Path) -> dict[str, str]:
    """A CA, and certificates of it: the server's, and clients' without and with a CN."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=path, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(*new, "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/O=natkeep test")
    for name, subject, extensions in (
        (
            "server",
            "/O=etcd",
            "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth",
        ),
        ("node", "/O=natkeep/OU=gw-1", "extendedKeyUsage=clientAuth"),
        ("named", "/CN=gw-1", "extendedKeyUsage=clientAuth"),
    ):
        (path / "ext").write_text(extensions)
        openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject)
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "ext")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
    return {name: str(path / name) for name in ("ca", "server", "node", "named")}


class Guarded:
    """Three members that demand certificates, and what `fleet init` has made there."""

    def __init__(self, path: Path) -> None:
        self.path, self.names = path, certify(path)
        server, ca = self.names["server"], self.names["ca"]
        self.cluster = Cluster(
            path, f"--cert-file={server}.pem", f"--key-file={server}.key",
            f"--trusted-ca-file={ca}.pem", "--client-cert-auth", "--bcrypt-cost=4", scheme="https",
        )  # fmt: skip
        self.passwords = path / "passwords"
        self.config("admin", "")
        self.wait()

    def wait(self) -> None:
        until = time.monotonic() + 60
        while True:
            try:
                return self.open("node", "").close()
            except NatkeepError:
                assert time.monotonic() < until

    def settings(self, certificate: str, user: str) -> dict[str, str]:
        found = {"ca": f"{self.names['ca']}.pem"}
        if certificate:
            own = self.names[certificate]
            found |= {"cert": f"{own}.pem", "key": f"{own}.key"}
        if user:
            found |= {"user": user, "password_file": str(self.passwords / user)}
        return found

    def open(self, certificate: str, user: str, *numbers: int) -> EtcdStore:
        urls = [self.cluster.clients[number] for number in numbers or NUMBERS]
        store = EtcdStore(urls, Agent(**self.settings(certificate, user)))
        if not user:
            store.range("/")
        return store

    def config(self, name: str, user: str) -> str:
        """A natkeep.toml for *user*."""
        path = self.path / f"{name}.toml"
        words = {**self.settings("node", user), "endpoints": self.cluster.clients}
        path.write_text("[agent]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in words.items()))
        return str(path)

    def init(self, *nodes: str, place: str = "") -> subprocess.CompletedProcess[str]:
        named = [word for node in nodes for word in ("--node", node)]
        where = ["--config", str(self.path / "admin.toml"), "--passwords", place or self.passwords]
        command = [sys.executable, "-m", "natkeep.cli", "fleet", "init", "--json", *named, *where]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
