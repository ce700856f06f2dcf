"""The families of models, by the class of diffusers' pipeline in a checkpoint's `model_index.json`.

A new family is its file here, its line below, its tests, and its page in docs/families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import ModelError
from pipeline.models.families.base import Family, check_components
from pipeline.models.families.flux import FluxFamily
from pipeline.models.families.flux2 import Flux2KleinFamily
from pipeline.models.families.qwen_image import QwenImageFamily
from pipeline.models.families.sd3 import StableDiffusion3Family
from pipeline.models.families.stable_diffusion import StableDiffusionFamily
from pipeline.models.families.stable_diffusion_xl import StableDiffusionXLFamily

FAMILIES: dict[str, Family] = {
    pipeline: family
    for family in (
        StableDiffusionFamily(),
        StableDiffusionXLFamily(),
        StableDiffusion3Family(),
        FluxFamily(),
        Flux2KleinFamily(),
        QwenImageFamily(),
    )
    for pipeline in family.pipelines
}


def family_of(index: Mapping[str, Any], where: str) -> Family:
    """The family of a checkpoint with this `model_index.json`.

    Raises:
        ModelError: nobody knows its pipeline, or it lacks a part; names the class and the way out.
    """
    name = index.get("_class_name")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        found = f"was saved from the pipeline {name}" if name else "does not say from which pipeline it was saved"
        raise ModelError(
            f"{where} {found} (_class_name in model_index.json); known are {', '.join(FAMILIES)}. Use a checkpoint of "
            "one of these"
        )
    check_components(family, index, where)
    return family
