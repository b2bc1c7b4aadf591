"""The images of the lab's pods, of the machine's own files, and the registry that has them.

    bare     the links of a merged /usr and nothing else: /usr is mounted
    pause    a pod's own process, `sleep`, with the libraries that it needs

write_images(directory): each blob by its digest, and a link NAME:TAG to each manifest. At a node
`python3 image.py DIRECTORY PORT` serves them, since containerd 2.1 asks a registry for the image of
a checkpoint even if it has it.

Rule: of the standard library alone: a host has nothing else.
"""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PORT = 5000
BARE, PAUSE = (f"localhost:{PORT}/{name}:1" for name in ("bare", "pause"))
_OCI = "application/vnd.oci.image"


def write_images(directory: Path) -> None:
    """Both images, in *directory*, which is made."""
    directory.mkdir()
    sleep = str(shutil.which("sleep"))
    _write(directory, "bare:1", [], {})
    _write(directory, "pause:1", [sleep, "infinity"], _with_libraries(sleep))


def _with_libraries(program: str) -> dict[str, str]:
    """Where a program and its libraries are, by their paths in an image."""
    told = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    paths = [program, *re.findall(r"(/\S+) \(0x", told)]
    # The links of a merged /usr are in the image, too.
    return {f"usr{p}" if Path("/", p.split("/")[1]).is_symlink() else p[1:]: p for p in paths}


def _write(directory: Path, tag: str, entry: Sequence[str], files: Mapping[str, str]) -> None:
    layer = _make_layer(files)
    config = {
        "architecture": _architecture(), "os": "linux",
        "config": {"Entrypoint": [*entry], "Env": ["PATH=/usr/bin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
    }  # fmt: skip
    manifest = {
        "schemaVersion": 2, "mediaType": f"{_OCI}.manifest.v1+json",
        "config": _put(directory, json.dumps(config).encode(), f"{_OCI}.config.v1+json"),
        "layers": [_put(directory, layer, f"{_OCI}.layer.v1.tar")],
    }  # fmt: skip
    put = _put(directory, json.dumps(manifest).encode(), str(manifest["mediaType"]))
    (directory / tag).symlink_to(put["digest"])


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _put(directory: Path, content: bytes, kind: str) -> dict[str, Any]:
    """Its descriptor."""
    digest = _digest(content)
    (directory / digest).write_bytes(content)
    return {"mediaType": kind, "digest": digest, "size": len(content)}


def _architecture() -> str:
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def _make_layer(files: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("usr", "etc", "tmp", "run", "var", "proc", "sys", "dev"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
        for name in ("bin", "lib", "lib64", "sbin"):
            if Path("/", name).is_symlink():
                link = tarfile.TarInfo(name)
                link.type, link.linkname = tarfile.SYMTYPE, os.readlink(f"/{name}")
                tar.addfile(link)
        for name, path in files.items():
            content = Path(path).read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class _Registry(http.server.BaseHTTPRequestHandler):
    """GET and HEAD of /v2/NAME/manifests/TAG|DIGEST and /v2/NAME/blobs/DIGEST."""

    protocol_version = "HTTP/1.1"
    directory = Path()

    def do_GET(self) -> None:
        name, _, reference = self.path.removeprefix("/v2/").partition("/")
        kind, _, reference = reference.partition("/")
        file = self.directory / (reference if ":" in reference else f"{name}:{reference}")
        if not name:
            return self._answer(b"{}", "application/json")
        if "/" in reference or not file.is_file():
            return self.send_error(404)
        content = file.read_bytes()
        is_manifest = kind == "manifests"
        media = json.loads(content)["mediaType"] if is_manifest else "application/octet-stream"
        self._answer(content, media, {"Docker-Content-Digest": file.resolve().name})

    do_HEAD = do_GET

    def _answer(self, content: bytes, media: str, more: Mapping[str, str] | None = None) -> None:
        self.send_response(200)
        headers = {"Content-Type": media, "Content-Length": str(len(content)), **(more or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def serve(directory: Path, port: int) -> None:
    """Answer at the loopback address until the host ends."""
    _Registry.directory = directory
    http.server.ThreadingHTTPServer(("127.0.0.1", port), _Registry).serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
