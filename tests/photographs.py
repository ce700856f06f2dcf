"""Photographs that nobody here drew: the JPEG and PNG pictures inside the scikit-image package."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def photographs() -> dict[str, Path]:
    """File name -> path of every JPEG and PNG picture in the package: RGB, gray, with alpha, square or not."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise RuntimeError("scikit-image is not installed. Install the extra 'dev'")
    folder = Path(spec.origin).parent / "data"
    return {path.name: path for path in sorted(folder.iterdir()) if path.suffix in (".png", ".jpg")}
