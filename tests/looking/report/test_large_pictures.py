"""Large pictures go into a report and through a check one at a time, and nothing large is kept."""

from __future__ import annotations

import io
import threading
import time

import numpy as np
import pytest
from PIL import Image, ImageFile

from pipeline.common.room import Room
from pipeline.looking import checking, results
from pipeline.looking.report import thumbnails
from pipeline.looking.report.page import write_report
from pipeline.looking.report.thumbnails import small_rgb
from pipeline.looking.results import RunFolder
from pipeline.looking.runs import find_run
from pipeline.looking.verify import verify

SIDE = 128  # of the runs' pictures


class Decoded:
    """How many pictures were decoded, and how many at once at most."""

    def __init__(self) -> None:
        self.all = self.most = self._now = 0
        self._lock = threading.Lock()

    def count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        load = ImageFile.ImageFile.load

        def counted(image: ImageFile.ImageFile) -> object:
            if not image.tile or image.size != (SIDE, SIDE):
                return load(image)
            with self._lock:
                self.all += 1
                self._now += 1
                self.most = max(self.most, self._now)
            time.sleep(0.005)  # others get their chance
            try:
                return load(image)
            finally:
                with self._lock:
                    self._now -= 1

        monkeypatch.setattr(ImageFile.ImageFile, "load", counted)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Decoded:
    """Counts; pictures of the runs are large, for the time of the test."""
    for module, name in ((thumbnails, "AT_WORK"), (checking, "DECODED")):
        monkeypatch.setattr(module, name, Room(SIDE * SIDE))
    found = Decoded()
    found.count(monkeypatch)
    return found


def test_a_report_decodes_large_pictures_one_at_a_time(make_run, decoded):
    write_report(make_run(images=4, include_input=True).sink)
    assert decoded.all >= 12, "four inputs and eight edits"
    assert decoded.most == 1


def test_a_check_decodes_large_pictures_one_at_a_time(make_run, decoded):
    recipe = make_run(images=2, units=4)
    verify(recipe.sink, find_run(recipe.sink.folder).record)
    assert decoded.all >= 16
    assert decoded.most == 1


@pytest.mark.parametrize("file_format", ["parquet", "webdataset"])
def test_a_report_holds_one_large_result_at_a_time_as_stored(make_run, file_format, monkeypatch):
    monkeypatch.setattr(results, "PORTION_BYTES", 1)
    held = []
    load = RunFolder.load
    monkeypatch.setattr(RunFolder, "load", lambda run, refs: held.append(refs) or load(run, refs))
    write_report(make_run(images=3, units=2, file_format=file_format).sink)
    parts = 12 if file_format == "parquet" else 2  # a tar is read whole, and once
    assert len(held) == parts
    assert sum(map(len, held)) == 12


def test_a_jpeg_is_decoded_no_larger_than_it_is_shown(monkeypatch):
    sizes = []
    thumbnail = thumbnails.thumbnail
    monkeypatch.setattr(thumbnails, "thumbnail", lambda image, side: sizes.append(image.size) or thumbnail(image, side))
    out = io.BytesIO()
    Image.fromarray(np.full((1500, 3000, 3), 90, dtype=np.uint8)).save(out, "JPEG")
    assert small_rgb(out.getvalue(), 256).size == (256, 128)
    assert sizes == [(750, 375)]
