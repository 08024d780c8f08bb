/** From registration to revocation with openapi-fetch: `node flow.mjs BASE_URL WEBHOOK_URL`. */

import assert from "node:assert/strict";
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

const [baseUrl = "", webhookUrl = ""] = process.argv.slice(2);

// Register and log in.
const anyone = createClient<paths>({ baseUrl });
const ada = { email: "ada@typescript-sdk.example", password: "SecurePass123!" };
const registration = await anyone.POST("/api/v1/auth/tenants/register/", {
  body: { company_name: "Acme Inc.", ...ada },
});
assert(registration.data, registration.error?.detail);
const login = await anyone.POST("/api/v1/auth/tenants/login/", { body: ada });
assert(login.data, login.error?.detail);

// A user's access token is a bearer token.
const headers = { Authorization: `Bearer ${login.data.tokens.access}` };
const user = createClient<paths>({ baseUrl, headers });
const current = await user.GET("/api/v1/auth/tenants/me/");
assert.equal(current.data?.user.role, "owner");

// List the keys and replace those for tests.
const listed = await user.GET("/api/v1/auth/tenants/api-keys/");
assert.equal(listed.data?.keys.length, 4);
const regenerated = await user.POST("/api/v1/auth/tenants/api-keys/regenerate/", {
  body: { key_type: "test", confirm: true },
});
const secret: components["schemas"]["NewKey"] | undefined = regenerated.data?.keys.test_secret;
assert(secret, regenerated.error?.detail);

// A key has a header of its own.
const machine = createClient<paths>({ baseUrl, headers: { "X-API-Key": secret.key } });
const verification = await machine.GET("/api/v1/auth/tenants/verify/");
assert.equal(verification.data?.mode, "test");

// Say where events go, and try it.
const configured = await user.POST("/api/v1/auth/tenants/webhooks/config/", {
  body: { webhook_url: webhookUrl },
});
assert(configured.data, configured.error?.detail);
const report = await user.POST("/api/v1/auth/tenants/webhooks/test/", { body: {} });
assert.equal(report.data?.success, true);

// Revoke: the next request with the key is refused, and the problem says why.
const revoked = await user.POST("/api/v1/auth/tenants/api-keys/revoke/", {
  body: { key_type: "test", confirm: true },
});
assert.deepEqual(revoked.data?.revoked_keys, ["test_public", "test_secret"]);
const refused = await machine.GET("/api/v1/auth/tenants/verify/");
assert.equal(refused.error?.code, "key-revoked");
console.log(refused.error.status, refused.error.code);
