"""Header fields as ASGI has them: pairs of bytes, the names in lower case, in the order in which they came."""

from __future__ import annotations

from collections.abc import Iterable

Header = tuple[bytes, bytes]
Headers = Iterable[Header]


def values(headers: Headers, name: bytes) -> list[bytes]:
    """All values of a header."""
    return [value for key, value in headers if key == name]


def texts(headers: Headers, name: bytes) -> list[str]:
    """All values of a header as text, each byte a character (RFC 9110, section 5.5)."""
    return [value.decode("latin-1") for key, value in headers if key == name]


def first(headers: Headers, name: bytes) -> bytes | None:
    """The first value of a header, or None."""
    return next((value for key, value in headers if key == name), None)
