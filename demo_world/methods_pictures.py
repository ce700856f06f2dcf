"""The results of every pair of inversion and editor as pictures: one line per pair, inputs above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from demo_world.methods import EditedScene, SceneEdit
from demo_world.scoring import Pixels

# Pixels of the pictures: an image's side, around it, names beside and above.
CELL, MARGIN, LABEL, HEADING = 64, 4, 130, 18
SHOWN = 6  # images side by side
Strip = tuple[str, Sequence[Pixels]]  # a name, and the images beside it


def picture(tasks: Sequence[SceneEdit], made: Mapping[tuple[str, str], Sequence[EditedScene]]) -> Image.Image:
    """One line per pair below one of the inputs, in two blocks side by side."""
    results: list[Strip] = [
        (f"{editor}\n{inversion}", [outcome.pixels for outcome in outcomes])
        for (inversion, editor), outcomes in made.items()
    ]
    middle = (len(results) + 1) // 2
    left, right = block(tasks, results[:middle]), block(tasks, results[middle:])
    sheet = Image.new("RGB", (left.width + right.width, left.height), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width, 0))
    return sheet.quantize(256, dither=Image.Dither.NONE)


def pictures_by_editor(
    tasks: Sequence[SceneEdit], made: Mapping[tuple[str, str], Sequence[EditedScene]]
) -> dict[str, Image.Image]:
    """For each editor the inputs, its results after every inversion, and its masks after the last one that has any."""
    lines: dict[str, list[Strip]] = {}
    masks: dict[str, Strip] = {}
    for (inversion, editor), outcomes in made.items():
        lines.setdefault(editor, []).append((f"after {inversion}", [outcome.pixels for outcome in outcomes]))
        regions = [region for outcome in outcomes if (region := outcome.latents.mask) is not None]
        if len(regions) == len(outcomes):
            masks[editor] = (f"mask\nafter {inversion}", [as_pixels(region) for region in regions])
    return {
        editor: block(tasks, [*shown, *([masks[editor]] if editor in masks else [])]).quantize(
            256, dither=Image.Dither.NONE
        )
        for editor, shown in lines.items()
    }


def as_pixels(mask: Tensor) -> Pixels:
    """A mask (h, w) as a black and white picture (h, w, 3)."""
    return (mask[..., None].expand(-1, -1, 3).to(torch.uint8) * 255).numpy()


def block(tasks: Sequence[SceneEdit], lines: Sequence[Strip]) -> Image.Image:
    """Inputs with the names of their edits above, and lines of results below."""
    shown = tasks[:SHOWN]
    pitch = CELL + MARGIN
    inputs: Strip = ("input", [task.pixels for task in shown])
    sheet = Image.new("RGB", (LABEL + pitch * len(shown), HEADING + pitch * (1 + len(lines))), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, task in enumerate(shown):
        pen.text((LABEL + pitch * column, 2), task.name, "black", font)
    for line, (name, images) in enumerate([inputs, *lines]):
        top = HEADING + pitch * line
        pen.multiline_text((MARGIN, top + CELL // 4), name, "black", font)
        for column, pixels in enumerate(images[:SHOWN]):
            cell = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.LANCZOS)
            sheet.paste(cell, (LABEL + pitch * column, top))
    return sheet
