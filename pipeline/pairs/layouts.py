"""What the columns of sets of edit pairs are called: who publishes them, who reads them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace

from pipeline.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLayout:
    """Which column, member or key of a row holds what; "" where there is none."""

    name: str
    source: str
    edited: str
    rejected: str = ""  # a second result of the same source and prompt, which is worse
    mask: str = ""
    prompt: str = ""  # the instruction
    source_prompt: str = ""
    target_prompt: str = ""
    id: str = ""
    turn: str = ""  # of an edit that goes on from the result of the one before

    @property
    def roles(self) -> dict[str, str]:
        """The columns, by what they are."""
        return {
            one.name: getattr(self, one.name) for one in fields(self) if one.name != "name" and getattr(self, one.name)
        }


# A set with columns of several layouts is of the first that names all of its own.
COLUMNS: tuple[PairLayout, ...] = (
    PairLayout(
        name="preference",
        source="source_image",
        edited="chosen_image",
        rejected="rejected_image",
        prompt="prompt",
    ),
    PairLayout(
        name="ip2p_original",
        source="original_image",
        edited="edited_image",
        prompt="edit_prompt",
        source_prompt="original_prompt",
        target_prompt="edited_prompt",
    ),
    PairLayout(name="instructpix2pix", source="input_image", edited="edited_image", prompt="edit_prompt"),
    PairLayout(
        name="ultraedit",
        source="source_image",
        edited="edited_image",
        mask="mask_image",
        prompt="edit_prompt",
        source_prompt="source_caption",
        target_prompt="target_caption",
        id="idx",
    ),
    PairLayout(
        name="magicbrush",
        source="source_img",
        edited="target_img",
        mask="mask_img",
        prompt="instruction",
        id="img_id",
        turn="turn_index",
    ),
    PairLayout(
        name="hq_edit",
        source="input_image",
        edited="output_image",
        prompt="edit",
        source_prompt="input",
        target_prompt="output",
    ),
    PairLayout(
        name="shardedit",
        source="input",
        edited="image",
        mask="mask",
        prompt="instruction",
        source_prompt="source_prompt",
        target_prompt="target_prompt",
        id="id",
    ),
)
PATHS: tuple[PairLayout, ...] = (
    PairLayout(name="imgedit", source="input_images", edited="output_images", prompt="prompt"),
    PairLayout(name="pico_banana", source="open_image_input_url", edited="output_image", prompt="text"),
    PairLayout(name="pico_banana", source="local_input_image", edited="output_image", prompt="text"),
)
"""Tables whose rows name files."""
MEMBERS: tuple[PairLayout, ...] = (
    PairLayout(name="shardedit", source="input", edited="edited", mask="mask", prompt="instruction"),
    PairLayout(name="x2edit", source="1.0", edited="2", prompt="txt"),
    PairLayout(name="webdataset", source="input_image", edited="edited_image", mask="mask_image", prompt="edit_prompt"),
    PairLayout(
        name="webdataset", source="source_image", edited="edited_image", mask="mask_image", prompt="edit_prompt"
    ),
    PairLayout(name="webdataset", source="input", edited="output", mask="mask", prompt="txt"),
    PairLayout(name="webdataset", source="source", edited="target", mask="mask", prompt="txt"),
    PairLayout(name="webdataset", source="source", edited="edited", mask="mask", prompt="txt"),
    PairLayout(name="webdataset", source="original", edited="edited", mask="mask", prompt="txt"),
    PairLayout(name="webdataset", source="0", edited="1", mask="mask", prompt="txt"),
)
"""Members of tars, without the extension of the picture."""
PROMPTS = ("edit_prompt", "instruction", "prompt", "edit", "text", "caption")
"""Where a sample's instruction may stand in its JSON."""
SPLITS = re.compile(r"(?:^|[/_.-])(train|test|val|valid|validation|dev)(?=[/_.-]|$)")
OPTIONAL = ("mask", "rejected", "prompt", "source_prompt", "target_prompt", "id", "turn")


def layout_of_columns(names: Collection[str], layouts: tuple[PairLayout, ...] = COLUMNS) -> PairLayout | None:
    """The layout whose two pictures are among these columns, with what else of it is there; None: none is."""
    for layout in layouts:
        needed = (layout.source, layout.edited, *filter(None, [layout.rejected]))
        if layout.name in ("ip2p_original", "hq_edit"):  # else told from others by their pictures alone
            needed = (*needed, layout.prompt)
        if all(name in names for name in needed):
            return with_what_is_there(layout, names)
    return None


def with_what_is_there(layout: PairLayout, names: Collection[str]) -> PairLayout:
    """The layout without columns that a set lacks; the instruction may have another of the usual names."""
    gone = {role: "" for role in OPTIONAL if getattr(layout, role) not in names}
    if "prompt" in gone:
        gone["prompt"] = next((name for name in PROMPTS if name in names), "")
    return replace(layout, **gone)


def layout_of_members(names: Collection[str]) -> PairLayout | None:
    """The layout of a tar whose samples have members of these extensions, full member names filled in."""
    stems: dict[str, str] = {}
    for name in names:
        stem, dot, kind = name.rpartition(".")
        if dot and kind in PICTURE_KINDS:
            stems.setdefault(stem, name)
    for layout in MEMBERS:
        if layout.source in stems and layout.edited in stems:
            mask = stems.get(layout.mask, "")
            return replace(layout, source=stems[layout.source], edited=stems[layout.edited], mask=mask)
    return None


PICTURE_KINDS = ("jpg", "png", "webp", "bmp", "tif", "gif", "avif")


def layout_of_options(text: str) -> PairLayout:
    """A layout as typed: "source=a,edited=b,prompt=c".

    Raises:
        RecipeError: a role is unknown, given twice, or one of the two pictures is missing.
    """
    given: dict[str, str] = {}
    known = [one.name for one in fields(PairLayout) if one.name != "name"]
    problems = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, equals, name = part.partition("=")
        if not equals or not name or role not in known:
            problems.append((role, f"is not ROLE=COLUMN with one of the roles {', '.join(known)}"))
        elif role in given:
            problems.append((role, "is given twice"))
        given[role] = name
    problems += [(role, "is missing") for role in ("source", "edited") if role not in given]
    if problems:
        raise RecipeError("--columns", problems)
    return PairLayout(name="given", **given)


def known_layouts() -> Mapping[str, str]:
    """What each layout is told by."""
    return {layout.name: f"{layout.source}, {layout.edited}" for layout in (*COLUMNS, *PATHS, *MEMBERS)}


def split_of(name: str) -> str:
    """The split that a file's name or folder tells; "" where it tells none."""
    found = SPLITS.findall(name.lower())
    return {"val": "validation", "valid": "validation"}.get(found[-1], found[-1]) if found else ""
