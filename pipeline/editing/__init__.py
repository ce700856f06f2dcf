"""The editors by name. A new one is its file, its line here, its test and its page in docs/methods."""

from __future__ import annotations

from pipeline.editing.base import Editor
from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.ledits_pp import LEditsPP
from pipeline.editing.reconstruct import Reconstruct

EDITORS: dict[str, type[Editor]] = {
    "cfg": ClassifierFreeGuidance,
    "ledits_pp": LEditsPP,
    "reconstruct": Reconstruct,
}
