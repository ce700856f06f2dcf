"""MasaCtrl: what the target reads, what it leaves alone, masks, counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.masactrl import MasaCtrl
from pipeline.engine.calls import Conditioning
from pipeline.engine.engine import Engine
from pipeline.engine.texts import _Text
from pipeline.errors import PrepareError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.direct import DirectInversion
from pipeline.inversion.negative_prompt import NegativePromptInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig
from pipeline.records import EditedLatents, EditRequest, WordPair
from tests.facts import EditorFacts
from tests.methods import analytic, invert_and_edit, rows_of_edit, source, tiny_sd

FACTS = EditorFacts(rows=4, rows_after={"negative_prompt": 3}, quick={"start_step": 1})
N = 4
SITTING, STANDING = "a photo of a cat sitting", "a photo of a cat standing up"
WORDS = EditRequest(target_prompt=STANDING, blend_words=WordPair(source=("cat",), target=("cat",)))
EVERYWHERE: dict[str, Any] = {"guidance_scale": 2.0, "start_step": 0, "start_layer": 0}


def generated(editor: Any, request: EditRequest = WORDS, **options: Any) -> EditedLatents:
    """A pair from Gaussian noise, where a random network amplifies little."""
    given = source(tiny_sd(), 1, SITTING)
    generator = invert_and_edit(given, request, NoiseStart(num_steps=N), editor, observe=True, **options)
    return Engine(tiny_sd(), call_size=8).run_one(generator)[1]


def sources(edited: EditedLatents) -> Tensor:
    return torch.stack([record.source_latents for record in edited.history if record.source_latents is not None])


@pytest.mark.parametrize(
    ("inversion", "prompt", "free", "controlled"),
    [
        (DirectInversion(num_steps=N), "", 2, 3),
        (DirectInversion(num_steps=N), SITTING, 2, 4),
        (DDIMInversion(num_steps=N), "", 3, 3),
        (DDIMInversion(num_steps=N), SITTING, 4, 4),
        (NegativePromptInversion(num_steps=N), SITTING, 3, 3),
    ],
)
def test_the_source_has_rows_only_where_they_are_read(inversion: Any, prompt: str, free: int, controlled: int) -> None:
    rows = rows_of_edit(inversion, MasaCtrl(start_step=1), EditRequest(target_prompt=STANDING), prompt)
    assert rows == free + (N - 1) * controlled


@pytest.mark.parametrize("never", [{"start_step": N}, {"start_layer": 16}, {"layer_idx": ()}, {"step_idx": ()}])
def test_a_target_that_never_reads_the_source_is_sampled_as_ever(never: dict[str, Any]) -> None:
    alone = generated(MasaCtrl(**{**EVERYWHERE, **never}))
    plain = generated(ClassifierFreeGuidance(guidance_scale=2.0))
    torch.testing.assert_close(alone.latents, plain.latents, atol=1e-4, rtol=1e-4)
    assert alone.masks is None


def test_explicit_lists_say_the_same_as_the_starts() -> None:
    lists = MasaCtrl(guidance_scale=2.0, step_idx=(2, 3), layer_idx=(10, 11, 12, 13, 14, 15))
    starts = MasaCtrl(guidance_scale=2.0, start_step=2)
    assert torch.equal(generated(lists).latents, generated(starts).latents)
    assert not torch.equal(generated(starts).latents, generated(MasaCtrl(guidance_scale=2.0, start_step=4)).latents)


def test_the_source_does_not_notice_the_target() -> None:
    controlled, free = generated(MasaCtrl(**EVERYWHERE)), generated(MasaCtrl(**{**EVERYWHERE, "start_step": N}))
    assert torch.equal(sources(controlled), sources(free))
    assert not torch.allclose(controlled.latents, free.latents, atol=1e-2)


@pytest.mark.parametrize("keys", ["source", "union"])
def test_a_target_with_the_sources_prompt_is_the_source(keys: Any) -> None:
    edited = generated(MasaCtrl(**EVERYWHERE, keys=keys), EditRequest(target_prompt=SITTING))
    targets = torch.stack([record.latents for record in edited.history])
    torch.testing.assert_close(targets, sources(edited), atol=1e-4, rtol=1e-4)


def test_the_union_reads_both_branches() -> None:
    union, mutual = generated(MasaCtrl(**EVERYWHERE, keys="union")), generated(MasaCtrl(**EVERYWHERE))
    free = generated(MasaCtrl(**{**EVERYWHERE, "start_step": N}))
    assert not torch.allclose(union.latents, mutual.latents, atol=1e-2)
    assert not torch.allclose(union.latents, free.latents, atol=1e-2)


def test_one_row_for_both_halves_of_an_empty_source_is_as_good_as_two() -> None:
    def run(prompt: str) -> tuple[Tensor, int]:
        engine = Engine(tiny_sd(), call_size=8)
        empty = tiny_sd().encode_text("")
        almost = Conditioning("almost empty", {"embedding": empty.embedding + 1e-6})
        engine._texts._keep(_Text("almost empty", ""), almost)
        generator = invert_and_edit(
            source(tiny_sd(), 1, prompt), WORDS, NoiseStart(num_steps=N), MasaCtrl(**EVERYWHERE)
        )
        return engine.run_one(generator)[1].latents, engine.stats.network_rows

    (three, three_rows), (four, four_rows) = run(""), run("almost empty")
    assert (three_rows, four_rows) == (3 * N, 4 * N)
    torch.testing.assert_close(three, four, atol=1e-3, rtol=1e-3)


def test_a_mask_of_one_class_is_no_mask_and_the_classes_may_change_names() -> None:
    given, left = MasaCtrl(**EVERYWHERE, mask="given"), torch.zeros((12, 12))
    left[:, :6] = 1.0
    plain = generated(MasaCtrl(**EVERYWHERE)).latents
    for mask in (torch.ones((12, 12)), torch.zeros((12, 12)), None):
        one_class = generated(given, user_mask=mask)
        torch.testing.assert_close(one_class.latents, plain, atol=1e-4, rtol=1e-4)
    inside, outside = generated(given, user_mask=left), generated(given, user_mask=1.0 - left)
    assert torch.equal(inside.latents, outside.latents)
    assert not torch.allclose(inside.latents, plain, atol=1e-2)
    assert torch.equal(inside.mask, left.bool())


def test_an_automatic_mask_of_everything_is_no_mask() -> None:
    plain, everything = generated(MasaCtrl(**EVERYWHERE)), generated(MasaCtrl(**EVERYWHERE, mask="auto", thres=0.0))
    torch.testing.assert_close(everything.latents, plain.latents, atol=1e-4, rtol=1e-4)
    assert everything.mask.all()
    half = generated(MasaCtrl(**EVERYWHERE, mask="auto", thres=0.5))
    assert not torch.allclose(half.latents, plain.latents, atol=1e-3)
    assert half.masks.shape == (1, 12, 12)
    assert 0 < half.mask.double().mean() < 1


def test_words_and_positions_name_the_same_tokens() -> None:
    auto: dict[str, Any] = {**EVERYWHERE, "mask": "auto", "thres": 0.5}
    by_position = generated(
        MasaCtrl(**auto, ref_token_idx=(5,), cur_token_idx=(5,)), EditRequest(target_prompt=STANDING)
    )
    assert torch.equal(generated(MasaCtrl(**auto)).latents, by_position.latents)


def test_a_masked_edit_has_the_same_bits_beside_other_edits() -> None:
    def generators(number: int) -> Any:
        masked = MasaCtrl(guidance_scale=2.0, start_step=1, mask="auto", thres=0.5)
        edits = [(1, masked), (2, masked), (3, MasaCtrl(guidance_scale=2.0, start_step=0, keys="union"))][:number]
        return [
            invert_and_edit(source(tiny_sd(), at, SITTING), WORDS, NoiseStart(num_steps=N), editor)
            for at, editor in edits
        ]

    alone, beside = (list(Engine(tiny_sd(), call_size=8).run(generators(number))) for number in (1, 3))
    first = next(finished for finished in beside if finished.index == 0)
    assert torch.equal(first.value[1].latents, alone[0].value[1].latents)
    assert torch.equal(first.value[1].masks, alone[0].value[1].masks)


def test_where_no_step_is_controlled_no_foreground_was_looked_for() -> None:
    request = WORDS.model_copy(update={"target_prompt": "cat"})
    generator = invert_and_edit(
        source(analytic(), 1, "cat"), request, DirectInversion(num_steps=N), MasaCtrl(start_step=N, mask="auto")
    )
    edited = Engine(analytic(), call_size=8).run_one(generator)[1]
    assert edited.masks is None
    assert torch.isfinite(edited.latents).all()


def test_by_default_the_fine_layers_of_the_decoder_are_controlled_whatever_the_unet() -> None:
    for name, expected in ((tiny_sd().record.name, list(range(10, 16))), ("demo", None)):
        backbone: Any = tiny_sd() if expected else load_backbone(ModelConfig(name=name), device="cpu")
        controlled = [layer for layer in backbone.offers.openings.layers if MasaCtrl().layers.picks(layer)]
        assert controlled
        assert {layer.place for layer in controlled} == {"up"}
        assert expected is None or [layer.index for layer in controlled] == expected


def test_what_cannot_act_is_refused() -> None:
    with pytest.raises(PrepareError, match="Add target_prompt"):
        MasaCtrl().check(EditRequest(), DDIMInversion(num_steps=50))
    steps = DDIMInversion(num_steps=8)
    assert "start_step 8 leaves none of the 8 steps" in next(MasaCtrl(start_step=8).pair_problems(steps))
    assert "step_idx names step 8" in next(MasaCtrl(step_idx=(3, 8)).pair_problems(steps))
    with pytest.raises(PrepareError, match="Add blend_words"):
        MasaCtrl(mask="auto").check(EditRequest(target_prompt=STANDING), DDIMInversion(num_steps=8))
    with pytest.raises(ValueError, match="keys: union"):
        MasaCtrl(mask="given", keys="union")
    wrong = WORDS.model_copy(update={"blend_words": WordPair(source=("dog",), target=("cat",))})
    with pytest.raises(PrepareError, match="blend word 'dog' is not a word of the prompt 'a photo of a cat sitting'"):
        generated(MasaCtrl(mask="auto"), wrong)
    with pytest.raises(PrepareError, match="cur_token_idx names position 77"):
        generated(MasaCtrl(mask="auto", cur_token_idx=(77,)))
