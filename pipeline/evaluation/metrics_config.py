"""The metrics' section of an evaluation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.settings.sections import Location, Section

PLUG_IN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


class MetricsConfig(Section):
    """What is measured of results, besides their pixels. No model is bundled; without its name it measures nothing."""

    clip: Location | None = None
    """A CLIP, by folder or hub id: similarity of images and texts. Published: openai/clip-vit-large-patch14."""
    dino: Location | None = None
    """A DINO ViT, by folder or hub id: the structure distance. Published: facebook/dino-vitb8."""
    dinov2: Location | None = None
    """A DINOv2, by folder or hub id: similarity of the two images. Published sets use facebook/dinov2-large."""
    lpips: bool = False
    """LPIPS with SqueezeNet, through torchmetrics. It needs torchvision, and downloads its weights."""
    antialias: bool = False
    """How the structure distance shrinks pictures; published tables: without."""
    jpeg_roundtrip: bool = False
    """Pass results through a JPEG of quality 75 first, as published results were saved: to compare with these alone."""
    own: tuple[Annotated[str, Field(pattern=PLUG_IN)], ...] = ()
    """Measures of one's own, "package.module:factory" (evaluation/scoring.py says what it returns)."""
    batch_size: int = Field(default=32, ge=1)
    """Results that models see together. Changes how their numbers are rounded."""
