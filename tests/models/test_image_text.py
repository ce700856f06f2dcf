"""The optional image-text score, by a tiny CLIP made here: nothing is bundled, nothing pickled is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from pipeline.errors import ModelError
from pipeline.looking.report.text_gain import signed_texts, text_gain
from pipeline.looking.results import ResultRef, StoredResult
from pipeline.models.image_text import load_image_text
from pipeline.models.loading import DEMO_FOLDER
from pipeline.writing.merged import Span
from pipeline.writing.rows import encode_png

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained CLIP over the demo model's words."""
    place = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = CLIPTokenizerFast.from_pretrained(DEMO_FOLDER / "tokenizer")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = SIZES | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 20}
    config = CLIPConfig(text_config=text, vision_config=SIZES | {"image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    before = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return before, 255 - before // 2


def a_result(pictures: tuple[np.ndarray, np.ndarray], **request: object) -> StoredResult:
    before, after = (encode_png(picture) for picture in pictures)
    ref = ResultRef(span=Span("data/f.parquet", "f-00000", 1), row=0, id="a", edit="e", method="m", figures={})
    return StoredResult(ref=ref, caption="", request=dict(request), input=before, mask=None, image=after)


def test_scores_are_a_hundred_times_the_cosine_that_transformers_computes(folder, pictures):
    model, texts = load_image_text(str(folder)), ["a face with sunglasses", "a hat"]
    scores = model.scores(list(pictures), texts)
    whole = CLIPModel.from_pretrained(folder)
    tokens = CLIPTokenizerFast.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(folder)(list(pictures), return_tensors="pt")
    with torch.no_grad():
        logits = whole(**tokens, **pixels).logits_per_image / whole.logit_scale.exp()
    np.testing.assert_allclose(scores, 100 * logits.numpy(), atol=1e-3)
    assert np.ptp(scores) > 0.1


def test_the_gain_is_the_edits_score_less_that_of_the_input(folder, pictures):
    model = load_image_text(str(folder))
    (before,), (after,) = model.scores(list(pictures), ["a hat"])
    assert text_gain(a_result(pictures, target_prompt="a hat"), model) == pytest.approx(after - before, abs=1e-9)
    added = text_gain(a_result(pictures, concepts=[{"prompt": "a hat", "guidance_scale": 5}]), model)
    removed = text_gain(a_result(pictures, concepts=[{"prompt": "a hat", "direction": "remove"}]), model)
    assert added == -removed == pytest.approx(after - before, abs=1e-9)
    assert text_gain(a_result(pictures), model) is None


def test_the_words_of_an_edit_are_its_target_or_its_concepts_with_their_sign():
    concepts = [{"prompt": "a hat", "guidance_scale": 5.0}, {"prompt": "a smile", "guidance_scale": -5.0}]
    assert signed_texts({"concepts": concepts}) == [("a hat", 1), ("a smile", -1)]
    removed = [{"prompt": "a hat", "guidance_scale": scale, "direction": "remove"} for scale in (5.0, -5.0)]
    assert signed_texts({"concepts": removed}) == [("a hat", -1), ("a hat", 1)]
    assert signed_texts({"concepts": concepts, "target_prompt": "a face with a hat"}) == [("a face with a hat", 1)]


def test_text_beyond_the_models_length_is_cut(folder, pictures):
    model = load_image_text(str(folder))
    assert np.isfinite(model.scores(pictures[:1], ["a hat and " * 40])).all()


def test_only_safetensors_of_a_clip_are_loaded(folder, tmp_path):
    def refused(reason: str, name: str = str(tmp_path)) -> None:
        with pytest.raises(ModelError, match=reason):
            load_image_text(name)

    refused("no folder here and no hub id", "./missing")
    refused("no config.json")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    refused(r"only pickled weights \(pytorch_model.bin\)")
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    refused("without code of its own")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused("of type 'bert'")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    refused("cannot be loaded")
    os.mkfifo(tmp_path / "tokenizer.json")
    refused(r"has .*/tokenizer.json, which is a named pipe")
