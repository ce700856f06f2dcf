"""The simulated device: a clock of its own, waits where numbers are touched, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.architectures import SD15
from benchmarks.simulated import META, OnDevice, OnItsWay, ProcessorClock, SimulatedGPU, Stream
from pipeline.engine.calls import NetworkCall
from tests.methods import levels


class Clock:
    """Seconds that pass when somebody sleeps, or works."""

    def __init__(self) -> None:
        self.now = 100.0

    def read(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream(clock: Clock) -> Stream:
    return Stream(1.0, clock=clock.read, sleep=clock.work)  # a TFLOP is a second


def test_a_host_that_waits_for_every_answer_leaves_the_device_idle(clock: Clock, stream: Stream) -> None:
    for _ in range(10):
        moment = stream.launch(3.0)
        assert clock.now == moment - 3.0
        stream.wait(moment)
        clock.work(1.0)
    assert stream.busy == 30.0
    assert stream.span == 39.0  # the last second of the host is after the device's last
    assert stream.busy_share == pytest.approx(30 / 39)


def test_a_host_that_gives_the_next_call_before_it_waits_keeps_the_device_busy(clock: Clock, stream: Stream) -> None:
    given = [stream.launch(3.0)]
    for _ in range(9):
        given.append(stream.launch(3.0))
        stream.wait(given.pop(0))
        clock.work(1.0)
    assert stream.busy_share == pytest.approx(1.0)
    assert stream.ends == 130.0


def test_the_time_before_the_first_call_is_nobodys(clock: Clock, stream: Stream) -> None:
    clock.work(50.0)
    stream.launch(2.0)
    assert stream.busy_share == pytest.approx(1.0)
    stream.forget()
    assert (stream.busy, stream.span, stream.busy_share) == (0.0, 0.0, 0.0)


def test_on_the_processors_clock_nobody_sleeps() -> None:
    clock = ProcessorClock()
    stream = Stream(1.0, clock=clock.read, sleep=clock.sleep)
    before = clock.read()
    stream.wait(stream.launch(3600.0))
    assert clock.read() - before >= 3600.0
    assert stream.busy_share == pytest.approx(1.0)


def test_numbers_are_waited_for_by_who_touches_them_and_device_work_waits_for_nothing(
    clock: Clock, stream: Stream
) -> None:
    made = OnDevice.of(torch.empty((2, 3), device=META), stream, stream.launch(5.0))
    later = torch.stack([made, made])[0] * 2.0
    copies = [later.cpu(), made.to("cpu", torch.float64), made.to(torch.device("cpu"), non_blocking=True)]
    assert clock.now == 100.0
    assert all(copy.sum().shape == () for copy in copies)
    assert clock.now == 105.0
    assert all(type(copy) is torch.Tensor for copy in copies)  # nothing more to wait for
    assert [copy.dtype for copy in copies] == [torch.float32, torch.float64, torch.float32]
    assert torch.isfinite(copies[0]).all()


def test_a_copy_that_nobody_has_touched_is_on_its_way(clock: Clock, stream: Stream) -> None:
    copy = OnDevice.of(torch.empty((4, 2), device=META), stream, stream.launch(1.0)).cpu()
    assert type(copy) is OnItsWay
    row = copy[1]
    assert (clock.now, type(row), row.shape) == (101.0, torch.Tensor, (2,))


def call(model: SimulatedGPU, rows: int, **given: Any) -> NetworkCall:
    prompt = model.encode_text("a hat")
    return NetworkCall(torch.zeros((rows, 4, 64, 64)), levels(model, [401] * rows), [prompt] * rows, **given)


def test_a_call_of_the_model_takes_the_cards_time_and_returns_at_once(clock: Clock, stream: Stream) -> None:
    model = SimulatedGPU(SD15, stream)
    watch = torch.zeros((16, 1, 77))
    answer = model.denoise(call(model, 16, watch=watch))
    assert clock.now == 100.0
    assert stream.busy == pytest.approx(16 * 0.8)
    assert answer.attention is not None
    assert answer.attention.cpu().sum().shape == ()
    assert clock.now == pytest.approx(100.0 + 12.8)
    assert answer.attention.shape == (16, 1, 16, 16)
    noise, data = answer.predictions.noise.cpu(), answer.predictions.data.cpu()
    assert noise.shape == data.shape == (16, 4, 64, 64)
    assert not torch.equal(noise, data)
    wanted = model.denoise(call(model, 2, cotangents=[lambda prediction: prediction] * 2))
    assert wanted.embedding_grads is not None
    assert stream.busy == pytest.approx(16 * 0.8 + 3 * 2 * 0.8)  # a backward pass counts as two


def test_the_autoencoder_takes_time_by_the_area_of_a_picture(clock: Clock, stream: Stream) -> None:
    model = SimulatedGPU(SD15, stream)
    pixels = model.autoencoder.decode(torch.zeros((4, 128, 64)))
    assert pixels.shape == (1024, 512, 3)
    assert (stream.busy, clock.now) == (5.0, 105.0)
    assert model.autoencoder.encode(pixels).shape == (4, 128, 64)
    assert stream.busy == pytest.approx(5.0 + 2.2)
    assert clock.now == pytest.approx(107.2)
