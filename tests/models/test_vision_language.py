"""A vision-language model, here a tiny random one, answers from all pictures in their order, the same each time."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from pipeline.errors import ModelError
from pipeline.evaluation.items import Item, Result
from pipeline.evaluation.judging.judged import Judging
from pipeline.models.vision_language import load_vision_language
from pipeline.records import EditRequest
from pipeline.settings.judge import JudgeConfig
from pipeline.writing.rows import encode_png

WORDS = [
    *("<unk>", "<pad>", "</s>", "<image>", "USER", "ASSISTANT"),
    *("Answer", "in", "JSON", "score", "[", "]", "{", "}", "7", "8", ":", ",", "good", "bad", "edit"),
]
TEMPLATE = (
    "{% for message in messages %}USER {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT {% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of two layers, as a folder that its own library has written."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    vocabulary = {word: at for at, word in enumerate(WORDS)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=vocabulary["<pad>"],
        eos_token_id=vocabulary["</s>"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary["<image>"],
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():  # at their first scale all answers are alike
            parameter.mul_(8)
    model.generation_config.eos_token_id = vocabulary["</s>"]
    model.save_pretrained(folder)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return folder


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def test_an_answer_is_the_same_each_time_and_reads_every_picture_in_order(tiny):
    model = load_vision_language(str(tiny))
    one, other = picture(1), picture(2)

    def said(*pictures: np.ndarray) -> str:
        return model.answer("Answer in JSON", pictures, max_tokens=12).text

    first = model.answer("Answer in JSON", (one, other), max_tokens=12)
    assert first == model.answer("Answer in JSON", (one, other), max_tokens=12)
    assert first.completion_tokens <= 12
    assert first.prompt_tokens == 2 * 4 + 1 + 3 + 1  # places of the pictures, USER, the words, ASSISTANT
    assert len({said(one, other), said(other, one), said(one)}) > 1
    assert model.answer("edit", (one,), max_tokens=1).is_cut


def test_draws_are_those_of_the_seed_and_leave_others_alone(tiny):
    model = load_vision_language(str(tiny))

    def said(seed: int) -> str:
        return model.answer("edit", (picture(1),), max_tokens=12, temperature=3.0, seed=seed).text

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert said(1) == said(1)
    assert len({said(seed) for seed in range(4)}) > 1
    assert torch.equal(torch.rand(1), expected)


def test_a_judge_that_is_loaded_here_answers_like_any_other(tiny, tmp_path):
    config = JudgeConfig(kind="transformers", model=str(tiny), max_tokens=8)
    judging = Judging(config, fsspec.filesystem("file"), str(tmp_path / "journal"))
    results = [
        Result(
            item=Item(key=str(at), image=encode_png(picture(0)), request=EditRequest(instruction="good edit")),
            edit="",
            method="m",
            image=encode_png(picture(at)),
        )
        for at in range(2)
    ]
    rows = judging.columns(results, ["", ""])
    for row in rows:
        # A random model babbles: every row has its words, and why they are no score.
        assert row["judge_reason"] in ("no_json", "truncated", "empty")
        assert (row["judge_model_reported"], row["judge_base_url_host"]) == ("llava", "transformers")
        assert row["judge_sc"] is None
        assert row["judge_completion_tokens"] > 0
    before = judging.requests
    again = Judging(config, fsspec.filesystem("file"), str(tmp_path / "journal"))
    assert again.columns(results, ["", ""]) == rows
    assert (before > 0, again.requests) == (True, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "only pickled weights"),
        (lambda folder: add(folder / "config.json", {"auto_map": {"AutoModel": "x.Y"}}), "code of its own"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
    ],
)
def test_a_checkpoint_that_cannot_be_a_judge_is_refused(tiny, tmp_path, change, words):
    import shutil

    shutil.copytree(tiny, tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(ModelError, match=words):
        load_vision_language(str(tmp_path / "model"))


def add(path: Path, more: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
