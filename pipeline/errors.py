"""Every error that a user can meet, as one tree.

    ShardeditError
    ├── RecipeError        the configuration asks for something that cannot work (all problems at once)
    ├── ModelError         a checkpoint is missing, unsafe or of an unknown kind
    ├── SourceError        nothing can be read: no bucket, no permission, no shard, no image
    ├── SinkError          nothing can be written, or the folder belongs to another run
    │   └── HeldError      another driver is writing to the folder
    ├── ClusterError       the cluster lacks what the recipe asks for
    ├── DeviceError        the GPU of this process failed for good: another process goes on
    ├── ServerError        a server cannot be asked: its key, address or model is wrong, or its quota spent
    ├── RunAborted         an error budget was spent
    └── RowError           one image fails; the run goes on, the image goes to quarantine
        ├── DecodeError    stage "decode"    the bytes are no image that may be opened
        ├── PrepareError   stage "prepare"   no usable edit request, mask or size
        ├── InvertError    stage "invert"    the inversion cannot work on this image
        ├── EditError      stage "edit"      the edit cannot work on this image
        │   ├── BlackImageError              the result is black all over, the input was not
        │   └── AnswerError                  a server's answer to this image is no edit of it
        └── EncodeError    stage "encode"    the result cannot be written as an image

A message says what was wrong, where, and what to do. A row's message holds no address, time or host, so that two
runs over the same data quarantine the same bytes.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

UNREADABLE = "ReadError"
"""`error_class` in quarantine of a row that could not be read, at stage "read". Nothing of that name is raised."""

Stage = Literal["read", "decode", "prepare", "invert", "edit", "encode"]


class ShardeditError(Exception):
    """Base of all errors of this package. `exit_code` is what a command returns for it."""

    exit_code: ClassVar[int] = 1


class RecipeError(ShardeditError):
    """The configuration cannot work. `problems` lists (key path, what is wrong and the way out)."""

    exit_code = 2

    def __init__(self, where: str, problems: list[tuple[str, str]]) -> None:
        self.where = where
        self.problems = problems
        lines = [f"{where} has {len(problems)} problem(s):"]
        lines += [f"  {path}: {text}" for path, text in problems]
        super().__init__("\n".join(lines))


class ModelError(ShardeditError):
    """A checkpoint cannot be used: missing, unsafe or of an unknown kind."""


class SourceError(ShardeditError):
    """Nothing can be read from the source."""


class SinkError(ShardeditError):
    """Nothing can be written to the sink, or what stands there belongs to another run."""


class HeldError(SinkError):
    """Another driver is writing to the run's folder, or to a partition that overlaps this one's."""


class ClusterError(ShardeditError):
    """The cluster lacks what the recipe asks for."""


class DeviceError(ShardeditError):
    """The device failed, and stays so for this process: no row's fault."""


class ServerError(ShardeditError):
    """A server cannot be asked: wrong key, model or address, or the quota is spent. No row's fault."""


class RunAborted(ShardeditError):  # noqa: N818  a verdict on the run, as KeyboardInterrupt is
    """The run was stopped because too much of it failed."""


class RowError(ShardeditError):
    """One image fails, its neighbours do not."""

    stage: ClassVar[Stage] = "edit"


class DecodeError(RowError):
    """The bytes are no image that may be opened."""

    stage = "decode"


class PrepareError(RowError):
    """The row has no usable edit request, mask or size."""

    stage = "prepare"


class InvertError(RowError):
    """The inversion cannot work on this image."""

    stage = "invert"


class EditError(RowError):
    """The edit cannot work on this image."""

    stage = "edit"


class BlackImageError(EditError):
    """The result is black all over, the input was not: a half-precision decoder that overflowed looks like this."""


class AnswerError(EditError):
    """A server has answered with no edit of the image: it refused, failed for good, or sent something else.

    `spent`: what its answers have cost, a `remote.pictures.Spent`; None: nothing was asked.
    """

    def __init__(self, message: str, spent: Any = None) -> None:
        super().__init__(message)
        self.spent = spent


class EncodeError(RowError):
    """The result cannot be written as an image."""

    stage = "encode"
