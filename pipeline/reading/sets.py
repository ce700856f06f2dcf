"""Rows of a file of sets: JSON lines, one set of images of one subject each (docs/methods/consistory.md).

    {"set_id": "rex", "concept_tokens": ["dog"], "anchor_prompts": ["a photo of a dog"],
     "prompts": ["a dog on a beach", "a dog in the snow"]}

A row holds some scenes of a set, `source.scenes_per_row`; the first one also what anchors are generated. Every row says
all that its scenes need, so that a set may be cut anywhere: whoever makes a row makes the anchors anew, by the set's
own noise. Memory: one line.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from pipeline.reading.rows import Names, damaged_row, unreadable
from pipeline.reading.storage import open_fs, retrying
from pipeline.recipe import SourceConfig
from pipeline.samples import ReadRow, Sample
from pipeline.settings.explain import problems_in_words

MAX_LINE = 16 << 20  # bytes of a set's line
MOST_PROMPTS = 100_000  # of a set
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
Words = Annotated[tuple[Text, ...], Field(max_length=16)]


class SetLine(BaseModel):
    """What a line says of a set."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    set_id: Text
    subject: str = Field(default="", max_length=2000)  # for people
    concept_tokens: Words = Field(min_length=1)  # words that name the subject, as the prompts have them
    background_tokens: Words = ()  # words that name what is behind it
    anchor_prompts: Words = ()
    anchor_image: str = ""  # path of an image, from the file's own folder on
    anchor_image_prompt: str = Field(default="", max_length=2000)  # what it shows
    negative_prompt: str = Field(default="", max_length=2000)
    prompts: Annotated[tuple[Text, ...], Field(max_length=MOST_PROMPTS)]
    seed: int | None = None  # of its noise; none: from the run's seed and the set's name


class SetProblemError(Exception):
    """Why a line is no set, or its image cannot be read."""


def read_rows(
    file: BinaryIO,
    *,
    shard: str,
    url: str,
    source: SourceConfig,
    wants: Callable[[int], bool],
    sized: Callable[[int], None],
) -> Iterator[ReadRow | None]:
    """Rows in order; None for one that nobody wants.

    Args:
        file: opened, at its start.
        shard: its path relative to the source.
        url: its own.
        source: says how many scenes a row has, and how to open an image.
        wants: whether a row is, by its index.
        sized: told of each row's bytes before it is handed out.
    """
    names, index = Names(), 0
    for number, line in enumerate(_lines(file), 1):
        if line is not None and not line.strip():
            continue
        try:
            one = _parsed(line)
        except SetProblemError as error:
            sized(0)
            key = f"line {number}"
            row = damaged_row(shard, key, names.take(key, index)[0], index, f"line {number} {error}")
            yield row if wants(index) else None
            index += 1
            continue
        name, _ = names.take(one.set_id, index)
        image: partial[bytes] = partial(_image, one.anchor_image, url, source)
        for first in range(0, max(1, len(one.prompts)), source.scenes_per_row):
            sized(len(line or b""))
            last = min(first + source.scenes_per_row, len(one.prompts))
            yield _row(one, range(first, last), shard, name, index, image) if wants(index) else None
            index += 1


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Line by line; None in place of one that is too long."""
    while line := file.readline(MAX_LINE):
        if len(line) < MAX_LINE or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
            pass
        yield None


def _parsed(line: bytes | None) -> SetLine:
    if line is None:
        raise SetProblemError(f"is longer than {MAX_LINE} bytes. Cut the set into several of one set_id and seed")
    try:
        data = json.loads(line.decode("utf-8-sig"))
        json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise SetProblemError(f"is not JSON: {error}") from error
    try:
        found = SetLine.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(f"{path}: {text}" for path, text in problems_in_words(error, SetLine))
        raise SetProblemError(f"is no set: {problems}") from error
    if not found.anchor_prompts and not found.anchor_image:
        raise SetProblemError(
            f"is the set '{found.set_id}', which has no anchors. Give anchor_prompts, or an anchor_image"
        )
    return found


def _row(one: SetLine, scenes: range, shard: str, name: str, index: int, image: Callable[[], bytes]) -> ReadRow:
    """Some scenes of a set; where they are the first, also its generated anchors."""
    edits: dict[str, Any] = {}
    if not scenes or scenes.start == 0:
        offset = 1 if one.anchor_image else 0  # the image is the first anchor
        for number, prompt in enumerate(one.anchor_prompts):
            edits[f"anchor_{number}"] = _edit(one, prompt, anchor=number + offset)
    seen: Counter[str] = Counter()
    for number, prompt in enumerate(one.prompts[: scenes.stop]):
        if number in scenes:
            edits[f"scene_{number}"] = _edit(one, prompt, picture=seen[prompt])
        seen[prompt] += 1
    key = one.set_id if scenes.start == 0 else f"{one.set_id} {scenes.start}"
    row = Sample(
        id=f"{shard}/{name}" if scenes.start == 0 else f"{shard}/{name}/{scenes.start}",
        shard=shard,
        key=key,
        index=index,
        image=b"",
        image_path=one.anchor_image,
        edits=edits,
        columns={"set_id": one.set_id, "subject": one.subject, "first_scene": scenes.start},
        set_id=f"{shard}/{name}" if one.seed is None else f"seed {one.seed}",
        blank=not one.anchor_image,
    )
    if not edits:
        return unreadable(row, f"the set '{one.set_id}' asks for nothing: it has no prompts. Give prompts")
    if row.blank:
        return row
    try:
        return replace(row, image=image())
    except SetProblemError as error:
        return unreadable(row, str(error))


def _edit(one: SetLine, prompt: str, *, anchor: int | None = None, picture: int = 0) -> dict[str, Any]:
    """An edit request, as JSON has it."""
    subject: dict[str, Any] = {
        "words": one.concept_tokens,
        "background": one.background_tokens,
        "anchor_prompts": one.anchor_prompts,
        "picture": picture,
    }
    subject |= {} if anchor is None else {"anchor": anchor}
    return {
        "source_prompt": one.anchor_image_prompt,
        "target_prompt": prompt,
        "negative_prompt": one.negative_prompt,
        "subject": subject,
    }


def _image(path: str, url: str, source: SourceConfig) -> bytes:
    """The bytes of an anchor's image.

    Raises:
        SetProblemError: the path leads out of the file's folder, or to nothing that can be read.
        OSError: the store failed on every attempt.
    """
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or "://" in path or "::" in path:
        raise SetProblemError(f"anchor_image '{path}' is no path below the folder of the sets. Put the image there")
    fs, here = open_fs(f"{url.rpartition('/')[0]}/{path}", source.storage_options)
    limit = source.max_member_bytes
    try:
        for attempt in retrying():
            with attempt:
                if not fs.isfile(here):  # a pipe would be waited for
                    raise FileNotFoundError(path)
                with fs.open(here, "rb") as file:
                    data: bytes = file.read(limit + 1)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise SetProblemError(f"anchor_image '{path}' cannot be read ({type(error).__name__})") from error
    if len(data) > limit:
        raise SetProblemError(f"anchor_image '{path}' has more bytes than source.max_member_bytes ({limit})")
    return data
