"""What runs in a guarded process (reading/guarded.py): limits, then one job after the other until nobody asks."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from PIL import AvifImagePlugin

from pipeline.errors import DecodeError
from pipeline.reading.channel import Answer, Channel, ClosedError, LateError, Message
from pipeline.reading.decode import decode, decode_mask

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
MAX_QUESTION = 8 << 30  # bytes; the parent is trusted


def main() -> None:
    """Serve. Arguments: the parent's process id, bytes of memory, seconds of CPU per job, seconds to wait for one."""
    parent, memory, seconds, patience = map(int, sys.argv[1:])
    _follow(parent)
    channel = _channel()
    _limit_memory(memory)
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # its default is one per core
    channel.send({"ready": True})
    while True:
        try:
            question = channel.receive(seconds=patience)
        except (ClosedError, LateError):
            return
        allow_cpu(seconds)
        try:
            head, blobs = _answer(channel, question, seconds)
        except MemoryError:
            head, blobs = {"memory": True}, []
        except Exception:
            head, blobs = {"fault": traceback.format_exc()}, []
        channel.send(head, blobs)
        del question, head, blobs  # a picture of 64 megapixels is not kept beside the next one


def _answer(channel: Channel, question: Message, seconds: int) -> Answer:
    head, (data,) = question
    if head["job"] not in PICTURES:
        from pipeline.reading.parquet_job import answer  # pyarrow and pydantic, which pictures need not

        return answer(channel, head, bytes(data), lambda times=1: allow_cpu(times * seconds))
    try:
        return PICTURES[head["job"]](bytes(data), head)
    except DecodeError as error:
        return {"problem": str(error)}, []


def _image(data: bytes, head: dict[str, object]) -> Answer:
    pixels, orientation = decode(data, head["max_pixels"])  # type: ignore[arg-type]
    return {"shape": pixels.shape, "orientation": orientation}, [pixels.data.cast("B")]


def _mask(data: bytes, head: dict[str, object]) -> Answer:
    mask = decode_mask(data, head["max_pixels"], head["orientation"], tuple(head["size"]))  # type: ignore[arg-type]
    return {"shape": mask.shape}, [mask.data.cast("B")]


PICTURES: dict[str, Callable[[bytes, dict[str, object]], Answer]] = {"image": _image, "mask": _mask}


def allow_cpu(seconds: int) -> None:
    """From now on, so much more; the kernel ends the process after it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def _follow(parent: int) -> None:
    """End with the parent, and at its word alone: signals to stop are for who decides what a stop means."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _channel() -> Channel:
    """Over the standard streams, which nothing else can reach by their usual names."""
    incoming, outgoing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    return Channel(incoming, outgoing, MAX_QUESTION)


def _limit_memory(memory: int) -> None:
    """`memory` bytes beside what is taken by now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    taken = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (taken + memory, taken + memory))


if __name__ == "__main__":
    main()
