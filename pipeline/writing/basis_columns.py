"""A local basis as columns of a row, and back.

Vectors are float16, as much as their accuracy is worth, and a quarter of the bytes that a dataset of them would take in
float64: two vectors of Stable Diffusion at 512 pixels take 384 kB. They are unit vectors of up to a hundred thousand
numbers, so that their smallest entries may be subnormal, and are still there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.diffusion.subspaces import Leading
from pipeline.engine.pullback import LocalBasis

BASIS_COLUMNS: dict[str, pa.DataType] = {
    "layer": pa.string(),  # the bottleneck's name
    "timestep": pa.float64(),
    "num_vectors": pa.int64(),  # n
    "latent_shape": pa.list_(pa.int64()),  # C, h, w
    "feature_shape": pa.list_(pa.int64()),  # C', h', w'
    "singular_values": pa.list_(pa.float32()),  # n, descending
    "tangents": pa.list_(pa.float16()),  # V: n rows, flat
    "features": pa.list_(pa.float16()),  # U: n rows, flat
    "iterations": pa.int64(),
    "residual": pa.float64(),
    "prompt_vector": pa.list_(pa.float32()),
}


def basis_columns(basis: LocalBasis) -> dict[str, Any]:
    """What a row holds of a basis, under the names of `BASIS_COLUMNS`."""
    leading = basis.leading
    return {
        "layer": basis.layer,
        "timestep": float(basis.timestep),
        "num_vectors": len(leading.stretches),
        "latent_shape": list(basis.latent_shape),
        "feature_shape": list(basis.shape),
        "singular_values": _numbers(leading.stretches, np.float32),
        "tangents": _numbers(leading.tangents, np.float16),
        "features": _numbers(leading.features, np.float16),
        "iterations": basis.iterations,
        "residual": basis.residual,
        "prompt_vector": _numbers(basis.prompt, np.float32),
    }


def _numbers(tensor: Tensor, dtype: type[np.floating[Any]]) -> np.ndarray:
    return tensor.flatten().numpy().astype(dtype)


def basis_of(row: Mapping[str, Any]) -> Leading:
    """The vectors of a row, in float64, of unit length again: rounding shortens them by 1 part in 1,000 at most."""
    count = int(row["num_vectors"])
    tangents, features = (
        torch.from_numpy(np.asarray(row[name], dtype=np.float64)).view(count, -1) for name in ("tangents", "features")
    )
    stretches = torch.from_numpy(np.asarray(row["singular_values"], dtype=np.float64))
    return Leading(_unit(tangents), stretches, _unit(features))


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)
