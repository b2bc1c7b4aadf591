"""A QUIC server that is migrated, and its client: one stream of numbered questions and answers.

    serve --at ADDR PORT --dir DIR        answers "N" with "N ADDRESS", where its peer seems to be
    dial  --at ADDR PORT --dir DIR        asks on, 20 ms after each answer

DIR/report.json, of the client: {"seq": 0, "answered", "mismatch": null | text, "names": [[CLIENT as
the server sees it, SERVER as the client does], …] (each pair once, as ADDR:PORT),
"longest_silence_ms"}. An `Application` (application.py) reads it; there are no orders.

Rule: QUIC knows nothing of the move: it has no lab's order, and its socket is one for any peer.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

from aioquic.asyncio import QuicConnectionProtocol, connect
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

_PROTOCOL = ["natkeep-lab"]
_PAUSE_S = 0.02


class Named(QuicConnectionProtocol):  # type: ignore[misc]  # untyped where it is not installed
    """A connection, with the address that its last datagram came from."""

    peer: Any = None

    def datagram_received(self, data: Any, addr: Any) -> None:
        self.peer = addr
        super().datagram_received(data, addr)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Each line of a stream, with the address of its peer."""
    protocol = writer.transport.protocol  # type: ignore[attr-defined]  # aioquic's own
    while line := await reader.readline():
        writer.write(line.strip() + b" " + name(protocol.peer).encode() + b"\n")


def name(address: tuple[Any, ...]) -> str:
    """ADDR:PORT, IPv6 in brackets."""
    host = address[0].removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


async def run_server(at: str, port: int) -> None:
    """A server at *at*, with a certificate that only it has."""
    configuration = QuicConfiguration(is_client=False, alpn_protocols=_PROTOCOL)
    configuration.certificate, configuration.private_key = make_certificate()
    await serve(
        at, port, configuration=configuration, create_protocol=Named,
        stream_handler=lambda *stream: asyncio.ensure_future(answer(*stream)) and None,
    )  # fmt: skip
    await asyncio.Event().wait()


def make_certificate() -> tuple[Any, Any]:
    """Self-signed, of a day."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "lab")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject)
    builder = builder.public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    return builder.sign(key, hashes.SHA256()), key


async def run_client(at: str, port: int, directory: Path) -> None:
    """Ask until the end of the process."""
    configuration = QuicConfiguration(is_client=True, alpn_protocols=_PROTOCOL, verify_mode=0)
    names: dict[tuple[str, ...], None] = {}
    answered, silence, mismatch = 0, 0.0, None
    async with connect(at, port, configuration=configuration, create_protocol=Named) as client:
        reader, writer = await client.create_stream()
        while True:
            began = time.monotonic()
            writer.write(f"{answered}\n".encode())
            said = (await reader.readline()).decode().split()
            silence = max(silence, time.monotonic() - began)
            if not said or said[0] != str(answered):
                mismatch = mismatch or f"answer {said} to {answered}"
            names[*said[1:], name(client.peer)] = None
            answered += 1
            report = {
                "seq": 0, "answered": answered, "mismatch": mismatch, "names": [*names],
                "longest_silence_ms": round(silence * 1000, 3),
            }  # fmt: skip
            temporary = directory / ".report.tmp"
            temporary.write_text(json.dumps(report))
            os.replace(temporary, directory / "report.json")
            await asyncio.sleep(_PAUSE_S)


def main() -> None:
    parser = argparse.ArgumentParser(prog="quic.py")
    parser.add_argument("role", choices=("serve", "dial"))
    parser.add_argument("--at", nargs=2, required=True, metavar=("ADDR", "PORT"))
    parser.add_argument("--dir", type=Path, required=True)
    options = parser.parse_args()
    at, port = options.at[0], int(options.at[1])
    if options.role == "serve":
        asyncio.run(run_server(at, port))
    asyncio.run(run_client(at, port, options.dir))


if __name__ == "__main__":
    main()
