// A tenant's receiver, made with `standardwebhooks` and nothing of ours; tests/webhooks/receiver.py is the same.
import { once } from "node:events";
import { createServer } from "node:http";
import { createInterface } from "node:readline";
import { Webhook, WebhookVerificationError } from "standardwebhooks";

let secrets = [];
const say = (said) => console.log(JSON.stringify(said));

const lines = createInterface({ input: process.stdin });
const told = once(lines, "line");
lines.on("line", (line) => {
  secrets = line.split(" ");
  say({ holds: secrets.length });
});
lines.on("close", () => process.exit());

function eventOf(secret, body, headers) {
  try {
    return new Webhook(secret).verify(body, headers);
  } catch (error) {
    if (error instanceof WebhookVerificationError) return null;
    throw error;
  }
}

const server = createServer(async (request, response) => {
  const pieces = [];
  for await (const piece of request) pieces.push(piece);
  await told;
  const events = secrets.map((secret) => eventOf(secret, Buffer.concat(pieces), request.headers));
  const status = request.url === "/gone" ? 410 : events.some(Boolean) ? 204 : 400;
  response.writeHead(status).end(() => say({ events, headers: request.headers, status }));
});
server.listen(0, "127.0.0.1", () => say({ port: server.address().port }));
