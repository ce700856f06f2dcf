"""Every pair of inversion and editor on the drawn world, side by side: does the edit happen, and does the rest stay?

Each scene is drawn and gets one edit, the edits taking turns. All pairs edit the same images towards the same outcome:
editors that think in two prompts get complete descriptions of the scene before and after, those that think in concepts
get the concept. An inversion that several editors read is run once. The outcome is judged as in score.py.

Cost: a few hundred network rows per scene and pair, and a tenth of a second per result for reading it back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from demo_world.oracle import read
from demo_world.scoring import Pixels, fresh_scenes, mask_iou, round_trips
from pipeline.editing import EDITORS
from pipeline.editor import Editor
from pipeline.engine.calls import DecodeLatents, EncodeImage, Steps
from pipeline.engine.engine import Engine, Finished
from pipeline.evaluation.metrics import psnr
from pipeline.inversion import INVERSIONS
from pipeline.inversion.base import Inversion, draw_from
from pipeline.models.demo.networks import IMAGE_SIZE
from pipeline.models.demo.world import Attribute, Scene, changed_region, draw, edited, object_phrases, with_article
from pipeline.recipe import Method, recipe_from
from pipeline.records import Concept, EditedLatents, EditRequest, Source, TextExpert, Trajectory, WordPair
from pipeline.seeds import seed_for

SEED = 3  # of the scenes; the settings below were chosen on others
NUM_STEPS = 20
GUIDANCE_SCALE = 4.0  # of every method with a target prompt
# Pairs with edit-friendly inversion whose source is not guided, as its authors pair it with Prompt-to-Prompt.
UNGUIDED_SOURCE = frozenset({("ddpm", "prompt_to_prompt"), ("ddpm", "masactrl"), ("ddpm", "h_edit")})
# Editors whose papers invert under the empty prompt.
WITHOUT_SOURCE_PROMPT = frozenset({"ledits_pp", "masactrl"})
# Editors that move an image along directions which no word names, make other images than it, or need autoencoders that
# were trained before: they are scored apart (geometry_score.py, consistory_score.py, concepts_score.py).
AIMLESS = frozenset({"concepts", "consistory", "riemannian"})
# Editors that the bundled model cannot serve: their models read the image itself, or they ask a server.
WITH_REFERENCE = frozenset({"endpoint", "instruct"})
# Editors that are told the words whose place changes.
READS_WORDS = frozenset({"prompt_to_prompt", "proxedit"})


# h-Edit on drawn faces. The source's side is guided near the targets': far below, each of several texts also pulls
# towards all else that it says.
H_EDIT: dict[str, Any] = {"form": "explicit", "control": "none", "mask": "otsu", "source_guidance_scale": 3.0}
H_EDIT_SCALES = {"sunglasses": 4.0, "mouth": 4.0, "face_color": 5.0}  # of a text that changes an attribute


def h_edit_strength(inversion: str) -> float:
    """Factor of both sides' guidance: a deterministic step gives less weight to what is predicted than a noisy one."""
    return 1.0 if inversion == "ddpm" else 2.0


# Settings other than the defaults, `num_steps` and `guidance_scale`.
INVERSION_SETTINGS: dict[str, dict[str, Any]] = {
    "null_text": {"num_inner_steps": 3, "edit_guidance_scale": GUIDANCE_SCALE},
}
EDITOR_SETTINGS: dict[str, dict[str, Any]] = {
    # The authors' scales are flow-matching models', of photographs.
    "flow_edit": {"n_max": 16, "source_guidance_scale": 1.5},
    # The papers begin at step 4 of 50. The first steps of 20 settle as much.
    "masactrl": {"start_step": 2},
    "prox_masactrl": {"start_step": 2},
    "h_edit": H_EDIT,
    # Inverted under the source prompt, as nearly all others are; its guidance would be for a network that is told one.
    "uniedit_flow": {"inverts": "source", "guidance_scale": None},
}
# Share of the schedule that is inverted and walked back, where a method's paper does not take all of it.
STRENGTHS: dict[tuple[str, str], float] = {
    ("ddim", "diffedit"): 0.8,
    ("direct", "diffedit"): 0.8,
    ("ddim", "fast_diffedit"): 0.8,
    ("direct", "fast_diffedit"): 0.8,
    ("uni_inv", "uniedit_flow"): 0.8,
    ("ddim", "uniedit_flow"): 0.8,
    ("dna", "direct_edit"): 0.7,
    ("ddpm", "ledits_pp"): 0.8,
    ("ddpm", "cfg"): 0.75,
    ("ddpm", "masactrl"): 0.75,
    ("ddpm", "prompt_to_prompt"): 0.75,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownEdit:
    """An edit whose outcome is known, in the words of every method."""

    before: Mapping[str, Any]  # attributes that a scene gets, so that there is something to do
    after: Mapping[str, Any]  # attributes that the edit shall change
    concept: Concept
    words: WordPair  # of the two descriptions, where the change is
    equalizer: Mapping[str, float]


EDITS: dict[str, KnownEdit] = {
    "sunglasses": KnownEdit(
        before={"sunglasses": False},
        after={"sunglasses": True},
        concept=Concept(prompt="sunglasses", guidance_scale=7, threshold=0.9),
        words=WordPair(target=("sunglasses",)),
        equalizer={"sunglasses": 2.0},
    ),
    "open mouth": KnownEdit(
        before={"mouth": "smile"},
        after={"mouth": "open"},
        concept=Concept(prompt="an open mouth", guidance_scale=7, threshold=0.94),
        words=WordPair(source=("smile",), target=("open", "mouth")),
        equalizer={"open": 2.0},
    ),
    "green face": KnownEdit(
        before={"face_color": "yellow"},
        after={"face_color": "green"},
        concept=Concept(prompt="a green face", guidance_scale=5, threshold=0.5),
        words=WordPair(source=("yellow", "face"), target=("green", "face")),
        equalizer={"green": 2.0},
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One line of the table: means over scenes, shares from 0 to 1."""

    inversion: str
    editor: str
    success: float  # scenes in which what should change did
    unchanged: float  # attributes that should stay and did
    mask_iou: float | None  # of the method's mask with the pixels that should change; None: it reports no mask
    background_psnr: float  # dB, outside of these pixels, against the autoencoder's round trip
    network_rows: float  # per image, inversion and edit


@dataclass(frozen=True, slots=True, eq=False)
class SceneEdit:
    """One image and what shall become of it."""

    name: str  # of the edit
    edit: KnownEdit
    before: Scene
    after: Scene
    pixels: Pixels
    round_trip: Pixels

    def request(self, inversion: str, editor: str) -> EditRequest:
        """The edit in the words that a pair understands."""
        if thinks_in_concepts(editor):
            return EditRequest(concepts=(self.edit.concept,))
        source = "" if without_source_prompt(inversion, editor) else description(self.before)
        if editor == "h_edit":  # whose texts have a strength of their own
            return EditRequest(source_prompt=source, experts=text_experts(self.before, [self.edit.after], inversion))
        request = EditRequest(source_prompt=source, target_prompt=description(self.after))
        if editor not in READS_WORDS:
            return request
        return request.model_copy(update={"blend_words": self.edit.words, "equalizer": dict(self.edit.equalizer)})


@dataclass(frozen=True, slots=True, eq=False)
class EditedScene:
    """One edited image."""

    pixels: Pixels
    latents: EditedLatents
    network_rows: int


def without_source_prompt(inversion: str, editor: str) -> bool:
    """Whether a pair inverts under the empty prompt. Null-text embeddings stand for the source prompt's guidance."""
    return editor in WITHOUT_SOURCE_PROMPT and inversion != "null_text"


def text_experts(
    before: Scene, changes: Iterable[Mapping[str, Any]], inversion: str, *, names_color: bool = True
) -> tuple[TextExpert, ...]:
    """One text per change: all that is to be seen when it alone is made."""
    return tuple(
        TextExpert(
            prompt=description(edited(before, **change), names_color=names_color),
            guidance_scale=h_edit_strength(inversion) * max(H_EDIT_SCALES[name] for name in change),
        )
        for change in changes
    )


@cache
def thinks_in_concepts(editor: str) -> bool:
    """Whether an editor refuses a request of two prompts."""
    inversion = next(name for name, one in INVERSIONS.items() if EDITORS[editor].fits(one))
    method = method_of(inversion, editor, NUM_STEPS)
    request = EditRequest(source_prompt="a face", target_prompt="a hat")
    return any(method.editing.problems(request, method.inversion))


def description(scene: Scene, *, names_color: bool = True) -> str:
    """All that is to be seen, always in the same words and order, so that two descriptions differ as the scenes do;
    on request all but the face's colour."""
    extras = object_phrases(scene, bare_hat=False)
    listed = extras[0] if len(extras) == 1 else f"{', '.join(extras[:-1])} and {extras[-1]}"
    looks = f"{scene.face_shape} {scene.face_color}" if names_color else scene.face_shape
    face = with_article(f"{looks} face")
    return f"{face} with {listed} on a {scene.background} background"


def valid_pairs() -> list[tuple[str, str]]:
    """All pairs that a recipe accepts and that can be told where to go, by name."""
    return [
        (name, editor)
        for editor in EDITORS
        for name, inversion in INVERSIONS.items()
        if EDITORS[editor].fits(inversion) and editor not in AIMLESS | WITH_REFERENCE
    ]


def method_of(inversion: str, editor: str, num_steps: int) -> Method:
    """A pair with the settings that it is compared with.

    Raises:
        RecipeError: the two do not fit.
    """
    walked = round(num_steps * STRENGTHS.get((inversion, editor), 1.0))
    given = {"method": inversion, "num_steps": walked, **INVERSION_SETTINGS.get(inversion, {})}
    if "skip_steps" in INVERSIONS[inversion].model_fields:
        given["skip_steps"] = num_steps - walked
    if (inversion, editor) in UNGUIDED_SOURCE:
        given["source_guidance_scale"] = 1.0
    editing = {"method": editor, **EDITOR_SETTINGS.get(editor, {})}
    if "guidance_scale" in EDITORS[editor].model_fields:
        editing.setdefault("guidance_scale", GUIDANCE_SCALE)
    if editor == "h_edit":
        editing["source_guidance_scale"] *= h_edit_strength(inversion)
    recipe = recipe_from(
        {"source": {"shards": "-"}, "inversion": given, "editing": editing, "sink": {"folder": "-"}},
        f"{inversion}+{editor}",
    )
    return Method(inversion=recipe.inversion, editing=recipe.editing)


def tasks_of(editor: Editor, count: int, seed: int = SEED) -> list[SceneEdit]:
    """`count` drawn scenes, the edits in turn."""
    named = [list(EDITS.items())[number % len(EDITS)] for number in range(count)]
    before = [edited(scene, **edit.before) for scene, (_, edit) in zip(fresh_scenes(count, seed), named, strict=True)]
    images = [draw(scene, IMAGE_SIZE) for scene in before]
    return [
        SceneEdit(name, edit, scene, edited(scene, **edit.after), image, round_trip)
        for (name, edit), scene, image, round_trip in zip(
            named, before, images, round_trips(editor, images), strict=True
        )
    ]


def measure_pairs(
    editor: Editor,
    tasks: Sequence[SceneEdit],
    pairs: Iterable[tuple[str, str]],
    num_steps: int = NUM_STEPS,
    tell: Callable[[Pair], None] = lambda _: None,
) -> tuple[list[Pair], dict[tuple[str, str], list[EditedScene]]]:
    """Edit all tasks by all pairs; return the table, and what was made, in the order of the tasks."""
    inverted: dict[tuple[Inversion, bool], list[tuple[Trajectory, int]]] = {}
    table, made = [], {}
    for inversion, name in pairs:
        method = method_of(inversion, name, num_steps)
        key = (method.inversion, without_source_prompt(inversion, name))
        requests = [task.request(inversion, name) for task in tasks]
        if key not in inverted:
            inverted[key] = invert_all(editor, method.inversion, tasks, [request.source_prompt for request in requests])
        outcomes = edit_all(editor.engine, method, requests, inverted[key])
        table.append(judge(inversion, name, tasks, outcomes))
        made[inversion, name] = outcomes
        tell(table[-1])
    return table, made


def invert_all(
    editor: Editor, inversion: Inversion, tasks: Sequence[SceneEdit], prompts: Sequence[str]
) -> list[tuple[Trajectory, int]]:
    """The tasks' trajectories, and the network rows that each took."""

    def invert(number: int) -> Steps[Trajectory]:
        latents = yield EncodeImage(tasks[number].pixels)
        shape = tuple(latents.shape)
        source = Source(
            latents=latents,
            prompt=prompts[number],
            schedule=editor.backbone.schedule,
            draw_noise=draw_from(seed_for(0, str(number), inversion.method), shape, latents.dtype),
            editing_noise=partial(draw_from, seed_for(0, str(number), "editing"), shape, latents.dtype),
            pixels=tasks[number].pixels,
        )
        return (yield from inversion.invert(source))

    finished = in_order(editor.engine.run(invert(number) for number in range(len(tasks))))
    return [(one.value, one.network_rows) for one in finished]


def edit_all(
    engine: Engine, method: Method, requests: Sequence[EditRequest], inverted: Sequence[tuple[Trajectory, int]]
) -> list[EditedScene]:
    """One edit of each trajectory."""

    def edit(trajectory: Trajectory, request: EditRequest) -> Steps[tuple[Pixels, EditedLatents]]:
        latents = yield from method.editing.edit(trajectory, request)
        assert isinstance(latents, EditedLatents), "no server is asked here"
        pixels = yield DecodeLatents(latents.latents)
        return pixels, latents

    generators = (edit(trajectory, request) for (trajectory, _), request in zip(inverted, requests, strict=True))
    finished = in_order(engine.run(generators))
    return [
        EditedScene(pixels=one.value[0], latents=one.value[1], network_rows=rows + one.network_rows)
        for one, (_, rows) in zip(finished, inverted, strict=True)
    ]


def in_order(finished: Iterator[Finished]) -> list[Finished]:
    """Results in the order of what was given. A failed one is raised: every method must serve these edits."""
    results = sorted(finished, key=lambda one: one.index)
    for one in results:
        if one.error is not None:
            raise one.error
    return results


def judge(inversion: str, editor: str, tasks: Sequence[SceneEdit], outcomes: Sequence[EditedScene]) -> Pair:
    """Compare what was made with what should have been."""
    succeeded, stayed, ious, noises = [], [], [], []
    for task, outcome in zip(tasks, outcomes, strict=True):
        found, wanted = read(outcome.pixels), task.after.attributes()
        changing: tuple[Attribute, ...] = tuple(task.edit.after)  # type: ignore[arg-type]  # the keys are attributes
        succeeded.append(all(found[name] == wanted[name] for name in changing))
        stayed += [found[name] == wanted[name] for name in wanted if name not in changing]
        truth = changed_region(task.before, task.after, IMAGE_SIZE)
        if (region := outcome.latents.mask) is not None:
            ious.append(mask_iou(region.numpy(), truth))
        noises.append(psnr(task.round_trip[~truth], outcome.pixels[~truth]) or 0.0)
    return Pair(
        inversion=inversion,
        editor=editor,
        success=float(np.mean(succeeded)),
        unchanged=float(np.mean(stayed)),
        mask_iou=float(np.mean(ious)) if ious else None,
        background_psnr=float(np.mean(noises)),
        network_rows=float(np.mean([outcome.network_rows for outcome in outcomes])),
    )


COLUMNS = ("inversion", "editor", "success", "unchanged", "mask IoU", "background PSNR", "network rows")


def cells(pair: Pair) -> tuple[str, ...]:
    """A line of the table as text."""
    return (
        pair.inversion,
        pair.editor,
        f"{pair.success:.2f}",
        f"{pair.unchanged:.2f}",
        "" if pair.mask_iou is None else f"{pair.mask_iou:.2f}",
        f"{pair.background_psnr:.1f} dB",
        f"{pair.network_rows:.0f}",
    )


def markdown(table: Sequence[Pair]) -> str:
    """The table for the documentation."""
    head = [f"| {' | '.join(COLUMNS)} |", f"|---|---|{'---:|' * (len(COLUMNS) - 2)}"]
    body = [f"| `{pair.inversion}` | `{pair.editor}` | {' | '.join(cells(pair)[2:])} |" for pair in table]
    return "\n".join([*head, *body]) + "\n"


BEGIN, END = "<!-- written by `make methods-table` -->", "<!-- end of what is written -->"


def write_between_marks(path: Path, text: str, mark: str = BEGIN) -> None:
    """Replace what stands between the two marks of a page, which keeps the words around it.

    Raises:
        ValueError: the page has no such marks.
    """
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(mark)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} lacks the lines '{mark}' and '{END}'. Restore them: the table goes between")
    path.write_text(f"{before}{mark}\n\n{text}\n{END}{after}", encoding="utf-8")


def as_json(table: Sequence[Pair]) -> str:
    """A list of objects, `mask_iou` null where a method has no mask."""
    return json.dumps([asdict(pair) for pair in table], indent=2) + "\n"
