"""A slow wire: `proxy.py HOST PORT TO_HOST TO_PORT DELAY_S FOLDER`. Run as a script, it imports the standard library.

Every chunk arrives DELAY_S later than it would. FOLDER/order holds a number: of what clients have sent, no more bytes
than that pass, and FOLDER/held is there once more would; what is held is lost with either end, and FOLDER/lost is there
then. FOLDER/passed says how many have passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

_CHUNK_BYTES = 1 << 14
_LOOK_S = 0.005


class Proxy:
    def __init__(self, to: tuple[str, int], delay_s: float, folder: Path) -> None:
        self._to, self._delay_s, self._folder = to, delay_s, folder
        self._passed = 0
        (folder / "order").write_text("")
        self._note()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(*self._to)
        except OSError:
            writer.close()
            return
        ways = [
            asyncio.create_task(self._pump(reader, back, True)),
            asyncio.create_task(self._pump(there, writer, False)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for end in (back, writer):
            end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counted: bool) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        async def read() -> None:
            while data := await reader.read(_CHUNK_BYTES):
                await waiting.put((loop.time() + self._delay_s, data))
            await waiting.put((loop.time(), b""))

        reading = asyncio.create_task(read())
        try:
            while True:
                due_s, data = await waiting.get()
                await asyncio.sleep(max(0.0, due_s - loop.time()))
                if not data:
                    return
                while data:
                    room = await self._room(reading) if counted else len(data)
                    writer.write(data[:room])
                    await writer.drain()
                    if counted:
                        self._passed += len(data[:room])
                        self._note()
                    data = data[room:]
        except OSError:
            return
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await reading

    async def _room(self, reading: asyncio.Task[None]) -> int:
        """How many bytes may pass now; at least one. What is held when its sender is gone never passes."""
        while True:
            order = (self._folder / "order").read_text()
            room = int(order) - self._passed if order else _CHUNK_BYTES
            if room > 0:
                return room
            try:
                if reading.done():
                    raise ConnectionResetError
                (self._folder / "held").touch()
                await asyncio.sleep(_LOOK_S)
            except (ConnectionResetError, asyncio.CancelledError):  # the sender is gone, or who was to get it
                (self._folder / "lost").touch()
                raise

    def _note(self) -> None:
        new = self._folder / "passed.new"
        new.write_text(str(self._passed))
        new.replace(self._folder / "passed")


async def _main(host: str, port: str, to_host: str, to_port: str, delay_s: str, folder: str) -> None:
    proxy = Proxy((to_host, int(to_port)), float(delay_s), Path(folder))
    server = await asyncio.start_server(proxy.serve, host, int(port))
    Path(folder, "up").touch()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
