"""Logs: one line per event, for a terminal or as JSON, and no secret in any of them."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

OFF = logging.CRITICAL + 1

# Connexion logs what it refuses, and with it what was submitted: a password too short lands in the log
# (spec-first/connexion#1176). Others log bodies or whole URLs below WARNING; SQLAlchemy sets its own level.
LEVELS = {
    "connexion": OFF,
    "uvicorn.access": OFF,
    "uvicorn.error": logging.NOTSET,
    "alembic": logging.WARNING,
    "asyncio": logging.WARNING,
    "stripe": logging.WARNING,
    "urllib3": logging.WARNING,
}

# Libraries whose messages quote rows, statements, URLs or what was submitted.
QUOTING = frozenset(
    {"connexion", "jsonschema", "jsonschema_rs", "psycopg2", "requests", "sqlalchemy", "urllib3"}
)

HIDDEN = "[redacted]"

# A marker in every such secret (searched first: few strings have any), its pattern, its replacement.
SECRETS = [
    (marker, re.compile(shape, re.ASCII | re.IGNORECASE), replacement)
    for marker, shape, replacement in [
        ("_live_", r"([spr]k_live_)[0-9a-z]+", rf"\1{HIDDEN}"),
        ("_test_", r"([spr]k_test_)[0-9a-z]+", rf"\1{HIDDEN}"),
        ("ac_", r"\b(ac_)[0-9a-z]{8,}", rf"\1{HIDDEN}"),  # Stripe's authorization code
        ("whsec_", r"(whsec_)[0-9a-z+/=_-]+", rf"\1{HIDDEN}"),
        ("eyj", r"eyJ[\w-]+\.[\w-]+(\.[\w-]*)?", HIDDEN),
        ("bearer", r"\b(bearer\s+)[^\s\"',]+", rf"\1{HIDDEN}"),
        ("basic", r"\b(basic\s+)[0-9a-z+/]+=*", rf"\1{HIDDEN}"),
        ("$2", r"\$2[abxy]?\$\d\d\$[./0-9a-z]+", HIDDEN),
        ("://", r"(://[^\s:/@]*:)[^\s/]+@", rf"\1{HIDDEN}@"),
        ("password", r"\b(password\s*=\s*)('[^']*'|\S+)", rf"\1{HIDDEN}"),  # libpq's other form of a URL
    ]
]


def configure(*, tty: bool, level: str | int = "INFO") -> None:
    """Send every event, structlog's and the standard library's alike, to stderr as one redacted line."""
    sink = Sink()
    finish: list[Processor] = [render_exception, clean, *(PEOPLES if tty else PROGRAMS)]
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, *finish],
        wrapper_class=lean(structlog.make_filtering_bound_logger(level_number(level))),
        logger_factory=lambda *_: LineLogger(sink),
        cache_logger_on_first_use=True,
    )
    _route_standard_logging(sink, finish, level)


def _route_standard_logging(sink: Sink, finish: list[Processor], level: str | int) -> None:
    handler = logging.StreamHandler(sink)
    handler.set_name("billing")
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.contextvars.merge_contextvars,
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *finish],
        )
    )
    root = logging.getLogger()
    root.handlers = [other for other in root.handlers if other.name != handler.name] + [handler]
    root.setLevel(level_number(level))
    _tame_libraries()


def _tame_libraries() -> None:
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)
    # uvicorn brings handlers of its own when it is started by its own command.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
    # A record that cannot be formatted is otherwise printed raw, secrets and all.
    logging.raiseExceptions = False


def level_number(level: str | int) -> int:
    """The number of a level's name, as in `logging.INFO`."""
    return level if isinstance(level, int) else logging.getLevelNamesMapping()[level.upper()]


def stamp(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Add the time; orjson formats it five times as fast as structlog's processor does."""
    event["timestamp"] = datetime.now(UTC)
    return event


def to_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    """One line of JSON; the event is plain data by now."""
    return orjson.dumps(event, option=orjson.OPT_UTC_Z).decode()


# The last steps: an event becomes a line, for people at a terminal or for programs.
PEOPLES: list[Processor] = [
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
]
PROGRAMS: list[Processor] = [stamp, to_json]


def redact(text: str) -> str:
    """The text with every secret in it replaced, and what UTF-8 cannot encode escaped."""
    # Most of what is logged is a number, an id or a word: every secret's pattern needs another character.
    if text.isascii() and text.replace("-", "").isalnum():
        return text
    lowered = text.lower()
    for marker, shape, replacement in SECRETS:
        if marker in lowered:
            text = shape.sub(replacement, text)
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def clean(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Make the event plain data without secrets."""
    return {name: redact(value) if type(value) is str else plain(value) for name, value in event.items()}


def plain(value: object) -> object:
    """The value as JSON has it, redacted; what JSON does not have becomes text."""
    match value:
        case str():
            return redact(value)
        case int() if -(2**63) <= value < 2**63:
            return value
        case float() | None:
            return value
        case dict():
            return {redact(str(name)): plain(member) for name, member in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(member) for member in value]
    return redact(str(value))


def describe(exc_info: ExcInfo) -> str:
    """The exception and its causes, the first cause first, without any local variables."""
    return "\n".join(paragraph(error) for error in reversed(list(causes(exc_info[1]))))


def paragraph(error: BaseException) -> str:
    """One traceback; without the message where the error's library quotes what was submitted."""
    kind = type(error)
    name = f"{kind.__module__}.{kind.__qualname__}"
    message = name if kind.__module__.partition(".")[0] in QUOTING else f"{name}: {error}"
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"Traceback (most recent call last):\n{frames}{message}"


def causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, what it came from, and the members of groups among them, each once."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        error_ = waiting.pop()
        if error_ is None or any(error_ is other for other in seen):
            continue
        seen.append(error_)
        yield error_
        context = None if error_.__suppress_context__ else error_.__context__
        waiting += [*getattr(error_, "exceptions", ()), error_.__cause__ or context]


render_exception = structlog.processors.ExceptionRenderer(describe)


class Sink:
    """Standard error, except that a full disk or a closed pipe loses the line and not the request."""

    def write(self, line: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(line)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()


def lean(base: type) -> type:
    """structlog's logger for processors that end in a line; its own copies the event, and checks the result."""

    def log(self: Any, method: str, event: str | None = None, /, **fields: object) -> None:
        line: Any = {**self._context, **fields, "event": event}
        with suppress(structlog.DropEvent):
            for step in self._processors:
                line = step(self._logger, method, line)
            self._logger.msg(line)

    return type(base.__name__, (base,), {"_proxy_to_logger": log})


class LineLogger:
    """structlog's last step: writes a line per event. Standard error is line-buffered, and needs no flush."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def msg(self, line: str) -> None:
        self._sink.write(line + "\n")

    debug = info = warning = error = critical = exception = msg
