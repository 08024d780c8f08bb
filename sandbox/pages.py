"""The pages shown in place of Stripe's, each saying that it is not Stripe's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse, Response

from sandbox.accounts import Status

_TEMPLATES = Path(__file__).parent / "templates"
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.globals.update(statuses=list(Status))

# No `form-action`: Chromium applies it to every redirect after a form is submitted, and the platform may redirect
# the browser to any URL of its client's choice.
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def page(template: str, *, status: int = 200, **values: Any) -> Response:
    return HTMLResponse(_ENVIRONMENT.get_template(template).render(values), status, headers=HEADERS)


def style() -> Response:
    return Response((_TEMPLATES / "sandbox.css").read_bytes(), media_type="text/css", headers=HEADERS)
