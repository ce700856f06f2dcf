"""The recipe's section of gates: which figures of a result are judged, and by which bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.settings.judge import EXTRA, JudgeConfig
from pipeline.settings.sections import Location, Section

PLUG_IN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
Preset = Literal["pixels", "instructpix2pix", "ultraedit", "ultraedit_region", "strict", "none"]

_CLIP = {"clip_sim_0": {"min": 0.2}, "clip_sim_1": {"min": 0.2}}
_ULTRAEDIT = {**_CLIP, "clip_sim_dir": {"min": 0.22}, "dinov2_sim": {"min": 0.4}}
PRESETS: dict[Preset, dict[str, dict[str, float]]] = {
    # No model needed. Chosen on drawn faces (docs/gates.md), with the bounds that published sets have for the area.
    "pixels": {
        "mask_share": {"min": 0.002, "max": 0.9},
        "change_inside": {"min": 12.0},
        "background_psnr": {"min": 20.0},
        "align_corner_px": {"max": 0.6},
    },
    # InstructPix2Pix (arXiv 2211.09800), its dataset's script: all four bounds, inclusive.
    "instructpix2pix": {**_CLIP, "clip_sim_dir": {"min": 0.2}, "clip_sim_image": {"min": 0.7}},
    # UltraEdit (arXiv 2407.05282), the scripts of its free-form and its region-based set.
    "ultraedit": {**_ULTRAEDIT, "clip_sim_image": {"min": 0.75}},
    "ultraedit_region": {**_ULTRAEDIT, "clip_sim_image": {"min": 0.7}},
    "strict": {
        "inversion_psnr": {"min": 20.0},
        "mask_share": {"min": 0.005, "max": 0.6},
        "change_inside": {"min": 16.0},
        "background_psnr": {"min": 25.0},
        "background_ssim": {"min": 0.85},
        "align_corner_px": {"max": 0.4},
    },
    "none": {},
}


class Bounds(Section):
    """What a figure must lie between, both ends included."""

    min: float | None = None
    """The least that passes; none: whatever is small passes."""
    max: float | None = None
    """The most that passes; none: whatever is large passes."""

    @model_validator(mode="after")
    def _bounds_something(self) -> Bounds:
        if self.min is None and self.max is None:
            raise ValueError("bounds nothing. Give min, max or both, or null to turn the gate off")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}: nothing would pass")
        return self

    def holds(self, value: float) -> bool:
        """Whether a figure passes."""
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def __str__(self) -> str:
        """As a person reads it."""
        ends = ((">=", self.min), ("<=", self.max))
        return " and ".join(f"{sign} {end:g}" for sign, end in ends if end is not None)


Gate = Annotated[Bounds | None, Field(default=None)]
CLIP_GATES = ("clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image")
JUDGE_GATES = ("judge_sc", "judge_pq", "judge_overall")
NEEDS = {
    **dict.fromkeys(CLIP_GATES, "clip"),
    "dinov2_sim": "dinov2",
    "nsfw_score": "safety",
    **dict.fromkeys(JUDGE_GATES, "judge"),
}
"""The setting that names what a gate's figure comes from."""
PROTOCOLS = ("viescore", "editscore")
"""Of judges that score a result by what was asked, without its kind of edit."""
WAYS_OUT = {
    "clip": "a CLIP by folder or hub id, such as openai/clip-vit-large-patch14",
    "dinov2": "a DINOv2 by folder or hub id, such as facebook/dinov2-large",
    "safety": 'a checker of yours, "package.module:factory"',
    "judge": "a judge: its base_url and model",
}
PROMPTS_OF = {
    "clip_sim_0": ("source_prompt",),
    "clip_sim_1": ("target_prompt",),
    "clip_sim_dir": ("source_prompt", "target_prompt"),
}
"""What a gate compares images with."""
BEFORE_THE_EDIT = "inversion_psnr"
"""The gate that a result meets before the edit is paid for."""


class GatesConfig(Section):
    """Which results are kept. What a gate rejects keeps its row, its figures and its picture, in `rejected/`."""

    preset: Preset = "pixels"
    """Gates to begin with; a gate that is named beside it replaces the preset's, and null turns it off."""
    inversion_psnr: Gate
    """Before the edit: PSNR of the trajectory, replayed without any edit, against the input at model size, in dB. Costs
    a network row per step and image; what fails is not edited."""
    mask_share: Gate
    """Share of the image inside the mask, 0..1."""
    change_inside: Gate
    """Mean absolute difference of input and result inside the mask, 0..255."""
    denoise_gain: Gate
    """How much better the diffusion model denoises the result under the target text than under the source's: see
    docs/gates.md. Costs network rows for each result."""
    edit_change: Gate
    """The column of that name: change of the hundredth of the pixels that changed most, 0..255. Needs
    sink.round_trip."""
    rest_change: Gate
    """The column of that name: change outside the mask, 0..255. Needs sink.round_trip."""
    background_psnr: Gate
    """PSNR outside the mask, in dB, at most 100."""
    background_ssim: Gate
    """Structural similarity outside the mask, -1..1."""
    align_corner_px: Gate
    """How far the image's furthest corner moved, in pixels at 512 or fewer on the longer side. A result whose
    background is not the input's at all fails; one that has too little texture to tell passes."""
    align_shift: Gate
    """The larger of the two shifts, in the same pixels."""
    align_scale: Gate
    """The larger of the two scales' distance from 1."""
    clip_sim_0: Gate
    """Cosine of CLIP's features of input and source prompt."""
    clip_sim_1: Gate
    """Cosine of CLIP's features of result and target prompt."""
    clip_sim_dir: Gate
    """Cosine of what changed between the images and what changed between the prompts, by CLIP."""
    clip_sim_image: Gate
    """Cosine of CLIP's features of input and result."""
    dinov2_sim: Gate
    """Cosine of DINOv2's features of input and result."""
    nsfw_score: Gate
    """What the safety checker says of the result, 0..1; where `safety` is set, at most 0.5 unless given."""
    judge_sc: Gate
    """The judge's score of how well the edit does what was asked, and no more, 0..10 (editscore: the same range)."""
    judge_pq: Gate
    """The judge's score of the picture, 0..10."""
    judge_overall: Gate
    """The root of both scores' product, 0..10."""
    clip: Location | None = None
    """The CLIP that is looked through, by folder or hub id."""
    dinov2: Location | None = None
    """The DINOv2 that is looked through, by folder or hub id."""
    safety: Annotated[str, Field(pattern=PLUG_IN)] | None = None
    """A checker of yours, "package.module:factory": factory() returns a function from a list of PIL images to a list of
    scores, 0..1. None is bundled."""
    judge: JudgeConfig | None = None
    """Who scores what passes all other gates; nothing else is shown to it. Its answers are kept in the folder as they
    come, and none is asked for again."""
    keep_unsafe: bool = False
    """Keep the picture of a result that nsfw_score rejects; else plain grey stands in its place."""

    @model_validator(mode="before")
    @classmethod
    def _preset_filled_in(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        preset = data.get("preset", "pixels")
        if not isinstance(preset, str) or preset not in PRESETS:
            return data  # refused by its own field
        filled = {**PRESETS[preset], **data}
        if data.get("safety") and "nsfw_score" not in data:
            filled["nsfw_score"] = {"max": 0.5}
        return filled

    @property
    def gates(self) -> dict[str, Bounds]:
        """Those that are on, in the order in which a result meets them."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: bounds for name, bounds in found.items() if isinstance(bounds, Bounds)}

    def problems(self, *, round_trip: bool) -> Iterator[tuple[str, str]]:
        """Gates whose figure nothing measures, with the way out.

        Args:
            round_trip: of the sink.
        """
        for name in self.gates:
            need = NEEDS.get(name)
            if need is not None and getattr(self, need) is None:
                yield f"gates.{name}", f"nothing measures it. Set gates.{need} to {WAYS_OUT[need]}; or {name} to null"
            if name in ("edit_change", "rest_change") and not round_trip:
                yield (
                    f"gates.{name}",
                    f"is not measured with sink.round_trip false. Set that to true, or {name} to null",
                )
        if self.judge is not None and (missing := [name for name in EXTRA if find_spec(name) is None]):
            text = f"needs {', '.join(missing)}, which is not installed: pip install 'shardedit[evaluate]'"
            yield "gates.judge", text
        if self.judge is not None and self.judge.protocol not in PROTOCOLS:
            text = f"is '{self.judge.protocol}', which scores no single result by its request. Set it to one of: "
            yield "gates.judge.protocol", text + ", ".join(PROTOCOLS)
        if not self.gates:
            yield "gates", "has no gate, and rejects nothing. Name one, choose a preset, or leave gates out"
