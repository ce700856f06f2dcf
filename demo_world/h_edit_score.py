"""What h-Edit does on drawn faces: one text, three at once, a colour as a reward, text and reward together.

    python -m demo_world.h_edit_score --scenes 48        (or: make h-edit-score)

Each scene is drawn, edited and read back as in methods.py. A reward is told its place by the row's mask, here the drawn
one less what texts draw over; texts find theirs themselves. Writes build/h_edit.json, the table of
docs/methods/h_edit.md and its picture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from demo_world.methods import (
    EDITS,
    H_EDIT,
    EditedScene,
    KnownEdit,
    SceneEdit,
    description,
    h_edit_strength,
    in_order,
    invert_all,
    text_experts,
    write_between_marks,
)
from demo_world.methods_pictures import SHOWN, block
from demo_world.oracle import read
from demo_world.scoring import fresh_scenes, round_trips
from pipeline.editor import Editor
from pipeline.engine.calls import DecodeLatents, Steps
from pipeline.evaluation.metrics import psnr
from pipeline.models.allocator import keep_freed_memory
from pipeline.models.demo.networks import IMAGE_SIZE
from pipeline.models.demo.world import BACKGROUND_COLORS, FACE_COLORS, Scene, changed_region, draw, edited
from pipeline.one_image import latent_mask
from pipeline.recipe import Method, recipe_from
from pipeline.records import Concept, EditedLatents, EditRequest, Trajectory, WordPair

BEGIN = "<!-- written by `make h-edit-score` -->"
SEED = 4  # of the scenes; the settings were chosen on others
NUM_STEPS = 20  # of the sampler; as many as all methods are compared with
FINE = 50  # as many as the authors take: large areas and descents come out better by more and shorter moves
FORMS: dict[str, dict[str, Any]] = {
    "R": {"method": "ddpm", "solver": "ddim", "source_guidance_scale": 1.0},
    "D": {"method": "direct"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One thing that is asked of h-Edit."""

    before: Mapping[str, Any]  # attributes that a scene gets, so that there is something to do
    texts: tuple[Mapping[str, Any], ...] = ()  # attributes that each text changes
    reward: Mapping[str, str] = field(default_factory=dict)  # one attribute that a colour changes, within its place
    weight: float = 0.1  # of the reward
    steps: int = NUM_STEPS
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the editor, other than H_EDIT
    names_color: bool = True  # whether prompts name the face's colour

    @property
    def after(self) -> dict[str, Any]:
        """Everything that shall change."""
        return {name: value for part in (*self.texts, self.reward) for name, value in part.items()}


COLORS = {"face_color": FACE_COLORS, "background": BACKGROUND_COLORS}
# Short steps along the gradient. The decoder is not linear: one that would lead to the colour if it were passes it by.
CLIMB: dict[str, Any] = {"step": "gradient"}
TASKS: dict[str, Task] = {
    **{name: Task(before=edit.before, texts=(edit.after,)) for name, edit in EDITS.items()},
    # A colour stays within its outline: a wider mask changes a line around the face, in cells that hold both.
    "green face": Task(
        before=EDITS["green face"].before,
        texts=(EDITS["green face"].after,),
        steps=FINE,
        settings={"mask_margin": 0},
    ),
    # Sunglasses are of one size: a share of the image is nearer to theirs than the upper class of its changes.
    "sunglasses": Task(
        before=EDITS["sunglasses"].before,
        texts=(EDITS["sunglasses"].after,),
        settings={"mask": "quantile", "mask_threshold": 0.94},
    ),
    "three texts": Task(
        before={name: value for edit in EDITS.values() for name, value in edit.before.items()},
        texts=tuple(edit.after for edit in EDITS.values()),
        steps=FINE,
    ),
    "face, by a reward": Task(before={"face_color": "yellow"}, reward={"face_color": "green"}, weight=0.13, steps=FINE),
    "background, by a reward": Task(before={"background": "mint"}, reward={"background": "lavender"}, weight=0.05),
    "sunglasses by a text, face by a reward": Task(
        before={"sunglasses": False, "face_color": "yellow"},
        texts=({"sunglasses": True},),
        reward={"face_color": "green"},
        weight=0.13,
        steps=FINE,
        # The reward's place is its own, and bounds no text.
        settings={"user_mask": "rewards", "mask": "quantile", "mask_threshold": 0.94},
        names_color=False,  # a text that names the old one pulls against the reward, and noise is what comes of it
    ),
}
SINGLE = tuple(EDITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of one task in one form: means over scenes, shares from 0 to 1."""

    form: str
    task: str
    steps: int
    success: float  # scenes in which all that should change did
    unchanged: float  # attributes that should stay and did
    background_psnr: float  # dB, outside of the pixels that should change, against the autoencoder's round trip
    worst_background: float  # dB, of one scene
    network_rows: float  # per image, inversion and edit


def scenes_of(task: Task, name: str, editor: Editor, count: int, seed: int) -> list[SceneEdit]:
    """Drawn scenes with something to do."""
    before = [edited(scene, **task.before) for scene in fresh_scenes(count, seed)]
    images = [draw(scene, IMAGE_SIZE) for scene in before]
    known = KnownEdit(
        before=task.before, after=task.after, concept=Concept(prompt=name), words=WordPair(), equalizer={}
    )
    return [
        SceneEdit(name, known, scene, edited(scene, **task.after), image, trip)
        for scene, image, trip in zip(before, images, round_trips(editor, images), strict=True)
    ]


def request_of(form: str, task: Task, before: Scene) -> EditRequest:
    """A task in words and colours."""
    rewards = [
        {"method": "masked_color", "color": COLORS[name][color], **CLIMB, "weight": task.weight}
        for name, color in task.reward.items()
    ]
    return EditRequest(
        source_prompt=description(before, names_color=task.names_color),
        experts=text_experts(before, task.texts, FORMS[form]["method"], names_color=task.names_color),
        rewards=tuple(rewards),  # type: ignore[arg-type]  # pydantic makes them what they are
    )


def method_of(form: str, task: Task, num_steps: int) -> Method:
    """The editor after one of the two inversions."""
    inversion = {**FORMS[form], "num_steps": num_steps}
    if inversion["method"] == "ddpm":
        inversion["skip_steps"] = 0
    editing = {"method": "h_edit", **H_EDIT, **task.settings}
    editing["source_guidance_scale"] *= h_edit_strength(inversion["method"])
    sections = {"source": {"shards": "-"}, "inversion": inversion, "editing": editing, "sink": {"folder": "-"}}
    recipe = recipe_from(sections, form)
    return Method(inversion=recipe.inversion, editing=recipe.editing)


def edit_scenes(
    editor: Editor, form: str, task: Task, scenes: Sequence[SceneEdit], num_steps: int
) -> list[EditedScene]:
    """Every scene, with the mask of what its reward changes."""
    method = method_of(form, task, num_steps)
    requests = [request_of(form, task, scene.before) for scene in scenes]
    inverted = invert_all(editor, method.inversion, scenes, [request.source_prompt for request in requests])

    def edit(trajectory: Trajectory, request: EditRequest, place: np.ndarray | None) -> Steps[Any]:
        given = replace(trajectory, source=replace(trajectory.source, mask=place))
        mask = latent_mask(place, trajectory.latents[0])
        latents = yield from method.editing.edit(given, request, mask)
        assert isinstance(latents, EditedLatents), "no server is asked here"
        return (yield DecodeLatents(latents.latents)), latents

    finished = in_order(
        editor.engine.run(
            edit(trajectory, request, place_of(task, scene))
            for (trajectory, _), request, scene in zip(inverted, requests, scenes, strict=True)
        )
    )
    return [
        EditedScene(pixels=one.value[0], latents=one.value[1], network_rows=rows + one.network_rows)
        for one, (_, rows) in zip(finished, inverted, strict=True)
    ]


def place_of(task: Task, scene: SceneEdit) -> np.ndarray | None:
    """(H, W) in [0, 1]: where the reward's attribute is to be seen once texts have done their part; None without a
    reward. Where a text draws something else the two would pull against each other."""
    if not task.reward:
        return None
    of_texts = scene.before
    for change in task.texts:
        of_texts = edited(of_texts, **change)
    return changed_region(of_texts, edited(of_texts, **task.reward), IMAGE_SIZE).astype(np.float32)


def judged(form: str, name: str, task: Task, scenes: Sequence[SceneEdit], made: Sequence[EditedScene]) -> Score:
    """Compare what was made with what should have been."""
    succeeded, stayed, noises = [], [], []
    for scene, outcome in zip(scenes, made, strict=True):
        found, wanted = read(outcome.pixels), scene.after.attributes()
        succeeded.append(all(found[one] == wanted[one] for one in wanted if one in task.after))
        stayed += [found[one] == wanted[one] for one in wanted if one not in task.after]
        outside = ~changed_region(scene.before, scene.after, IMAGE_SIZE)
        noises.append(psnr(scene.round_trip[outside], outcome.pixels[outside]) or 0.0)
    return Score(
        form=form,
        task=name,
        steps=task.steps,
        success=float(np.mean(succeeded)),
        unchanged=float(np.mean(stayed)),
        background_psnr=float(np.mean(noises)),
        worst_background=float(np.min(noises)),
        network_rows=float(np.mean([outcome.network_rows for outcome in made])),
    )


Line = tuple[Score, list[SceneEdit], list[EditedScene]]


def measure(form: str, name: str, count: int, seed: int) -> Line:
    """One line of the table, and the scenes and images that are shown of it."""
    torch.set_num_threads(1)  # the processes share the cores
    keep_freed_memory()
    editor, task = Editor.load("demo"), TASKS[name]
    scenes = scenes_of(task, name, editor, count, seed)
    made = edit_scenes(editor, form, task, scenes, task.steps)
    return judged(form, name, task, scenes, made), scenes[:SHOWN], made[:SHOWN]


def markdown(scores: Sequence[Score], scenes: int) -> str:
    """The table for the documentation."""
    lines = [
        f"{scenes} scenes a line.",
        "",
        "| form | asked for | steps | success | unchanged | background PSNR | its worst | network rows |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {one.form} | {one.task} | {one.steps} | {one.success:.2f} | {one.unchanged:.2f} | "
        f"{one.background_psnr:.1f} dB | {one.worst_background:.1f} dB | {one.network_rows:.0f} |"
        for one in scores
    ]
    return "\n".join(lines) + "\n"


def main(
    scenes: Annotated[int, typer.Option(min=1, help="drawn images per line")] = 48,
    seed: Annotated[int, typer.Option(help="of the scenes; settings were chosen on others")] = SEED,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = os.cpu_count() or 1,
    out: Annotated[Path, typer.Option(help="where h_edit.json goes")] = Path("build"),
    docs: Annotated[Path, typer.Option(help="whose methods/h_edit.md is rewritten, and where the picture goes")] = Path(
        "docs"
    ),
) -> None:
    """Score h-Edit on drawn scenes."""
    lines = [(form, name) for form in FORMS for name in TASKS]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        shares = [pool.submit(measure, form, name, scenes, seed) for form, name in lines]
        found = []
        for share in shares:
            found.append(share.result())
            typer.echo(found[-1][0])
    scores = [score for score, _, _ in found]
    out.mkdir(parents=True, exist_ok=True)
    report = {"scenes": scenes, "seed": seed, "scores": [asdict(score) for score in scores]}
    (out / "h_edit.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_between_marks(docs / "methods" / "h_edit.md", markdown(scores, scenes), BEGIN)
    picture(found).save(docs / "images" / "h_edit.png", optimize=True)


def picture(found: Sequence[Line]) -> Image.Image:
    """Of every task of the first form, the inputs and below them the results."""
    shown = [one for one in found if one[0].form == found[0][0].form and one[0].task not in SINGLE]
    blocks = [
        # Every column is of one task: its name stands beside the results, and not above each.
        block([replace(one, name="") for one in scenes], [(fill(score.task, 18), [one.pixels for one in made])])
        for score, scenes, made in shown
    ]
    sheet = Image.new("RGB", (blocks[0].width, sum(one.height for one in blocks)), "white")
    for at, one in enumerate(blocks):
        sheet.paste(one, (0, sum(above.height for above in blocks[:at])))
    return sheet.quantize(256, dither=Image.Dither.NONE)


if __name__ == "__main__":
    typer.run(main)
