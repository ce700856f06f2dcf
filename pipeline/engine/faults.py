"""Which errors of a model call are the device's own: out of memory, which a smaller call may cure, and the fatal ones.

A CUDA error (an illegal address, an uncorrectable ECC error, a GPU that fell off the bus) is sticky: every later call
of the process fails with it. Taken for a row's fault, it would send every row that is left to quarantine.
"""

from __future__ import annotations

import torch

from pipeline.common.showing import describe
from pipeline.errors import DeviceError

# PyTorch raises plain RuntimeErrors for failures inside cuBLAS, cuDNN and NCCL.
FATAL = (
    "CUDA error",
    "device-side assert",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
)
# What these libraries say where they find no memory for themselves.
MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA out of memory")


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device had too little memory for the call."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY)
    )


def is_of_the_device(error: Exception) -> bool:
    """Whether the device has failed for good."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.AcceleratorError) or any(text in str(error) for text in FATAL)


def device_error(device: torch.device, error: Exception) -> DeviceError:
    """The end of everything on a device: what every later call would raise, in words."""
    return DeviceError(
        f"the device {device} failed ({describe(error)}): no row is to blame, and this process can no longer use it. "
        "What is committed stays: the same command goes on from there. If it fails again, look at the machine's logs "
        "(nvidia-smi, dmesg)"
    )
