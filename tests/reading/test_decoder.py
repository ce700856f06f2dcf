"""Pictures are decoded in a process that may be killed: whatever they claim, a row takes so much time and memory."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ClusterError, DecodeError, PrepareError
from pipeline.reading import decode as plain
from pipeline.reading import guarded
from pipeline.reading.decoder import Decoder
from pipeline.reading.prepare import prepare
from pipeline.reading.requests import asked_of
from pipeline.recipe import SourceConfig, recipe_from
from pipeline.samples import Sample

MOST = 64_000_000
MIB = 2**20


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    end_idle()
    yield
    end_idle()


def end_idle() -> None:
    """End the processes that wait for a job."""
    with guarded._idle.lock:
        waiting = [future for futures in guarded._idle.by_limits.values() for future in futures]
        guarded._idle.by_limits.clear()
    for future in waiting:
        if future.exception() is None:
            future.result().end()


def decoder(**limits: int) -> Decoder:
    return Decoder(SourceConfig(shards=("unused",), **limits))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, channels: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of_one_colour(side: int) -> bytes:
    return saved(Image.new("L", (side, side), 7), "PNG")


def jpeg_of_many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG of one colour; its last scan, a few bytes that refine nothing, comes again and again."""
    data = saved(Image.new("L", (side, side), 7), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + (data[last:-2]) * scans + data[-2:]


def tiff_of_pages(pages: int) -> bytes:
    """One pixel, and a directory of it after the other."""
    entries = [(256, 4, 1), (257, 4, 1), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, 1), (279, 4, 1)]
    size = 2 + 12 * len(entries) + 4
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    directories = (
        struct.pack("<H", len(entries)) + body + struct.pack("<I", 0 if page + 1 == pages else 10 + (page + 1) * size)
        for page in range(pages)
    )
    return b"II*\0" + struct.pack("<I", 10) + b"\7\0" + b"".join(directories)


def plain_ppm(side: int) -> bytes:
    return f"P3 {side} {side} 255\n".encode() + b"7 " * (3 * side * side)


def png_with_text(chunks: int) -> bytes:
    picture = png_of_one_colour(4)
    bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(900_000)))
    return picture[:33] + bomb * chunks + picture[33:]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(saved(noise(40, 30, 3), "PNG"), id="png"),
        pytest.param(saved(noise(40, 30, 4), "PNG"), id="transparent"),
        pytest.param(saved(noise(40, 30, 3), "JPEG", quality=90), id="jpeg"),
        pytest.param(saved(noise(40, 30, 4), "WEBP"), id="webp"),
        pytest.param(saved(noise(40, 30, 3), "AVIF"), id="avif"),
        pytest.param(saved(noise(40, 30, 4).convert("CMYK"), "TIFF"), id="cmyk"),
        pytest.param(saved(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(40, 30)), "PNG"), id="16-bit"),
    ],
)
def test_the_guarded_process_gives_the_same_bits(data: bytes) -> None:
    pixels, orientation = decoder().image(data, MOST)
    expected, upright = plain.decode(data, MOST)
    assert orientation == upright
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, expected)


def test_turned_images_and_their_masks_are_the_same_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(noise(40, 30, 3), "JPEG", exif=exif)
    mask = saved(Image.fromarray(np.arange(1200).reshape(40, 30) > 600), "PNG")
    pixels, orientation = decoder().image(turned, MOST)
    assert (pixels.shape, orientation) == ((30, 40, 3), 6)
    ours = decoder().mask(mask, MOST, orientation, (30, 40))
    assert np.array_equal(ours, plain.decode_mask(mask, MOST, orientation, (30, 40)))
    assert ours.any()


@pytest.mark.parametrize("data", [b"", b"no image", png_of_one_colour(8)[:40]], ids=["empty", "text", "cut"])
def test_what_is_no_image_has_the_same_reason(data: bytes) -> None:
    with pytest.raises(DecodeError) as here:
        plain.decode(data, MOST)
    with pytest.raises(DecodeError) as there:
        decoder().image(data, MOST)
    assert str(there.value) == str(here.value)


@pytest.mark.parametrize(
    ("make", "seconds"),
    [
        pytest.param(lambda: jpeg_of_many_scans(3000, 4000), 1, id="progressive scans"),
        pytest.param(lambda: tiff_of_pages(100_000), 1, id="pages"),
        pytest.param(lambda: plain_ppm(3500), 1, id="text"),
    ],
)
def test_what_takes_long_is_ended_by_its_cpu_time(make: Callable[[], bytes], seconds: int) -> None:
    data = make()
    start = time.monotonic()
    with pytest.raises(DecodeError, match=r"the image took longer than 1 s \(source.decode_seconds\)"):
        decoder(decode_seconds=seconds).image(data, MOST)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: png_of_one_colour(8000), id="png"),
        pytest.param(lambda: saved(Image.new("L", (8000, 8000), 7), "JPEG"), id="jpeg"),
        pytest.param(lambda: saved(Image.new("1", (8000, 8000)), "TIFF", compression="group4"), id="tiff"),
    ],
)
def test_what_takes_much_memory_fails_with_that_reason(make: Callable[[], bytes]) -> None:
    data = make()
    assert len(data) < 2 * MIB
    with pytest.raises(DecodeError, match=r"the image needed more than 128 MiB of memory \(source.decode_memory\)"):
        decoder(decode_memory=128 * MIB).image(data, MOST)


def test_64_megapixels_are_within_the_limits() -> None:
    pixels, _ = decoder().image(png_of_one_colour(8000), MOST)
    assert pixels.shape == (8000, 8000, 3)
    assert (pixels == 7).all()


def test_text_chunks_that_unpack_to_much_are_refused() -> None:
    with pytest.raises(DecodeError, match="damaged or cut"):
        decoder(decode_seconds=5, decode_memory=256 * MIB).image(png_with_text(200), MOST)


def test_a_failed_picture_leaves_its_neighbours_alone() -> None:
    ours = decoder(decode_seconds=1, decode_memory=128 * MIB)
    good = saved(noise(40, 30, 3), "PNG")
    for bad in (png_of_one_colour(8000), b"no image"):
        with pytest.raises(DecodeError):
            ours.image(bad, MOST)
        assert np.array_equal(ours.image(good, MOST)[0], plain.decode(good, MOST)[0])


def test_a_process_that_somebody_kills_costs_no_picture() -> None:
    ours = decoder()
    good = saved(noise(40, 30, 3), "PNG")
    ours.image(good, MOST)
    os.kill(the_process(), signal.SIGKILL)
    assert ours.image(good, MOST)[0].shape == (40, 30, 3)


def test_a_process_that_ended_while_idle_is_replaced_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "IDLE_S", 1.0)
    ours = decoder()
    good = saved(noise(40, 30, 3), "PNG")
    ours.image(good, MOST)
    first = the_process()
    until = time.monotonic() + 20
    while is_running(first) and time.monotonic() < until:
        time.sleep(0.05)
    ours.image(good, MOST)
    assert the_process() != first


def test_a_process_that_may_be_about_to_end_gets_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a while to end: whoever asks meanwhile would lose the answer."""
    ours = decoder()
    good = saved(noise(40, 30, 3), "PNG")
    ours.image(good, MOST)
    first = the_process()
    now = time.monotonic()
    monkeypatch.setattr(guarded.time, "monotonic", lambda: now + guarded.IDLE_S - 1)
    ours.image(good, MOST)
    assert the_process() != first
    assert not is_running(first)


def test_where_no_process_can_be_started_no_row_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nothing/there")
    with pytest.raises(ClusterError, match="no process can be started"):
        decoder().image(saved(noise(40, 30, 3), "PNG"), MOST)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_stop_are_left_to_the_parent(number: signal.Signals) -> None:
    ours = decoder()
    good = saved(noise(40, 30, 3), "PNG")
    ours.image(good, MOST)
    process = the_process()
    os.kill(process, number)
    ours.image(good, MOST)
    assert the_process() == process


def test_a_mask_that_breaks_a_limit_is_told_as_the_mask() -> None:
    recipe = recipe_from(
        {
            "source": {"shards": "unused", "decode_memory": 128 * MIB},
            "edits": {"concepts": [{"prompt": "hat"}]},
            "sink": {"folder": "unused"},
        }
    )
    row = Sample(id="a", shard="", key="a", index=0, image=saved(noise(40, 40, 3), "PNG"), mask=png_of_one_colour(8000))
    with pytest.raises(PrepareError, match=r"the mask needed more than 128 MiB"):
        prepare(asked_of(row, recipe), recipe, size=64, multiple=8, decoder=Decoder(recipe.source))


PARENT = """
import os, sys, time
from pipeline.reading import guarded
with guarded.borrowed(guarded.Limits(2**30, 60, "")) as child:
    if sys.argv[2] == "busy":
        child.channel.send({"job": "image", "max_pixels": 64_000_000}, [open(sys.argv[1], "rb").read()])
    print(child.process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_it_ends_with_its_parent(tmp_path: Path, state: str) -> None:
    (tmp_path / "slow.jpg").write_bytes(jpeg_of_many_scans(3000, 4000))
    command = [sys.executable, "-c", PARENT, str(tmp_path / "slow.jpg"), state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.kill()
        until = time.monotonic() + 10
        while is_running(child) and time.monotonic() < until:
            time.sleep(0.02)
        assert not is_running(child)


def test_it_knows_neither_a_model_nor_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    ours = decoder()
    ours.image(png_of_one_colour(4), MOST)
    process = Path(f"/proc/{the_process()}")
    assert b"planted" not in (process / "environ").read_bytes()
    assert "torch" not in (process / "maps").read_text()


def the_process() -> int:
    """The one that waits for a job."""
    ((future,),) = guarded._idle.by_limits.values()
    return future.result().process.pid


def is_running(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False
