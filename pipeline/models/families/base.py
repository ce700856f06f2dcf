"""What a family of models is: it knows its checkpoints' parts, and makes a backbone of them.

A family is found by the class of diffusers' pipeline that a checkpoint was saved from (`FAMILIES`). What it does not
know it refuses, by the configuration files alone, before weights are fetched or read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.engine.backbone import Backbone, ModelRecord, Offers
from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint, Components, Configurations
from pipeline.models.networks import num_words_read
from pipeline.models.offload import Turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How a checkpoint is to be loaded."""

    record: ModelRecord
    device: torch.device
    dtype: torch.dtype  # of the networks, but where a part needs a wider one
    empty_prompt: Literal["auto", "zeros", "encoded"]  # what stands for one; see the recipe's `model.empty_prompt`
    text_tokens: int | None = None  # places of the longest text encoder; None: the family's usual number
    embedded_guidance: float | None = None  # what a network that takes a guidance scale is told; None: 1
    turns: Turns | None = None  # by which networks come to the device; None: all are there
    text_8bit: bool = False  # whether T5 is loaded in 8 bit

    @property
    def outside(self) -> torch.dtype:
        """Between calls of the model everything is float32, or wider where the networks are."""
        return torch.promote_types(self.dtype, torch.float32)


class Asked(NamedTuple):
    """Of the library's own pipeline: text to image under classifier-free guidance against an empty prompt."""

    prompt: str
    height: int  # pixels
    width: int
    num_steps: int
    guidance_scale: float

    def by(self, reference: Any, latents: Tensor, **options: Any) -> Tensor:
        """The pipeline's answer in the layout of its latents. `options`: what it is asked for beside or instead."""
        asked = {
            "prompt": self.prompt,
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.num_steps,
            "guidance_scale": self.guidance_scale,
            "latents": latents,
            "output_type": "latent",
        }
        made: Tensor = reference(**{**asked, **options}).images
        return made


class Family(ABC):
    """One kind of checkpoint."""

    name: ClassVar[str]
    """Of its page in docs/families."""
    pipelines: ClassVar[tuple[str, ...]]
    """Classes of diffusers' pipelines whose checkpoints it loads."""
    components: ClassVar[Components]
    """The parts that it loads; whatever else a checkpoint has is left alone."""
    decisive: ClassVar[tuple[str, ...]] = ()
    """Keys of `model_index.json`, beside the parts, that change results."""

    @abstractmethod
    def check(self, configurations: Configurations, where: str) -> None:
        """See that the configurations are of a model that this family knows how to run.

        Raises:
            ModelError: they are not; names what is unknown, and the way out.
        """

    @abstractmethod
    def offers(self, configurations: Configurations) -> Offers:
        """What the model will offer once it is loaded. For configurations that `check` lets pass.

        Raises:
            KeyError, TypeError, IndexError: they are malformed, as loading will say.
        """

    @abstractmethod
    def load(self, checkpoint: Checkpoint, loading: Loading) -> Backbone:
        """The model, ready on its device.

        Raises:
            ModelError: weights are damaged, or the parts do not fit each other.
        """

    def side(self, configurations: Configurations) -> int:
        """Of the latents that a checkpoint was made for."""
        (network,) = (configurations.parts[name] for name in ("unet", "transformer") if name in configurations.parts)
        return int(network.get("sample_size") or 64)

    def autoencoder_dtype(self, configurations: Configurations, dtype: torch.dtype) -> torch.dtype:
        """Of the autoencoder beside networks of `dtype`: many overflow in float16, and say so; bfloat16 does not."""
        upcast = dtype == torch.float16 and configurations.parts["vae"].get("force_upcast", True)
        return torch.float32 if upcast else dtype

    def num_words_read(self, tokenizer: Any, prompt: str, text_tokens: int | None) -> int:
        """How many words of a prompt the text encoder of one of its tokenizers reads, at least in part.

        `text_tokens`: places of the longest text encoder, as the recipe has it; None: the family's usual number.
        """
        return num_words_read(tokenizer, prompt)

    def widest(self, configurations: Configurations, side: int) -> tuple[int, int]:
        """Places and channels of the widest tensor that the network holds of latents (side, side).

        Raises:
            ValueError: the family does not say, and a plan leaves out what its models need of memory.
        """
        raise ValueError(f"family {self.name} does not say how wide its networks are")

    def reference(self, backbone: Backbone, configurations: Configurations) -> Any | None:
        """diffusers' own text-to-image pipeline around the networks of a model that `load` made, sampling by DDIM.

        None: there is none to compare with.
        """
        return None

    def sampled_by(self, reference: Any, backbone: Backbone, latents: Tensor, asked: Asked) -> Tensor:
        """What the pipeline of `reference` makes of noise (1, C, h, w) on its device: latents of the same shape."""
        return asked.by(reference, latents)

    def unscaled(self, reference: Any, latents: Tensor) -> Tensor:
        """What the pipeline of `reference` gives its autoencoder to decode, of latents (1, C, h, w) in that one's
        dtype."""
        config = reference.vae.config
        latents = latents / config.scaling_factor
        if (mean := config.get("latents_mean")) is not None and (std := config.get("latents_std")) is not None:
            mean, std = (torch.tensor(one).view(1, -1, 1, 1).to(latents) for one in (mean, std))
            latents = latents * std + mean
        return latents + (config.get("shift_factor") or 0.0)


def components_of(family: Family, index: Mapping[str, Any], *, t5: bool = True) -> Components:
    """The parts of one checkpoint that are loaded: those of its family, without optional ones that it does not have.

    Args:
        family: the checkpoint's.
        index: its `model_index.json`.
        t5: whether optional text encoders are loaded where they are there.

    Raises:
        ModelError: the optional ones shall be left out, and the family has none.
    """
    optional = {part for part, component in family.components.items() if component.optional}
    if not t5 and not optional:
        raise ModelError(
            f"model.t5 is false, and a {index.get('_class_name')} has no text encoder that it could do without. Leave "
            "model.t5 out"
        )
    left_out = {part for part in optional if not t5 or index.get(part) in (None, [None, None])}
    return {part: component for part, component in family.components.items() if part not in left_out}


def check_components(family: Family, index: Mapping[str, Any], where: str) -> None:
    """See that a checkpoint has the parts of its family, of the libraries' own classes.

    Raises:
        ModelError: names the part that is missing or of another class.
    """
    for part, component in components_of(family, index).items():
        found = index.get(part)
        known = f"{component.library}.{' or '.join(component.classes)}"
        if found is None or found == [None, None]:
            raise ModelError(
                f"{where} has no {part} in its model_index.json, and {index['_class_name']} needs one ({known}). Fetch "
                "the checkpoint again, or take a whole one"
            )
        of_the_library = isinstance(found, list) and len(found) == 2 and found[0] == component.library
        # A scheduler's class is for the family to judge, which knows what the levels of the others are.
        if of_the_library and (component.kind == "scheduler" or found[1] in component.classes):
            continue
        raise ModelError(
            f"{where} has {found} as {part}; known is {known}. Use a checkpoint of family {family.name} without custom "
            "code"
        )
