"""Prism as a proxy between a client and a server, where it validates every request and answer by the document."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from uuid import uuid4

import requests

from billing.cli.check import Answer, Deployment, Visit, walk
from billing.http.document import load, operations
from contract.programs import DOCUMENT, Place, environ_for, opened_place, program, state_directory
from tests.live import free_port

START_SECONDS = 60
STOP_SECONDS = 10
VIOLATIONS = "sl-violations"
PASSWORD = "correct horse battery staple"

Json = dict[str, Any]


@dataclass
class Calls:
    """The calls through the proxy, by operation and status, and its complaints."""

    statuses: dict[str, set[int]] = field(default_factory=dict)
    number: int = 0
    refused: int = 0
    complaints: list[str] = field(default_factory=list)

    def note(self, operation: str, response: requests.Response) -> None:
        self.number += 1
        self.statuses.setdefault(operation, set()).add(response.status_code)
        for one in json.loads(response.headers.get(VIOLATIONS, "[]")):
            where = ".".join(map(str, one["location"]))
            # A request that the server refused too is no disagreement.
            if one["location"][0] != "request" or response.status_code not in (400, 401):
                self.complaints.append(f"{operation} {response.status_code}: {where} {one['message']}")
            else:
                self.refused += 1


class Watched(requests.Session):
    """A session that notes the proxy's verdict on each call."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.trust_env = False
        self._calls = calls
        self._names = {(o.method, o.path): o.operation_id for o in operations(load())}

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        response = super().send(request, **kwargs)
        path = str(request.path_url).partition("?")[0]
        if name := self._names.get((str(request.method), path)):
            self._calls.note(name, response)
        return response


class Proxied(Deployment):
    """The API at the proxy's URL. The document is read from the server, as the proxy serves none."""

    def __init__(self, session: requests.Session, proxy_url: str, server_url: str) -> None:
        super().__init__(session, server_url)
        self._base_url = proxy_url


@contextmanager
def prism(upstream: str, log: Path) -> Iterator[str]:
    """Run Prism as a proxy for a server, and yield its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [program("prism"), "proxy", str(DOCUMENT), upstream, "--port", str(port), "--host", "127.0.0.1"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environ_for(), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _await_ready(process, url, log)
            yield url
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)


def _await_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"Prism ended before it was ready:\n{log.read_text()}"
        try:
            requests.get(url, timeout=2)
        except (requests.ConnectionError, requests.Timeout):
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"Prism was not ready within {START_SECONDS} seconds")


# What is called ------------------------------------------------------------------------------------


class Trip:
    """Calls that `billing check` does not make: a completed Stripe connection, and refusals."""

    def __init__(self, deployment: Deployment, place: Place) -> None:
        self._deployment = deployment
        self._place = place
        self._email = f"{uuid4().hex}@acme.example"

    def go(self) -> None:
        registered = self._register(self._email)
        owner = {"Authorization": f"Bearer {registered['tokens']['access']}"}
        key = {"X-API-Key": registered["tenant"]["api_key_secret"]}
        self._refused(registered, owner)
        self._connect(owner)
        self._link(owner)
        self._rotate(owner, key)
        self._webhook(owner)
        self._refresh(registered["tokens"]["refresh"])

    def _call(self, operation_id: str, status: int, code: str | None = None, **sent: Any) -> Json:
        answer = self._ask(operation_id, **sent)
        assert (answer.status, answer.code) == (status, code), (
            f"{operation_id}: {answer.status} {answer.code}"
        )
        return answer.body

    def _ask(self, operation_id: str, **sent: Any) -> Answer:
        return self._deployment.call(operation_id, **sent)[1]

    def _register(self, email: str) -> Json:
        names = {"first_name": "Ada", "last_name": "Example", "domain": "acme.example"}
        body = {"company_name": "Acme Inc.", "email": email, "password": PASSWORD, **names}
        return self._call("register_tenant", 201, json=body)

    def _refused(self, registered: Json, owner: Mapping[str, str]) -> None:
        key = {"X-API-Key": registered["tenant"]["api_key_test_public"]}
        as_bearer = {"Authorization": f"Bearer {registered['tenant']['api_key_secret']}"}
        known = {"company_name": "Acme Inc.", "email": self._email, "password": PASSWORD}
        self._call("register_tenant", 409, "email-taken", json=known)
        weak = known | {"email": f"{uuid4().hex}@acme.example", "password": "passwordpassword"}
        self._call("register_tenant", 422, "password-too-weak", json=weak)
        inside = known | {"email": f"{uuid4().hex}@acme.example", "webhook_url": "https://10.0.0.1/in"}
        self._call("register_tenant", 422, "webhook-url-refused", json=inside)
        wrong = {"old_password": "not the old password", "new_password": "another correct horse battery"}
        self._call("change_password", 403, "wrong-password", headers=owner, json=wrong)
        self._call("list_api_keys", 403, "insufficient-scope", headers=as_bearer)
        self._call("get_tenant_details", 200, headers=owner)
        self._call("verify_api_key", 200, headers=key)
        self._call("verify_api_key", 200, headers=as_bearer)
        self._call("verify_api_key", 401, "key-malformed", headers={"X-API-Key": "sk_live_no"})
        self._call("get_current_user", 401, "token-invalid", headers={"Authorization": "Bearer no"})
        self._call("send_test_webhook", 409, "webhook-not-configured", headers=owner)

    def _connect(self, owner: Mapping[str, str]) -> None:
        away = {"return_url": "https://elsewhere.example/"}
        self._call("start_stripe_connect", 422, "return-url-refused", headers=owner, json=away)
        started = self._call("start_stripe_connect", 200, headers=owner, json={"flow": "oauth"})
        back = _query(self._place.stripe.approve(started["url"]))
        self._call("complete_stripe_connect", 200, params=back)
        self._call("complete_stripe_connect", 400, "state-used", params=back)
        self._call("complete_stripe_connect", 400, "state-missing")
        assert self._call("get_stripe_status", 200, headers=owner)["status"] == "active"
        self._call("start_stripe_connect", 409, "stripe-already-connected", headers=owner)
        self._call("disconnect_stripe", 200, headers=owner)
        self._call("disconnect_stripe", 200, headers=owner)
        assert self._call("get_stripe_status", 200, headers=owner)["status"] == "disconnected"
        started = self._call("start_stripe_connect", 200, headers=owner)
        self._call(
            "complete_stripe_connect",
            422,
            "code-rejected",
            params={"state": started["state"], "code": "ac_no"},
        )

    def _link(self, owner: Mapping[str, str]) -> None:
        started = self._call("start_stripe_connect", 200, headers=owner, json={"flow": "account_link"})
        self._call("complete_stripe_connect", 200, params=_query(self._place.stripe.finish(started["url"])))
        self._call("disconnect_stripe", 200, headers=owner)

    def _rotate(self, owner: Mapping[str, str], key: Mapping[str, str]) -> None:
        body = {"key_type": "all", "confirm": True, "grace_period_seconds": 3600}
        self._call("regenerate_api_keys", 200, headers=owner, json=body)
        self._call("verify_api_key", 200, headers=key)
        self._call("list_api_keys", 200, headers=owner)
        self._call("revoke_api_keys", 200, headers=owner, json={"key_type": "live", "confirm": True})
        self._call("verify_api_key", 401, "key-revoked", headers=key)
        self._call("revoke_api_keys", 200, headers=owner, json={"key_type": "live", "confirm": True})
        self._call("list_api_keys", 200, headers=owner)

    def _webhook(self, owner: Mapping[str, str]) -> None:
        url = self._place.receiver_url
        self._call("configure_webhook", 200, headers=owner, json={"webhook_url": url})
        again = {"webhook_url": url, "regenerate_secret": True, "secret_grace_seconds": 60}
        self._call("configure_webhook", 200, headers=owner, json=again | {"event_types": ["api_key.revoked"]})
        inside = {"webhook_url": "https://169.254.169.254/"}
        self._call("configure_webhook", 422, "webhook-url-refused", headers=owner, json=inside)
        event = {"event_type": "order.paid", "test_data": {"order": {"id": 7, "paid": True}}}
        assert self._call("send_test_webhook", 200, headers=owner, json=event)["success"]
        self._call("get_webhook_config", 200, headers=owner)
        self._call("remove_webhook", 200, headers=owner)
        self._call("remove_webhook", 200, headers=owner)

    def _refresh(self, token: str) -> None:
        first = self._call("refresh_tokens", 200, json={"refresh": token})
        self._call("refresh_tokens", 200, json={"refresh": first["refresh"]})
        self._call("refresh_tokens", 401, "refresh-token-reused", json={"refresh": token})
        self._call("refresh_tokens", 401, "token-invalid", json={"refresh": "no"})


def _query(url: str) -> Json:
    return dict(parse_qsl(urlsplit(url).query))


# The check -----------------------------------------------------------------------------------------


def check() -> str:
    """Make the calls, and count them; raises `AssertionError` with the proxy's complaints."""
    calls = Calls()
    with ExitStack() as stack:
        place, directory = stack.enter_context(opened_place()), stack.enter_context(state_directory())
        proxy_url = stack.enter_context(prism(place.url, directory / "prism.log"))
        deployment = Proxied(stack.enter_context(Watched(calls)), proxy_url, place.url)
        lines = walk(Visit(deployment, place.receiver_url))
        Trip(deployment, place).go()
    failed = [f"{line.operation}: {line.note}" for line in lines if line.verdict != "PASS"]
    assert not failed, "\n".join(failed)
    assert not calls.complaints, "\n".join(calls.complaints)
    missing = {o.operation_id for o in operations(load())} - calls.statuses.keys()
    assert not missing, f"not called: {', '.join(sorted(missing))}"
    assert calls.refused, "Prism notices nothing: not even that credentials are missing"
    kinds = sum(len(statuses) for statuses in calls.statuses.values())
    return f"{calls.number} calls of {len(calls.statuses)} operations, {kinds} kinds of answers, nothing wrong with any"
