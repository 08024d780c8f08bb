"""An authorised request that has to wait is executed only if it is still authorised afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, func, select

from billing.storage.tables import audit_log, tenants
from tests.conftest import API, PASSWORD, Account, bearer, waits_for_a_lock
from tests.contract.test_document import OPERATIONS
from tests.live import eventually

NEW_PASSWORD = "correct horse battery staple"
CHANGES: dict[str, dict[str, Any] | None] = {
    "regenerate_api_keys": {"key_type": "all", "confirm": True},
    "revoke_api_keys": {"key_type": "all", "confirm": True},
    "configure_webhook": {"webhook_url": "https://hooks.acme.example/"},
    "remove_webhook": None,
    "disconnect_stripe": None,
}
# Not tried here: the user's own row decides, a receiver is called first, and Stripe's tests have the last.
ELSEWHERE = {"change_password", "send_test_webhook", "start_stripe_connect"}


def test_every_changing_operation_is_covered() -> None:
    changing = {name for name, (method, _, roles) in OPERATIONS.items() if method != "GET" and roles}
    assert changing == CHANGES.keys() | ELSEWHERE


def request(account: Account, name: str) -> httpx.Response:
    method, path, _ = OPERATIONS[name]
    body = CHANGES[name]
    headers = bearer(account.tokens["access"])
    return account.client.request(method, f"{API}{path}", headers=headers, **({"json": body} if body else {}))


@contextmanager
def waiting(account: Account, superuser: Engine, name: str) -> Iterator[Future[httpx.Response]]:
    """The operation, authenticated and waiting for its tenant's lock until the block ends."""
    with ThreadPoolExecutor(1) as pool, superuser.begin() as connection:
        connection.execute(select(tenants.c.id).with_for_update(key_share=True))
        future = pool.submit(request, account, name)
        eventually(lambda: waits_for_a_lock(superuser))
        yield future


def audit_log_length(superuser: Engine) -> int:
    with superuser.connect() as connection:
        return connection.scalar(select(func.count()).select_from(audit_log)) or 0


@pytest.mark.parametrize("name", CHANGES)
def test_a_waiting_change_is_refused_if_its_session_ends_meanwhile(
    acme: Account, superuser: Engine, name: str
) -> None:
    with waiting(acme, superuser, name) as late:
        body = {"old_password": PASSWORD, "new_password": NEW_PASSWORD}
        assert acme.post("/change-password/", body).status_code == 200
        logged = audit_log_length(superuser)
    assert (late.result().status_code, late.result().json()["code"]) == (401, "session-ended")
    assert audit_log_length(superuser) == logged


@pytest.mark.parametrize("name", CHANGES)
def test_a_waiting_change_is_made_if_nothing_else_changes(
    acme: Account, superuser: Engine, name: str
) -> None:
    with waiting(acme, superuser, name) as late:
        pass
    assert late.result().status_code == 200


def test_a_change_waits_for_a_session_end_in_progress_and_is_refused(
    acme: Account, superuser: Engine
) -> None:
    """Whichever locks the user's row first: once a password change is answered, the old session is dead."""
    with ThreadPoolExecutor(1) as pool:
        with superuser.begin() as connection:
            connection.exec_driver_sql("UPDATE users SET token_version = token_version + 1")
            late = pool.submit(request, acme, "regenerate_api_keys")
            eventually(lambda: waits_for_a_lock(superuser))
        assert (late.result().status_code, late.result().json()["code"]) == (401, "session-ended")


@pytest.mark.parametrize(
    ("statement", "refusal"),
    [
        ("UPDATE users SET is_active = false", (401, "session-ended")),
        ("UPDATE sessions SET ended_at = now()", (401, "session-ended")),
        ("UPDATE users SET role = 'developer'", (403, "insufficient-scope")),
        ("UPDATE tenants SET is_active = false", (403, "tenant-disabled")),
    ],
)
def test_a_waiting_change_is_refused_if_its_right_is_lost_meanwhile(
    acme: Account, superuser: Engine, statement: str, refusal: tuple[int, str]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with superuser.begin() as connection:
            connection.execute(select(tenants.c.id).with_for_update(key_share=True))
            late = pool.submit(request, acme, "regenerate_api_keys")
            eventually(lambda: waits_for_a_lock(superuser))
            connection.exec_driver_sql(statement)
        assert (late.result().status_code, late.result().json()["code"]) == refusal
