"""The existing tables, as models that Django does not manage."""

from __future__ import annotations

from datetime import UTC, datetime

from django.contrib.auth.models import AbstractBaseUser
from django.contrib.postgres.fields import ArrayField
from django.db import models


class Tenant(models.Model):
    id = models.UUIDField(primary_key=True)
    company_name = models.TextField()
    slug = models.TextField()
    email = models.TextField()
    domain = models.TextField(null=True)
    stripe_account_id = models.TextField(null=True)
    stripe_status = models.TextField()
    tier = models.TextField()
    is_active = models.BooleanField()
    created_at = models.DateTimeField()
    updated_at = models.DateTimeField()

    class Meta:
        managed = False
        db_table = "tenants"


class Webhook(models.Model):
    tenant = models.OneToOneField(Tenant, models.CASCADE, primary_key=True, related_name="webhook")
    url = models.TextField(null=True)
    event_types = ArrayField(models.TextField())
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        managed = False
        db_table = "webhook_endpoints"


class ApiKey(models.Model):
    id = models.UUIDField(primary_key=True)
    tenant = models.ForeignKey(Tenant, models.CASCADE)
    type = models.TextField()
    digest = models.TextField(unique=True)
    last4 = models.TextField()
    created_at = models.DateTimeField()
    expires_at = models.DateTimeField(null=True)
    revoked_at = models.DateTimeField(null=True)
    last_used_at = models.DateTimeField(null=True)

    class Meta:
        managed = False
        db_table = "api_keys"

    @property
    def mode(self) -> str:
        return self.type.partition("_")[0]

    @property
    def works(self) -> bool:
        lives = self.revoked_at is None and (self.expires_at is None or datetime.now(UTC) < self.expires_at)
        return lives and self.tenant.is_active


class User(AbstractBaseUser):
    id = models.UUIDField(primary_key=True)
    tenant = models.ForeignKey(Tenant, models.CASCADE)
    email = models.TextField(unique=True)
    password = models.TextField(db_column="password_hash")
    first_name = models.TextField()
    last_name = models.TextField()
    role = models.TextField()
    is_active = models.BooleanField()
    created_at = models.DateTimeField()
    updated_at = models.DateTimeField()

    USERNAME_FIELD = "email"

    class Meta:
        managed = False
        db_table = "users"
