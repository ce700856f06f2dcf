"""A judge that is loaded here: a vision-language model of transformers.

Asked are the same questions as over HTTP, the pictures before the text, as such models are tuned. Cost: one generation
per question, one after the other, so that no answer depends on what it was asked beside.
"""

from __future__ import annotations

import io
import threading

import numpy as np
from PIL import Image
from typing_extensions import override

from pipeline.evaluation.judging.asking import Answer, Judge
from pipeline.evaluation.judging.questions import Question
from pipeline.models.vision_language import VisionLanguageModel, load_vision_language
from pipeline.settings.judge import JudgeConfig

MOST_TOKENS = 512  # of an answer, as the official scripts let their local judge write


class LocalJudge(Judge):
    """May be asked by many threads, and answers one at a time. Loads its model with the first question: where all are
    answered it is not needed.

    Args:
        config: of the judge; `model` is a folder or a hub id.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._model: VisionLanguageModel | None = None
        self._lock = threading.Lock()

    @override
    def answer(self, question: Question) -> Answer:
        pictures = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in question.pictures]
        config = self._config
        with self._lock:
            if self._model is None:
                self._model = load_vision_language(config.model, config.revision)
            reported = self._model.reported
            said = self._model.answer(
                question.text,
                pictures,
                max_tokens=min(config.max_tokens, MOST_TOKENS),
                temperature=config.temperature,
                seed=(config.seed or 0) + question.run,
            )
        return Answer(
            text=said.text,
            finish_reason="length" if said.is_cut else "stop",
            model_reported=reported,
            prompt_tokens=said.prompt_tokens,
            completion_tokens=said.completion_tokens,
        )
