"""Checkpoints with files that are missing, cut, foreign or of other types; none of them is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.corpus.commands import STARTING, Situation, World, remove
from tests.golden.replay import TINY_SD

JSON = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json")
JSON += ("text_encoder/config.json",)
WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
CONTENT = {
    "nothing": b"",
    "half an object": b"{",
    "a list": b"[]",
    "an object": b"{}",
    "lists 100,000 deep": b"[" * 100_000,
    "not UTF-8": b'{"a": "\xff"}',
}
INDEX: dict[str, Any] = {
    "a class of somebody's": {"unet": ["evil", "Model"]},
    "another text encoder": {"text_encoder": ["transformers", "T5EncoderModel"]},
    "no UNet": {"unet": None},
    "a UNet of text": {"unet": "diffusers"},
    "a UNet of a number": {"unet": 5},
    "a UNet of three words": {"unet": ["diffusers", "UNet2DConditionModel", "x"]},
    "another transformer": {"unet": ["diffusers", "SD3Transformer2DModel"]},
    "remote code": {"auto_map": {"AutoModel": "x.Y"}},
}
HEADERS = {  # of safetensors: eight bytes of length, and JSON
    "a header of 2^63 bytes": (2**63 - 1).to_bytes(8, "little") + b"{}",
    "a header of nothing": bytes(8),
    "a header that is no JSON": (4).to_bytes(8, "little") + b"null",
    "a header of deep lists": (90_000).to_bytes(8, "little") + b"[" * 90_000,
    "a tensor beyond the end": (57).to_bytes(8, "little")
    + b'{"x":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}',
}


def situations() -> Iterator[Situation]:
    """All of them."""

    def case(kind: str, name: str, make: Callable[[Path], Any]) -> Situation:
        return Situation(kind, name, partial(_model, make=make), STARTING[1:], says="")

    for file in JSON:
        for name, content in CONTENT.items():
            if name == "an object" and file != "model_index.json":
                continue  # a configuration of nothing but defaults, which are those of a whole model
            yield case("checkpoint json", f"{file}: {name}", partial(_write, name=file, content=content))
        yield case("checkpoint json", f"{file}: gone", partial(_put, name=file, put=lambda _: None))
        yield case("checkpoint json", f"{file}: a folder", partial(_put, name=file, put=Path.mkdir))
        yield case("checkpoint json", f"{file}: a named pipe", partial(_put, name=file, put=os.mkfifo))
        yield case("checkpoint json", f"{file}: a dangling link", partial(_put, name=file, put=_dangling))
    for name, values in INDEX.items():
        yield case("checkpoint index", name, partial(_set, name="model_index.json", values=values))
    for file in WEIGHTS:
        for name, share in {"cut in half": 0.5, "cut at its end": 0.999, "cut in its header": 0.0001}.items():
            yield case("checkpoint weights", f"{file}: {name}", partial(_cut, name=file, share=share))
        for name, content in {**HEADERS, "nothing": b"", "noise": bytes(range(256)) * 9}.items():
            yield case("checkpoint weights", f"{file}: {name}", partial(_write, name=file, content=content))
        yield case("checkpoint weights", f"{file}: a named pipe", partial(_put, name=file, put=os.mkfifo))
        yield case("checkpoint weights", f"{file}: a dangling link", partial(_put, name=file, put=_dangling))
    for name, content in CONTENT.items():
        make = partial(_write, name="tokenizer/tokenizer.json", content=content)
        yield case("checkpoint tokenizer", name, make)
    for file in ("tokenizer/added_tokens.json", "tokenizer/notes.txt", "unet/generation_config.json"):
        yield case("checkpoint json", f"{file}: a named pipe", partial(_put, name=file, put=os.mkfifo))
    for folder in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        yield case("checkpoint folder", f"{folder} gone", partial(_put, name=folder, put=lambda _: None))
        yield case("checkpoint folder", f"{folder} is a file", partial(_put, name=folder, put=Path.touch))
        yield case("checkpoint folder", f"{folder} is a link to nothing", partial(_put, name=folder, put=_dangling))


def _model(world: World, make: Callable[[Path], Any]) -> None:
    folder = world.root / "model"
    shutil.copytree(TINY_SD, folder, copy_function=os.link)  # what is written below is unlinked first
    make(folder)
    world.write(model={"name": str(folder)}, sink__folder=str(world.root / "new"))


def _write(folder: Path, name: str, content: bytes) -> None:
    remove(folder / name)
    (folder / name).write_bytes(content)


def _put(folder: Path, name: str, put: Callable[[Path], Any]) -> None:
    remove(folder / name)
    put(folder / name)


def _set(folder: Path, name: str, values: dict[str, Any]) -> None:
    _write(folder, name, json.dumps({**json.loads((folder / name).read_text()), **values}).encode())


def _cut(folder: Path, name: str, share: float) -> None:
    content = (folder / name).read_bytes()
    _write(folder, name, content[: int(len(content) * share)])


def _dangling(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")
