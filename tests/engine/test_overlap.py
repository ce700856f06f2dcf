"""The device and the host at work side by side: calls given ahead, pictures in batches, faults of the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.engine import pictures
from pipeline.engine.calls import (
    DecodeGradient,
    DecodeLatents,
    Denoise,
    EncodeImage,
    EncodeText,
    NetworkAnswer,
    NetworkCall,
    Product,
    Steps,
    Valued,
)
from pipeline.engine.engine import GIVEN_CALLS, Engine
from pipeline.engine.faults import is_of_the_device, is_out_of_memory
from pipeline.errors import DeviceError, ShardeditError
from pipeline.models.analytic import AnalyticBackbone
from tests.methods import analytic, levels, source

STEPS = 5
PIXELS = (np.random.default_rng(0).random((5, 16, 16, 3)) * 255).astype(np.uint8)


class Device(AnalyticBackbone):
    """Notes what it is given and what is waited for; fails where it is told to."""

    def __init__(self, *, fails_at: int = -1, waits: int = -1, most_pictures: int = 100) -> None:
        super().__init__()
        self.log: list[str] = []
        self.fails_at, self.waits, self.most_pictures = fails_at, waits, most_pictures
        self.pictures: list[int] = []

    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        self.log.append("given")
        if self.log.count("given") == self.fails_at:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return super().denoise(call)

    def mark(self) -> Callable[[], None]:
        marked = "looked at" if self.log[-1:] == ["pictures"] else "taken"

        def wait() -> None:
            self.log.append(marked)
            if self.log.count("taken") == self.waits:
                raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

        return wait

    def encode_images(self, pixels: Tensor) -> Tensor:
        self._note(pixels)
        return super().encode_images(pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        self._note(latents)
        return super().decode_latents(latents)

    def _note(self, batch: Tensor) -> None:
        self.log.append("pictures")
        self.pictures.append(len(batch))
        if len(batch) > self.most_pictures:
            raise torch.OutOfMemoryError("pretended")
        if any(bool((one == 77).all()) for one in batch):
            raise ValueError("no picture")


def walks(number: int) -> Steps[Tensor]:
    """A row in each of some steps, each after the answer of the one before."""
    (prompt,) = yield EncodeText(("hat",))
    latents = source(analytic(), number).latents
    for step in range(STEPS):
        denoised = yield Denoise(latents[None], levels(analytic(), [401 + step]), [prompt])
        latents = denoised.predictions.noise[0]
    return latents


def test_a_call_is_given_before_the_answer_of_the_one_before_is_waited_for() -> None:
    device = Device()
    found = {done.index: done.value for done in Engine(device, call_size=4).run(walks(n) for n in range(8))}
    calls = 8 * STEPS // 4
    assert device.log.count("given") == device.log.count("taken") == calls
    ahead = [device.log[:at].count("given") - device.log[:at].count("taken") for at in range(len(device.log))]
    assert max(ahead) == GIVEN_CALLS
    waits = [n for n, what in zip(ahead, device.log, strict=True) if what == "taken"]
    assert waits == [GIVEN_CALLS] * (calls - 1) + [1]  # another one is there whenever one is waited for, to the last
    for number, latents in found.items():
        assert torch.equal(latents, Engine(analytic(), call_size=4).run_one(walks(number)))


def test_a_picture_takes_the_place_of_no_call(in_fours: None) -> None:
    def looks(number: int) -> Steps[Tensor]:
        latents = yield from walks(number)
        yield DecodeLatents(latents)
        return (yield from walks(number))

    device = Device()
    list(Engine(device, call_size=4, images_in_flight=24).run(looks(n) for n in range(24)))
    assert len(device.pictures) == 24 // 4
    waits = [at for at, what in enumerate(device.log) if what == "taken"]
    others = [device.log[:at].count("given") - device.log[: at + 1].count("taken") for at in waits]
    assert set(others[: 20 * 2 * STEPS // 4]) == {GIVEN_CALLS - 1}  # until the last four images are left


def test_a_short_call_is_given_only_when_nothing_can_fill_it() -> None:
    device, calls = Device(), []
    engine = Engine(device, call_size=4)
    denoise = device.denoise
    device.denoise = lambda call: calls.append(call) or denoise(call)  # type: ignore[method-assign]
    list(engine.run(walks(n) for n in range(6)))
    assert engine.stats.padded_rows <= 2 * 4
    assert len(calls) <= -(-6 * STEPS // 4) + 2


def test_a_row_that_is_asked_for_while_a_call_computes_it_is_computed_once() -> None:
    latents = source(analytic(), 1).latents

    def asks(*timesteps: int) -> Steps[Tensor]:
        (prompt,) = yield EncodeText(("hat",))
        rows = latents.expand(len(timesteps), -1, -1, -1)
        denoised = yield Denoise(rows, levels(analytic(), timesteps), [prompt] * len(timesteps))
        return denoised.predictions.noise

    device = Device()
    engine = Engine(device, call_size=2)
    found = {done.index: done.value for done in engine.run([asks(5, 6), asks(6, 7)])}  # the first fills a call
    assert torch.equal(found[0][1], found[1][0])
    assert (engine.stats.network_rows, engine.stats.shared_rows) == (4, 1)
    assert torch.equal(found[1], Engine(analytic(), call_size=2).run_one(asks(6, 7)))
    engine.run_one(asks(6, 7))
    assert engine.stats.shared_rows == 1  # what has been answered is nobody's any more


def test_a_product_that_is_asked_for_while_a_call_computes_it_is_computed_once() -> None:
    latents = source(analytic(), 1).latents
    vectors = torch.randn((3, *latents.shape), generator=torch.Generator().manual_seed(0))

    def asks(*which: int) -> Steps[Tensor]:
        (prompt,) = yield EncodeText(("hat",))
        rows, count = latents.expand(len(which), *latents.shape), len(which)
        wanted = vectors[which[0] : which[-1] + 1]
        return (yield Product(rows, levels(analytic(), [401] * count), [prompt] * count, wanted, "push"))

    device = Device()
    engine = Engine(device, call_size=8)  # two rows of a call in forward mode
    found = {done.index: done.value for done in engine.run([asks(0, 1), asks(1, 2)])}
    assert torch.equal(found[0][1], found[1][0])
    assert (engine.stats.network_rows, engine.stats.shared_rows) == (4, 1)
    assert device.log.count("taken") == 2
    assert torch.equal(found[1], Engine(analytic(), call_size=8).run_one(asks(1, 2)))


@pytest.mark.parametrize("faults", [{"fails_at": 3}, {"waits": 3}], ids=["given", "waited for"])
def test_a_device_that_fails_ends_everything_and_fails_no_row(faults: dict[str, int]) -> None:
    device = Device(**faults)
    engine = Engine(device, call_size=2)
    finished: list[Any] = []
    with pytest.raises(DeviceError, match="no row is to blame"):
        finished.extend(engine.run(walks(n) for n in range(4)))
    assert not [done for done in finished if done.error is not None]
    given = device.log.count("given")
    with pytest.raises(DeviceError):
        engine.run_one(walks(9))
    assert device.log.count("given") == given  # it is not asked again


def test_a_device_that_fails_in_the_autoencoder_fails_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, pixels: Tensor) -> Tensor:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr(Device, "encode_images", broken)
    with pytest.raises(DeviceError):
        Engine(Device()).run_one(there_and_back(0))


def test_what_is_no_fault_of_the_device() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    for error in (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        ShardeditError("CUDA error: in a row's own words"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ):
        assert not is_of_the_device(error)


def there_and_back(number: int) -> Steps[np.ndarray]:
    latents = yield EncodeImage(PIXELS[number])
    return (yield DecodeLatents(latents))


@pytest.fixture
def in_fours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures in batches, as on a GPU."""
    monkeypatch.setattr("pipeline.engine.engine.pictures_per_call", lambda call_size, device: 4)


def test_pictures_go_in_batches_of_one_size_and_keep_their_bits(in_fours: None) -> None:
    device = Device()
    found = {done.index: done.value for done in Engine(device).run(there_and_back(n) for n in range(5))}
    assert device.pictures == [4] * 4  # of ten pictures, two batches are filled up
    for number, pixels in found.items():
        assert np.array_equal(pixels, Engine(Device()).run_one(there_and_back(number)))
        assert pixels.shape == (16, 16, 3)


def test_without_padding_no_picture_is_computed_that_nobody_asked_for(in_fours: None) -> None:
    device = Device()
    Engine(device, pad=False).run_one(there_and_back(0))
    assert device.pictures == [1, 1]


def test_out_of_memory_in_the_autoencoder_halves_its_batch_and_loses_no_picture(in_fours: None) -> None:
    device = Device(most_pictures=2)
    engine = Engine(device, call_size=8)
    found = list(engine.run(there_and_back(n) for n in range(5)))
    assert [done.error for done in found] == [None] * 5
    assert (engine.pictures_per_call, engine.call_size) == (2, 8)
    with pytest.raises(torch.OutOfMemoryError):
        Engine(Device(most_pictures=0)).run_one(there_and_back(0))


def test_a_picture_that_breaks_a_batch_fails_alone(in_fours: None) -> None:
    def breaks() -> Steps[np.ndarray]:
        return (yield EncodeImage(np.full((16, 16, 3), 77, np.uint8)))

    found = {done.index: done for done in Engine(Device()).run([there_and_back(0), breaks(), there_and_back(1)])}
    assert {number: str(done.error) for number, done in found.items() if done.error} == {1: "no picture"}
    assert np.array_equal(found[2].value, Engine(Device()).run_one(there_and_back(1)))


def test_the_batch_of_the_autoencoder_follows_from_the_call_size_alone() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    sizes = [pictures.pictures_per_call(size, gpu) for size in (1, 8, 16, 64)]
    assert sizes == [1, 1, 2, 8]
    assert pictures.pictures_per_call(64, cpu) == 1  # filled up, it would compute for nobody


def test_gradients_of_pixels_are_given_one_by_one_and_fail_alone(in_fours: None) -> None:
    def brightness(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels.sum(), torch.ones_like(pixels)

    def breaks(pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError("no reward")

    def asks(number: int, function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Steps[Valued]:
        latents = yield EncodeImage(PIXELS[number])
        return (yield DecodeGradient(latents, function))

    engine = Engine(Device())
    functions = [brightness, breaks, brightness]
    found = {done.index: done for done in engine.run(asks(n, function) for n, function in enumerate(functions))}
    assert {number: str(done.error) for number, done in found.items() if done.error} == {1: "no reward"}
    for number in (0, 2):
        image = PIXELS[number].astype(np.float32) / 127.5 - 1.0
        assert found[number].value.value == pytest.approx(float(image.sum()), rel=1e-4)
        assert torch.equal(found[number].value.gradient, torch.ones_like(found[number].value.gradient))
