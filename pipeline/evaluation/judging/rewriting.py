"""An instruction in a judge's words: what would have been asked for, by what came.

Builders of data sets rewrite instructions from their results, since an edit rarely does what was asked and nothing
else (a green hat where a red one was meant). The text is ours, in prompts/rewrite.txt.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files

from pipeline.evaluation.judging.questions import Question

PART = "rewrite"
"""Of the questions to a judge."""
PLACE = "<instruction>"


@cache
def template() -> str:
    """What is asked; `PLACE` stands for the sentence that was given."""
    return (files("pipeline.evaluation.judging") / "prompts" / "rewrite.txt").read_text(encoding="utf-8")


def prompt_hash() -> str:
    """SHA-256 of the template."""
    return hashlib.sha256(template().encode()).hexdigest()


def question(row: str, instruction: str, pictures: tuple[bytes, bytes]) -> Question:
    """The question about a result.

    Args:
        row: names it.
        instruction: that was given.
        pictures: encoded, the input before the result.
    """
    before, _, after = template().partition(PLACE)
    text = f"{before}{instruction}{after}"
    return Question(row=row, part=PART, text=text, pictures=pictures, prompt_hash=prompt_hash())
