"""Settings: the default, the good and the bad values of each variable, and no secret in any message."""

from __future__ import annotations

import ast
import base64
import dataclasses
import os
import stat
import subprocess
import sys
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from billing import settings as settings_module
from billing.keyrings import new_keyring
from billing.settings import KEYRINGS, Settings, SettingsError, default_state_dir, new_secrets

ROOT = Path(__file__).parents[1]
SECRETS = new_secrets()
PRODUCTION = {
    "ENVIRONMENT": "production",
    "DATABASE_URL": "postgresql://billing_app:hunter2@db.example/billing",
    "PUBLIC_BASE_URL": "https://billing.example",
    **SECRETS,
}


def development(tmp_path: Path, **given: str) -> Settings:
    return Settings.load({"BILLING_STATE_DIR": str(tmp_path), **SECRETS, **given}, dotenv=None)


def production(**given: str) -> Settings:
    return Settings.load({**PRODUCTION, **given}, dotenv=None)


def refusal(tmp_path: Path, **given: str) -> str:
    with pytest.raises(SettingsError) as caught:
        development(tmp_path, **given)
    return str(caught.value)


# Values ------------------------------------------------------------------------------------------

DEFAULTS: dict[str, Any] = {
    "environment": "development",
    "host": "127.0.0.1",
    "port": 8000,
    "postgres_bin": None,
    "database_url": None,
    "database_replica_url": None,
    "migration_database_url": None,
    "password_cost": 12,
    "public_base_url": "http://127.0.0.1:8000",
    "cors_allowed_origins": ("http://localhost:3000", "http://127.0.0.1:3000"),
    "trusted_proxies": (),
    "webhook_allow_cidrs": (),
    "webhook_allow_http": False,
    "worker_threads": 8,
    "metrics_port": None,
    "metrics_token": None,
    "prometheus_multiproc_dir": None,
    "otel_exporter_otlp_endpoint": None,
    "sentry_dsn": None,
    "compiled_operations": True,
    "request_timeout_seconds": 30,
    "rate_limits": True,
    "rate_limit_storage_url": None,
    "stripe_secret_key": None,
    "stripe_connect_client_id": None,
    "stripe_api_base": "https://api.stripe.com",
    "stripe_connect_base": "https://connect.stripe.com",
}


def test_defaults(tmp_path: Path) -> None:
    loaded = development(tmp_path)
    assert {name: getattr(loaded, name) for name in DEFAULTS} == DEFAULTS
    assert loaded.state_dir == tmp_path
    assert loaded.environment == "development"


@pytest.mark.parametrize(("port", "url"), [("9000", "http://127.0.0.1:9000"), ("80", "http://127.0.0.1")])
def test_the_default_base_url_omits_only_the_standard_port(tmp_path: Path, port: str, url: str) -> None:
    assert development(tmp_path, PORT=port).public_base_url == url


def test_every_setting_but_secrets_and_the_state_directory_has_a_tested_default() -> None:
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert fields == DEFAULTS.keys() | {"state_dir"} | {name.lower() for name in KEYRINGS}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("HOST", "0.0.0.0", "0.0.0.0"),
        ("PORT", "0", 0),
        ("PORT", "65535", 65535),
        ("DATABASE_URL", "postgresql://db.example/billing", "postgresql://db.example/billing"),
        ("PASSWORD_COST", "4", 4),
        ("PASSWORD_COST", "16", 16),
        ("PUBLIC_BASE_URL", "https://billing.example/", "https://billing.example"),
        ("PUBLIC_BASE_URL", "http://[::1]:8000", "http://[::1]:8000"),
        ("PUBLIC_BASE_URL", "http://billing.example:443", "http://billing.example:443"),
        (
            "CORS_ALLOWED_ORIGINS",
            "https://a.example, http://b.example:1",
            ("https://a.example", "http://b.example:1"),
        ),
        ("CORS_ALLOWED_ORIGINS", ",", ()),
        ("TRUSTED_PROXIES", "10.0.0.0/8, ::1", (ip_network("10.0.0.0/8"), ip_network("::1/128"))),
        ("WEBHOOK_ALLOW_CIDRS", "127.0.0.0/8", (ip_network("127.0.0.0/8"),)),
        *(("WEBHOOK_ALLOW_HTTP", text, True) for text in ("on", "ON", "true", "1")),
        *(("WEBHOOK_ALLOW_HTTP", text, False) for text in ("off", "false", "0", "")),
        ("WORKER_THREADS", "64", 64),
        ("METRICS_PORT", "0", 0),
        ("METRICS_PORT", "", None),
        ("METRICS_TOKEN", "hunter2-hunter2-hunter2", "hunter2-hunter2-hunter2"),
        ("SENTRY_DSN", "https://hunter2@sentry.example/1", "https://hunter2@sentry.example/1"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318/", "http://127.0.0.1:4318"),
        ("PROMETHEUS_MULTIPROC_DIR", "/run/billing", Path("/run/billing")),
        ("COMPILED_OPERATIONS", "off", False),
        ("RATE_LIMITS", "FALSE", False),
        ("REQUEST_TIMEOUT_SECONDS", "300", 300),
        ("RATE_LIMIT_STORAGE_URL", "memory", None),
        ("RATE_LIMIT_STORAGE_URL", "redis://cache.example", "redis://cache.example"),
        ("RATE_LIMIT_STORAGE_URL", "rediss://:hunter2@[::1]:6380/1", "rediss://:hunter2@[::1]:6380/1"),
        ("RATE_LIMIT_STORAGE_URL", "redis://cache.example/?protocol=3", "redis://cache.example/?protocol=3"),
        ("STRIPE_SECRET_KEY", "sk_test_hunter2", "sk_test_hunter2"),
        ("STRIPE_SECRET_KEY", "rk_live_hunter2", "rk_live_hunter2"),
        ("STRIPE_CONNECT_CLIENT_ID", "ca_acme", "ca_acme"),
        ("STRIPE_API_BASE", "http://127.0.0.1:9000/", "http://127.0.0.1:9000"),
        ("STRIPE_CONNECT_BASE", "https://stripe.example", "https://stripe.example"),
        ("PORT", "", 8000),
    ],
)
def test_good_values(tmp_path: Path, name: str, text: str, value: object) -> None:
    assert getattr(development(tmp_path, **{name: text}), name.lower()) == value


BAD = {
    "ENVIRONMENT": ["Production", "staging", "prod"],
    "PORT": ["-1", "65536", "80.0", "http", "٨٠", "1e3", " 80", "8_0"],
    "PASSWORD_COST": ["3", "17", "twelve"],
    "WORKER_THREADS": ["0", "65", "many"],
    "COMPILED_OPERATIONS": ["no", "2"],
    "RATE_LIMITS": ["no", "2"],
    "REQUEST_TIMEOUT_SECONDS": ["0", "301", "1.5"],
    "METRICS_PORT": ["-1", "65536", "off"],
    "METRICS_TOKEN": ["hunter2", "hunter2 hunter2 hunter2", "hunter2-hunter2-hünter2"],
    "OTEL_EXPORTER_OTLP_ENDPOINT": ["localhost:4318", "grpc://127.0.0.1", "http://user:hunter2@otel.example"],
    "SENTRY_DSN": ["hunter2", "https://sentry.example/1", "https://hunter2@sentry.example/"],
    "RATE_LIMIT_STORAGE_URL": [
        "off",
        "redis",
        "redis://",
        "http://cache.example",
        "redis://cache.example:http",
        "redis://cache.example/hunter2",
    ],
    "PUBLIC_BASE_URL": [
        "billing.example",
        "ftp://billing.example",
        "https://",
        "https://billing.example/api",
        "https://billing.example?x",
        "https://billing.example#x",
        "https://user:hunter2@billing.example",
        "https://billing.example:99999",
        "https://billing.example:443",
        "http://127.0.0.1:80",
        "https://[::1",
        "https://a b.example",
        "https://*.billing.example",
        "HTTPS://billing.example",
        "https://Billing.example",
        "https://billing.example\n",
    ],
    "CORS_ALLOWED_ORIGINS": [
        "*",
        "https://*",
        "null",
        "app.example",
        "https://app.example/",
        "https://app.example https://b.example",
        "https://[",
        "https://user@app.example",
        "https://app.example:443",
    ],
    "TRUSTED_PROXIES": ["proxy", "10.0.0.1/8", "10.0.0.0/33", "*"],
    "WEBHOOK_ALLOW_CIDRS": ["localhost", "127.0.0.1/8"],
    "WEBHOOK_ALLOW_HTTP": ["yes", "maybe", "2"],
    "STRIPE_SECRET_KEY": ["hunter2", "pk_live_hunter2", "sk_live_", "sk_live_hunter2 ", "sk_prod_hunter2"],
    "STRIPE_CONNECT_CLIENT_ID": ["acme", "ca_", "ca_ac me"],
    **{
        name: [
            "http://stripe.example",
            "stripe.example",
            "https://stripe.example/v1",
            "http://127.0.0.1.example",
        ]
        for name in ("STRIPE_API_BASE", "STRIPE_CONNECT_BASE")
    },
    **{name: ["hunter2", "k1:hunter2", "k1:hünter2"] for name in KEYRINGS},
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BAD.items() for text in texts])
def test_a_bad_value_is_refused_naming_its_variable(tmp_path: Path, name: str, text: str) -> None:
    said = refusal(tmp_path, **{name: text})
    assert said.startswith(name)
    assert "nter2" not in said


def test_a_number_too_long_to_parse_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, PORT="9" * 5000) == "PORT must be a whole number from 0 to 65535."


def test_the_state_directory_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert (
        Settings.load({**SECRETS, "BILLING_STATE_DIR": "~/state"}, dotenv=None).state_dir
        == tmp_path / "state"
    )
    assert Settings.load({**SECRETS, "BILLING_STATE_DIR": "here"}, dotenv=None).state_dir == tmp_path / "here"


@pytest.mark.parametrize(
    ("user", "environ", "expected"),
    [
        (0, {"XDG_STATE_HOME": "/xdg"}, "/var/lib/billing"),
        (1000, {"XDG_STATE_HOME": "/xdg"}, "/xdg/billing"),
        (1000, {}, "/home/ada/.local/state/billing"),
    ],
)
def test_the_default_state_directory(
    monkeypatch: pytest.MonkeyPatch, user: int, environ: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setenv("HOME", "/home/ada")
    assert default_state_dir(environ) == Path(expected)


@pytest.mark.parametrize("name", ["DATABASE_REPLICA_URL", "MIGRATION_DATABASE_URL"])
def test_other_database_urls_require_database_url(tmp_path: Path, name: str) -> None:
    """Otherwise the embedded database would be used by somebody who means another."""
    url = "postgresql://other.example/billing"
    assert refusal(tmp_path, **{name: url}).startswith(f"{name} needs DATABASE_URL")
    assert getattr(production(**{name: url}), name.lower()) == url


def test_settings_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        development(tmp_path).port = 1  # type: ignore[misc]


def test_the_representation_shows_no_secret() -> None:
    more = {
        "MIGRATION_DATABASE_URL": "postgresql://billing_owner:hunter3@db.example/billing",
        "DATABASE_REPLICA_URL": "postgresql://billing_app:hunter4@replica.example/billing",
    }
    watched = {"METRICS_TOKEN": "hunter2-hunter2-hunter2", "SENTRY_DSN": "https://hunter2@sentry.example/1"}
    shown = repr(production(**more, STRIPE_SECRET_KEY="sk_live_hunter2", **watched))
    assert "hunter" not in shown
    for ring in SECRETS.values():
        encoded = ring.partition(":")[2]
        assert encoded not in shown
        assert repr(base64.b64decode(encoded)) not in shown


# Production --------------------------------------------------------------------------------------


def test_production_loads_with_everything_it_needs() -> None:
    assert production().environment == "production"


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("name", [*KEYRINGS, "DATABASE_URL", "PUBLIC_BASE_URL"])
def test_production_names_a_missing_setting(name: str, empty: bool) -> None:
    given = {**PRODUCTION, name: ""} if empty else {n: v for n, v in PRODUCTION.items() if n != name}
    with pytest.raises(SettingsError, match=f"^{name} (is )?missing"):
        Settings.load(given, dotenv=None)


def test_production_names_every_missing_secret_and_generates_none(tmp_path: Path) -> None:
    given = {n: v for n, v in PRODUCTION.items() if n not in KEYRINGS}
    with pytest.raises(SettingsError, match=", ".join(KEYRINGS)):
        Settings.load({**given, "BILLING_STATE_DIR": str(tmp_path)}, dotenv=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["STRIPE_API_BASE", "STRIPE_CONNECT_BASE"])
def test_production_requires_tls_for_stripe(name: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name} must"):
        production(**{name: "http://127.0.0.1:9000"})


@pytest.mark.parametrize(
    ("name", "text"),
    [("WEBHOOK_ALLOW_CIDRS", "127.0.0.0/8"), ("WEBHOOK_ALLOW_HTTP", "on")],
)
def test_production_refuses_private_addresses_and_plain_http_for_webhooks(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name} is for development"):
        production(**{name: text})
    assert not production(WEBHOOK_ALLOW_HTTP="off", WEBHOOK_ALLOW_CIDRS="").webhook_allow_http


@pytest.mark.parametrize(("cost", "allowed"), [("9", False), ("10", True)])
def test_production_requires_a_password_cost_of_ten(cost: str, allowed: bool) -> None:
    if allowed:
        assert production(PASSWORD_COST=cost).password_cost == int(cost)
    else:
        with pytest.raises(SettingsError, match="^PASSWORD_COST"):
            production(PASSWORD_COST=cost)


# Development's secrets ---------------------------------------------------------------------------


def rings(loaded: Settings) -> list[Any]:
    return [getattr(loaded, name.lower()) for name in KEYRINGS]


def test_secrets_are_generated_once_and_readable_by_their_owner_only(tmp_path: Path) -> None:
    environ = {"BILLING_STATE_DIR": str(tmp_path / "deep" / "state")}
    first, second = (Settings.load(environ, dotenv=None) for _ in range(2))
    assert rings(first) == rings(second)
    assert len({ring.first[1] for ring in rings(first)}) == len(KEYRINGS)
    assert [path.name for path in (tmp_path / "deep" / "state").iterdir()] == ["secrets.env"]
    assert stat.S_IMODE((tmp_path / "deep" / "state" / "secrets.env").stat().st_mode) == 0o600


def test_a_secret_from_the_environment_overrides_a_stored_one(tmp_path: Path) -> None:
    environ = {"BILLING_STATE_DIR": str(tmp_path)}
    kept = Settings.load(environ, dotenv=None)
    chosen = Settings.load({**environ, "JWT_KEYS": new_keyring("chosen")}, dotenv=None)
    assert chosen.jwt_keys.first[0] == "chosen"
    assert chosen.key_peppers == kept.key_peppers


def test_no_secrets_are_generated_when_all_are_given(tmp_path: Path) -> None:
    development(tmp_path)
    assert not list(tmp_path.iterdir())


LOAD = """
import sys
from billing.settings import Settings
sys.stdin.readline()
print([sorted(ring) for ring in vars(Settings.load(dotenv=None)).values() if hasattr(ring, "first")])
"""


def test_ten_processes_starting_at_once_agree_on_the_secrets(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD],
            env={"BILLING_STATE_DIR": str(tmp_path / "state"), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(10)
    ]
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=20)[0] for process in processes]
    assert len(set(said)) == 1
    assert len(ast.literal_eval(said[0])) == len(KEYRINGS)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["secrets.env"]


def test_the_loser_of_a_race_uses_the_winners_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"BILLING_STATE_DIR": str(tmp_path)}
    winner = Settings.load(environ, dotenv=None)
    # The loser looked before the winner wrote.
    monkeypatch.setattr(settings_module.Path, "exists", lambda _: False)
    assert rings(Settings.load(environ, dotenv=None)) == rings(winner)
    assert [path.name for path in tmp_path.iterdir()] == ["secrets.env"]


# The .env file -----------------------------------------------------------------------------------


def test_dotenv_is_read_and_the_environment_overrides_it(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text('# comment\nHOST=from-file\nexport PORT="1234"\nWORKER_THREADS=$PORT\nWORKER_THREADS=3\n')
    environ = {"BILLING_STATE_DIR": str(tmp_path), "HOST": "from-environment", **SECRETS}
    loaded = Settings.load(environ, dotenv=file)
    assert (loaded.host, loaded.port, loaded.worker_threads) == ("from-environment", 1234, 3)


def test_an_empty_variable_does_not_hide_dotenvs_value(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("ENVIRONMENT=production\n")
    with pytest.raises(SettingsError, match="^JWT_KEYS, .* missing"):
        Settings.load({"ENVIRONMENT": "", "BILLING_STATE_DIR": str(tmp_path)}, dotenv=file)


def test_dotenv_values_are_not_interpolated(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("DATABASE_URL=postgresql://app:pa${HOST}$$@db.example/billing\nPORT\n")
    loaded = Settings.load({"BILLING_STATE_DIR": str(tmp_path), **SECRETS}, dotenv=file)
    assert loaded.database_url == "postgresql://app:pa${HOST}$$@db.example/billing"
    assert loaded.port == 8000


def test_dotenv_is_looked_for_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"BILLING_STATE_DIR": str(tmp_path), **SECRETS}
    monkeypatch.chdir(tmp_path)
    assert Settings.load(environ).port == 8000
    (tmp_path / ".env").write_text("PORT=4321")
    assert Settings.load(environ).port == 4321
    assert Settings.load(environ, dotenv=None).port == 8000


def test_the_process_environment_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILLING_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("PORT", "4444")
    assert Settings.load(dotenv=None).port == 4444


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_state_directory_writable_by_others_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(SettingsError, match="nobody else may write"):
        Settings.load({"BILLING_STATE_DIR": str(tmp_path)}, dotenv=None)


def test_an_unusable_state_directory_is_reported_as_a_settings_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(SettingsError, match=f"^{place} cannot be used: "):
            Settings.load({"BILLING_STATE_DIR": str(place)}, dotenv=None)


def test_a_dotenv_that_is_not_utf_8_is_reported_as_a_settings_error(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes("HOST=münchen".encode("latin-1"))
    with pytest.raises(SettingsError, match="is not text in UTF-8"):
        Settings.load({}, dotenv=tmp_path / ".env")


def test_secrets_that_are_not_utf_8_are_reported_as_a_settings_error(tmp_path: Path) -> None:
    (tmp_path / "secrets.env").write_bytes(b"\xff")
    (tmp_path / "secrets.env").chmod(0o600)
    with pytest.raises(SettingsError, match=r"secrets\.env is not text in UTF-8"):
        Settings.load({"BILLING_STATE_DIR": str(tmp_path)}, dotenv=None)


def test_secrets_behind_a_symbolic_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch(mode=0o600)
    (tmp_path / "secrets.env").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SettingsError, match=r"secrets\.env is a symbolic link"):
        Settings.load({"BILLING_STATE_DIR": str(tmp_path)}, dotenv=None)


def test_a_new_state_directory_is_accessible_to_its_owner_only(tmp_path: Path) -> None:
    Settings.load({"BILLING_STATE_DIR": str(tmp_path / "state")}, dotenv=None)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
