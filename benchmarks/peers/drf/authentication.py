"""Authentication by API key and by token, in Django REST Framework's classes."""

from __future__ import annotations

from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.permissions import BasePermission
from rest_framework.request import Request
from rest_framework.views import APIView
from rest_framework_simplejwt.authentication import JWTAuthentication

from benchmarks.peers import common
from benchmarks.peers.drf.models import ApiKey, User


class KeyAuthentication(BaseAuthentication):
    def authenticate(self, request: Request) -> tuple[None, ApiKey] | None:
        text = request.headers.get("X-API-Key")
        if text is None:
            return None
        key = ApiKey.objects.select_related("tenant__webhook").filter(digest=common.digest(text)).first()
        if key is None or not key.works:
            raise AuthenticationFailed
        return None, key

    def authenticate_header(self, request: Request) -> str:
        return "ApiKey"


class TokenAuthentication(JWTAuthentication):
    """simplejwt's authentication, with the tenant in the same query."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.user_model = _WithTenant


class _WithTenant:
    DoesNotExist = User.DoesNotExist
    objects = User.objects.select_related("tenant__webhook")


class HasKey(BasePermission):
    def has_permission(self, request: Request, view: APIView) -> bool:
        return isinstance(request.auth, ApiKey)


class IsAdmin(BasePermission):
    def has_permission(self, request: Request, view: APIView) -> bool:
        return request.user.role in ("owner", "admin")
