"""The URLs of the operations."""

from __future__ import annotations

from django.urls import path

from benchmarks.peers.drf import views

BASE = "api/v1/auth/tenants"

urlpatterns = [
    path(f"{BASE}/verify/", views.Verify.as_view()),
    path(f"{BASE}/me/", views.Me.as_view()),
    path(f"{BASE}/register/", views.Register.as_view()),
    path(f"{BASE}/webhooks/config/", views.ConfigureWebhook.as_view()),
]
