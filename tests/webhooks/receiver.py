"""A tenant's receiver, built with `standardwebhooks` and none of our code; js/receiver.mjs does the same.

It prints its port. Each line of its input replaces the secrets it holds, separated by spaces, which it confirms;
until the first it answers no request. For each request it prints the event, as each secret verified it or null,
the headers, and the status of its answer: 204 or 400, and at /gone always 410.
"""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

from standardwebhooks import Webhook, WebhookVerificationError

secrets = []
has_secrets = Event()


def report(**members):
    # In one write: with print another thread could write before the end of the line.
    sys.stdout.write(json.dumps(members) + "\n")
    sys.stdout.flush()


def listen():
    for line in sys.stdin:
        secrets[:] = line.split()
        has_secrets.set()
        report(holds=len(secrets))
    os._exit(0)


def event_of(secret, body, headers):
    try:
        return Webhook(secret).verify(body, headers)
    except WebhookVerificationError:
        return None


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        body, headers = self.rfile.read(int(self.headers["Content-Length"])), dict(self.headers)
        has_secrets.wait()
        events = [event_of(secret, body, headers) for secret in secrets]
        status = 410 if self.path == "/gone" else 204 if any(events) else 400
        self.send_response(status)
        self.end_headers()
        report(events=events, headers=headers, status=status)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
Thread(target=listen, daemon=True).start()
report(port=server.server_port)
server.serve_forever()
