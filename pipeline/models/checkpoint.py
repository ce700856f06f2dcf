"""The files of a checkpoint that are loaded: those and no others are fetched from a hub, checked and hashed.

    model_index.json                 what the parts are
    scheduler/scheduler_config.json
    unet, vae, text_encoder          config.json, and safetensors of the variant: one file, or an index and shards
    tokenizer                        its JSON and text files

What else a repository holds (single-file checkpoints, safety checker, EMA weights, other variants, pickled twins) is
never read. Only safetensors and JSON are: pickled weights and remote code run what the checkpoint's author wrote.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from pipeline.errors import ModelError

COMPONENTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt")
TOKENIZER_FILES = (*VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"


class Weights(NamedTuple):
    """How a library names a network's weights, and which it takes where one file and shards are both there."""

    stem: str
    shards_first: bool


NETWORKS = {
    "unet": Weights("diffusion_pytorch_model", shards_first=True),
    "vae": Weights("diffusion_pytorch_model", shards_first=True),
    "text_encoder": Weights("model", shards_first=False),
}


def files_by_role(names: Collection[str], variant: str | None, where: str) -> dict[str, str]:
    """Which files of a listing are loaded.

    Args:
        names: paths relative to the checkpoint's folder, with "/".
        variant: of the weights; None: the plain ones.
        where: the checkpoint, for errors.

    Returns:
        Path by role. A role is a path without what names a variant, so that it tells what a file is loaded as.

    Raises:
        ModelError: a file is missing; names it and what is there instead.
    """
    if INDEX not in names:
        raise ModelError(
            f"{where} has no {INDEX}: it is no checkpoint in diffusers format. Convert single-file checkpoints with "
            "diffusers' conversion script first"
        )
    found = {}
    for name in (INDEX, SCHEDULER, *(f"{network}/config.json" for network in NETWORKS)):
        if name not in names:
            raise ModelError(f"{where} has no {name}. Fetch the checkpoint again, or take one that has it")
        found[name] = name
    for network in NETWORKS:
        found |= _weights(network, names, variant, where)
    tokenizer = {name: name for file in TOKENIZER_FILES if (name := f"tokenizer/{file}") in names}
    if not (
        "tokenizer/tokenizer.json" in tokenizer or {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= set(tokenizer)
    ):
        raise ModelError(
            f"{where} has no tokenizer: neither tokenizer/tokenizer.json nor tokenizer/vocab.json with "
            "tokenizer/merges.txt is there. Fetch the checkpoint again, or take one that has it"
        )
    return found | tokenizer


def _weights(network: str, names: Collection[str], variant: str | None, where: str) -> dict[str, str]:
    stem, shards_first = NETWORKS[network]
    dotted = f".{variant}" if variant else ""
    one = f"{network}/{stem}{dotted}.safetensors"
    index = f"{network}/{stem}.safetensors.index{dotted}.json"
    if index in names and (shards_first or one not in names):
        # Some versions of the libraries put the variant before the shard's number, others behind it.
        start, name, number = re.escape(f"{network}/{stem}"), re.escape(dotted), r"(-\d+-of-\d+)"
        pattern = re.compile(rf"{start}(?:{name}{number}|{number}{name})\.safetensors")
        shards = {
            f"{network}/weights{match[1] or match[2]}": name for name in names if (match := pattern.fullmatch(name))
        }
        return {f"{network}/weights.index": index, **shards}
    if one in names:
        return {f"{network}/weights": one}
    here = sorted(name.removeprefix(f"{network}/") for name in names if name.startswith(f"{network}/"))
    loadable = [name for name in here if name.endswith(".safetensors")]
    pickled = [name for name in here if name.endswith(PICKLED)]
    wanted = f"weights of variant {variant}" if variant else "weights"
    if loadable:
        reason = f"no {wanted} in {network}/, but {', '.join(loadable)}. Set model.variant to what is there"
    elif pickled:
        reason = (
            f"only pickled weights ({', '.join(pickled)}), which can run code in {network}/. Convert them to "
            "safetensors, or choose a revision or variant that has them"
        )
    else:
        reason = f"no {wanted} in {network}/. Fetch the checkpoint again, or choose a revision that has them"
    raise ModelError(f"{where} has {reason}")


def files_of(folder: Path, variant: str | None, where: str) -> dict[str, str]:
    """`files_by_role` of a folder on disk, with the shards that its indexes name, after the checks that need no model.

    Raises:
        ModelError: a file is missing or damaged, of a class that is not known, or asks for remote code; names it.
    """
    parts = [folder, *(folder / part for part in ("scheduler", *COMPONENTS))]
    paths = [path for part in parts if part.is_dir() for path in part.iterdir() if path.is_file()]
    names = {path.relative_to(folder).as_posix() for path in paths}
    files = files_by_role(names, variant, where)
    for network in NETWORKS:
        if index := files.get(f"{network}/weights.index"):
            files = _shards_of_index(folder, index, network, files, names)
    configurations = {name: read_json(folder, name) for name in files.values() if name.endswith(("config.json", INDEX))}
    for name, content in configurations.items():
        if "auto_map" in content:
            raise ModelError(
                f"{where} asks for remote code ({name} has auto_map), which is never run. Use a checkpoint of the "
                "library's own classes"
            )
    _check_classes(read_json(folder, INDEX), where)
    for name in files.values():
        if name.endswith(".safetensors"):
            _check_weights(folder, name)
    return files


def _shards_of_index(
    folder: Path, index: str, network: str, files: Mapping[str, str], names: Collection[str]
) -> dict[str, str]:
    shards = read_json(folder, index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise ModelError(f"{index} of the checkpoint has no weight_map. Fetch the checkpoint again")
    needed = {f"{network}/{shard}" for shard in shards.values()}
    if missing := sorted(needed - set(names)):
        raise ModelError(f"{index} of the checkpoint names {', '.join(missing)}, which is not there. Fetch it again")
    others = {role: name for role, name in files.items() if not role.startswith(f"{network}/weights-")}
    return others | {f"{network}/weights-{number}": name for number, name in enumerate(sorted(needed))}


def _check_classes(listed: Mapping[str, Any], where: str) -> None:
    for name, (library, cls) in COMPONENTS.items():
        found = listed.get(name)
        allowed = TOKENIZERS if name == "tokenizer" else (cls,)
        if not isinstance(found, list) or len(found) != 2 or found[0] != library or found[1] not in allowed:
            raise ModelError(
                f"{where} has {found} as {name}; known is {library}.{cls}. Use a Stable Diffusion 1.x or 2.x "
                "checkpoint without custom code"
            )


def _check_weights(folder: Path, name: str) -> None:
    """Whether a file of weights is whole: its header is sound, and it is as long as that says."""
    try:
        with safe_open(folder / name, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{name} of the checkpoint is damaged or cut ({error}). Fetch it again") from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """An object from a JSON file of a checkpoint.

    Raises:
        ModelError: it cannot be read, or holds something else; names the file.
    """
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{name} of the checkpoint cannot be read: {error}. Fetch it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{name} of the checkpoint holds no object but a {type(value).__name__}. Fetch it again")
    return value


def digest(folder: Path, files: Mapping[str, str]) -> str:
    """SHA-256 over roles and contents of the files that are loaded, first 16 hexadecimal digits.

    `model_index.json` is left out: it says nothing that changes a result.
    """
    total = hashlib.sha256()
    for role, name in sorted(files.items()):
        if role != INDEX:
            with (folder / name).open("rb") as file:
                total.update(f"{role} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:16]
