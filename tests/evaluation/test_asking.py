"""A judge that is slow, refuses, breaks or babbles: nothing is asked too often, nothing is guessed, nothing is lost."""

from __future__ import annotations

import email.utils
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pipeline.evaluation.items import Item, Result
from pipeline.evaluation.judging.asking import JudgeError
from pipeline.evaluation.judging.judged import Judging
from pipeline.records import Concept, EditRequest
from pipeline.settings.judge import JudgeConfig
from pipeline.writing.rows import encode_png
from tests.evaluation.fake_judge import GOOD, FakeJudge, Reply, Script, fake_judge

QUOTA = json.dumps({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}).encode()
FILTERED = json.dumps({"error": {"message": "filtered", "code": "content_filter"}}).encode()


def rows(count: int) -> list[Result]:
    """Rows to be judged, whose results differ."""

    def picture(number: int) -> bytes:
        return encode_png(np.full((12, 12, 3), number, dtype=np.uint8))

    return [
        Result(
            item=Item(key=f"i{number}", image=picture(0), request=EditRequest(instruction=f"Do {number} {{x}}.")),
            edit="",
            method="m",
            image=picture(number + 1),
        )
        for number in range(count)
    ]


def judging(judge: FakeJudge, folder: Path, **settings: Any) -> Judging:
    config = JudgeConfig(**{"base_url": judge.url, "model": "fake", "tries": 3, "timeout_s": 5, **settings})
    return Judging(config, fsspec.filesystem("file"), str(folder / "journal"))


def judged(script: Script, folder: Path, count: int = 1, **settings: Any) -> tuple[list[dict[str, Any]], FakeJudge]:
    with fake_judge(script) as judge:
        return judging(judge, folder, **settings).columns(rows(count), [""] * count), judge


def test_two_questions_give_three_scores_and_everything_that_made_them(tmp_path):
    (row,), judge = judged(lambda *_: Reply(), tmp_path, seed=3)
    assert (row["judge_sc"], row["judge_pq"]) == (7, 6)
    assert row["judge_overall"] == pytest.approx(42**0.5)
    assert row["judge_sc_raw"] == GOOD["sc"]
    assert row["judge_reasoning_pq"] == "clean"
    assert (row["judge_model_reported"], row["judge_prompts"], row["judge_reason"]) == ("fake-1", "own", None)
    assert len(row["judge_prompt_hash"]) == 2
    assert (row["judge_base_url_host"], row["judge_image_format"]) == ("127.0.0.1", "png")
    sc, pq = sorted(judge.bodies, key=lambda body: -len(body["messages"][0]["content"]))
    assert [part["type"] for part in sc["messages"][0]["content"]] == ["text", "image_url", "image_url"]
    assert "Do 0 {x}." in sc["messages"][0]["content"][0]["text"]
    assert "Do 0" not in pq["messages"][0]["content"][0]["text"]
    assert set(sc) == {"model", "messages", "temperature", "max_tokens", "stream", "seed"}


@pytest.mark.parametrize(
    "first",
    [
        Reply(status=500),
        Reply(status=502, body=b"<html>Bad Gateway</html>"),
        Reply(status=503),
        Reply(body=b"{no json"),
        Reply(body=b'{"object": "x"}'),
        Reply(cut=True),
        Reply(content="no scores here, only words"),
        Reply(content=None, status=429, headers={"Retry-After": "0"}),
        Reply(status=503, headers={"Retry-After": "nan"}),
        Reply(body=b'{"choices": [{"message": "text"}]}'),
    ],
    ids=["500", "502", "503", "no json", "no choices", "cut", "words", "429", "odd wait", "odd message"],
)
def test_what_may_pass_is_asked_again_alone_and_then_counts(tmp_path, first, monkeypatch):
    monkeypatch.setattr("pipeline.remote.tries.growing", lambda _: 0.01)
    (row,), judge = judged(lambda _, part, attempt: first if (part, attempt) == ("sc", 0) else Reply(), tmp_path)
    assert row["judge_overall"] == pytest.approx(42**0.5)
    assert sorted(judge.asked.values()) == [1, 2], "the other question is not asked again"


@pytest.mark.parametrize(
    ("reply", "reason", "requests"),
    [
        (Reply(status=500), "http_500", 3),
        (Reply(body=b"[]"), "bad_body", 3),
        (Reply(content=""), "empty", 2),  # the same again, of a judge without chance: no third time
        (Reply(content="编辑成功得七分。"), "no_json", 2),
        (Reply(content='{"score": [11, 2]}'), "out_of_range", 2),
        (Reply(content='{"score": [7, ', finish_reason="length"), "truncated", 2),
        (Reply(content="Sorry, I cannot judge this."), "refusal", 2),
        (Reply(content="抱歉，我无法评价。"), "refusal", 2),
        (Reply(refusal="This is against the rules."), "refusal", 2),
        (Reply(status=400, body=FILTERED), "content_filter", 1),
        (Reply(content="x", finish_reason="content_filter"), "content_filter", 1),
        (Reply(status=422), "http_422", 1),
        (Reply(seconds=1.0), "timeout", 3),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_question_without_an_answer_gives_a_reason_and_keeps_the_other_score(
    tmp_path, reply, reason, requests, monkeypatch
):
    monkeypatch.setattr("pipeline.remote.tries.growing", lambda _: 0.01)
    (row,), judge = judged(
        lambda _, part, attempt: reply if part == "pq" else Reply(),
        tmp_path,
        concurrency=1,
        timeout_s=0.3 if reply.seconds else 5,
    )
    assert row["judge_sc"] == 7
    assert row["judge_pq"] is row["judge_overall"] is None
    assert row["judge_reason"] == reason
    assert sorted(judge.asked.values()) == sorted([1, requests])


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_rate_limit_slows_all_by_as_much_as_the_server_asks(tmp_path, form):
    limited: list[float] = []

    def script(digest: str, part: str, attempt: int) -> Reply:
        if not limited:
            limited.append(time.monotonic())
            after = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2.2, usegmt=True)
            return Reply(status=429, headers={"Retry-After": after})
        return Reply()

    found, judge = judged(script, tmp_path, count=3, concurrency=1)
    assert all(row["judge_reason"] is None for row in found)
    later = [at for at, _ in judge.at if at > limited[0]]
    assert min(later) - limited[0] >= 0.95


def test_a_spent_quota_and_a_wrong_key_end_the_run_without_another_try_and_without_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-PLANTED-SECRET-4711")
    echo = json.dumps({"error": {"message": "no such key: sk-PLANTED-SECRET-4711"}}).encode()
    for reply, words in (
        (Reply(status=429, body=QUOTA), "quota is spent"),
        (Reply(status=401, body=echo), "401"),
        (Reply(status=404), "judge.model"),
        (Reply(status=400, body=b"bad"), "400"),
    ):
        with fake_judge(lambda *_, reply=reply: reply) as judge:
            with pytest.raises(JudgeError, match=words) as caught:
                judging(judge, tmp_path, concurrency=1).columns(rows(2), ["", ""])
            assert sum(judge.asked.values()) == 1
            assert judge.headers[0]["Authorization"] == "Bearer sk-PLANTED-SECRET-4711"
        assert "SECRET" not in str(caught.value)
    assert all("SECRET" not in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_an_answered_question_is_never_asked_again_even_by_another_process(tmp_path):
    def fails_late(digest: str, part: str, attempt: int) -> Reply:
        return Reply(status=401) if sum(judge.asked.values()) > 5 else Reply()

    with fake_judge(fails_late) as judge:
        with pytest.raises(JudgeError):
            judging(judge, tmp_path, concurrency=1).columns(rows(4), [""] * 4)
        judge.script = lambda *_: Reply()
        before = sum(judge.asked.values())
        again = judging(judge, tmp_path)
        found = again.columns(rows(4), [""] * 4)
        assert sum(judge.asked.values()) - before == 8 - 5 == again.requests
        assert judging(judge, tmp_path).columns(rows(4), [""] * 4) == found
        assert judging(judge, tmp_path, temperature=0.5).columns(rows(1), [""])[0]["judge_temperature"] == 0.5
        assert sum(judge.asked.values()) == before + 3 + 2, "other settings are other questions"


def test_a_question_that_is_refused_first_after_a_restart_ends_nothing(tmp_path):
    """A 400 to the very first request is a wrong configuration; to one after others it is that question's fault."""
    with fake_judge() as judge:
        judging(judge, tmp_path).columns(rows(1), [""])
        judge.script = lambda *_: Reply(status=400, body=b"too large")
        found = judging(judge, tmp_path, concurrency=1).columns(rows(2), ["", ""])
    assert [row["judge_reason"] for row in found] == [None, "http_400"]


def test_no_more_requests_are_in_flight_than_may_be(tmp_path):
    _, judge = judged(lambda *_: Reply(seconds=0.05), tmp_path, count=8, concurrency=4)
    assert 2 <= judge.most_in_flight <= 4


def test_passes_differ_in_their_seeds_and_their_mean_counts(tmp_path):
    (row,), judge = judged(
        lambda _, part, attempt: Reply(content=f'{{"score": [{4 + 2 * attempt}, 9]}}'),
        tmp_path,
        passes=3,
        seed=5,
        concurrency=1,
    )
    assert sorted(body["seed"] for body in judge.bodies) == [5, 5, 6, 6, 7, 7]
    assert (row["judge_sc"], row["judge_pq"], row["judge_overall"]) == (6, 6, 6)
    assert row["judge_pass_sd"] == pytest.approx(2.0), "of 4, 6 and 8"


def test_a_judge_is_told_concepts_in_words_and_not_asked_about_an_edit_that_no_words_name(tmp_path):
    concepts = (
        Concept(prompt="a hat"),
        Concept(prompt="a beard", direction="remove"),
        Concept(prompt="fog", guidance_scale=-3),
        Concept(prompt="nothing", guidance_scale=0),
    )
    requests = [EditRequest(concepts=concepts), EditRequest(source_prompt="a face")]
    results = [
        replace(one, item=replace(one.item, request=request)) for one, request in zip(rows(2), requests, strict=True)
    ]
    with fake_judge() as judge:
        found = judging(judge, tmp_path).columns(results, ["", ""])
        texts = [body["messages"][0]["content"][0]["text"] for body in judge.bodies]
    assert sum("Add a hat. Remove a beard. Remove fog." in text for text in texts) == 1
    assert len(texts) == 2
    assert [row["judge_reason"] for row in found] == [None, "no_instruction"]


def test_what_has_no_picture_is_not_asked_about(tmp_path):
    with fake_judge() as judge:
        (row,) = judging(judge, tmp_path).columns(rows(1), ["failed_edit"])
        assert not judge.asked
    assert row["judge_reason"] == "failed_edit"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_url": "http://user:pw@host/v1"}, "user, a password"),
        ({"model": "sk-abcdefgh12345"}, "looks like a key"),
        ({"base_url": "file:///x"}, "no address"),
    ],
)
def test_a_section_that_holds_a_secret_or_no_address_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        JudgeConfig(**{"model": "m", **settings})


def test_an_endpoint_elsewhere_needs_its_key(tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    with pytest.raises(JudgeError, match="JUDGE_API_KEY is empty"):
        Judging(JudgeConfig(base_url="https://example.org/v1", model="m"), fsspec.filesystem("file"), str(tmp_path))
