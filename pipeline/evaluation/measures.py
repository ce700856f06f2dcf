"""What is measured of a result: names, directions, and how tables print them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One column of scores."""

    head: str  # of its column in a table, without factor and arrow
    higher_is_better: bool | None  # None: neither
    factor: float = 1.0  # by which tables print it
    digits: int = 2

    @property
    def title(self) -> str:
        """The head with factor and arrow."""
        power = {1.0: "", 100.0: " x10^2", 1000.0: " x10^3", 10000.0: " x10^4"}[self.factor]
        arrow = {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]
        return f"{self.head}{power}{arrow}"


MEASURES: dict[str, Measure] = {
    # As PIE-Bench's own table has them, in its order.
    "structure_distance": Measure(head="structure distance", higher_is_better=False, factor=1000.0),
    "psnr_unedit_part": Measure(head="PSNR", higher_is_better=True),
    "lpips_unedit_part": Measure(head="LPIPS", higher_is_better=False, factor=1000.0),
    "mse_unedit_part": Measure(head="MSE", higher_is_better=False, factor=10000.0),
    "ssim_unedit_part": Measure(head="SSIM", higher_is_better=True, factor=100.0),
    "clip_similarity_source_image": Measure(head="CLIP source", higher_is_better=None),
    "clip_similarity_target_image": Measure(head="CLIP whole", higher_is_better=True),
    "clip_similarity_target_image_edit_part": Measure(head="CLIP edited", higher_is_better=True),
    "psnr_unedit_part_area_normalised": Measure(head="PSNR by area", higher_is_better=True),
    "psnr": Measure(head="PSNR, whole image", higher_is_better=None),
    "mse": Measure(head="MSE, whole image", higher_is_better=None, factor=10000.0),
    "ssim": Measure(head="SSIM, whole image", higher_is_better=None, factor=100.0),
    "clip_sim_0": Measure(head="CLIP input", higher_is_better=None, digits=4),
    "clip_sim_1": Measure(head="CLIP output", higher_is_better=True, digits=4),
    "clip_sim_dir": Measure(head="CLIP direction", higher_is_better=True, digits=4),
    "clip_sim_image": Measure(head="CLIP images", higher_is_better=None, digits=4),
    "dinov2_sim": Measure(head="DINOv2 images", higher_is_better=None, digits=4),
    "truth_psnr": Measure(head="PSNR against truth", higher_is_better=True),
    "mask_iou": Measure(head="mask IoU", higher_is_better=True),
    "judge_sc": Measure(head="judge SC", higher_is_better=True),
    "judge_pq": Measure(head="judge PQ", higher_is_better=True),
    "judge_overall": Measure(head="judge overall", higher_is_better=True),
    "judge_preference": Measure(head="judge preference", higher_is_better=True, digits=3),
}


def measure_of(name: str, own: dict[str, bool | None]) -> Measure:
    """A measure by its column; `own` are those of plug-ins, with their directions."""
    if name in MEASURES:
        return MEASURES[name]
    return Measure(head=name.replace("_", " "), higher_is_better=own.get(name), digits=3)
