"""A TCP proxy between a program and the database that can swallow everything, or reset it."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from contextlib import suppress
from typing import Literal

Mode = Literal["passes", "swallows", "resets"]
CHUNK = 65536


class Proxy:
    """Forwards connections to a port of loopback, until its mode is changed.

    While it swallows, it accepts connections and reads what comes, and none of it arrives on either side. Any
    connection open meanwhile stays silent for ever, as after a firewall that forgot it: there is no end of file,
    and no error of TCP.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._mode: Mode = "passes"
        self._silent: set[asyncio.StreamWriter] = set()
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.port: int = self._server.sockets[0].getsockname()[1]

    def set(self, mode: Mode) -> None:
        asyncio.run_coroutine_threadsafe(self._set(mode), self._loop).result()

    def close(self) -> None:
        self.set("resets")
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._visit, "127.0.0.1", 0)

    async def _set(self, mode: Mode) -> None:
        self._mode = mode
        if mode == "swallows":
            self._silent |= self._open
        if mode == "resets":
            for writer in list(self._open):
                _reset(writer)

    async def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode == "resets":
            _reset(writer)
            return
        self._open.add(writer)
        try:
            if self._mode == "swallows":
                self._silent.add(writer)
                await _drain(reader)
                return
            with suppress(OSError):
                await self._pass_on(reader, writer)
        finally:
            self._open.discard(writer)
            self._silent.discard(writer)
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, onward = await asyncio.open_connection("127.0.0.1", self._target)
        pumps = [
            asyncio.create_task(self._pump(reader, onward, writer)),
            asyncio.create_task(self._pump(answers, writer, writer)),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        if writer in self._silent:
            # The server may hang up; the client is not informed.
            await pumps[0]
        for pump in pumps:
            pump.cancel()
        onward.close()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, front: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while data := await source.read(CHUNK):
                if front not in self._silent:
                    sink.write(data)
                    await sink.drain()


async def _drain(reader: asyncio.StreamReader) -> None:
    with suppress(OSError):
        while await reader.read(CHUNK):
            pass


def _reset(writer: asyncio.StreamWriter) -> None:
    peer = writer.get_extra_info("socket")
    with suppress(OSError):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
