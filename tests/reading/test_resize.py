"""Large pictures are resized in strips: the same pixels as in one piece."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.reading import placement

sides = st.integers(1, 60)


@settings(deadline=None, max_examples=150)
@given(sides, sides, sides, sides, st.booleans(), st.sampled_from([Image.Resampling.LANCZOS, Image.Resampling.BOX]))
def test_strips_give_the_pixels_of_one_piece(
    height: int, width: int, new_height: int, new_width: int, coloured: bool, method: Image.Resampling
) -> None:
    shape = (height, width, 3) if coloured else (height, width)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    whole = np.asarray(Image.fromarray(pixels).resize((new_width, new_height), method))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "STRIP_PIXELS", 97)
        in_strips = placement.resize(pixels, (new_height, new_width), method)
    assert np.array_equal(in_strips, pixels if (height, width) == (new_height, new_width) else whole)
