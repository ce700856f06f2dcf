"""The section that names a judge, of an evaluation or of a job's gates."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pipeline.remote.server import host_of, key_from, plain_address, without_a_key
from pipeline.settings.sections import Location, Section

EXTRA = ("httpx2", "json_repair")
"""Packages that asking a judge takes, of the extra `evaluate`."""
HOW_IT_IS_ASKED = ("key_env", "concurrency", "timeout_s", "tries", "max_failed")
"""Settings that decide no answer."""
PLUG_IN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


class JudgeConfig(Section):
    """A vision-language model that says how good an edit is."""

    kind: Literal["openai", "transformers"] | Annotated[str, Field(pattern=PLUG_IN)] = "openai"
    """openai: an endpoint that speaks OpenAI's protocol; transformers: a checkpoint that the command's own process
    loads; or "package.module:factory" of one's own, which is called with this section and returns an object with
    `answer(question)` (judging/asking.py)."""
    base_url: str = "http://127.0.0.1:8000/v1"
    """Of the endpoint, up to and without /chat/completions."""
    model: Location
    """As the endpoint names it; of kind transformers, a folder or a hub id."""
    revision: str | None = None
    """As one states it; what the endpoint answers is kept beside it. Of kind transformers, that of the hub id."""
    key_env: str = "JUDGE_API_KEY"
    """Name of the environment variable with the key. The key itself stands in no file."""
    protocol: Literal["viescore", "imgedit", "editscore", "pairwise"] = "viescore"
    """What is asked, and how answers are read. pairwise: which of two methods' results is better, in both orders."""
    prompts: Location | None = None
    """Folder with texts of one's own, such as viescore_sc.txt; none: ours, which no published table was made with."""
    passes: int = Field(default=1, ge=1, le=100)
    """Times that everything is asked, with seeds one after the other."""
    concurrency: int = Field(default=8, ge=1, le=1024)
    """Requests in flight, over the whole run."""
    timeout_s: float = Field(default=120, gt=0)
    """Seconds until an answer counts as lost."""
    tries: int = Field(default=4, ge=1, le=20)
    """Requests per question, at most."""
    temperature: float = Field(default=0, ge=0)
    """Of the judge."""
    max_tokens: int = Field(default=1400, ge=1)
    """Of an answer."""
    seed: int | None = None
    """Of the first pass; none: not sent."""
    image: Literal["png", "jpeg75"] = "png"
    """How pictures are sent. jpeg75: as the official scripts do."""
    max_side: Annotated[int, Field(ge=32)] | None = None
    """Longer side of a picture that is sent, in pixels; none: as it is."""
    max_failed: float = Field(default=0.05, ge=0, le=1)
    """Share of 200 rows or more that may have no score; more ends the command with exit code 3."""

    @field_validator("*", mode="after")
    @classmethod
    def _holds_no_key(cls, value: Any) -> Any:
        return without_a_key(value)

    @field_validator("base_url")
    @classmethod
    def _is_plain(cls, value: str) -> str:
        return plain_address(value)

    @property
    def scores_rows(self) -> bool:
        """Whether each result is judged by itself."""
        return self.protocol != "pairwise"

    @property
    def host(self) -> str:
        """Of the endpoint."""
        return host_of(self.base_url)

    @property
    def whereabouts(self) -> str:
        """Who answers: the endpoint's host, or the kind."""
        return self.host if self.kind == "openai" else self.kind

    def key(self) -> str:
        """From the environment; may be empty for an endpoint on this machine.

        Raises:
            ValueError: it is missing.
        """
        return key_from(self.key_env, self.host)
