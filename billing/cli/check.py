"""`billing check`: calls all operations of any deployment, and reports which behave as its document says."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import urlsplit

import click
import orjson
import requests
from jsonschema_rs import Draft4Validator, ReferencingError
from requests.structures import CaseInsensitiveDict

from billing.cli.console import as_json, cell, done, say_json, table
from billing.http.validation import as_json_schema

PROBLEM = "application/problem+json"
COLUMNS = ("verdict", "operation", "status", "ms", "note")
# Reserved (RFC 2606): neither mail nor a webhook to it reaches anybody.
EMAIL_DOMAIN = "billing-check.example"
WEBHOOK_URL = f"https://hooks.{EMAIL_DOMAIN}/billing"
MOST_REFERENCES = 32
# A test delivery may take 15 seconds, and each call to Stripe 8.
CALL_SECONDS = 40
# Most limits have a window of a minute.
MOST_WAIT_SECONDS = 60

# What is raised on reading a document that is of another shape than ours, or an answer that such a document allows.
STRANGE = (LookupError, TypeError, ValueError, AttributeError, ReferencingError)

Json = dict[str, Any]
Verdict = Literal["PASS", "FAIL", "SKIP"]


class Wrong(Exception):
    """The deployment does not behave as its document says, or as the operation is meant to."""


class Impossible(Exception):
    """The operation cannot be tried here, through no fault of its own."""


@dataclass(frozen=True)
class Result:
    """The result of one operation; without status and time if it was not called."""

    verdict: Verdict
    operation: str
    status: int | None = None
    ms: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Answer:
    """The answer to one call, valid by the document."""

    status: int
    ms: int
    body: Json

    @property
    def code(self) -> str | None:
        """The code of the problem, if it is one."""
        return self.body.get("code") if self.status >= 400 else None


@dataclass(frozen=True)
class Operation:
    """An operation's method, path and definition in the document."""

    method: str
    path: str
    spec: Json


# The command ---------------------------------------------------------------------------------------


@click.command()
@click.argument("base_url")
@click.option("--webhook-url", help="A receiver of yours, which the test event must reach.")
@as_json
def check(base_url: str, webhook_url: str | None, as_json: bool) -> None:
    """Try all operations of a deployment, and say of each whether it does as the deployment's document says.

    It registers a tenant of its own, which stays behind with its keys revoked and its webhook removed. Nothing
    secret is printed. The exit code is 1 if anything fails.

    \b
    Example:
      billing check https://billing.example.com
    """
    with requests.Session() as session:
        deployment = Deployment(session, origin_of(base_url))
        lines = walk(Visit(deployment, webhook_url))
    if as_json:
        say_json([asdict(line) for line in lines])
    else:
        click.echo(table(COLUMNS, [[cell(getattr(line, column)) for column in COLUMNS] for line in lines]))
        click.echo(counted(lines))
    if any(line.verdict == "FAIL" for line in lines):
        raise click.exceptions.Exit(1)


def origin_of(base_url: str) -> str:
    """The base URL without its last slash; raises `click.BadParameter` for what is no http or https URL."""
    try:
        parts = urlsplit(base_url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise click.BadParameter("must be like https://billing.example.com", param_hint="BASE_URL")
    return base_url.rstrip("/")


def counted(lines: Sequence[Result]) -> str:
    passed, failed, skipped = (
        sum(line.verdict == verdict for line in lines) for verdict in ("PASS", "FAIL", "SKIP")
    )
    return f"{passed} passed, {failed} failed, {skipped} skipped"


def walk(visit: Visit) -> list[Result]:
    """One line for each operation, in an order in which each has what it needs."""
    return [_line(visit, step) for step in STEPS]


def _line(visit: Visit, step: Callable[[Visit], str | None]) -> Result:
    operation, visit.last = step.__name__, None
    try:
        visit.refused_without_credentials(operation)
        verdict, note = _verdict(visit, step)
    except (Wrong, requests.RequestException, *STRANGE) as error:
        verdict, note = "FAIL", _reason(error)
    last = visit.last
    return Result(verdict, operation, last and last.status, last and last.ms, note)


def _verdict(visit: Visit, step: Callable[[Visit], str | None]) -> tuple[Verdict, str]:
    try:
        return "PASS", step(visit) or ""
    except Impossible as error:
        return "SKIP", str(error)


def _reason(error: Exception) -> str:
    # The messages of other exceptions may contain what was sent: a URL with a state in it, a member's value.
    match error:
        case Wrong():
            return str(error)
        case requests.RequestException():
            return f"there is no answer ({type(error).__name__})"
    return f"the document, or the answer by it, is of another shape ({type(error).__name__})"


# The deployment ------------------------------------------------------------------------------------


class Deployment:
    """A deployment and its document: only answers that the document allows are read."""

    def __init__(self, session: requests.Session, base_url: str) -> None:
        self._session = session
        # Otherwise a ~/.netrc would add credentials of its own.
        session.auth = lambda request: request
        self._base_url = base_url
        document = self._document()
        self._components = as_json_schema(document.get("components", {}))
        self._document_read = document
        self._operations = {
            spec.get("operationId"): Operation(method.upper(), path, spec)
            for path, item in document["paths"].items()
            for method, spec in item.items()
            if isinstance(spec, dict)
        }

    def _document(self) -> Json:
        url = f"{self._base_url}/openapi.json"
        try:
            document = self._session.get(url, timeout=CALL_SECONDS).json()
        except requests.RequestException as error:
            raise click.ClickException(f"There is no document at {url} ({type(error).__name__}).") from error
        if not isinstance(document, dict) or not isinstance(document.get("paths"), dict):
            raise click.ClickException(f"What is at {url} is no OpenAPI document.")
        return document

    def operation(self, operation_id: str) -> Operation:
        found = self._operations.get(operation_id)
        if found is None:
            raise Wrong("the document does not have it")
        return found

    def call(
        self, operation_id: str, *, headers: Mapping[str, str] | None = None, **sent: Any
    ) -> tuple[requests.Response, Answer]:
        """Call an operation; raises `Wrong` for an answer that the document does not allow."""
        operation = self.operation(operation_id)
        asked = partial(
            self._session.request,
            operation.method,
            self._base_url + operation.path,
            headers={"Accept": "application/json", **(headers or {})},
            allow_redirects=False,
            timeout=CALL_SECONDS,
            **sent,
        )
        response = asked()
        # A check begun soon after others, or beside them, shares their limits by address.
        if wait := _seconds_to_wait(response):
            done(f"{operation_id} is rate limited: goes on in {wait} s.")
            time.sleep(wait)
            response = asked()
        ms = round(response.elapsed.total_seconds() * 1000)
        return response, Answer(response.status_code, ms, self._read(operation, response))

    def _read(self, operation: Operation, response: requests.Response) -> Json:
        spec = operation.spec.get("responses", {}).get(str(response.status_code))
        if spec is None:
            raise Wrong(f"{response.status_code} is not in the document")
        spec = self._resolved(spec)
        _require_headers(response.headers, {n: self._resolved(h) for n, h in spec.get("headers", {}).items()})
        media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        expected = PROBLEM if response.status_code >= 400 else "application/json"
        if media_type != expected or expected not in spec.get("content", {}):
            raise Wrong(f"{response.status_code} is {media_type or 'of no type'}, not {expected}")
        return self._valid(spec["content"][expected].get("schema", {}), response.content)

    def _valid(self, schema: Json, body: bytes) -> Json:
        try:
            read = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise Wrong("the body is no JSON") from None
        whole = {**as_json_schema(schema), "components": self._components}
        # The mask keeps values, which may be secrets, out of the message.
        for error in Draft4Validator(whole, validate_formats=True, mask="it").iter_errors(read):
            raise Wrong(f"/{'/'.join(map(str, error.instance_path))}: {error.message}")
        if not isinstance(read, dict):
            raise Wrong("the body is no object")
        return read

    def _resolved(self, node: Json) -> Json:
        for _ in range(MOST_REFERENCES):
            if "$ref" not in node:
                return node
            found: Any = self._document_read
            for part in node["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            node = found
        raise Wrong("the document's references lead nowhere")


def _seconds_to_wait(response: requests.Response) -> int:
    """How long until a call refused by a limit may be repeated; 0 if it was not, or that takes too long."""
    seconds = response.headers.get("Retry-After", "")
    if response.status_code != HTTPStatus.TOO_MANY_REQUESTS or not re.fullmatch("[0-9]{1,9}", seconds):
        return 0
    return int(seconds) if int(seconds) <= MOST_WAIT_SECONDS else 0


def _require_headers(headers: CaseInsensitiveDict[str], spec: Mapping[str, Json]) -> None:
    missing = [name for name, header in spec.items() if header.get("required") and name not in headers]
    if missing:
        raise Wrong(f"the answer lacks {missing[0]}")


# The visit -----------------------------------------------------------------------------------------


class Visit:
    """A throw-away tenant's way through a deployment, and the credentials and values collected on it."""

    def __init__(self, deployment: Deployment, webhook_url: str | None = None) -> None:
        self.deployment = deployment
        self.webhook_url = webhook_url
        self.email = f"check-{secrets.token_hex(12)}@{EMAIL_DOMAIN}"
        self.password = secrets.token_urlsafe(24)
        self.last: Answer | None = None
        self._learnt: dict[str, str] = {}

    def learn(self, name: str, value: str) -> None:
        self._learnt[name] = value

    def recall(self, name: str) -> str:
        """Return a learnt value; raises `Impossible` if the step that learns it failed."""
        if name not in self._learnt:
            raise Impossible(f"there is no {name} to go on with")
        return self._learnt[name]

    @property
    def user(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.recall('access token')}"}

    def key(self, name: str = "secret key") -> dict[str, str]:
        return {"X-API-Key": self.recall(name)}

    def take(self, tokens: Json) -> None:
        """Use these tokens from now on."""
        self.learn("access token", tokens["access"])
        self.learn("refresh token", tokens["refresh"])

    def expect(self, status: int, operation_id: str, *, code: str | None = None, **sent: Any) -> Json:
        """Call the step's operation, and keep its answer for the report; raises `Wrong` for another status or code."""
        self.last = answer = self.ask(operation_id, **sent)
        self.require(answer, status, code)
        return answer.body

    def ask(self, operation_id: str, **sent: Any) -> Answer:
        return self.deployment.call(operation_id, **sent)[1]

    def refuse(self, operation_id: str, code: str, **sent: Any) -> None:
        """Raises `Wrong` unless credentials that must not work are refused with 401 and this code."""
        response, answer = self.deployment.call(operation_id, **sent)
        self.require(answer, 401, code)
        if "WWW-Authenticate" not in response.headers:
            raise Wrong("401 lacks WWW-Authenticate")

    def refused_without_credentials(self, operation_id: str) -> None:
        """Require that a secured operation refuses a call without credentials."""
        if self.deployment.operation(operation_id).spec.get("security"):
            self.refuse(operation_id, "credentials-missing")

    @staticmethod
    def require(answer: Answer, status: int, code: str | None = None) -> None:
        """Raises `Wrong` for another status, or another code."""
        expected = f"{status} {code or ''}".rstrip()
        if answer.status != status or (code and answer.code != code):
            raise Wrong(f"answers {answer.status} {answer.code or ''}".rstrip() + f", not {expected}")


# The operations ------------------------------------------------------------------------------------


def register_tenant(visit: Visit) -> None:
    body = {"company_name": "Billing check", "email": visit.email, "password": visit.password}
    answer = visit.expect(201, "register_tenant", json=body)
    visit.take(answer["tokens"])
    visit.learn("secret key", answer["tenant"]["api_key_secret"])
    visit.learn("publishable key", answer["tenant"]["api_key_public"])


def log_in(visit: Visit) -> None:
    visit.recall("access token")
    good = {"email": visit.email, "password": visit.password}
    visit.refuse("log_in", "invalid-credentials", json=good | {"password": secrets.token_urlsafe(24)})
    visit.take(visit.expect(200, "log_in", json=good)["tokens"])


def refresh_tokens(visit: Visit) -> None:
    visit.take(visit.expect(200, "refresh_tokens", json={"refresh": visit.recall("refresh token")}))


def get_current_user(visit: Visit) -> None:
    if visit.expect(200, "get_current_user", headers=visit.user)["user"]["email"] != visit.email:
        raise Wrong("it shows somebody else")


def change_password(visit: Visit) -> None:
    before, new = visit.user, secrets.token_urlsafe(24)
    body = {"old_password": visit.password, "new_password": new}
    answer = visit.expect(200, "change_password", headers=before, json=body)
    visit.password = new
    visit.take(answer["tokens"])
    visit.refuse("get_current_user", "session-ended", headers=before)


def verify_api_key(visit: Visit) -> None:
    answer = visit.expect(200, "verify_api_key", headers=visit.key())
    if (answer["valid"], answer.get("key", {}).get("type")) != (True, "live_secret"):
        raise Wrong("it does not know the key for what it is")


def get_tenant_details(visit: Visit) -> None:
    answer = visit.expect(200, "get_tenant_details", headers=visit.key("publishable key"))
    if "email" in answer["tenant"]:
        raise Wrong("a publishable key sees private members")


def list_api_keys(visit: Visit) -> None:
    answer = visit.expect(200, "list_api_keys", headers=visit.user)
    if any(key["key"] == visit.recall("secret key") for key in answer["keys"]):
        raise Wrong("it shows a secret key")


def regenerate_api_keys(visit: Visit) -> None:
    old = visit.key()
    body = {"key_type": "live", "confirm": True}
    answer = visit.expect(200, "regenerate_api_keys", headers=visit.user, json=body)
    visit.learn("secret key", answer["keys"]["live_secret"]["key"])
    visit.refuse("verify_api_key", "key-expired", headers=old)


def start_stripe_connect(visit: Visit) -> None:
    visit.last = answer = visit.ask("start_stripe_connect", headers=visit.user)
    if answer.code == "stripe-not-configured":
        raise Impossible("Stripe is not configured")
    visit.require(answer, 200)
    visit.learn("state", answer.body["state"])


def complete_stripe_connect(visit: Visit) -> str:
    unknown = {"state": secrets.token_urlsafe(32), "code": "ac_check"}
    visit.expect(400, "complete_stripe_connect", code="state-unknown", params=unknown)
    declined = {"state": visit.recall("state"), "error": "access_denied"}
    visit.expect(403, "complete_stripe_connect", code="access-denied", params=declined)
    return "declined: only a person can connect an account"


def get_stripe_status(visit: Visit) -> None:
    answer = visit.expect(200, "get_stripe_status", headers=visit.user)
    if (answer["connected"], answer["status"]) != (False, "not_connected"):
        raise Wrong("a tenant that is new is connected")


def disconnect_stripe(visit: Visit) -> None:
    visit.expect(200, "disconnect_stripe", headers=visit.user)


def configure_webhook(visit: Visit) -> None:
    body = {"webhook_url": visit.webhook_url or WEBHOOK_URL}
    visit.expect(200, "configure_webhook", headers=visit.user, json=body)


def get_webhook_config(visit: Visit) -> None:
    answer = visit.expect(200, "get_webhook_config", headers=visit.user)
    if answer["webhook_url"] != (visit.webhook_url or WEBHOOK_URL):
        raise Wrong("it shows another URL than was configured")


def send_test_webhook(visit: Visit) -> str:
    answer = visit.expect(200, "send_test_webhook", headers=visit.user)
    if visit.webhook_url is None:
        return "no receiver was named (--webhook-url)"
    if not answer["success"]:
        raise Wrong(f"the receiver was not reached ({answer['error'] or 'no error named'})")
    return f"the receiver answered {answer['status_code']}"


def remove_webhook(visit: Visit) -> None:
    visit.expect(200, "remove_webhook", headers=visit.user)


def revoke_api_keys(visit: Visit) -> None:
    body = {"key_type": "all", "confirm": True, "reason": "billing check is over"}
    visit.expect(200, "revoke_api_keys", headers=visit.user, json=body)
    visit.refuse("verify_api_key", "key-revoked", headers=visit.key())


# The last steps leave the tenant with no working key and no webhook.
STEPS: tuple[Callable[[Visit], str | None], ...] = (
    register_tenant,
    log_in,
    refresh_tokens,
    get_current_user,
    change_password,
    verify_api_key,
    get_tenant_details,
    list_api_keys,
    regenerate_api_keys,
    start_stripe_connect,
    complete_stripe_connect,
    get_stripe_status,
    disconnect_stripe,
    configure_webhook,
    get_webhook_config,
    send_test_webhook,
    remove_webhook,
    revoke_api_keys,
)
