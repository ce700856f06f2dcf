"""`shardedit check-model`: every answer, the verdict over them, and the page. A model that is broken is found so."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from typing_extensions import override

from pipeline.cli import app
from pipeline.engine.calls import NetworkCall
from pipeline.errors import ModelError, RecipeError, SinkError
from pipeline.looking.check_model import agreement, editing, model, round_trips
from pipeline.looking.check_model.page import render
from pipeline.looking.check_model.records import Check, ModelCheck, Status
from pipeline.looking.check_model.run import check_model, recipe_for
from pipeline.looking.check_model.subject import Subject, request_of
from pipeline.models import unet
from pipeline.models.families.stable_diffusion_xl import SizeIds
from pipeline.models.loading import DEMO_FOLDER, find_checkpoint, load_backbone
from pipeline.settings.sections import ModelConfig
from tests.checkpoints import change
from tests.golden.replay import TINY_SDXL

TINY_SD = TINY_SDXL.parent / "tiny-sd"
SIDE = 64  # pixels: what takes seconds
NAMES = ["loads", "offers", "methods", "autoencoder", "inversions", "agreement", "edit", "speed"]


class Page(HTMLParser):
    """Tags that are open, ids, and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.pictures: list[str] = []
        self.outside: list[str] = []  # whatever is not inside the page
        self.feed(text)
        self.close()

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "section":
            self.ids.append(given["id"] or "")
        if tag == "img":
            self.pictures.append(given["alt"] or "")
        links = [given[key] or "" for key in ("src", "href") if key in given]
        self.outside += [link for link in links if not link.startswith(("data:image/", "#"))]
        if tag not in ("meta", "img", "wbr", "rect", "path"):
            self.open.append(tag)

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(found: ModelCheck) -> Page:
    assert found.page is not None
    page = Page(found.page.read_text())
    assert page.open == []
    assert page.outside == []
    return page


def check(name: str | Path, folder: Path, side: int | None = SIDE) -> ModelCheck:
    return check_model(ModelConfig(name=str(name), size=side), None, folder, num_steps=2, call_size=2, device="cpu")


def subject_of(name: str | Path, side: int = SIDE) -> Subject:
    recipe = recipe_for(str(name), [f"model.size={side}", "run.call_size=2"])
    backbone = load_backbone(recipe.model, device="cpu")
    return Subject.of(
        recipe,
        backbone,
        find_checkpoint(recipe.model)[:2],
        image=None,
        request=request_of("add sunglasses"),
        num_steps=2,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> ModelCheck:
    return check("demo", tmp_path_factory.mktemp("demo"), side=None)  # at another size it keeps no picture


def test_every_question_is_answered_of_the_bundled_model(demo: ModelCheck) -> None:
    assert demo.json is not None
    said = json.loads(demo.json.read_text())
    assert said == demo.as_dict()
    assert [one["name"] for one in said["checks"]] == NAMES
    answers = {one["name"]: one for one in said["checks"]}
    assert {one["status"] for one in said["checks"]} <= {"ok", "warning"}
    loads = answers["loads"]
    assert (loads["family"], loads["dtype"], loads["device"]) == ("stable_diffusion", "float32", "cpu")
    unet = load_backbone(ModelConfig(), device="cpu").unet  # type: ignore[attr-defined]
    assert loads["parameters"]["unet"] == sum(one.numel() for one in unet.parameters())
    assert answers["offers"]["attention_grids"] == ["16x16", "8x8"]
    assert answers["offers"]["watched_grid"] == "8x8"
    assert {editor for _, editor, _ in answers["methods"]["cannot"]} == {"instruct"}  # which needs a reference image
    assert ["ddpm", "ledits_pp"] in answers["methods"]["works"]
    assert answers["autoencoder"]["psnr_db"] > round_trips.BLURRED
    assert answers["inversions"]["ddpm_psnr_db"] > round_trips.EXACT
    assert answers["agreement"]["relative_difference"] < 1e-4
    assert answers["agreement"]["decoded_difference_levels"] == 0
    assert answers["edit"]["editor"] == "ledits_pp"
    rows, rate = answers["edit"]["network_rows"], answers["speed"]["rows_per_second"]
    assert answers["speed"]["hours_per_million"] >= 0.9 * rows / rate * 1e6 / 3600


def test_the_page_holds_every_answer_and_its_pictures(demo: ModelCheck) -> None:
    page = page_of(demo)
    assert page.ids == NAMES
    pairs = [("autoencoder", ["picture", "there and back"]), ("inversions", ["after ddpm", "after ddim"])]
    pairs += [("agreement", ["shardedit", "diffusers"])]
    expected = [f"{name}: {label}" for name, labels in pairs for label in labels]
    assert page.pictures[:6] == expected
    assert page.pictures[6] == "edit: input"
    assert page.pictures[-1] == "edit: add sunglasses"


@pytest.mark.parametrize("folder", [TINY_SD, TINY_SDXL])
def test_random_weights_sample_as_diffusers_does_and_keep_no_picture(folder: Path, tmp_path: Path) -> None:
    found = check(folder, tmp_path)
    assert found.of("agreement").status == "ok"
    assert found.of("agreement").values["relative_difference"] < 1e-4
    assert found.of("inversions").values["ddpm_psnr_db"] > round_trips.EXACT
    assert found.of("autoencoder").status == "failed"
    assert (found.verdict, found.exit_code()) == ("not usable", 1)
    assert "Not usable" in render(found)


def test_what_is_refused_is_a_page_with_the_refusal(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY_SD, tmp_path / "<b>model"))
    (folder / "vae" / "config.json").unlink()
    found = check(folder, tmp_path / "out")
    assert (found.verdict, found.exit_code()) == ("not usable", 1)
    assert [one.name for one in found.checks] == ["loads"]
    page = page_of(found)  # what is no markup closes nothing
    assert page.ids == ["loads"]
    assert found.page is not None
    assert "has no vae/config.json" in found.page.read_text()


def lcm(folder: Path) -> None:
    change(folder / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    change(folder / "scheduler" / "scheduler_config.json", _class_name="LCMScheduler")


def test_a_distilled_model_is_usable_with_warnings(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "model"))
    lcm(folder)
    found = check(folder, tmp_path / "out", side=128)
    assert {one.name: one.status for one in found.checks if one.name not in ("autoencoder", "edit")} == {
        "loads": "ok",
        "offers": "warning",
        "methods": "warning",
        "inversions": "not applicable",
        "agreement": "not applicable",
        "speed": "ok",
    }
    values = found.of("edit").values
    assert (values["inversion"], values["editor"]) == ("noise", "cfg")
    assert (found.verdict, found.exit_code(), found.exit_code(strict=True)) == ("usable with warnings", 0, 1)


def test_an_autoencoder_that_overflows_or_loses_the_picture_fails() -> None:
    subject = subject_of("demo", side=128)
    vae: Any = subject.backbone.autoencoder.vae  # type: ignore[attr-defined]
    assert round_trips.autoencoder(subject).status == "ok"
    with torch.no_grad():
        vae.decoder.conv_out.weight.zero_()
    lost = round_trips.autoencoder(subject)
    assert lost.status == "failed"
    assert "Below 15 dB" in lost.text
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(-9.0)
    assert "black" in round_trips.autoencoder(subject).text
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(float("nan"))
    broken = round_trips.autoencoder(subject)
    assert broken.status == "failed"
    assert "not finite" in broken.text


def other_last_level(backbone: Any) -> None:
    backbone.schedule = dataclasses.replace(backbone.schedule, final_alpha_bar=1.0)


def other_offset(backbone: Any) -> None:
    backbone.schedule = dataclasses.replace(backbone.schedule, steps_offset=0)


def other_scale(backbone: Any) -> None:
    backbone.autoencoder._scale *= 1.05


def other_size_ids(backbone: Any) -> None:
    backbone.text.size_ids = SizeIds(original=(8, 8))


@pytest.mark.parametrize("spoil", [other_last_level, other_offset, other_scale, other_size_ids])
def test_what_samples_otherwise_than_diffusers_fails(spoil: Callable[[Any], None]) -> None:
    subject = subject_of(TINY_SDXL)
    assert agreement.agreement(subject).status == "ok"
    spoil(subject.backbone)
    assert agreement.agreement(subject).status == "failed"


def test_the_comparison_is_with_diffusers_own_attention_and_leaves_ours_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(TINY_SD)
    backbone: Any = subject.backbone
    prompt = backbone.encode_text("a")
    call = NetworkCall(torch.ones(1, 4, 8, 8), [backbone.schedule.level(501)], [prompt])
    before = backbone.denoise(call).predictions.noise
    assert agreement.agreement(subject).status == "ok"
    assert torch.equal(backbone.denoise(call).predictions.noise, before)
    for name in backbone.unet.attn_processors:
        assert "forward" in vars(backbone.unet.get_submodule(name.removesuffix(".processor")))
    ours = unet.fused_attention
    monkeypatch.setattr(unet, "fused_attention", lambda q, k, v, mask, scale: ours(q, k, v, mask, 3 * scale))
    assert agreement.agreement(subject).status == "failed"


def test_an_error_in_one_answer_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(subject: Subject) -> Check:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(editing, "edit", fails)
    monkeypatch.setattr(agreement, "agreement", fails)
    found = check("analytic", tmp_path)
    assert [one.name for one in found.checks] == NAMES
    assert found.of("edit").status == found.of("agreement").status == "failed"
    assert "no memory left" in found.of("edit").text
    assert found.of("speed").values["hours_per_million"] is None


@pytest.mark.parametrize(
    ("statuses", "verdict", "codes"),
    [
        (["ok", "not applicable"], "ok", (0, 0)),
        (["ok", "warning"], "usable with warnings", (0, 1)),
        (["warning", "failed"], "not usable", (1, 1)),
    ],
)
def test_the_worst_answer_decides(statuses: list[Status], verdict: str, codes: tuple[int, int]) -> None:
    checks = tuple(Check(name="edit", status=status, text="") for status in statuses)
    found = ModelCheck(model="m", image="i", checks=checks, seconds=1.0)
    assert found.verdict == verdict
    assert (found.exit_code(), found.exit_code(strict=True)) == codes


def test_methods_that_no_default_helps_are_named_with_the_reason() -> None:
    subject = subject_of("demo")
    backbone: Any = subject.backbone
    openings = dataclasses.replace(backbone.offers.openings, watched=frozenset())
    backbone.offers = dataclasses.replace(backbone.offers, openings=openings)
    found = model.methods(subject)
    assert found.status == "warning"
    reasons = {(inversion, editor): reason for inversion, editor, reason in found.values["cannot"]}
    assert "Set editing.mask: noise or steady" in reasons["ddpm", "ledits_pp"]
    method = editing.method_for(subject)
    assert method is not None
    assert method.editing.mask == "noise"  # type: ignore[attr-defined]
    assert model.offers(subject).status == "warning"
    backbone.offers = dataclasses.replace(backbone.offers, inputs=frozenset({"inpaint"}))
    assert model.methods(subject).values["works"] == []
    method = editing.method_for(subject)
    assert method is not None
    assert method.editing.backend == "inpaint"  # type: ignore[attr-defined]


def test_a_model_that_no_method_can_use_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(TINY_SDXL)
    monkeypatch.setattr(editing, "method_for", lambda _: None)
    assert editing.edit(subject).status == "failed"


def test_a_prompt_says_whether_to_add_or_to_remove() -> None:
    asked = {prompt: request_of(prompt).concepts[0] for prompt in ("a hat", "add a hat", "Remove the hat")}
    assert [(one.prompt, one.direction) for one in asked.values()] == [
        ("a hat", "add"),
        ("a hat", "add"),
        ("the hat", "remove"),
    ]
    for prompt in ("add ", " ", "hat " * 1000):
        with pytest.raises(RecipeError, match="names nothing, or is too long"):
            request_of(prompt)


def test_what_is_not_read_is_refused_and_so_is_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"sink.folder: is not read here"):
        recipe_for("demo", ["sink.folder=x"])
    assert recipe_for("demo", ["model.dtype=bfloat16", "run.seed=3"]).model.dtype == "bfloat16"
    with pytest.raises(ModelError, match="there is no device 'nowhere'"):
        check_model(ModelConfig(), None, tmp_path, device="nowhere")


def test_a_file_that_is_not_ours_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "check-model.html").write_text("mine")
    with pytest.raises(SinkError, match="not written by shardedit"):
        check("analytic", tmp_path)
    assert (tmp_path / "check-model.html").read_text() == "mine"


def test_the_command_prints_answers_or_json_and_ends_with_the_verdict(tmp_path: Path) -> None:
    arguments = [
        "check-model",
        "analytic",
        "run.call_size=2",
        "--steps",
        "2",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    printed = CliRunner().invoke(app, arguments)
    assert "loads" in printed.output
    assert str(tmp_path / "check-model.html") in printed.output
    said = CliRunner().invoke(app, [*arguments, "--json"])
    content = json.loads(said.stdout)
    assert content == json.loads((tmp_path / "check-model.json").read_text())
    assert printed.exit_code == said.exit_code == (1 if content["verdict"] == "not usable" else 0)
    broken = CliRunner().invoke(app, ["check-model", str(tmp_path), "--out", str(tmp_path)])
    assert broken.exit_code == 1
    assert "model_index.json" in broken.output
    assert CliRunner().invoke(app, ["check-model", "demo", "source.shards=x"]).exit_code == 2
