"""Networks and pictures of rewards, from files that the recipe names. Loaded once per process, without their code.

clip: a CLIP checkpoint in transformers format. arcface, lpips: `model.safetensors` with the parameters of
`ir_se50.py` and `perceptual.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.common.special_files import is_special
from pipeline.errors import ModelError
from pipeline.models.checkpoint import refuse_special_files
from pipeline.models.image_text import check_safe
from pipeline.models.ir_se50 import IRSE50
from pipeline.models.perceptual import PerceptualDistance
from pipeline.rewards.base import Network

LearnedReward = Literal["clip", "arcface", "lpips"]
FILE = "model.safetensors"
OWN = {"arcface": IRSE50, "lpips": PerceptualDistance}
MADE_OF = {
    "arcface": "the parameters of the checkpoint model_ir_se50",
    "lpips": "torchvision's VGG-16 (features.*) and LPIPS' linear weights (lin0 to lin4)",
}


def weights_problem(kind: LearnedReward, folder: str) -> Iterator[str]:
    """What keeps a folder's network from being loaded, as its files' names and headers tell, and the way out."""
    place = Path(folder).expanduser()
    if not place.is_dir():
        yield f"weights.{kind} names '{folder}', and there is no such folder. Correct editing.weights.{kind}"
        return
    try:
        refuse_special_files(place, f"'{folder}'")
        if kind == "clip":
            check_safe(place, folder)
    except ModelError as error:
        yield f"weights.{kind}: {error}"
        return
    if kind == "clip":
        return
    missing = missing_parameters(kind, place)
    if missing:
        yield (
            f"weights.{kind} names '{folder}', whose {FILE} lacks {missing[0]}{more(missing)}. It should hold "
            f"{MADE_OF[kind]}; convert the published file with safetensors.torch.save_file"
        )


def more(missing: list[str]) -> str:
    """How many others there are."""
    return f" and {len(missing) - 1} more" if missing[1:] else ""


def missing_parameters(kind: str, folder: Path) -> list[str]:
    """Names of parameters that a folder's file does not have; the file itself where it cannot be read."""
    with torch.device("meta"):
        wanted = {name for name in OWN[kind]().state_dict() if not name.endswith("num_batches_tracked")}
    try:
        with safe_open(folder / FILE, framework="pt") as opened:
            return sorted(wanted - set(opened.keys()))
    except (OSError, SafetensorError):
        return [f"everything: there is no {FILE} that can be read"]


def network(kind: LearnedReward, folder: str) -> Network:
    """What loads a reward's network onto a device, at first use."""
    return partial(_loaded, kind, folder)


@cache
def _loaded(kind: str, folder: str, device: torch.device) -> Any:
    """A network in evaluation mode, in float32.

    Raises:
        ModelError: its files are not what they should be.
    """
    place = Path(folder).expanduser()
    refuse_special_files(place, f"'{folder}'")
    try:
        if kind == "clip":
            from transformers import CLIPVisionModel

            check_safe(place, folder)
            made: Any = CLIPVisionModel.from_pretrained(place, use_safetensors=True)
        else:
            made = OWN[kind]()
            made.load_state_dict(load_file(place / FILE), strict=False)
            if missing := missing_parameters(kind, place):
                raise ModelError(f"'{folder}' lacks {missing[0]}{more(missing)}, which reward network {kind} has")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the network of weights.{kind} in '{folder}' cannot be loaded: {type(error).__name__}: {error}. Check "
            f"editing.weights.{kind}"
        ) from error
    return made.to(device).float().eval().requires_grad_(False)


@cache
def picture(path: str) -> Tensor:
    """A picture as (3, H, W) in [-1, 1].

    Raises:
        ModelError: there is none, or it does not open.
    """
    place = Path(path).expanduser()
    try:
        if is_special(place):
            raise OSError("it is no file")
        with Image.open(place) as opened:
            pixels = np.asarray(opened.convert("RGB"), dtype=np.float32)
    except (OSError, UnidentifiedImageError) as error:
        raise ModelError(
            f"the reference picture '{path}' does not open: {type(error).__name__}. Correct editing.references"
        ) from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1.0
