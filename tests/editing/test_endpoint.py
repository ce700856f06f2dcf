"""`endpoint`: what is sent, what may come back, a mask of what changed, and what it refuses."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.answering import servers_without_a_run
from pipeline.editing.endpoint import Endpoint
from pipeline.editor import Editor
from pipeline.engine.calls import AskServer, DecodeLatents, EncodeImage, Steps
from pipeline.engine.engine import Engine
from pipeline.errors import AnswerError, PrepareError, RecipeError, ServerError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.models.absent import NoModel
from pipeline.recipe import recipe_from
from pipeline.records import EditedPixels, EditRequest, Source
from pipeline.remote.pictures import Prices, Spent
from tests.edit_server import EditServer, Reply, edit_server, encoded, with_red_corner
from tests.facts import EditorFacts
from tests.methods import analytic, source

FACTS = EditorFacts(rows=0, served_elsewhere=True)
SIDE = 32  # pixels
REQUEST = EditRequest(instruction="put a hat on the dog")
NOISE = {"method": "noise", "num_steps": 1}
FILTERED = json.dumps({"error": {"message": "no", "code": "moderation_blocked"}}).encode()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.remote.tries.growing", lambda _: 0.01)


@pytest.fixture
def server() -> Iterator[EditServer]:
    with edit_server() as running:
        yield running


def image(number: int = 0, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 200, (height, width, 3), dtype=np.uint8)


def given(pixels: np.ndarray, seed: int = 0, mask: np.ndarray | None = None) -> Source:
    """An image where there is no model."""
    latents = torch.zeros((1, pixels.shape[0] // 8, pixels.shape[1] // 8))
    return replace(source(analytic(), 1), latents=latents, pixels=pixels, mask=mask, seed=seed)


def steps(server: EditServer, pixels: np.ndarray, seed: int = 0, mask: Any = None, **settings: Any) -> Steps[Any]:
    editor = Endpoint(base_url=server.url, model="fake", **settings)
    trajectory = yield from NoiseStart(num_steps=1).invert(replace(given(pixels, seed, mask), draw_noise=zeros))
    return (yield from editor.edit(trajectory, REQUEST))


def zeros() -> torch.Tensor:
    return torch.zeros((1, 4, 4))


def edited(server: EditServer, pixels: np.ndarray, **settings: Any) -> EditedPixels:
    engine = Engine(NoModel(SIDE), asker=servers_without_a_run())
    found: EditedPixels = engine.run_one(steps(server, pixels, **settings))
    assert engine.stats.network_rows == 0
    return found


def test_the_server_gets_image_and_instruction_and_its_picture_is_the_result(
    server: EditServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDIT_API_KEY", "sk-PLANTED-SECRET-4711")
    pixels = image()
    found = edited(server, pixels, fields={"quality": "low"}, price_text_tokens=5, price_image_tokens=10)
    assert found.pixels.tolist() == np.asarray(_red(pixels)).tolist()
    assert server.forms == [
        {
            "prompt": REQUEST.instruction,
            "model": "fake",
            "n": "1",
            "size": "auto",
            "response_format": "b64_json",
            "quality": "low",
        }
    ]
    assert server.headers[0]["Authorization"] == "Bearer sk-PLANTED-SECRET-4711"
    assert found.answer.model == "fake"
    assert found.answer.spent == Spent(requests=1, input_tokens=30, output_tokens=7, cost=pytest.approx(250e-6))


def _red(pixels: np.ndarray) -> np.ndarray:
    made = pixels.copy()
    made[: len(made) // 2, : made.shape[1] // 2] = (255, 0, 0)
    return made


def test_the_mask_is_where_the_picture_differs_and_empty_where_it_does_not(server: EditServer) -> None:
    (mask,) = edited(server, image()).masks
    assert mask.tolist() == [[row < 2 and column < 2 for column in range(4)] for row in range(4)]
    same = image(3)
    server.script = lambda *_: Reply(picture=encoded(same))
    assert not edited(server, same).masks.any()


def test_a_mask_is_sent_transparent_where_to_edit_and_kept_to(server: EditServer) -> None:
    half = np.zeros((SIDE, SIDE), dtype=np.float32)
    half[:, : SIDE // 4] = 1.0
    pixels = image()
    found = edited(server, pixels, mask=half, size="canvas")
    (sent,) = server.masks
    assert (sent[:, : SIDE // 4, 3] == 0).all()
    assert (sent[:, SIDE // 4 :, 3] == 255).all()
    assert (found.pixels[:, SIDE // 4 :] == pixels[:, SIDE // 4 :]).all()
    assert (found.pixels[: SIDE // 2, : SIDE // 4] == (255, 0, 0)).all()
    assert server.forms[0]["size"] == f"{SIDE}x{SIDE}"


def test_a_picture_of_another_size_is_scaled_and_one_of_another_shape_is_refused(server: EditServer) -> None:
    large = encoded(np.full((3 * SIDE, 3 * SIDE, 3), 90, dtype=np.uint8))
    server.script = lambda *_: Reply(picture=large)
    assert (edited(server, image()).pixels == 90).all()
    server.script = lambda *_: Reply(picture=encoded(image(1, SIDE, 2 * SIDE)))
    with pytest.raises(AnswerError, match="sent 64 x 32 pixels for a picture of 32 x 32") as error:
        edited(server, image())
    assert error.value.spent.requests == 1, "it was paid for"
    assert len(server.at) == 2, "and asking again would bring the same"


@pytest.mark.parametrize(
    "first",
    [
        Reply(status=500),
        Reply(status=503, body=b"<html>"),
        Reply(body=b"{no json"),
        Reply(body=b"[]"),
        Reply(body=b'{"data": []}'),
        Reply(body=b'{"data": [{"b64_json": "!!"}]}'),
        Reply(picture=b"no picture"),
        Reply(picture=encoded(image(1))[:200]),
        Reply(cut=True),
        Reply(status=429, headers={"Retry-After": "0"}),
    ],
    ids=["500", "503", "no json", "list", "empty", "base64", "no image", "cut image", "cut", "429"],
)
def test_what_may_pass_is_asked_again_and_its_cost_counts(server: EditServer, first: Reply) -> None:
    server.script = lambda prompt, attempt: first if attempt == 0 else Reply()
    found = edited(server, image(), price_picture=0.5)
    told = first.body is None and first.status == 200 and not first.cut
    assert found.answer.spent.requests == len(server.at) == 2
    answered = 2 if told or first.body == b'{"data": []}' or b"!!" in (first.body or b"") else 1
    assert found.answer.spent.cost == pytest.approx(0.5 * answered), "an answer of no use is paid for, an error is not"


@pytest.mark.parametrize(
    ("reply", "reason", "requests"),
    [
        (Reply(status=500), r"\(http_500\): it answered http 500", 3),
        (Reply(status=400, body=FILTERED), r"\(content_filter\): its filter refused", 1),
        (Reply(body=b'{"error": {"code": "content_policy_violation"}}'), r"\(content_filter\)", 1),
        (Reply(status=422), r"\(http_422\)", 1),
        (Reply(picture=b"no picture"), r"\(no_image\): what it sent cannot be decoded", 3),
        (Reply(seconds=1.5), r"\(timeout\): it did not answer within editing.timeout_s", 3),
        (Reply(url="http://elsewhere.example/x.png"), r"\(url_elsewhere\).*editing\.url_hosts", 1),
        (Reply(url="file:///etc/passwd"), r"\(url_elsewhere\)", 1),
    ],
    ids=["500", "filter", "filter in 200", "422", "no image", "slow", "other host", "file"],
)
def test_an_image_without_a_picture_is_refused_with_the_reason(
    server: EditServer, reply: Reply, reason: str, requests: int
) -> None:
    server.script = lambda *_: reply
    with pytest.raises(AnswerError, match=reason) as error:
        edited(server, image(), tries=3, timeout_s=0.4 if reply.seconds else 20)
    assert len(server.at) == requests == error.value.spent.requests
    assert "127.0.0.1" not in str(error.value)
    assert "elsewhere.example" not in str(error.value)


def test_a_picture_is_fetched_from_the_servers_own_host_without_the_key(
    server: EditServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDIT_API_KEY", "PLANTED")
    server.script = lambda *_: Reply(url="own")
    assert (edited(server, image(), response_format="url").pixels[0, 0] == (255, 0, 0)).all()
    (headers,) = server.fetched
    assert "PLANTED" not in str(headers)


def test_a_wrong_key_or_a_spent_quota_ends_everything_without_another_try_and_without_the_key(
    server: EditServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDIT_API_KEY", "PLANTED-SECRET")
    quota = json.dumps({"error": {"message": "spent: PLANTED-SECRET", "code": "insufficient_quota"}}).encode()
    for reply, words in (
        (Reply(status=401, body=b'{"error": "no PLANTED-SECRET"}'), "answers 401.*editing.base_url"),
        (Reply(status=429, body=quota), "quota is spent"),
        (Reply(status=400), "400"),
    ):
        asked = len(server.at)
        server.script = lambda *_, reply=reply: reply
        engine = Engine(NoModel(SIDE), asker=servers_without_a_run())
        both = [steps(server, image(number), concurrency=1) for number in (1, 2)]
        with pytest.raises(ServerError, match=words) as error:
            list(engine.run(both))
        assert len(server.at) == asked + 1
        assert "SECRET" not in str(error.value)
        with pytest.raises(ServerError):
            engine.run_one(steps(server, image(3)))


def test_a_rate_limit_slows_all_by_as_much_as_the_server_asks(server: EditServer) -> None:
    server.script = lambda *_: Reply(status=429, headers={"Retry-After": "1"}) if len(server.at) == 1 else Reply()
    engine = Engine(NoModel(SIDE), asker=servers_without_a_run())
    found = list(engine.run(steps(server, image(number), concurrency=1) for number in range(3)))
    assert [one.error for one in found] == [None] * 3
    assert server.at[1] - server.at[0] >= 0.95


def test_rows_of_the_model_go_on_while_a_server_is_slow_and_no_more_requests_are_in_flight_than_may_be(
    server: EditServer,
) -> None:
    """The engine takes a picture of the model's, and does not wait for the server that was asked before."""
    server.script = lambda *_: Reply(seconds=0.6)

    def by_model(number: int) -> Steps[Any]:
        latents = yield EncodeImage(image(number))
        return (yield DecodeLatents(latents))

    engine = Engine(analytic(), asker=servers_without_a_run(), images_in_flight=8)
    slow = [steps(server, image(number), concurrency=2) for number in range(4)]
    order = [one.index for one in engine.run([*slow, by_model(1), by_model(2)])]
    assert set(order[:2]) == {4, 5}
    assert server.most_in_flight == 2


def test_waiting_for_a_server_takes_no_processor_time(server: EditServer) -> None:
    server.script = lambda *_: Reply(seconds=1.5)
    began, cpu = time.monotonic(), time.process_time()
    edited(server, image())
    assert time.monotonic() - began >= 1.5
    assert time.process_time() - cpu < 0.75


def test_rows_and_attempts_are_questions_of_their_own_and_one_of_them_is_asked_once(server: EditServer) -> None:
    engine = Engine(NoModel(SIDE), asker=servers_without_a_run())
    for seed in (1, 2, 1):
        engine.run_one(steps(server, image(), seed))
    assert list(server.asked.values()) == [2]


def test_what_nobody_waits_for_any_more_is_not_asked(server: EditServer) -> None:
    server.script = lambda *_: Reply(seconds=0.3)
    engine = Engine(NoModel(SIDE), asker=servers_without_a_run(), images_in_flight=8)
    with closing(engine.run(steps(server, image(number), concurrency=1) for number in range(6))) as running:
        next(running)
    time.sleep(1.0)
    assert len(server.at) <= 2, "the one that was fetched, and the one that was on its way"


def test_prices_take_tokens_of_an_untold_kind_for_the_dearer_one_and_odd_usage_for_none() -> None:
    prices = Prices(text_tokens=5, image_tokens=10, output_tokens=40)
    assert prices.of({"input_tokens": 1_000_000, "output_tokens": 100_000}).cost == pytest.approx(10 + 4)
    details = {"input_tokens": 3_000_000, "input_tokens_details": {"text_tokens": 1_000_000}}
    assert prices.of(details).cost == pytest.approx(5 + 2 * 10)
    assert prices.of({"input_tokens": -5, "output_tokens": "many", "input_tokens_details": []}).cost == 0
    assert Prices().of({"input_tokens": 7}) == Spent(input_tokens=7)
    assert (Spent(requests=1, cost=0.5) + Spent(requests=2)) == Spent(requests=3, cost=0.5)


def test_python_edits_by_a_server_without_a_model(server: EditServer) -> None:
    editing = {"method": "endpoint", "base_url": server.url, "model": "fake"}
    picture = image(5, 48, 64)
    with Editor.load("none", size=64) as editor:
        result = editor.edit(picture, instruction="a hat", inversion=NOISE, editing=editing, fit="bucket")
        assert np.asarray(result.image).shape == (48, 64, 3)
        with pytest.raises(RecipeError, match=r"reads a model, and model\.name none stands for no model"):
            editor.edit(picture, "a hat")
        server.script = lambda *_: Reply(status=422)
        with pytest.raises(AnswerError, match="http_422"):
            editor.edit(picture, instruction="a scarf", inversion=NOISE, editing=editing)


def test_an_engine_without_anybody_who_asks_says_so() -> None:
    def asking() -> Steps[Any]:
        return (yield AskServer(None))  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="was given nobody who does"):
        Engine(NoModel(SIDE)).run_one(asking())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_url": "http://u:p@host/v1"}, "user, a password"),
        ({"base_url": "ftp://host"}, "no address"),
        ({"model": "sk-abcdefgh12345"}, "looks like a key"),
        ({"fields": {"note": "Bearer abc"}}, "looks like a key"),
        ({"fields": {"api_key": "x"}}, "comes from the environment alone"),
        ({"fields": {"n": "4"}}, "sets itself"),
        ({"size": "large"}, "WIDTHxHEIGHT"),
        ({"key_env": "my key"}, "no name of an environment variable"),
        ({"model": ""}, "model is not given"),
    ],
)
def test_a_recipe_that_cannot_work_or_holds_a_secret_is_refused(settings: dict[str, Any], words: str) -> None:
    data = {"source": {"shards": "x"}, "sink": {"folder": "y"}, "model": {"name": "none"}, "inversion": NOISE}
    with pytest.raises(RecipeError, match=words):
        recipe_from({**data, "editing": {"method": "endpoint", "model": "m", **settings}})


def test_gates_on_figures_that_a_servers_picture_has_not_are_refused() -> None:
    data = {"source": {"shards": "x"}, "sink": {"folder": "y"}, "model": {"name": "none"}, "inversion": NOISE}
    data |= {"editing": {"method": "endpoint", "model": "m"}, "gates": {"preset": "none", "edit_change": {"min": 40}}}
    with pytest.raises(RecipeError, match=r"gates\.edit_change: a server's picture has been through no autoencoder"):
        recipe_from(data)


def test_what_it_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = Endpoint(model="m")
    with pytest.raises(PrepareError, match="sends an instruction, and this edit has none"):
        editor.check(EditRequest(target_prompt="a dog"), NoiseStart())
    with pytest.raises(PrepareError, match="leaves no place for the edit's negative_prompt"):
        editor.check(REQUEST.model_copy(update={"negative_prompt": "snow"}), NoiseStart())
    assert not Endpoint.fits(DDIMInversion)
    monkeypatch.delenv("EDIT_API_KEY", raising=False)
    with pytest.raises(ServerError, match=r"EDIT_API_KEY is empty, and api\.example asks for a key"):
        Endpoint(base_url="https://api.example/v1", model="m").server.opened()


def test_the_tests_own_server_makes_a_corner_red() -> None:
    assert with_red_corner(encoded(image())) == encoded(_red(image()))
