"""Where networks go once they are loaded, and text encoders that are loaded in 8 bit."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint, Component, Components
from pipeline.models.networks import quiet

if TYPE_CHECKING:
    from pipeline.models.families.base import Loading

QUANTIZES = "bitsandbytes"
T5 = "T5EncoderModel"


def place(name: str, network: Any, loading: Loading) -> None:
    """Bring a network to its device, or let it wait for its turn."""
    if loading.turns is None:
        network.to(loading.device)
    else:
        loading.turns.add(name, network)


def refuse_8bit(loading: Loading, components: Components, where: str) -> None:
    """See that a text encoder can be loaded in 8 bit, where that is asked for.

    Args:
        loading: how the checkpoint is loaded.
        components: of it, that are loaded.
        where: the checkpoint, for errors.

    Raises:
        ModelError: it cannot; says what is missing.
    """
    if not loading.text_8bit:
        return
    if not any(component.classes[0] == T5 for component in components.values()):
        raise ModelError(f"model.text_8bit is for T5, and {where} has no such text encoder. Leave it out")
    if loading.device.type != "cuda":
        raise ModelError(
            f"model.text_8bit saves a GPU's memory, and the device is {loading.device.type}: the library that computes "
            "in 8 bit needs one. Leave it out here"
        )
    if find_spec(QUANTIZES) is None:
        raise ModelError(
            f"model.text_8bit takes {QUANTIZES}, which is not installed: pip install {QUANTIZES}. Or set model.offload "
            "to components, by which text encoders leave the device"
        )


def load_8bit(checkpoint: Checkpoint, name: str, component: Component, loading: Loading) -> Any:
    """A text encoder with its large layers in 8 bit, on the device, where it stays (arXiv 2208.07339).

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import BitsAndBytesConfig

    cls = getattr(import_module(component.library), component.classes[0])
    try:
        with quiet():
            return cls.from_pretrained(
                checkpoint.folder,
                subfolder=name,
                variant=checkpoint.variant,
                use_safetensors=True,
                dtype=loading.dtype,
                quantization_config=BitsAndBytesConfig(load_in_8bit=True),
                device_map={"": loading.device},
            )
    except Exception as error:  # of three libraries
        raise ModelError(
            f"{name}/ of the checkpoint cannot be loaded in 8 bit: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}. Leave model.text_8bit out"
        ) from error
