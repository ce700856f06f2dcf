"""Words and numbers as people read them; text from data as a page may hold it."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup, escape

from pipeline.common.showing import printable

SEPARATORS = re.compile(r"(?<=[/_.\-:,~#@])(?=[^/_.\-:,~#@\s])")


def shown(value: Any) -> Any:
    """A text without commands in it (see `printable`); anything else, and text that is markup already, as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def breakable(text: str) -> Markup:
    """A name that may be broken behind its separators, and there only."""
    return Markup("<wbr>").join(escape(printable(part)) for part in SEPARATORS.split(text))


def count(number: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_text(size: float) -> str:
    """Bytes in the largest unit that leaves at least one."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
