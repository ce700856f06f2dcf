"""From a recipe's model section to a loaded backbone: a local folder, a hub id with a revision, `demo`,
`demo_flow`, `analytic` or `none`.

What a checkpoint is made of, and what is made of it, is for its family to say (`families/`); which of its files that
reads, `checkpoint.py` says. Nothing of the process that loads is changed.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.engine.backbone import Backbone, ModelRecord
from pipeline.engine.tuning import Tuning
from pipeline.errors import ModelError
from pipeline.models.absent import NoModel
from pipeline.models.analytic import AnalyticBackbone
from pipeline.models.checkpoint import Checkpoint, check_weights, digest, open_checkpoint, read_index
from pipeline.models.compiling import check_compiler
from pipeline.models.families import family_of
from pipeline.models.families.base import Family, Loading, components_of
from pipeline.models.hub import fetch
from pipeline.models.offload import Turns, take_turns

if TYPE_CHECKING:
    from pipeline.recipe import ModelConfig

DEMO_FOLDER = Path(str(files("pipeline.models.demo") / "weights"))  # the bundled model
BUNDLED = {"demo": DEMO_FOLDER, "demo_flow": DEMO_FOLDER.with_name("flow_weights")}
"""By name: models of drawn faces, of diffusion and of rectified flow."""
SIDE_WITHOUT_MODEL = 1024  # pixels of the canvas where no model says


def load_backbone(
    config: ModelConfig, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> Backbone:
    """Load the model of a recipe.

    Args:
        config: the recipe's model section.
        dtype: overrides the section's; float64 serves golden replay.
        device: overrides the choice, which is the GPU where there is one.

    Raises:
        ModelError: the checkpoint is missing, damaged, unsafe or of an unknown kind, its parts do not fit each other,
            or it cannot work at the section's size.
    """
    backbone = _load_any(config, dtype, device)
    if config.size is not None and config.fit != "bucket" and config.size % backbone.multiple:
        below = config.size // backbone.multiple * backbone.multiple
        sizes = " or ".join(str(size) for size in (below, below + backbone.multiple) if size)
        raise ModelError(
            f"model.size {config.size} is not a multiple of {backbone.multiple}, which model.name '{config.name}' "
            f"needs. Set model.size to {sizes}"
        )
    if backbone.max_side is not None and (config.size or 0) > backbone.max_side:
        raise ModelError(
            f"model.size {config.size} is larger than model.name '{config.name}' can place its tokens: its table of "
            f"positions ends at {backbone.max_side} pixels. Set model.size to {backbone.max_side} or less"
        )
    return backbone


def _load_any(config: ModelConfig, dtype: torch.dtype | None, device: str | torch.device | None) -> Backbone:
    if config.name == "analytic":
        return AnalyticBackbone(image_size=config.size or 64)
    if config.name == "none":
        return NoModel(image_size=config.size or SIDE_WITHOUT_MODEL)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = dtype or _dtype(config.dtype, place)
    family, checkpoint, revision = find_checkpoint(config)
    check_weights(checkpoint)
    if config.compile is True:
        check_compiler(place)
    record = ModelRecord(
        name=config.name,
        revision=revision,
        digest=digest(checkpoint, family.decisive),
        dtype=str(precision).removeprefix("torch."),
        device=place.type,
    )
    turns = None if config.offload == "none" else Turns(place, layers=config.offload == "layers")
    loading = Loading(
        record=record,
        device=place,
        dtype=precision,
        empty_prompt=config.empty_prompt,
        text_tokens=config.text_tokens,
        embedded_guidance=config.embedded_guidance,
        turns=turns,
        text_8bit=config.text_8bit,
    )
    backbone = family.load(checkpoint, loading)
    if turns is not None:
        take_turns(backbone, turns)
    if config.compile is True:
        backbone.tune(Tuning(execution="compiled"))
    return backbone


def find_checkpoint(config: ModelConfig) -> tuple[Family, Checkpoint, str]:
    """The family, the files and the resolved revision of a model; not of `analytic`, which has none. Weights are
    fetched where it is a hub id, and not read.

    Raises:
        ModelError: the checkpoint is missing or of an unknown kind, or lacks a file.
    """
    folder, revision = _locate(config)
    where = f"'{config.name}'"
    index = read_index(folder, where)
    family = family_of(index, where)
    components = components_of(family, index, t5=config.t5)
    checkpoint = open_checkpoint(folder, components, config.variant, where)
    family.check(checkpoint.configurations, where)
    return family, checkpoint, revision


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def checked_device(device: str | torch.device, model: str) -> torch.device:
    """The device, if it is there.

    Raises:
        ModelError: there is none of that name, or the model cannot use it.
    """
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:  # what torch raises of an unknown name, and without that backend
        reason = next(iter(str(error).splitlines()), "")
        raise ModelError(
            f"there is no device {str(device)!r} here ({reason}). Leave device out, or try 'cpu'"
        ) from error
    if model in ("analytic", "none") and chosen.type != "cpu":
        raise ModelError(f"model '{model}' works on the CPU, not on {chosen}. Leave device out")
    return chosen


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder may be one of the hub's: owner/name."""
    return not name.startswith((".", "/", "~")) and name.count("/") == 1


def _locate(config: ModelConfig) -> tuple[Path, str]:
    """The checkpoint's folder, downloaded where it is a hub id, and its resolved revision."""
    if config.name in BUNDLED:
        return BUNDLED[config.name], ""
    folder = Path(os.path.expanduser(config.name))
    if folder.is_dir():
        return folder, ""
    if not is_hub_id(config.name):
        raise ModelError(f"model.name '{config.name}' is no folder here and no hub id (owner/name). Check the path")
    return fetch(config.name, config.revision, config.variant, t5=config.t5)
