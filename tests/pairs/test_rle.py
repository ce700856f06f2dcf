"""Masks as COCO's run lengths: as pycocotools writes them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pipeline.pairs.rle import rle_of


def boxes() -> np.ndarray:
    mask = np.zeros((6, 9), dtype=bool)
    mask[1:3, 2:5] = mask[5, 8] = mask[0, 0] = True
    return mask


def with_a_hole() -> np.ndarray:
    mask = np.zeros((480, 640), dtype=bool)
    mask[100:300, 50:400] = mask[0, 0] = True
    mask[150:160, 60:90] = False
    return mask


@pytest.mark.parametrize(
    ("mask", "counts"),  # by pycocotools 2.0.11
    [
        (np.zeros((7, 5), dtype=bool), "S1"),
        (np.ones((7, 5), dtype=bool), "0S1"),
        (boxes(), "01<1H000f0O"),
    ],
)
def test_counts_are_those_of_pycocotools(mask, counts):
    assert rle_of(mask) == {"size": list(mask.shape), "counts": counts}


def test_long_runs_and_negative_differences_are_those_of_pycocotools():
    counts = rle_of(with_a_hole())["counts"]
    assert len(counts) == 894
    assert counts.startswith("01Sag0W6egXO000000000000000000ZKbGj2^8VMbGj2^8VMbGj2^8VMbGj2")
    stripes = np.add.outer(np.arange(50), np.arange(40)) % 37 < 9
    digest = hashlib.sha256(rle_of(stripes)["counts"].encode()).hexdigest()
    assert digest[:16] == "a734f858976ae511"


def test_pycocotools_reads_them():
    coco = pytest.importorskip("pycocotools.mask")
    for mask in (boxes(), with_a_hole()):
        found = rle_of(mask)
        assert np.array_equal(coco.decode({"size": found["size"], "counts": found["counts"].encode()}), mask)
