"""A tenant's receiver, made with `standardwebhooks` and nothing of ours; js/receiver.mjs is the same.

It says its port. Each line that it reads is the secrets that it holds from then on, with a space between, which it
confirms; until the first it answers nobody. Of each request it says the event, as each secret verified it or null,
the headers, and what it answered: 204 or 400, and at /gone always 410.
"""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

from standardwebhooks import Webhook, WebhookVerificationError

secrets = []
told = Event()


def say(**said):
    # In one piece: print would let another thread in before the end of the line.
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def listen():
    for line in sys.stdin:
        secrets[:] = line.split()
        told.set()
        say(holds=len(secrets))
    os._exit(0)


def event_of(secret, body, headers):
    try:
        return Webhook(secret).verify(body, headers)
    except WebhookVerificationError:
        return None


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        body, headers = self.rfile.read(int(self.headers["Content-Length"])), dict(self.headers)
        told.wait()
        events = [event_of(secret, body, headers) for secret in secrets]
        status = 410 if self.path == "/gone" else 204 if any(events) else 400
        self.send_response(status)
        self.end_headers()
        say(events=events, headers=headers, status=status)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
Thread(target=listen, daemon=True).start()
say(port=server.server_port)
server.serve_forever()
