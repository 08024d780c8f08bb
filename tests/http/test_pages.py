"""The pages beside the API: their content, what they refuse, and how they may be cached."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from app import readiness
from billing import errors
from billing.http import document, pages, problems, templates
from billing.storage.schema import SchemaError

DOCUMENT: dict[str, Any] = {
    "openapi": "3.0.3",
    "info": {"title": "Billing", "version": "1"},
    "paths": {"/things/": {"get": {"operationId": "list_things", "responses": {}}}},
}
SERVED = document.served(DOCUMENT, "https://billing.example")
CODES = sorted(error.code() for error in errors.catalogue())


async def ready() -> None:
    """Nothing is missing."""


async def not_ready() -> None:
    raise errors.DatabaseUnavailable


async def refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, errors.BillingError)
    return PlainTextResponse(error.code(), status_code=problems.status_of(type(error)))


def client_of(readiness: Any = ready) -> TestClient:
    app = Starlette(
        routes=pages.pages(served=SERVED, ready=readiness), exception_handlers={errors.BillingError: refuse}
    )
    app.router.redirect_slashes = False
    return TestClient(app, follow_redirects=False)


@pytest.fixture(scope="module")
def client() -> TestClient:
    return client_of()


# HTML

HTML_PATHS = ["/", "/docs/", "/ui/", "/problems/", *(f"/problems/{code}" for code in CODES)]


@pytest.mark.parametrize("path", HTML_PATHS)
def test_pages_send_a_strict_content_security_policy_and_obey_it(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "script-src 'self';" in answer.headers["Content-Security-Policy"]
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert "base-uri 'none'" in answer.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"<style|style=|<script>|\son\w+=", answer.text)


@pytest.mark.parametrize("path", HTML_PATHS)
def test_every_internal_link_resolves(client: TestClient, path: str) -> None:
    links = set(re.findall(r'(?:href|src)="(/[^"]*)"', client.get(path).text))
    assert links
    assert {link: client.get(link).status_code for link in links} == dict.fromkeys(links, 200)


@pytest.mark.parametrize("path", HTML_PATHS)
def test_pages_load_nothing_from_other_hosts(client: TestClient, path: str) -> None:
    assert not re.search(r'(?:src|<link[^>]*href)="(?:https?:)?//', client.get(path).text)


def test_the_landing_page_links_to_the_main_pages(client: TestClient) -> None:
    text = client.get("/").text
    for path in ["/docs/", "/openapi.json", "/openapi.yaml", "/problems/", "/healthz"]:
        assert f'href="{path}"' in text
    assert "API=https://billing.example/api/v1/auth/tenants" in text


@pytest.mark.parametrize("path", ["/docs", "/ui", "/problems"])
def test_a_missing_slash_is_added_without_trusting_the_host_header(client: TestClient, path: str) -> None:
    answer = client.get(path, headers={"Host": "evil.example"})
    assert answer.status_code == 307
    assert answer.headers["Location"] == f"{path[1:]}/"


# Problems


@pytest.mark.parametrize("error", list(errors.catalogue()), ids=lambda error: error.code())
def test_a_problems_page_shows_its_status_type_and_title(
    client: TestClient, error: type[errors.BillingError]
) -> None:
    text = client.get(f"/problems/{error.code()}").text
    assert f">{problems.status_of(error)}<" in text
    assert f"https://billing.example/problems/{error.code()}" in text
    assert error.title().rstrip(".").replace("'", "&#39;") in text


def test_the_list_of_problems_is_complete(client: TestClient) -> None:
    assert sorted(re.findall(r'href="/problems/([a-z-]+)"', client.get("/problems/").text)) == CODES


def test_backticks_become_code_and_markup_is_escaped() -> None:
    assert templates.ticked("Send `<b>`, & <i>") == "Send <code>&lt;b&gt;</code>, &amp; &lt;i&gt;"


def test_two_workers_make_the_same_pages(client: TestClient) -> None:
    other = client_of()
    for path in HTML_PATHS:
        assert other.get(path).headers["ETag"] == client.get(path).headers["ETag"]


@pytest.mark.parametrize(
    "path",
    ["/problems/no-such-code", "/problems/not-found/", "/problems/%3Cscript%3E", "/static/no-such-file"],
)
def test_404_for_an_unknown_page_or_file(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


# Files


@pytest.mark.parametrize(
    "path", ["/static/..%2Fpages.py", "/static/../pages.py", "/static//etc/passwd", "/static/"]
)
def test_static_paths_cannot_escape_the_list_of_files(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_a_file_requested_with_its_fingerprint_is_immutable(client: TestClient) -> None:
    (link,) = set(re.findall(r'"(/static/site\.css\?v=\w+)"', client.get("/").text))
    assert "immutable" in client.get(link).headers["Cache-Control"]
    assert client.get("/static/site.css?v=old").headers["Cache-Control"] == "no-cache"
    assert client.get("/static/site.css").headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/static/site.css", "text/css; charset=utf-8"),
        ("/static/swagger.css", "text/css; charset=utf-8"),
        ("/static/swagger.js", "text/javascript; charset=utf-8"),
        ("/static/swagger-ui.css", "text/css; charset=utf-8"),
        ("/static/swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
        ("/static/favicon.svg", "image/svg+xml"),
        ("/favicon.ico", "image/svg+xml"),
        ("/openapi.json", "application/json"),
        ("/openapi.yaml", "application/yaml"),
    ],
)
def test_media_types_are_exact(client: TestClient, path: str, media_type: str) -> None:
    answer = client.get(path)
    assert answer.headers["Content-Type"] == media_type
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


# The document


def test_the_document_is_served_as_it_was_made(client: TestClient) -> None:
    assert client.get("/openapi.json").content == SERVED.json.body
    assert client.get("/openapi.yaml").content == SERVED.yaml.body


@pytest.mark.parametrize("path", ["/openapi.json", "/openapi.yaml"])
def test_the_document_is_readable_from_any_origin(client: TestClient, path: str) -> None:
    answer = client.get(path, headers={"Origin": "https://tool.example"})
    assert answer.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize("sent", ["{}", "W/{}", '"other", {}', '"other",W/{}', "*"])
def test_304_for_a_matching_entity_tag(client: TestClient, sent: str) -> None:
    etag = client.get("/openapi.json").headers["ETag"]
    answer = client.get("/openapi.json", headers={"If-None-Match": sent.format(etag)})
    assert answer.status_code == 304
    assert answer.content == b""
    assert answer.headers["ETag"] == etag


@pytest.mark.parametrize("sent", ['"other"', "", "nonsense"])
def test_200_for_another_entity_tag(client: TestClient, sent: str) -> None:
    assert client.get("/openapi.json", headers={"If-None-Match": sent}).status_code == 200


# Methods


@pytest.mark.parametrize(
    "path", ["/", "/docs/", "/openapi.json", "/problems/", "/healthz", "/static/site.css"]
)
def test_head_is_get_without_the_body(client: TestClient, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers == get.headers


@pytest.mark.parametrize("path", ["/", "/docs/", "/docs", "/openapi.json", "/problems/not-found", "/healthz"])
def test_405_lists_the_allowed_methods(client: TestClient, path: str) -> None:
    answer = client.post(path)
    assert answer.status_code == 405
    assert {method.strip() for method in answer.headers["Allow"].split(",")} == {"GET", "HEAD"}


# Health


def test_simultaneous_readiness_probes_share_one_database_check() -> None:
    class Slow:
        checks = 0

        def require_ready(self) -> None:
            self.checks += 1
            time.sleep(0.2)

    async def flood() -> None:
        ready = readiness(slow)  # type: ignore[arg-type]
        await asyncio.gather(*(ready() for _ in range(200)))

    slow = Slow()
    asyncio.run(flood())
    assert slow.checks == 1


def test_a_cancelled_probe_does_not_cancel_the_shared_check() -> None:
    class Slow:
        def require_ready(self) -> None:
            time.sleep(0.2)

    async def two() -> None:
        ready = readiness(Slow())  # type: ignore[arg-type]
        leaving, staying = asyncio.create_task(ready()), asyncio.create_task(ready())
        await asyncio.sleep(0.05)
        leaving.cancel()
        await staying

    asyncio.run(two())


def test_a_schema_of_another_version_is_not_ready() -> None:
    class OtherVersion:
        def require_ready(self) -> None:
            raise SchemaError("of another version")

    with pytest.raises(errors.DatabaseUnavailable):
        asyncio.run(readiness(OtherVersion())())  # type: ignore[arg-type]


def test_health_and_readiness_are_reported_and_not_cached(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/healthz").headers["cache-control"] == "no-store"
    assert client.get("/readyz").json() == {"status": "ready"}
    assert client.get("/readyz").headers["Cache-Control"] == "no-store"


def test_a_server_that_is_not_ready_is_still_healthy() -> None:
    client = client_of(not_ready)
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 503
    assert client.get("/readyz").text == "database-unavailable"


# Beside the API


async def api(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await receive()
        scope["state"]["started"] = True
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await PlainTextResponse(f"the API, at {scope['path']}")(scope, receive, send)


@pytest.fixture
def whole() -> Iterator[TestClient]:
    with TestClient(pages.beside(api, routes=pages.pages(served=SERVED, ready=ready))) as client:
        yield client


@pytest.mark.parametrize(
    "path", ["/api/v1/auth/tenants/me/", "/nowhere", "/healthz/", "/openapi.json/", "//"]
)
def test_every_other_path_goes_to_the_api(whole: TestClient, path: str) -> None:
    assert whole.get(f"http://testserver{path}").text == f"the API, at {path}"


def test_pages_take_precedence_over_the_api(whole: TestClient) -> None:
    assert whole.get("/healthz").json() == {"status": "ok"}


def test_the_apis_lifespan_still_runs(whole: TestClient) -> None:
    assert whole.app_state["started"]
