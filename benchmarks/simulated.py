"""A GPU that is not there: calls of its models return at once, and it takes the time of a card on a clock of its own.

The model is the product's own, its tensors lie on torch's meta device, which computes nothing; so the host does what it
would do beside a GPU. What the device is given begins when the piece before has ended, whatever the host does
meanwhile. A tensor of the device knows when its numbers will be there, and so does a copy of it on the host: whoever
touches the copy first waits until then. So overlap shows where there is any, and a wait where there is none.

Not simulated: copies take no time, and whether one would block is for `copies.py` to count; launching the network is
one launch, as of a captured graph. The numbers that come back are random.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from itertools import count
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from typing_extensions import override

from benchmarks.architectures import SD15, SDXL, TINY_SD, TINY_SDXL, Architecture
from pipeline.engine.backbone import Offers
from pipeline.engine.calls import NetworkAnswer, NetworkCall
from pipeline.engine.controls import WATCHED_FACTOR
from pipeline.models.stable_diffusion import StableDiffusion, Text

META, CPU = torch.device("meta"), torch.device("cpu")
RATE = 520.0  # TFLOP/s: two thirds of the 790 that an H200 reaches in products of bfloat16 matrices
NETWORK_TFLOP = {SD15.name: 0.8, SDXL.name: 6.8}  # of one row, at the model's own size
ENCODE_TFLOP, DECODE_TFLOP = 1.1, 2.5  # of one picture of 512 x 512 pixels; others by their area
BACKWARD = 2  # times what a call takes


class ProcessorClock:
    """The time that this process computed, and the time that it waited for a device: on a machine where others compute
    as well, what a clock on the wall would show without them. Threads count one after the other."""

    def __init__(self) -> None:
        self._slept = 0.0

    def read(self) -> float:
        """Seconds."""
        return time.process_time() + self._slept

    def sleep(self, seconds: float) -> None:
        """Let time pass on this clock alone."""
        self._slept += seconds


class Stream:
    """What a device has been given, in order.

    Args:
        rate: TFLOP/s.
        clock: seconds; of the host.
        sleep: lets seconds pass on that clock.
    """

    def __init__(
        self,
        rate: float = RATE,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.rate, self._clock, self._sleep = rate, clock, sleep
        self._lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.busy = 0.0  # seconds of work that it was given
        self.begun: float | None = None  # the first of it
        self.ends = 0.0  # when all of it will be done

    def launch(self, tflop: float) -> float:
        """Give it work, and return at once. Returns the moment at which that will be done."""
        seconds = tflop / self.rate
        with self._lock:
            now = self._clock()
            self.begun = now if self.begun is None else self.begun
            self.ends = max(now, self.ends) + seconds
            self.busy += seconds
            return self.ends

    def wait(self, moment: float) -> None:
        """Let the host wait until the device has got there."""
        left = moment - self._clock()
        if left > 0:
            self._sleep(left)

    @property
    def span(self) -> float:
        """Seconds from the first piece's begin to the last one's end."""
        return 0.0 if self.begun is None else self.ends - self.begun

    @property
    def busy_share(self) -> float:
        """Of that time, the share in which it worked."""
        return self.busy / self.span if self.span else 0.0


class _Timed(Tensor):
    """A tensor whose numbers are there at a moment of a stream."""

    stream: Stream
    moment: float

    @classmethod
    def of(cls, tensor: Tensor, stream: Stream, moment: float) -> Self:
        """The same tensor, there at `moment`."""
        made = tensor.as_subclass(cls)
        made.stream, made.moment = stream, moment
        return made


class OnDevice(_Timed):
    """Of the simulated device; meta."""

    @classmethod
    @override
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is Tensor.copy_ and not args[0].is_meta:  # into a tensor of the host, which is no one's yet
            copied = args[0].copy_(random_numbers(tuple(args[1].shape), args[0].dtype))
            return OnItsWay.of(copied, args[1].stream, args[1].moment)
        if (dtype := _dtype_on_host(func, args, named)) is not None:
            copy = random_numbers(tuple(args[0].shape), dtype)
            return OnItsWay.of(copy, args[0].stream, args[0].moment)
        given = [one for one in tree_leaves((args, named)) if isinstance(one, OnDevice)]
        stream, moment = given[0].stream, max(one.moment for one in given)
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **named)
        return tree_map_only(Tensor, lambda one: cls.of(one, stream, moment) if one.is_meta else one, made)


def _dtype_on_host(func: Any, args: Any, named: Mapping[str, Any]) -> torch.dtype | None:
    """What a copy to the host is made of; None where there is none."""
    if func is Tensor.cpu:
        return args[0].dtype
    if func is not Tensor.to or not isinstance(args[0], OnDevice):
        return None
    device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **named)
    return dtype or args[0].dtype if device == CPU else None


class OnItsWay(_Timed):
    """A copy on the CPU. Whoever touches it first waits; from then on it is a tensor like others."""

    @classmethod
    @override
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in tree_leaves((args, kwargs)):
            if type(one) is cls:
                one.__class__ = Tensor
                one.stream.wait(one.moment)
        return func(*args, **(kwargs or {}))


def random_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers, or bytes: one of a few tensors in turn, which nobody may change."""
    return _random_numbers(shape, dtype, next(_TURNS) % 4)


_TURNS = count()


@lru_cache(maxsize=256)
def _random_numbers(shape: tuple[int, ...], dtype: torch.dtype, turn: int) -> Tensor:
    generator = torch.Generator().manual_seed(turn)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


class SimulatedAutoencoder:
    """Between pixels and latents of an eighth of their sides: one picture, for which the host waits, or a batch."""

    factor = 8

    def __init__(self, stream: Stream, channels: int) -> None:
        self._stream, self._channels = stream, channels

    def encode(self, pixels: np.ndarray | Tensor) -> Tensor:
        """(H, W, 3) to latents (C, h, w) on the CPU; (B, H, W, 3) to latents (B, C, h, w) on the device."""
        *batch, height, width, _ = pixels.shape
        latents = torch.empty((*batch, self._channels, height // self.factor, width // self.factor), device=META)
        made = self._done(latents, ENCODE_TFLOP)
        return made if batch else made.cpu() + 0.0

    def decode(self, latents: Tensor) -> np.ndarray | Tensor:
        """(C, h, w) to pixels (H, W, 3); (B, C, h, w) to pixels (B, H, W, 3) on the device."""
        *batch, _, rows, columns = latents.shape
        pixels = torch.empty((*batch, rows * self.factor, columns * self.factor, 3), dtype=torch.uint8, device=META)
        made = self._done(pixels, DECODE_TFLOP)
        return made if batch else made.cpu().numpy()

    def _done(self, made: Tensor, tflop: float) -> OnDevice:
        places = made[..., 0].numel() if made.dtype == torch.uint8 else made[..., 0, :, :].numel() * self.factor**2
        return OnDevice.of(made, self._stream, self._stream.launch(tflop * places / 512**2))


@cache
def tiny_text(architecture: Architecture) -> Text:
    """Of the tiny checkpoint: prompts are encoded on the CPU, once each."""
    tiny = TINY_SDXL if architecture.is_xl else TINY_SD
    return tiny.text_of(tiny.make_texts(CPU, torch.float32))


class SimulatedGPU(StableDiffusion):
    """The product's model on the simulated device.

    Args:
        architecture: the model's; it decides the time of a call.
        stream: of the device.
    """

    def __init__(self, architecture: Architecture, stream: Stream) -> None:
        unet = architecture.make_unet(META, torch.float32)
        super().__init__(
            unet=unet,
            autoencoder=SimulatedAutoencoder(stream, unet.config.out_channels),  # type: ignore[arg-type]
            text=tiny_text(architecture),
            schedule=architecture.schedule,
            offers=Offers(embedding_gradients=True),
            record=architecture.record(META, torch.float32),
            device=META,
        )
        self._stream = stream
        at_own_size = (architecture.image_size // self.latent_scale) ** 2
        self._tflop = NETWORK_TFLOP[architecture.name] / at_own_size  # per row and place of the latents
        unet.forward = self._launch

    def _launch(self, latents: Tensor, times: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        """In place of the UNet: its output, on its way."""
        output = latents[:, : self.latent_channels].clone()
        if torch.is_grad_enabled():  # a gradient must find its way back to the text
            output = output + encoder_hidden_states.mean()
        moment = self._stream.launch(self._tflop * output[:, 0].numel())
        return (OnDevice.of(output, self._stream, moment),)

    @override
    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        answer = super().denoise(call)
        changes: dict[str, Tensor] = {}
        rows, _, height, width = call.latents.shape
        if call.watch is not None:  # no attention has run that could have recorded it
            grid = (height // WATCHED_FACTOR, width // WATCHED_FACTOR)
            watched = torch.empty((rows, call.watch.shape[1], *grid), device=META)
            changes["attention"] = OnDevice.of(watched, self._stream, self._stream.ends)
        if answer.embedding_grads is not None:
            moment = self._stream.launch(BACKWARD * self._tflop * rows * height * width)
            changes["embedding_grads"] = OnDevice.of(answer.embedding_grads, self._stream, moment)
        return dataclasses.replace(answer, **changes) if changes else answer
