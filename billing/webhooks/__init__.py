"""Webhooks: endpoints, events, signing, sending, the results of attempts, and replay."""
