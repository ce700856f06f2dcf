"""A comparison of bases on the terminal."""

from __future__ import annotations

from pipeline.common.showing import public_url
from pipeline.common.wording import count
from pipeline.studies.geometry import Geometry
from pipeline.studies.tables import rows_in


def text_of(geometry: Geometry) -> str:
    """What was compared, the means, and where the rest stands."""
    where = public_url(geometry.folder)
    done = f"{geometry.bases:,} bases in {count(geometry.parts, 'part')}, {geometry.computed_now} of them now"
    if geometry.summary is None:
        return f"{done}; {count(geometry.missing, 'part')} of others left in {where}"
    return f"{rows_in(geometry.summary)}{done}. Tables, pictures and directions: {where}"
