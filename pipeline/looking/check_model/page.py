"""The page of a model's check: one file that opens from disk, with its pictures inside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

import pipeline
from pipeline.inversion import INVERSIONS
from pipeline.looking.check_model.model import READING
from pipeline.looking.check_model.records import Check, ModelCheck, Pair, Picture, Status, Verdict
from pipeline.looking.report.templates import page_template
from pipeline.looking.report.thumbnails import data_uri, thumbnail

SIDE = 512  # pixels, at most, of a picture on the page
MOST_NAMED = 8  # pairs of one reason that are named
TITLES = {
    "loads": "Does it load?",
    "offers": "What does it offer?",
    "methods": "Which methods can use it?",
    "autoencoder": "Does the autoencoder keep a picture?",
    "inversions": "Does an inverted picture come back?",
    "agreement": "Does it sample as diffusers does?",
    "edit": "Does an edit work?",
    "speed": "How fast is it?",
}
GRADES: dict[Status, str] = {"ok": "good", "warning": "fair", "failed": "poor", "not applicable": "none"}
VERDICTS: dict[Verdict, tuple[str, str]] = {
    "ok": ("Usable", "good"),
    "usable with warnings": ("Usable with warnings", "fair"),
    "not usable": ("Not usable", "poor"),
}


def render(found: ModelCheck) -> str:
    """The page as HTML."""
    title, grade = VERDICTS[found.verdict]
    return page_template("check_model/page.html.j2").render(
        model=found.model,
        title=title,
        grade=grade,
        lead=lead(found),
        image=found.image,
        seconds=found.seconds,
        version=pipeline.__version__,
        checks=[_section(check) for check in found.checks],
    )


def lead(found: ModelCheck) -> str:
    """The verdict's reason: what failed, else what is warned of, else that nothing is."""
    for status in ("failed", "warning"):
        if worst := [check for check in found.checks if check.status == status]:
            return " ".join(f"{check.name.capitalize()}: {check.text}" for check in worst)
    return "Every question that applies was answered well."


def _section(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "title": TITLES[check.name],
        "status": check.status,
        "grade": GRADES[check.status],
        "text": check.text,
        "facts": check.facts,
        "shots": [_shot(picture) for picture in check.pictures],
        "pairs": _table(check.pairs) if check.pairs else None,
        "reasons": _reasons(check.pairs),
    }


def _shot(picture: Picture) -> dict[str, Any]:
    small = thumbnail(picture.image.convert("RGB"), SIDE)
    ratio = min(max(small.width / small.height, 0.7), 1.8)
    return {"label": picture.label, "uri": Markup(data_uri(small)), "ratio": f"{ratio:.3g}"}


def _table(pairs: Iterable[Pair]) -> dict[str, Any]:
    """Editors down, inversions across."""
    states = {(pair.editor, pair.inversion): pair.state for pair in pairs}
    return {
        "inversions": list(INVERSIONS),
        "rows": [(editor, [states[editor, inversion] for inversion in INVERSIONS]) for editor in READING],
    }


def _reasons(pairs: Iterable[Pair]) -> dict[str, str]:
    """Why pairs cannot work, each reason once, with the pairs that it keeps back: the table has them all."""
    reasons: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.state == "cannot":
            reasons.setdefault(pair.reason, []).append(f"{pair.inversion} + {pair.editor}")
    return {
        reason: ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} pairs"
        for reason, names in reasons.items()
    }
