"""A subject that several images share: what a request says of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]


class Subject(BaseModel):
    """What looks the same in all images of a set, and from which images it takes its looks: the anchors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    words: tuple[Text, ...] = Field(min_length=1, max_length=16)
    """Words that name the subject, as they stand in the prompts: it is where they are attended to. Every prompt has at
    least one of them."""
    background: tuple[Text, ...] = Field(default=(), max_length=16)
    """Words that name what is behind it, for editing.mask background: the subject is where they are not attended to."""
    anchor_prompts: tuple[Text, ...] = Field(default=(), max_length=16)
    """One prompt for each anchor that is to be generated. None: the row's own image is the only anchor."""
    anchor: int | None = Field(default=None, ge=0)
    """The result is this anchor itself, counted from 0; the row's image comes first. None: a scene."""
    picture: int = Field(default=0, ge=0)
    """Numbers pictures of one target_prompt apart: each has noise of its own."""
