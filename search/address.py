"""Addresses of databases and servers, whose passwords must never be shown or written; it opens none of them."""

from typing import Any

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError


def shown(address: str) -> str:
    """The address with stars for its password."""
    try:
        return make_url(address).render_as_string(hide_password=True)
    except ArgumentError:
        return address


def masked(text: str, address: str) -> str:
    """A message without the password of the address that it may quote."""
    secret = password(address)
    return text.replace(secret, "***") if secret else text


def password(address: str) -> str | None:
    """The one in an address; None where there is none, or where this is no address."""
    try:
        url: Any = make_url(address)
    except ArgumentError:
        return None
    return str(url.password) if url.password else None
