"""Memory that attention control takes, per image, beside what storing every map would cost.

Live tensors are counted as they are made and freed, so the figures are exact and do not depend on an allocator. One
image of 512 x 512 on the tiny Stable Diffusion, which has the layers and maps of the real one and fewer heads. Storing
all maps is computed from these layers, for the store of the published Prompt-to-Prompt code: all maps of at most half
the latents' side, of a source and a target row, kept together with their unconditional halves, once for the current
step and once for the sum over steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.editing import EDITORS
from pipeline.engine.calls import NetworkAnswer, NetworkCall
from pipeline.engine.engine import Engine
from pipeline.inversion.direct import DirectInversion
from pipeline.models.loading import load_backbone
from pipeline.models.stable_diffusion import StableDiffusion
from pipeline.models.unet import attention_layers
from pipeline.recipe import ModelConfig
from pipeline.records import EditRequest, Source, WordPair

TINY_SD = Path(__file__).parents[1] / "tests" / "golden" / "tiny-sd"
SIDE, STEPS, TOKENS = 64, 4, 77
REQUEST = EditRequest(
    source_prompt="a cat on a mat",
    target_prompt="a dog on a mat",
    blend_words=WordPair(source=("cat",), target=("dog",)),
)
EDITS: dict[str, dict[str, Any]] = {
    "cfg": {},
    "prompt_to_prompt": {"start_blend": 0.0},
    "proxedit": {},
    "masactrl": {"start_step": 0, "mask": "auto"},
    "plug_and_play": {},
}


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that were made under it and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, then count what it made."""
        made = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self._count, made)
        return made

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)
        return tensor

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Watched:
    """A backbone whose network calls note what lives when they begin, and the most that lives within."""

    def __init__(self, backbone: StableDiffusion, tensors: LiveTensors) -> None:
        self._backbone, self._tensors = backbone, tensors
        self.held: list[int] = []
        self.within: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        """The backbone's answer, with what lived meanwhile noted."""
        self.held.append(self._tensors.live)
        self._tensors.peak = self._tensors.live
        answer = self._backbone.denoise(call)
        self.within.append(self._tensors.peak - self.held[-1])
        return answer


def stored_maps_mib(backbone: StableDiffusion) -> float:
    """MiB that the store of all maps would take: see the module."""
    numbers = 0
    for name, layer in attention_layers(backbone.unet).items():
        if layer.factor >= 2:
            positions = (SIDE // layer.factor) ** 2
            heads = backbone.unet.get_submodule(name.removesuffix(".processor")).heads
            numbers += int(heads) * positions * (positions if layer.kind == "self" else TOKENS)
    rows, halves, stores = 2, 2, 2
    return numbers * 4 * rows * halves * stores / 2**20


def measure() -> list[dict[str, Any]]:
    """One row per editor: what it holds between steps beyond `cfg`, and the peak of a network call, in KiB and MiB."""
    backbone = load_backbone(ModelConfig(name=str(TINY_SD)), device="cpu")
    assert isinstance(backbone, StableDiffusion)
    latents = torch.randn((4, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    source = Source(
        latents=latents,
        prompt=REQUEST.source_prompt,
        schedule=backbone.schedule,
        draw_noise=lambda: latents,
        editing_noise=lambda: lambda: latents,
    )
    rows: list[dict[str, Any]] = []
    for name, settings in EDITS.items():
        trajectory = Engine(backbone, pad=False).run_one(DirectInversion(num_steps=STEPS).invert(source))
        with LiveTensors() as tensors:
            watched: Any = Watched(backbone, tensors)
            editor = EDITORS[name].model_validate({"method": name, **settings})
            Engine(watched, pad=False).run_one(editor.edit(trajectory, REQUEST))
        held = watched.held[-1] / 2**10
        rows.append(
            {
                "case": name,
                "held_between_steps_kib": round(held),
                "more_than_cfg_kib": round(held - (rows[0]["held_between_steps_kib"] if rows else held)),
                "peak_of_a_call_mib": round(max(watched.within) / 2**20, 1),
                "all_maps_stored_mib": round(stored_maps_mib(backbone), 1),
            }
        )
    return rows


if __name__ == "__main__":
    for line in measure():
        print(line)
