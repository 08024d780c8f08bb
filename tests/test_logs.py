"""Logs: one line per event, and no secret in any of them."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema_rs
import psycopg2
import pytest
import sqlalchemy.exc
import structlog
import uvicorn

from billing import logs
from billing.logs import redact

Lines = Callable[[], list[Any]]


@pytest.fixture
def restored() -> Iterator[None]:
    """Restores the logging configuration, which belongs to the whole process."""
    root = logging.getLogger()
    before = structlog.get_config(), root.handlers[:], root.level, logging.raiseExceptions
    names = [*logs.LEVELS, "uvicorn"]
    loggers = {
        name: vars(logging.getLogger(name)) | {"handlers": logging.getLogger(name).handlers[:]}
        for name in names
    }
    yield
    structlog.configure(**before[0])
    root.handlers, logging.raiseExceptions = before[1], before[3]
    root.setLevel(before[2])
    for name, state in loggers.items():
        logging.getLogger(name).propagate = state["propagate"]
        logging.getLogger(name).handlers[:] = state["handlers"]
        logging.getLogger(name).setLevel(state["level"])


@pytest.fixture
def lines(restored: None, capsys: pytest.CaptureFixture[str]) -> Lines:
    """The events logged as JSON."""
    logs.configure(tty=False, level="DEBUG")
    return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


# Made at run time: a secret scanner takes a constant for the real thing.
def key(prefix: str = "sk_live_") -> str:
    return prefix + secrets.token_hex(19)


def jwt() -> str:
    return ".".join(
        base64.urlsafe_b64encode(part).rstrip(b"=").decode()
        for part in (b'{"alg":"HS256"}', b'{"sub":"1"}', secrets.token_bytes(32))
    )


def bcrypt_hash() -> str:
    return "$2b$12$" + secrets.token_hex(27)[:53]


SECRETS = {
    "secret key": key(),
    "test key": key("sk_test_"),
    "publishable key": key("pk_live_"),
    "restricted Stripe key": key("rk_live_"),
    "webhook secret": "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode(),
    "token": jwt(),
    "bearer": secrets.token_urlsafe(20),
    "basic": base64.b64encode(b"user:password").decode(),
    "hash": bcrypt_hash(),
    "URL": "hunter2:/?x",
    "code": "ac_" + secrets.token_hex(12),
    "DSN": "hunter22",
}
WRAPPED = {
    "bearer": "Authorization: Bearer {}",
    "basic": "basic {}",
    "URL": "postgresql+psycopg2://billing:{}@db.internal:5432/billing",
    "DSN": "host=db user=billing password={} dbname=billing",
}


def sentence(name: str) -> str:
    return WRAPPED.get(name, "a value {} in a sentence").format(SECRETS[name])


@pytest.mark.parametrize("name", [name for name in SECRETS if name != "URL"])
def test_a_secret_is_redacted_wherever_it_appears(name: str) -> None:
    for text in (
        sentence(name),
        f'{{"x": "{sentence(name)}"}}',
        f"\n{sentence(name)}\n",
        repr([sentence(name)]),
    ):
        assert SECRETS[name] not in redact(text)
        assert "[redacted]" in redact(text)


@pytest.mark.parametrize("password", ["hunter2", "p%40ss", "p@ss", "a:b:c", "'quoted'", '"quoted"'])
@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg2", "redis", "https"])
def test_only_the_password_of_a_url_is_redacted(scheme: str, password: str) -> None:
    assert (
        redact(f"to {scheme}://user:{password}@host:5432/db?x=1")
        == f"to {scheme}://user:[redacted]@host:5432/db?x=1"
    )


@pytest.mark.parametrize(
    "text",
    [
        "a plain sentence, with punctuation: none of it secret",
        "sk_live_****...abcd",
        "whsec_****...abcd",
        "https://billing.example/api/v1/auth/tenants/login/?a=b@c",
        "http://127.0.0.1:8000",
        "01994b5e-7d3a-7000-8000-000000000000",
        "back_to_basics",
        "password too short",
    ],
)
def test_text_without_a_secret_is_unchanged(text: str) -> None:
    assert redact(text) == text


def test_a_redacted_key_keeps_its_prefix() -> None:
    assert redact(key("pk_test_")) == "pk_test_[redacted]"


class Opaque:
    def __repr__(self) -> str:
        return sentence("secret key")


@pytest.mark.parametrize(
    "value",
    [
        sentence("secret key"),
        [sentence("secret key")],
        {"a": ({"b": {sentence("secret key")}},)},
        {sentence("secret key"): 1},
        sentence("secret key").encode(),
        Opaque(),
        [Opaque()],
        ValueError(sentence("secret key")),
    ],
    ids=["text", "list", "nested", "name", "bytes", "repr", "repr in a list", "exception"],
)
def test_every_part_of_an_event_is_redacted(lines: Lines, value: object) -> None:
    structlog.get_logger().info("event", value=value)
    (event,) = lines()
    assert SECRETS["secret key"] not in json.dumps(event)
    assert "sk_live_[redacted]" in json.dumps(event)


def test_the_event_itself_and_bound_values_are_redacted(lines: Lines) -> None:
    with structlog.contextvars.bound_contextvars(bound=sentence("token")):
        structlog.get_logger().info(sentence("token"))
        logging.getLogger("anyone").info("told %s", sentence("token"))
    events = lines()
    assert len(events) == 2
    assert SECRETS["token"] not in json.dumps(events)


def test_a_line_is_json_with_time_level_and_values(lines: Lines) -> None:
    structlog.get_logger().warning(
        "event", number=1, big=2**80, nothing=None, yes=True, part=0.5, text="\udcff€\n"
    )
    (event,) = lines()
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "event",
        "level": "warning",
        "number": 1,
        "big": str(2**80),
        "nothing": None,
        "yes": True,
        "part": 0.5,
        "text": "\\udcff€\n",
    }


def test_standard_logging_has_the_same_format_and_context(lines: Lines) -> None:
    with structlog.contextvars.bound_contextvars(request_id="12345678"):
        logging.getLogger("uvicorn.error").info("Started %s", "server")
    (event,) = lines()
    said = {name: event[name] for name in ("event", "level", "logger", "request_id")}
    assert said == {
        "event": "Started server",
        "level": "info",
        "logger": "uvicorn.error",
        "request_id": "12345678",
    }


def test_a_terminal_gets_text_instead_of_json(restored: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(tty=True)
    structlog.get_logger().info("event", value=sentence("secret key"))
    line = capsys.readouterr().err
    assert "event" in line and not line.startswith("{")
    assert SECRETS["secret key"] not in line


def test_nothing_is_logged_below_the_level(restored: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(tty=False, level="warning")
    structlog.get_logger().info("quiet")
    logging.getLogger("anyone").info("quiet")
    assert capsys.readouterr().err == ""


def test_configuring_twice_logs_each_event_once(lines: Lines) -> None:
    logs.configure(tty=False)
    logging.getLogger("anyone").info("once")
    assert len(lines()) == 1


@pytest.mark.parametrize(
    "name",
    [
        "connexion",
        "connexion.middleware.exceptions",
        "connexion.middleware.validation",
        "connexion.validators.json",
    ],
)
def test_connexion_is_silent(lines: Lines, name: str) -> None:
    logging.getLogger(name).critical("'hunter2' is too short")
    assert lines() == []


def test_logging_configured_by_uvicorn_before_is_overridden(lines: Lines) -> None:
    uvicorn.Config("any:app")
    logs.configure(tty=False)
    assert not logging.getLogger("uvicorn.access").hasHandlers()  # Its protocol checks this before it logs.
    logging.getLogger("uvicorn.access").critical("GET /?code=secret")
    logging.getLogger("uvicorn.error").info("Started")
    assert [event["event"] for event in lines()] == ["Started"]


@pytest.mark.parametrize("name", ["stripe", "urllib3.connectionpool", "sqlalchemy.engine.Engine"])
def test_libraries_log_no_bodies_or_statements(lines: Lines, name: str) -> None:
    logging.getLogger(name).info("post_data=secret")
    assert lines() == []


# Exceptions --------------------------------------------------------------------------------------


def test_a_traceback_is_redacted_and_shows_no_locals(lines: Lines) -> None:
    def fail(password: str) -> None:
        raise ValueError(sentence("bearer"))

    try:
        fail("hunter" + "2")
    except ValueError:
        structlog.get_logger().exception("failed")
        logging.getLogger("anyone").exception("failed")
    events = lines()
    assert len(events) == 2
    for event in events:
        assert "in fail" in event["exception"]
        assert "ValueError: Authorization: Bearer [redacted]" in event["exception"]
        assert "hunter2" not in json.dumps(event)
        assert SECRETS["bearer"] not in json.dumps(event)


def test_a_database_error_shows_only_its_types(lines: Lines) -> None:
    email = "@".join(["jane", "acme.example"])
    try:
        try:
            raise psycopg2.IntegrityError(f"Key (email)=({email}) already exists.")
        except psycopg2.Error as error:
            raise sqlalchemy.exc.IntegrityError(f"INSERT {email}", {"email": email}, error) from error
    except sqlalchemy.exc.IntegrityError:
        structlog.get_logger().exception("failed")
    (event,) = lines()
    assert "psycopg2.IntegrityError\n" in event["exception"]
    assert event["exception"].endswith("sqlalchemy.exc.IntegrityError")
    assert email not in json.dumps(event)


@pytest.mark.parametrize("module", sorted(logs.QUOTING))
def test_an_error_of_a_library_that_quotes_input_shows_only_its_type(lines: Lines, module: str) -> None:
    quoting = type("Refused", (Exception,), {"__module__": f"{module}.errors"})
    structlog.get_logger().error("failed", exc_info=quoting("what was submitted"))
    (event,) = lines()
    assert event["exception"].endswith(f"{module}.errors.Refused")
    assert "submitted" not in event["exception"]


def test_a_schema_validation_error_shows_only_its_type(lines: Lines) -> None:
    try:
        jsonschema_rs.validate({"type": "integer"}, "what was submitted")
    except jsonschema_rs.ValidationError:
        structlog.get_logger().exception("failed")
    (event,) = lines()
    assert event["exception"].endswith("ValidationError")


def test_a_record_that_cannot_be_formatted_is_not_printed_raw(
    restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(tty=False)
    logging.getLogger("anyone").warning("%s and %s", "what was submitted")
    assert "submitted" not in capsys.readouterr().err


def test_each_cause_context_and_group_member_is_logged_once(lines: Lines) -> None:
    first, second = KeyError("first"), KeyError("second")
    second.__cause__, first.__context__ = first, second
    several = ExceptionGroup("several", [second, OSError("third")])
    structlog.get_logger().error("failed", exc_info=several)
    (event,) = lines()
    assert [event["exception"].count(word) for word in ("'first'", "'second'", "third")] == [1, 1, 1]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("I/O operation on closed file")], ids=repr
)
def test_a_failed_log_write_loses_only_that_line(
    restored: None, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise error

    monkeypatch.setattr("sys.stderr", Full())
    logs.configure(tty=False)
    structlog.get_logger().info("lost")
    logging.getLogger("anyone").info("lost")


def test_text_that_skips_the_search_for_secrets_contains_none() -> None:
    """The shortcut for plain words relies on this: every kind of secret contains another character."""
    plain = re.compile("[0-9A-Za-z-]*")
    for secret in (
        key(),
        key("pk_test_"),
        "ac_" + "a" * 9,
        "whsec_" + "a" * 9,
        "eyJ0.eyJ0",
        "Bearer a",
        "Basic a",
    ):
        assert not plain.fullmatch(secret)
        assert redact(secret) != secret
    for text in ("0192f3c1-7e4c-7cc0-8e4b-0123456789ab", "GET", ""):
        assert redact(text) == text
