"""Where a server is and what opens it: its address, and its key, which comes from the environment alone."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import ServerError

KEY = re.compile(r"\bsk-[A-Za-z0-9_-]{8,}|\bBearer\s+\S+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """How one server is asked."""

    base_url: str  # without a slash at its end
    key: str = field(repr=False)  # "": none is sent
    key_env: str  # the environment variable that holds it
    section: str  # of the recipe, for errors: "judge"
    concurrency: int  # requests in flight
    timeout_s: float  # until an answer counts as lost
    error: Callable[[str], ServerError] = field(default=ServerError, repr=False)  # what ends the run

    @property
    def host(self) -> str:
        """Of its address."""
        return host_of(self.base_url)


def host_of(url: str) -> str:
    """The host of an address; "" where there is none."""
    return urlsplit(url).hostname or ""


def is_here(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_from(key_env: str, host: str) -> str:
    """A server's key, from the environment; may be empty for one on this machine.

    Raises:
        ValueError: it is missing.
    """
    found = os.environ.get(key_env, "")
    if not found and not is_here(host):
        raise ValueError(f"the environment variable {key_env} is empty, and {host} asks for a key")
    return found


def without_a_key(value: Any) -> Any:
    """A setting as given.

    Raises:
        ValueError: it holds what looks like a key.
    """
    if isinstance(value, str) and KEY.search(value):
        raise ValueError("holds what looks like a key. Put it into an environment variable, and name that: key_env")
    return value


def plain_address(value: str) -> str:
    """The address of a server, without a slash at its end.

    Raises:
        ValueError: it is none, or holds a secret.
    """
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("is no address of a web server, such as http://127.0.0.1:8000/v1")
    if "@" in parts.netloc or parts.query:
        raise ValueError("holds a user, a password or a query. The key comes from the environment: key_env")
    return value.rstrip("/")
