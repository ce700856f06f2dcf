"""`qwen_image`: what it tells its network, against diffusers' own pipelines; guidance in direction alone; pictures that
the text encoder sees."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
)
from diffusers.models.transformers import transformer_qwenimage
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.diffusion.flow_schedule import level_of
from pipeline.editing.instruct import Instruct
from pipeline.editor import Editor
from pipeline.engine.calls import Denoise, Steps
from pipeline.engine.engine import Engine
from pipeline.engine.pictures import decode_picture, encode_picture
from pipeline.engine.prompts import GuidedPrompt
from pipeline.errors import EditError, ModelError, RecipeError
from pipeline.inversion.noise import NoiseStart
from pipeline.looking.check_model.agreement import LEVELS, TOLERANCE
from pipeline.models.checkpoint import Configurations
from pipeline.models.families import FAMILIES
from pipeline.models.families.flux import packed, unpacked
from pipeline.models.families.qwen_image import EDIT, EDIT_PLUS, PLAIN, QwenImageFamily
from pipeline.models.loading import find_checkpoint, load_backbone
from pipeline.models.outline import outline_of
from pipeline.models.parity import Sampling, sampled_by_diffusers
from pipeline.models.qwen_vl import IMAGE_TOKEN, PictureCut, check_qwen, positions
from pipeline.recipe import ModelConfig
from pipeline.records import EditRequest
from tests.checkpoints import change, refused
from tests.golden.replay import TINY_SD
from tests.methods import invert_and_edit, source
from tests.models.families.flow import OF_A_UNET, Pair, able_pairs, alone, edited, noise, predicted, sampled
from tests.models.families.published import PNDM, PUBLISHED, QWEN_FLOW, QWEN_PROCESSOR, Files, put, qwen
from tests.models.families.test_families import offered, with_index
from tests.models.families.tiny_qwen import save_tiny_qwen
from tests.models.test_offload import needs
from tests.test_every_pair import PAIRS

PROMPT = "a photo of a cat with a hat"
INSTRUCTION = "put a hat on it"
PLACES = 24


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen(tmp_path_factory.mktemp("qwen") / "model", edits=False)


@pytest.fixture(scope="session")
def edit_folder(tiny_qwen_edit: Path) -> Path:
    return tiny_qwen_edit


def loaded(folder: Path, **config: Any) -> Any:
    return load_backbone(ModelConfig(name=str(folder), **{"text_tokens": PLACES, **config}), device="cpu")


@pytest.fixture(scope="session")
def tiny(folder: Path) -> Any:
    return loaded(folder)


@pytest.fixture(scope="session")
def tiny_edit(edit_folder: Path) -> Any:
    return loaded(edit_folder)


@pytest.fixture
def checkpoint(folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Qwen-Image, for a test to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture
def edit_checkpoint(edit_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Qwen-Image-Edit, for a test to spoil."""
    return Path(shutil.copytree(edit_folder, tmp_path / "edit"))


def picture(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def shown(embedding: Tensor) -> Tensor:
    """Without its padding, which is behind the text."""
    there = embedding.any(dim=-1)
    count = int(there.sum())
    assert there[:count].all()
    return embedding[:count]


def test_text_is_what_diffusers_pipeline_makes_of_it(tiny: Any, folder: Path) -> None:
    theirs = QwenImagePipeline.from_pretrained(folder)
    prompts = {PROMPT: PROMPT, "": " ", "Schnee, 雪 & neige!": "Schnee, 雪 & neige!"}  # ours: theirs
    for ours, said in prompts.items():
        found = tiny.encode_text(ours)
        with torch.no_grad():
            embedding, mask = theirs.encode_prompt(said, device="cpu")
        assert mask is None  # it pads what shares a call
        assert found.prompt == ours
        assert found.embedding.shape == (PLACES, 32)
        torch.testing.assert_close(shown(found.embedding), embedding[0], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        embeddings, mask = theirs.encode_prompt(list(prompts.values()), device="cpu")
    for ours, one, there in zip(tiny.encode_texts(list(prompts)), embeddings, mask, strict=True):
        torch.testing.assert_close(shown(ours.embedding), one[there.bool()], atol=1e-5, rtol=1e-5)


def test_a_word_has_its_places_and_what_stands_around_a_prompt_has_none(tiny: Any) -> None:
    words = PROMPT.split()
    found = tiny.encode_text(PROMPT)
    assert found.places_of({words.index("cat"), words.index("hat")}) == [4, 7]
    assert found.positions == tuple(range(8))
    assert tiny.encode_text("").positions == ()
    (span,) = tiny.encode_text("a 雪 cat").spans  # three tokens of bytes, or a space and three
    assert span.words[0] == 0
    assert span.words[-1] == 2
    assert set(span.words[1:-1]) == {1}


def test_a_prompt_that_is_too_long_is_refused_and_fits_where_it_says(folder: Path, tiny: Any) -> None:
    long = "a cat on snow " * 8
    with pytest.raises(EditError, match=r"takes 38 places of .* and has 24\. Set model\.text_tokens to 38 or more"):
        tiny.encode_text(long)
    assert len(shown(loaded(folder, text_tokens=38).encode_text(long).embedding)) == 38
    outline = outline_of(ModelConfig(name=str(folder)))
    assert outline.read_part(PROMPT) == PROMPT


def test_rows_of_other_prompts_and_levels_share_a_call_and_keep_their_bits(tiny: Any) -> None:
    sigmas = [1.0, 0.7, 0.3, 0.3]
    prompts = ("a cat", "snow", "a dog on snow with a hat", "")
    conditioning = [tiny.encode_text(prompt) for prompt in prompts]
    latents = noise(tiny, 4)
    latents[3] = latents[2]
    together = predicted(tiny, latents, sigmas, conditioning, 4)
    for row in range(4):
        one = predicted(tiny, latents[row : row + 1], sigmas[row : row + 1], conditioning[row : row + 1], 4)
        assert torch.equal(one[0], together[row])
    assert not torch.allclose(together[2], together[3], rtol=0.01)  # they differ in their prompt alone


def test_padding_is_not_read(tiny: Any, folder: Path) -> None:
    """Unlike that of Stable Diffusion 3 and FLUX: another number of places gives the same image."""
    latents = noise(tiny, 1)
    few, many = (
        predicted(one, latents, [0.6], [one.encode_text(PROMPT)], 1) for one in (tiny, loaded(folder, text_tokens=64))
    )
    torch.testing.assert_close(few, many, atol=1e-5, rtol=1e-4)


def test_diffusers_pipeline_samples_the_same_and_decodes_it_to_the_same_picture(tiny: Any, folder: Path) -> None:
    sampling = Sampling(prompt=PROMPT, noise=noise(tiny, 1)[0], num_steps=3, guidance_scale=4.0)
    family, checkpoint, _ = find_checkpoint(ModelConfig(name=str(folder)))
    reference = sampled_by_diffusers(family, checkpoint, tiny, sampling)
    assert reference is not None
    assert reference.pipeline == "QwenImagePipeline"
    difference = (sampled(tiny, sampling) - reference.latents).abs().max() / reference.latents.abs().max()
    assert difference < TOLERANCE["float32"] / 10
    pixels = decode_picture(tiny, reference.latents)
    assert np.abs(pixels.astype(int) - reference.pixels).max() <= LEVELS


def test_guidance_turns_each_tokens_velocity_and_keeps_its_length(tiny: Any) -> None:
    latents, level = noise(tiny, 1)[0], level_of(0.6)

    def ask(scale: float) -> Steps[Any]:
        prompt = yield from GuidedPrompt.encode(PROMPT, scale)
        return (yield from prompt.predict(latents, level))

    plain, guided = (Engine(tiny, call_size=2).run_one(ask(scale)) for scale in (1.0, 4.0))

    def tokens(velocity: Tensor) -> Tensor:  # (h/2, w/2, 64)
        return velocity.unfold(1, 2, 2).unfold(2, 2, 2).permute(1, 2, 0, 3, 4).flatten(2)

    torch.testing.assert_close(tokens(guided.velocity).norm(dim=-1), tokens(plain.velocity).norm(dim=-1))
    assert not torch.allclose(guided.velocity, plain.velocity, rtol=0.01)
    torch.testing.assert_close(level.signal * guided.data + level.noise * guided.noise, latents)


def test_watched_attention_is_that_of_the_network_and_padding_has_none_of_it(
    tiny: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = "diffusers.models.transformers.transformer_qwenimage.dispatch_attention_fn"
    attend = transformer_qwenimage.dispatch_attention_fn
    maps: list[Tensor] = []

    def noted(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor, **given: Any) -> Tensor:
        scores = torch.einsum("rnhd,rmhd->rhnm", query, key) / query.shape[-1] ** 0.5
        maps.append(scores.masked_fill(~attn_mask, float("-inf")).softmax(dim=-1).mean(dim=1))
        attended: Tensor = attend(query, key, value, attn_mask=attn_mask, **given)
        return attended

    monkeypatch.setattr(where, noted)
    prompts = (PROMPT, "snow")

    def seen(backbone: Any) -> Tensor:
        told = [backbone.encode_text(prompt) for prompt in prompts]
        places = [[*one.positions] for one in told]

        def ask() -> Steps[Any]:
            return (yield Denoise(noise(backbone, 2), [level_of(0.6)] * 2, told, watch=places))

        attention: Tensor = Engine(backbone, call_size=2).run_one(ask()).attention
        return attention

    found = seen(tiny)
    assert found.shape == (2, 4, 6)  # half the latents' side
    for row, prompt in enumerate(prompts):
        words = maps[0][row, PLACES:, [*tiny.encode_text(prompt).positions]].sum(dim=-1)  # the first of three blocks
        torch.testing.assert_close(found[row], words.unflatten(0, (4, 6)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen(loaded(folder, text_tokens=48)), found, atol=1e-5, rtol=1e-4)


def test_levels_end_where_the_file_says(tiny: Any) -> None:
    for size in ((8, 12), (128, 128)):
        sigmas = tiny.schedule.sigmas(4, size)
        assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
        assert sigmas[-2] == pytest.approx(0.02, abs=1e-6)


def test_a_picture_is_one_frame_of_its_autoencoder(tiny: Any) -> None:
    video, pixels = tiny.autoencoder.vae.video, picture(0)
    with torch.no_grad():
        found = video.encode(torch.tensor(pixels).permute(2, 0, 1)[None, :, None] / 127.5 - 1.0).latent_dist.mode()
    mean, std = (torch.tensor(one)[:, None, None] for one in (video.config.latents_mean, video.config.latents_std))
    latents = encode_picture(tiny, pixels)
    assert latents.shape == (16, 8, 12)
    torch.testing.assert_close(latents, (found[0, :, 0] - mean) / std)
    value, gradient = tiny.decode_gradient(latents, lambda seen: (seen.sum(), torch.ones_like(seen)))
    assert value.shape == ()
    assert gradient.shape == latents.shape
    assert gradient.any()


LIKE_THE_TINY = Configurations({"_class_name": "QwenImagePipeline"}, {"transformer": {"num_layers": 3}})
ABLE = able_pairs(FAMILIES["QwenImagePipeline"].offers(LIKE_THE_TINY))
# Each inversion and each editor, in as few pairs as it takes.
EACH = [
    pair
    for at, pair in enumerate(ABLE)
    if not {pair[0]} <= {one[0] for one in ABLE[:at]} or not {pair[1]} <= {one[1] for one in ABLE[:at]}
]
ALONE = [pair for pair in EACH if pair[1] in ("cfg", "flow_edit", "direct_edit", "ledits_pp")]


def test_what_needs_no_unet_works_with_every_inversion_that_it_fits() -> None:
    assert {pair for pair in PAIRS if pair not in ABLE} == {pair for pair in PAIRS if OF_A_UNET & {*pair}}
    assert {editor for _, editor in EACH} == {editor for _, editor in ABLE}


@pytest.fixture(scope="module")
def beside_all_others(tiny: Any) -> dict[Pair, Tensor]:
    return edited(tiny, EACH)


@pytest.mark.slow  # FLUX.1 has the same pairs in the fast suite
@pytest.mark.parametrize("pair", EACH, ids="+".join)
def test_a_pair_gives_finite_latents(pair: Pair, beside_all_others: dict[Pair, Tensor]) -> None:
    assert torch.isfinite(beside_all_others[pair]).all()


@pytest.mark.slow  # FLUX.1 has the same pairs in the fast suite
@pytest.mark.parametrize("pair", ALONE, ids="+".join)
def test_a_pair_gives_the_same_bits_alone_and_beside_all_others(
    pair: Pair, tiny: Any, beside_all_others: dict[Pair, Tensor]
) -> None:
    assert torch.equal(alone(tiny, pair), beside_all_others[pair])


def test_pictures_are_cut_as_the_librarys_own_processor_cuts_them() -> None:
    small = {**QWEN_PROCESSOR, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 12}
    ours, theirs = PictureCut.from_config(small, {}, "it"), Qwen2VLImageProcessorPil(**small)
    for height, width in ((64, 96), (57, 85), (300, 500), (30, 20), (28, 140), (14, 14)):
        pixels = picture(height, height, width)
        patches, (rows, columns) = ours.cut(pixels)
        found = theirs(images=[Image.fromarray(pixels)], return_tensors="pt")
        assert found["image_grid_thw"].tolist() == [[1, rows, columns]]
        assert ours.num_tokens(height, width) == rows * columns // 4
        torch.testing.assert_close(patches, found["pixel_values"], atol=1e-5, rtol=1e-5)


def test_tokens_of_a_picture_have_their_places_in_rows_and_columns(tiny_edit: Any) -> None:
    encoder, image = tiny_edit.text.encoder, tiny_edit.text.encoder.config.image_token_id
    ids = [5, 6, 7, *[image] * 6, 8, 9]
    kinds = torch.tensor([[int(one == image) for one in ids]])
    grid = torch.tensor([[1, 4, 6]])  # patches: two by three tokens
    theirs, _ = encoder.model.get_rope_index(torch.tensor([ids]), mm_token_type_ids=kinds, image_grid_thw=grid)
    found = positions(ids, image, (2, 3), 14)
    assert torch.equal(found[:, :, : len(ids)], theirs)
    assert not found[:, :, len(ids) :].any()
    assert positions([5, 6, 7], image, (2, 3), 4).tolist() == [[[0, 1, 2, 0]]] * 3


@pytest.fixture(scope="session", params=[EDIT, EDIT_PLUS])
def one_edit(request: pytest.FixtureRequest, tiny_edit: Any, edit_folder: Path) -> Any:
    """The tiny Qwen-Image-Edit, and the same weights as Edit Plus."""
    if request.param == EDIT:
        return tiny_edit
    copied = Path(shutil.copytree(edit_folder, request.getfixturevalue("tmp_path_factory").mktemp("plus") / "model"))
    change(copied / "model_index.json", _class_name=EDIT_PLUS)
    return loaded(copied)


@pytest.fixture
def editing(one_edit: Any, edit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """diffusers' pipeline around the same networks, with what it does not do itself: it samples at the picture's own
    size, and tells the text encoder which tokens are a picture's."""
    encoder, tokenizer = one_edit.text.encoder, one_edit.text.tokenizer
    plus = one_edit.text.with_picture[1].area is not None
    forward, cutter = encoder.forward, Qwen2VLImageProcessorPil(**QWEN_PROCESSOR)
    module = f"diffusers.pipelines.qwenimage.pipeline_qwenimage_edit{'_plus' if plus else ''}"
    sized = importlib.import_module(module).calculate_dimensions

    def told(input_ids: Tensor, **given: Any) -> Any:
        kinds = (input_ids == encoder.config.image_token_id).int()
        return forward(input_ids=input_ids, mm_token_type_ids=kinds, **given)

    def processed(text: list[str], images: Any, **_: Any) -> Any:
        cut = cutter(images=images if plus else [images], return_tensors="pt")
        count = int(cut["image_grid_thw"].prod()) // 4
        words = [one.replace(IMAGE_TOKEN, IMAGE_TOKEN * count) for one in text]
        found = tokenizer(words, padding=True, return_tensors="pt")
        found.update(cut)
        return found

    def own(area: int, ratio: float) -> tuple[Any, ...]:
        found: tuple[Any, ...] = sized(area, ratio) if area < 1024 * 1024 else (96, 64, None)[: 2 if plus else 3]
        return found

    monkeypatch.setattr(encoder, "forward", told)
    monkeypatch.setattr(f"{module}.calculate_dimensions", own)
    pipeline = (QwenImageEditPlusPipeline if plus else QwenImageEditPipeline)(
        transformer=one_edit.velocity.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(edit_folder / "scheduler"),
        vae=one_edit.autoencoder.vae.video,
        text_encoder=encoder,
        tokenizer=tokenizer,
        processor=None,
    )
    pipeline.processor = processed
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_text_encoder_sees_another_picture(tiny_edit: Any) -> None:
    found, other = (tiny_edit.encode_text_of(INSTRUCTION, picture(number)) for number in (1, 2))
    assert not torch.allclose(found.embedding, other.embedding, atol=1e-3)
    behind = 1 + 6 + 1  # the picture's tokens, of which there are two by three, and their bounds
    assert found.places_of({2}) == [behind + 2]


def test_the_text_encoder_sees_the_picture_as_in_diffusers_pipeline(one_edit: Any, editing: Any) -> None:
    pixels = picture(1)
    height, width = one_edit.text.with_picture[1].seen(64, 96)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    for ours, theirs in ((INSTRUCTION, INSTRUCTION), ("", " ")):
        found = one_edit.encode_text_of(ours, pixels)
        with torch.no_grad():
            embedding, mask = editing.encode_prompt(theirs, [image] if (height, width) != (64, 96) else image, "cpu")
        assert mask is None
        torch.testing.assert_close(shown(found.embedding), embedding[0], atol=1e-5, rtol=1e-5)


def instructed(backbone: Any, pixels: np.ndarray, request: EditRequest, steps: int = 3) -> Steps[Any]:
    latents = encode_picture(backbone, pixels)
    given = dataclasses.replace(source(backbone, 1), latents=latents, pixels=pixels)
    given = dataclasses.replace(given, draw_noise=lambda: noise(backbone, 1)[0])
    return invert_and_edit(given, request, NoiseStart(num_steps=steps), Instruct(guidance_scale=4.0))


REQUEST = EditRequest(instruction=INSTRUCTION)


def test_diffusers_pipeline_edits_the_same(one_edit: Any, editing: Any) -> None:
    pixels, engine = picture(1), Engine(one_edit, call_size=2)
    ours = engine.run_one(instructed(one_edit, pixels, REQUEST))[1].latents
    assert engine.stats.network_rows == 6
    theirs = editing(
        image=Image.fromarray(pixels),
        prompt=INSTRUCTION,
        negative_prompt=" ",
        true_cfg_scale=4.0,
        num_inference_steps=3,
        latents=packed(noise(one_edit, 1)),
        output_type="latent",
    ).images
    theirs = unpacked(theirs, 8, 12)[0]
    assert (ours - theirs).abs().max() / theirs.abs().max() < TOLERANCE["float32"] / 10


def test_a_negative_prompt_is_read(tiny_edit: Any) -> None:
    other = REQUEST.model_copy(update={"negative_prompt": "snow"})
    plain, against = (
        Engine(tiny_edit, call_size=2).run_one(instructed(tiny_edit, picture(1), request, 1))[1].latents
        for request in (REQUEST, other)
    )
    assert not torch.allclose(against, plain, atol=1e-3)


def test_pictures_share_calls_and_keep_their_bits(tiny_edit: Any) -> None:
    together = Engine(tiny_edit, call_size=4)
    made = together.run(instructed(tiny_edit, picture(number), REQUEST, 2) for number in (1, 2, 3))
    found = {one.index: one.value[1].latents for one in made}
    by_itself = Engine(tiny_edit, call_size=4).run_one(instructed(tiny_edit, picture(2), REQUEST, 2))[1].latents
    assert torch.equal(by_itself, found[1])
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_text_without_a_picture_is_told_as_to_qwen_image(tiny: Any, tiny_edit: Any) -> None:
    assert torch.equal(tiny_edit.encode_text(PROMPT).embedding, tiny.encode_text(PROMPT).embedding)
    with pytest.raises(EditError, match=r"text encoder reads no pictures\. Use a checkpoint whose does"):
        tiny.encode_text_of(PROMPT, picture(1))
    with pytest.raises(EditError, match=r"holds <\|image_pad\|>, which stands for a picture"):
        tiny_edit.encode_text_of("<|image_pad|>", picture(1))


def test_a_picture_is_edited_by_an_instruction(edit_folder: Path, folder: Path) -> None:
    asked: dict[str, Any] = {
        "instruction": INSTRUCTION,
        "inversion": {"method": "noise", "num_steps": 2},
        "editing": {"method": "instruct"},
    }
    with Editor.load(str(edit_folder), size=64, text_tokens=PLACES, device="cpu") as editor:
        assert not np.array_equal(np.asarray(editor.edit(picture(1, 64, 64), **asked).image), picture(1, 64, 64))
    with (
        Editor.load(str(folder), size=64, text_tokens=PLACES, device="cpu") as editor,
        pytest.raises(RecipeError, match="takes no reference image"),
    ):
        editor.edit(picture(1, 64, 64), **asked)


def test_in_bfloat16_places_in_the_text_stay_exact(edit_folder: Path, tiny_edit: Any) -> None:
    backbone = loaded(edit_folder, dtype="bfloat16")
    encoder = backbone.text.encoder
    assert encoder.dtype == backbone.velocity.transformer.dtype == torch.bfloat16
    assert encoder.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    sigmas = [0.5]  # of which bfloat16 loses nothing: a time that is rounded weighs more than all else
    velocity = predicted(backbone, noise(backbone, 1), sigmas, [backbone.encode_text(PROMPT)], 1)
    exact = predicted(tiny_edit, noise(backbone, 1), sigmas, [tiny_edit.encode_text(PROMPT)], 1)
    assert velocity.dtype == torch.float32
    assert 0 < float((velocity - exact).norm() / exact.norm()) < 0.1


def test_what_files_tell_without_weights_is_what_the_loaded_model_offers(
    folder: Path, edit_folder: Path, tiny: Any, tiny_edit: Any
) -> None:
    for name, backbone in ((folder, tiny), (edit_folder, tiny_edit)):
        outline = outline_of(ModelConfig(name=str(name)))
        assert outline.offers == backbone.offers
    assert (tiny_edit.offers.references, tiny_edit.offers.reads_pictures) == (True, True)
    assert (tiny.offers.references, tiny.offers.reads_pictures) == (False, False)


def test_parts_that_were_not_made_for_each_other_are_refused(
    checkpoint: Path, edit_checkpoint: Path, tiny: Any
) -> None:
    change(edit_checkpoint / "text_encoder" / "config.json", image_token_id=3)
    refused(edit_checkpoint, r"puts pictures at 3\. Use the tokenizer that the encoder was trained with")
    tokenizer, config = tiny.text.tokenizer, tiny.text.encoder.config
    with pytest.raises(ModelError, match=r"makes 34 tokens of .* which were 33 in training\. Use the tokenizer"):
        check_qwen(tokenizer, config, [PLAIN._replace(num_system_tokens=33)], "it")
    shutil.rmtree(checkpoint / "tokenizer")
    shutil.copytree(TINY_SD / "tokenizer", checkpoint / "tokenizer")
    refused(checkpoint, "tokens and a text encoder of .*: they were not made for each other")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"embedded_guidance": 3.5}, "whose network takes no guidance scale"),
        ({"empty_prompt": "zeros"}, "was not trained with zeros for a text"),
        ({"t5": False}, "has no text encoder that it could do without"),
        ({"text_8bit": True}, "model.text_8bit is for T5"),
    ],
    ids=str,
)
def test_settings_of_other_families_are_refused(config: dict[str, Any], reason: str, edit_folder: Path) -> None:
    with pytest.raises(ModelError, match=reason):
        loaded(edit_folder, **config)


QWEN, QWEN_EDIT = PUBLISHED["Qwen/Qwen-Image"], PUBLISHED["Qwen/Qwen-Image-Edit"]
REFUSED: dict[str, tuple[Files, str]] = {
    "another scheduler": (qwen(scheduler=PNDM), "with the scheduler PNDMScheduler; known for it is FlowMatchEuler"),
    "beta levels": (qwen(scheduler={**QWEN_FLOW, "use_beta_sigmas": True}), "has use_beta_sigmas"),
    "no processor": (with_index(QWEN_EDIT, processor=[None, None]), "has no processor in its model_index.json"),
    "no processor's file": (
        {name: content for name, content in QWEN_EDIT.items() if "preprocessor_config" not in name},
        "has no processor/preprocessor_config.json",
    ),
    "a processor of another vision model": (
        {**QWEN_EDIT, "processor/preprocessor_config.json": {**QWEN_PROCESSOR, "patch_size": 16}},
        "has patch_size 16 in processor/preprocessor_config.json, and a vision model of patch_size 14",
    ),
    "a processor that leaves pictures as they are": (
        {**QWEN_EDIT, "processor/preprocessor_config.json": {**QWEN_PROCESSOR, "do_normalize": False}},
        "has do_normalize false",
    ),
    "bounds that are none": (
        {**QWEN_EDIT, "processor/preprocessor_config.json": {**QWEN_PROCESSOR, "min_pixels": 10**9}},
        "1000000000 to 12845056 pixels",
    ),
    "a guidance scale": (qwen(guidance_embeds=True), "a transformer with guidance_embeds"),
    "pictures in layers": (qwen(use_layer3d_rope=True), "a transformer with use_layer3d_rope"),
    "a control image": (qwen(in_channels=128), "a transformer of 128 input channels on latents of 16 channels"),
    "pixels with a fourth channel": (
        {**QWEN, "vae/config.json": {**QWEN["vae/config.json"], "input_channels": 4}},
        "an autoencoder of 4 channels of pixels",
    ),
}


@pytest.mark.parametrize(("files", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_qwen_image_is_refused_by_its_files(files: Files, reason: str, tmp_path: Path) -> None:
    refused(put(tmp_path, files), reason)


def test_published_checkpoints_are_known_by_their_files(tmp_path: Path) -> None:
    offers, edits = offered(QWEN, tmp_path / "plain"), offered(QWEN_EDIT, tmp_path / "edit")
    assert (offers.distilled, offers.references, offers.reads_pictures) == ("", False, False)
    assert edits == dataclasses.replace(offers, references=True, reads_pictures=True)
    assert offered(PUBLISHED["Qwen/Qwen-Image-Edit-2509"], tmp_path / "plus") == edits
    assert len(offers.openings.joint) == 60
    assert {file.split("/")[0] for file in QWEN_EDIT if "/" in file} == set(QwenImageFamily.components)


def test_what_a_plan_says_of_memory_is_of_the_published_models() -> None:
    files = {name.removesuffix("/config.json"): content for name, content in QWEN_EDIT.items() if content}
    files = {name: files[name] for name in ("model_index.json", "transformer", "vae", "text_encoder")}
    files["processor"] = QWEN_PROCESSOR
    found = needs(EDIT, files)
    assert found.parts["transformer"] == 2 * 20_430_401_088
    assert found.parts["text_encoder"] == 2 * 8_292_166_656
    plain = needs("QwenImagePipeline", {**files, "model_index.json": QWEN["model_index.json"]})
    tokens = 64 * 64
    assert found.row / plain.row == (tokens + 256 + tokens + 37 * 37) / (tokens + 256)
    assert plain.picture == 4 * 1024 * 1024 * 192 * 2


def test_the_digest_follows_how_pictures_are_cut(edit_checkpoint: Path, tiny_edit: Any) -> None:
    change(edit_checkpoint / "processor" / "preprocessor_config.json", max_pixels=1000000)
    assert loaded(edit_checkpoint).record.digest != tiny_edit.record.digest


def test_a_text_is_encoded_once_for_each_picture(tiny_edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    encode = tiny_edit.text.encode_of
    monkeypatch.setattr(tiny_edit.text, "encode_of", lambda prompt, seen: asked.append(prompt) or encode(prompt, seen))
    engine = Engine(tiny_edit, call_size=4)
    edits = [instructed(tiny_edit, picture(number), REQUEST, 1) for number in (1, 1, 2)]
    assert len(list(engine.run(edits))) == 3
    assert sorted(asked) == ["", "", INSTRUCTION, INSTRUCTION]
