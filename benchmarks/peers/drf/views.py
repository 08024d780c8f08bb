"""The four operations."""

from __future__ import annotations

from rest_framework.permissions import IsAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from benchmarks.peers.drf import serializers
from benchmarks.peers.drf.authentication import HasKey, IsAdmin, KeyAuthentication, TokenAuthentication


class Verify(APIView):
    authentication_classes = (KeyAuthentication,)
    permission_classes = (HasKey,)

    def get(self, request: Request) -> Response:
        key = request.auth
        shown = {
            "tenant": serializers.TenantSerializer(key.tenant).data,
            "key": serializers.KeySerializer(key).data,
        }
        return Response({"valid": True, "mode": key.mode, **shown})


class Me(APIView):
    authentication_classes = (TokenAuthentication,)

    def get(self, request: Request) -> Response:
        user = serializers.UserSerializer(request.user).data
        return Response({"user": user, "tenant": serializers.TenantSerializer(request.user.tenant).data})


class Register(APIView):
    authentication_classes = ()
    permission_classes = ()

    def post(self, request: Request) -> Response:
        serializers.RegistrationSerializer(data=request.data).is_valid(raise_exception=True)
        return Response({"detail": "Not measured"}, 501)


class ConfigureWebhook(APIView):
    authentication_classes = (TokenAuthentication,)
    permission_classes = (IsAuthenticated, IsAdmin)

    def post(self, request: Request) -> Response:
        wanted = serializers.WebhookSerializer(data=request.data)
        wanted.is_valid(raise_exception=True)
        webhook = request.user.tenant.webhook
        webhook.url = wanted.validated_data["webhook_url"]
        webhook.event_types = wanted.validated_data["event_types"]
        webhook.save()
        return Response({"webhook_url": webhook.url, "event_types": webhook.event_types})
