"""Settings: frozen, read once, from the environment and a `.env` file; no secret has a default."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Literal, TypeVar, cast
from urllib.parse import urlsplit

from dotenv import dotenv_values

from billing.keyrings import Keyring, KeyringError, new_keyring

Network = IPv4Network | IPv6Network
T = TypeVar("T")

KEYRINGS = ("JWT_KEYS", "ENCRYPTION_KEYS", "KEY_PEPPERS", "PASSWORD_PEPPERS")
LOWEST_PRODUCTION_COST = 10
LOOPBACK = ("127.0.0.1", "::1", "localhost")
SECRET_KEY = re.compile(r"[sr]k_(test|live)_[!-~]+")
CLIENT_ID = re.compile(r"ca_[!-~]+")
TOKEN = re.compile(r"[!-~]{16,}")
DSN = re.compile(r"https?://[0-9A-Za-z]+(:[0-9A-Za-z]+)?@[!-~]+/[0-9]+")
COLLECTOR = re.compile(r"https?://[^@\s?#]+")
DEFAULT_PORTS = {"http": 80, "https": 443}
HOST = re.compile(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]")


class SettingsError(Exception):
    """A setting is missing or wrong; the sentence names it and what it should be."""


@dataclass(frozen=True)
class Settings:
    """All that a deployment decides. docs/settings.md has the same in a table."""

    environment: Literal["development", "production"]
    host: str
    port: int
    state_dir: Path
    postgres_bin: Path | None
    database_url: str | None = field(repr=False)
    database_replica_url: str | None = field(repr=False)
    migration_database_url: str | None = field(repr=False)
    jwt_keys: Keyring
    encryption_keys: Keyring
    key_peppers: Keyring
    password_peppers: Keyring
    password_cost: int
    public_base_url: str
    cors_allowed_origins: tuple[str, ...]
    trusted_proxies: tuple[Network, ...]
    stripe_secret_key: str | None = field(repr=False)
    stripe_connect_client_id: str | None
    stripe_api_base: str
    stripe_connect_base: str
    webhook_allow_cidrs: tuple[Network, ...]
    webhook_allow_http: bool
    rate_limits: bool
    rate_limit_storage_url: str | None = field(repr=False)
    worker_threads: int
    compiled_operations: bool
    request_timeout_seconds: int
    metrics_port: int | None
    metrics_token: str | None = field(repr=False)
    prometheus_multiproc_dir: Path | None
    otel_exporter_otlp_endpoint: str | None
    sentry_dsn: str | None = field(repr=False)

    @property
    def are_metrics_wanted(self) -> bool:
        """Whether metrics can be scraped at all."""
        return self.metrics_port is not None or self.metrics_token is not None

    @classmethod
    def load(
        cls, environ: Mapping[str, str] | None = None, *, dotenv: Path | None = Path(".env")
    ) -> Settings:
        """Read the environment, then `dotenv` for what it lacks; raises `SettingsError`."""
        return _Reader(_given(environ, dotenv)).settings()


def migration_database_url(
    environ: Mapping[str, str] | None = None, *, dotenv: Path | None = Path(".env")
) -> str | None:
    """The one setting that a migration needs, so that its job need hold no other secret."""
    return _given(environ, dotenv).get("MIGRATION_DATABASE_URL")


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """`/var/lib/billing` as root, else `$XDG_STATE_HOME/billing` (`~/.local/state/billing`)."""
    if os.geteuid() == 0:
        return Path("/var/lib/billing")
    # The XDG Base Directory Specification says to ignore a relative path.
    state_home = Path(environ.get("XDG_STATE_HOME", ""))
    home = Path(environ.get("HOME") or Path.home())
    return (state_home if state_home.is_absolute() else home / ".local/state") / "billing"


def new_secrets() -> dict[str, str]:
    """A new value for every keyring, by the name of its variable."""
    return {name: new_keyring() for name in KEYRINGS}


def _given(environ: Mapping[str, str] | None, dotenv: Path | None) -> dict[str, str]:
    """The variables of the environment, else of `dotenv`; an empty one counts as missing."""
    sources = _dotenv(dotenv), os.environ if environ is None else environ
    return {name: value for source in sources for name, value in source.items() if value}


def _dotenv(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    with _translated_errors(path):
        values = dotenv_values(path, interpolate=False)
    return {name: value for name, value in values.items() if value is not None}


@contextmanager
def _translated_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingsError(f"{path} cannot be used: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not text in UTF-8.") from error


class _Reader:
    """Reads one variable at a time, and knows what development may leave out."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self.given = given
        self.production = self.choice("ENVIRONMENT", "development", "production") == "production"
        self.state_dir = (
            Path(given.get("BILLING_STATE_DIR") or default_state_dir(given)).expanduser().absolute()
        )

    def settings(self) -> Settings:
        port = self.whole("PORT", 8000, lowest=0, highest=65535)
        rings = self.keyrings()
        return Settings(
            environment="production" if self.production else "development",
            host=self.given.get("HOST", "127.0.0.1"),
            port=port,
            state_dir=self.state_dir,
            postgres_bin=Path(self.given["BILLING_PG_BIN"]) if "BILLING_PG_BIN" in self.given else None,
            database_url=self.database_url(),
            database_replica_url=self.beside_database_url("DATABASE_REPLICA_URL"),
            migration_database_url=self.beside_database_url("MIGRATION_DATABASE_URL"),
            jwt_keys=rings["JWT_KEYS"],
            encryption_keys=rings["ENCRYPTION_KEYS"],
            key_peppers=rings["KEY_PEPPERS"],
            password_peppers=rings["PASSWORD_PEPPERS"],
            password_cost=self.whole(
                "PASSWORD_COST", 12, lowest=LOWEST_PRODUCTION_COST if self.production else 4, highest=16
            ),
            public_base_url=self.public_base_url(port),
            cors_allowed_origins=self.origins(),
            trusted_proxies=self.networks("TRUSTED_PROXIES"),
            stripe_secret_key=self.shaped("STRIPE_SECRET_KEY", SECRET_KEY, "begin with sk_ or rk_"),
            stripe_connect_client_id=self.shaped("STRIPE_CONNECT_CLIENT_ID", CLIENT_ID, "begin with ca_"),
            stripe_api_base=self.stripe_base("STRIPE_API_BASE", "https://api.stripe.com"),
            stripe_connect_base=self.stripe_base("STRIPE_CONNECT_BASE", "https://connect.stripe.com"),
            webhook_allow_cidrs=self.development_only("WEBHOOK_ALLOW_CIDRS", self.networks),
            webhook_allow_http=self.development_only("WEBHOOK_ALLOW_HTTP", self.switch),
            rate_limits=self.switch("RATE_LIMITS", "on"),
            rate_limit_storage_url=self.rate_limit_storage_url(),
            worker_threads=self.whole("WORKER_THREADS", 8, lowest=1, highest=64),
            compiled_operations=self.switch("COMPILED_OPERATIONS", "on"),
            request_timeout_seconds=self.whole("REQUEST_TIMEOUT_SECONDS", 30, lowest=1, highest=300),
            metrics_port=self.metrics_port(),
            metrics_token=self.shaped(
                "METRICS_TOKEN", TOKEN, "have at least 16 printable characters, no blank"
            ),
            # prometheus_client's own variable: `billing serve` sets it for the processes that it starts.
            prometheus_multiproc_dir=Path(found)
            if (found := self.given.get("PROMETHEUS_MULTIPROC_DIR"))
            else None,
            otel_exporter_otlp_endpoint=self.collector(),
            sentry_dsn=self.shaped("SENTRY_DSN", DSN, "be like https://key@sentry.example/1"),
        )

    def choice(self, name: str, *allowed: str) -> str:
        value = self.given.get(name, allowed[0])
        if value not in allowed:
            raise SettingsError(f"{name} must be one of: {', '.join(allowed)}.")
        return value

    def whole(self, name: str, default: int, *, lowest: int, highest: int) -> int:
        text = self.given.get(name, str(default))
        if not (re.fullmatch(r"[0-9]{1,9}", text) and lowest <= int(text) <= highest):
            raise SettingsError(f"{name} must be a whole number from {lowest} to {highest}.")
        return int(text)

    def metrics_port(self) -> int | None:
        if "METRICS_PORT" not in self.given:
            return None
        return self.whole("METRICS_PORT", 0, lowest=0, highest=65535)

    def collector(self) -> str | None:
        url = self.given.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        if url is not None and not COLLECTOR.fullmatch(url):
            raise SettingsError("OTEL_EXPORTER_OTLP_ENDPOINT must be a URL such as http://127.0.0.1:4318.")
        return url and url.rstrip("/")

    def switch(self, name: str, default: str = "off") -> bool:
        text = self.given.get(name, default).lower()
        if text not in ("on", "off", "true", "false", "1", "0"):
            raise SettingsError(f"{name} must be on or off.")
        return text in ("on", "true", "1")

    def networks(self, name: str) -> tuple[Network, ...]:
        try:
            return tuple(
                ip_network(part.strip()) for part in self.given.get(name, "").split(",") if part.strip()
            )
        except ValueError:
            raise SettingsError(
                f"{name} must list networks such as 10.0.0.0/8, separated by commas."
            ) from None

    def rate_limit_storage_url(self) -> str | None:
        text = self.given.get("RATE_LIMIT_STORAGE_URL", "memory")
        if text == "memory":
            return None
        if not _is_redis(text):
            raise SettingsError("RATE_LIMIT_STORAGE_URL must be memory, redis://host:6379/0 or rediss://….")
        return text

    def development_only(self, name: str, read: Callable[[str], T]) -> T:
        value = read(name)
        if self.production and value:
            raise SettingsError(f"{name} is for development, and production refuses it.")
        return value

    def origins(self) -> tuple[str, ...]:
        text = self.given.get("CORS_ALLOWED_ORIGINS", "http://localhost:3000,http://127.0.0.1:3000")
        origins = tuple(part.strip() for part in text.split(",") if part.strip())
        if not all(_is_origin(origin) for origin in origins):
            raise SettingsError(
                "CORS_ALLOWED_ORIGINS must list origins such as https://app.example, no wildcard."
            )
        return origins

    def public_base_url(self, port: int) -> str:
        url = self.given.get("PUBLIC_BASE_URL")
        if url is None and self.production:
            raise SettingsError("PUBLIC_BASE_URL is missing: the origin at which clients reach this API.")
        url = (url or "http://127.0.0.1" + (f":{port}" if port != DEFAULT_PORTS["http"] else "")).rstrip("/")
        if not _is_origin(url):
            raise SettingsError("PUBLIC_BASE_URL must be an origin such as https://billing.example.")
        return url

    def shaped(self, name: str, form: re.Pattern[str], rule: str) -> str | None:
        text = self.given.get(name)
        if text is not None and not form.fullmatch(text):
            raise SettingsError(f"{name} must {rule}.")
        return text

    def stripe_base(self, name: str, default: str) -> str:
        url = self.given.get(name, default).rstrip("/")
        parts = urlsplit(url) if _is_origin(url) else None
        # Our secret key is sent there: unencrypted only to this machine, and only in development.
        if parts and (parts.scheme == "https" or (parts.hostname in LOOPBACK and not self.production)):
            return url
        raise SettingsError(
            f"{name} must be an origin such as {default}; http is for loopback in development."
        )

    def database_url(self) -> str | None:
        url = self.given.get("DATABASE_URL")
        if url is None and self.production:
            raise SettingsError("DATABASE_URL is missing: production needs a PostgreSQL of its own.")
        return url

    def beside_database_url(self, name: str) -> str | None:
        url = self.given.get(name)
        if url is not None and "DATABASE_URL" not in self.given:
            raise SettingsError(f"{name} needs DATABASE_URL: without it the database is the embedded one.")
        return url

    def keyrings(self) -> dict[str, Keyring]:
        missing = [name for name in KEYRINGS if name not in self.given]
        if missing and self.production:
            raise SettingsError(f"{', '.join(missing)} missing: `billing secrets generate` prints a set.")
        kept = _kept_secrets(self.state_dir) if missing else {}
        return {name: _keyring(name, self.given.get(name) or kept.get(name, "")) for name in KEYRINGS}


def _is_origin(text: str) -> bool:
    """Whether a browser would send exactly this as `Origin`, with which it is compared."""
    try:
        parts = urlsplit(text)
        scheme, host, port = parts.scheme, parts.hostname or "", parts.port
    except ValueError:
        return False
    host = f"[{host}]" if ":" in host else host
    # Rebuilt from its parts it has no user, no path, no capitals and no default port.
    plain = f"{scheme}://{host}" + ("" if port in (None, DEFAULT_PORTS.get(scheme)) else f":{port}")
    return scheme in DEFAULT_PORTS and text == plain and HOST.fullmatch(host) is not None


def _is_redis(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    is_database = re.fullmatch(r"/?[0-9]{0,9}", parts.path) is not None
    return parts.scheme in ("redis", "rediss") and bool(parts.hostname) and port != 0 and is_database


def _keyring(name: str, text: str) -> Keyring:
    try:
        return Keyring.parse(text)
    except KeyringError as error:
        raise SettingsError(f"{name}: {error}.") from None


def _kept_secrets(state_dir: Path) -> dict[str, str]:
    """The development secrets of this state directory, made once and readable by their owner only."""
    path = state_dir / "secrets.env"
    with _translated_errors(state_dir):
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(state_dir)
    with _translated_errors(path):
        if not path.exists():
            _write_once(path, "".join(f"{name}={value}\n" for name, value in new_secrets().items()))
        _require_private(path)
        return cast("dict[str, str]", dotenv_values(path, interpolate=False))


def _write_once(path: Path, text: str) -> None:
    # A hard link appears whole or not at all: of several processes that start at once, one wins.
    with NamedTemporaryFile("w", dir=path.parent) as draft:  # Readable by its owner only.
        draft.write(text)
        draft.flush()
        with suppress(FileExistsError):
            os.link(draft.name, path)


def _require_private(path: Path) -> None:
    # Whoever can write here could replace our secrets with known ones.
    found = path.lstat()
    if path.is_symlink():
        raise SettingsError(
            f"{path} is a symbolic link, which others may point elsewhere: name what it points to."
        )
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise SettingsError(f"{path} must belong to the user who runs this, and nobody else may write to it.")
