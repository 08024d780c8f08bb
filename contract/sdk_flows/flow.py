"""From registration to revocation with the client that openapi-python-client makes.

`python flow.py BASE_URL WEBHOOK_URL`
"""

import sys

from billing_client import AuthenticatedClient, Client
from billing_client.api.api_keys import list_api_keys, regenerate_api_keys, revoke_api_keys
from billing_client.api.authentication import get_current_user, log_in, register_tenant, verify_api_key
from billing_client.api.webhooks import configure_webhook, send_test_webhook
from billing_client.models import (
    ConfigureWebhookRequest,
    CurrentUser,
    KeyList,
    KeyMode,
    KeySelection,
    KeysRegenerated,
    KeysRevoked,
    KeyVerification,
    Login,
    LogInRequest,
    NewKey,
    Problem,
    RegenerateKeysRequest,
    RegisterRequest,
    Registration,
    RevokeKeysRequest,
    Role,
    WebhookConfigured,
    WebhookTestReport,
    WebhookTestRequest,
)

base_url, webhook_url = sys.argv[1:]

# Register and log in.
anyone = Client(base_url)
registration = register_tenant.sync(
    client=anyone,
    body=RegisterRequest(company_name="Acme Inc.", email="ada@python-sdk.example", password="SecurePass123!"),
)
assert isinstance(registration, Registration), registration
login = log_in.sync(
    client=anyone, body=LogInRequest(email="ada@python-sdk.example", password="SecurePass123!")
)
assert isinstance(login, Login), login

# A user's access token is a bearer token.
user = AuthenticatedClient(base_url, token=login.tokens.access)
current = get_current_user.sync(client=user)
assert isinstance(current, CurrentUser) and current.user.role is Role.OWNER, current

# List the keys and replace those for tests.
listed = list_api_keys.sync(client=user)
assert isinstance(listed, KeyList) and len(listed.keys) == 4, listed
regenerated = regenerate_api_keys.sync(
    client=user, body=RegenerateKeysRequest(key_type=KeySelection.TEST, confirm=True)
)
assert isinstance(regenerated, KeysRegenerated), regenerated
secret = regenerated.keys.test_secret
assert isinstance(secret, NewKey), secret

# A key has a header of its own.
machine = AuthenticatedClient(base_url, token=secret.key, prefix="", auth_header_name="X-API-Key")
verification = verify_api_key.sync(client=machine)
assert isinstance(verification, KeyVerification) and verification.mode is KeyMode.TEST, verification

# Say where events go, and try it.
configured = configure_webhook.sync(client=user, body=ConfigureWebhookRequest(webhook_url=webhook_url))
assert isinstance(configured, WebhookConfigured), configured
report = send_test_webhook.sync(client=user, body=WebhookTestRequest())
assert isinstance(report, WebhookTestReport) and report.success, report

# Revoke: the next request with the key is refused, and the problem says why.
revoked = revoke_api_keys.sync(client=user, body=RevokeKeysRequest(key_type=KeySelection.TEST, confirm=True))
assert isinstance(revoked, KeysRevoked), revoked
refused = verify_api_key.sync(client=machine)
assert isinstance(refused, Problem) and refused.code == "key-revoked", refused
print(refused.status, refused.code)
