"""The serializers of requests and answers, ModelSerializers where possible."""

from __future__ import annotations

from rest_framework import serializers

from benchmarks.peers.drf.models import ApiKey, Tenant, User


class TenantSerializer(serializers.ModelSerializer):
    webhook_url = serializers.CharField(source="webhook.url")
    stripe_connect_account_id = serializers.CharField(source="stripe_account_id")
    stripe_connect_status = serializers.CharField(source="stripe_status")
    subscription_tier = serializers.CharField(source="tier")

    class Meta:
        model = Tenant
        fields = (
            *("id", "company_name", "slug", "is_active", "created_at", "email", "domain", "webhook_url"),
            *("stripe_connect_account_id", "stripe_connect_status", "subscription_tier", "updated_at"),
        )


class UserSerializer(serializers.ModelSerializer):
    tenant_name = serializers.CharField(source="tenant.company_name")

    class Meta:
        model = User
        fields = (
            *("id", "tenant", "tenant_name", "email", "first_name", "last_name", "role", "is_active"),
            *("last_login", "created_at", "updated_at"),
        )


class KeySerializer(serializers.ModelSerializer):
    class Meta:
        model = ApiKey
        fields = ("type", "mode", "last4", "created_at", "expires_at", "last_used_at")


class RegistrationSerializer(serializers.Serializer):
    company_name = serializers.CharField(max_length=255)
    email = serializers.EmailField(max_length=254)
    password = serializers.CharField(min_length=12, max_length=128)
    first_name = serializers.CharField(max_length=150, allow_blank=True, default="")
    last_name = serializers.CharField(max_length=150, allow_blank=True, default="")
    domain = serializers.RegexField(r"^[A-Za-z0-9.-]+$", min_length=4, max_length=253, required=False)
    webhook_url = serializers.URLField(required=False)


class WebhookSerializer(serializers.Serializer):
    webhook_url = serializers.URLField()
    event_types = serializers.ListField(
        child=serializers.CharField(max_length=64), max_length=20, default=list
    )
