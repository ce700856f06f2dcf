"""A judge behind an endpoint that speaks OpenAI's protocol: what is sent, and what an answer says."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from pipeline.evaluation.judging.asking import Answer, Judge, server_of
from pipeline.evaluation.judging.questions import Question
from pipeline.remote.client import Client
from pipeline.remote.tries import PassingError, RowFailedError
from pipeline.settings.judge import JudgeConfig


class Endpoint(Judge):
    """Sends single requests; may be used by many threads at once.

    Args:
        config: of the judge.
        wait: sleeps some seconds, and ends early, by an exception, where the run ends.
        proven: it has answered before, so that a 400 is a question's own fault.
    """

    def __init__(
        self, config: JudgeConfig, wait: Callable[[float], None] = time.sleep, *, proven: bool = False
    ) -> None:
        self._config = config
        self._client = Client(server_of(config), wait, proven=proven)

    @override
    def answer(self, question: Question) -> Answer:
        began = time.monotonic()
        data = self._client.post("/chat/completions", json=body_of(question, self._config))
        try:
            choice = data["choices"][0]
            content, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise PassingError("bad_body") from error
        if choice.get("finish_reason") == "content_filter":
            raise RowFailedError("content_filter")
        told = data.get("usage")
        usage = told if isinstance(told, dict) else {}
        refused = isinstance(refusal, str) and bool(refusal) and not _text(content)
        return Answer(
            text=refusal if refused else _text(content),
            finish_reason="refusal" if refused else str(choice.get("finish_reason") or "stop"),
            model_reported=str(data.get("model") or ""),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            latency_ms=round(1000 * (time.monotonic() - began), 1),
        )


def body_of(question: Question, config: JudgeConfig) -> dict[str, Any]:
    """What is sent: the text before the pictures, and no name of anything."""
    kind = "png" if config.image == "png" else "jpeg"
    pictures = [
        {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(one).decode()}"}}
        for one in question.pictures
    ]
    seed = {} if config.seed is None else {"seed": config.seed + question.run}
    return {
        "model": config.model,
        "messages": [{"role": "user", "content": [{"type": "text", "text": question.text}, *pictures]}],
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "stream": False,
        **seed,
    }


def _text(content: Any) -> str:
    """An answer's text, which some endpoints send in parts."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""
