"""Receivers in a process of their own: two that take 50 ms and answer, one that never answers, one that refuses.

The first keeps its connections open, the second closes each after its answer. The process prints their four ports as
JSON, answers each line on stdin with what has been seen so far, and ends with its stdin.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import cast

import uvloop

TAKES_SECONDS = 0.05
ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"
LAST_ANSWER = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
NUMBER = re.compile(rb'"number":([0-9]+)')
BACKLOG = 4096


@dataclass
class Seen:
    """Requests received: their count, and the monotonic times of the first, the last, and each that has a number."""

    count: int = 0
    first: float = 0.0
    last: float = 0.0
    numbered: dict[int, float] = field(default_factory=dict)

    def note(self, body: bytes) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.count += 1
        if number := NUMBER.search(body):
            self.numbered.setdefault(int(number[1]), self.last)


class Healthy(asyncio.Protocol):
    """Answers each request after 50 ms, and then may close the connection."""

    def __init__(self, seen: Seen, *, keeps: bool) -> None:
        self._seen = seen
        self._keeps = keeps
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's has its methods, not its class.

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if end and length and len(body) >= int(length[1]):
            self._data = b""
            self._seen.note(body)
            asyncio.get_running_loop().call_later(TAKES_SECONDS, self._answer)

    def _answer(self) -> None:
        self._transport.write(ANSWER if self._keeps else LAST_ANSWER)
        if not self._keeps:
            self._transport.close()


def listening() -> list[socket.socket]:
    """Sockets at one loopback port, on IPv4 and if possible IPv6, as `localhost` may be called at both."""
    first = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    found = [first]
    with suppress(OSError):
        address = ("::1", first.getsockname()[1])
        found.append(socket.create_server(address, family=socket.AF_INET6, backlog=BACKLOG))
    return found


def refusing() -> socket.socket:
    """A socket that is bound and does not listen, so that connections to its port are refused."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    return taken


async def receive() -> None:
    loop = asyncio.get_running_loop()
    seen = Seen()
    keeping, ending, silent, refused = listening(), listening(), listening(), refusing()
    for listener in keeping:
        await loop.create_server(lambda: Healthy(seen, keeps=True), sock=listener)
    for listener in ending:
        await loop.create_server(lambda: Healthy(seen, keeps=False), sock=listener)
    for listener in silent:
        await loop.create_server(asyncio.Protocol, sock=listener)
    ports = [keeping[0], ending[0], silent[0], refused]
    print(json.dumps([each.getsockname()[1] for each in ports]), flush=True)
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(asdict(seen)), flush=True)


if __name__ == "__main__":
    uvloop.run(receive())
