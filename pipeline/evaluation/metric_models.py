"""Measures that look through a model: CLIP, DINO, DINOv2, LPIPS. Each sees an input once for all of its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from pipeline.common.showing import describe
from pipeline.errors import ModelError
from pipeline.evaluation.items import Result
from pipeline.evaluation.metrics_config import MetricsConfig
from pipeline.models.image_text import ImageTextModel, load_image_text
from pipeline.models.self_similarity import VisionTransformer, load_vision_transformer, structure_distances
from pipeline.records import EditRequest

if TYPE_CHECKING:
    from pipeline.evaluation.scoring import Pictures

CLIP = (
    "clip_similarity_source_image",
    "clip_similarity_target_image",
    "clip_similarity_target_image_edit_part",
    "clip_sim_0",
    "clip_sim_1",
    "clip_sim_dir",
    "clip_sim_image",
)
NO_DIRECTION = 1e-6  # length of a difference of features below which it has none
T = TypeVar("T")
Seen = list[tuple[dict[str, float | None], list[str]]]
Pair = tuple[Result, "Pictures"]


class Models:
    """Those that a configuration names; what cannot be loaded stands in `unavailable`."""

    def __init__(self, config: MetricsConfig) -> None:
        self._config = config
        self.unavailable: dict[str, str] = {}
        self._clip = self._loaded(config.clip, load_image_text, CLIP)
        self._dino = self._loaded(config.dino, load_vision_transformer, ("structure_distance",))
        self._dinov2 = self._loaded(config.dinov2, load_vision_transformer, ("dinov2_sim",))
        self._lpips = self._loaded("squeeze" if config.lpips else None, load_lpips, ("lpips_unedit_part",))
        self.columns = tuple(
            column
            for wanted, columns in (
                (config.dino, ("structure_distance",)),
                (config.lpips, ("lpips_unedit_part",)),
                (config.clip, CLIP),
                (config.dinov2, ("dinov2_sim",)),
            )
            if wanted
            for column in columns
        )

    def _loaded(self, name: str | None, load: Callable[[str], T], columns: Sequence[str]) -> T | None:
        if name is None:
            return None
        try:
            return load(name)
        except ModelError as error:
            self.unavailable |= dict.fromkeys(columns, str(error))
            return None

    def measure(self, pairs: Sequence[Pair]) -> Seen:
        """Figures and notes of every result, in their order."""
        seen: Seen = [({}, []) for _ in pairs]
        if not pairs:
            return seen
        # Several results of one item share its input.
        keys = [result.item.key for result, _ in pairs]
        firsts = {key: at for at, key in reversed(list(enumerate(keys)))}
        sources = [pairs[at][1].source for at in firsts.values()]
        place = {key: at for at, key in enumerate(firsts)}
        of_source = [place[key] for key in keys]
        results = [pictures.result for _, pictures in pairs]
        if self._dino is not None:
            for (figures, _), value in zip(seen, self._structure(self._dino, sources, of_source, results), strict=True):
                figures["structure_distance"] = value
        if self._dinov2 is not None:
            before, after = self._dinov2.contents(sources), self._dinov2.contents(results)
            for (figures, _), at, content in zip(seen, of_source, after, strict=True):
                figures["dinov2_sim"] = float(before[at] @ content)
        if self._clip is not None:
            before = self._clip.of_images(sources)
            after = self._clip.of_images(results)
            # Pixels outside of the region are black, as published.
            parts = {
                at: pictures.result * pictures.region[..., None]
                for at, (_, pictures) in enumerate(pairs)
                if pictures.region is not None
            }
            edited = dict(zip(parts, self._clip.of_images(list(parts.values())), strict=True)) if parts else {}
            for at, ((result, _), (figures, notes)) in enumerate(zip(pairs, seen, strict=True)):
                request = result.item.request
                figures |= clip_figures(self._clip, request, before[of_source[at]], after[at], edited.get(at))
                if any(self._clip.is_cut(text) for text in (request.source_prompt, request.target_prompt)):
                    notes.append("clip_text_truncated")
        if self._lpips is not None:
            for (figures, _), (_, pictures) in zip(seen, pairs, strict=True):
                figures["lpips_unedit_part"] = self._lpips(pictures)
        return seen

    def _structure(
        self,
        model: VisionTransformer,
        sources: Sequence[np.ndarray],
        of_source: Sequence[int],
        results: Sequence[np.ndarray],
    ) -> list[float]:
        before = model.structures(sources, antialias=self._config.antialias)
        after = model.structures(results, antialias=self._config.antialias)
        return structure_distances(before[list(of_source)], after)


def clip_figures(
    model: ImageTextModel,
    request: EditRequest,
    before: np.ndarray,
    after: np.ndarray,
    edited: np.ndarray | None,
) -> dict[str, float | None]:
    """What CLIP says of a result: published similarities (0..100), and the cosines of InstructPix2Pix.

    Args:
        model: the CLIP.
        request: its prompts; a figure of a missing one is None.
        before, after: features of input and result, (F,).
        edited: of the result's region alone; None: there is no region.
    """
    texts = [text for text in (request.source_prompt, request.target_prompt) if text]
    said: dict[str, np.ndarray] = dict(zip(texts, model.of_texts(texts), strict=True)) if texts else {}
    first, second = said.get(request.source_prompt), said.get(request.target_prompt)
    return {
        "clip_similarity_source_image": _points(before, first),
        "clip_similarity_target_image": _points(after, second),
        "clip_similarity_target_image_edit_part": None if edited is None else _points(edited, second),
        "clip_sim_0": _cosine(before, first),
        "clip_sim_1": _cosine(after, second),
        "clip_sim_dir": None if first is None or second is None else _direction(after - before, second - first),
        "clip_sim_image": _cosine(before, after),
    }


def _cosine(one: np.ndarray, other: np.ndarray | None) -> float | None:
    return None if other is None else float(one @ other)


def _points(one: np.ndarray, other: np.ndarray | None) -> float | None:
    cosine = _cosine(one, other)
    return None if cosine is None else max(0.0, 100.0 * cosine)


def _direction(images: np.ndarray, texts: np.ndarray) -> float | None:
    lengths = np.linalg.norm(images), np.linalg.norm(texts)
    return None if min(lengths) < NO_DIRECTION else float(images @ texts / (lengths[0] * lengths[1]))


def load_lpips(backbone: str) -> Callable[[Pictures], float | None]:
    """LPIPS of what shall stay, as published: masked pixels are -1 in both pictures.

    Raises:
        ModelError: torchmetrics or torchvision is missing, or the weights cannot be fetched.
    """
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric: Any = LearnedPerceptualImagePatchSimilarity(net_type=backbone, normalize=False)  # type: ignore[arg-type]
    except Exception as error:  # a missing package, or whatever a download raises
        raise ModelError(
            f"LPIPS cannot be loaded: {describe(error)}. Install torchmetrics and torchvision, and let torchvision "
            "fetch the weights of SqueezeNet"
        ) from error

    def measure(pictures: Pictures) -> float | None:
        if pictures.region is None or pictures.region.all():
            return None
        kept = [
            torch.from_numpy(picture * ~pictures.region[..., None]).movedim(-1, 0)[None].float() / 127.5 - 1
            for picture in (pictures.source, pictures.result)
        ]
        with torch.inference_mode():
            return float(metric(*kept))

    return measure
