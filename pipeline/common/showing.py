"""What may be shown: addresses and errors without credentials, and strangers' text without control characters."""

from __future__ import annotations

import errno
import re
import shlex
import unicodedata
from collections.abc import Sequence

# User and password before a host. With a colon (and no port behind it) the secret may hold slashes: up to the last "@";
# where there is none, all of it is taken for a secret.
_USER = r"//[^/\s:@'\"\[]*:(?!\d+(?:[/\s?]|$))"
_USERINFO = re.compile(rf"{_USER}[^\s'\"?]*@|//[^/\s@?]*@|{_USER}[^\s'\"]*")
_WEB_QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\")]*")
# In paths of other storage a lone question mark is a wildcard.
_QUERY = re.compile(r"(\w[\w+.-]*://[^\s?'\"]*(?:\?(?![\w.%-]+=)[^\s?'\"]*)*)\?[\w.%-]+=[^\s'\")]*")


def public_url(url: str) -> str:
    """The URL without user, password and query, which may hold credentials or a signature."""
    url = _USERINFO.sub("//", url)
    if url.startswith(("http://", "https://")):
        return url.partition("?")[0]
    return _QUERY.sub(r"\1", url)


def without_credentials(text: str) -> str:
    """The text, its addresses without user, password and query."""
    return _QUERY.sub(r"\1", _WEB_QUERY.sub(r"\1", _USERINFO.sub("//", text)))


def has_password(url: str) -> bool:
    """Whether an address has a user and a password before its host."""
    found = _USERINFO.search(url)
    return found is not None and ":" in found.group()


def describe(error: BaseException) -> str:
    """An error in one line, without credentials, queries or memory addresses."""
    text = without_credentials(" ".join(str(error).split()))
    text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>|0x[0-9a-fA-F]{6,}", "(object)", text)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def typed(config: str, overrides: Sequence[str]) -> str:
    """A recipe and its overrides as they are typed, quoted for a shell; what may be a secret is left to fill in."""
    shown = [
        f"{override.partition('=')[0]}=..." if "storage_options" in override else without_credentials(override)
        for override in overrides
    ]
    return shlex.join([public_url(config), *shown])


# What a system says of a path, in words that tell what to do about it.
_PATHS = {
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EEXIST: "a file of that name stands there",
    errno.EISDIR: "a folder stands where a file is needed",
    errno.EACCES: "access is refused",
    errno.EPERM: "access is refused",
    errno.EROFS: "the disk is read-only",
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota of space is used up",
    errno.ENAMETOOLONG: "a name in it is too long",
}


def about_path(error: OSError) -> str | None:
    """What is wrong with the path that the system was given, in words; None where the error is no such thing."""
    return _PATHS.get(error.errno or 0)


def printable(text: str) -> str:
    """The text with escapes instead of what would move the cursor, ring the bell or turn a line round. Newlines and
    tabs stay. Keys, captions and names of files come from strangers, and a terminal obeys what it is sent.
    """
    return "".join(char if char in "\n\t" or not _commands(char) else _escape(char) for char in text)


def _commands(char: str) -> bool:
    """Whether it is a control or format character, half of a surrogate pair, or a line or paragraph separator.

    The joiners are no commands: words of several scripts, and emoji, are written with them.
    """
    return unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and char not in "\u200c\u200d\u00ad"


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
