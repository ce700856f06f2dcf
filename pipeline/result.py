"""What the Python front door gives for an edit, and how a notebook shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.records import Edited, EditRequest


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Result:
    """One edit of one image. A notebook shows input, mask and edit side by side."""

    edit: str
    method: str
    input: Image.Image  # upright, RGB
    image: Image.Image  # edited, at the input's size
    mask: Image.Image | None  # mode "1", at the input's size: where the edit acted. None: it has no region
    masks: tuple[Image.Image | None, ...]  # mode "1": those that the method found, one per concept or one in all
    request: EditRequest
    seed: int
    figures: Mapping[str, float | None]  # evaluation/metrics.py

    @classmethod
    def of(cls, edited: Edited) -> Result:
        """The result of an outcome."""
        return cls(
            edit=edited.edit,
            method=edited.method,
            input=Image.fromarray(edited.original),
            image=Image.fromarray(edited.image),
            mask=None if edited.mask is None else Image.fromarray(edited.mask),
            masks=tuple(None if mask is None else Image.fromarray(mask) for mask in edited.masks),
            request=edited.request,
            seed=edited.seed,
            figures=edited.figures,
        )

    def __repr__(self) -> str:
        width, height = self.image.size
        share = self.figures["mask_share"]
        region = "no region" if share is None or self.mask is None else f"a region of {share:.1%}"
        return f"<Result of '{self.edit}' by {self.method}, {width} x {height} pixels, {region}>"

    def _repr_html_(self) -> str:
        from pipeline.looking.report.side_by_side import html  # its Parquet is needed nowhere else here

        return html(self.input, self.mask, self.image, self.request)


def sheet(results: Sequence[Result], columns: int = 1) -> Image.Image:
    """One picture with input, mask and edit of several results, `columns` results to a line."""
    from pipeline.looking.report.side_by_side import asked
    from pipeline.looking.report.thumbnails import SheetEntry, contact_sheet

    entries = [
        SheetEntry(
            original=result.input,
            mask=None if result.mask is None else np.asarray(result.mask),
            edited=result.image,
            label=f"{asked(result.request)} ({result.method})",
        )
        for result in results
    ]
    return contact_sheet(entries, columns)
