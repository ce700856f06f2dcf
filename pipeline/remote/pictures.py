"""A server that edits pictures: OpenAI's `POST /images/edits`, what is sent, what may come back, and what it cost.

One picture per request. An answer is stored before it is used, whatever it is: a server is paid for it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from pipeline.common.wording import count
from pipeline.errors import AnswerError, RowError, ServerError
from pipeline.remote.interview import Interview
from pipeline.remote.journal import Journal, Store
from pipeline.remote.server import Server, host_of, key_from
from pipeline.remote.tries import PassingError, RowFailedError, is_filtered, retried

if TYPE_CHECKING:
    from pipeline.remote.client import Client  # whose library is that of an extra

PNG_LEVEL = 1  # of zlib, 0..9: what is sent once need not be small
MILLION = 1_000_000  # tokens that a price is of


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What answers have cost. Requests that failed count; tokens are those that a server told."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None  # in the currency of the prices; None: no price is named

    def __add__(self, other: Spent) -> Spent:
        """Of both together."""
        costs = [one.cost for one in (self, other) if one.cost is not None]
        return Spent(
            requests=self.requests + other.requests,
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cost=sum(costs) if costs else None,
        )


def added(one: Mapping[str, Spent], other: Mapping[str, Spent]) -> dict[str, Spent]:
    """By method, of both together."""
    both = {name: one[name] + more if name in one else more for name, more in other.items()}
    return dict(sorted({**one, **both}.items()))


def spent_in_words(by_method: Mapping[str, Spent]) -> str:
    """What all methods together took: "12 requests, 3,456 tokens read and 789 written, cost 0.1234"."""
    spent = reduce(Spent.__add__, by_method.values(), Spent())
    tokens = f"{spent.input_tokens:,} tokens read and {spent.output_tokens:,} written"
    cost = "no price is named" if spent.cost is None else f"cost {spent.cost:,.4f}"
    return f"{count(spent.requests, 'request')}, {tokens}, {cost}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What a server takes, in any one currency; None: nothing, or not known."""

    text_tokens: float | None = None  # a million, read
    image_tokens: float | None = None  # a million, read
    output_tokens: float | None = None  # a million, written
    picture: float | None = None  # each

    def of(self, usage: Mapping[str, Any]) -> Spent:
        """What an answer cost that tells this usage."""
        details = usage.get("input_tokens_details")
        details = details if isinstance(details, Mapping) else {}
        read, written = _count(usage, "input_tokens"), _count(usage, "output_tokens")
        text, image = _count(details, "text_tokens"), _count(details, "image_tokens")
        # Tokens whose kind is not told cost what the dearer kind does.
        dearer = max(self.text_tokens or 0.0, self.image_tokens or 0.0)
        by_token = text * (self.text_tokens or 0.0) + image * (self.image_tokens or 0.0)
        by_token += max(0, read - text - image) * dearer + written * (self.output_tokens or 0.0)
        cost = by_token / MILLION + (self.picture or 0.0)
        return Spent(requests=0, input_tokens=read, output_tokens=written, cost=cost if self.are_named else None)

    @property
    def are_named(self) -> bool:
        """Whether there is any."""
        return any(one is not None for one in (self.text_tokens, self.image_tokens, self.output_tokens, self.picture))


def _count(usage: Mapping[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureServer:
    """Which server edits, and how it is asked."""

    base_url: str
    model: str
    key_env: str
    concurrency: int
    timeout_s: float
    tries: int
    size: str  # "auto", "canvas" for that of what is sent, or WIDTHxHEIGHT
    response_format: str | None
    fields: tuple[tuple[str, str], ...]  # of the form, beside those above
    url_hosts: tuple[str, ...]  # beside its own, from which answers may be fetched
    prices: Prices

    def opened(self) -> Server:
        """With its key.

        Raises:
            ServerError: that is missing.
        """
        try:
            key = key_from(self.key_env, host_of(self.base_url))
        except ValueError as error:
            raise ServerError(f"editing: {error}. Set it, and start again") from None
        return Server(
            base_url=self.base_url,
            key=key,
            key_env=self.key_env,
            section="editing",
            concurrency=self.concurrency,
            timeout_s=self.timeout_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PictureQuestion:
    """One picture to be edited. No two rows, edits or attempts of a run ask the same: `seed` tells them apart."""

    server: PictureServer
    prompt: str
    pixels: UInt8[np.ndarray, "H W 3"]
    mask: Float[np.ndarray, "H W"] | None  # in [0, 1], 1 where it may be edited; None: everywhere
    seed: int

    def stem(self) -> str:
        """Of its file in a journal: what decides the answer, and whose it is."""
        server = self.server
        sizes = [server.base_url, server.model, server.size, server.response_format, list(map(list, server.fields))]
        mask = None if self.mask is None else hashlib.sha256(_alpha(self.mask).tobytes()).hexdigest()
        picture = [list(self.pixels.shape), hashlib.sha256(self.pixels.tobytes()).hexdigest(), mask]
        told = json.dumps([sizes, self.prompt, picture, self.seed], sort_keys=True)
        return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()

    def form(self) -> dict[str, Any]:
        """What is sent, as httpx takes it: the form's fields and files, and no name of anything."""
        server = self.server
        height, width = self.pixels.shape[:2]
        data = {
            "prompt": self.prompt,
            "model": server.model,
            "n": "1",
            "size": f"{width}x{height}" if server.size == "canvas" else server.size,
            **({} if server.response_format is None else {"response_format": server.response_format}),
            **dict(server.fields),
        }
        files = {"image": ("image.png", _png(Image.fromarray(self.pixels)), "image/png")}
        if self.mask is not None:  # transparent where the server is to edit
            masked = np.dstack([self.pixels, 255 - _alpha(self.mask)])
            files["mask"] = ("mask.png", _png(Image.fromarray(masked)), "image/png")
        return {"data": data, "files": files}


def _alpha(mask: Float[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    return np.round(mask * 255).astype(np.uint8)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureOutcome:
    """What came of a question."""

    picture: bytes  # encoded, as it was sent; b"": there is none
    reason: str  # the class of why there is none
    is_final: bool  # whether the server has answered, so that another request would be another answer
    model: str  # as the server names it
    spent: Spent


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureAnswer:
    """An edited picture, of whatever size."""

    pixels: UInt8[np.ndarray, "H W 3"]
    model: str
    spent: Spent


Decode = Callable[[bytes], UInt8[np.ndarray, "H W 3"]]
"""Encoded bytes of strangers to pixels; raises RowError of what is no picture."""


@dataclass(slots=True)
class _Attempts:
    """One question on its way to a picture."""

    client: Client
    question: PictureQuestion
    decode: Decode
    spent: Spent = field(default_factory=Spent)
    model: str = ""
    is_final: bool = False  # whether any request was answered

    def outcome(self, sleep: Callable[[float], None]) -> PictureOutcome:
        picture, reason = b"", ""
        try:
            picture = retried(self._attempt, tries=self.question.server.tries, sleep=sleep)
        except (PassingError, RowFailedError) as error:
            reason = str(error)
            self.is_final = self.is_final or isinstance(error, RowFailedError)
        return PictureOutcome(
            picture=picture, reason=reason, is_final=self.is_final, model=self.model, spent=self.spent
        )

    def _attempt(self) -> bytes:
        question = self.question
        self.spent += Spent(requests=1)
        data = self.client.post("/images/edits", **question.form())
        usage = data.get("usage")
        self.spent += question.server.prices.of(usage if isinstance(usage, Mapping) else {})
        self.model, self.is_final = str(data.get("model") or question.server.model), True
        picture = self._picture(data)
        try:
            self.decode(picture)
        except RowError as error:
            raise PassingError("no_image") from error
        return picture

    def _picture(self, data: Mapping[str, Any]) -> bytes:
        if isinstance(error := data.get("error"), Mapping) and is_filtered(str(error.get("code")), str(error)):
            raise RowFailedError("content_filter")
        pictures = data.get("data")
        first = pictures[0] if isinstance(pictures, list) and pictures else None
        if not isinstance(first, Mapping):
            raise PassingError("empty")
        encoded, url = first.get("b64_json"), first.get("url")
        if isinstance(encoded, str) and encoded:
            try:
                return base64.b64decode(encoded, validate=True)
            except (binascii.Error, ValueError) as error:
                raise PassingError("bad_base64") from error
        if not isinstance(url, str) or not url:
            raise PassingError("empty")
        return self._fetched(url)

    def _fetched(self, url: str) -> bytes:
        server = self.question.server
        try:
            host = host_of(url)
        except ValueError:
            host = ""
        if not url.startswith(("http://", "https://")) or host not in (host_of(server.base_url), *server.url_hosts):
            raise RowFailedError("url_elsewhere")
        return self.client.get(url)


WORDS = {
    "content_filter": "its filter refused the picture or the instruction",
    "url_elsewhere": "it sent an address on another host, which is not fetched. List the host in editing.url_hosts",
    "no_image": "what it sent cannot be decoded as a picture",
    "empty": "its answer holds no picture",
    "bad_body": "its answer is no JSON object",
    "bad_base64": "its answer holds damaged base64",
    "too_large": "its answer is too large",
    "timeout": "it did not answer within editing.timeout_s",
    "connection": "the connection failed",
}
"""Why a server gave no picture, by class; what is not here is an HTTP status."""


class Servers:
    """All servers that a process asks for pictures, each with threads and a limiter of its own.

    Args:
        decode: of answers.
        store: of answers, which all processes of a run share.
        asks: whether servers are asked; else what is in the store must do.
    """

    def __init__(self, decode: Decode, store: Store, *, asks: bool = True) -> None:
        self._decode, self._store, self._asks = decode, store, asks
        self._interviews: dict[PictureServer, Interview[PictureQuestion, PictureOutcome]] = {}
        self._lock = threading.Lock()

    def begin(self, question: PictureQuestion) -> Future[PictureAnswer]:
        """Ask for a picture, which is there later. From any thread.

        The future raises AnswerError where there is none, and ServerError where the server cannot be asked.
        """
        return self._interview(question.server).begin(question, self._answer_of)

    def end(self) -> None:
        """Ask nothing any more: what waits raises. From any thread."""
        with self._lock:
            for interview in self._interviews.values():
                interview.end()

    def _interview(self, server: PictureServer) -> Interview[PictureQuestion, PictureOutcome]:
        with self._lock:
            if server not in self._interviews:
                self._interviews[server] = self._opened(server)
            return self._interviews[server]

    def _opened(self, server: PictureServer) -> Interview[PictureQuestion, PictureOutcome]:
        journal = Journal(
            self._store,
            stem=PictureQuestion.stem,
            write=_as_json,
            read=_outcome_of,
            failed=lambda outcome: not outcome.picture,
        )
        clients: list[Client] = []

        def ask(question: PictureQuestion) -> PictureOutcome:
            if not self._asks:
                raise AnswerError(
                    "the server's answer is no longer in the run's _answers/, and a server makes no picture twice, bit "
                    "for bit. Nothing was asked"
                )
            return _Attempts(clients[0], question, self._decode).outcome(interview.sleep)

        interview = Interview(
            ask, journal, server.concurrency, is_kept=lambda outcome: outcome.is_final, name="picture-server"
        )
        if self._asks:
            from pipeline.remote.client import Client

            clients.append(Client(server.opened(), interview.sleep, proven=not journal.is_empty))
        return interview

    def _answer_of(self, outcome: PictureOutcome) -> PictureAnswer:
        if not outcome.picture:
            words = WORDS.get(outcome.reason, f"it answered {outcome.reason.replace('_', ' ')}")
            raise AnswerError(f"the server gave no picture ({outcome.reason}): {words}", outcome.spent)
        return PictureAnswer(pixels=self._decode(outcome.picture), model=outcome.model, spent=outcome.spent)


def _as_json(outcome: PictureOutcome) -> bytes:
    return json.dumps(asdict(outcome) | {"picture": base64.b64encode(outcome.picture).decode()}).encode()


def _outcome_of(data: bytes) -> PictureOutcome:
    known = json.loads(data)
    return PictureOutcome(
        picture=base64.b64decode(known["picture"]),
        reason=str(known["reason"]),
        is_final=bool(known["is_final"]),
        model=str(known["model"]),
        spent=Spent(**known["spent"]),
    )
