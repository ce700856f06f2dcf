"""The UNet as one compiled graph per shape of a call: `model.compile`.

The engine's calls have one fixed shape, which is what a compiler asks for: norms, activations, additions and copies
between the large products become few kernels. A graph takes a minute or more to make, once per latent shape and
machine; torch keeps it on disk (TORCHINDUCTOR_CACHE_DIR) for the next process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipeline.errors import ModelError

GRAPHS = 128  # shapes of latents, prompts and calls that one process may compile; torch gives up after 8 otherwise


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of tensors, once for every set of shapes. It never falls back to running uncompiled.

    torch's own limit of graphs per function is raised for the process.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    return torch.compile(function, fullgraph=True, dynamic=False)


def check_compiler(device: torch.device) -> None:
    """Compile and run a line of arithmetic, so that a machine that cannot compile says so at once.

    Raises:
        ModelError: with the first line of what torch says.
    """
    try:
        compiled(_line)(torch.ones(8, device=device))
    except Exception as error:  # whatever the compiler's own chain of tools raises
        what = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"torch cannot compile for {device.type} here ({type(error).__name__}: {what}), and the network is to run "
            "compiled. Install a C++ compiler (g++, or the one that CXX names) and Python's headers, or set "
            "model.compile: false for a new run"
        ) from error


def _line(numbers: torch.Tensor) -> torch.Tensor:
    return (numbers * 2.0 + 1.0).sin()
