"""Clients that write without pause, retry until they are answered, and keep a ledger of what was acknowledged."""

from __future__ import annotations

import random
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import requests

API = "/api/v1/auth/tenants"
# Longer than REQUEST_TIMEOUT_SECONDS: a server answers before.
PATIENCE_SECONDS = 35
RETRY_SECONDS = 0.2
PAUSE_SECONDS = 0.15
NUMBERS = count(1)
# Requests that may be repeated with the same Idempotency-Key.
KEYED = ("register", "change_password", "regenerate", "revoke", "configure")
READS = ("verify", "details", "me")


@dataclass(frozen=True)
class Call:
    """One request: when it ended, how long it took, which server answered, and its status, or how it failed."""

    ended: float
    seconds: float
    kind: str
    server: str | None
    outcome: str

    @property
    def is_acknowledged(self) -> bool:
        return self.outcome in ("200", "201")

    @property
    def is_read(self) -> bool:
        return self.kind in READS


@dataclass
class Account:
    """A tenant as its client knows it: the ledger. `unsure` counts attempts of unknown outcome."""

    number: int
    company: str
    email: str
    password: str
    tenant_id: str | None = None
    access: str = ""
    refresh: str = ""
    url: str = ""
    webhook_secret_ends: str | None = None
    keys: dict[str, str] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    unsure: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Answer:
    """A response; `unsure` when an earlier attempt may have been carried out."""

    status: int
    body: dict[str, Any]
    unsure: bool

    @property
    def code(self) -> str:
        return str(self.body.get("code", ""))


class Unexpected(Exception):
    """A response that should not have been given."""

    def __init__(self, kind: str, account: Account, answer: Answer) -> None:
        super().__init__(f"{kind} of {account.email} was answered with {answer.status} {answer.code}")


def require(answer: Answer, kind: str, account: Account, status: int) -> None:
    """Raise `Unexpected` if the status is another."""
    if answer.status != status:
        raise Unexpected(kind, account, answer)


class Book:
    """What all clients have recorded."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.accounts: list[Account] = []
        self.wrongs: list[str] = []
        self.sessions_lost = 0
        self.clocks_differ = False
        self.worked_on = 0
        self.replays = 0


class Client(threading.Thread, ABC):
    """One user of the service: one request at a time, repeated until it is answered."""

    def __init__(self, url: str, book: Book, receiver_url: str, *, keyed: bool) -> None:
        self.number = next(NUMBERS)
        super().__init__(name=f"client {self.number}", daemon=True)
        self.book = book
        self.idle = threading.Event()
        self.go = threading.Event()
        self.ended = threading.Event()
        self._url = url
        self._receiver_url = receiver_url
        self._keyed = keyed
        self._random = random.Random(self.number)
        self._http = requests.Session()
        self._http.trust_env = False
        self._retry_after = RETRY_SECONDS
        self.doing = "nothing"

    def run(self) -> None:
        try:
            while not self.ended.is_set():
                if not self.go.is_set():
                    self.idle.set()
                    self.go.wait(0.1)
                    continue
                self.idle.clear()
                try:
                    self.act()
                except Unexpected as error:
                    self.book.wrongs.append(str(error))
                time.sleep(self._random.uniform(0.5, 1.5) * PAUSE_SECONDS)
        except Exception as error:
            # Otherwise a client that has crashed would look like one that met no error.
            self.book.wrongs.append(f"{self.name} broke off while it did {self.doing}: {error!r}")
            self.idle.set()
            raise

    @abstractmethod
    def act(self) -> None:
        """Do one thing, and record its outcome."""

    # Requests ----------------------------------------------------------------------------------------

    def ask(
        self,
        kind: str,
        account: Account,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        bearer: bool = False,
    ) -> Answer:
        """The first conclusive response; the request is repeated until then."""
        self.doing = f"{kind} of {account.email}"
        unsure = False
        once = secrets.token_hex(16)
        while True:
            headers = {"X-Forwarded-For": f"198.18.{self.number}.{self._random.randrange(256)}"}
            if kind in KEYED:
                headers["Idempotency-Key"] = once
            if key is not None:
                headers["X-API-Key"] = key
            if bearer:
                headers["Authorization"] = f"Bearer {account.access}"
            status, answer, replayed = self._send(kind, method, path, body, headers)
            self.book.replays += replayed
            if status == 401 and bearer:
                self.log_in(account)
            elif status == 429 or (status == 409 and answer.get("code", "").startswith("idempotency")):
                # Repeated sooner, 60 attempts at one request would reach its rate limit.
                time.sleep(self._retry_after)
            elif 200 <= status < 500:
                self.require_own(kind, account, answer)
                return Answer(status, answer, unsure)
            else:
                unsure = True
                account.unsure[kind] += 1
                time.sleep(RETRY_SECONDS)

    def _send(
        self,
        kind: str,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        headers: Mapping[str, str],
    ) -> tuple[int, dict[str, Any], bool]:
        began = time.monotonic()
        status, replayed, server = 0, False, None
        answer: dict[str, Any] = {}
        try:
            response = self._http.request(
                method, f"{self._url}{API}/{path}/", json=body, headers=dict(headers),
                timeout=PATIENCE_SECONDS,
            )  # fmt: skip
            status, replayed = response.status_code, "Idempotent-Replayed" in response.headers
            self._retry_after = float(response.headers.get("Retry-After", RETRY_SECONDS))
            server = response.headers.get("X-Served-By")
            outcome = str(status) if server else f"{status} of the balancer"
            answer = response.json() if server else {}
        except requests.Timeout:
            outcome = "timeout"
        except requests.ConnectionError as error:
            outcome = "refused" if "refused" in str(error) else "cut off"
        except ValueError:
            outcome = "no JSON"
        now = time.monotonic()
        self.book.calls.append(Call(now, now - began, kind, server, outcome))
        if status == 500:
            self.book.wrongs.append(f"{kind} was answered with 500: {answer.get('request_id')}")
        return status, answer, replayed

    def require_own(self, kind: str, account: Account, body: Mapping[str, Any]) -> None:
        """Require that every tenant in a response is the client's own."""
        for tenant_id, email in tenants_in(body):
            if account.tenant_id is None:
                account.tenant_id = tenant_id
            if tenant_id != account.tenant_id or email not in (None, account.email):
                self.book.wrongs.append(f"{kind} of {account.email} showed tenant {tenant_id}, {email}")

    # What a client does --------------------------------------------------------------------------------

    def register(self) -> Account:
        number = next(NUMBERS)
        account = Account(
            number, f"Acme {number} Inc.", f"ada{number}@acme{number}.example", f"Secure-{secrets.token_hex(8)}-Pass1!"
        )  # fmt: skip
        account.url = f"{self._receiver_url}/{number}-0"
        body = {
            "company_name": account.company,
            "email": account.email,
            "password": account.password,
            "webhook_url": account.url,
        }
        answer = self.ask("register", account, "POST", "register", body)
        if answer.status == 201:
            self._take_tokens(account, answer.body["tokens"])
            tenant = answer.body["tenant"]
            names = {"live_public": "api_key_public", "live_secret": "api_key_secret"}
            names |= {"test_public": "api_key_test_public", "test_secret": "api_key_test_secret"}
            account.keys = {kind: tenant[name] for kind, name in names.items()}
        elif answer.code == "email-taken" and answer.unsure and not self._keyed:
            self.log_in(account)  # An unanswered attempt had been carried out.
        else:
            raise Unexpected("register", account, answer)
        account.done["register"] += 1
        self.book.accounts.append(account)
        return account

    def log_in(self, account: Account) -> None:
        body = {"email": account.email, "password": account.password}
        answer = self.ask("log_in", account, "POST", "login", body)
        require(answer, "log_in", account, 200)
        account.done["log_in"] += 1
        self._take_tokens(account, answer.body["tokens"])

    def refresh(self, account: Account) -> None:
        answer = self.ask("refresh", account, "POST", "token/refresh", {"refresh": account.refresh})
        if answer.status == 200:
            account.done["refresh"] += 1
            self._take_tokens(account, answer.body)
            return
        if not (answer.status == 401 and answer.unsure):
            raise Unexpected("refresh", account, answer)
        # Repeated more than ten seconds after a first attempt without an answer, a token counts as stolen.
        self.book.sessions_lost += 1
        self.log_in(account)

    def change_password(self, account: Account) -> None:
        new = f"Secure-{secrets.token_hex(8)}-Pass1!"
        body = {"old_password": account.password, "new_password": new}
        answer = self.ask("change_password", account, "POST", "change-password", body, bearer=True)
        if answer.status == 403 and answer.unsure and not self._keyed:
            account.password = new
            self.log_in(account)
        else:
            require(answer, "change_password", account, 200)
            account.password = new
            self._take_tokens(account, answer.body["tokens"])
        account.done["change_password"] += 1

    def regenerate(self, account: Account) -> None:
        kind = self._random.choice(["live", "test", "all"])
        body = {"key_type": kind, "confirm": True}
        answer = self.ask("regenerate", account, "POST", "api-keys/regenerate", body, bearer=True)
        require(answer, "regenerate", account, 200)
        account.done["regenerate"] += 1
        replaced = {name: account.keys.get(name) for name in answer.body["keys"]}
        account.keys |= {name: new["key"] for name, new in answer.body["keys"].items()}
        self.check_key(account, account.keys[f"{'test' if kind == 'test' else 'live'}_secret"], works=True)
        for old in replaced.values():
            if old is not None:
                self.check_key(account, old, works=False)

    def revoke(self, account: Account) -> None:
        body = {"key_type": "test", "confirm": True, "reason": "Rotation"}
        answer = self.ask("revoke", account, "POST", "api-keys/revoke", body, bearer=True)
        require(answer, "revoke", account, 200)
        account.done["revoke"] += 1
        if answer.body["revoked_keys"]:
            account.done["revoke something"] += 1
        elif answer.unsure:
            account.unsure["revoke something"] += 1
        for name in ("test_public", "test_secret"):
            if key := account.keys.pop(name, None):
                self.check_key(account, key, works=False)

    def configure(self, account: Account) -> None:
        url = f"{self._receiver_url}/{account.number}-{account.done['configure'] + 1}"
        body = {"webhook_url": url, "regenerate_secret": self._random.random() < 0.3}
        answer = self.ask("configure", account, "POST", "webhooks/config", body, bearer=True)
        require(answer, "configure", account, 200)
        account.url = url
        account.done["configure"] += 1

    def check_key(self, account: Account, key: str, *, works: bool) -> None:
        """Verify the key at either server, as soon as the change is acknowledged."""
        answer = self.ask("verify", account, "GET", "verify", key=key)
        if answer.status == 200 and not works and self.book.clocks_differ:
            self.book.worked_on += 1
            return
        what = f"verify of a key that {'works' if works else 'ended'}"
        require(answer, what, account, 200 if works else 401)

    def read(self, account: Account) -> None:
        kind = self._random.choice(READS)
        if kind == "me":
            answer = self.ask(kind, account, "GET", "me", bearer=True)
        else:
            answer = self.ask(kind, account, "GET", kind, key=account.keys.get("live_secret"))
        require(answer, kind, account, 200)

    def _take_tokens(self, account: Account, tokens: Mapping[str, str]) -> None:
        account.access, account.refresh = tokens["access"], tokens["refresh"]


class Writer(Client):
    """Registers tenants, and changes what belongs to them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._own: list[Account] = []

    def act(self) -> None:
        if not self._own or self._random.random() < 0.1:
            self._own.append(self.register())
            return
        acts = (self.regenerate, self.configure, self.revoke, self.refresh, self.log_in, self.change_password)
        [act] = self._random.choices(acts, weights=(8, 5, 3, 3, 1, 1))
        act(self._random.choice(self._own[-8:]))


class Reader(Client):
    """Has one tenant, and only reads."""

    _account: Account | None = None

    def act(self) -> None:
        if self._account is None:
            self._account = self.register()
        while "live_secret" not in self._account.keys:
            self.regenerate(self._account)
        self.read(self._account)


class Crowd:
    """All clients, which can be paused."""

    def __init__(self, clients: Sequence[Client], book: Book) -> None:
        self.book = book
        self._clients = clients

    def start(self) -> None:
        for client in self._clients:
            client.start()

    def go(self) -> None:
        for client in self._clients:
            client.idle.clear()
            client.go.set()

    def pause(self, *, seconds: float) -> list[str]:
        """Pause the clients after their current action; returns the actions of those that do not finish."""
        for client in self._clients:
            client.go.clear()
        deadline = time.monotonic() + seconds
        for client in self._clients:
            client.idle.wait(max(0.0, deadline - time.monotonic()))
        return [f"{client.name}: {client.doing}" for client in self._clients if not client.idle.is_set()]

    def stop(self) -> None:
        for client in self._clients:
            client.ended.set()


def tenants_in(body: Any) -> Iterator[tuple[str, str | None]]:
    """The tenant ids in a response, each with its email if there is one."""
    if isinstance(body, dict):
        tenant = body.get("tenant")
        if isinstance(tenant, dict) and "id" in tenant:
            yield tenant["id"], tenant.get("email")
        elif isinstance(tenant, str):
            yield tenant, body.get("email")
        for value in body.values():
            yield from tenants_in(value)
