"""What looks at a job's results through a model, for its gates: CLIP, DINOv2, a safety checker of one's own, a judge.

Each result is looked at alone, so that its figures, like its pixels, depend on nothing beside it. Nothing is loaded
that the recipe does not name. Cost: two pictures through the model per result.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Callable, Sequence
from threading import Lock

from PIL import Image
from typing_extensions import override

from pipeline.common.showing import describe
from pipeline.errors import EncodeError, RecipeError
from pipeline.evaluation.items import Item, Result
from pipeline.evaluation.judging.judged import Judging
from pipeline.evaluation.judging.rewriting import prompt_hash
from pipeline.evaluation.metric_models import clip_figures
from pipeline.gating.gate import JUDGE_TEXTS, LOOKED, Columns, Gates, Look
from pipeline.models.image_text import ImageTextModel, load_image_text
from pipeline.models.self_similarity import VisionTransformer, load_vision_transformer
from pipeline.reading.storage import open_fs
from pipeline.recipe import Recipe
from pipeline.records import Edited, Rewritten
from pipeline.settings.judge import JudgeConfig
from pipeline.settings.sections import SinkConfig
from pipeline.writing.instructions import instruction_of
from pipeline.writing.paths import JUDGED
from pipeline.writing.rows import encode_png

Checker = Callable[[list[Image.Image]], Sequence[float]]


def gates_of(recipe: Recipe) -> Gates | None:
    """The gates of a run, their models loaded; None where it has none.

    Raises:
        ModelError: a model cannot be loaded.
        RecipeError: the safety checker, or the judge's prompts or factory, cannot be had.
        JudgeError: the judge's key is missing.
    """
    config = recipe.gates
    if config is None:
        return None
    looks: list[Look] = []
    if config.clip is not None:
        looks.append(ClipLook(load_image_text(config.clip)))
    if config.dinov2 is not None:
        looks.append(ContentLook(load_vision_transformer(config.dinov2)))
    if config.safety is not None:
        looks.append(SafetyLook(config.safety))
    if config.judge is None:
        return Gates(config, looks)
    judge = JudgeLook(config.judge, recipe.sink)
    rewrites = recipe.instructions is not None and recipe.instructions.rewritten
    return Gates(config, looks, judge, judge.rewrite if rewrites else None)


class ClipLook(Look):
    """InstructPix2Pix's cosines (arXiv 2211.09800, section 3.1.2), by a CLIP with its checkpoint's own resizing."""

    def __init__(self, model: ImageTextModel) -> None:
        self._model, self._lock = model, Lock()  # one at a time: it keeps texts, and the device is the editor's, too

    @override
    def __call__(self, edited: Edited) -> Columns:
        with self._lock:
            before, after = self._model.of_images([edited.original, edited.image])
            found = clip_figures(self._model, edited.request, before, after, None)
        return {name: found[name] for name in LOOKED["clip"]}


class ContentLook(Look):
    """DINOv2's similarity of the two images, whatever the prompts say."""

    def __init__(self, model: VisionTransformer) -> None:
        self._model, self._lock = model, Lock()

    @override
    def __call__(self, edited: Edited) -> Columns:
        with self._lock:
            before, after = self._model.contents([edited.original, edited.image])
        return {"dinov2_sim": float(before @ after)}


class SafetyLook(Look):
    """A checker of the user's.

    Args:
        name: "package.module:factory".

    Raises:
        RecipeError: it cannot be had.
    """

    def __init__(self, name: str) -> None:
        module, _, factory = name.partition(":")
        try:
            self._check: Checker = getattr(importlib.import_module(module), factory)()
        except Exception as error:  # a stranger's code
            text = f"{name} gives no checker: {describe(error)}. Give package.module:factory of one that is installed"
            raise RecipeError("recipe", [("gates.safety", text)]) from error
        self._name, self._lock = name, Lock()

    @override
    def __call__(self, edited: Edited) -> Columns:
        with self._lock:
            scores = list(self._check([Image.fromarray(edited.image)]))
        if len(scores) != 1 or not math.isfinite(scores[0]) or not 0 <= scores[0] <= 1:
            raise EncodeError(f"gates.safety: {self._name} gave {scores!r} for one picture, not one number from 0 to 1")
        return {"nsfw_score": float(scores[0])}


class JudgeLook(Look):
    """A judge, by the texts and the journal of `shardedit evaluate`: what was answered once is not asked again.

    The journal stands in the run's folder, a file for each answer, so that workers share it, and a unit that is done
    again after a kill gets the answers that it had.

    Args:
        config: of the judge.
        sink: where the run stands.

    Raises:
        RecipeError, JudgeError: as `Judging`.
    """

    def __init__(self, config: JudgeConfig, sink: SinkConfig) -> None:
        fs, root = open_fs(sink.folder, sink.storage_options)
        self._judging = Judging(config, fs, f"{root}/{JUDGED}")
        told = "\x1f".join((config.kind, config.model, config.revision or "", prompt_hash()))
        self._revision = hashlib.sha256(told.encode()).hexdigest()[:16]

    @property
    def requests(self) -> int:
        """That were made so far by this process."""
        return self._judging.requests

    @override
    def __call__(self, edited: Edited) -> Columns:
        (found,) = self._judging.columns([_as_result(edited)], [""])
        texts = {name: found.get(name) for name in JUDGE_TEXTS}
        texts["judge_prompt_hash"] = " ".join(found["judge_prompt_hash"])
        return {**{name: found.get(name) for name in LOOKED["judge"]}, **texts}

    def rewrite(self, edited: Edited) -> Rewritten:
        """The instruction that the judge would give for what it sees."""
        outcome = self._judging.rewritten(_as_result(edited), instruction_of(edited.request))
        read = outcome.read
        return Rewritten(text="" if read.reason else read.reasoning, revision=self._revision, reason=read.reason)


def _as_result(edited: Edited) -> Result:
    """As an evaluation has it."""
    key = f"{edited.sample.id}\x1f{edited.attempt}"
    item = Item(key=key, image=encode_png(edited.original), request=edited.request)
    return Result(item=item, edit=edited.edit, method=edited.method, image=encode_png(edited.image))
