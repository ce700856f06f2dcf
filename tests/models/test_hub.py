"""Checkpoints from a hub: only what is loaded is fetched, and whoever has no network is told what to do."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline.errors import ModelError
from pipeline.models import hub as our_hub
from pipeline.models.checkpoint import files_by_role
from pipeline.models.families.stable_diffusion import StableDiffusionFamily
from pipeline.models.loading import load_backbone
from pipeline.models.outline import outline_of
from pipeline.recipe import ModelConfig
from tests.golden.replay import TINY_SD
from tests.hub import COMMIT, Hub, hub
from tests.methods import tiny_sd

MB = 10**6
PARTS = StableDiffusionFamily.components
SD_1_5 = {  # as the repository stable-diffusion-v1-5/stable-diffusion-v1-5 lists them, bytes rounded
    ".gitattributes": 1000, "README.md": 15_000, "v1-inference.yaml": 2000, "model_index.json": 541,
    "feature_extractor/preprocessor_config.json": 342,
    "safety_checker/config.json": 5000, "safety_checker/model.fp16.safetensors": 608 * MB,
    "safety_checker/model.safetensors": 1216 * MB, "safety_checker/pytorch_model.bin": 1216 * MB,
    "safety_checker/pytorch_model.fp16.bin": 608 * MB,
    "scheduler/scheduler_config.json": 308,
    "text_encoder/config.json": 617, "text_encoder/model.fp16.safetensors": 246 * MB,
    "text_encoder/model.safetensors": 492 * MB, "text_encoder/pytorch_model.bin": 492 * MB,
    "text_encoder/pytorch_model.fp16.bin": 246 * MB,
    "tokenizer/merges.txt": 525_000, "tokenizer/special_tokens_map.json": 472,
    "tokenizer/tokenizer_config.json": 806, "tokenizer/vocab.json": 1_060_000,
    "unet/config.json": 743, "unet/diffusion_pytorch_model.bin": 3438 * MB,
    "unet/diffusion_pytorch_model.fp16.bin": 1719 * MB, "unet/diffusion_pytorch_model.fp16.safetensors": 1719 * MB,
    "unet/diffusion_pytorch_model.non_ema.bin": 3438 * MB,
    "unet/diffusion_pytorch_model.non_ema.safetensors": 3438 * MB,
    "unet/diffusion_pytorch_model.safetensors": 3438 * MB,
    "v1-5-pruned-emaonly.ckpt": 4265 * MB, "v1-5-pruned-emaonly.safetensors": 4265 * MB,
    "v1-5-pruned.ckpt": 7704 * MB, "v1-5-pruned.safetensors": 7704 * MB,
    "vae/config.json": 547, "vae/diffusion_pytorch_model.bin": 335 * MB,
    "vae/diffusion_pytorch_model.fp16.bin": 167 * MB, "vae/diffusion_pytorch_model.fp16.safetensors": 167 * MB,
    "vae/diffusion_pytorch_model.safetensors": 335 * MB,
}  # fmt: skip
NETWORKS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.mark.parametrize(("variant", "gigabytes"), [(None, 4.27), ("fp16", 2.13)])
def test_of_stable_diffusion_1_5_four_gigabytes_are_fetched_and_two_of_its_fp16_variant(
    variant: str | None, gigabytes: float
) -> None:
    files = set(files_by_role(PARTS, SD_1_5, variant, "it").values())
    assert sum(SD_1_5[file] for file in files) / 1e9 == pytest.approx(gigabytes, abs=0.01)
    dotted = f".{variant}" if variant else ""
    assert {file for file in files if file.endswith(".safetensors")} == {
        f"{network}/{stem}{dotted}.safetensors" for network, stem in NETWORKS.items()
    }
    assert not [file for file in files if "/" not in file and file != "model_index.json"]


def test_a_variant_that_the_unet_alone_has_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ModelError, match=r"no weights of variant non_ema in vae/, but .*fp16.*Set model.variant"):
        files_by_role(PARTS, SD_1_5, "non_ema", "it")


def test_shards_are_fetched_with_their_index() -> None:
    one = "unet/diffusion_pytorch_model.safetensors"
    for index, shard in (
        ("unet/diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model.fp16-0000{}-of-00002"),
        ("unet/diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model-0000{}-of-00002.fp16"),
    ):
        shards = {f"unet/{shard.format(number)}.safetensors" for number in (1, 2)}
        plain = {"unet/diffusion_pytorch_model-00001-of-00002.safetensors"}
        files = set(files_by_role(PARTS, {*SD_1_5, index, *shards, *plain}, "fp16", "it").values())
        assert {file for file in files if file.startswith("unet/")} == {"unet/config.json", index, *shards}
        assert one in files_by_role(PARTS, {*SD_1_5, index, *shards}, None, "it").values()


@pytest.fixture
def served(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The tiny model as a repository of Stable Diffusion's files, with fp16 twins and much that nobody loads."""
    for name in SD_1_5:
        file = checkpoint / name
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            file.write_bytes(b"never loaded")
    for network, stem in NETWORKS.items():
        plain = load_file(checkpoint / network / f"{stem}.safetensors")
        save_file(
            {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in plain.items()},
            checkpoint / network / f"{stem}.fp16.safetensors",
            {"format": "pt"},
        )
    for file in ("vocab.json", "merges.txt", "special_tokens_map.json"):  # tokenizer.json holds them
        (checkpoint / "tokenizer" / file).unlink(missing_ok=True)
    with hub(checkpoint, "owner/model", tmp_path / "cache", monkeypatch) as made:
        yield made


def test_what_is_downloaded_loads_and_nothing_else_is_downloaded(
    served: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    record = load_backbone(ModelConfig(name="owner/model"), device="cpu").record
    assert (record.name, record.revision) == ("owner/model", COMMIT)
    assert record.digest == tiny_sd().record.digest
    assert set(served.got.elements()) == set(files_by_role(PARTS, served.files(), None, "it").values())
    err = capfd.readouterr().err
    assert "model 'owner/model' (revision main): fetching 3 files, " in err
    assert "\r" not in err  # no bars where nobody watches
    assert load_backbone(ModelConfig(name="owner/model"), device="cpu").record == record
    assert max(served.got.values()) == 1
    assert capfd.readouterr().err == ""


def test_another_variant_is_other_files_and_another_digest(served: Hub) -> None:
    record = load_backbone(ModelConfig(name="owner/model", variant="fp16"), device="cpu").record
    assert record.digest != tiny_sd().record.digest
    assert {name for name in served.got if name.endswith(".safetensors")} == {
        f"{network}/{stem}.fp16.safetensors" for network, stem in NETWORKS.items()
    }


def test_progress_is_told_in_lines_where_no_terminal_is(
    served: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(our_hub, "LINE_EVERY", 0.0)
    our_hub.fetch("owner/model", None, None)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) > 2
    weights = [name for name in served.got if name.endswith(".safetensors")]
    total = sum(served.files()[name].stat().st_size for name in weights) / 1e9
    assert lines[-1] == f"model 'owner/model' (revision main): {total:.3g} of {total:.3g} GB"


def test_of_workers_that_load_at_once_one_downloads(served: Hub) -> None:
    threads = [threading.Thread(target=our_hub.fetch, args=("owner/model", None, None)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(served.got.values()) == {1}


def test_without_a_network_what_was_fetched_before_is_loaded(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    record = load_backbone(ModelConfig(name="owner/model"), device="cpu").record
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_backbone(ModelConfig(name="owner/model"), device="cpu").record == record
    with pytest.raises(ModelError, match="no weights of variant fp16 in unet/"):
        load_backbone(ModelConfig(name="owner/model", variant="fp16"), device="cpu")


def test_offline_without_the_model_says_what_was_tried_and_what_to_do(
    served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = r"revision v1\) is no local folder here; the hub was not asked \(HF_HUB_OFFLINE\), .*cache.*HF_HOME"
    with pytest.raises(ModelError, match=said):
        load_backbone(ModelConfig(name="owner/model", revision="v1"), device="cpu")


def test_a_hub_that_cannot_be_reached_is_told_by_the_error(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(ModelError, match=r"the hub gave no answer \(ConnectError\)"):
        load_backbone(ModelConfig(name="owner/model"), device="cpu")


def test_a_repository_and_a_revision_that_are_not_there_are_told_apart(served: Hub) -> None:
    with pytest.raises(ModelError, match="no such revision"):
        load_backbone(ModelConfig(name="owner/model", revision="v2"), device="cpu")
    with pytest.raises(ModelError, match="the hub does not know it"):
        load_backbone(ModelConfig(name="owner/other"), device="cpu")


def test_a_gated_repository_asks_for_a_token(served: Hub) -> None:
    served.gated = True
    with pytest.raises(ModelError, match=r"is gated. Accept its terms on the hub, and set HF_TOKEN"):
        load_backbone(ModelConfig(name="owner/model"), device="cpu")


def test_a_repository_without_diffusers_format_is_refused_before_anything_is_fetched(served: Hub) -> None:
    shutil.move(served.folder / "model_index.json", served.folder / "index.json")
    with pytest.raises(ModelError, match=r"has no model_index\.json"):
        load_backbone(ModelConfig(name="owner/model"), device="cpu")
    assert not served.got


def test_what_is_known_without_weights_takes_none(served: Hub) -> None:
    here, there = outline_of(ModelConfig(name=str(TINY_SD))), outline_of(ModelConfig(name="owner/model"))
    assert asdict(there.offers) == asdict(here.offers) == asdict(tiny_sd().offers)
    assert there.tokenizers
    assert there.read_part("a cat " * 99) == here.read_part("a cat " * 99)
    assert not [file for file in served.got if file.endswith(".safetensors")]
