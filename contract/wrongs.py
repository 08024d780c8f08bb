"""The mutations: small wrongs in the document or in the server, one at a time, and the tests that should notice."""

from __future__ import annotations

from dataclasses import dataclass

DOCUMENT = "openapi/billing.yaml"
AUTHENTICATION = "tests/handlers/test_authentication.py"
API_KEYS = "tests/handlers/test_api_keys.py"
STRIPE = "tests/handlers/test_stripe_connect.py"
IDEMPOTENCY = "tests/handlers/test_idempotency.py"
RULES = "tests/contract/test_document.py"
EXAMPLES = "tests/contract/test_examples.py"
BOUNDS = "tests/contract/test_bounds.py"
MEMBERS = "tests/contract/test_members.py"


@dataclass(frozen=True)
class Wrong:
    """One change: the first `old` in the file after the text `after` becomes `new`.

    `tests` are those that should notice: files, or the names of tests in them.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    after: str = ""

    def applied(self, text: str) -> str:
        """The text with the wrong in it; raises `Stale`."""
        before, anchor, rest = text.partition(self.after) if self.after else ("", "", text)
        if self.old not in rest or (self.after and not anchor):
            raise Stale(f"{self.name}: {self.file} no longer has {self.old.strip().splitlines()[0]!r}")
        return before + anchor + rest.replace(self.old, self.new, 1)


class Stale(Exception):
    """The text that a wrong changes is no longer there: write the wrong anew."""


IN_THE_DOCUMENT = (
    Wrong(
        "a member of an answer is renamed",
        DOCUMENT,
        "mode: {$ref: '#/components/schemas/KeyMode'}",
        "key_mode: {$ref: '#/components/schemas/KeyMode'}",
        (AUTHENTICATION,),
        after="    KeyVerification:",
    ),
    Wrong(
        "a member of a request is renamed",
        DOCUMENT,
        "        grace_period_seconds:",
        "        grace_seconds:",
        (API_KEYS, EXAMPLES),
    ),
    Wrong(
        "a status is undocumented",
        DOCUMENT,
        "        '409': {$ref: '#/components/responses/EmailTaken'}\n",
        "",
        (AUTHENTICATION,),
    ),
    Wrong(
        "the upper bound of a text is loosened",
        DOCUMENT,
        "maxLength: 255",
        "maxLength: 256",
        (BOUNDS,),
        after="    CompanyName:",
    ),
    Wrong(
        "the upper bound of a number is loosened",
        DOCUMENT,
        "maximum: 604800",
        "maximum: 6048000",
        (BOUNDS,),
        after="    RegenerateKeysRequest:",
    ),
    Wrong(
        "the lower bound of a password is loosened",
        DOCUMENT,
        "minLength: 12",
        "minLength: 8",
        (BOUNDS,),
        after="    RegisterRequest:",
    ),
    Wrong(
        "a header is dropped from a problem",
        DOCUMENT,
        "        WWW-Authenticate: {$ref: '#/components/headers/Challenge'}\n",
        "",
        (RULES,),
        after="    Unauthorized:",
    ),
    Wrong(
        "a header is dropped from an answer",
        DOCUMENT,
        "            X-Request-Id: {$ref: '#/components/headers/X-Request-Id'}\n",
        "",
        (RULES,),
        after="operationId: get_current_user\n      tags",
    ),
    Wrong(
        "an operation is open to everybody",
        DOCUMENT,
        "      security:\n        - bearerAuth: []\n      x-roles: [admin, owner]\n",
        "      security: []\n",
        (RULES, "tests/http/test_access.py"),
        after="operationId: list_api_keys\n      tags",
    ),
    Wrong(
        "an operation no longer takes keys",
        DOCUMENT,
        "        - apiKeyAuth: []\n",
        "",
        (AUTHENTICATION,),
        after="operationId: verify_api_key\n      tags",
    ),
    Wrong(
        "a role may do more",
        DOCUMENT,
        "x-roles: [owner]",
        "x-roles: [admin, owner]",
        ("tests/http/test_access.py",),
        after="operationId: revoke_api_keys\n      tags",
    ),
    Wrong(
        "an example says something else",
        DOCUMENT,
        "                message: Logged in.\n",
        "                message: You are logged in.\n",
        (EXAMPLES,),
    ),
    Wrong(
        "an example does not match its schema",
        DOCUMENT,
        "                      expires_at: null\n",
        "                      expires_at: never\n",
        (RULES,),
    ),
    Wrong(
        "a value of an enum of requests is gone",
        DOCUMENT,
        "enum: [live, test, all]",
        "enum: [live, test]",
        (API_KEYS,),
    ),
    Wrong(
        "a value of an enum of answers is gone",
        DOCUMENT,
        "enum: [active, expiring, revoked, expired]",
        "enum: [active, revoked, expired]",
        (API_KEYS,),
    ),
    Wrong(
        "a required member of a request is optional",
        DOCUMENT,
        "required: [company_name, email, password]",
        "required: [company_name, email]",
        (MEMBERS,),
        after="    RegisterRequest:",
    ),
    Wrong(
        "a required member of an answer is optional",
        DOCUMENT,
        "required: [message, tenant, user, tokens]",
        "required: [message, tenant, user]",
        (MEMBERS,),
        after="    Registration:",
    ),
    Wrong(
        "a request may hold anything",
        DOCUMENT,
        "      additionalProperties: false\n",
        "",
        (RULES,),
        after="    RevokeKeysRequest:",
    ),
    Wrong(
        "a member that may be null may not",
        DOCUMENT,
        "          nullable: true\n",
        "",
        (API_KEYS,),
        after="    VerifiedKey:",
    ),
    Wrong(
        "a text may have NUL",
        DOCUMENT,
        r"pattern: '^[^\x00]*$'",
        r"pattern: '^(.|\s)*$'",
        (RULES,),
        after="    RevokeKeysRequest:",
    ),
    Wrong(
        "a code is not listed",
        DOCUMENT,
        "            - key-expired\n",
        "",
        (RULES,),
        after="x-extensible-enum:\n            - malformed-body",
    ),
    Wrong(
        "a problem is plain JSON",
        DOCUMENT,
        "application/problem+json",
        "application/json",
        (RULES,),
        after="    EmailTaken:",
    ),
    Wrong(
        "an operation has another id",
        DOCUMENT,
        "operationId: log_in\n",
        "operationId: login\n",
        (RULES,),
    ),
    Wrong(
        "a path has no slash",
        DOCUMENT,
        "/api/v1/auth/tenants/me/:",
        "/api/v1/auth/tenants/me:",
        (RULES,),
    ),
    Wrong(
        "a secret is not marked as one",
        DOCUMENT,
        "          x-secret: true\n",
        "",
        (RULES,),
        after="    NewKey:",
    ),
)

IN_THE_ANSWERS = (
    Wrong(
        "a publishable key sees private members",
        "billing/handlers/shapes.py",
        "return tenant(caller.tenant) if caller.sees_private_members else public_members(caller.tenant)",
        "return tenant(caller.tenant)",
        (EXAMPLES,),
    ),
    Wrong(
        "an answer has a member too many",
        "billing/handlers/shapes.py",
        '"masked": key.text is None,',
        '"masked": key.text is None, "tenant_id": key.tenant_id,',
        (API_KEYS,),
    ),
    Wrong(
        "the masked webhook secret is not masked",
        "billing/handlers/shapes.py",
        'f"whsec_****...{secrets[0].last4}"',
        'f"whsec_{secrets[0].sealed}"',
        ("tests/handlers/test_webhooks.py",),
    ),
    Wrong(
        "registering answers 200",
        "billing/http/replies.py",
        "return Reply(201, body)",
        "return Reply(200, body)",
        (EXAMPLES,),
    ),
    Wrong(
        "answers may be kept by a cache",
        "billing/http/replies.py",
        "headers = [NO_STORE, ",
        "headers = [",
        (EXAMPLES,),
    ),
    Wrong(
        "Allow names one method",
        "billing/http/application.py",
        '", ".join(sorted(methods))',
        "sorted(methods)[0]",
        ("tests/contract/test_probes.py::test_405_lists_the_allowed_methods",),
    ),
    Wrong(
        "401 has no WWW-Authenticate",
        "billing/http/problems.py",
        '            return b\'Bearer realm="billing", error="invalid_token"\'',
        "            return None",
        (AUTHENTICATION,),
    ),
    Wrong(
        "a problem has another media type",
        "billing/http/problems.py",
        '"application/problem+json"',
        '"application/json"',
        (EXAMPLES,),
    ),
    Wrong(
        "a problem repeats what was sent",
        "billing/http/validation.py",
        "validate_formats=True, mask=MASK",
        "validate_formats=True",
        (AUTHENTICATION, "tests/http/test_validation.py"),
    ),
    Wrong(
        "the end of a key is not told",
        "billing/http/wiring.py",
        'return reply.with_header("x-key-expires-at",',
        'return reply.with_header("x-key-ends-at",',
        (API_KEYS,),
    ),
    Wrong(
        "any origin may call with credentials",
        "billing/http/cors.py",
        "if origin is None or origin not in self.allowed_origins:",
        "if origin is None:",
        ("tests/http/test_cors.py",),
    ),
    Wrong(
        "a body may have any length",
        "billing/http/guard.py",
        "if len(body) > self.max_body_bytes:",
        "if len(body) < 0:",
        ("tests/http/test_guard.py",),
    ),
)

IN_WHO_MAY = (
    Wrong(
        "roles count for nothing",
        "billing/security.py",
        "caller.user.role in roles",
        "bool(roles)",
        ("tests/http/test_access.py",),
    ),
    Wrong(
        "a disabled tenant may call",
        "billing/security.py",
        "if not caller.tenant.is_active:",
        "if caller.tenant is None:",
        ("tests/http/test_access.py",),
    ),
    Wrong(
        "a good key makes up for a bad token",
        "billing/http/access.py",
        'if not given or texts(scope["headers"], b"authorization"):',
        "if not given:",
        ("tests/http/test_access.py",),
    ),
    Wrong(
        "the checksum of a key is not looked at",
        "billing/keys.py",
        " or _checksum(text[:-CHECKSUM_CHARACTERS]) != text[-CHECKSUM_CHARACTERS:]",
        "",
        ("tests/test_keys.py",),
    ),
    Wrong(
        "revoked keys work",
        "billing/keys.py",
        "                raise KeyRevoked\n",
        "                pass\n",
        (API_KEYS,),
    ),
    Wrong(
        "replaced keys work for ever",
        "billing/keys.py",
        "                raise KeyExpired\n",
        "                pass\n",
        (API_KEYS,),
    ),
    Wrong(
        "revoking spares keys in their grace period",
        "billing/storage/api_keys.py",
        "OF_TYPES, IS_LIVING)\n    .values(revoked_at=",
        "OF_TYPES, api_keys.c.expires_at.is_(None), IS_LIVING)\n    .values(revoked_at=",
        (API_KEYS,),
    ),
    Wrong(
        "a grace period is put off by the next",
        "billing/keys.py",
        "min(at, self.expires_at or at)",
        "at",
        ("tests/test_keys.py",),
    ),
    Wrong(
        "reuse of a refresh token is forgiven",
        "billing/sessions.py",
        "if rotated is None and not session.forgives(claims.jti, now):",
        "if session is None:",
        (AUTHENTICATION,),
    ),
    Wrong(
        "reuse of a refresh token leaves the session",
        "billing/sessions.py",
        "    tx.sessions.end(session.id, now)\n",
        "",
        (AUTHENTICATION,),
    ),
    Wrong(
        "a new password leaves old sessions",
        "billing/sessions.py",
        "    tx.sessions.end_all(user.id, now)\n",
        "",
        (AUTHENTICATION,),
    ),
    Wrong(
        "an unknown email is answered sooner",
        "billing/sessions.py",
        "matches = passwords.check(password, account.password_hash if account else None)",
        "matches = account is not None and passwords.check(password, account.password_hash)",
        ("tests/test_sessions.py",),
    ),
    Wrong(
        "disabled users log in",
        "billing/sessions.py",
        "    if not account.user.is_active:\n",
        "    if account.user.is_active is None:\n",
        ("tests/test_sessions.py",),
    ),
    Wrong(
        "tokens never expire",
        "billing/tokens.py",
        "if now >= ends_at:",
        "if now is ends_at:",
        ("tests/test_tokens.py",),
    ),
)

IN_STORAGE = (
    Wrong(
        "queries do not name their tenant",
        "billing/storage/shelf.py",
        "return _owner(table) == bindparam(OF_TENANT)\n",
        "return (_owner(table) == bindparam(OF_TENANT)) | _owner(table).is_not(None)\n",
        ("tests/storage/test_isolation.py",),
    ),
    Wrong(
        "row security is off",
        "billing/storage/migrations/versions/0001_foundation.py",
        "{table} ENABLE ROW LEVEL SECURITY",
        "{table} DISABLE ROW LEVEL SECURITY",
        ("tests/storage/test_isolation.py", "tests/storage/test_schema.py"),
    ),
    Wrong(
        "row security spares the owner",
        "billing/storage/migrations/versions/0001_foundation.py",
        '    op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")\n',
        "",
        ("tests/storage/test_isolation.py", "tests/storage/test_schema.py"),
    ),
    Wrong(
        "rows can be written for others",
        "billing/storage/migrations/versions/0001_foundation.py",
        '        f"WITH CHECK ({column} = (SELECT app.current_tenant()))"\n',
        '        f"WITH CHECK (true)"\n',
        ("tests/storage/test_isolation.py",),
    ),
    Wrong(
        "the audit log can be rewritten",
        "billing/storage/migrations/versions/0001_foundation.py",
        "GRANT SELECT, INSERT ON directory, audit_log",
        "GRANT SELECT, INSERT, UPDATE ON directory, audit_log",
        ("tests/storage/test_audit.py", "tests/storage/test_isolation.py"),
    ),
    Wrong(
        "the head of the audit log can be moved",
        "billing/storage/migrations/versions/0006_audit_heads.py",
        "REVOKE INSERT, UPDATE ON audit_heads FROM billing_app;",
        "",
        ("tests/storage/test_audit.py",),
    ),
    Wrong(
        "a transaction takes no lock",
        "billing/storage/store.py",
        "OPEN_LOCKED if exclusive else OPEN",
        "OPEN",
        (API_KEYS,),
    ),
    Wrong(
        "a change is not in the audit log",
        "billing/sessions.py",
        '    tx.audit.record("user.password_changed", subject=user.email, now=now)\n',
        "",
        (AUTHENTICATION, "tests/storage/test_audit.py", "tests/webhooks/test_outbox.py"),
    ),
    Wrong(
        "a change is not told",
        "billing/sessions.py",
        '    tx.events.record("user.password_changed", {"user_id": user.id, "email": user.email}, now=now)\n',
        "",
        ("tests/webhooks/test_outbox.py",),
    ),
    Wrong(
        "an event is kept though its transaction is not",
        "billing/storage/events.py",
        '        self.insert(events, {**values_of(kept, events), "request_id": self._actor.request_id})\n',
        '        self.insert(events, {**values_of(kept, events), "request_id": self._actor.request_id})\n'
        "        self._connection.connection.commit()\n"
        "        self._connection.exec_driver_sql(\n"
        "            \"BEGIN; SELECT set_config('app.tenant_id', %s, true)\", (str(self._tenant_id),)\n"
        "        )\n",
        ("tests/storage/test_events.py", "tests/webhooks/test_outbox.py"),
    ),
    Wrong(
        "who lost a task changes it",
        "billing/storage/tasks.py",
        'tasks.c.attempts == bindparam("taken")',
        'tasks.c.attempts >= bindparam("taken")',
        ("tests/storage/test_tasks.py::test_a_worker_that_lost_the_lease_changes_nothing",),
    ),
    Wrong(
        "a late attempt settles a delivery",
        "billing/storage/deliveries.py",
        "    AND deliveries.attempts = s.attempt AND deliveries.status = 'pending'",
        "    AND deliveries.status = 'pending'",
        ("tests/test_deliveries.py::test_only_the_latest_attempt_settles_a_delivery",),
    ),
    Wrong(
        "who is too late keeps an answer",
        "billing/storage/idempotency.py",
        '    idempotency_keys.c.claim == bindparam("held"),\n',
        '    bindparam("held", type_=idempotency_keys.c.claim.type).is_not(None),\n',
        ("tests/test_idempotency.py::test_a_claim_that_was_taken_over_changes_nothing",),
    ),
    Wrong(
        "a key may come with any request",
        "billing/idempotency.py",
        "    if found.fingerprint != request.fingerprint:\n        raise IdempotencyKeyReused\n",
        "",
        ("tests/test_idempotency.py", IDEMPOTENCY),
    ),
    Wrong(
        "an answer is kept though its transaction is not",
        "billing/storage/idempotency.py",
        "        return kept.rowcount == 1\n",
        "        rows = kept.rowcount\n"
        "        self._connection.connection.commit()\n"
        "        self._connection.exec_driver_sql(f'BEGIN; {SET_TENANT}', (str(self._tenant_id),))\n"
        "        return rows == 1\n",
        ("tests/test_idempotency.py::test_an_answer_is_rolled_back_with_its_change",),
    ),
    Wrong(
        "users share their keys",
        "billing/http/idempotency.py",
        "idempotency.name_of(key, caller.id)",
        "idempotency.name_of(key, None)",
        (f"{IDEMPOTENCY}::test_another_user_of_the_tenant_may_use_the_same_key",),
    ),
    Wrong(
        "a secret opens in another place",
        "billing/encryption.py",
        "encrypt(nonce, secret.encode(), place.encode())",
        "encrypt(nonce, secret.encode(), b'')",
        ("tests/test_encryption.py",),
    ),
)

IN_STRIPE_AND_WEBHOOKS = (
    Wrong(
        "a state can be used twice",
        "billing/stripe_connect.py",
        "        tx.stripe.consume_state(id, now)\n",
        "",
        (f"{STRIPE}::test_400_for_a_used_state",),
    ),
    Wrong(
        "a state lasts for ever",
        "billing/stripe_connect.py",
        "return StateExpired() if now >= state.expires_at else _lost_right(tx, state)",
        "return _lost_right(tx, state)",
        (f"{STRIPE}::test_400_state_expired_after_ten_minutes",),
    ),
    Wrong(
        "a state outlives the session that began it",
        "billing/sessions.py",
        "    tx.stripe.end_states_of(user.id)\n",
        "",
        (f"{STRIPE}::test_a_state_ends_with_the_session_that_started_it",),
    ),
    Wrong(
        "a change is made for a session that has ended while it waited",
        "billing/security.py",
        "            sessions.require_standing(tx, self.user, self.session_id)\n",
        "",
        ("tests/handlers/test_standing.py",),
    ),
    Wrong(
        "another browser may bring a state back",
        "billing/stripe_connect.py",
        "return browser is not None and hmac.compare_digest(self.browser_digest, hashed(browser))",
        "return True",
        ("tests/test_stripe_connect.py",),
    ),
    Wrong(
        "the return URL is not looked at",
        "billing/stripe_connections.py",
        "        stripe_connect.require_return_url(return_url, self._return_origins)\n",
        "",
        (f"{STRIPE}::test_connect_422_for_a_return_url_of_another_origin",),
    ),
    Wrong(
        "an account may belong to two tenants",
        "billing/stripe_connect.py",
        "return claimed or tx.directory.owns(ACCOUNT_NAME, account_id)",
        "return True",
        (f"{STRIPE}::test_409_for_an_account_of_another_tenant",),
    ),
    Wrong(
        "test mode is taken for live",
        "billing/stripe_connect.py",
        "if grant.livemode != livemode:",
        "if grant.livemode is None:",
        (f"{STRIPE}::test_an_unsuitable_grant_is_revoked_at_stripe",),
    ),
    Wrong(
        "Stripe being away is an error of status",
        "billing/stripe_connections.py",
        "        except (StripeUnavailable, StripeNotConfigured):\n"
        "            return StatusView(known, is_live=False)\n",
        "        except StripeNotConfigured:\n            return StatusView(known, is_live=False)\n",
        (f"{STRIPE}::test_status_comes_from_the_cache_if_stripe_fails",),
    ),
    Wrong(
        "other bytes are signed than are sent",
        "billing/webhooks/signing.py",
        "(id.encode(), timestamp, body)",
        "(id.encode(), timestamp, body.strip() + b' ')",
        ("tests/webhooks/test_signing.py",),
    ),
    Wrong(
        "any address may be called",
        "billing/webhooks/egress.py",
        "return is_public(address) or any(address in network for network in self._allow_networks)",
        "return True",
        ("tests/webhooks/test_egress.py::test_a_special_purpose_address_is_refused",),
    ),
    Wrong(
        "a redirect is success",
        "billing/webhooks/delivery.py",
        "200 <= self.http_status <= 299",
        "200 <= self.http_status <= 399",
        ("tests/test_deliveries.py::test_any_status_but_2xx_is_a_failure_and_redirects_are_not_followed",),
    ),
    Wrong(
        "a replaced secret signs no more",
        "billing/deliveries.py",
        "secrets = tx.webhooks.signing_secrets(now) if begun else ()",
        "secrets = tx.webhooks.signing_secrets(now)[:1] if begun else ()",
        ("tests/test_deliveries.py::test_both_secrets_sign_during_the_grace_period_the_new_one_first",),
    ),
    Wrong(
        "an endpoint that is gone goes on",
        "billing/deliveries.py",
        "any(verdict.gone for verdict in verdicts)",
        "False",
        ("tests/test_deliveries.py::test_410_disables_the_endpoint_and_webhook_disabled_is_sent_once",),
    ),
)

WRONGS = (*IN_THE_DOCUMENT, *IN_THE_ANSWERS, *IN_WHO_MAY, *IN_STORAGE, *IN_STRIPE_AND_WEBHOOKS)
