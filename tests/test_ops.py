"""The files of `ops/`: they agree with the server, and the wheel that the image installs is complete."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import fields
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from billing.cli import main
from billing.cli.serve import DRAIN_SECONDS
from billing.http.edge import STRICT_TRANSPORT
from billing.http.guard import BODY_TIMEOUT_SECONDS, MAX_BODY_BYTES
from billing.settings import Settings

ROOT = Path(__file__).parents[1]
OPS = ROOT / "ops"
COMPOSE: dict[str, Any] = yaml.safe_load((OPS / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
UNITS = sorted((OPS / "systemd").glob("*.service"))
SETTINGS = {field.name.upper() for field in fields(Settings)} | {"BILLING_STATE_DIR", "BILLING_PG_BIN"}


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


def commands() -> list[list[str]]:
    """The command by which each file starts us."""
    dockerfile = (OPS / "Dockerfile").read_text()
    started = [
        re.findall(r'"([^"]+)"', line) for line in re.findall(r"^CMD \[(.*)\]$", dockerfile, re.MULTILINE)
    ]
    started += [
        service["command"]
        for service in SERVICES.values()
        if service.get("image") == "billing" and "command" in service
    ]
    for unit in UNITS:
        [line] = re.findall(r"^ExecStart=/opt/billing/bin/(.*)$", unit.read_text(), re.MULTILINE)
        started.append(line.split())
    return started


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_start_command_exists_with_its_options(command: list[str]) -> None:
    assert command[0] == "billing"
    subcommand = main.commands[command[1]]
    options = {
        name for parameter in subcommand.params for name in (*parameter.opts, *parameter.secondary_opts)
    }
    assert {word for word in command[2:] if word.startswith("--")} <= options


def test_every_environment_variable_is_a_setting() -> None:
    named = set(re.findall(r"\b([A-Z][A-Z_]+)=", (OPS / "Dockerfile").read_text()))
    for service in SERVICES.values():
        if service.get("image") == "billing":
            named |= service.get("environment", {}).keys()
    for unit in UNITS:
        named |= set(re.findall(r"^Environment=([A-Z_]+)=", unit.read_text(), re.MULTILINE))
    pythons = {name for name in named if name.startswith(("PYTHON", "PIP_"))}
    assert named - pythons - {"PATH", "CMD"} <= SETTINGS


def test_stop_timeouts_exceed_the_drain_time() -> None:
    assert all(seconds(SERVICES[name]["stop_grace_period"]) > DRAIN_SECONDS for name in ("api", "worker"))
    for unit in UNITS:
        [wait] = re.findall(r"^TimeoutStopSec=(\d+)$", unit.read_text(), re.MULTILINE)
        assert int(wait) > DRAIN_SECONDS


def test_the_image_runs_unprivileged_and_copies_only_allowed_files() -> None:
    dockerfile = (OPS / "Dockerfile").read_text()
    # By number: Kubernetes checks `runAsNonRoot` by it.
    assert re.search(r"^USER [1-9]\d*$", dockerfile, re.MULTILINE)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE)
        for word in line.split()
    }
    assert copied == {line[1:] for line in ignored if line.startswith("!")}


def test_only_the_proxys_reserved_address_is_trusted() -> None:
    given = SERVICES["proxy"]["networks"]["default"]["ipv4_address"]
    [network] = COMPOSE["networks"]["default"]["ipam"]["config"]
    [trusted] = ip_network(SERVICES["api"]["environment"]["TRUSTED_PROXIES"])
    assert trusted == ip_address(given)
    assert trusted in ip_network(network["subnet"])
    assert trusted not in ip_network(network["ip_range"])
    assert trusted != ip_address(network["gateway"])


@pytest.mark.parametrize("name", ["api", "worker", "migrate"])
def test_our_containers_can_write_only_to_tmp(name: str) -> None:
    assert (SERVICES[name]["read_only"], SERVICES[name]["tmpfs"]) == (True, ["/tmp"])


def test_the_proxys_limits_are_no_stricter_than_the_servers(settings: Settings) -> None:
    text = (OPS / "nginx/billing.conf").read_text()
    said = dict(
        re.findall(
            r"^\s*(client_max_body_size|proxy_read_timeout|client_body_timeout) (\S+);", text, re.MULTILINE
        )
    )
    assert int(said["client_max_body_size"].removesuffix("k")) * 1024 > MAX_BODY_BYTES
    assert seconds(said["client_body_timeout"]) >= BODY_TIMEOUT_SECONDS
    assert seconds(said["proxy_read_timeout"]) > settings.request_timeout_seconds


def test_the_proxy_requires_https_and_sends_the_servers_hsts_header() -> None:
    over_http, _, over_https = (OPS / "nginx/billing.conf").read_text().partition("listen 443")
    assert re.search(r"location /api/ \{\s+return 403;", over_http)
    assert f'add_header Strict-Transport-Security "{STRICT_TRANSPORT[1].decode()}" always;' in over_https
    assert "proxy_hide_header Strict-Transport-Security;" in over_https


@pytest.mark.parametrize("location", ["/metrics", "= /readyz"])
def test_the_proxy_hides_internal_endpoints_from_the_internet(location: str) -> None:
    _, _, over_https = (OPS / "nginx/billing.conf").read_text().partition("listen 443")
    assert re.search(rf"location {location} \{{\s+return 404;", over_https)


def test_nginx_accepts_the_proxys_configuration(tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    subprocess.run(
        [*make, "-keyout", str(tmp_path / "privkey.pem"), "-out", str(tmp_path / "fullchain.pem")],
        check=True,
        capture_output=True,
    )
    text = (OPS / "nginx/billing.conf").read_text().replace("/etc/nginx/tls", str(tmp_path))
    (tmp_path / "billing.conf").write_text(text.replace("server api:8000", "server 127.0.0.1:8000"))
    whole = tmp_path / "nginx.conf"
    whole.write_text(
        f"pid {tmp_path}/pid; events {{}}\nhttp {{ access_log off; include {tmp_path}/billing.conf; }}\n"
    )
    answer = subprocess.run(
        [nginx, "-t", "-e", str(tmp_path / "errors"), "-c", str(whole)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr


def test_the_wheel_contains_every_file_the_server_reads(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    copy = copied(tmp_path)
    subprocess.run([*build, str(copy)], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(path.relative_to(copy)) for path in (copy / "billing").rglob("*") if path.is_file()}
    assert ours | {"app.py", "billing/openapi/billing.yaml"} <= held


def test_an_editable_install_contains_no_copied_files(tmp_path: Path) -> None:
    build = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copied(tmp_path), check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    held = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert [Path(name).suffix for name in held] == [".pth"]


def copied(directory: Path) -> Path:
    """The project without its history, as in the image: what a build leaves out there it must leave out here."""
    copy = directory / "copy"
    copy.mkdir()
    for name in ("app.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("billing", "openapi"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy
