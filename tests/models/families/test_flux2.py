"""`flux2`: what FLUX.2 klein is told, samples and edits, against diffusers' own pipeline; what rows share; refusals."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from torch import Tensor

from pipeline.editing.instruct import Instruct
from pipeline.editor import Editor
from pipeline.engine.calls import Conditioning
from pipeline.engine.engine import Engine
from pipeline.engine.pictures import decode_picture, encode_picture
from pipeline.errors import ModelError, RecipeError
from pipeline.inversion.noise import NoiseStart
from pipeline.looking.check_model.agreement import TOLERANCE
from pipeline.models.checkpoint import Configurations
from pipeline.models.families.flux2 import Flux2KleinFamily
from pipeline.models.loading import find_checkpoint, load_backbone
from pipeline.models.outline import outline_of
from pipeline.models.parity import Sampling, sampled_by_diffusers
from pipeline.recipe import ModelConfig
from tests.checkpoints import change, refused
from tests.golden.checks import source_of
from tests.models.families.flow import OF_A_UNET, Pair, able_pairs, alone, edited, noise, predicted, sampled, whole
from tests.models.families.published import (
    FLOW,
    KLEIN_INDEX,
    KLEIN_TRANSFORMER,
    KLEIN_VAE,
    PNDM,
    PUBLISHED,
    QWEN3_4B,
    Files,
    klein,
    put,
    scheduled,
)
from tests.models.families.test_families import offered, with_index
from tests.test_every_pair import PAIRS

PROMPT = "a photo of a cat with a hat"
PLACES = 32
CLOSE = TOLERANCE["float32"] / 10


@cache
def loaded(folder: Path, *, text_tokens: int | None = PLACES, **config: Any) -> Any:
    return load_backbone(ModelConfig(name=str(folder), text_tokens=text_tokens, **config), device="cpu")


@pytest.fixture(scope="module")
def base(tiny_klein: Path) -> Any:
    return loaded(tiny_klein)


@pytest.fixture(scope="module")
def theirs(tiny_klein: Path) -> Any:
    pipeline = Flux2KleinPipeline.from_pretrained(tiny_klein)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def checkpoint(tiny_klein: Path, tmp_path: Path) -> Path:
    """A copy of the tiny klein, for a test to spoil."""
    return Path(shutil.copytree(tiny_klein, tmp_path / "model"))


ABLE = able_pairs(Flux2KleinFamily().offers(Configurations(KLEIN_INDEX, {"transformer": KLEIN_TRANSFORMER})))


@pytest.mark.parametrize("prompt", [PROMPT, "", " a red car\n", "the snow on a mat " * 12], ids=repr)
def test_text_is_what_diffusers_pipeline_makes_of_it(prompt: str, base: Any, theirs: Any) -> None:
    (conditioning,) = base.encode_texts([prompt])
    expected, _ = theirs.encode_prompt(prompt, device="cpu", max_sequence_length=PLACES)
    assert conditioning.parts.keys() == {"embedding"}
    torch.testing.assert_close(conditioning.embedding, expected[0], atol=1e-5, rtol=1e-5)


def test_text_has_512_places_where_the_recipe_does_not_say(tiny_klein: Path, theirs: Any) -> None:
    embedding = loaded(tiny_klein, text_tokens=None).encode_text(PROMPT).embedding
    expected, _ = theirs.encode_prompt(PROMPT, device="cpu")
    torch.testing.assert_close(embedding, expected[0], atol=1e-5, rtol=1e-5)


def test_a_word_has_its_places_behind_the_templates_first_ones(base: Any) -> None:
    def own(prompt: str) -> tuple[Conditioning, list[str]]:
        conditioning = base.encode_text(prompt)
        (span,) = conditioning.spans
        ids = [span.token_ids[place] for place in conditioning.positions]
        return conditioning, base.text.states.chat.tokenizer.batch_decode([[one] for one in ids])

    conditioning, words = own(PROMPT)
    assert words == ["a", " photo", " of", " a", " cat", " with", " a", " hat"]
    assert conditioning.places_of({4, 7}) == [conditioning.positions[4], conditioning.positions[7]]
    assert own("")[0].positions == ()
    assert own("user")[1] == ["user"], "not the template's"
    long, words = own("a cat " * 40)
    assert long.positions[-1] == PLACES - 1
    assert len(words) == PLACES - conditioning.positions[0]


def test_what_is_read_of_a_prompt_is_known_without_weights(tiny_klein: Path) -> None:
    outline = outline_of(ModelConfig(name=str(tiny_klein), text_tokens=PLACES))
    assert outline.read_part(PROMPT) == PROMPT
    assert len(outline.read_part("cat " * 40).split()) == PLACES - 3
    assert outline_of(ModelConfig(name=str(tiny_klein))).read_part("cat " * 40).split() == ["cat"] * 40


def test_pictures_become_latents_and_come_back_as_in_diffusers_pipeline(base: Any, theirs: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8)
    image = theirs.image_processor.preprocess(Image.fromarray(pixels))
    with torch.no_grad():
        expected = theirs._unpatchify_latents(theirs._encode_vae_image(image, generator=None))[0]
    latents = encode_picture(base, pixels)
    assert latents.shape == (32, 6, 4)
    assert (base.latent_channels, base.latent_scale, base.multiple, base.image_size) == (32, 8, 16, 1024)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    tokens = theirs._patchify_latents(latents[None]).flatten(2).mean(dim=-1)
    assert float(tokens.std()) > 0.1, "statistics that no place could be told apart by show nothing"
    assert np.abs(decode_picture(base, latents).astype(int) - _decoded(theirs, latents).astype(int)).max() <= 1


def _decoded(pipeline: Any, latents: Tensor) -> np.ndarray:
    """Of normalised latents (C, h, w), by the pipeline's statistics."""
    squares = pipeline._patchify_latents(latents[None])
    std = torch.sqrt(pipeline.vae.bn.running_var + pipeline.vae.config.batch_norm_eps)
    squares = squares * std.view(1, -1, 1, 1) + pipeline.vae.bn.running_mean.view(1, -1, 1, 1)
    with torch.no_grad():
        image = pipeline.vae.decode(pipeline._unpatchify_latents(squares), return_dict=False)[0]
    pixels: np.ndarray = np.asarray(pipeline.image_processor.postprocess(image, output_type="pil")[0])
    return pixels


def test_rows_of_other_prompts_and_levels_share_a_call_and_keep_their_bits(base: Any) -> None:
    sigmas = [1.0, 0.7, 0.3, 0.3]
    conditioning = [base.encode_text(prompt) for prompt in (PROMPT, "snow", "", "a dog")]
    latents = noise(base, 4)
    latents[3] = latents[2]
    together = predicted(base, latents, sigmas, conditioning, 4)
    for row in range(4):
        one = predicted(base, latents[row : row + 1], sigmas[row : row + 1], conditioning[row : row + 1], 4)
        assert torch.equal(one[0], together[row])
    assert not torch.allclose(together[2], together[3], rtol=0.1)  # they differ in their prompt alone


@pytest.mark.parametrize(("scale", "distilled"), [(4.0, False), (1.0, False), (4.0, True)])
def test_diffusers_pipeline_samples_the_same(scale: float, distilled: bool, tiny_klein: Path, checkpoint: Path) -> None:
    """Of a distilled checkpoint, too, under the guidance that it is not made for: it is arithmetic that is compared."""
    folder = checkpoint if distilled else tiny_klein
    if distilled:
        change(checkpoint / "model_index.json", is_distilled=True)
    backbone = loaded(folder)
    found = find_checkpoint(ModelConfig(name=str(folder), text_tokens=PLACES))[:2]
    sampling = Sampling(prompt=PROMPT, noise=noise(backbone, 1)[0], num_steps=3, guidance_scale=scale)
    reference = sampled_by_diffusers(*found, backbone, sampling)
    assert reference is not None
    assert reference.pipeline == "Flux2KleinPipeline"
    ours = sampled(backbone, sampling)
    assert (ours - reference.latents).abs().max() / reference.latents.abs().max() < CLOSE
    assert np.abs(decode_picture(backbone, ours).astype(int) - reference.pixels.astype(int)).max() <= 1


@pytest.mark.parametrize("size", [(64, 80), (80, 64)], ids=str)  # of the reference; diffusers takes none below 64
@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_diffusers_pipeline_edits_the_same_by_a_reference(
    size: tuple[int, int], scale: float, base: Any, theirs: Any
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    start = noise(base, 1, 8, 10)
    expected: list[Tensor] = []

    def keep(_pipeline: Any, _step: int, _time: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        expected.append(given["latents"])
        return {}

    theirs(
        image=Image.fromarray(pixels), prompt=PROMPT, height=64, width=80, num_inference_steps=3, guidance_scale=scale,
        latents=theirs._patchify_latents(start), max_sequence_length=PLACES, output_type="latent",
        callback_on_step_end=keep,
    )  # fmt: skip
    engine = Engine(base, call_size=2)
    trajectory = engine.run_one(NoiseStart(num_steps=3).invert(source_of(engine, start[0], "", start)))
    editor = Instruct() if scale == 4.0 else Instruct(guidance_scale=scale)  # so much is the default
    latents = engine.run_one(editor.sample(trajectory, PROMPT, encode_picture(base, pixels)))
    assert engine.stats.network_rows == (6 if scale == 4.0 else 3)
    tokens = theirs._pack_latents(theirs._patchify_latents(latents[None]))
    assert (tokens - expected[-1]).abs().max() / expected[-1].abs().max() < CLOSE
    without = engine.run_one(editor.sample(trajectory, PROMPT, torch.zeros_like(encode_picture(base, pixels))))
    assert not torch.allclose(without, latents, atol=0.1), "a reference that nobody reads shows nothing"


def test_what_needs_no_unet_works_with_every_inversion_that_it_fits() -> None:
    assert {editor for _, editor in ABLE} >= {"cfg", "reconstruct", "ledits_pp", "diffedit", "direct_edit", "flow_edit"}
    assert {pair for pair in PAIRS if pair not in ABLE} == {pair for pair in PAIRS if OF_A_UNET & {*pair}}


@pytest.fixture(scope="module")
def beside_all_others(base: Any) -> dict[Pair, Tensor]:
    return edited(base, ABLE)


@pytest.mark.slow  # FLUX.1 has the same pairs in the fast suite
@pytest.mark.parametrize("pair", ABLE, ids="+".join)
def test_a_pair_gives_the_same_finite_bits_alone_and_beside_all_others(
    pair: Pair, base: Any, beside_all_others: dict[Pair, Tensor]
) -> None:
    latents = beside_all_others[pair]
    assert torch.isfinite(latents).all()
    assert torch.equal(alone(base, pair), latents)


def test_edit_friendly_inversion_returns_the_image_exactly(base: Any) -> None:
    trajectory, back = Engine(base, call_size=8).run_one(whole(base, ("ddpm", "reconstruct")))
    assert trajectory.levels[0].signal == 0.0
    torch.testing.assert_close(back.latents, trajectory.source.latents, atol=1e-5, rtol=0)


def test_a_distilled_checkpoint_serves_what_neither_guides_nor_walks_backwards_and_says_why(checkpoint: Path) -> None:
    change(checkpoint / "model_index.json", is_distilled=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    start = {"method": "noise", "num_steps": 2}
    with Editor.load(str(checkpoint), size=64, text_tokens=PLACES, device="cpu") as editor:
        by_instruction = {"instruction": "a hat", "inversion": start}
        result = editor.edit(pixels, **by_instruction, editing={"method": "instruct", "guidance_scale": 1.0})
        assert not np.array_equal(np.asarray(result.image), pixels)
        with pytest.raises(RecipeError, match=r"distilled into few unguided steps .*Set editing\.guidance_scale: 1"):
            editor.edit(pixels, **by_instruction, editing={"method": "instruct"})
        with pytest.raises(RecipeError, match=r"knows no guidance, which editing\.method 'cfg' uses"):
            editor.edit(pixels, target_prompt="a dog", inversion=start, editing={"method": "cfg"})
        with pytest.raises(RecipeError, match="cannot be walked backwards"):
            editor.edit(pixels, "hat", inversion={"method": "ddpm"}, editing={"method": "ledits_pp", "mask": "noise"})


def test_half_precision_keeps_the_autoencoder_in_float32_and_the_text_encoder_out_of_float16(
    tiny_klein: Path, base: Any
) -> None:
    exact = predicted(base, noise(base, 1), [0.6], [base.encode_text(PROMPT)], 1)
    for dtype, text, vae in (("float16", "bfloat16", "float32"), ("bfloat16", "bfloat16", "bfloat16")):
        backbone = loaded(tiny_klein, dtype=dtype)
        assert backbone.velocity.transformer.dtype == getattr(torch, dtype)
        assert backbone.text.states.encoder.dtype == getattr(torch, text)
        assert backbone.autoencoder.vae.dtype == getattr(torch, vae)
        velocity = predicted(backbone, noise(backbone, 1), [0.6], [backbone.encode_text(PROMPT)], 1)
        assert velocity.dtype == torch.float32
        assert 0 < float((velocity - exact).norm() / exact.norm()) < 0.2


def test_what_files_tell_without_weights_is_what_the_loaded_model_offers(tiny_klein: Path, base: Any) -> None:
    outline = outline_of(ModelConfig(name=str(tiny_klein)))
    assert outline.offers is not None
    assert dataclasses.asdict(outline.offers) == dataclasses.asdict(base.offers)
    assert (base.offers.references, base.offers.embedded_guidance, base.offers.distilled) == (True, False, "")


def test_a_network_whose_blocks_come_one_by_one_answers_with_the_same_bits(tiny_klein: Path, base: Any) -> None:
    by_layers = loaded(tiny_klein, offload="layers")
    conditioning = [backbone.encode_text(PROMPT) for backbone in (base, by_layers)]
    whole_, blocks = (
        predicted(backbone, noise(base, 1), [0.6], [one], 1)
        for backbone, one in zip((base, by_layers), conditioning, strict=True)
    )
    assert torch.equal(whole_, blocks)


def test_settings_that_it_has_not_are_refused(tiny_klein: Path) -> None:
    for config, reason in (
        ({"embedded_guidance": 3.5}, "is a FLUX.2 klein, whose network takes no guidance scale"),
        ({"empty_prompt": "zeros"}, "was not trained with zeros for a text"),
        ({"t5": False}, "a Flux2KleinPipeline has no text encoder that it could do without"),
        ({"text_8bit": True}, "is for T5"),
    ):
        with pytest.raises(ModelError, match=reason):
            load_backbone(ModelConfig(name=str(tiny_klein), **config), device="cpu")


def _template(checkpoint: Path, text: str) -> None:
    (checkpoint / "tokenizer" / "chat_template.jinja").write_text(text)


SAID = "{{ messages[0].content }}"
MORE = [f"<{number}>" for number in range(99)]
SPOILT = {
    "no template": (
        lambda folder: (folder / "tokenizer" / "chat_template.jinja").unlink(),
        r"a tokenizer without a chat template.*Fetch tokenizer/chat_template\.jinja",
    ),
    "a template that fails": (lambda folder: _template(folder, "{{ nothing.at.all }}"), "cannot be used: Undefined"),
    "a template that hears nothing": (lambda folder: _template(folder, "hello"), "changes what a user says"),
    "a template that trims": (lambda folder: _template(folder, SAID[:-3] + " | trim }}"), "changes what a user says"),
    "a template that counts": (
        lambda folder: _template(folder, "{{ messages[0].content | length }}" + SAID),
        "changes what a user says, or what stands around it",
    ),
    "a template as long as all places": (
        lambda folder: _template(folder, "<|im_start|>" * 600 + SAID),
        r"model\.text_tokens is 512, of which the chat template .* leaves none",
    ),
    "padding on the left": (
        lambda folder: change(folder / "tokenizer" / "tokenizer_config.json", padding_side="left"),
        "does not pad on the right",
    ),
    "another vocabulary": (
        lambda folder: change(folder / "tokenizer" / "tokenizer_config.json", extra_special_tokens=MORE),
        "were not made for each other",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "reason"), SPOILT.values(), ids=list(SPOILT))
def test_a_tokenizer_that_the_text_encoder_was_not_made_for_is_refused(
    spoil: Any, reason: str, checkpoint: Path
) -> None:
    spoil(checkpoint)
    refused(checkpoint, reason)


def test_statistics_that_are_not_finite_are_refused(checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["bn.running_var"][3] = torch.nan
    save_file(weights, file)
    refused(checkpoint, r"weights in vae/ .* not finite: bn\.running_var")


REFUSED: dict[str, tuple[Files, str]] = {
    "FLUX.2 dev": (
        klein(_class_name="Flux2Pipeline", text_encoder=["transformers", "Mistral3ForConditionalGeneration"]),
        "saved from the pipeline Flux2Pipeline .*known are .*Flux2KleinPipeline",
    ),
    "klein with keys and values kept": (klein(_class_name="Flux2KleinKVPipeline"), "the pipeline Flux2KleinKVPipeline"),
    "another scheduler": ({**klein(), **scheduled(KLEIN_INDEX, PNDM)}, "with the scheduler PNDMScheduler"),
    "beta levels": (
        {**klein(), **scheduled(KLEIN_INDEX, {**FLOW, "use_beta_sigmas": True})},
        "its levels are those of a beta distribution",
    ),
    "a transformer that is told a guidance scale": (
        klein({**KLEIN_TRANSFORMER, "guidance_embeds": True}),
        r"is told a guidance scale \(guidance_embeds\), as that of FLUX\.2 dev",
    ),
    "a transformer that says nothing of it": (
        klein({key: value for key, value in KLEIN_TRANSFORMER.items() if key != "guidance_embeds"}),
        "is told a guidance scale",
    ),
    "a transformer of other patches": (
        klein({**KLEIN_TRANSFORMER, "patch_size": 2}),
        "a transformer with patch_size 2, which is not built as that of FLUX.2 klein",
    ),
    "a transformer of three axes": (
        klein({**KLEIN_TRANSFORMER, "axes_dims_rope": [32, 48, 48]}),
        r"with axes_dims_rope \[32, 48, 48\]",
    ),
    "a transformer of another autoencoder": (
        klein({**KLEIN_TRANSFORMER, "in_channels": 64}),
        "a transformer of 64 input channels on latents of 32 channels, of which it would take 128",
    ),
    "an autoencoder of other squares": (
        klein(vae={**KLEIN_VAE, "patch_size": [1, 1]}),
        r"normalises squares of \[1, 1\] latents; known is \[2, 2\]",
    ),
    "a shallow text encoder": (
        klein(text_encoder={**QWEN3_4B, "num_hidden_layers": 24}),
        "a text encoder of 24 layers, and the states of layers 9, 18, 27",
    ),
    "a wider text encoder": (
        klein(text_encoder={**QWEN3_4B, "hidden_size": 4096}),
        "reads embeddings of 7680 numbers, and text encoders that make them of 12288",
    ),
    "no tokenizer": (with_index(klein(), tokenizer=[None, None]), "has no tokenizer in its model_index.json"),
}


@pytest.mark.parametrize(("files", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_klein_is_refused_by_its_files(files: Files, reason: str, tmp_path: Path) -> None:
    refused(put(tmp_path, files), reason)


def test_published_checkpoints_are_known_by_their_files(tmp_path: Path) -> None:
    base, distilled = (f"black-forest-labs/FLUX.2-klein-{kind}" for kind in ("base-4B", "4B"))
    offers = offered(PUBLISHED[base], tmp_path / "base")
    assert (offers.distilled, offers.references, offers.embedded_guidance) == ("", True, False)
    assert len(offers.openings.joint) == 25
    found = offered(PUBLISHED[distilled], tmp_path / "distilled")
    assert "is_distilled in its model_index.json" in found.distilled
    assert dataclasses.replace(found, distilled="") == offers
    assert {file.split("/")[0] for file in PUBLISHED[base] if "/" in file} == set(Flux2KleinFamily.components)


def test_the_digest_follows_the_chat_template(checkpoint: Path, base: Any) -> None:
    _template(checkpoint, SAID)
    assert load_backbone(ModelConfig(name=str(checkpoint)), device="cpu").record.digest != base.record.digest
