"""The pages beside the API: landing page, Swagger UI, the served document, explained problems, health."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from billing import errors
from billing.errors import BillingError
from billing.http import problems
from billing.http.document import Representation, Served
from billing.http.replies import Rendered
from billing.http.templates import HTML_HEADERS, new_environment

PRODUCT = "Billing control plane"

# The document is public, and tools that run in a browser fetch it from other origins.
DOCUMENT_HEADERS = {"Access-Control-Allow-Origin": "*"}

_HERE = Path(__file__).parent
_STATIC = {
    "site.css": "text/css",
    "swagger.css": "text/css",
    "swagger.js": "text/javascript",
    "favicon.svg": "image/svg+xml",
}
_SWAGGER_UI = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
_FOREVER = "public, max-age=31536000, immutable"


def pages(*, served: Served, ready: Callable[[], Awaitable[None]]) -> list[Route]:
    """Routes for everything outside the document.

    `ready` raises a `BillingError` while this process should get no traffic.
    """
    files = _files()
    render = _renderer(served, files)
    swagger_ui = render("swagger.html")
    return [
        _page("/", render("landing.html")),
        *_folder("/docs", swagger_ui),
        *_folder("/ui", swagger_ui),
        *_folder("/problems", render("problems.html")),
        _problems({error.code(): _problem(render, served, error) for error in errors.catalogue()}),
        _fixed("/openapi.json", served.json, DOCUMENT_HEADERS),
        _fixed("/openapi.yaml", served.yaml, DOCUMENT_HEADERS),
        _fixed("/favicon.ico", files["favicon.svg"]),
        _static(files),
        *_health(ready),
    ]


def beside(api: ASGIApp, *, routes: list[Route]) -> ASGIApp:
    """The pages in front of the API, which still gets every other path, and the lifespan."""
    router = Router(routes, redirect_slashes=False, default=api)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # A router would answer the lifespan itself, and the API's would never run.
        await (router if scope["type"] == "http" else api)(scope, receive, send)

    return app


# Routes ------------------------------------------------------------------------------------------


def _fixed(path: str, representation: Representation, headers: dict[str, str] | None = None) -> Route:
    async def endpoint(request: Request) -> Response:
        return _answer(request, representation, headers)

    return Route(path, endpoint)


def _page(path: str, page: Representation) -> Route:
    return _fixed(path, page, HTML_HEADERS)


def _folder(path: str, page: Representation) -> tuple[Route, Route]:
    """The page at `path/`, and `path` without the slash pointing to it."""
    last = path.rpartition("/")[2]

    async def redirect(_: Request) -> Response:
        # A forged Host header cannot divert a relative Location.
        return RedirectResponse(f"{last}/")

    return _page(f"{path}/", page), Route(path, redirect)


def _problems(by_code: dict[str, Representation]) -> Route:
    async def problem(request: Request) -> Response:
        return _answer(request, _known(by_code, request.path_params["code"]), HTML_HEADERS)

    return Route("/problems/{code}", problem)


def _static(files: dict[str, Representation]) -> Route:
    async def static(request: Request) -> Response:
        file = _known(files, request.path_params["name"])
        # Our pages link each file with its fingerprint, so that an upgrade is seen at once.
        current = request.query_params.get("v") == _fingerprint(file)
        return _answer(request, file, {"Cache-Control": _FOREVER} if current else None)

    return Route("/static/{name}", static)


def _health(ready: Callable[[], Awaitable[None]]) -> tuple[Route, Route]:
    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"}, headers={"Cache-Control": "no-store"})

    async def readyz(_: Request) -> Response:
        await ready()
        return JSONResponse({"status": "ready"}, headers={"Cache-Control": "no-store"})

    return Route("/healthz", healthz), Route("/readyz", readyz)


def _known(listed: dict[str, Representation], name: str) -> Representation:
    if name not in listed:
        raise errors.NotFound
    return listed[name]


def _answer(
    request: Request, representation: Representation, headers: dict[str, str] | None = None
) -> Response:
    headers = {
        "ETag": representation.etag,
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
        **(headers or {}),
    }
    if _has(request, representation.etag):
        return Response(status_code=304, headers=headers)
    return Response(representation.body, headers=headers, media_type=representation.media_type)


def _has(request: Request, etag: str) -> bool:
    # If-None-Match compares weakly (RFC 9110, section 13.1.2): a proxy that compresses marks our tag with W/.
    tags = ",".join(request.headers.getlist("if-none-match")).split(",")
    return any(tag.strip().removeprefix("W/") in (etag, "*") for tag in tags)


# Files and templates -----------------------------------------------------------------------------


def _files() -> dict[str, Representation]:
    """Everything under /static/, by name: a fixed list, so that no path can lead out of it."""
    return {
        **_read(_HERE / "static", _STATIC),
        **_read(_swagger_ui_folder(), _SWAGGER_UI),
    }


def _read(folder: Path, media_types: dict[str, str]) -> dict[str, Representation]:
    return {name: Representation.of((folder / name).read_bytes(), kind) for name, kind in media_types.items()}


def _swagger_ui_folder() -> Path:
    # Located, not imported: the package's own module is a Flask blueprint.
    package = find_spec("flask_swagger_ui")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("The package flask-swagger-ui, which bears Swagger UI, is not installed")
    return Path(package.origin).parent / "dist"


def _fingerprint(file: Representation) -> str:
    return file.etag.strip('"')[:12]


def _renderer(served: Served, files: dict[str, Representation]) -> Callable[..., Representation]:
    environment = new_environment()
    environment.globals.update(
        product=PRODUCT,
        served=served,
        errors=list(errors.catalogue()),
        status_of=problems.status_of,
        url=lambda name: f"/static/{name}?v={_fingerprint(files[name])}",
    )

    def render(template: str, **values: Any) -> Representation:
        return Representation.of(environment.get_template(template).render(values).encode(), "text/html")

    return render


# Problems ----------------------------------------------------------------------------------------


def _problem(
    render: Callable[..., Representation], served: Served, error: type[BillingError]
) -> Representation:
    return render("problem.html", error=error, example=_example(error, served.public_base_url))


def _example(error: type[BillingError], public_base_url: str) -> str:
    """The whole answer, head and body, as a client may see it."""
    faults = [errors.Fault("/email", "must be an email address")] if error is errors.InvalidRequest else []
    answer = problems.render(error(faults=faults), request_id="7d3f0c6a51b24e88")
    body = orjson.loads(answer.body)
    # Every worker makes the same page, and so the same entity tag.
    body["type"] = f"{public_base_url}/problems/{error.code()}"
    body["instance"] = "urn:uuid:0198a3c4-7b1e-7c52-9f0d-5e2b8a416d37"
    return f"{_head(answer)}\n\n{orjson.dumps(body, option=orjson.OPT_INDENT_2).decode()}"


def _head(answer: Rendered) -> str:
    shown = [
        f"{name.decode()}: {value.decode()}" for name, value in answer.headers if name != b"content-length"
    ]
    return "\n".join([f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}", *shown])
