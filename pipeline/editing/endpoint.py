"""Editing by a server that speaks OpenAI's protocol: `POST {base_url}/images/edits` (OpenAI's API reference, Images).

The server gets the image, the edit's instruction and, of a row that brings one, the mask; what it answers is the
result. No model is read: a recipe of this method alone takes `model.name: none`.

Cost: one request per result, and no network row. Masks: one, where the result differs from the image. Exactness: what
the server does; its answer is kept, and cannot be had a second time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from typing_extensions import override

from pipeline.diffusion.masks import above_otsu
from pipeline.editing.base import EditingMethod
from pipeline.editing.problems import Problem
from pipeline.engine.calls import AskServer, Steps
from pipeline.errors import AnswerError, EditError
from pipeline.inversion.base import Inversion
from pipeline.records import EditedPixels, EditRequest, InversionPrompts, ServerAnswer, Trajectory
from pipeline.remote.pictures import PictureAnswer, PictureQuestion, PictureServer, Prices
from pipeline.remote.server import plain_address, without_a_key

HOW_IT_IS_ASKED = ("key_env", "concurrency", "timeout_s", "tries")
"""Settings that decide no answer."""
OURS = ("image", "mask", "prompt", "model", "n", "size", "response_format", "stream")
"""Fields of the form that are not the recipe's to give."""
SHAPE = 0.02  # share by which an answer's shape may differ: sides are rounded to what a server can make
Price = Annotated[float, Field(ge=0)] | None


class Endpoint(EditingMethod):
    """Ask a server for every edit."""

    needs: ClassVar = frozenset({"levels alone"})
    paper: ClassVar = "OpenAI's API, images/edits"
    reads_model: ClassVar = False

    method: Literal["endpoint"] = "endpoint"
    """Editing by a server that speaks OpenAI's protocol, without a model of one's own."""
    base_url: str = "http://127.0.0.1:8000/v1"
    """Of the server, up to and without /images/edits."""
    model: str = Field(default="", max_length=200)
    """As the server names it; must be given."""
    key_env: str = "EDIT_API_KEY"
    """Name of the environment variable with the key. The key itself stands in no file."""
    size: str = "auto"
    """Of the picture that is asked for: auto, the server's choice; canvas, that of what is sent; or WIDTHxHEIGHT. A
    result of another size is scaled; one of another shape is quarantined."""
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    """What is asked for; null: nothing, for servers that refuse the field. Either is taken."""
    url_hosts: tuple[str, ...] = ()
    """Hosts from which pictures may be fetched where a server answers with addresses, beside its own."""
    fields: dict[str, str] = Field(default_factory=dict, max_length=32)
    """More fields of the form, such as quality: low. They are sent as they are."""
    concurrency: int = Field(default=8, ge=1, le=1024)
    """Requests in flight, of each worker."""
    timeout_s: float = Field(default=300, gt=0)
    """Seconds until an answer counts as lost."""
    tries: int = Field(default=4, ge=1, le=20)
    """Requests per result, at most."""
    price_text_tokens: Price = None
    """Of a million tokens of text that the server reads, in any one currency; none: not counted."""
    price_image_tokens: Price = None
    """Of a million tokens of images that it reads."""
    price_output_tokens: Price = None
    """Of a million tokens that it writes."""
    price_picture: Price = None
    """Of each answer, whatever it holds."""
    cost_at_most: Price = None
    """Of one request, for `shardedit plan` where tokens are paid for: how many it takes is known afterwards."""

    @field_validator("base_url", "model", "key_env", "fields", mode="after")
    @classmethod
    def _holds_no_key(cls, value: Any) -> Any:
        for text in value.values() if isinstance(value, dict) else (value,):
            without_a_key(text)
        return value

    @field_validator("base_url")
    @classmethod
    def _is_plain(cls, value: str) -> str:
        return plain_address(value)

    @field_validator("key_env")
    @classmethod
    def _is_a_variable(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("is no name of an environment variable, such as EDIT_API_KEY. The key itself stands there")
        return value

    @field_validator("size")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        if not re.fullmatch(r"auto|canvas|[1-9][0-9]{1,4}x[1-9][0-9]{1,4}", value):
            raise ValueError(f"should be auto, canvas or WIDTHxHEIGHT such as 1024x1024, is '{value}'")
        return value

    @field_validator("fields")
    @classmethod
    def _are_not_ours(cls, value: dict[str, str]) -> dict[str, str]:
        if taken := sorted(set(value) & set(OURS)):
            raise ValueError(f"holds {', '.join(taken)}, which editing.method endpoint sets itself. Leave it out")
        if secret := sorted(name for name in value if re.search("key|token|secret|authorization", name, re.IGNORECASE)):
            raise ValueError(f"holds {', '.join(secret)}: a key comes from the environment alone. Name it in key_env")
        return value

    @property
    @override
    def guides(self) -> bool:
        return False

    @property
    @override
    def server(self) -> PictureServer:
        return PictureServer(
            base_url=self.base_url,
            model=self.model,
            key_env=self.key_env,
            concurrency=self.concurrency,
            timeout_s=self.timeout_s,
            tries=self.tries,
            size=self.size,
            response_format=self.response_format,
            fields=tuple(sorted(self.fields.items())),
            url_hosts=self.url_hosts,
            prices=self.prices,
        )

    @property
    def prices(self) -> Prices:
        """What the server takes."""
        return Prices(
            text_tokens=self.price_text_tokens,
            image_tokens=self.price_image_tokens,
            output_tokens=self.price_output_tokens,
            picture=self.price_picture,
        )

    @property
    def most_per_request(self) -> float | None:
        """What one request costs at most, as far as the recipe tells; None: it does not."""
        prices = self.prices
        by_token = (prices.text_tokens, prices.image_tokens, prices.output_tokens)
        return self.cost_at_most if any(one is not None for one in by_token) else self.cost_at_most or prices.picture

    @override
    def inverts_under(self, request: EditRequest) -> InversionPrompts:
        return InversionPrompts("")

    @override
    def pair_problems(self, inversion: Inversion) -> Iterator[str]:
        if not self.model:
            yield "model is not given. Name the server's model in editing.model, such as gpt-image-1"

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        if not request.instruction:
            yield Problem(
                "no instruction",
                "endpoint sends an instruction, and this edit has none. Add instruction, such as "
                '"put a hat on the dog"',
            )
        if request.negative_prompt:
            yield Problem(
                "a negative_prompt",
                "endpoint sends an instruction alone, which leaves no place for the edit's negative_prompt. Leave "
                "negative_prompt out, and say in the instruction what shall not be",
            )

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedPixels]:
        """Where a user's mask is black the image stands: servers take a mask for a hint."""
        source = trajectory.source
        if source.pixels is None:
            raise EditError("endpoint sends the image itself, and only its latents are here")
        question = PictureQuestion(
            server=self.server,
            prompt=request.instruction,
            pixels=source.pixels,
            mask=source.mask,
            seed=source.seed,
        )
        answer: PictureAnswer = yield AskServer(question)
        pixels = fitted(answer, source.pixels.shape)
        if source.mask is not None:
            share = source.mask[..., None]
            pixels = np.round(share * pixels + (1.0 - share) * source.pixels).astype(np.uint8)
        change = change_of(source.pixels, pixels, source.size)
        return EditedPixels(
            pixels=pixels,
            masks=above_otsu(change[None], source.of_image),
            answer=ServerAnswer(model=answer.model, spent=answer.spent),
        )


def fitted(answer: PictureAnswer, shape: tuple[int, ...]) -> np.ndarray:
    """A server's picture (H, W, 3) at the canvas's size.

    Raises:
        AnswerError: it is of another shape, and would lie askew on the image.
    """
    (height, width), (rows, columns) = shape[:2], answer.pixels.shape[:2]
    if abs(rows * width / (columns * height) - 1.0) > SHAPE:
        raise AnswerError(
            f"the server sent {columns} x {rows} pixels for a picture of {width} x {height}, which is another shape. "
            "Set editing.size, or a model.size and model.fit whose canvas has the server's shape",
            answer.spent,
        )
    if (rows, columns) == (height, width):
        return answer.pixels
    return np.asarray(Image.fromarray(answer.pixels).resize((width, height), Image.Resampling.LANCZOS))


def change_of(before: np.ndarray, after: np.ndarray, size: tuple[int, int]) -> Tensor:
    """How far two pictures (H, W, 3) differ, by places (h, w): colours are averaged first, which quiets their grain."""
    difference = torch.from_numpy(after.astype(np.float32) - before.astype(np.float32)).permute(2, 0, 1)
    return adaptive_avg_pool2d(difference[None], size)[0].square().sum(dim=0).sqrt()
