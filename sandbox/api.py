"""The endpoints of connect.stripe.com and api.stripe.com that Connect needs, on one host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from sandbox import pages
from sandbox.connect import PageRefused, Platform, Refusal, api_error, oauth_error
from sandbox.faults import Faults, Operation

NO_KEY = (
    "You did not provide an API key. You need to provide your API key in the Authorization header, using Bearer "
    "auth (e.g. 'Authorization: Bearer YOUR_SECRET_KEY')."
)
OTHER_PARAMETERS = (
    "Keys for idempotent requests can only be used with the same parameters they were first used with."
)
UNRECOGNIZED = "Unrecognized request URL ({method}: {path})."
PRIVATE_HEADERS = ("authorization", "cookie")


@dataclass(frozen=True)
class Call:
    """A request as it arrived, without its credentials."""

    operation: str
    method: str
    url: str
    query: dict[str, str]
    form: dict[str, str]
    headers: dict[str, str]
    path_params: dict[str, str]
    credential: str = field(repr=False, compare=False)


Page = Callable[[Call], Response]
Json = Callable[[Call], Mapping[str, Any]]


class Api:
    """The HTTP side: `app` serves the platform, `calls` has every request to a known path, in order."""

    def __init__(self, platform: Platform, faults: Faults) -> None:
        self.platform = platform
        self.faults = faults
        self.app = Starlette(routes=self._routes())
        self.forget()

    def forget(self) -> None:
        self.calls: list[Call] = []
        self._answered: dict[str, tuple[Call, Mapping[str, Any]]] = {}

    def _routes(self) -> list[Route]:
        return [
            self._route("GET", "/oauth/authorize", Operation.AUTHORIZE, self._authorize),
            self._route("POST", "/oauth/authorize", Operation.DECIDE, self._decide),
            self._route("POST", "/oauth/token", Operation.TOKEN, self._oauth(self._token)),
            self._route("POST", "/oauth/deauthorize", Operation.DEAUTHORIZE, self._oauth(self._deauthorize)),
            self._route("GET", "/v1/accounts/{id}", Operation.RETRIEVE_ACCOUNT, self._v1(self._account)),
            self._route("POST", "/v1/accounts", Operation.CREATE_ACCOUNT, self._v1(self._create_account)),
            self._route(
                "POST", "/v1/account_links", Operation.CREATE_ACCOUNT_LINK, self._v1(self._create_link)
            ),
            self._route("GET", "/setup/{secret}", Operation.ONBOARD, self._onboard),
            self._route("POST", "/setup/{secret}", Operation.RETURN, self._return),
            Route("/sandbox.css", _style),
            Route("/{path:path}", _unrecognized, methods=["GET", "POST", "DELETE"]),
        ]

    def _route(self, method: str, path: str, operation: Operation, answer: Page) -> Route:
        async def endpoint(request: Request) -> Response:
            call = await _read(operation, request)
            self.calls.append(call)
            return await self.faults.play(
                self.faults.take(operation), request, lambda: _answered(answer, call)
            )

        return Route(path, endpoint, methods=[method])

    # Credentials ---------------------------------------------------------------------------------

    def _oauth(self, answer: Json) -> Page:
        def checked(call: Call) -> Response:
            if call.credential != self.platform.secret_key:
                raise oauth_error(401, "invalid_client", "No such API key")
            return _json(answer(call))

        return checked

    def _v1(self, answer: Json) -> Page:
        def checked(call: Call) -> Response:
            if not call.credential:
                raise api_error(401, NO_KEY)
            if call.credential != self.platform.secret_key:
                raise api_error(401, f"Invalid API Key provided: ****{call.credential[-4:]}")
            return _json(self._once(answer, call))

        return checked

    def _once(self, answer: Json, call: Call) -> Mapping[str, Any]:
        """The answer to the first call with this Idempotency-Key."""
        key = call.headers.get("idempotency-key")
        if key is None or call.method != "POST":
            return answer(call)
        if key not in self._answered:
            self._answered[key] = (call, dict(answer(call)))
        first, answered = self._answered[key]
        if (first.operation, first.form) != (call.operation, call.form):
            raise api_error(400, OTHER_PARAMETERS, type="idempotency_error")
        return answered

    # OAuth ---------------------------------------------------------------------------------------

    def _authorize(self, call: Call) -> Response:
        authorization = self.platform.authorization(call.query)
        accounts = list(self.platform.accounts.values())
        return pages.page(
            "authorize.html",
            authorization=authorization,
            client_id=self.platform.client_id,
            accounts=accounts,
        )

    def _decide(self, call: Call) -> Response:
        authorization = self.platform.authorization(call.query)
        state = {} if authorization.state is None else {"state": authorization.state}
        if call.form.get("decision") != "connect":
            denied = {"error": "access_denied", "error_description": "The user denied your request"}
            return _redirect(authorization.redirect_uri, **denied, **state)
        code = self.platform.connect(authorization, call.form.get("account", ""))
        return _redirect(authorization.redirect_uri, scope=authorization.scope, code=code, **state)

    def _token(self, call: Call) -> Mapping[str, Any]:
        return self.platform.token(call.form)

    def _deauthorize(self, call: Call) -> Mapping[str, Any]:
        return self.platform.deauthorize(call.form)

    # Accounts and links --------------------------------------------------------------------------

    def _account(self, call: Call) -> Mapping[str, Any]:
        return self.platform.account(call.path_params["id"]).body

    def _create_account(self, call: Call) -> Mapping[str, Any]:
        return self.platform.create_account(call.form)

    def _create_link(self, call: Call) -> Mapping[str, Any]:
        address = urlsplit(call.url)
        return self.platform.create_link(call.form, base=f"{address.scheme}://{address.netloc}")

    def _onboard(self, call: Call) -> Response:
        link = self.platform.link(call.path_params["secret"])
        if not link.works_at(self.platform.clock()):
            return _redirect(link.refresh_url)
        return pages.page("onboarding.html", account_id=link.account.id)

    def _return(self, call: Call) -> Response:
        link = self.platform.link(call.path_params["secret"])
        finished = call.form.get("account", "") if call.form.get("decision") == "finish" else None
        return _redirect(self.platform.visit(link, finished=finished))


async def _read(operation: Operation, request: Request) -> Call:
    form = dict(parse_qsl((await request.body()).decode(), keep_blank_values=True))
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    return Call(
        operation=operation.value,
        method=request.method,
        url=str(request.url),
        query=dict(request.query_params),
        # A token may also be asked for with the key in the form.
        credential=form.pop("client_secret", "") or (bearer if scheme.lower() == "bearer" else ""),
        form=form,
        headers={name: value for name, value in request.headers.items() if name not in PRIVATE_HEADERS},
        path_params=dict(request.path_params),
    )


def _answered(answer: Page, call: Call) -> Response:
    try:
        return answer(call)
    except Refusal as refusal:
        return _json(refusal.body, refusal.status)
    except PageRefused as reason:
        return pages.page("refused.html", status=400, reason=str(reason))


def _json(body: Mapping[str, Any], status: int = 200) -> Response:
    return JSONResponse(dict(body), status, headers={"Cache-Control": "no-store"})


def _redirect(url: str, **parameters: str) -> Response:
    joint = "&" if urlsplit(url).query else "?"
    target = f"{url}{joint}{urlencode(parameters)}" if parameters else url
    return RedirectResponse(target, 303, headers=pages.HEADERS)


async def _style(_: Request) -> Response:
    return pages.style()


async def _unrecognized(request: Request) -> Response:
    refusal = api_error(404, UNRECOGNIZED.format(method=request.method, path=request.url.path))
    return _json(refusal.body, refusal.status)
