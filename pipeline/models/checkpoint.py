"""The files of a checkpoint that are loaded: those and no others are fetched from a hub, checked and hashed.

    model_index.json                 what kind of model it is, and what its parts are
    scheduler/scheduler_config.json
    networks: unet, vae, ...         config.json, and safetensors of the variant: one file, or an index and shards
    processors of pictures           preprocessor_config.json
    tokenizers                       JSON and text files

Which parts there are is for the checkpoint's family to say (`families/`). What else a repository holds (single-file
checkpoints, safety checker, EMA weights, other variants, pickled twins) is never read. Only safetensors and JSON are:
pickled weights and remote code run what the checkpoint's author wrote.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError, safe_open

from pipeline.common.special_files import special_files
from pipeline.errors import ModelError

VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt")
TOKENIZER_FILES = (
    *VOCABULARY,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
INDEX = "model_index.json"


class Weights(NamedTuple):
    """How a library names a network's weights, and which it takes where one file and shards are both there."""

    stem: str
    shards_first: bool


WEIGHTS = {
    "diffusers": Weights("diffusion_pytorch_model", shards_first=True),
    "transformers": Weights("model", shards_first=False),
}


class Component(NamedTuple):
    """A part of a checkpoint, as `model_index.json` names it."""

    kind: Literal["network", "tokenizer", "scheduler", "processor"]
    library: str
    classes: tuple[str, ...]  # that are known; a network is loaded as the first, a tokenizer as the fast one
    optional: bool = False  # whether a checkpoint may do without
    pipelines: tuple[str, ...] = ()  # of the family's, whose checkpoints alone have it; none: all have

    @property
    def configuration(self) -> str:
        """The JSON file that must be in its folder; "" where there is a choice of several."""
        return {
            "network": "config.json",
            "scheduler": "scheduler_config.json",
            "tokenizer": "",
            "processor": "preprocessor_config.json",  # of pictures
        }[self.kind]


Components = Mapping[str, Component]
"""By the name of their folder, which is their key in `model_index.json`."""


@dataclass(frozen=True, slots=True)
class Configurations:
    """What is known of a checkpoint without its weights."""

    index: Mapping[str, Any]  # model_index.json
    parts: Mapping[str, Mapping[str, Any]]  # by component, without tokenizers

    @property
    def pipeline(self) -> str:
        """The class of diffusers' pipeline that it was saved from."""
        return str(self.index["_class_name"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk, all of whose files are there and may be read."""

    where: str  # as errors name it
    folder: Path
    variant: str | None
    configurations: Configurations
    files: Mapping[str, str]  # by role, see `files_by_role`


def files_by_role(components: Components, names: Collection[str], variant: str | None, where: str) -> dict[str, str]:
    """Which files of a listing are loaded.

    Args:
        components: of the checkpoint's family.
        names: paths relative to the checkpoint's folder, with "/".
        variant: of the weights; None: the plain ones.
        where: the checkpoint, for errors.

    Returns:
        Path by role. A role is a path without what names a variant, so that it tells what a file is loaded as.

    Raises:
        ModelError: a file is missing; names it and what is there instead.
    """
    refuse_other_formats(names, where)
    found = {INDEX: INDEX}
    for part, component in components.items():
        if component.kind == "tokenizer":
            continue
        if (name := f"{part}/{component.configuration}") not in names:
            raise ModelError(f"{where} has no {name}. Fetch the checkpoint again, or take one that has it")
        found[name] = name
    for part, component in components.items():
        if component.kind == "network":
            found |= _weights(part, WEIGHTS[component.library], names, variant, where)
        elif component.kind == "tokenizer":
            found |= _tokenizer(part, names, where)
    return found


def refuse_special_files(folder: Path, where: str) -> None:
    """See that a folder which libraries read has no named pipe, socket or device among its own entries.

    Raises:
        ModelError: it has one, which would be waited for; names it.
    """
    if names := special_files(folder):
        raise ModelError(
            f"{where} has {folder.name}/{names[0]}, which is a named pipe, a socket or a device, no file. Remove it, "
            "or fetch the checkpoint again"
        )


def refuse_other_formats(names: Collection[str], where: str) -> None:
    """See that a listing is one of a whole checkpoint in diffusers format.

    Raises:
        ModelError: it is not.
    """
    if INDEX in names:
        return
    if "config.json" in names:
        raise ModelError(
            f"{where} has no {INDEX}, but config.json: it is one network, no whole checkpoint. Put its files into the "
            "folder of that network in a copy of the checkpoint that it was made for"
        )
    raise ModelError(
        f"{where} has no {INDEX}: it is no checkpoint in diffusers format. Convert single-file checkpoints with "
        "diffusers' conversion script first"
    )


def read_index(folder: Path, where: str) -> dict[str, Any]:
    """`model_index.json` of a checkpoint on disk.

    Raises:
        ModelError: it is not there, or cannot be read.
    """
    refuse_special_files(folder, where)
    refuse_other_formats({path.name for path in folder.iterdir()}, where)
    return read_json(folder, INDEX)


def _tokenizer(part: str, names: Collection[str], where: str) -> dict[str, str]:
    files = {name: name for file in TOKENIZER_FILES if (name := f"{part}/{file}") in names}
    if f"{part}/tokenizer.json" in files or {f"{part}/vocab.json", f"{part}/merges.txt"} <= set(files):
        return files
    raise ModelError(
        f"{where} has no {part}: neither {part}/tokenizer.json nor {part}/vocab.json with {part}/merges.txt is there. "
        "Fetch the checkpoint again, or take one that has it"
    )


def _weights(network: str, weights: Weights, names: Collection[str], variant: str | None, where: str) -> dict[str, str]:
    stem, shards_first = weights
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


def open_checkpoint(folder: Path, components: Components, variant: str | None, where: str) -> Checkpoint:
    """The files of a checkpoint on disk, with the shards that its indexes name. No weights are read.

    Raises:
        ModelError: a file is missing or damaged, or asks for remote code; names it.
    """
    parts = [folder, *(folder / part for part in components)]
    for part in parts:
        refuse_special_files(part, where)
    paths = [path for part in parts if part.is_dir() for path in part.iterdir() if path.is_file()]
    names = {path.relative_to(folder).as_posix() for path in paths}
    files = files_by_role(components, names, variant, where)
    for network in list(components):
        if index := files.get(f"{network}/weights.index"):
            files = _shards_of_index(folder, index, network, files, names)
    return Checkpoint(
        where=where,
        folder=folder,
        variant=variant,
        configurations=read_configurations(folder, components, files.values(), where),
        files=files,
    )


def read_configurations(folder: Path, components: Components, files: Iterable[str], where: str) -> Configurations:
    """The configurations among the files of a checkpoint.

    Raises:
        ModelError: one is damaged, or asks for remote code; names it.
    """
    contents = {name: read_json(folder, name) for name in files if name.endswith(("config.json", INDEX))}
    for name, content in contents.items():
        if "auto_map" in content:
            raise ModelError(
                f"{where} asks for remote code ({name} has auto_map), which is never run. Use a checkpoint of the "
                "library's own classes"
            )
    names = {part: f"{part}/{component.configuration}" for part, component in components.items()}
    return Configurations(contents[INDEX], {part: contents[name] for part, name in names.items() if name in contents})


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


def small_files(components: Components) -> Iterator[str]:
    """The files, some hundred kB, that tell all but the weights; not each is in every checkpoint."""
    yield INDEX
    for part, component in components.items():
        files = TOKENIZER_FILES if component.kind == "tokenizer" else (component.configuration,)
        yield from (f"{part}/{file}" for file in files)


def check_weights(checkpoint: Checkpoint) -> None:
    """See that each file of weights is whole: its header is sound, and it is as long as that says.

    Raises:
        ModelError: one is not; names it.
    """
    for name in checkpoint.files.values():
        if name.endswith(".safetensors"):
            try:
                with safe_open(checkpoint.folder / name, framework="pt") as file:
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


def digest(checkpoint: Checkpoint, decisive: Collection[str] = ()) -> str:
    """SHA-256 over roles and contents of the files that are loaded, first 16 hexadecimal digits.

    Args:
        checkpoint: what is hashed.
        decisive: keys of `model_index.json` that change results. The rest of that file does not, and is left out.
    """
    total = hashlib.sha256()
    for role, name in sorted(checkpoint.files.items()):
        if role != INDEX:
            with (checkpoint.folder / name).open("rb") as file:
                total.update(f"{role} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    for key in sorted(decisive):
        total.update(f"{key} {json.dumps(checkpoint.configurations.index.get(key), sort_keys=True)}\n".encode())
    return total.hexdigest()[:16]
