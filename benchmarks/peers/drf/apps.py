"""Django's configuration of the application."""

from __future__ import annotations

from django.apps import AppConfig


class Peer(AppConfig):
    name = "benchmarks.peers.drf"
    label = "peer"
    default_auto_field = "django.db.models.BigAutoField"
