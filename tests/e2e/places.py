"""The sites that a browser visits besides Stripe: the API, and a client's web application."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass(frozen=True)
class Place:
    """The origins of the API and of the client's own application."""

    api: str
    shop: str


class Shop(BaseHTTPRequestHandler):
    """The client's own web application: the same page at every path."""

    def do_GET(self) -> None:
        page = b'<!doctype html><link rel="icon" href="data:,"><title>Shop</title><h1>Settings</h1>'
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def opened_shop() -> Iterator[str]:
    """Run the application; yields its origin. Its host name is not the API's, so it is another site."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Shop) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()
        thread.join()
