"""Answers beyond those of the fixtures: what is cut, wrapped or spelled otherwise is read, and nothing is made up."""

from __future__ import annotations

import pytest

from pipeline.evaluation.judging.answers import read_imgedit, read_preference, read_sentence, read_viescore


@pytest.mark.parametrize(
    ("text", "scores", "flags"),
    [
        ('{"score": [1, 2]} then {"score": [7, 8]}', (7, 8), ()),  # the last counts
        ('{"reasoning": {"score": [1, 1]}, "score": [7, 8]}', (7, 8), ()),  # not one inside of another
        ("｛“score”：［７，８］｝", (7, 8), ("repaired",)),
        ('{"score": 7.5}', (7.5,), ("single_score",)),
        ("8", (8,), ("single_score",)),
        ("[1, 2], or rather [7.5, 8]", (7.5, 8), ("bare_list",)),
        ('||V^=^V||{"score": [0, 10]}||V^=^V||', (0, 10), ()),
        ('{"evaluation": {"score": [7, 8]}}', (7, 8), ()),
        ("[07, +8]", (7, 8), ("bare_list",)),
        ("［７，８］", (7, 8), ("repaired", "bare_list")),
        ('{"score": [7, 8,],}', (7, 8), ("repaired",)),
        ("thinking of {brackets} ... </think> {'score': [7, 8]}", (7, 8), ("repaired",)),
    ],
)
def test_scores_are_found(text, scores, flags):
    found = read_viescore(text)
    assert (found.scores, found.flags, found.reason) == (scores, flags, "")


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ('{"score": [7, ', "length", "truncated"),
        ('{"score": [7, ', "stop", "truncated"),
        ("<think>it looks like 7", "length", "truncated"),
        ('{"score": [true, 8]}', "stop", "not_a_number"),
        ('{"score": ["seven", "eight"]}', "stop", "not_a_number"),
        ('{"score": []}', "stop", "score_count"),
        ('{"score": [7, 11]}', "stop", "out_of_range"),
        ('{"score": [' + "9" * 400 + ", 8]}", "stop", "out_of_range"),
        ('{"score": [' + "9" * 5000 + ", 8]}", "stop", "not_a_number"),
        ('{"score": {"success": 7, "restraint": 8}}', "stop", "not_a_number"),
        ('{"score": [[7, 8]]}', "stop", "not_a_number"),
        ("I would rather not say.", "refusal", "refusal"),  # as the endpoint has it
        ("I'm sorry, but I can't help with that.", "stop", "refusal"),
        ("无法判断", "stop", "refusal"),
        ("word " * 200 + "cannot", "stop", "no_json"),  # too long for a refusal
        ("   ", "stop", "empty"),
    ],
)
def test_no_score_is_made_up(text, finish, reason):
    found = read_viescore(text, finish)
    assert (found.scores, found.reason) == ((), reason)


def test_editscores_range_is_its_own():
    assert read_viescore('{"score": [20, 25]}', most=25).scores == (20, 25)
    assert read_viescore('{"score": [20, 26]}', most=25).reason == "out_of_range"


@pytest.mark.parametrize(
    ("text", "scores", "flags"),
    [
        ("Prompt Compliance：4\nVisual Naturalness：3\nPhysical and Detail Integrity：2", (4, 3, 2), ("repaired",)),
        ("Prompt Compliance: 4/5\nVisual Naturalness: 3/5\nPhysical & Detail Integrity: 2/5", (4, 3, 2), ("repaired",)),
        (
            '{"Prompt Compliance": 4.5, "Visual Naturalness": 3, "Physical & Detail Integrity": 2}',
            (4.5, 3, 2),
            ("repaired",),
        ),
        (
            "Prompt Compliance: 1\nPrompt Compliance: 4\nVisual Naturalness: 3\nPhysical & Detail Integrity: 2",
            (4, 3, 2),
            ("repaired",),
        ),
    ],
)
def test_criteria_are_read_in_other_spellings(text, scores, flags):
    found = read_imgedit(text, "remove")
    assert (found.scores, found.flags, found.reason) == (scores, flags, "")


def test_a_number_in_the_reasoning_is_no_score_and_no_oddity():
    text = "Brief reasoning: 3\nPrompt Compliance: 4\nVisual Naturalness: 3\nPhysical & Detail Integrity: 2"
    found = read_imgedit(text, "remove")
    assert (found.scores, found.flags) == ((4, 3, 2), ())


@pytest.mark.parametrize("first", ["4/10", "10/10", "²", "4.5.6", "four"])
def test_what_is_no_number_of_five_is_no_score(first):
    text = f"Prompt Compliance: {first}\nVisual Naturalness: 3\nPhysical & Detail Integrity: 2"
    assert read_imgedit(text, "remove").reason == "score_count"


@pytest.mark.parametrize(
    ("text", "choice", "flags"),
    [
        ('{"reasoning": "b is worse", "better": "A"}', 1, ()),
        ('```json\n{"better": "b"}\n```', -1, ()),
        ("{'better': 'Tie'}", 0, ("repaired",)),
        ("B.", -1, ("repaired",)),
    ],
)
def test_a_choice_is_found(text, choice, flags):
    found = read_preference(text)
    assert (found.scores, found.flags, found.reason) == ((choice,), flags, "")


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ('{"better": "C"}', "stop", "no_choice"),
        ('{"better": 1}', "stop", "no_choice"),
        ('{"best": "A"}', "stop", "no_score"),
        ("A is better than B", "stop", "no_json"),
        ("I am unable to choose.", "stop", "refusal"),
        ('{"reasoning": "the first', "length", "truncated"),
        ("", "stop", "empty"),
    ],
)
def test_no_choice_is_made_up(text, finish, reason):
    found = read_preference(text, finish)
    assert (found.scores, found.reason) == ((), reason)


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("Brief reasoning: 3\nPrompt Compliance: 4", "stop", "score_count"),
        ("Brief reasoning: the", "length", "truncated"),
        ("Sorry, I am unable to judge people.", "stop", "refusal"),
        ("Prompt Compliance: 4\nVisual Naturalness: 0\nPhysical & Detail Integrity: 2", "stop", "out_of_range"),
    ],
)
def test_what_lacks_a_criterion_has_no_score(text, finish, reason):
    assert read_imgedit(text, "remove", finish).reason == reason


def test_a_criterion_that_begins_another_is_not_taken_for_it():
    text = "Instruction Compliance: 5\nVisual Naturalness: 4\nPhysical Consistency & Fine Detail: 3"
    assert read_imgedit(text, "compose").scores == (5, 4, 3)
    assert read_imgedit(text, "background").reason == "score_count"


@pytest.mark.parametrize(
    ("text", "sentence", "reason"),
    [
        ('{"reasoning": "a hat", "instruction": " Put a\\n hat on. "}', "Put a hat on.", ""),
        ('```json\n{"instruction": "Put a hat on."}\n```', "Put a hat on.", ""),
        ('{"reasoning": "nothing differs", "instruction": null}', "", "no_sentence"),
        ('{"instruction": "  "}', "", "no_sentence"),
        ('{"instruction": ["Put a hat on."]}', "", "no_sentence"),
        (f'{{"instruction": "{"hat " * 101}"}}', "", "long_sentence"),
        ('{"reasoning": "a hat"}', "", "no_score"),
        ("Put a hat on.", "", "no_json"),
        ("I am sorry, I cannot help with that.", "", "refusal"),
        ("", "", "empty"),
    ],
)
def test_a_sentence_is_read_or_it_is_said_why_there_is_none(text: str, sentence: str, reason: str) -> None:
    found = read_sentence(text)
    assert (found.reasoning, found.reason, found.scores) == (sentence, reason, ())
