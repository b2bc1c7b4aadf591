"""The store in etcd, by its JSON gateway (3.4 and later): standard library alone.

Each thread has a connection of its own, each watch another. A member that does not answer within a
second is left for the next one, and so are the watches there: a member that hangs keeps its
connections. Rule: what may have been written is written again, so a transaction that says that it
was not made may have been, before a member died; who writes looks again.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import stat
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from natkeep import policy
from natkeep.errors import RefusedError, UnreachableError, UsageError
from natkeep.fleet.store import Changes, Item, Snapshot

_TIMEOUT = 1.0  # s for one answer of one member
_PATIENCE = 5.0  # s for an answer of any: an election takes one to three
_REST = 0.05
_PAGE = 2000  # keys of one answer
# codes of gRPC, as a body has them
_INVALID, _NOT_FOUND, _DENIED, _NOT_NOW, _UNAUTHENTICATED = 3, 5, 7, 9, 16
_OPEN = "authentication is not enabled"
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))


class Endpoint(NamedTuple):
    """Where a member listens."""

    tls: bool
    host: str
    port: int

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """`http://HOST:PORT` or `https://HOST:PORT`; UsageError if it is none."""
        try:
            at = urlsplit(url)
            port = at.port
        except ValueError:
            port = None
        if not port or at.scheme not in ("http", "https") or not at.hostname or at.path.strip("/"):
            raise UsageError(f"{url!r} is no member of etcd", hint="https://HOST:2379")
        return cls(at.scheme == "https", at.hostname, port)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class _Answer(NamedTuple):
    status: int
    body: dict[str, Any]
    text: str


class EtcdStore:
    """See store.py."""

    def __init__(self, urls: Sequence[str], settings: policy.Agent) -> None:
        self._members = [Endpoint.parse(url) for url in urls]
        self._tls = _make_tls(settings) if any(one.tls for one in self._members) else None
        self._user, self._password = settings.user, ""
        if settings.password_file:
            self._password = read_password(settings.password_file)
        self._token, self._certified = "", bool(settings.cert)
        self._own = threading.local()
        self._lock = threading.Lock()
        self._watches: dict[socket.socket, Endpoint] = {}
        self._closed = False

    def range(self, prefix: str, start: str = "", limit: int = 0) -> Snapshot:
        among, items, revision = below(prefix), dict[str, Item](), 0
        among["key"] = b64(start or prefix)
        while True:
            # All pages are of one revision, and none takes a member long.
            page = {"limit": min(limit or _PAGE, _PAGE), "revision": revision}
            found = self.call("kv/range", **among, **page)
            items |= map(_read_item, found.get("kvs", ()))
            revision = revision or _revision(found)
            if not found.get("more") or (limit and len(items) >= limit):
                return Snapshot(items, revision)
            among["key"] = b64([*items][-1] + "\0")

    def watch(self, prefix: str, revision: int) -> Iterator[Changes]:
        asked = {"create_request": {**below(prefix), "start_revision": revision + 1}}
        with self._stream("watch", asked) as lines:
            for line in lines:
                result = _parse(line).get("result", {})
                if result.get("canceled") or "header" not in result:
                    raise UnreachableError(f"etcd ended a watch: {line.decode()[:200]}")
                if events := result.get("events"):
                    yield dict(map(_read_event, events))

    def txn(
        self, puts: Mapping[str, str | None], compare: Mapping[str, int] | None = None,
        lease: int = 0,
    ) -> bool:  # fmt: skip
        done = self.call(
            "kv/txn",
            compare=[
                {"key": b64(key), "target": "MOD", "result": "EQUAL", "mod_revision": revision}
                for key, revision in (compare or {}).items()
            ],
            success=[_write(key, value, lease) for key, value in puts.items()],
        )
        return bool(done.get("succeeded"))

    def lease(self, seconds: int, lease: int = 0) -> int:
        if lease:
            kept = self.call("lease/keepalive", ID=lease).get("result", {})
            if int(kept.get("TTL", 0)):
                return lease
        return int(self.call("lease/grant", TTL=seconds)["ID"])

    def delete(self, prefix: str) -> None:
        self.call("kv/deleterange", **below(prefix))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for stream in self._watches:
                _shut(stream)

    # ---- calls -----------------------------------------------------------------------------------

    def call(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer of any member; UnreachableError where none answers in time."""
        until, tries, why = time.monotonic() + _PATIENCE, 0, ""
        while tries < len(self._members) or time.monotonic() < until:
            member = self._members[0]
            try:
                answer = self._ask(member, path, body)
            except (OSError, http.client.HTTPException) as error:
                why = f"{member}: {_describe(error)}"
                if member.tls and not self._certified and isinstance(error, ssl.SSLError):
                    why += " (it may want a certificate: agent.cert)"
            else:
                if answer.status == 200 and answer.body:
                    return answer.body
                if answer.status == 200:
                    raise UnreachableError(f"{member} is not etcd's JSON gateway")
                why = f"{member}: {self._refuse(path, answer)}"
            tries += 1
            self._leave(member)
            if tries >= len(self._members):
                time.sleep(_REST)
        raise UnreachableError(f"etcd cannot be reached: {why}")

    def _ask(self, member: Endpoint, path: str, body: dict[str, Any]) -> _Answer:
        headers = self._headers(path)
        earlier: tuple[http.client.HTTPConnection, Endpoint] | None
        earlier = getattr(self._own, "link", None)
        used = earlier is not None and earlier[1] == member
        if earlier is not None and used:
            link = earlier[0]
        else:
            if earlier is not None:
                earlier[0].close()
            link = self._connect(member)
        try:
            answer = _post(link, path, body, headers)
        except (OSError, http.client.HTTPException) as error:
            link.close()
            self._own.link = None
            if used and not isinstance(error, TimeoutError):  # it had been closed meanwhile
                return self._ask(member, path, body)
            raise
        self._own.link = (link, member)
        return answer

    def _connect(self, member: Endpoint) -> http.client.HTTPConnection:
        if member.tls:
            return http.client.HTTPSConnection(
                member.host, member.port, timeout=_TIMEOUT, context=self._tls
            )
        return http.client.HTTPConnection(member.host, member.port, timeout=_TIMEOUT)

    def _headers(self, path: str) -> dict[str, str]:
        if not self._user or path == "auth/authenticate":
            return {}
        if not self._token:
            words = {"name": self._user, "password": self._password}
            try:
                self._token = str(self.call("auth/authenticate", **words)["token"])
            except RefusedError as error:
                if _OPEN not in str(error):
                    raise
                return {}  # passwords are not demanded yet
        return {"Authorization": self._token}

    def _refuse(self, path: str, answer: _Answer) -> str:
        """Why the member did not do it, if another may; else what is wrong is raised."""
        code, why = answer.body.get("code"), str(answer.body.get("error", answer.text))
        if "HTTPS server" in answer.text:
            raise UnreachableError("etcd wants https", hint="https:// in the names of its members")
        if "CommonName" in answer.text or (not answer.body and answer.status == 400):
            raise UnreachableError(
                "etcd refuses the certificate: it has a common name (CN), and by its JSON gateway "
                "etcd takes none",
                hint="a certificate without CN, with agent.user and agent.password_file",
            )
        if code == _UNAUTHENTICATED:
            self._token = ""  # it has ended, or the member has been started anew
        elif code == _INVALID and "auth store is old" in why:
            self._token = ""  # rights have changed meanwhile
        elif code == _NOT_FOUND:
            raise UnreachableError(f"etcd: {why}")
        elif code in (_DENIED, _INVALID, _NOT_NOW):
            user = f" {self._user}" if self._user else ", which gives no name"
            raise RefusedError(f"etcd refuses {path} of this node{user}: {why}")
        return why

    def _leave(self, member: Endpoint) -> None:
        """Ask the next one from now on, and have the watches there end."""
        with self._lock:
            if self._members[0] == member:
                # At once: other threads ask without the lock, and there may be one member alone.
                self._members = [*self._members[1:], member]
            for stream, where in self._watches.items():
                if where == member:
                    _shut(stream)

    @contextmanager
    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[bytes]]:
        """The lines of an answer that does not end."""
        member = self._members[0]
        # A member without a leader is to say so, and not to be silent.
        headers = {**self._headers(path), "Grpc-Metadata-hasleader": "true"}
        link = self._connect(member)
        stream: socket.socket | None = None
        try:
            link.connect()
            stream = link.sock
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                stream.setsockopt(socket.IPPROTO_TCP, option, value)
            with self._lock:
                self._watches[stream] = member
                if self._closed:
                    _shut(stream)
            link.request("POST", f"/v3/{path}", json.dumps(body), headers)
            answer = link.getresponse()
            if answer.status != 200:
                self._refuse(path, _read_answer(answer))
                raise UnreachableError(f"etcd at {member} does not watch")
            stream.settimeout(None)
            yield iter(answer.readline, b"")
            raise UnreachableError(f"etcd at {member} ended a watch")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UnreachableError(f"etcd at {member}: {_describe(error)}") from None
        finally:
            if stream is not None:
                with self._lock:
                    del self._watches[stream]
            link.close()


def _post(
    link: http.client.HTTPConnection, path: str, body: dict[str, Any], headers: dict[str, str]
) -> _Answer:
    link.request("POST", f"/v3/{path}", json.dumps(body), headers)
    return _read_answer(link.getresponse())


def _read_answer(answer: http.client.HTTPResponse) -> _Answer:
    octets = answer.read()
    body: dict[str, Any] = {}
    with suppress(ValueError):
        body = _parse(octets)
    return _Answer(answer.status, body, octets.decode("utf-8", "replace").strip()[:200])


def _parse(octets: bytes) -> dict[str, Any]:
    found = json.loads(octets or b"{}")
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _shut(stream: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(stream, socket.SHUT_RDWR)


def _describe(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is none of agent.ca's: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and "CERTIFICATE" in (error.reason or "").upper():
        return f"it wants a certificate that its CA has signed, agent.cert ({error.reason})"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def b64(text: str) -> str:
    """As the gateway takes keys and values."""
    return b64encode(text.encode()).decode()


def below(prefix: str) -> dict[str, str]:
    """All keys that begin so; keys are ASCII, so the end is a letter further."""
    return {"key": b64(prefix), "range_end": b64(prefix[:-1] + chr(ord(prefix[-1]) + 1))}


def _write(key: str, value: str | None, lease: int) -> dict[str, Any]:
    if value is None:
        return {"request_delete_range": {"key": b64(key)}}
    return {"request_put": {"key": b64(key), "value": b64(value), "lease": lease}}


def _read_item(found: Mapping[str, Any]) -> tuple[str, Item]:
    value = b64decode(found.get("value", "")).decode("utf-8", "replace")
    return b64decode(found["key"]).decode("utf-8", "replace"), Item(
        value, int(found["mod_revision"])
    )


def _read_event(event: Mapping[str, Any]) -> tuple[str, Item | None]:
    key, item = _read_item(event["kv"])
    return key, None if event.get("type") == "DELETE" else item


def _revision(answer: Mapping[str, Any]) -> int:
    return int(answer["header"]["revision"])


def _make_tls(settings: policy.Agent) -> ssl.SSLContext:
    try:
        tls = ssl.create_default_context(cafile=settings.ca or None)
        if settings.cert:
            tls.load_cert_chain(settings.cert, settings.key or None)
    except (OSError, ValueError) as error:
        names = ", ".join(filter(None, (settings.ca, settings.cert, settings.key)))
        raise UsageError(f"{names}: {_describe(error)}", hint="agent.ca, .cert and .key") from None
    return tls


def read_password(path: str) -> str:
    """What the file says; UsageError if others can read it, or it is empty."""
    try:
        with open(path, encoding="utf-8") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise UsageError(f"{path} can be read by others", hint=f"chmod 600 {path}")
            if password := file.read().strip():
                return password
            raise UsageError(f"{path} is empty", hint=f"rm {path}, and natkeep fleet init again")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {_describe(error)}") from None
