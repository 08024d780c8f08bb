"""The sandbox itself: one platform's Stripe, served at a loopback address for the length of a `with` block."""

from __future__ import annotations

import socket
from collections.abc import Collection
from threading import Thread
from typing import Self

import requests
import uvicorn

from sandbox.accounts import Status
from sandbox.api import Api, Call
from sandbox.connect import Clock, Platform, utc_now
from sandbox.faults import Faults, Operation

CALL_SECONDS = 10


class Sandbox(Platform):
    """Stripe for one platform, with methods by which a test acts as the person at the browser.

    `faults` is the script of what goes wrong; `calls` has the requests to the sandbox so far.
    """

    def __init__(
        self,
        *,
        livemode: bool = False,
        redirect_uris: Collection[str] | None = None,
        clock: Clock = utc_now,
    ) -> None:
        super().__init__(livemode=livemode, redirect_uris=redirect_uris, clock=clock)
        self.faults = Faults()
        self._api = Api(self, self.faults)

    def __enter__(self) -> Self:
        # It listens from here on: connections made before the thread is ready wait in the queue.
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(self._api.app, lifespan="off", ws="none", log_config=None, access_log=False)
        )
        self._thread = Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.faults.is_closing = True
        self._server.should_exit = True
        self._thread.join()

    @property
    def environ(self) -> dict[str, str]:
        """The settings that make a platform use the sandbox as Stripe."""
        return {
            "STRIPE_SECRET_KEY": self.secret_key,
            "STRIPE_CONNECT_CLIENT_ID": self.client_id,
            "STRIPE_API_BASE": self.url,
            "STRIPE_CONNECT_BASE": self.url,
        }

    @property
    def calls(self) -> list[Call]:
        return self._api.calls

    def called(self, operation: str) -> list[Call]:
        """The calls of one operation, oldest first."""
        known = Operation(operation)
        return [call for call in self.calls if call.operation == known]

    def reset(self) -> None:
        """Return to the initial state, with the same URL and keys: no accounts, calls or faults, and the real clock."""
        self.forget()
        self.faults.clear()
        self._api.forget()
        self.clock = utc_now

    # In place of a browser -----------------------------------------------------------------------

    def approve(
        self, authorize_url: str, state_of_account: str = "active", *, account_id: str | None = None
    ) -> str:
        """The callback URL after *Connect*, with a new account or an existing one."""
        account = account_id or Status(state_of_account).value
        return self._submit(authorize_url, decision="connect", account=account)

    def decline(self, authorize_url: str) -> str:
        """The callback URL after *Decline*."""
        return self._submit(authorize_url, decision="decline")

    def finish(self, link_url: str, state_of_account: str = "active") -> str:
        """The URL after *Finish*: the link's `return_url`, or its `refresh_url` if it no longer works."""
        return self._submit(link_url, decision="finish", account=Status(state_of_account).value)

    def leave(self, link_url: str) -> str:
        """The URL after *Leave unfinished*, as for `finish`."""
        return self._submit(link_url, decision="leave")

    def _submit(self, url: str, **form: str) -> str:
        if not url.startswith(f"{self.url}/"):
            raise ValueError("That address is not the sandbox's.")
        with requests.Session() as session:
            session.trust_env = False
            response = session.post(url, form, allow_redirects=False, timeout=CALL_SECONDS)
        if response.status_code != 303:
            raise ValueError(f"The sandbox answered {response.status_code}: {response.text}")
        return response.headers["Location"]
