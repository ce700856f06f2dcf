"""The GPU benchmark without a GPU: its architectures are the true ones, gaps are told from work, and all of it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.against_diffusers import photographs, prepared, recipe_for
from benchmarks.architectures import SD15, SDXL, Architecture
from benchmarks.flow_architectures import ALL_TINY, FLUX, KLEIN, QWEN_IMAGE_EDIT, SD3, FlowArchitecture, asked
from benchmarks.ledits_on_gpu import requests, with_own_words
from pipeline.models.checkpoint import Configurations
from pipeline.models.families import FAMILIES
from tests.models.families.published import QWEN_PROCESSOR

META = torch.device("meta")


@pytest.mark.parametrize(
    ("architecture", "unet", "text"),
    [
        # As published: the sums of the shapes in the checkpoints' files, without what the vocabulary takes.
        (SD15, 859_520_964, [123_060_480 - 49_408 * 768]),
        (SDXL, 2_567_463_684, [123_060_480 - 49_408 * 768, 694_659_840 - 49_408 * 1280]),
    ],
    ids=lambda value: value.name if isinstance(value, Architecture) else "",
)
def test_networks_have_as_many_weights_as_the_published_ones(
    architecture: Architecture, unet: int, text: list[int]
) -> None:
    def weights(network: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    assert weights(architecture.make_unet(META, torch.float32)) == unet
    assert weights(architecture.make_vae(META, torch.float32)) == 83_653_863
    encoders = architecture.make_texts(META, torch.float32)
    assert [weights(one) - one.config.vocab_size * one.config.hidden_size for one in encoders] == text


def named(value: object) -> str | None:
    return value.name if isinstance(value, FlowArchitecture) else None


@pytest.mark.parametrize(
    ("architecture", "weights"),
    [(SD3, 2.03e9), (FLUX, 11.90e9), (KLEIN, 3.876e9), (QWEN_IMAGE_EDIT, 20.43e9)],
    ids=named,
)
def test_transformers_have_as_many_weights_as_the_published_ones(architecture: FlowArchitecture, weights: int) -> None:
    """As their authors round them: 2 B, 12 B, 4 B and 20 B."""
    network = architecture.make(META, torch.float32).transformer
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(weights, rel=0.005)


@pytest.mark.parametrize(
    ("architecture", "size", "reference", "matrices"),
    [
        (SD3, 512, False, 12),
        (FLUX, 1024, False, 12),
        (FLUX, 1024, True, 12),
        (KLEIN, 512, True, 13),  # a feed-forward with a gate
        (QWEN_IMAGE_EDIT, 512, True, 12),
    ],
    ids=named,
)
def test_a_row_of_a_transformer_takes_what_its_tokens_and_weights_come_to(
    architecture: FlowArchitecture, size: int, reference: bool, matrices: int
) -> None:
    """Each block multiplies all tokens by its matrices, and attends over all of them; the rest is small. A reference's
    tokens are as many as those of what is sampled."""
    config, image = architecture.config, (1 + reference) * (size // 16) ** 2
    tokens = image + architecture.num_text_places(size, reference=reference)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    blocks = config["num_layers"] + config.get("num_single_layers", 0)
    attended = 4 * tokens**2 * width * blocks
    multiplied = 2 * tokens * matrices * width**2 * blocks
    found = gpu.tflop_per_flow_row(architecture, size, reference=reference)
    assert found == pytest.approx((attended + multiplied) / 1e12, rel=0.1)


@pytest.mark.parametrize("size", [512, 1024])
def test_an_instruction_that_speaks_of_a_picture_has_as_many_places_as_its_family_gives_it(size: int) -> None:
    configurations = Configurations(
        {"_class_name": "QwenImageEditPipeline"},
        {"transformer": QWEN_IMAGE_EDIT.config, "text_encoder": {}, "processor": QWEN_PROCESSOR},
    )
    places, _ = FAMILIES["QwenImageEditPipeline"].widest(configurations, size // 8)
    assert places == 2 * (size // 16) ** 2 + QWEN_IMAGE_EDIT.num_text_places(size, reference=True)


@pytest.mark.parametrize("architecture", ALL_TINY, ids=named)
def test_transformers_are_made_in_the_precision_that_they_run_in(architecture: FlowArchitecture) -> None:
    device = torch.device("cpu")
    velocity = architecture.make(device, torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    assert {parameter.dtype for parameter in velocity.transformer.parameters()} == {torch.bfloat16}
    (size, reference), *_ = architecture.calls
    with torch.no_grad():
        answer = asked(velocity, architecture.inputs(1, size, device, torch.bfloat16, reference=reference))
    assert torch.isfinite(answer).all()


def test_a_row_of_stable_diffusion_takes_800_gflop() -> None:
    assert gpu.tflop_per_row(SD15) == pytest.approx(0.803, rel=0.01)


@pytest.mark.parametrize(
    ("times", "share", "longest"),
    [
        ([(0.0, 1.0)], 0.0, 0.0),
        ([(5.0, 6.0), (0.0, 1.0), (1.5, 3.0)], 2.5 / 6.0, 2.0),
        ([(0.0, 4.0), (1.0, 2.0), (3.0, 5.0)], 0.0, 0.0),  # one within the other
    ],
)
def test_gaps_are_what_no_work_covers(times: list[tuple[float, float]], share: float, longest: float) -> None:
    assert gpu.idle(times) == pytest.approx((share, longest))


def test_without_any_work_nothing_is_said_of_gaps() -> None:
    with pytest.raises(ValueError, match="nothing ran"):
        gpu.idle([])


def test_images_that_have_words_of_their_own_ask_for_as_much() -> None:
    edits = requests(2, 3)
    assert [[concept["guidance_scale"] for concept in edit] for edit in edits] == [[5.0, 4.0], [6.0, 5.0], [7.0, 6.0]]

    shared = prepared(photographs(2, 64), recipe_for(64, 2, edits), 64)
    own = [with_own_words(one, number) for number, one in enumerate(shared)]
    prompts = [[concept.prompt for concept in one.requests["edit2"].concepts] for one in own]
    assert prompts == [["sunglasses 0", "red hat 0"], ["sunglasses 1", "red hat 1"]]
    assert [concept.guidance_scale for concept in own[1].requests["edit2"].concepts] == [7.0, 6.0]


def test_without_a_gpu_the_whole_benchmark_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--small" in capsys.readouterr().err


def test_a_dry_run_fills_every_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "BUILD", tmp_path)
    monkeypatch.setattr("sys.argv", ["gpu", "--small"])
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["dry_run"] is True
    assert {"date", "cpu", "torch"} <= set(found["machine"])
    assert found["peak"][0]["tflops"] >= 0
    assert {row["model"] for row in found["network"]} == {"tiny SD", "tiny SDXL"}
    assert {row["call_size"] for row in found["network"]} == {1, 2}
    assert all(row["rows_per_s"] > 0 for row in found["network"])
    assert [row["model"] for row in found["engine"]] == ["tiny SD", "tiny SDXL"]
    assert all(row["ratio"] > 0 and 0 <= row["idle_share"] < 1 for row in found["engine"])
    flow = [(row["model"], row["pixels"], row["reference"], row["call_size"]) for row in found["flow"]]
    assert flow == [
        (model, size, reference, rows)
        for model, references in (
            ("tiny SD 3", [False]),
            ("tiny FLUX", [False, True]),
            ("tiny FLUX.2 klein", [False, True]),
            ("tiny Qwen-Image-Edit", [True]),
        )
        for size in (32, 64)
        for reference in references
        for rows in (1, 2)
    ]
    assert all(row["rows_per_s"] > 0 and row["share_of_peak"] > 0 for row in found["flow"])
    cases = {(row["model"], row["concepts"], row["edits"], row["of"]) for row in found["ledits"]}
    assert len(cases) == len(found["ledits"]) == 2 * 3 * 2 * 2
    assert all(row["ratio"] > 0 for row in found["ledits"])
    assert {row["diffusers_batch"] for row in found["ledits"] if row["of"] == "each image"} == {1}
    assert "LEDITS++ against diffusers" in capsys.readouterr().out
