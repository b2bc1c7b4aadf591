"""Messages come back over WebSockets, with pings besides: web_socket.py ADDRESS PORT."""

import asyncio
import sys

from websockets.asyncio.server import ServerConnection, serve


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


async def main() -> None:
    address, port = sys.argv[1:]
    async with serve(echo, address, int(port), ping_interval=0.2, ping_timeout=60) as server:
        await server.serve_forever()


asyncio.run(main())
