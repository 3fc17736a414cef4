"""Addresses of databases and servers, whose passwords must never be shown or written; it opens none of them."""

import re
from urllib.parse import quote

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError


def shown(address: str) -> str:
    """The address with stars for its password, or for whatever stands where it would be."""
    found = _parsed(address)
    if found is None:
        return re.sub(r"//[^@/]*@", "//***@", address)
    return masked(found.render_as_string(hide_password=True), address)


def masked(text: str, address: str) -> str:
    """A message without the password of the address that it may quote."""
    secret = password(address)
    # Any of its characters may be written as in addresses.
    spelled = "".join(f"(?:{re.escape(c)}|{quote(c, safe='')})" for c in secret or "")
    return re.sub(spelled, "***", text, flags=re.IGNORECASE) if secret else text


def password(address: str) -> str | None:
    """The one in an address; None where there is none, or where this is no address."""
    found = _parsed(address)
    if found is None:
        return None
    query = found.query.get("password")
    return str(found.password or "") or (query if isinstance(query, str) else None)


def _parsed(address: str) -> URL | None:
    try:
        return make_url(address)
    except (ArgumentError, ValueError):
        return None
