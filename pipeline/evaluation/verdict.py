"""Two questions of every result: did the edit happen, and did the rest stay?

Both are asked of the same unit, levels of 0..255 between the result and the input's round trip through the
autoencoder (`edit_change` and `rest_change` of metrics.py). So the autoencoder's own error counts as neither, and a
background at the autoencoder's limit is perfect. A result's score multiplies the two answers: where nothing happened
it is 0, however well the rest was kept.

The thresholds come from drawn faces and the bundled model. 27 reconstructions by three inversions, which should change
nothing, reach an `edit_change` of 33; of 54 edits by six pairs of methods, those that were read off the picture as done
begin at 66. Between these lie tries that left the face as it was, up to 59 by SDEdit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

HAPPENED = 40.0  # levels; below, nothing happened that could be told from an inversion's own error
CLEAR = 66.0  # levels; below, the edit is faint; from here on more change is no better edit
KEPT = 3.0  # levels; a JPEG of quality 75 loses 2.8 of eleven photographs
DRIFTED = 8.0  # levels; beyond, the rest is another picture
LOST = 25.0  # levels; nothing of the rest is left to score
OFF_TARGET = 0.5  # factor of an edit that an image-text model finds no nearer to what was asked for

EditVerdict = Literal["done", "faint", "off target", "nothing changed"]
RestVerdict = Literal["kept", "drifted", "changed"]
Grade = Literal["good", "fair", "poor"]
EDIT_GRADES: dict[EditVerdict, Grade] = {
    "done": "good",
    "faint": "fair",
    "off target": "fair",
    "nothing changed": "poor",
}
REST_GRADES: dict[RestVerdict, Grade] = {"kept": "good", "drifted": "fair", "changed": "poor"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Both answers, and the score in which they meet. None: the run holds no figure to tell by."""

    edit: EditVerdict | None
    rest: RestVerdict | None
    score: float | None  # 0..100

    @property
    def edit_grade(self) -> Grade | Literal[""]:
        """The first answer as a colour."""
        return EDIT_GRADES[self.edit] if self.edit else ""

    @property
    def rest_grade(self) -> Grade | Literal[""]:
        """The second answer as a colour."""
        return REST_GRADES[self.rest] if self.rest else ""


def judge(figures: Mapping[str, float | None], text_gain: float | None = None) -> Verdict:
    """Answer both questions.

    Args:
        figures: of a result, by name; see metrics.py.
        text_gain: how much nearer the edit is to what was asked for than the input was, in points of an image-text
            model (100 times the cosine); None where none looked at it.
    """
    change, drift = figures.get("edit_change"), figures.get("rest_change")
    edit = edit_verdict(change, text_gain)
    rest: RestVerdict | None = None
    if drift is not None:
        rest = "kept" if drift <= KEPT else "drifted" if drift <= DRIFTED else "changed"
    if edit is None or change is None:
        return Verdict(edit=edit, rest=rest, score=None)
    happened = min(max((change - HAPPENED) / (CLEAR - HAPPENED), 0.0), 1.0)
    happened *= OFF_TARGET if edit == "off target" else 1.0
    # A mask that holds the whole image leaves no rest: then the edit alone decides.
    stayed = 1.0 if drift is None else min(max((LOST - drift) / (LOST - KEPT), 0.0), 1.0)
    return Verdict(edit=edit, rest=rest, score=100 * happened * stayed)


def edit_verdict(change: float | None, text_gain: float | None) -> EditVerdict | None:
    """Whether the edit happened; off target where it moved away from the text that was asked for."""
    if change is None:
        return None
    if change < HAPPENED:
        return "nothing changed"
    if text_gain is not None and text_gain <= 0:
        return "off target"
    return "done" if change >= CLEAR else "faint"
